"""Which profile a stream is under: the user's own, what a calibration has found, or published values; stored with what it needs."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedModel

from errata.corpus import WORLD, find_corpus
from errata.editors.base import Editor
from errata.editors.catalogue import make_editor, require_editor
from errata.editors.d4s.moments import Moments
from errata.errors import InputError, SettingsError
from errata.modeling.layout import find_layout
from errata.modeling.loading import Base
from errata.profiles import (
    AnyProfile,
    GateOptions,
    NeuronOptions,
    NeuronProfile,
    PrepareOptions,
    Profile,
    SolveOptions,
    Spread,
    name_editor,
    parse_profile,
    require_same_pairs,
)
from errata.settings import Settings
from errata.suggestions import NeuronSuggestion, Suggestion, choose_spread, suggest_builtin, suggest_neurons, suggest_profile
from errata.validation import explain_errors
from registry.calibrations import find_calibrated
from registry.shared import BaseRef, get_moments, get_profile, list_profiles, put_base, put_moments, put_profile
from registry.storage.base import Storage
from registry.stream import Stream
from tasks._session import load_model
from tasks.measuring import measure_here

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


class NeuronFile(BaseModel):
    """As `ProfileFile`, for iReVa."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    editor: Literal["ireva"]
    prepare: NeuronOptions
    solve: GateOptions = GateOptions()
    origin: str = "written by hand"


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


def place_profile(
    storage: Storage, cache: Path, found: Source, editor: str, profile: str | None, corpus: Path | None, own: Moments | None = None
) -> Placed:
    """Store a base and a profile for it; for D4S with second moments that are measured unless `own` will do, or the profile is stored
    already.

    Raises:
        UnknownNameError: no such editor.
        InputError, SettingsError, ModelError, StorageError: as `start_stream`.
    """
    require_editor(editor)
    stored = find_profile(storage, found.ref.digest, profile) if profile else None
    if profile is None and corpus is None:
        stored = find_calibrated(storage, found.ref.digest, editor)
    if stored is not None:
        if corpus is not None:
            raise InputError(f"corpus: expected none with the stored profile {stored[:12]}, which has what it needs, found {corpus}")
        ready = parse_profile(get_profile(storage, found.ref.digest, stored))
        require_kind(editor, name_editor(ready))
        moments = Moments.from_bytes(get_moments(storage, ready.solve.moments)) if isinstance(ready, Profile) else None
        return Placed(put_base(storage, found.ref, found.folder), stored, make_editor(editor, ready, moments, found.base.layout))
    chosen = choose_profile(found.base.model, profile, editor, builtin=name_builtin(found.ref))
    if isinstance(chosen, NeuronSuggestion):
        if corpus is not None:
            raise InputError(f"corpus: expected none for {editor}, which measures no second moments, found {corpus}")
        ready = write_neuron_profile(found.ref.digest, chosen)
        check_layer(found.base, ready)
        ref = put_base(storage, found.ref, found.folder)
        return Placed(ref, put_profile(storage, ref.digest, ready.to_bytes()), make_editor(editor, ready, None, found.base.layout))
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
        require_same_pairs(model.profile, parse_profile(get_profile(stream.storage, base, digest)))
        return digest
    given, own = read_profile(Path(profile)), model.profile
    if isinstance(given, NeuronSuggestion) or not isinstance(own, Profile):
        require_kind(name_editor(own), "ireva" if isinstance(given, NeuronSuggestion) else "d4s")
        assert isinstance(given, NeuronSuggestion), "of the stream's own kind"
        return _store_solve(stream, own, write_neuron_profile(base, given))
    given = replace(given, max_norm_ratio=given.max_norm_ratio or own.max_norm_ratio)
    return _store_solve(stream, own, write_profile(base, given, given.spread or own.solve.spread, own.solve.moments))


def _store_solve(stream: Stream, own: AnyProfile, made: AnyProfile) -> str:
    require_same_pairs(own, made)
    return put_profile(stream.storage, made.base, made.to_bytes())


def require_kind(editor: str, found: str) -> None:
    """Raises InputError: the profile is another editor's."""
    if editor != found:
        raise InputError(f"profile: expected one for the editor {editor!r}, found one for {found!r}")


def check_layer(base: Base, profile: NeuronProfile) -> None:
    """Raises InputError: the base has no such layer."""
    depth = base.layout.count_layers(base.model)
    if profile.prepare.layer >= depth:
        raise InputError(f"profile: expected a layer from 0 to {depth - 1}, as this base has them, found {profile.prepare.layer}")


def write_profile(base: str, chosen: Suggestion, spread: Spread, moments: str) -> Profile:
    """Raises SettingsError: the values do not go together."""
    try:
        solve = SolveOptions(lam=chosen.lam, spread=spread, moments=moments)
        return Profile(base=base, prepare=chosen.prepare, solve=solve, origin=chosen.origin, max_norm_ratio=chosen.max_norm_ratio)
    except ValidationError as error:
        raise SettingsError("profile: " + "; ".join(map(str, explain_errors(error)))) from None


def write_neuron_profile(base: str, chosen: NeuronSuggestion) -> NeuronProfile:
    return NeuronProfile(base=base, prepare=chosen.prepare, solve=chosen.solve, origin=chosen.origin)


def names_stored(given: str) -> bool:
    """Whether a user means a stored profile, and no file."""
    return _DIGEST.fullmatch(given) is not None and not Path(given).exists()


def find_profile(storage: Storage, base: str, given: str) -> str | None:
    """The digest of the stored profile that is meant; None where a file is.

    Raises:
        InputError: no stored profile of this base has a digest that begins so, or several have.
    """
    if not names_stored(given):
        return None
    known = list_profiles(storage, base)
    found = [digest for digest in known if digest.startswith(given)]
    if len(found) != 1:
        shown = ", ".join(digest[:12] for digest in found or known) or "none"
        raise InputError(f"profile: expected a file, or the digest of one profile of base {base[:12]} ({shown}), found {given!r}")
    return found[0]


def read_profile(path: Path) -> Suggestion | NeuronSuggestion:
    """What a user wrote.

    Raises:
        SettingsError: the file is no profile.
        InputError: it cannot be read.
    """
    try:
        text = path.read_text()
        kind: type[ProfileFile] | type[NeuronFile] = NeuronFile if _names_ireva(text) else ProfileFile
        given = kind.model_validate_json(text)
    except OSError as error:
        said = error.strerror or error
        raise InputError(f"{path}: expected a readable profile, or the digest of a stored one ({said})") from None
    except ValidationError as error:
        raise SettingsError(f"{path}: " + "; ".join(map(str, explain_errors(error)))) from None
    if isinstance(given, NeuronFile):
        return NeuronSuggestion(given.prepare, given.solve, given.origin)
    return Suggestion(given.prepare, given.lam, given.origin, given.max_norm_ratio, given.spread)


def _names_ireva(text: str) -> bool:
    """Whether a profile says that it is one of neurons. What is no JSON is for the reader to refuse."""
    try:
        content = json.loads(text)
    except ValueError:
        return False
    return isinstance(content, dict) and "editor" in content


def name_builtin(ref: BaseRef) -> str | None:
    """Digest of the settings that a built-in base was trained with; None: it is the user's own."""
    return ref.source if ref.kind == "builtin" else None


def choose_profile(model: PreTrainedModel, path: str | None, editor: str, *, builtin: str | None) -> Suggestion | NeuronSuggestion:
    """The user's profile, else the built-in base's, else published values of the family.

    Args:
        builtin: as `name_builtin`.

    Raises:
        SettingsError: the file is no profile.
        InputError: it cannot be read, or is another editor's; or there is none, and nothing published for the family.
    """
    if path is not None:
        given = read_profile(Path(path))
        require_kind(editor, "ireva" if isinstance(given, NeuronSuggestion) else "d4s")
        return given
    family, depth = model.config.model_type, find_layout(model).count_layers(model)
    if editor == "ireva":
        return suggest_neurons(depth, builtin=builtin is not None)
    if builtin is not None:
        return suggest_builtin(builtin)
    suggested = suggest_profile(family, depth)
    if suggested is None:
        raise InputError(f"profile: expected one for a {family!r} model (--profile FILE), since no values are published for that family")
    return suggested


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
