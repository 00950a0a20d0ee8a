"""Second moments of a corpus, shard by shard: what one has given is stored, so that a killed run goes on with the next."""

import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from errata.corpus import Corpus, Fault, find_corpus
from errata.editors.d4s.moments import Moments, MomentSum, PooledSum, encode_rows, sum_moments
from errata.editors.d4s.spectrum import MomentsReport
from errata.edits import canonical_json, digest_of
from errata.errors import InputError, KeyMissingError, ObjectCorruptError
from errata.modeling.loading import Base
from errata.settings import Settings, load_settings
from registry.shards import ShardRecord, ShardStore
from registry.shared import get_moments, has_moments, put_moments
from registry.storage.base import Storage, open_storage
from tasks._progress import show_rate
from tasks._session import find_stored, occupy
from tasks._spreading import list_devices, tell_step
from tasks._task import stage, tell_run

TOKENS = 100_000
"""Keys counted for second moments where nobody says more; the report says what more would change."""
SHARDS = 8
_TOLD = 3
"""Faulty lines of a shard that are quoted."""


class MomentsPlan(BaseModel):
    """What second moments are measured from. Equal plans give equal bytes on one machine with one thread count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    corpus: str
    """Path, or a name of `errata.corpus`: where the contents are read."""
    contents: str
    """Digest of the corpus."""
    size: int
    """Bytes of it."""
    tokens: int = Field(ge=1)
    """Keys to count in all, where the corpus has as many."""
    shards: int = Field(ge=1)
    seed: int

    @property
    def digest(self) -> str:
        """Names the plan wherever the corpus lies."""
        return digest_of(canonical_json(self.model_dump(mode="json", exclude={"corpus"})))

    def limit(self, shard: int) -> int:
        """Keys to count in a shard."""
        return self.tokens // self.shards + (shard < self.tokens % self.shards)


@stage
def plan_moments(base: str, layers: list[int], corpus: str, tokens: int, shards: int, seed: int) -> MomentsPlan:
    """Read the corpus through once, to name its contents."""
    return make_plan(base, layers, corpus, find_corpus(corpus, load_settings().cache), tokens, shards, seed)


@stage
def find_measured(plan: MomentsPlan) -> str | None:
    """The digest of what an earlier run of this plan has given, if it is there."""
    return find_pooled(open_storage(load_settings().root), plan)


@stage
def sum_shard(plan: MomentsPlan, shard: int) -> ShardRecord:
    """The sums of one shard, stored. Those of a killed run are used again, and the base is then not even loaded."""
    return _sum_here(plan, shard)


@stage
def pool_shards(plan: MomentsPlan) -> str:
    """Second moments of all shards, added in their order, with a report; their digest."""
    return pool_stored(open_storage(load_settings().root), plan)


def make_plan(base: str, layers: Sequence[int], name: str, corpus: Corpus, tokens: int, shards: int, seed: int) -> MomentsPlan:
    """The plan for a corpus, whose files are read through to name what is in them.

    Raises:
        InputError: a file is gone.
    """
    return MomentsPlan(
        base=base,
        layers=tuple(sorted(set(layers))),
        corpus=name,
        contents=corpus.digest(),
        size=sum(corpus.sizes),
        tokens=tokens,
        shards=shards,
        seed=seed,
    )


def measure_here(storage: Storage, base: Base, layers: Sequence[int], name: str, corpus: Corpus) -> Moments:
    """Second moments in this process, without a flow, by the same steps: what is stored of an equal plan is used.

    Raises:
        EditorError: the corpus has no tokens, or the base gives values that are not finite.
    """
    plan = make_plan(base.digest, layers, name, corpus, TOKENS, SHARDS, 0)
    if (known := find_pooled(storage, plan)) is not None:
        return Moments.from_bytes(get_moments(storage, known))
    with show_rate("second moments", "tokens", plan.tokens) as tell:
        for shard in range(plan.shards):
            sum_part(storage, base, corpus, plan, shard, lambda done, shard=shard: tell(shard, done))
    return Moments.from_bytes(get_moments(storage, pool_stored(storage, plan)))


def sum_part(storage: Storage, base: Base, corpus: Corpus, plan: MomentsPlan, shard: int, on_tokens: Callable[[int], None]) -> ShardRecord:
    """Compute and store the sums of one shard, unless they are stored.

    Raises:
        InputError: the corpus has changed since it was planned.
    """
    store = ShardStore(storage, plan.digest)
    if (found := store.find(shard)) is not None:
        return found
    if (size := sum(corpus.sizes)) != plan.size:
        raise InputError(f"{plan.corpus}: expected {plan.size} bytes as when it was planned, found {size}")
    faults = 0

    def note(fault: Fault) -> None:
        nonlocal faults
        faults += 1
        if faults <= _TOLD:
            tell_run(logging.WARNING, f"left out of the corpus: {fault}")

    rows = encode_rows(base, corpus.read(shard, plan.shards, seed=plan.seed, on_fault=note))
    sums, tokens = {}, 0
    for part in sum_moments(base, plan.layers, rows, limit=plan.limit(shard), on_tokens=on_tokens):
        sums[part.layer], tokens = store.sums.put(part.to_bytes()), part.tokens
    record = ShardRecord(shard=shard, tokens=tokens, faults=faults, sums=sums)
    store.note(record)
    return record


def find_pooled(storage: Storage, plan: MomentsPlan) -> str | None:
    """The digest of the moments that came of a plan, where they are stored."""
    known = ShardStore(storage, plan.digest).find_moments()
    return known if known is not None and has_moments(storage, known) else None


def pool_stored(storage: Storage, plan: MomentsPlan) -> str:
    """Second moments of shards that are all stored; what is stored of the shards is deleted then. Holds one shard's layer at a time.

    Raises:
        EditorError: as `measure_here`.
        KeyMissingError, ObjectCorruptError: a shard is not there, or damaged; the next run computes it again.
    """
    store = ShardStore(storage, plan.digest)
    records = []
    for shard in range(plan.shards):
        if (record := store.find(shard)) is None:
            raise KeyMissingError(f"second moments: expected shard {shard} of {plan.shards} to be stored, found none")
        records.append(record)
    c, spectra = {}, []
    for layer in plan.layers:
        pooled = PooledSum()
        for record in records:
            if record.tokens:
                pooled.add(_get_sum(store, record, layer))
        spectra.append(pooled.describe(layer))
        c[layer] = pooled.mean.float()
    report = MomentsReport(
        tokens=sum(record.tokens for record in records),
        shards=sum(record.tokens > 0 for record in records),
        faults=sum(record.faults for record in records),
        layers=tuple(spectra),
    )
    moments = Moments(plan.base, plan.contents, plan.seed, report.tokens, c, report)
    digest = put_moments(storage, moments.to_bytes())
    store.finish(digest)
    return digest


def describe_moments(settings: Settings, digest: str, tolerance: float) -> dict[str, Any]:
    """The report of stored moments in plain values, with what as many tokens again would change, and how many are enough.

    Args:
        tolerance: expected relative error of C at which it is good enough.

    Raises:
        KeyMissingError: none with this digest.
        InputError: they were not measured in shards, and have no report.
    """
    moments = Moments.from_bytes(get_moments(open_storage(settings.root), digest))
    report = moments.report
    if report is None:
        raise InputError(f"moments {digest[:12]}: expected a report, found none; `errata moments` measures them with one")
    layers = [
        row.model_dump(mode="json") | {"error": report.estimate_error(row), "enough": report.count_enough(tolerance, row)}
        for row in report.layers
    ]
    return {
        "moments": digest,
        "base": moments.base,
        "corpus": moments.corpus,
        **report.model_dump(mode="json"),
        "layers": layers,
        "more": report.tokens,
        "change": report.predict_change(report.tokens),
        "slowest": report.slowest.layer,
        "tolerance": tolerance,
        "enough": report.count_enough(tolerance),
    }


def _sum_here(plan: MomentsPlan, shard: int) -> ShardRecord:
    settings = load_settings()
    storage = open_storage(settings.root)
    if (record := ShardStore(storage, plan.digest).find(shard)) is None:
        devices = list_devices(settings)
        device = devices[shard % len(devices)]
        corpus = find_corpus(plan.corpus, settings.cache)
        with occupy(device):
            _, _, base = find_stored(settings, storage, plan.base, device)
            record = sum_part(storage, base, corpus, plan, shard, lambda done: tell_step(shard, done))
    return record


def _get_sum(store: ShardStore, record: ShardRecord, layer: int) -> MomentSum:
    try:
        return MomentSum.from_bytes(store.sums.get(record.sums[layer]))
    except (KeyMissingError, ObjectCorruptError):
        store.forget(record.shard)
        raise
