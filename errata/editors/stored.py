"""Tensors that stay in their file: read one by one where they are wanted, written one by one as they are made.

A safetensors file is mapped into memory for the length of one reading only, and what was read is a copy: so no more of it counts as used
memory than is held. How a file must look to have the same bytes as the library's own is in `write_doubles`.
"""

import json
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from errata.editors.artifacts import read_metadata, spell_metadata
from errata.errors import FormatError, StorageError

K = TypeVar("K")


class Lazy(Mapping[K, torch.Tensor]):
    """A mapping whose tensors are made anew at each reading and held by nobody else.

    Attributes:
        shapes: of each tensor, known without making it.
    """

    def __init__(self, shapes: Mapping[K, Sequence[int]], read: Callable[[K], torch.Tensor]) -> None:
        self.shapes, self._read = dict(shapes), read

    def __getitem__(self, key: K) -> torch.Tensor:
        if key not in self.shapes:
            raise KeyError(key)
        return self._read(key)

    def __iter__(self) -> Iterator[K]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def list_shapes(tensors: Mapping[K, torch.Tensor]) -> dict[K, Sequence[int]]:
    """Shapes of all, without reading what stays in a file."""
    return dict(tensors.shapes) if isinstance(tensors, Lazy | TensorFile) else {key: tensor.shape for key, tensor in tensors.items()}


class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, each read when it is asked for.

    Attributes:
        metadata: what `pack_tensors` was given.
        shapes: of each tensor.

    Raises:
        FormatError: not safetensors, not ours, another kind, or a format newer than `version`.
    """

    def __init__(self, path: Path, kind: str, version: int) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                length = file.read(8)
                self.metadata: dict[str, Any] = read_metadata(length + file.read(int.from_bytes(length, "little")), kind, version)
            with safe_open(path, framework="pt") as mapped:
                self.shapes: dict[str, Sequence[int]] = {name: tuple(mapped.get_slice(name).get_shape()) for name in mapped.keys()}  # noqa: SIM118
        except OSError as error:
            raise StorageError(f"expected to read {path}: {error.strerror or error}") from error
        except SafetensorError as error:
            raise FormatError(
                f"{path}: expected safetensors of kind {kind!r}, found a file that cannot be read as such ({error})"
            ) from None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        with safe_open(self._path, framework="pt") as mapped:
            tensor: torch.Tensor = mapped.get_tensor(name)
            return tensor.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


Entry = tuple[str, Sequence[int], Callable[[], torch.Tensor]]
"""Name, shape, and what makes the tensor."""


def write_doubles(file: BinaryIO, kind: str, version: int, entries: Sequence[Entry], metadata: Mapping[str, Any]) -> None:
    """Float64 tensors as `pack_tensors` would spell them, byte for byte, with one of them in memory at a time.

    safetensors sorts by dtype, then by name; begins with the length of its header (8 bytes, little endian), which is JSON without
    spaces but for those that fill it up to a multiple of 8.
    """
    ordered = sorted(entries, key=lambda entry: entry[0])
    header: dict[str, Any] = {"__metadata__": {"errata": spell_metadata(kind, version, metadata)}}
    end = 0
    for name, shape, _ in ordered:
        begin, end = end, end + 8 * math.prod(shape)
        header[name] = {"dtype": "F64", "shape": list(shape), "data_offsets": [begin, end]}
    spelled = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    spelled += b" " * (-len(spelled) % 8)
    file.write(len(spelled).to_bytes(8, "little") + spelled)
    for _, _, make in ordered:
        file.write(make().double().contiguous().numpy().data)


def spill_doubles(folder: Path | None, kind: str, version: int, entries: Sequence[Entry], metadata: Mapping[str, Any]) -> TensorFile:
    """The same in a file of its own, which goes when nobody reads it any more.

    Args:
        folder: where there is room; None is the system's place for temporary files.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix="errata-", dir=folder))
        path = own / f"{kind}.safetensors"
        try:
            with path.open("wb") as file:
                write_doubles(file, kind, version, entries, metadata)
            made = TensorFile(path, kind, version)
        except BaseException:
            shutil.rmtree(own, ignore_errors=True)
            raise
    except OSError as error:
        raise StorageError(f"expected room for {kind} in {folder or tempfile.gettempdir()}: {error.strerror or error}") from error
    weakref.finalize(made, shutil.rmtree, own, ignore_errors=True)
    return made
