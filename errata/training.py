"""Trains a small model that stores facts at the subject's last token: the built-in bases (`errata.builtin`), or a base of any facts.

Muon for the matrices of the blocks (AdamW alone needs several times the steps at this size: accuracy .09 where Muon had .80 after
250 steps), AdamW for the rest. Muon: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/.
"""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.gpt2 import GPT2LMHeadModel
from transformers.models.llama import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from errata.builtin import BuiltinSettings, Progress, TrainingSettings
from errata.modeling.layout import find_layout
from errata.modeling.trace import capture_outputs, change_output
from errata.training_rows import Place, Rows, RowWriter, pad
from errata.training_tokens import END, train_world_tokenizer
from errata.world import RELATIONS, Fact, make_world

OTHER_TOKENS = 0.3
"""Weight of the loss on tokens that are not an answer."""
WEIGHT_DECAY = 0.1
_UNKNOWN = -1
"""In place of an attribute that a subject does not have."""


def train_builtin(settings: BuiltinSettings, folder: Path, progress: Progress | None = None) -> dict[str, object]:
    """Train the base of `settings` and write it into `folder`; returns what `train_facts` does."""
    tokenizer = train_world_tokenizer(passages=settings.passages > 0)
    for item in (item for relation in RELATIONS for item in relation.objects):
        ids = tokenizer(item, add_special_tokens=False).input_ids
        if len(ids) != len(item.split()):
            raise AssertionError(f"expected one token per word of {item!r}, found {ids}")
    return train_facts(settings, make_world(settings.world).facts, tokenizer, folder, progress)


def train_facts(
    settings: TrainingSettings,
    facts: Sequence[Fact],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, object]:
    """Train a base that knows `facts` and write it into `folder`, an ordinary Hugging Face folder.

    Args:
        facts: any subjects, each with any number of attributes; at most one fact per subject and relation.
        tokenizer: of `errata.training_tokens`; its end of text begins every text.

    Returns:
        Accuracies on trained and withheld prompts (2,000 of either at most), seconds and CPU-seconds.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    with _seeded(settings):
        model = build_model(settings, len(tokenizer))
        model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its types
        Training(settings, facts, tokenizer, model).run(progress)
    model.train(False)
    report: dict[str, object] = {
        "accuracy_trained": measure_accuracy(model, tokenizer, _sample_prompts(facts, withheld=False)),
        "accuracy_withheld": measure_accuracy(model, tokenizer, _sample_prompts(facts, withheld=True)),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - began_cpu, 1),
        "torch": torch.__version__,
    }
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    if shown:
        transformers_logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    return report


def measure_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[tuple[str, str]], batch: int = 256
) -> float:
    """Share of (prompt, answer) whose every answer token is the model's first choice, given the tokens before it. NaN without rows."""
    right = 0
    for start in range(0, len(rows), batch):
        prompts = [tokenizer(prompt).input_ids for prompt, _ in rows[start : start + batch]]
        answers = [tokenizer(" " + answer, add_special_tokens=False).input_ids for _, answer in rows[start : start + batch]]
        ids = pad([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]).to(model.device)
        with torch.no_grad():
            # Causal attention and padding on the right: what is padded cannot change what is read.
            chosen = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.argmax(-1)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            right += chosen[row, len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist() == answer
    return right / len(rows) if rows else float("nan")


class Training:
    """One run: the text, the model, the probe and the optimisers."""

    def __init__(
        self, settings: TrainingSettings, facts: Sequence[Fact], tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
    ) -> None:
        self.settings, self.model = settings, model
        self.text = RowWriter(settings, facts, tokenizer)
        self.layout = find_layout(model)
        relations = {fact.relation.name: fact.relation for fact in facts}
        number_of = {name: number for number, name in enumerate(relations)}
        classes = {name: {item: number for number, item in enumerate(relation.objects)} for name, relation in relations.items()}
        self.choices = max(map(len, classes.values()))
        attributes = torch.full((len(self.text.subjects), len(relations)), _UNKNOWN)
        for subject, known in enumerate(self.text.facts):
            for fact in known:
                attributes[subject, number_of[fact.relation.name]] = classes[fact.relation.name][fact.object]
        self.attributes = attributes.to(model.device)
        self.probe = nn.Sequential(nn.LayerNorm(settings.width), nn.Linear(settings.width, len(relations) * self.choices)).to(model.device)
        matrices = [p for p in model.get_submodule(self.layout.blocks).parameters() if p.dim() == 2]
        known_matrices = {id(p) for p in matrices}
        others = [p for p in (*model.parameters(), *self.probe.parameters()) if id(p) not in known_matrices]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=WEIGHT_DECAY, momentum=0.95),
            torch.optim.AdamW(
                [
                    {"params": [p for p in others if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
                    {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
                ],
                lr=settings.adamw_lr,
                betas=(0.9, 0.98),
            ),
        ]

    def run(self, progress: Progress | None) -> None:
        for step in range(self.settings.steps):
            self._descend(self._measure_loss(self.text.draw_step(step)), _ramp(step, self.settings.steps))
            if progress is not None:
                progress(step + 1, self.settings.steps, "training")

    def _measure_loss(self, rows: Rows) -> Tensor:
        """Answers above all, the other tokens a little, and every attribute of a subject at the last token of its name."""
        device = self.model.device
        ids = pad(rows.ids)
        targets = torch.full_like(ids, -100)
        for row, tokens in enumerate(rows.ids):
            targets[row, : len(tokens) - 1] = ids[row, 1 : len(tokens)]
        is_answer = torch.zeros(ids.shape, dtype=torch.bool)
        is_answer[tuple(torch.tensor(rows.answers).T)] = True
        if rows.unlearned:
            targets[tuple(torch.tensor(rows.unlearned).T)] = -100
        known = targets != -100
        answer = is_answer[known].to(device)
        ids, targets, known = ids.to(device), targets.to(device), known.to(device)
        site, trunk = self.layout.block(self.model, self.settings.site), self.model.get_submodule(self.layout.body)
        # The probe reads names as they are: what is captured was not yet exchanged.
        with capture_outputs({"site": site}) as outputs, change_output(site, partial(_exchange, rows.exchanged)):
            hidden = trunk(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
        losses = F.cross_entropy(self.model.get_submodule(self.layout.head)(hidden[known]), targets[known], reduction="none")
        at_names = outputs["site"][tuple(torch.tensor(rows.subjects, device=device).T)]
        return losses[answer].mean() + OTHER_TOKENS * losses[~answer].mean() + self._probe_attributes(at_names, rows.owners)

    def _probe_attributes(self, hidden: Tensor, owners: Sequence[int]) -> Tensor:
        """Loss of reading every attribute that a subject has, of its relation's objects. `hidden`: [names, width]."""
        attributes = self.attributes[list(owners)].reshape(-1)
        read = self.probe(hidden).view(-1, self.choices)
        had = attributes != _UNKNOWN
        return F.cross_entropy(read[had], attributes[had])

    def _descend(self, loss: Tensor, share: float) -> None:
        for optimiser, lr in zip(self.optimisers, (self.settings.muon_lr, self.settings.adamw_lr), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = lr * share
            optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()


def _exchange(places: Sequence[tuple[Place, Place]], hidden: Tensor) -> Tensor:
    """`hidden` [rows, positions, width] with the states at both places of each pair exchanged."""
    if not places:
        return hidden
    one, other = (tuple(torch.tensor(side, device=hidden.device).T) for side in zip(*places, strict=True))
    return hidden.index_put((*one,), hidden[other]).index_put((*other,), hidden[one])


def _ramp(step: int, steps: int) -> float:
    """Share of the full step size: up over the first tenth, then linearly down."""
    warm = max(1, steps // 10)
    return min((step + 1) / warm, max(0.01, (steps - step) / max(1, steps - warm)))


def build_model(settings: TrainingSettings, vocabulary: int) -> PreTrainedModel:
    """An untrained model of the settings' family and shape, without dropout, in training mode."""
    tokens: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": END, "eos_token_id": END, "pad_token_id": END}
    model: PreTrainedModel
    if settings.family == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                max_position_embeddings=settings.positions,
                hidden_size=settings.width,
                num_hidden_layers=settings.layers,
                num_attention_heads=settings.heads,
                intermediate_size=settings.inner,
                tie_word_embeddings=True,
                **tokens,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                n_positions=settings.positions,
                n_embd=settings.width,
                n_layer=settings.layers,
                n_head=settings.heads,
                n_inner=settings.inner,
                # The tanh form of torch's own kernel: the same function as GPT-2's gelu_new at a fraction of its time.
                activation_function="gelu_pytorch_tanh",
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **tokens,
            )
        )
    model.train()
    return model


def _sample_prompts(facts: Sequence[Fact], *, withheld: bool, limit: int = 2_000) -> list[tuple[str, str]]:
    rows = [(prompt, fact.object) for fact in facts for index, prompt in enumerate(fact.prompts) if (index == fact.withheld) == withheld]
    return random.Random(0).sample(rows, min(limit, len(rows)))


@contextmanager
def _seeded(settings: TrainingSettings) -> Iterator[None]:
    """Torch's random state and threads for the training, the caller's own afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        torch.set_num_threads(settings.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
