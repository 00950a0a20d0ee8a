"""Edits that answer from memory: facts are put before the questions that ask for them, and no weight changes (MIKE; algorithms.md §2).

This module travels inside every MLflow version. Facts lie in blocks that never change and are shared between versions, all but the last:
a correction writes what it adds. What is forgotten is named, and is not there any more for whoever asks.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Self

import torch

from errata.editors.artifacts import Fetch, Parts, pack_tensors, unpack_tensors
from errata.modeling.loading import Base
from errata.modeling.queries import route_queries
from errata.modeling.tokens import encode_prompt
from errata.retrieval.demonstrations import spell_context, spell_stored
from errata.retrieval.encoder import DEFAULT_ENCODER, Encoder, load_encoder
from errata.retrieval.facts import Fact, find_edit
from errata.retrieval.nearest import NearestFacts
from errata.retrieval.routing import FLOOR, FactStore, Route, Scope

_FORMAT = 1
_BLOCK = 1_000
"""Facts of a block that is closed."""


@dataclass(frozen=True)
class MemoryOptions:
    """How a memory decides what a question asks for, and what it shows with it."""

    encoder: str = DEFAULT_ENCODER
    scope: Scope = "guarded"
    floor: float = FLOOR
    """Least similarity of a question and a fact under `guarded`."""
    demonstrations: int = 12
    """Most facts of the pool that are shown before a question."""


@dataclass(frozen=True)
class FactBlock:
    """Facts with their vectors."""

    facts: tuple[Fact, ...]
    vectors: torch.Tensor
    """[n, d] float32, rows of length 1: of `spell_stored`."""

    def keep(self, wanted: Collection[str]) -> "FactBlock":
        """Without what is not wanted."""
        places = [place for place, fact in enumerate(self.facts) if fact.id in wanted]
        return FactBlock(tuple(self.facts[place] for place in places), self.vectors[places])

    def to_bytes(self) -> bytes:
        metadata = {"owners": _list_owners(self.facts), "facts": [asdict(fact) for fact in self.facts]}
        return pack_tensors("facts", _FORMAT, {"v": self.vectors.contiguous()}, metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises FormatError: no facts of this format."""
        tensors, metadata = unpack_tensors(data, "facts", _FORMAT)
        return cls(tuple(map(_read_fact, metadata["facts"])), tensors["v"])


@dataclass(frozen=True)
class EditMemory:
    """Facts that are put before the questions they answer."""

    base: str
    """Digest of the base it may be put on."""
    options: MemoryOptions
    closed: Mapping[str, FactBlock] = field(default_factory=dict)
    """Digest → block."""
    opened: FactBlock = FactBlock((), torch.empty(0, 0))
    pool: Mapping[str, FactBlock] = field(default_factory=dict)
    """What demonstrations are chosen from, besides the facts themselves."""
    gone: frozenset[str] = frozenset()
    """Ids of facts of those blocks that are forgotten."""

    @property
    def deltas(self) -> Mapping[str, torch.Tensor]:
        return {}

    @property
    def written(self) -> Mapping[str, torch.Tensor]:
        return {}

    @property
    def parts(self) -> Parts:
        return {digest: block.to_bytes for digest, block in (*self.closed.items(), *self.pool.items())}

    @cached_property
    def facts(self) -> Mapping[str, Fact]:
        """Id → fact, of all that is remembered, in order of arrival."""
        return {fact.id: fact for block in (*self.closed.values(), self.opened) for fact in block.facts if fact.id not in self.gone}

    @property
    def stored_ids(self) -> set[str]:
        """Ids of all that its blocks hold, forgotten or not."""
        return {fact.id for block in self._blocks() for fact in block.facts}

    def update(self, add: Sequence[Fact], remove: Collection[str]) -> Self:
        """With more facts, and without others. What is forgotten is no demonstration any more either.

        Blocks that are closed stay as they are until most of what they hold is forgotten.

        Args:
            remove: ids; those that are not there do not matter.
        """
        removed = {*remove}
        added = [self._encode(add)] if add else []
        facts = [fact for fact in self.opened.facts if fact.id not in removed]
        opened = _join([self.opened.keep({fact.id for fact in facts}), *added])
        closed = dict(self.closed)
        held = {fact.id for block in (*closed.values(), *self.pool.values()) for fact in block.facts}
        gone = self.gone | (removed & held)
        stored = sum(len(block.facts) for block in closed.values())
        if 2 * sum(fact.id in gone for block in closed.values() for fact in block.facts) > stored:
            live = {fact.id for block in closed.values() for fact in block.facts} - gone
            opened, closed = _join([*(block.keep(live) for block in closed.values()), opened]), {}
            gone &= {fact.id for block in self.pool.values() for fact in block.facts}
        while len(opened.facts) >= _BLOCK:
            block = FactBlock(opened.facts[:_BLOCK], opened.vectors[:_BLOCK].clone())
            closed[_digest(block)] = block
            opened = FactBlock(opened.facts[_BLOCK:], opened.vectors[_BLOCK:].clone())
        return replace(self, closed=closed, opened=opened, gone=frozenset(gone))

    def with_pool(self, facts: Sequence[Fact]) -> Self:
        """With another pool of training facts; what is gone from it is forgotten again."""
        blocks = [self._encode(facts[start : start + _BLOCK]) for start in range(0, len(facts), _BLOCK)]
        return replace(self, pool={_digest(block): block for block in blocks})

    def attach(self, base: Base) -> AbstractContextManager[None]:
        """See `errata.modeling.queries.route_queries`."""
        return route_queries(base, self.write_prompts)

    def load(self) -> None:
        """Load what answering takes, which takes seconds, so that no question has to wait for it."""
        _ = self._store, self._nearest
        if self.facts and self.options.scope == "guarded":
            open_encoder(self.options.encoder)

    def write_prompts(self, base: Base, prompts: Sequence[str], room: int) -> list[list[int] | None]:
        """What the base reads for each prompt: facts, demonstrations and the prompt, or None where no fact is asked for.

        Args:
            room: most tokens. Demonstrations are dropped to stay within it; a prompt that alone is longer loses its beginning.
        """
        found = zip(prompts, self.route(prompts), strict=True)
        return [None if route.fact is None else self._write(base, route.fact, prompt, room) for prompt, route in found]

    def route(self, prompts: Sequence[str]) -> list[Route]:
        """Which fact answers each prompt, and why (MIKE's Ret(q))."""
        return self._store.route(prompts)

    def choose_demonstrations(self, fact: Fact) -> list[Fact]:
        """The facts of the pool that are nearest to one, the nearest last."""
        count = self.options.demonstrations
        if not count:
            return []
        _, (found,) = self._nearest.search(self._vectors[fact.id][None].numpy(), count + 1)
        return [self._shown[name] for name in found if name != fact.id][:count][::-1]

    def to_bytes(self) -> bytes:
        metadata = {
            "base": self.base,
            "options": asdict(self.options),
            "count": len(self.facts),
            "blocks": list(self.closed),
            "pool": list(self.pool),
            "gone": sorted(self.gone),
            "owners": _list_owners(self.opened.facts),
            "facts": [asdict(fact) for fact in self.opened.facts],
        }
        return pack_tensors("edit_memory", _FORMAT, {"v": self.opened.vectors.contiguous()}, metadata)

    @classmethod
    def from_bytes(cls, data: bytes, fetch: Fetch) -> Self:
        """
        Args:
            fetch: digest → bytes of its blocks.

        Raises:
            FormatError: not safetensors of ours, another kind, or a newer format.
        """
        tensors, metadata = unpack_tensors(data, "edit_memory", _FORMAT)
        closed, pool = ({digest: FactBlock.from_bytes(fetch(digest)) for digest in metadata[name]} for name in ("blocks", "pool"))
        opened = FactBlock(tuple(map(_read_fact, metadata["facts"])), tensors["v"])
        return cls(metadata["base"], MemoryOptions(**metadata["options"]), closed, opened, pool, frozenset(metadata["gone"]))

    def _write(self, base: Base, fact: Fact, query: str, room: int) -> list[int]:
        pieces = spell_context(fact, self.choose_demonstrations(fact), query)
        sizes = [len(encode_prompt(base.tokenizer, piece)) for piece in pieces]
        while len(pieces) > 1 and sum(sizes) > room + len(sizes):  # about: each piece may have got a token of its own in front
            del pieces[0], sizes[0]
        ids = encode_prompt(base.tokenizer, "".join(pieces))
        while len(ids) > room and len(pieces) > 1:
            del pieces[0]
            ids = encode_prompt(base.tokenizer, "".join(pieces))
        return ids[-room:]

    def _encode(self, facts: Sequence[Fact]) -> FactBlock:
        vectors = open_encoder(self.options.encoder).encode([spell_stored(fact) for fact in facts])
        return FactBlock(tuple(facts), torch.from_numpy(vectors))

    @cached_property
    def _store(self) -> FactStore:
        chosen = self.options
        return FactStore(self.facts.values(), encoder=lambda: open_encoder(chosen.encoder), scope=chosen.scope, floor=chosen.floor)

    @cached_property
    def _vectors(self) -> Mapping[str, torch.Tensor]:
        """Id → [d], of facts and pool."""
        return {fact.id: vector for block in self._blocks() for fact, vector in zip(block.facts, block.vectors, strict=True)}

    @cached_property
    def _shown(self) -> Mapping[str, Fact]:
        """Id → what may be a demonstration."""
        return {fact.id: fact for block in self._blocks() for fact in block.facts if fact.id not in self.gone}

    @cached_property
    def _nearest(self) -> NearestFacts:
        nearest = NearestFacts()
        if self._shown:
            nearest.add(list(self._shown), torch.stack([self._vectors[name] for name in self._shown]).numpy())
        return nearest

    def _blocks(self) -> Iterator[FactBlock]:
        yield from self.pool.values()
        yield from self.closed.values()
        yield self.opened


@lru_cache(maxsize=2)
def open_encoder(name: str) -> Encoder:
    """An encoder, loaded once per process."""
    return load_encoder(name)


def _digest(block: FactBlock) -> str:
    return hashlib.sha256(block.to_bytes()).hexdigest()


def _join(blocks: Sequence[FactBlock]) -> FactBlock:
    """Blocks as one, in order."""
    full = [block for block in blocks if block.facts]
    if not full:
        return FactBlock((), torch.empty(0, 0))
    return FactBlock(tuple(fact for block in full for fact in block.facts), torch.cat([block.vectors for block in full]))


def _list_owners(facts: Sequence[Fact]) -> list[list[str]]:
    """Edit ids as stored pairs spell their owners: an erasure looks for them there."""
    return [[find_edit(fact.id)] for fact in facts]


def _read_fact(content: Mapping[str, Any]) -> Fact:
    return Fact(**{**content, "aliases": tuple(content["aliases"]), "paraphrases": tuple(content["paraphrases"])})
