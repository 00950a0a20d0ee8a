"""The same questions to the base and to the champion."""

from collections.abc import Sequence

from errata.candidates import load_artifacts
from errata.evaluation.generation import generate_answers
from errata.modeling.patch import attach
from errata.settings import Settings
from registry.stream import Stream
from tasks._session import load_under, read_manifest


def answer_prompts(settings: Settings, stream: Stream, prompts: Sequence[str], max_new_tokens: int) -> list[dict[str, str]]:
    """Greedy answers, one row per prompt: `prompt`, `base`, `champion`."""
    manifest = read_manifest(stream, stream.log.read(stream.head.champion).manifest or stream.head.manifest)
    model = load_under(settings, stream, manifest)
    limits = {"max_new_tokens": max_new_tokens, "batch_tokens": settings.evaluate.batch_tokens}
    before = generate_answers(model.base, prompts, **limits)
    with attach(model.base, load_artifacts(stream.objects, manifest)):
        after = generate_answers(model.base, prompts, **limits)
    return [{"prompt": prompt, "base": old, "champion": new} for prompt, old, new in zip(prompts, before, after, strict=True)]
