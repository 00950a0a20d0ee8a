"""What calibrations of a base leave behind, beside its profiles. Knows bytes and names, no models.

shared/calibrations/<base digest>/objects/<sha256>                      facts, traces, searches, reports
shared/calibrations/<base digest>/steps/<search>/<number>-<step>.json   steps of a search that are measured: an interrupted one goes on
shared/calibrations/<base digest>/found/<time>-<profile digest>.json    {"profile", "report"}; the newest is what a new stream takes
shared/calibrations/<base digest>/found/<time>-<profile digest>.<name>.png
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime

from errata.edits import canonical_json
from errata.errors import KeyExistsError
from registry.objects import ObjectStore
from registry.storage.base import Storage


def open_objects(storage: Storage, base: str) -> ObjectStore:
    """Where the calibrations of a base keep their records."""
    return ObjectStore(storage, f"shared/calibrations/{base}/objects")


def store_step(storage: Storage, base: str, search: str, number: int, step: str, data: bytes) -> None:
    """Keep a measured step; one that is there already is left as it is.

    Args:
        search, step: digests.
        number: of the step in its search.
    """
    with suppress(KeyExistsError):
        storage.create(f"{_steps_key(base, search)}{number:04d}-{step}.json", data)


def read_steps(storage: Storage, base: str, search: str) -> Iterator[bytes]:
    """The steps of a search that are measured, by their numbers."""
    return (storage.read(entry.key) for entry in storage.list(_steps_key(base, search)))


def store_found(
    storage: Storage, base: str, editor: str, moment: datetime, profile: str, report: str, figures: dict[str, bytes]
) -> list[str]:
    """Record that a calibration has ended with a profile for an editor; where its figures lie."""
    stem = f"{_found_key(base)}{moment:%Y%m%dT%H%M%S%f}-{profile}"
    keys = []
    for name, data in figures.items():
        keys.append(f"{stem}.{name}.png")
        storage.create(keys[-1], data)
    # Last: it is what is looked for.
    storage.create(f"{stem}.json", canonical_json({"editor": editor, "profile": profile, "report": report}))
    return [f"{storage.url}/{key}" for key in keys]


def find_calibrated(storage: Storage, base: str, editor: str) -> str | None:
    """Digest of the profile that the newest calibration of a base for an editor has found; None where there was none."""
    keys = [entry.key for entry in storage.list(_found_key(base)) if entry.key.endswith(".json")]
    for key in sorted(keys, reverse=True):
        found = json.loads(storage.read(key))
        if found.get("editor", "d4s") == editor:
            return str(found["profile"])
    return None


def _steps_key(base: str, search: str) -> str:
    return f"shared/calibrations/{base}/steps/{search}/"


def _found_key(base: str) -> str:
    return f"shared/calibrations/{base}/found/"
