"""Key-value neurons beside the MLP of one late layer (iReVa; algorithms.md §3). This module travels inside every MLflow version.

A neuron answers where the model is about to predict, and only there: at the last token. It looks at the standardised input of the MLP,
fires where that is close enough to its key, and adds its value, a row of the unembedding, to what the MLP says. No weight changes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, NamedTuple, Self

import torch
from torch.nn import functional

from errata.editors.artifacts import Fetch, Parts, pack_tensors, unpack_tensors
from errata.modeling.beside import respond_beside
from errata.modeling.loading import Base
from errata.retrieval.index import KeyIndex

_FORMAT = 1
_SAME = 1e-4
"""Difference in cosine below which two neurons are equally near, so that the newest live one answers: one prompt that is read twice, in
other company, gives keys that differ by their rounding."""
_PAIRS = 1
"""Format of the blocks, which are those of `errata.editors.base.Pairs`."""


def standardise(x: torch.Tensor) -> torch.Tensor:
    """[…, d] → float32: mean removed, divided by the unbiased standard deviation, so that ‖x‖² = d − 1 and products are cosines
    (`kv/pytorch_utils.py`, where it is called rmsnorm)."""
    x = x.float()
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / centred.square().sum(dim=-1, keepdim=True).div(x.shape[-1] - 1).sqrt().clamp(min=1e-12)


def find_bias(theta: float, width: int) -> float:
    """b = θ·‖k⁰‖², the product that an input must exceed: keys are standardised, hence ‖k⁰‖² = d − 1."""
    return theta * (width - 1)


def find_scale(theta: float, gain: float, width: int) -> float:
    """α, so that an exact match adds `gain` values: its activation is (1 − θ)(d − 1)."""
    return gain / ((1 - theta) * (width - 1))


def open_gate(excess: torch.Tensor, *, silent: bool) -> torch.Tensor:
    """GELU (tanh form, as published) of k·x − b; `silent`: exactly 0 where that is not positive."""
    opened = functional.gelu(excess, approximate="tanh")
    return torch.where(excess > 0, opened, 0.0) if silent else opened


@dataclass(frozen=True)
class Block:
    """Neurons of one stored object of pairs."""

    owners: tuple[tuple[str, ...], ...]
    """Pair → ids of its edits."""
    sizes: tuple[int, ...]
    """Pair → its number of neurons: one per token of the target, in order."""
    keys: torch.Tensor
    """[neurons, d] float32."""
    values: torch.Tensor
    """[neurons, d] float32."""

    @classmethod
    def from_tensors(cls, metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """As `Pairs.describe` and `Pairs.to_tensors` spell them: of one layer."""
        owners = tuple(tuple(ids) for ids in metadata["owners"])
        keys = next(tensor for name, tensor in tensors.items() if name.startswith("k."))
        return cls(owners, tuple(metadata["sizes"]), keys, tensors["r"])

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises FormatError: no pairs."""
        tensors, metadata = unpack_tensors(data, "pairs", _PAIRS)
        return cls.from_tensors(metadata, tensors)


class Place(NamedTuple):
    """Which neuron of which edit."""

    edits: tuple[str, ...]
    token: int
    """Of the target, counted from 0."""
    live: bool


class Firing(NamedTuple):
    """What a patch made of one input."""

    place: Place
    """The neuron that is nearest."""
    cosine: float
    activation: float
    """After the gate: k·x − b where the neuron fires, 0 where it does not."""
    excess: float
    """Cosine minus θ: how far above the threshold, or below it."""
    added: float
    """‖what was added‖ / ‖the value‖: the gain that was reached. 0 for a tombstone."""
    rival: Place | None
    """The nearest neuron of another edit."""
    margin: float
    """Cosine by which the rival is farther away; 2, more than there can be, without one."""

    @property
    def told(self) -> str:
        """`fired`; `tombstone` where a withdrawn edit's neuron caught it, so that nothing was added; `none` below the threshold."""
        return "none" if self.excess <= 0 else "fired" if self.place.live else "tombstone"


@dataclass(frozen=True)
class NeuronPatch:
    """All neurons of a stream, live ones and tombstones, with the gate that they answer through."""

    base: str
    """Digest of the base it may be put on."""
    layer: int
    theta: float
    gain: float
    silent: bool
    pooled: bool
    blocks: tuple[Block, ...]
    """In order of arrival; the last one still grows, the others are stored in objects of their own."""
    dead: frozenset[int]
    """Pairs, counted over all blocks, that were withdrawn: their keys go on catching what is theirs, and add nothing."""
    parts: Parts
    """The stored objects of all blocks but the last, in order."""

    @property
    def deltas(self) -> Mapping[str, torch.Tensor]:
        """None: every weight stays as it is."""
        return {}

    @property
    def written(self) -> Mapping[str, torch.Tensor]:
        """Keys and values of live neurons, in an order that does not depend on that of arrival."""
        return order_written(self.layer, self.blocks, self.dead)

    @property
    def width(self) -> int:
        return self.blocks[-1].keys.shape[1]

    @cached_property
    def places(self) -> list[Place]:
        """Row of the index → its neuron. Live ones come first, then the newest: the first of equals wins."""
        return [self._arrived[row] for row in self._order]

    @cached_property
    def _arrived(self) -> list[Place]:
        """Every neuron, in order of arrival."""
        pairs = [pair for block in self.blocks for pair in zip(block.owners, block.sizes, strict=True)]
        return [Place(owners, token, pair not in self.dead) for pair, (owners, size) in enumerate(pairs) for token in range(size)]

    @cached_property
    def _order(self) -> list[int]:
        """Row of the index → number of its neuron, in order of arrival."""
        return sorted(range(len(self._arrived)), key=lambda row: (not self._arrived[row].live, -row))

    def attach(self, base: Base) -> AbstractContextManager[None]:
        """Let the neurons answer beside the MLP of their layer (`errata.modeling.beside.respond_beside`).

        Raises:
            BaseMismatchError: other neurons answer there already.
        """
        return respond_beside(base, self.layer, self.place_on(base.device))

    def place_on(self, device: torch.device) -> "Neurons":
        """The neurons, ready to answer on a device."""
        order = torch.tensor(self._order, dtype=torch.long)
        keys = torch.cat([block.keys for block in self.blocks])[order].to(device)
        live = sum(place.live for place in self._arrived)
        values = torch.cat([block.values for block in self.blocks])[order[:live]].to(device)
        return Neurons(self, KeyIndex(keys, tie=_SAME * (self.width - 1)), keys, torch.cat([values, values.new_zeros(1, self.width)]))

    def to_bytes(self) -> bytes:
        """The gate, the last block, and the digests of the others."""
        tail = self.blocks[-1]
        metadata = {
            "base": self.base,
            "layer": self.layer,
            "theta": self.theta,
            "gain": self.gain,
            "silent": self.silent,
            "pooled": self.pooled,
            "dead": sorted(self.dead),
            "parts": list(self.parts),
            "owners": tail.owners,
            "sizes": tail.sizes,
        }
        return pack_tensors("neuron_patch", _FORMAT, {"r": tail.values, f"k.{self.layer}": tail.keys}, metadata)

    @classmethod
    def from_bytes(cls, data: bytes, fetch: Fetch) -> Self:
        """
        Args:
            fetch: digest → bytes of its parts.

        Raises:
            FormatError: no neuron patch of this format.
        """
        tensors, metadata = unpack_tensors(data, "neuron_patch", _FORMAT)
        stored: list[str] = metadata["parts"]
        blocks = [Block.from_bytes(fetch(digest)) for digest in stored]
        return cls(
            base=metadata["base"],
            layer=metadata["layer"],
            theta=metadata["theta"],
            gain=metadata["gain"],
            silent=metadata["silent"],
            pooled=metadata["pooled"],
            blocks=(*blocks, Block.from_tensors(metadata, tensors)),
            dead=frozenset(metadata["dead"]),
            parts={digest: partial(fetch, digest) for digest in stored},
        )


class Neurons:
    """The neurons of a patch on one device, callable with the inputs of the MLP."""

    def __init__(self, patch: NeuronPatch, index: KeyIndex, keys: torch.Tensor, values: torch.Tensor) -> None:
        """
        Args:
            index: of `keys` [neurons, d].
            values: [live + 1, d]: of the live neurons, which come first, and zeros for all others.
        """
        self._patch, self._index, self._keys, self._values = patch, index, keys, values
        self._bias = find_bias(patch.theta, patch.width)
        self._scale = find_scale(patch.theta, patch.gain, patch.width)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs of the MLP [m, d] → what the neurons add to its output [m, d]."""
        query, live = standardise(x), len(self._values) - 1
        if self._patch.pooled:
            scores, rows = self._index.find_best(query)
            activations = open_gate(scores - self._bias, silent=self._patch.silent)
            added = activations[:, None] * self._values[rows.clamp(max=live)]
        else:
            excess = query @ self._keys[:live].T - self._bias
            added = open_gate(excess, silent=self._patch.silent) @ self._values[:live]
        return (self._scale * added).to(x.dtype)

    def explain(self, x: torch.Tensor) -> list[Firing]:
        """Which neuron answers each input [m, d], and how clearly, whatever the pooling."""
        places, width, query = self._patch.places, self._patch.width - 1, standardise(x)
        winners = self._index.find_best(query)[1].tolist()
        # Neurons of one edit are no rivals of each other: as many as it may have are looked past.
        best, index = self._index.find_several(query, self._longest + 1)
        firings = []
        for scores, rows, winner in zip(best, index.tolist(), winners, strict=True):
            place = places[winner]
            other = next((rank for rank, row in enumerate(rows) if places[row].edits != place.edits), None)
            activation, cosine = float(open_gate(scores[0] - self._bias, silent=self._patch.silent)), float(scores[0]) / width
            firings.append(
                Firing(
                    place=place,
                    cosine=cosine,
                    activation=activation,
                    excess=cosine - self._patch.theta,
                    added=self._scale * activation if place.live else 0.0,
                    rival=places[rows[other]] if other is not None else None,
                    margin=float(scores[0] - scores[other]) / width if other is not None else 2.0,
                )
            )
        return firings

    def answer_without(self, x: torch.Tensor, withheld: Sequence[tuple[str, ...]]) -> torch.Tensor:
        """As a call, if input i [m, d] had been asked of the same neurons after a withdrawal of the edits `withheld[i]`, which share one
        pair: many withdrawals, each alone, in one pass."""
        query, live, places = standardise(x), len(self._values) - 1, self._patch.places
        if self._patch.pooled:
            scores, index = self._index.find_several(query, self._longest + 1)
            rows = []
            for found, near, owners in zip(scores, index.tolist(), withheld, strict=True):
                # Of equal scores a live neuron wins over a tombstone, which those of `owners` are now.
                equal = sorted(near[: int((found >= found[0] - self._index.tie).sum())])
                rows.append(next((row for row in equal if places[row].edits != owners), live))
            activations = open_gate(scores[:, 0] - self._bias, silent=self._patch.silent)
            added = activations[:, None] * self._values[torch.tensor(rows, device=x.device).clamp(max=live)]
        else:
            opened = open_gate(query @ self._keys[:live].T - self._bias, silent=self._patch.silent)
            own = [[place.edits == owners for place in places[:live]] for owners in withheld]
            added = opened.masked_fill(torch.tensor(own, device=x.device), 0.0) @ self._values[:live]
        return (self._scale * added).to(x.dtype)

    @cached_property
    def _longest(self) -> int:
        """Most neurons that edits have which share their ids: a live pair and its tombstones."""
        return max(Counter(place.edits for place in self._patch.places).values())


def order_written(layer: int, blocks: Sequence[Block], dead: frozenset[int]) -> dict[str, torch.Tensor]:
    """Keys and values [neurons, d] of the pairs that are not dead, in the order of their owners."""
    named = sorted(_walk(blocks, dead), key=lambda item: item[0])
    if not named:
        return {}
    return {
        f"neurons.{layer}.keys": torch.cat([keys for _, keys, _ in named]),
        f"neurons.{layer}.values": torch.cat([values for _, _, values in named]),
    }


def _walk(blocks: Sequence[Block], dead: frozenset[int]) -> Iterator[tuple[tuple[str, ...], torch.Tensor, torch.Tensor]]:
    pair = 0
    for block in blocks:
        starts = list(accumulate(block.sizes, initial=0))
        for owners, first, last in zip(block.owners, starts, starts[1:], strict=False):
            if pair not in dead:
                yield owners, block.keys[first:last], block.values[first:last]
            pair += 1
