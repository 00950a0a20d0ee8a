"""A new stream: base, second moments, profile, first commit. Plain functions: nothing here is scheduled."""

import logging
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from errata.builtin import NAMED, BuiltinSettings, ensure_builtin
from errata.candidates import start_manifest
from errata.corpus import MAKESHIFT
from errata.editors.catalogue import require_editor
from errata.editors.d4s.moments import Moments
from errata.errors import InputError, ModelError
from errata.modeling.loading import choose_device, load_base, sketch_model
from errata.plan import Plan, find_room, make_plan, plan_neurons, spell_bytes
from errata.profiles import Profile
from errata.settings import Settings
from errata.suggestions import NeuronSuggestion, choose_spread, suggest_builtin, suggest_profile
from registry.events import InitCommit
from registry.shared import BaseRef, fetch_moments, put_base
from registry.storage.base import check_create_if_absent, open_storage
from registry.stream import Stream, create_stream
from tasks._progress import show_progress
from tasks._session import free_disk, keep_loaded, load_model, quiet_transformers
from tasks.committing import describe_writer
from tasks.placing import Placed, Source, choose_corpus, choose_profile, name_builtin, names_stored, place_profile

BUILTIN_NAME = "builtin"
_log = logging.getLogger(__name__)
_LAYERS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")
_DIGEST = re.compile(r"[0-9a-f]{4,64}")


def start_stream(
    settings: Settings,
    source: str,
    *,
    editor: str = "d4s",
    revision: str | None = None,
    profile: str | None = None,
    corpus: Path | None = None,
) -> Stream:
    """Make the stream of `settings` on a base.

    Args:
        source: `builtin` or `builtin-contextual`, a folder, or a Hugging Face id.
        editor: its name in `errata.editors.catalogue`.
        revision: of a hub id; None pins the newest.
        profile: path of a `ProfileFile` in JSON, or the beginning of the digest of a profile that the root holds for this base; None takes
            what its newest calibration has found, else the one suggested for the family.
        corpus: text or JSONL file, or a folder of them (`errata.corpus.open_corpus`), for second moments; not needed for the built-in base,
            nor with a stored profile.

    Raises:
        UnknownNameError: no such editor.
        InputError: the stream exists, or the base cannot be used without a profile or corpus that was not given.
        ModelError: the base cannot be loaded.
        StorageError: the root cannot hold a stream.
    """
    require_editor(editor)
    storage = open_storage(settings.root)
    check_create_if_absent(storage)
    found = find_base(settings, source, revision, profile, editor)
    placed = place_profile(storage, settings.cache, found, editor, profile, corpus)
    manifest = start_manifest(placed.editor, placed.ref.digest, placed.profile)
    init = InitCommit(
        seq=0,
        parent="",
        base=placed.ref.named,
        profile=placed.profile,
        editors=(placed.editor.name,),
        manifest=manifest.digest,
        **describe_writer(settings),
    )
    return create_stream(settings.root, settings.stream, init, manifest.model_dump(mode="json"), settings.cache)


def place_target(
    settings: Settings, stream: Stream, source: str | None, *, revision: str | None, profile: str | None, corpus: Path | None
) -> Placed:
    """Store what a stream is to be rebased to: another base, another profile, or both.

    Args:
        source: as in `start_stream`; None is the stream's own base.
        profile, corpus: as in `start_stream`. On the stream's own base its own second moments do where they have the layers.

    Raises:
        InputError: neither a base nor a profile; else as `start_stream`.
    """
    if source is None and profile is None:
        raise InputError("rebase: expected another base (--base) or another profile (--profile), found neither")
    editor = stream.head.editors[0]
    if source is not None:
        found = find_base(settings, source, revision, profile, editor)
        return place_profile(stream.storage, settings.cache, found, editor, profile, corpus)
    model, own = load_model(settings, stream), None
    if isinstance(model.profile, Profile):
        own = Moments.load(fetch_moments(stream.storage, model.profile.solve.moments, settings.cache))
    return place_profile(stream.storage, settings.cache, Source(model.ref, model.folder, model.base), editor, profile, corpus, own)


def place_base(settings: Settings, source: str, revision: str | None) -> Source:
    """Store a base, for what works on it without a stream.

    Raises:
        StorageError: the root cannot hold it. Else as `find_base`.
    """
    storage = open_storage(settings.root)
    check_create_if_absent(storage)
    found = find_base(settings, source, revision)
    return Source(put_base(storage, found.ref, found.folder), found.folder, found.base)


def find_base(settings: Settings, source: str, revision: str | None, profile: str | None = None, editor: str = "d4s") -> Source:
    """Load the base a user named, if there is room for it and for editing it, and keep it in memory; the built-in one is trained if the
    cache has none.

    Raises:
        InputError: it names nothing that could be a base.
        ModelError: the base cannot be loaded, or there is no room.
    """
    found = _load_source(settings, source, revision, profile, editor)
    keep_loaded(found.base, settings.device)
    return found


def plan_source(
    settings: Settings,
    source: str,
    *,
    editor: str = "d4s",
    revision: str | None = None,
    profile: str | None = None,
    edits: int = 1_000,
    device_memory: int | None = None,
) -> Plan:
    """What editing a base would take, from its configuration alone: none of its weights are read.

    Args:
        source: as in `start_stream`, or a config.json.
        edits: live at once.
        device_memory: bytes of the device to plan for; None is what this machine's has free.

    Raises:
        ModelError, UnknownArchitectureError: no configuration of a model of a known family there.
        InputError, SettingsError: as `choose_profile`.
    """
    own = NAMED.get(source)
    model = sketch_model(str(_provide(settings, own))) if own else sketch_model(source, revision)
    chosen = choose_profile(model, profile, require_editor(editor), builtin=own and own.digest)
    room = find_room(choose_device(settings.device), free_disk(settings), device_memory)
    if isinstance(chosen, NeuronSuggestion):
        return plan_neurons(model, chosen.prepare.layer, room, edits=edits, offloads=settings.device_map is not None)
    spread = chosen.spread or choose_spread(len(chosen.prepare.layers))
    return make_plan(model, chosen.prepare.layers, spread, room, edits=edits, offloads=settings.device_map is not None)


def require_room(settings: Settings, source: str, revision: str | None, profile: str | None, editor: str) -> None:
    """Say what editing a base takes, before it is loaded. Raises as `plan_source`, and ModelError: there is no room for it."""
    if profile is not None and names_stored(profile):
        return  # stored, for a base that was loaded here before
    plan = plan_source(settings, source, editor=editor, revision=revision, profile=profile)
    most = {place: sum(line.bytes for line in plan.lines if line.place == place and line.phase == "always") for place in plan.room}
    said = ", ".join(f"{spell_bytes(size)} on the {place}" for place, size in most.items() if size)
    _log.info("plan: %s parameters of %s stay as %s; %s", f"{plan.parameters:,}", plan.dtype, said, "fits" if plan.fits else "does not fit")
    plan.require_fit()


def choose_layers(found: Source, spelled: str | None) -> list[int]:
    """Layers as a user wrote them, such as `3-8` or `3,5`; else those of the family's published values; else all.

    Raises:
        InputError: they are no layers of this base.
    """
    depth = found.base.layout.count_layers(found.base.model)
    if spelled is None:
        own = name_builtin(found.ref)
        suggested = suggest_builtin(own) if own else suggest_profile(found.base.model.config.model_type, depth)
        return list(suggested.prepare.layers) if suggested else list(range(depth))
    layers: set[int] = set()
    for part in spelled.split(","):
        if not (match := _LAYERS.fullmatch(part.strip())) or not (chosen := range(int(match[1]), int(match[2] or match[1]) + 1)):
            raise InputError(f"layers: expected numbers and ranges such as 3-8 or 3,5, found {spelled!r}")
        layers.update(chosen)
    if max(layers) >= depth:
        raise InputError(f"layers: expected 0 to {depth - 1}, as this base has them, found {max(layers)}")
    return sorted(layers)


def preserve_text(found: Source, path: Path | None) -> str:
    """As `choose_corpus`; a makeshift for a base of the user's own without a text."""
    return MAKESHIFT if path is None and found.ref.kind != "builtin" else choose_corpus(found, path)


def _load_source(settings: Settings, source: str, revision: str | None, profile: str | None, editor: str) -> Source:
    quiet_transformers()
    if own := NAMED.get(source):
        folder = _provide(settings, own)
        base = load_base(folder, device=settings.device)
        return Source(BaseRef(kind="builtin", source=own.digest, digest=base.digest), folder, base)
    spread: dict[str, Any] = {"device_map": settings.device_map, "offload": settings.cache / "offload"}
    path = Path(source)
    if path.is_dir():
        require_room(settings, source, None, profile, editor)
        base = load_base(path, device=settings.device, **spread)
        return Source(BaseRef(kind="folder", source=str(path.resolve()), digest=base.digest), path, base)
    if path.exists() or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise InputError(
            f"base: expected {' or '.join(map(repr, NAMED))}, a model folder or a Hugging Face id, found {source!r}, which is none of them"
        )
    pinned = revision or _pin_revision(source)
    require_room(settings, source, pinned, profile, editor)
    base = load_base(source, revision=pinned, device=settings.device, **spread)
    return Source(BaseRef(kind="hub", source=source, revision=pinned, digest=base.digest), None, base)


def _provide(settings: Settings, own: BuiltinSettings) -> Path:
    with show_progress("training the built-in base") as on_progress:
        return ensure_builtin(own, settings.cache, lambda done, total, _: on_progress(done, total))


def _pin_revision(source: str) -> str:
    try:
        revision = HfApi().model_info(source).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"base: expected a folder or a reachable Hugging Face id, found {source!r} ({reason})") from None
    if revision is None:
        raise ModelError(f"base: the hub names no revision of {source!r}; pin one with --revision")
    return revision
