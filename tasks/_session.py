"""What a stage needs at hand: the stream at its head and, where it touches weights, the base and the editor."""

import shutil
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from errata.editors.base import Editor
from errata.editors.catalogue import make_editor
from errata.editors.d4s.moments import Moments
from errata.manifests import Manifest
from errata.modeling.loading import Base, load_base
from errata.plan import Plan, Room, can_hoard, choose_chunk, count_weights, find_room, make_plan, plan_neurons
from errata.profiles import AnyProfile, Profile, parse_profile
from errata.settings import Settings, load_settings
from registry.objects import drop_stale
from registry.shared import BaseRef, fetch_base, fetch_moments, get_base, get_profile
from registry.storage.base import Storage
from registry.stream import Stream, open_stream


@dataclass(frozen=True)
class Model:
    """The base of a stream with its editor."""

    ref: BaseRef
    folder: Path | None
    """Local files of the base; None for one that is named by hub id."""
    base: Base
    profile: AnyProfile
    editor: Editor[Any]


def open_named(name: str) -> tuple[Settings, Stream]:
    """Settings and the stream of that name at its head."""
    settings = load_settings(stream=name)
    return settings, open_stream(settings.root, settings.stream, settings.cache)


def load_model(settings: Settings, stream: Stream) -> Model:
    """Base, profile and editor of a stream's head; the base is kept in memory for the stages that follow."""
    return load_named(settings, stream.storage, stream.head.base, stream.head.profile, stream.head.editors[0])


def load_under(settings: Settings, stream: Stream, manifest: Manifest) -> Model:
    """As `load_model`, for a version that may be older than the stream's move to its base or profile."""
    return load_named(settings, stream.storage, manifest.base, manifest.profile, manifest.layers[0].editor)


def load_named(settings: Settings, storage: Storage, base_digest: str, profile_digest: str, editor: str) -> Model:
    """As `load_model`, for what a root holds under these digests."""
    ref, folder, base = find_stored(settings, storage, base_digest, settings.device)
    profile = parse_profile(get_profile(storage, base_digest, profile_digest))
    return Model(ref, folder, base, profile, open_editor(settings, storage, editor, base, profile))


def open_editor(settings: Settings, storage: Storage, name: str, base: Base, profile: AnyProfile) -> Editor[Any]:
    """An editor with what a root holds for it, within what this machine has room for. Raises as `make_editor`."""
    moments = Moments.load(fetch_moments(storage, profile.solve.moments, settings.cache)) if isinstance(profile, Profile) else None
    return make_editor(name, profile, moments, base.layout, **limit_editor(settings, base, profile.prepare.layers))


def limit_editor(settings: Settings, base: Base, layers: Sequence[int]) -> dict[str, Any]:
    """What an editor of these layers may use of this machine now, as `make_editor` takes it."""
    scratch = settings.cache / "scratch"
    drop_stale(scratch)
    free = find_room(base.device, 0).device
    shapes = [base.layout.read_weight(base.model, layer).shape for layer in layers]
    return {
        "scratch": scratch,
        "hoards": can_hoard([(shape[0], shape[1]) for shape in shapes]),
        "chunk_tokens": choose_chunk(base.model, base.layout, max(layers), free),
    }


def plan_model(settings: Settings, model: Model, edits: int) -> Plan:
    """What so many edits take on a base that is loaded.

    Raises:
        ModelError: there is no room for it.
    """
    room = find_room(model.base.device, free_disk(settings))
    own, offloads = count_weights(model.base.model), settings.device_map is not None  # in memory already, so not among what is free
    room = room._replace(device=room.device + own, memory=room.memory + own if room.shared else room.memory)
    plan = plan_profile(model.base.model, model.profile, room, edits=edits, offloads=offloads)
    plan.require_fit()
    return plan


def plan_profile(model: PreTrainedModel, profile: AnyProfile, room: Room, *, edits: int, offloads: bool) -> Plan:
    """What so many edits take under a profile, of whatever editor. Arguments as of `make_plan`."""
    if isinstance(profile, Profile):
        return make_plan(model, profile.prepare.layers, profile.solve.spread, room, edits=edits, offloads=offloads)
    return plan_neurons(model, profile.prepare.layer, room, edits=edits, offloads=offloads)


def free_disk(settings: Settings) -> int:
    """Bytes free where the cache is, or will be."""
    folder = settings.cache.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def find_stored(settings: Settings, storage: Storage, digest: str, device: str) -> tuple[BaseRef, Path | None, Base]:
    """A base that a root holds, with its local files if it has any; it stays in memory, with a copy for each device it was asked for on,
    until another base is wanted."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    ref = get_base(storage, digest)
    folder = None if ref.kind == "hub" else fetch_base(storage, digest, settings.cache)
    with _loading:
        copies = _hold_copies(digest)
        if device not in copies:
            quiet_transformers()
            offload = settings.cache / "offload"
            copies[device] = load_base(
                str(folder or ref.source),
                revision=ref.revision,
                device=device,
                expect=digest,
                device_map=settings.device_map,
                offload=offload,
            )
        return ref, folder, copies[device]


def keep_loaded(base: Base, device: str) -> None:
    """Let the stages that follow have a base that is in memory already."""
    with _loading:
        _hold_copies(base.digest)[device] = base


@contextmanager
def occupy(device: str) -> Iterator[None]:
    """Be the only one in this process whose hooks hang on the base's copy on a device."""
    with _occupied[device]:
        yield


def quiet_transformers() -> None:
    """No bars for weights that load in a blink, and no advice on attention masks: rows padded on the right need none."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def read_manifest(stream: Stream, digest: str) -> Manifest:
    return Manifest.from_bytes(stream.objects.get(digest))


_loading = threading.Lock()
_occupied: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


@lru_cache(maxsize=1)
def _hold_copies(digest: str) -> dict[str, Base]:
    """Device → the base of this digest; filled by whoever loads it."""
    # Safe to share between stages: a base is frozen, and artifacts are attached for the length of a block only.
    return {}
