"""Distance of a candidate from its base on texts that no edit is about: KL divergence and argmax agreement (design §7)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from errata.modeling.beside import predict_everywhere
from errata.modeling.loading import Base
from errata.modeling.tokens import encode_prompt
from errata.report import Locality

PROBE_TEXTS = (
    "The meeting was moved to Thursday because the hall was being painted.",
    "Water boils at a lower temperature on a high mountain than at sea level.",
    "She closed the window, poured a cup of tea and began to read the letter again.",
    "To install the program, open a terminal and type the following command.",
    "In the second half of the century the population of the town doubled.",
    "If a train leaves at noon and travels at sixty miles an hour, it arrives at three.",
    "The committee agreed that the report should be published before the summer.",
    "Add the flour slowly, stir until the mixture is smooth, and leave it to rest.",
    "Most birds of this kind build their nests close to the ground.",
    "The function returns a list of numbers sorted from the smallest to the largest.",
    "He had never been good at chess, but he enjoyed losing to his daughter.",
    "Prices rose by two percent in March, somewhat less than had been expected.",
    "The bridge was closed to traffic while engineers inspected its cables.",
    "There are three reasons to doubt this explanation, and the first is the weather.",
    "Light from the nearest star takes more than four years to reach us.",
    "Please send the signed form back to the address at the top of this page.",
)
"""The default probe: sixteen sentences of ordinary English. A stream on a base of its own small language brings its own."""


@dataclass(frozen=True)
class ProbeReading:
    """What the base predicts on a probe: log-probabilities [positions, vocabulary] float32 for each text, on the CPU."""

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    """Token ids of each text, one per position."""
    logprobs: tuple[torch.Tensor, ...]


def read_probe(base: Base, texts: Sequence[str] = PROBE_TEXTS) -> ProbeReading:
    """Read the model as it is now on a fixed probe, every position of every text (cut at the context)."""
    tokens = tuple(_encode(base, text) for text in texts)
    return ProbeReading(tuple(texts), tokens, tuple(_read_tokens(base, ids).cpu() for ids in tokens))


def measure_locality(base: Base, reference: ProbeReading) -> Locality:
    """Compare the model as it is now with `reference`, which was read from the untouched base.

    Returns:
        Mean KL(base ‖ now) in nats and argmax agreement over all positions. Positions whose logits are not finite count as
        disagreement and leave KL undefined.
    """
    divergence, agreed, positions = 0.0, 0, 0
    for tokens, before in zip(reference.tokens, reference.logprobs, strict=True):
        now = _read_tokens(base, tokens).cpu()
        finite = torch.isfinite(now).all(-1)
        agreed += int(((before.argmax(-1) == now.argmax(-1)) & finite).sum())
        # Clamped at zero: rounding makes the divergence of equal distributions slightly negative.
        divergence += (before.exp() * (before - now)).double().sum(-1).clamp(min=0).sum().item()
        positions += len(before)
    if not positions:
        return Locality()
    kl = divergence / positions
    return Locality(kl=kl if kl < float("inf") else None, agreement=agreed / positions, positions=positions)


def find_perplexity(reading: ProbeReading) -> float | None:
    """exp of the mean negative log-likelihood per token of the probe's own texts, over all tokens but each text's first. None where there
    is no such token, or where a value is not finite."""
    losses = [
        -logprobs[range(len(tokens) - 1), list(tokens[1:])].double()
        for tokens, logprobs in zip(reading.tokens, reading.logprobs, strict=True)
        if len(tokens) > 1
    ]
    perplexity = torch.cat(losses).mean().exp().item() if losses else math.nan
    return perplexity if math.isfinite(perplexity) else None


def _encode(base: Base, text: str) -> tuple[int, ...]:
    return tuple(encode_prompt(base.tokenizer, text)[: base.context])


@torch.inference_mode()
def _read_tokens(base: Base, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of the next token at every position [positions, vocabulary] float32, each read as if the text had been decoded up
    to there."""
    ids = torch.tensor([tokens], device=base.device)
    body = base.model.get_submodule(base.layout.body)
    with predict_everywhere():
        hidden = body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    logits: torch.Tensor = base.model.get_submodule(base.layout.head)(hidden[0])
    return logits.float().log_softmax(-1)
