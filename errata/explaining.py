"""Why a model with edits says what it says: which neuron answered each token, which edits' keys the prompt comes near, and what the deltas
add to it. Asked of the artifacts themselves, so that it holds for whatever a version consists of.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn

from errata.editors.adapters import LoraAdapter
from errata.editors.artifacts import Artifact
from errata.editors.base import Pairs
from errata.editors.memory import EditMemory
from errata.editors.neurons import Firing, NeuronPatch
from errata.evaluation.generation import continue_prompt
from errata.evaluation.scoring import score_rows
from errata.modeling.loading import Base
from errata.modeling.offload import read_parameter
from errata.modeling.patch import attach
from errata.modeling.queries import encode_queries
from errata.modeling.trace import trace_inputs
from errata.retrieval.facts import find_edit
from errata.retrieval.routing import Route

SHOWN = 5
"""Edits with the nearest keys that are named."""


class Said(NamedTuple):
    """One token of an answer."""

    text: str
    logprob: float
    """Natural log-probability of it, with all edits."""
    base_logprob: float
    """The same of the base, after the same tokens."""
    firing: Firing | None
    """None where the version has no neurons."""


class Near(NamedTuple):
    """A live pair whose keys a token of the prompt comes near."""

    edits: tuple[str, ...]
    token: int
    """Of the prompt: where it comes nearest."""
    cosine: float
    """Mean over the edited layers."""
    layers: Mapping[int, float]
    """Edited layer → cosine."""


class Push(NamedTuple):
    """What a delta adds to one token."""

    layer: int
    share: float
    """‖ΔW k‖ / ‖W0 k‖, k being the input of the edited weight as the edited model has it."""


@dataclass(frozen=True)
class Explanation:
    """What there is to say of one answer. A version without edits has neither neurons nor deltas."""

    answer: str
    said: tuple[Said, ...]
    neurons: int
    """Neurons that were asked, tombstones included."""
    prompt: tuple[str, ...]
    """Its tokens."""
    compared: int
    """Live pairs whose keys were compared; 0 where the version has no deltas."""
    near: tuple[Near, ...]
    """Nearest first, `SHOWN` at most."""
    token: int | None
    """Of the prompt: where `pushes` are measured, which is where it comes nearest to a pair, or its end; None without deltas."""
    pushes: tuple[Push, ...]
    route: Route | None
    """What memory made of the prompt; None without one."""
    absorbed: frozenset[str]
    """Ids of the edits that an adapter has taken in. It cannot be said which of them made it answer."""


@torch.inference_mode()
def explain_answer(
    base: Base, artifacts: Sequence[Artifact], prompt: str, pairs: Iterable[Pairs], *, max_new_tokens: int, cascades: bool = False
) -> Explanation:
    """Answer a prompt greedily with a KV cache, and say why.

    The answer's tokens are then fed once more at once, each active where it is predicted, which is what decoding did up to rounding: what
    is read there is what neurons and edited weights met.

    Args:
        pairs: the live ones, in blocks; read through only where the version has deltas.
        cascades: keys above the first layer were read with the layers below written, so they are compared with what the edited model has.

    Raises:
        BaseMismatchError: an artifact is of another base.
    """
    layout = base.layout
    names = {layout.weight_name(layer): layer for layer in range(layout.count_layers(base.model))}
    # An adapter was trained and not solved from pairs: it has no keys to compare with.
    solved = [artifact for artifact in artifacts if not isinstance(artifact, LoraAdapter)]
    deltas = {names[name]: delta for artifact in solved for name, delta in artifact.deltas.items()}
    patch = next((artifact for artifact in artifacts if isinstance(artifact, NeuronPatch)), None)
    memory = next((artifact for artifact in artifacts if isinstance(artifact, EditMemory)), None)
    adapter = next((artifact for artifact in artifacts if isinstance(artifact, LoraAdapter)), None)
    edited: dict[str, nn.Module] = {f"edited {layer}": layout.projection_of(base.model, layer) for layer in deltas}
    heard = {"heard": layout.mlp_of(base.model, patch.layer)} if patch else {}
    with attach(base, artifacts):
        continued = continue_prompt(base, prompt, max_new_tokens=max_new_tokens)
        fed, ids = continued.prompt, continued.ids
        row = ((*fed, *ids[:-1]), tuple(ids))
        with trace_inputs({**edited, **heard}, lambda inputs: inputs[0].float()) as met:
            (after,) = score_rows(base, [row])
    with trace_inputs(edited, lambda inputs: inputs[0].float()) as plain:
        (before,) = score_rows(base, [row])
    (bare,) = encode_queries(base, [prompt], max_new_tokens)
    if bare != fed:  # what the base says, which nobody tells the fact
        (before,) = score_rows(base, [((*bare, *ids[:-1]), tuple(ids))])
    firings: Sequence[Firing | None] = [None] * len(ids)
    if patch:
        firings = patch.place_on(base.device).explain(met["heard"][len(fed) - 1 :])
    read = met if cascades else plain
    near, compared = find_near({layer: read[f"edited {layer}"][: len(fed)] for layer in deltas}, pairs) if deltas else ([], 0)
    token = (near[0].token if near else len(fed) - 1) if deltas else None
    pushes = [Push(layer, _measure_push(base, layer, deltas[layer], met[f"edited {layer}"][token])) for layer in sorted(deltas)]
    texts = _spell(base, ids)
    return Explanation(
        answer=continued.answer,
        said=tuple(Said(*each) for each in zip(texts, after.logprobs, before.logprobs, firings, strict=True)),
        neurons=len(patch.places) if patch else 0,
        prompt=tuple(_spell(base, fed)),
        compared=compared,
        near=tuple(near),
        token=token,
        pushes=tuple(pushes),
        route=memory.route([prompt])[0] if memory else None,
        absorbed=frozenset(map(find_edit, adapter.absorbed)) if adapter else frozenset(),
    )


def find_near(inputs: Mapping[int, torch.Tensor], pairs: Iterable[Pairs]) -> tuple[list[Near], int]:
    """The pairs whose keys come nearest to a token, nearest first, and how many pairs were compared.

    Args:
        inputs: layer → what its edited weight meets at the tokens of a prompt [t, d_in] float32.
        pairs: read block by block, none of which is kept.
    """
    queries = {layer: nn.functional.normalize(states, dim=1).cpu() for layer, states in inputs.items()}
    best: list[Near] = []
    compared = 0
    for block in pairs:
        compared += len(block)
        cosines = {layer: nn.functional.normalize(block.keys[layer], dim=1) @ states.T for layer, states in queries.items()}
        places = torch.stack(list(cosines.values())).mean(dim=0).max(dim=1)
        for index in places.values.topk(min(SHOWN, len(block))).indices.tolist():
            token = int(places.indices[index])
            layers = {layer: float(each[index, token]) for layer, each in cosines.items()}
            best.append(Near(block.owners[index], token, float(places.values[index]), layers))
        best = sorted(best, key=lambda near: -near.cosine)[:SHOWN]
    return best, compared


def list_edits(explanation: Explanation) -> list[str]:
    """Ids of every edit that an explanation names, each once."""
    places = [place for said in explanation.said if said.firing for place in (said.firing.place, said.firing.rival) if place]
    named = [*(place.edits for place in places), *(near.edits for near in explanation.near)]
    named += [(find_edit(name),) for name in explanation.route.scores] if explanation.route else []
    named += [(find_edit(explanation.route.fact.id),)] if explanation.route and explanation.route.fact else []
    return list(dict.fromkeys(chain.from_iterable(named)))


def _measure_push(base: Base, layer: int, delta: torch.Tensor, met: torch.Tensor) -> float:
    """‖ΔW k‖ / ‖W0 k‖ for k [d_in]."""
    weight = base.layout.orient(read_parameter(base.model, base.layout.weight_name(layer)))
    said = (weight.float() @ met.to(weight.device)).norm()
    return float((delta.float().to(met.device) @ met).norm() / said.cpu().clamp(min=1e-12).to(met.device))


def _spell(base: Base, ids: Sequence[int]) -> list[str]:
    return [str(base.tokenizer.decode([token])) for token in ids]
