"""`errata doctor`: what this installation has, and what to do about what it has not."""

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from errata.errors import ErrataError
from errata.modeling.loading import choose_device
from errata.redaction import redact
from errata.settings import Settings
from flows.prefect_server import reach_prefect
from registry.models import ModelRegistry
from registry.release import resolve_tracking
from registry.storage.base import check_create_if_absent, open_storage
from registry.stream import list_streams

Finding = dict[str, str]

_PACKAGES = ("torch", "transformers", "prefect", "mlflow", "peft", "sentence-transformers", "boto3")
_FREE = 2 * 2**30
"""Bytes that should be free in the cache folder."""


def diagnose(settings: Settings) -> list[Finding]:
    """Findings with `state` (good, note, fault), `what`, `found`, `remedy`."""
    return [*_check_packages(), *_check_faiss(), *_check_places(settings), *_check_servers(settings)]


def _find(state: str, what: str, found: str, remedy: str = "") -> Finding:
    return {"state": state, "what": what, "found": found, "remedy": remedy}


def _check_packages() -> Iterator[Finding]:
    yield _find("good", "python", sys.version.split()[0])
    for name in _PACKAGES:
        try:
            yield _find("good", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield _find("fault", name, "not installed", "make install")


def _check_faiss() -> Iterator[Finding]:
    installed = [name for name in ("faiss-cpu", "faiss-gpu") if _has(name)]
    if len(installed) == 2:
        yield _find("fault", "faiss", "faiss-cpu and faiss-gpu", "they own the same folder: uninstall both, then install one extra")
    elif installed:
        yield _find("good", "faiss", f"{installed[0]} {importlib.metadata.version(installed[0])}")
    else:
        yield _find("note", "faiss", "not installed", "pip install 'errata[cpu]' or 'errata[gpu]'; only retrieval needs it")


def _has(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _check_places(settings: Settings) -> Iterator[Finding]:
    yield _try("device", lambda: f"{choose_device(settings.device)}, {torch.get_num_threads()} threads", "set device in errata.toml")
    yield _try("root", lambda: _try_root(settings), "set root in errata.toml; for S3 set AWS_* variables")
    yield _try("cache", lambda: _try_cache(settings.cache), "set cache in errata.toml to a folder you may write")
    free = shutil.disk_usage(_nearest(settings.cache)).free
    remedy = "" if free > _FREE else "free some disk, or move the cache"
    yield _find("good" if free > _FREE else "note", "free disk", f"{free / 2**30:.1f} GiB at {settings.cache}", remedy)


def _check_servers(settings: Settings) -> Iterator[Finding]:
    yield _try("mlflow", lambda: _try_mlflow(settings), "set mlflow.tracking_uri in errata.toml, or start the server")
    yield _try("prefect server", reach_prefect, "start the server, or unset PREFECT_API_URL to run without one")


def _try(what: str, test: Callable[[], str], remedy: str) -> Finding:
    try:
        return _find("good", what, test())
    except (ErrataError, OSError) as error:
        return _find("fault", what, redact(str(error)), remedy)


def _try_root(settings: Settings) -> str:
    storage = open_storage(settings.root)
    check_create_if_absent(storage)
    streams = list_streams(storage)
    return f"{storage.url}: writable, creates only if absent; streams: {', '.join(streams) or 'none, `errata init` makes one'}"


def _try_cache(cache: Path) -> str:
    cache.mkdir(parents=True, exist_ok=True)
    probe = cache / f".probe-{os.getpid()}"
    probe.write_bytes(b"")
    probe.unlink()
    return f"{cache}: writable"


def _try_mlflow(settings: Settings) -> str:
    registry = ModelRegistry(*resolve_tracking(settings.mlflow.tracking_uri, settings.root))
    champion = registry.champion(settings.stream)
    return f"{redact(registry.tracking_uri)}: {settings.stream}@champion is {f'version {champion.number}' if champion else 'not there yet'}"


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return path if path.exists() else _nearest(path.parent)
