"""The model inside every MLflow version: loads the base by reference, puts one commit's artifacts on it, and answers prompts.

This file travels with each version (MLflow's models-from-code) beside the few modules of `errata` that it imports, and runs where
neither the repository nor its cache exists. Nothing else of ours imports it, and nothing in a version is pickled.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.artifacts
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from errata.editors.kinds import load_artifact
from errata.editors.memory import EditMemory
from errata.errors import BaseMismatchError, FormatError, InputError, ModelError, ObjectCorruptError
from errata.modeling.loading import Base, load_base, share_base
from errata.modeling.patch import attach
from errata.modeling.queries import read_queries
from errata.modeling.tokens import find_ends, find_pad, pad_rows

_BATCH_ROWS = 32


@dataclass(frozen=True)
class _Version:
    """One commit, ready to answer. A request reads it once and keeps it, so an update never shows in the middle of an answer."""

    commit: int
    base: Base
    """The model with the artifacts on; it shares every other weight with the untouched base."""
    attached: AbstractContextManager[None]
    """Entered, and held as long as the version lives: letting go of it would take the artifacts off."""


class _Service:
    """Prompts in, continuations out, from one commit of a stream."""

    _base: Base
    _version: _Version
    _stream: str
    _parts: "_Parts"

    def load_context(self, context: Any) -> None:
        """Called by MLflow on load. `model_config={"device": "cuda:1"}` of `load_model` says where the model runs; `auto` otherwise."""
        folder = Path(context.artifacts["version"])
        record = _read_record(folder)
        self._stream = record["stream"]
        self._base = _load_reference(record["base"], context.artifacts.get("base"), context.model_config["device"])
        self._parts = _Parts()
        self._version = _assemble(self._base, folder, record, self._parts)

    # No type hints here: MLflow would make them the signature and drop the parameters of the logged one.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Continue each prompt.

        Args:
            model_input: prompts, as a list, array, series or the first column of a frame.
            params: `max_new_tokens`; `temperature` (0: always the likeliest token); `top_p`; `seed` (equal calls with equal seeds give
                equal answers; None: a new one each call); `with_commit`.

        Returns:
            One text per prompt; with `with_commit`, one {"text", "commit"} per prompt.

        Raises:
            MlflowException: an empty prompt, or a parameter out of range; over HTTP it becomes status 400 with this message.
        """
        version = self._version
        chosen = {"max_new_tokens": 32, "temperature": 0.0, "top_p": 1.0, "seed": None, "with_commit": False, **(params or {})}
        with_commit = chosen.pop("with_commit")
        try:
            texts = _continue_prompts(version.base, _read_prompts(model_input), **chosen)
        except InputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return [{"text": text, "commit": version.commit} for text in texts] if with_commit else texts

    @property
    def commit(self) -> int:
        """The commit that answers now."""
        return self._version.commit

    def update(self, version: int | str) -> int:
        """Answer from another version, from the next request on; requests under way end on the version they began with.

        Only the artifacts are fetched: the base stays in memory, and the new model shares its weights.

        Args:
            version: a number or alias of the same registered model (`13`, `"champion"`), or a `models:/` URI.

        Returns:
            The commit that answers now.

        Raises:
            BaseMismatchError: the version is for another base; the model goes on with the one it has.
        """
        name = str(version)
        uri = name if ":/" in name else f"models:/{self._stream}{'/' if name.isdigit() else '@'}{name}"
        with tempfile.TemporaryDirectory() as folder:
            files = Path(mlflow.artifacts.download_artifacts(f"{uri}/artifacts/version", dst_path=folder))
            record = _read_record(files)
            if record["base"]["digest"] != self._base.digest:
                found = record["base"]["digest"]
                raise BaseMismatchError(f"{uri}: expected a version for the base {self._base.digest[:12]} in memory, found {found[:12]}")
            self._version = _assemble(self._base, files, record, self._parts)
        return self._version.commit


class ServedModel(_Service, PythonModel):
    """What MLflow loads. `mlflow.pyfunc.load_model(…).unwrap_python_model()` gives it, with `update` and `commit`.

    It only joins two classes: MLflow warns its users about any `predict` without type hints in the body of a subclass.
    """


def _read_record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "version.json").read_text())
    if record["format"] not in (1, 2):
        raise FormatError(f"{folder}: expected a version of format 1 or 2, found {record['format']!r}: load it anew instead of updating")
    return record


def _load_reference(reference: dict[str, Any], beside: str | None, device: str) -> Base:
    """The base that a version names: from the hub at its pinned revision, from the MLflow run that holds its one copy, or, in an exported
    folder, from beside the version.

    Raises:
        ModelError: it is not there.
        BaseMismatchError: what is there is not the base that the version was made for.
    """
    if reference["kind"] == "hub":
        return load_base(reference["source"], revision=reference["revision"], device=device, expect=reference["digest"])
    if reference["kind"] == "beside" and beside is not None:
        return load_base(beside, device=device, expect=reference["digest"])
    uri: str = reference["uri"]
    run, _, path = uri.removeprefix("runs:/").partition("/")
    try:
        # By run and not by URI: MLflow copies what a runs:/ URI names even where it lies on this machine's disk.
        folder = Path(mlflow.artifacts.download_artifacts(run_id=run)) / path
    except Exception as error:
        raise ModelError(f"base {reference['digest'][:12]}: expected its files at {uri} of {mlflow.get_tracking_uri()}: {error}") from error
    return load_base(folder, device=device, expect=reference["digest"])


class _Parts:
    """Files that versions share, each downloaded once for as long as the service lives."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="errata-parts-")
        self._files: dict[str, Path] = {}

    def read(self, folder: Path, uri: str, digest: str) -> bytes:
        """
        Args:
            folder: of the version.
            uri: where its parts are; in an exported folder, a folder beside its record.

        Raises:
            ModelError: it is not there.
            ObjectCorruptError: its bytes are not those that were stored.
        """
        name = f"{digest}.safetensors"
        run, _, path = uri.removeprefix("runs:/").partition("/")
        try:
            if not uri.startswith("runs:/"):
                self._files[digest] = folder / uri / name
            elif digest not in self._files:
                where = mlflow.artifacts.download_artifacts(run_id=run, artifact_path=f"{path}/{name}", dst_path=self._folder.name)
                self._files[digest] = Path(where)
            data = self._files[digest].read_bytes()
        except Exception as error:
            raise ModelError(f"part {digest[:12]}: expected its file at {uri} of {mlflow.get_tracking_uri()}: {error}") from error
        _check(data, digest, name)
        return data


def _check(data: bytes, digest: str, where: str) -> None:
    if (found := hashlib.sha256(data).hexdigest()) != digest:
        raise ObjectCorruptError(f"{where}: expected sha256 {digest}, found {found}")


def _assemble(base: Base, folder: Path, record: dict[str, Any], parts: _Parts) -> _Version:
    artifacts = []
    for layer in record["layers"]:
        data = (folder / layer["file"]).read_bytes()
        _check(data, layer["digest"], f"{layer['file']} of commit {record['commit']}")
        artifacts.append(load_artifact(data, lambda digest: parts.read(folder, record["parts"], digest)))
    for artifact in artifacts:
        if isinstance(artifact, EditMemory):
            artifact.load()
    edited = _share(base)
    attached = attach(edited, artifacts)
    attached.__enter__()
    return _Version(record["commit"], edited, attached)


def _share(base: Base) -> Base:
    """A second model over the same tensors, which generates as a request asks and in no other way."""
    shared = share_base(base)
    # A base's own generation defaults (sampling, penalties) would mix into what a request asks for.
    ends = sorted(find_ends(base.tokenizer, base.model))
    shared.model.generation_config = GenerationConfig(pad_token_id=find_pad(base.tokenizer), eos_token_id=ends or None)
    return shared


def _read_prompts(model_input: Any) -> list[str]:
    values = np.atleast_1d(np.asarray(model_input, dtype=object))
    prompts: list[str] = (values[:, 0] if values.ndim == 2 else values).tolist()
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"prompt {index}: expected some text, found {prompt!r}")
    return prompts


@torch.inference_mode()
def _continue_prompts(
    base: Base, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, top_p: float, seed: int | None
) -> list[str]:
    """Continuations of `prompts`, many at a time, padded on the left. A prompt that leaves no room in the context loses its beginning."""
    if not 1 <= max_new_tokens < base.context:
        raise InputError(f"max_new_tokens: expected 1 to {base.context - 1}, found {max_new_tokens}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise InputError(f"expected temperature ≥ 0 and 0 < top_p ≤ 1, found {temperature} and {top_p}")
    warpers = LogitsProcessorList([_Sampler(temperature, top_p, seed)] if temperature > 0 else [])
    queries = read_queries(base, prompts, max_new_tokens)
    rows = [query.ids for query in queries]
    answers = [""] * len(rows)
    for indices in _batch(rows):
        ids, mask = pad_rows([rows[index] for index in indices], find_pad(base.tokenizer), "left", base.device)
        written: torch.Tensor = base.model.generate(  # type: ignore[operator]  # [rows, longest + new]
            ids, attention_mask=mask, logits_processor=warpers, max_new_tokens=max_new_tokens, do_sample=False
        )
        texts = base.tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            # Behind facts an answer ends with its line: what follows would be another fact.
            answers[index] = _cut_line(text) if queries[index].routed else text
    return answers


def _cut_line(text: str) -> str:
    """A text up to the end of its first line that says something."""
    start = len(text) - len(text.lstrip())
    return text[:start] + text[start:].partition("\n")[0]


def _batch(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of rows of similar length, so that little is padded."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), _BATCH_ROWS):
        yield order[start : start + _BATCH_ROWS]


class _Sampler(LogitsProcessor):
    """Sampling as an argmax over logits with Gumbel noise: the same distribution, from a generator of this request alone.

    transformers samples from torch's global generator, which concurrent requests would share.
    """

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        self._temperature = temperature
        self._warper = TopPLogitsWarper(top_p) if top_p < 1 else None
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scaled = scores.float() / self._temperature
        kept = scaled if self._warper is None else self._warper(input_ids, scaled)
        noise = torch.empty(kept.shape).exponential_(generator=self._generator).log().neg()
        return kept + noise.to(kept.device)  # type: ignore[return-value]


set_model(ServedModel())
