"""The processes of `errata up`: started each in a session of its own, recognised by a mark in their environment, ended together.

The mark finds every process of one `up`, whoever is its parent by now: flow runs are sessions of their own, and a killed `up` leaves its
servers to nobody. Imports nothing heavy.
"""

import os
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from errata.errors import ErrataError, InputError

HOST = "127.0.0.1"
_MARK = "_ERRATA_UP"
_STOPPING = 15.0
"""Seconds to end by oneself."""
_STARTING = 240.0
"""Seconds for a server to answer; a new database on a busy machine takes one minute."""

Child = subprocess.Popen[bytes]


def start_child(name: str, command: Sequence[str], home: Path, environment: Mapping[str, str], folder: Path) -> Child:
    """Start a process whose output goes to `<home>/<name>.log`."""
    with (home / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, _MARK: str(home)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C at the terminal is for us; we end them in order
        )


def read_tail(home: Path, name: str, size: int = 2_000) -> str:
    """The end of what a child has printed."""
    try:
        return (home / f"{name}.log").read_text(errors="replace")[-size:].strip()
    except FileNotFoundError:
        return ""


def find_family(home: Path) -> list[psutil.Process]:
    """Every process of this or an earlier `up` with this home, and none of another."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # another user's, or gone meanwhile
            if process.environ().get(_MARK) == str(home) and process.pid != os.getpid():
                found.append(process)
    return found


def end_family(home: Path, last: Iterable[int], hurry: Callable[[], bool]) -> None:
    """End every process with this home: servers last, so that the others can still report to them.

    Args:
        last: process ids of the servers.
        hurry: whether to kill without waiting any longer.
    """
    servers = set(last)
    _end([process for process in find_family(home) if process.pid not in servers], hurry)
    _end(find_family(home), hurry)
    while family := find_family(home):  # started while we looked
        for process in family:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(family, timeout=1)


def end_session(home: Path, leader: int) -> None:
    """End what a child that is gone has left of its session, such as who has its port. Flow runs have sessions of their own."""
    left = []
    for process in find_family(home):
        with suppress(ProcessLookupError):
            if os.getsid(process.pid) == leader:
                left.append(process)
    _end(left, lambda: False)


def _end(processes: list[psutil.Process], hurry: Callable[[], bool]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.terminate()
    end, alive = time.monotonic() + _STOPPING, processes
    while alive and time.monotonic() < end and not hurry():
        _, alive = psutil.wait_procs(alive, timeout=0.2)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


def take_port(wanted: int | None, usual: int) -> int:
    """A free port of the loopback interface: the wanted one, or the usual one, or any.

    Raises:
        InputError: the wanted one is taken.
    """
    for port in (wanted,) if wanted is not None else (usual, 0):
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was in use a moment ago counts as free, as for servers
            with suppress(OSError):
                free.bind((HOST, port))
                return int(free.getsockname()[1])
    raise InputError(f"port {wanted}: expected a free one on {HOST}, found it taken")


def wait_until_healthy(url: str, name: str, child: Child, home: Path, check: Callable[[], None]) -> None:
    """Wait for a server to answer: ours, not another one that took its port. `check` raises where nobody wants to wait any longer.

    Raises:
        ErrataError: it ended, or does not answer in time.
    """
    end = time.monotonic() + _STARTING
    while time.monotonic() < end and child.poll() is None:
        check()
        with suppress(OSError):
            open_local(url, timeout=5)
            if _listens(home, urllib.parse.urlsplit(url).port):
                return
        time.sleep(0.2)
    found = "no answer" if child.poll() is None else f"exit code {child.returncode}"
    raise ErrataError(f"up: expected {name} at {url}, found {found}:\n{read_tail(home, name)}")


def _listens(home: Path, port: int | None) -> bool:
    for process in find_family(home):
        with suppress(psutil.Error):
            if any(link.status == psutil.CONN_LISTEN and link.laddr.port == port for link in process.net_connections("tcp")):
                return True
    return False


def open_local(request: str | urllib.request.Request, timeout: float) -> bytes:
    """What a server of this machine answers, never by way of a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout) as answer:
        data: bytes = answer.read()
        return data
