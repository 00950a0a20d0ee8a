"""The same questions to the base and to the champion, and why the champion says what it says."""

from collections.abc import Sequence
from contextlib import suppress
from math import exp
from typing import Any

from errata.candidates import load_artifacts, read_blocks
from errata.editors.adapters import LoraAdapter
from errata.editors.neurons import Firing, Place
from errata.errors import ErasedError
from errata.evaluation.generation import generate_answers
from errata.explaining import Explanation, Said, explain_answer, list_edits
from errata.manifests import Manifest, PairRef
from errata.modeling.patch import attach
from errata.retrieval.facts import find_edit
from errata.retrieval.routing import Route
from errata.settings import Settings
from registry.stream import Stream
from registry.undoing import list_served
from tasks._progress import show_progress
from tasks._session import load_under, read_manifest

Facts = dict[str, Any]


def answer_prompts(settings: Settings, stream: Stream, prompts: Sequence[str], max_new_tokens: int) -> list[dict[str, str]]:
    """Greedy answers, one row per prompt: `prompt`, `base`, `champion`."""
    manifest = read_champion(stream)
    model = load_under(settings, stream, manifest)
    limits = {"max_new_tokens": max_new_tokens, "batch_tokens": settings.evaluate.batch_tokens}
    before = generate_answers(model.base, prompts, **limits)
    with attach(model.base, load_artifacts(stream.objects, manifest)):
        after = generate_answers(model.base, prompts, **limits)
    return [{"prompt": prompt, "base": old, "champion": new} for prompt, old, new in zip(prompts, before, after, strict=True)]


def explain_prompts(settings: Settings, stream: Stream, prompts: Sequence[str], max_new_tokens: int) -> list[Facts]:
    """As `answer_prompts`, each row with why: see `spell_explanation`."""
    manifest = read_champion(stream)
    model = load_under(settings, stream, manifest)
    artifacts = load_artifacts(stream.objects, manifest)
    limits = {"max_new_tokens": max_new_tokens, "batch_tokens": settings.evaluate.batch_tokens}
    answers = generate_answers(model.base, prompts, **limits)
    reads = any(artifact.deltas for artifact in artifacts if not isinstance(artifact, LoraAdapter))
    refs = [PairRef(pairs=served.pairs, row=served.line) for served in list_served(stream) if served.pairs] if reads else []
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with show_progress("comparing keys") as on_progress:
            blocks = read_blocks(stream.objects, refs, on_progress)
            cascades = not model.editor.order_free
            found = explain_answer(model.base, artifacts, prompt, blocks, max_new_tokens=max_new_tokens, cascades=cascades)
        rows.append({"prompt": prompt, "base": answer, "champion": found.answer, **spell_explanation(stream, found)})
    return rows


def read_champion(stream: Stream) -> Manifest:
    return read_manifest(stream, stream.log.read(stream.head.champion).manifest or stream.head.manifest)


def spell_explanation(stream: Stream, found: Explanation) -> Facts:
    """An explanation as JSON, its edits with what they say.

    `tokens`: of the answer, each with its probability, that of the base, and, where the version has `neurons`, what its neuron did:
    `fired`, `tombstone` or `none`. `near`: pairs by the cosine of their keys with the prompt's, of `compared` ones. `deltas`: per layer
    ‖ΔW k‖ / ‖W0 k‖ at the token `at`. `memory`: how the prompt was routed, null without a memory: its `case`, the `fact` that was put
    before it, the similarity of each fact that was compared, the `floor` they were to reach, and the subjects it `names`. `absorbed`: how
    many edits the adapter has taken in.
    """
    edits = {edit_id: spell_edit(stream, edit_id) for edit_id in list_edits(found)}
    return {
        "tokens": [_spell_token(said, edits) for said in found.said],
        "neurons": found.neurons,
        "compared": found.compared,
        "near": [
            {
                "edits": [edits[edit_id] for edit_id in near.edits],
                "cosine": near.cosine,
                "layers": {str(layer): cosine for layer, cosine in near.layers.items()},
                "token": near.token,
                "text": found.prompt[near.token],
            }
            for near in found.near
        ],
        "at": None if found.token is None else {"token": found.token, "text": found.prompt[found.token]},
        "deltas": {str(push.layer): push.share for push in found.pushes},
        "memory": _spell_route(found.route, edits) if found.route else None,
        "absorbed": len(found.absorbed),
    }


def spell_edit(stream: Stream, edit_id: str) -> Facts:
    """What an edit says, of the stream's records; without text where that was erased."""
    row = stream.index.find_edit(edit_id)
    facts: Facts = {"id": edit_id, "occurrence": row.occurrence if row else None, "status": row.status if row else None}
    if row and row.status != "erased":
        with suppress(ErasedError):
            edit = stream.read_record(row).edit
            facts |= {"prompt": edit.rewrite_prompt, "target": edit.target_new}
    return facts


def _spell_token(said: Said, edits: dict[str, Facts]) -> Facts:
    facts: Facts = {"token": said.text, "probability": exp(said.logprob), "base_probability": exp(said.base_logprob)}
    return facts | (_spell_firing(said.firing, edits) if said.firing else {})


def _spell_firing(firing: Firing, edits: dict[str, Facts]) -> Facts:
    return {
        "told": firing.told,
        "neuron": _spell_place(firing.place, edits),
        "cosine": firing.cosine,
        "threshold": firing.cosine - firing.excess,
        "activation": firing.activation,
        "added": firing.added,
        "margin": firing.margin if firing.rival else None,
        "rival": _spell_place(firing.rival, edits) if firing.rival else None,
    }


def _spell_route(route: Route, edits: dict[str, Facts]) -> Facts:
    scores = sorted(route.scores.items(), key=lambda item: -item[1])
    return {
        "case": route.case,
        "fact": edits[find_edit(route.fact.id)] if route.fact else None,
        "scores": [{"edit": edits[find_edit(name)], "similarity": score} for name, score in scores],
        "floor": route.floor,
        "names": list(route.names),
    }


def _spell_place(place: Place, edits: dict[str, Facts]) -> Facts:
    """A neuron: its edits, and which token of the target it says, counted from 1."""
    return {"edits": [edits[edit_id] for edit_id in place.edits], "token": place.token + 1, "live": place.live}
