"""A new stream: base, second moments, profile, first commit. Plain functions: nothing here is scheduled."""

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedModel

from errata.builtin import BUILTIN, ensure_builtin
from errata.candidates import start_manifest
from errata.corpus import MAKESHIFT, WORLD, find_corpus
from errata.editors.base import Editor
from errata.editors.catalogue import make_editor
from errata.editors.d4s.moments import Moments
from errata.errors import InputError, ModelError, SettingsError
from errata.modeling.layout import find_layout
from errata.modeling.loading import Base, choose_device, load_base, sketch_model
from errata.plan import Plan, find_room, make_plan, spell_bytes
from errata.profiles import PrepareOptions, Profile, SolveOptions, Spread, require_same_pairs
from errata.settings import Settings
from errata.suggestions import BUILTIN_SUGGESTION, Suggestion, choose_spread, suggest_profile
from errata.validation import explain_errors
from registry.calibrations import find_calibrated
from registry.events import InitCommit
from registry.shared import BaseRef, fetch_moments, get_moments, get_profile, list_profiles, put_base, put_moments, put_profile
from registry.storage.base import Storage, check_create_if_absent, open_storage
from registry.stream import Stream, create_stream
from tasks._progress import show_progress
from tasks._session import free_disk, keep_loaded, load_model, quiet_transformers
from tasks.committing import describe_writer
from tasks.measuring import measure_here

BUILTIN_NAME = "builtin"
_log = logging.getLogger(__name__)
_LAYERS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")
_DIGEST = re.compile(r"[0-9a-f]{4,64}")


class ProfileFile(BaseModel):
    """What a user writes of a profile: the values; base and second moments are filled in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prepare: PrepareOptions
    lam: float = Field(gt=0)
    spread: Spread | None = None
    """None: the default for its layers; where a running stream adopts it, the spread that it has."""
    origin: str = "written by hand"
    max_norm_ratio: float | None = Field(default=None, gt=1)


@dataclass(frozen=True)
class Source:
    """A base model, loaded, and where it came from."""

    ref: BaseRef
    folder: Path | None
    base: Base


@dataclass(frozen=True)
class Placed:
    """A base and a profile that are stored."""

    ref: BaseRef
    profile: str
    """Its digest."""
    editor: Editor[Any]


def start_stream(
    settings: Settings, source: str, *, revision: str | None = None, profile: str | None = None, corpus: Path | None = None
) -> Stream:
    """Make the stream of `settings` on a base.

    Args:
        source: `builtin`, a folder, or a Hugging Face id.
        revision: of a hub id; None pins the newest.
        profile: path of a `ProfileFile` in JSON, or the beginning of the digest of a profile that the root holds for this base; None takes
            what its newest calibration has found, else the one suggested for the family.
        corpus: text or JSONL file, or a folder of them (`errata.corpus.open_corpus`), for second moments; not needed for the built-in base,
            nor with a stored profile.

    Raises:
        InputError: the stream exists, or the base cannot be used without a profile or corpus that was not given.
        ModelError: the base cannot be loaded.
        StorageError: the root cannot hold a stream.
    """
    storage = open_storage(settings.root)
    check_create_if_absent(storage)
    found = find_base(settings, source, revision, profile)
    placed = place_profile(storage, settings.cache, found, profile, corpus)
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
    if source is not None:
        found = find_base(settings, source, revision, profile)
        return place_profile(stream.storage, settings.cache, found, profile, corpus)
    model = load_model(settings, stream)
    own = Moments.load(fetch_moments(stream.storage, model.profile.solve.moments, settings.cache))
    return place_profile(stream.storage, settings.cache, Source(model.ref, model.folder, model.base), profile, corpus, own)


def place_profile(
    storage: Storage, cache: Path, found: Source, profile: str | None, corpus: Path | None, own: Moments | None = None
) -> Placed:
    """Store a base and a profile for it, with second moments that are measured unless `own` will do, or the profile is stored already.

    Raises:
        InputError, SettingsError, ModelError, StorageError: as `start_stream`.
    """
    stored = find_profile(storage, found.ref.digest, profile) if profile else None
    if profile is None and corpus is None:
        stored = find_calibrated(storage, found.ref.digest)
    if stored is not None:
        if corpus is not None:
            raise InputError(f"corpus: expected none with the stored profile {stored[:12]}, which has its second moments, found {corpus}")
        made = Profile.model_validate_json(get_profile(storage, found.ref.digest, stored))
        moments = Moments.from_bytes(get_moments(storage, made.solve.moments))
        return Placed(put_base(storage, found.ref, found.folder), stored, make_editor("d4s", made, moments, found.base.layout))
    chosen = choose_profile(found.base.model, profile, builtin=found.ref.kind == "builtin")
    spread = chosen.spread or choose_spread(len(chosen.prepare.layers))
    draft = write_profile(found.ref.digest, chosen, spread, "")
    if own is not None and corpus is None and set(chosen.prepare.layers) <= set(own.c):
        moments = own
    else:
        name = choose_corpus(found, corpus)
        moments = measure_here(storage, found.base, chosen.prepare.layers, name, find_corpus(name, cache))
    ref = put_base(storage, found.ref, found.folder)
    solve = draft.solve.model_copy(update={"moments": put_moments(storage, moments.to_bytes())})
    made = draft.model_copy(update={"solve": solve})
    editor = make_editor("d4s", made, moments, found.base.layout)
    return Placed(ref, put_profile(storage, ref.digest, made.to_bytes()), editor)


def place_base(settings: Settings, source: str, revision: str | None) -> Source:
    """Store a base, for what works on it without a stream.

    Raises:
        StorageError: the root cannot hold it. Else as `find_base`.
    """
    storage = open_storage(settings.root)
    check_create_if_absent(storage)
    found = find_base(settings, source, revision)
    return Source(put_base(storage, found.ref, found.folder), found.folder, found.base)


def place_solve(settings: Settings, stream: Stream, profile: str) -> str:
    """Store the profile whose solve part a stream is to adopt; its digest.

    Args:
        profile: as in `start_stream`. The second moments are then the stream's own; so are spread and norm ratio where the file has none.

    Raises:
        InputError: the stream's pairs are not valid there, or the profile cannot be read.
    """
    base, model = stream.head.base, load_model(settings, stream)
    digest = find_profile(stream.storage, base, profile)
    if digest is not None:
        require_same_pairs(model.profile, Profile.model_validate_json(get_profile(stream.storage, base, digest)))
        return digest
    given, own = read_profile(Path(profile)), model.profile
    given = replace(given, max_norm_ratio=given.max_norm_ratio or own.max_norm_ratio)
    made = write_profile(base, given, given.spread or own.solve.spread, own.solve.moments)
    require_same_pairs(own, made)
    return put_profile(stream.storage, base, made.to_bytes())


def write_profile(base: str, chosen: Suggestion, spread: Spread, moments: str) -> Profile:
    """Raises SettingsError: the values do not go together."""
    try:
        solve = SolveOptions(lam=chosen.lam, spread=spread, moments=moments)
        return Profile(base=base, prepare=chosen.prepare, solve=solve, origin=chosen.origin, max_norm_ratio=chosen.max_norm_ratio)
    except ValidationError as error:
        raise SettingsError("profile: " + "; ".join(map(str, explain_errors(error)))) from None


def find_profile(storage: Storage, base: str, given: str) -> str | None:
    """The digest of the stored profile that is meant; None where a file is.

    Raises:
        InputError: no stored profile of this base has a digest that begins so, or several have.
    """
    if Path(given).exists() or not _DIGEST.fullmatch(given):
        return None
    known = list_profiles(storage, base)
    found = [digest for digest in known if digest.startswith(given)]
    if len(found) != 1:
        shown = ", ".join(digest[:12] for digest in found or known) or "none"
        raise InputError(f"profile: expected a file, or the digest of one profile of base {base[:12]} ({shown}), found {given!r}")
    return found[0]


def find_base(settings: Settings, source: str, revision: str | None, profile: str | None = None) -> Source:
    """Load the base a user named, if there is room for it and for editing it, and keep it in memory; the built-in one is trained if the
    cache has none.

    Raises:
        InputError: it names nothing that could be a base.
        ModelError: the base cannot be loaded, or there is no room.
    """
    found = _load_source(settings, source, revision, profile)
    keep_loaded(found.base, settings.device)
    return found


def plan_source(
    settings: Settings,
    source: str,
    *,
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
    if source == BUILTIN_NAME:
        with show_progress("training the built-in base") as on_progress:
            model = sketch_model(str(ensure_builtin(BUILTIN, settings.cache, lambda done, total, _: on_progress(done, total))))
    else:
        model = sketch_model(source, revision)
    chosen = choose_profile(model, profile, builtin=source == BUILTIN_NAME)
    spread = chosen.spread or choose_spread(len(chosen.prepare.layers))
    room = find_room(choose_device(settings.device), free_disk(settings), device_memory)
    return make_plan(model, chosen.prepare.layers, spread, room, edits=edits, offloads=settings.device_map is not None)


def require_room(settings: Settings, source: str, revision: str | None, profile: str | None) -> None:
    """Say what editing a base takes, before it is loaded. Raises as `plan_source`, and ModelError: there is no room for it."""
    if profile is not None and _DIGEST.fullmatch(profile) and not Path(profile).exists():
        return  # stored, for a base that was loaded here before
    plan = plan_source(settings, source, revision=revision, profile=profile)
    most = {place: sum(line.bytes for line in plan.lines if line.place == place and line.phase == "always") for place in plan.room}
    said = ", ".join(f"{spell_bytes(size)} on the {place}" for place, size in most.items() if size)
    _log.info("plan: %s parameters of %s stay as %s; %s", f"{plan.parameters:,}", plan.dtype, said, "fits" if plan.fits else "does not fit")
    plan.require_fit()


def read_profile(path: Path) -> Suggestion:
    """What a user wrote.

    Raises:
        SettingsError: the file is no profile.
        InputError: it cannot be read.
    """
    try:
        given = ProfileFile.model_validate_json(path.read_text())
    except OSError as error:
        said = error.strerror or error
        raise InputError(f"{path}: expected a readable profile, or the digest of a stored one ({said})") from None
    except ValidationError as error:
        raise SettingsError(f"{path}: " + "; ".join(map(str, explain_errors(error)))) from None
    return Suggestion(given.prepare, given.lam, given.origin, given.max_norm_ratio, given.spread)


def choose_profile(model: PreTrainedModel, path: str | None, *, builtin: bool) -> Suggestion:
    """The user's profile, else the built-in base's, else published values of the family.

    Raises:
        SettingsError: the file is no profile.
        InputError: it cannot be read; or there is none, and nothing published for the family.
    """
    if path is not None:
        return read_profile(Path(path))
    if builtin:
        return BUILTIN_SUGGESTION
    family = model.config.model_type
    suggested = suggest_profile(family, find_layout(model).count_layers(model))
    if suggested is None:
        raise InputError(f"profile: expected one for a {family!r} model (--profile FILE), since no values are published for that family")
    return suggested


def choose_layers(found: Source, spelled: str | None) -> list[int]:
    """Layers as a user wrote them, such as `3-8` or `3,5`; else those of the family's published values; else all.

    Raises:
        InputError: they are no layers of this base.
    """
    depth = found.base.layout.count_layers(found.base.model)
    if spelled is None:
        suggested = BUILTIN_SUGGESTION if found.ref.kind == "builtin" else suggest_profile(found.base.model.config.model_type, depth)
        return list(suggested.prepare.layers) if suggested else list(range(depth))
    layers: set[int] = set()
    for part in spelled.split(","):
        if not (match := _LAYERS.fullmatch(part.strip())) or not (chosen := range(int(match[1]), int(match[2] or match[1]) + 1)):
            raise InputError(f"layers: expected numbers and ranges such as 3-8 or 3,5, found {spelled!r}")
        layers.update(chosen)
    if max(layers) >= depth:
        raise InputError(f"layers: expected 0 to {depth - 1}, as this base has them, found {max(layers)}")
    return sorted(layers)


def choose_corpus(found: Source, path: Path | None) -> str:
    """What holds the passages whose keys are to be preserved: the user's text, or the built-in world for its base.

    Raises:
        InputError: none given for a base of the user's own.
    """
    if path is not None:
        return str(path)
    if found.ref.kind != "builtin":
        named = found.ref.source
        raise InputError(f"corpus: expected text that {named!r} must go on knowing (--corpus FILE|DIR), found none")
    return WORLD


def preserve_text(found: Source, path: Path | None) -> str:
    """As `choose_corpus`; a makeshift for a base of the user's own without a text."""
    return MAKESHIFT if path is None and found.ref.kind != "builtin" else choose_corpus(found, path)


def _load_source(settings: Settings, source: str, revision: str | None, profile: str | None) -> Source:
    quiet_transformers()
    if source == BUILTIN_NAME:
        with show_progress("training the built-in base") as on_progress:
            folder = ensure_builtin(BUILTIN, settings.cache, lambda done, total, _: on_progress(done, total))
        base = load_base(folder, device=settings.device)
        return Source(BaseRef(kind="builtin", source=BUILTIN.digest, digest=base.digest), folder, base)
    spread: dict[str, Any] = {"device_map": settings.device_map, "offload": settings.cache / "offload"}
    path = Path(source)
    if path.is_dir():
        require_room(settings, source, None, profile)
        base = load_base(path, device=settings.device, **spread)
        return Source(BaseRef(kind="folder", source=str(path.resolve()), digest=base.digest), path, base)
    if path.exists() or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise InputError(f"base: expected '{BUILTIN_NAME}', a model folder or a Hugging Face id, found {source!r}, which is none of them")
    pinned = revision or _pin_revision(source)
    require_room(settings, source, pinned, profile)
    base = load_base(source, revision=pinned, device=settings.device, **spread)
    return Source(BaseRef(kind="hub", source=source, revision=pinned, digest=base.digest), None, base)


def _pin_revision(source: str) -> str:
    try:
        revision = HfApi().model_info(source).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"base: expected a folder or a reachable Hugging Face id, found {source!r} ({reason})") from None
    if revision is None:
        raise ModelError(f"base: the hub names no revision of {source!r}; pin one with --revision")
    return revision
