"""What iReVa keeps of past edits: their neurons in order of arrival, and which of them were withdrawn.

Blocks are stored pairs that never change: a batch writes the last one anew, which is small, and names the others. A withdrawn pair
becomes a tombstone: its key goes on winning what is nearest to it, so that no other neuron answers there, and adds nothing (algorithms.md
§3.2). A new neuron for the same subject, close enough to be caught by a tombstone, takes its place.
"""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Self

import torch

from errata.editors.artifacts import Fetch, Parts, pack_tensors, unpack_tensors
from errata.editors.base import Pairs
from errata.editors.neurons import Block, find_bias
from errata.edits import digest_of
from errata.errors import EditorError

_FORMAT = 1
BLOCK = 1_024
"""Neurons from which on a block is closed: what a batch writes again at most, besides its own."""


@dataclass(frozen=True)
class NeuronState:
    """The pairs of a stream in order of arrival, cut into blocks."""

    base: str
    prepare: str
    blocks: tuple[Pairs, ...] = ()
    digests: tuple[str, ...] = ()
    """Of all blocks but the last, as they are stored."""
    dead: frozenset[int] = frozenset()
    """Pairs, counted over all blocks, that are tombstones."""

    @property
    def count(self) -> int:
        """Live pairs."""
        return sum(map(len, self.blocks)) - len(self.dead)

    @property
    def parts(self) -> Parts:
        return {digest: block.to_bytes for digest, block in zip(self.digests, self.blocks[:-1], strict=True)}

    def remove(self, pairs: Pairs) -> Self:
        """Make tombstones of pairs that were added before; without any live pair nothing is left to be caught, and the state is empty.

        Raises:
            BaseMismatchError: pairs of another base or other prepare options.
            EditorError: pairs that the state does not hold.
        """
        pairs.require_same(self.base, self.prepare)
        if len(pairs) > self.count:
            raise EditorError(f"expected at most {self.count} pairs to remove, found {len(pairs)}")
        leaving, dead = Counter(pairs.digest_rows()), set(self.dead)
        for place, digest in self._find(pairs.owners):
            if place not in dead and leaving[digest]:
                leaving[digest] -= 1
                dead.add(place)
        if missing := leaving.total():
            raise EditorError(f"expected pairs to remove that the state holds, found {missing} of {len(pairs)} that it does not")
        kept = replace(self, dead=frozenset(dead))
        return kept if kept.count else type(self)(self.base, self.prepare)

    def add(self, pairs: Pairs, reach: float) -> Self:
        """
        Args:
            reach: the product of keys above which a neuron takes the place of a tombstone of its subject.

        Raises:
            BaseMismatchError: pairs of another base or other prepare options.
        """
        pairs.require_same(self.base, self.prepare)
        state = self._release(pairs, reach)
        if not state.blocks:
            return replace(state, blocks=(pairs,))
        *closed, tail = state.blocks
        if len(tail.residuals) < BLOCK:
            return replace(state, blocks=(*closed, Pairs.concatenate([tail, pairs])))
        return replace(state, blocks=(*closed, tail, pairs), digests=(*state.digests, digest_of(tail.to_bytes())))

    def _release(self, pairs: Pairs, reach: float) -> Self:
        """The state without the tombstones that would catch what `pairs` are to answer."""
        released: dict[int, list[int]] = {}
        for place in sorted(self.dead):
            number, row = self._locate(place)
            scope = self.blocks[number].scopes[row]
            mine = [own for own, other in enumerate(pairs.scopes) if scope and other == scope]
            if mine and bool((_read_keys(self.blocks[number].take([row])) @ _read_keys(pairs.take(mine)).T > reach).any()):
                released.setdefault(number, []).append(row)
        return self._drop(released) if released else self

    def _drop(self, released: dict[int, list[int]]) -> Self:
        """The state without some tombstones: block → its rows."""
        gone = set[int]()
        blocks, digests = [], []
        for number, (first, block) in enumerate(self._number()):
            rows = set(released.get(number, ()))
            gone |= {first + row for row in rows}
            kept = block.take([row for row in range(len(block)) if row not in rows]) if rows else block
            if len(kept):
                blocks.append(kept)
                digests.append(digest_of(kept.to_bytes()) if rows or number >= len(self.digests) else self.digests[number])
        dead = frozenset(place - sum(other < place for other in gone) for place in self.dead - gone)
        return type(self)(self.base, self.prepare, tuple(blocks), tuple(digests[:-1]), dead)

    def find_uncovered(self, theta: float) -> dict[str, str]:
        """Ids of tombstones → id of the live edit whose neuron is nearest to their keys, where that fires without them."""
        living = [(block.take([row for row in range(len(block)) if first + row not in self.dead])) for first, block in self._number()]
        kept = [block for block in living if len(block)]
        keys = torch.cat([_read_keys(block) for block in kept]) if kept else torch.empty(0, 0)
        owners = [ids[0] for block in kept for ids, count in zip(block.owners, block.sizes, strict=True) for _ in range(count)]
        found = {}
        for place in sorted(self.dead):
            number, row = self._locate(place)
            tombstone = self.blocks[number].take([row])
            products = _read_keys(tombstone) @ keys.T
            best = int(products.max(dim=0).values.argmax())
            if float(products.max()) > find_bias(theta, keys.shape[1]):
                found[tombstone.owners[0][0]] = owners[best]
        return found

    def _number(self) -> Iterator[tuple[int, Pairs]]:
        """Blocks with the number of their first pair."""
        first = 0
        for block in self.blocks:
            yield first, block
            first += len(block)

    def _locate(self, place: int) -> tuple[int, int]:
        """Block and row of a pair."""
        for number, block in enumerate(self.blocks):
            if place < len(block):
                return number, place
            place -= len(block)
        raise IndexError(place)

    def _find(self, owners: Sequence[tuple[str, ...]]) -> list[tuple[int, str]]:
        """Places and digests of the pairs that have these owners, newest first."""
        wanted = set(owners)
        found: list[tuple[int, str]] = []
        for first, block in self._number():
            rows = [row for row, ids in enumerate(block.owners) if ids in wanted]
            found += zip((first + row for row in rows), block.take(rows).digest_rows(), strict=True) if rows else ()
        return found[::-1]

    def write(self, file: BinaryIO) -> None:
        """The last block, the tombstones, and the digests of the others: `parts` has those."""
        metadata = {"base": self.base, "prepare": self.prepare, "dead": sorted(self.dead), "parts": self.digests}
        tail = self.blocks[-1] if self.blocks else None
        described = {} if tail is None else {"tail": tail.describe()}
        file.write(pack_tensors("neuron_state", _FORMAT, {} if tail is None else tail.to_tensors(), {**metadata, **described}))

    def to_bytes(self) -> bytes:
        with io.BytesIO() as file:
            self.write(file)
            return file.getvalue()

    @classmethod
    def load(cls, source: bytes | Path, fetch: Fetch) -> Self:
        """Raises FormatError: not a neuron state of this format."""
        data = source if isinstance(source, bytes) else source.read_bytes()
        tensors, metadata = unpack_tensors(data, "neuron_state", _FORMAT)
        base, prepare = metadata["base"], metadata["prepare"]
        blocks = [Pairs.from_bytes(fetch(digest)) for digest in metadata["parts"]]
        if "tail" in metadata:
            tail = {name: metadata["tail"].get(name, ()) for name in ("owners", "erased", "sizes", "scopes")}
            blocks.append(Pairs.from_tensors(base, prepare, tensors=tensors, **tail))
        return cls(base, prepare, tuple(blocks), tuple(metadata["parts"]), frozenset(metadata["dead"]))


def spell_blocks(state: NeuronState) -> tuple[Block, ...]:
    """Blocks as a patch has them."""
    return tuple(Block(block.owners, block.sizes, _read_keys(block), block.residuals) for block in state.blocks)


def _read_keys(pairs: Pairs) -> torch.Tensor:
    """[lines, d]: an iReVa pair has keys at one layer."""
    return next(iter(pairs.keys.values()))
