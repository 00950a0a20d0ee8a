"""What stands above an editor's layer in a version: the adapter that has taken edits in, and the memory of those that nothing else knows.

Both are functions of what is live. An adapter that has absorbed an edit which leaves goes with it, in the same commit; what only it knew is
remembered again. Memory holds the live edits that are neither written nor absorbed, and those that the adapter does not answer, or all of
them (`memory.holds`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from errata.candidates import store_artifact
from errata.editors.adapters import LoraAdapter
from errata.editors.memory import EditMemory, MemoryOptions
from errata.edits import Edit, Submission
from errata.errors import InputError
from errata.evaluation.probes import state_fact
from errata.manifests import Layer, Manifest
from errata.readers.files import read_edits
from errata.retrieval.facts import Fact
from errata.retrieval.routing import FLOOR
from errata.settings import Settings
from registry.fold import EditRow, split_occurrence
from registry.stream import Stream
from registry.tiers import ADAPTER, MEMORY, Learned, read_learned

_VERSION = "1"
_TOLD = 5
"""Edits that are named at most."""
_POOL = 1_000
"""Live edits that demonstrations are chosen from where there is no file of training edits."""


@dataclass(frozen=True)
class Coming:
    """An edit that is live from a commit on."""

    occurrence: str
    edit: Edit
    written: bool
    """It has a pair; else it answers from memory."""


@dataclass(frozen=True)
class Above:
    """The layers above, and what a commit has to say about them."""

    layers: tuple[Layer, ...]
    told: tuple[str, ...] = ()

    def crown(self, manifest: Manifest) -> Manifest:
        """The manifest with these layers on top of its editor's."""
        return manifest.model_copy(update={"layers": (manifest.layers[0], *self.layers)})


def carry_above(settings: Settings, stream: Stream, head: Manifest, come: Sequence[Coming], gone: Sequence[EditRow]) -> Above:
    """The layers above a candidate, stored.

    Args:
        head: the manifest that it builds on.
        come, gone: what is live from it on, and not any more. An edit that only gets a pair is in both.
    """
    learned = read_learned(stream, head.digest)
    same = {item.edit.content_id for item in come}
    lost = sorted({row.id for row in gone if row.content not in same} & learned.absorbed)
    known = learned if not lost else Learned()
    told = (f"The adapter is dropped: it had absorbed {_name_some(lost)}.",) if lost else ()
    adapter, layer = None if lost else head.find_above(ADAPTER), head.find_above(MEMORY)
    before = _read_memory(stream, layer)
    if lost or before is None or not _is_current(settings, stream, before, known):
        return Above((*_list(adapter), *_store(stream, _remember(settings, stream, head.base, come, gone, known), layer)), told)
    after = before.update(_build_facts(settings, come, known), [row.occurrence for row in gone])
    return Above((*_list(adapter), *_store(stream, after, layer)), told)


def move_above(settings: Settings, stream: Stream, head: Manifest, base: str, come: Sequence[Coming], gone: Sequence[EditRow]) -> Above:
    """The layers above on another base or under other pairs, stored: what was trained on what stood beneath is dropped.

    Args:
        base: digest of the base that they are for.
    """
    told = ("The adapter is dropped: it was trained on what stood beneath it.",) if head.find_above(ADAPTER) else ()
    return Above(tuple(_store(stream, _remember(settings, stream, base, come, gone, Learned()), None)), told)


def drop_adapter(settings: Settings, stream: Stream, head: Manifest, come: Sequence[Coming], gone: Sequence[EditRow]) -> Above:
    """The layers above without the adapter, stored: what only it knew is remembered again. Arguments as of `carry_above`."""
    told = ("The adapter is dropped: edits that come do not take under it.",)
    return Above(tuple(_store(stream, _remember(settings, stream, head.base, come, gone, Learned()), head.find_above(MEMORY))), told)


def put_adapter(settings: Settings, stream: Stream, head: Manifest, adapter: LoraAdapter) -> Above:
    """The layers above with a new adapter, stored: what it has absorbed is not remembered any more, unless all is; what it does not answer
    is, whatever the weights beneath it say."""
    stored = store_artifact(stream.objects, adapter)
    layer = Layer(editor=ADAPTER, editor_version=_VERSION, built_on=tuple(head.layers[0].stored[:1]), **stored)
    ids = (frozenset(split_occurrence(name)[0] for name in names) for names in (adapter.absorbed, adapter.unlearned))
    return Above((layer, *_store(stream, _remember(settings, stream, head.base, (), (), Learned(*ids)), head.find_above(MEMORY))))


def forget_erased(settings: Settings, stream: Stream, head: Manifest, ids: Collection[str]) -> Above:
    """The layers above without a word of edits that are erased, stored: of what was forgotten, blocks have kept the text."""
    layer = head.find_above(MEMORY)
    memory = _read_memory(stream, layer)
    if memory is None or not {split_occurrence(name)[0] for name in memory.stored_ids} & set(ids):
        return Above(head.above)
    kept = _remember(settings, stream, head.base, (), (), read_learned(stream, head.digest))
    return Above((*_list(head.find_above(ADAPTER)), *_store(stream, kept, layer)))


def recall_all(settings: Settings, stream: Stream, base: str, rows: Sequence[EditRow]) -> EditMemory:
    """A memory of these live edits, all of them, with the pool of the settings: the teacher of a distillation.

    Args:
        base: digest of the base that it is put on.
    """
    facts = [state_fact(edit, row.occurrence, settings.evaluate.seed) for row, edit in zip(rows, stream.read_edits(rows), strict=True)]
    return _start_memory(settings, stream, base, {fact.id for fact in facts}).update(facts, ())


def _remember(
    settings: Settings, stream: Stream, base: str, come: Sequence[Coming], gone: Sequence[EditRow], learned: Learned
) -> EditMemory:
    """A memory made anew."""
    leaving = {row.occurrence for row in gone}
    staying = [row for row in _list_held(settings, stream, learned) if row.occurrence not in leaving]
    found = zip(staying, stream.read_edits(staying), strict=True)
    facts = [state_fact(edit, row.occurrence, settings.evaluate.seed) for row, edit in found]
    facts += _build_facts(settings, come, learned)
    if not facts:
        return EditMemory(base, _read_options(settings))
    started = _start_memory(settings, stream, base, leaving | {fact.id for fact in facts})
    return started.update(facts, ())


def _start_memory(settings: Settings, stream: Stream, base: str, without: Collection[str]) -> EditMemory:
    """A memory of nothing, with its pool: training edits of a file, else a sample of the stream's own.

    Args:
        without: occurrences that are not for the pool: they are remembered themselves, or leave.

    Raises:
        InputError: the file of training edits cannot be read, or has none.
    """
    memory = EditMemory(base, _read_options(settings))
    if settings.memory.demonstrations == 0:
        return memory
    if settings.memory.pool is not None:
        return memory.with_pool(_read_pool(settings.memory.pool))
    rows = [row for row in stream.index.sample_live(_POOL, settings.evaluate.seed) if row.occurrence not in without]
    facts = [state_fact(edit, row.occurrence, settings.evaluate.seed) for row, edit in zip(rows, stream.read_edits(rows), strict=True)]
    return memory.with_pool(facts)


def _is_current(settings: Settings, stream: Stream, memory: EditMemory, learned: Learned) -> bool:
    """Whether a memory is what the settings ask for, so that it can be gone on from."""
    if memory.options != _read_options(settings):
        return False
    if settings.memory.holds == "all":
        return len(memory.facts) == stream.index.counts().get("live", 0)
    return memory.facts.keys() == {row.occurrence for row in _list_held(settings, stream, learned)}


def _list_held(settings: Settings, stream: Stream, learned: Learned) -> list[EditRow]:
    """The live edits that answer from memory, in order of arrival."""
    if settings.memory.holds == "all":
        return list(stream.index.find_rows("live"))
    found = [row for name in learned.unlearned if (row := stream.index.find_edit(name)) and row.status == "live"]
    rows = {row.occurrence: row for row in (*found, *stream.index.find_unwritten())}
    held = (row for row in rows.values() if _holds(settings, row.pairs is not None, row.id, learned))
    return sorted(held, key=lambda row: (row.seq, row.position))


def _holds(settings: Settings, written: bool, edit_id: str, learned: Learned) -> bool:
    """Whether a live edit answers from memory."""
    return settings.memory.holds == "all" or edit_id in learned.unlearned or not (written or edit_id in learned.absorbed)


def _read_options(settings: Settings) -> MemoryOptions:
    chosen = settings.memory
    floor = FLOOR if chosen.floor is None else chosen.floor
    return MemoryOptions(encoder=chosen.encoder, scope=chosen.scope, floor=floor, demonstrations=chosen.demonstrations)


def _read_memory(stream: Stream, layer: Layer | None) -> EditMemory | None:
    if layer is None or layer.artifact is None:
        return None
    return EditMemory.from_bytes(stream.objects.get(layer.artifact), stream.objects.get)


def _read_pool(path: Path) -> list[Fact]:
    """Training edits of a file: what a demonstration shows is all that is read of them."""
    facts = [
        Fact(item.edit.edit_id, item.edit.subject, item.edit.prompt, item.edit.target_new, (), item.edit.paraphrase_prompts[:1])
        for item in read_edits(path)
        if isinstance(item, Submission)
    ]
    if not facts:
        raise InputError(f"memory.pool: expected training edits in {path}, found none")
    return facts


def _build_facts(settings: Settings, come: Sequence[Coming], learned: Learned) -> list[Fact]:
    """What is to be remembered of edits that come."""
    wanted = [item for item in come if _holds(settings, item.written, item.edit.edit_id, learned)]
    return [state_fact(item.edit, item.occurrence, settings.evaluate.seed) for item in wanted]


def _store(stream: Stream, memory: EditMemory, layer: Layer | None) -> list[Layer]:
    """The layer of a memory, with its objects stored; none for an empty one."""
    if not memory.facts:
        return []
    return [Layer(editor=MEMORY, editor_version=_VERSION, **store_artifact(stream.objects, memory, layer.parts if layer else ()))]


def _list(layer: Layer | None) -> list[Layer]:
    return [layer] if layer else []


def _name_some(names: Sequence[str]) -> str:
    rest = len(names) - _TOLD
    return ", ".join(names[:_TOLD]) + (f" and {rest} more" if rest > 0 else "") + ", which left or changed"
