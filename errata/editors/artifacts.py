"""What an editor hands over: frozen, attachable, safetensors on disk. This module travels inside every MLflow version."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from errata.errors import FormatError
from errata.modeling.loading import Base
from errata.modeling.patch import Attachable, add_deltas

_FORMAT = 1

Fetch = Callable[[str], bytes]
"""The bytes of a digest."""
Parts = Mapping[str, Callable[[], bytes]]
"""Digest → how to get its bytes. Equal parts of many versions are stored once."""


class Artifact(Attachable, Protocol):
    """Anything an editor hands over."""

    @property
    def written(self) -> Mapping[str, torch.Tensor]:
        """What `Editor.solve_exact` names, as it is stored."""
        ...

    @property
    def parts(self) -> Parts:
        """What it has in objects of their own, which its bytes name."""
        ...

    def to_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class WeightDelta:
    """All edits of a stream as additions to weights of one base."""

    base: str
    """Digest of the base it may be added to."""
    deltas: Mapping[str, torch.Tensor]
    """Parameter name → Δ [d_out, d_in] float32."""

    @property
    def written(self) -> Mapping[str, torch.Tensor]:
        return self.deltas

    @property
    def parts(self) -> Parts:
        return {}

    def attach(self, base: Base) -> AbstractContextManager[None]:
        """See `errata.modeling.patch.add_deltas`."""
        return add_deltas(base, self.deltas)

    def to_bytes(self) -> bytes:
        tensors = {name: delta.detach().float().contiguous().cpu() for name, delta in self.deltas.items()}
        return pack_tensors("weight_delta", _FORMAT, tensors, {"base": self.base})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises FormatError: not safetensors, another kind, or a newer format."""
        tensors, metadata = unpack_tensors(data, "weight_delta", _FORMAT)
        return cls(metadata["base"], tensors)


def pack_tensors(kind: str, version: int, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Safetensors bytes; equal contents give equal bytes.

    safetensors writes several metadata entries in random order, which would give one content many digests: all of ours go into one entry.
    """
    return save(dict(sorted(tensors.items())), metadata={"errata": spell_metadata(kind, version, metadata)})


def spell_metadata(kind: str, version: int, metadata: Mapping[str, Any]) -> str:
    return json.dumps({"kind": kind, "format": version, **metadata}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def unpack_tensors(data: bytes, kind: str, version: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and metadata of `pack_tensors`.

    Raises:
        FormatError: not safetensors, not ours, another kind, or a format newer than `version`.
    """
    metadata = read_metadata(data, kind, version)
    try:
        return load(data), metadata
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FormatError(f"expected safetensors of kind {kind!r}, found bytes that cannot be read as such ({error})") from None


def read_kind(data: bytes) -> str:
    """The kind that `pack_tensors` was told. Raises FormatError: not safetensors of ours."""
    return str(_read_ours(data, "ours").get("kind"))


def read_metadata(data: bytes, kind: str, version: int) -> dict[str, Any]:
    """The metadata of `pack_tensors`; of `data` only the beginning, with the header, is read. Raises as `unpack_tensors`."""
    metadata = _read_ours(data, f"kind {kind!r}")
    if metadata.get("kind") != kind:
        raise FormatError(f"expected safetensors of kind {kind!r}, found {metadata.get('kind')!r}")
    if metadata.get("format") != version:
        raise FormatError(f"expected {kind} of format {version}, found {metadata.get('format')!r}: written by another Errata")
    return metadata


def _read_ours(data: bytes, wanted: str) -> dict[str, Any]:
    try:
        length = int.from_bytes(data[:8], "little")
        metadata: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["errata"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"expected safetensors of {wanted}, found bytes that cannot be read as such ({error})") from None
    return metadata
