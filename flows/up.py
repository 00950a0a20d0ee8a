"""`errata up`: a Prefect server, an MLflow server, metrics for Prometheus and a worker on this machine, with the schedules of
`prefect.yaml`, until Ctrl-C.

One at a time for each root: who holds the lock file in its home (`<cache>/up/<root>/`) is up, and says in `state.json` where everything
is. Everything binds to the loopback interface.
"""

import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from errata.edits import digest_of
from errata.errors import ErrataError, UnknownNameError
from errata.settings import Settings, spell_environment
from flows import views
from flows.checkout import find_checkout
from flows.children import HOST, Child, end_family, end_session, read_tail, start_child, take_port, wait_until_healthy
from flows.prefect_runs import close_runs, find_next, read_news, settle_past
from flows.up_screen import build_screen, describe_places, describe_streams, spell_line, tell_commits
from registry.release import resolve_tracking
from registry.storage.base import open_storage
from registry.stream import list_streams, open_stream

POOL = "errata"
USUAL_PREFECT, USUAL_MLFLOW, USUAL_METRICS = 4200, 5000, 9464
_RUNS = 2
"""At once: a long check does not keep a batch waiting. Writers of one stream wait for each other all the same."""
_LOOK = 2.0
"""Seconds between two looks at what happens."""
_YOUNG = 60.0
"""Seconds. A process that ends sooner than this after it was started again is given up."""
_OURS = ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_PROFILE")
"""Variables that mean another server than the one we start."""

_ERRATA = [sys.executable, "-c", "from flows.console import main; main()"]

Commands = dict[str, tuple[list[str], Path]]
"""Name → command and folder of a process that has to run."""


def run_up(
    settings: Settings, out: Console, *, every: int | None, schedules: bool, port_prefect: int | None, port_mlflow: int | None
) -> None:
    """Start everything, show it, and end it all on Ctrl-C. Where it runs already, say where.

    Raises:
        ErrataError: a process does not start, or ends again at once.
    """
    checkout, storage = find_checkout(), open_storage(settings.root)
    streams = list_streams(storage)
    home = settings.cache.absolute() / "up" / digest_of(storage.url.encode())[:12]
    home.mkdir(parents=True, exist_ok=True)
    with _hold(home / "lock") as mine:
        if not mine:
            _point_to_other(home, out)
            return
        if not streams:
            raise UnknownNameError(f"up: expected a stream in {storage.url}, found none; `errata init` makes one")
        pressed = _count_signals()
        places: dict[str, Any] = {"pid": os.getpid(), "root": storage.url, "streams": streams, "logs": str(home), "state": "starting"}
        prefect = take_port(port_prefect, USUAL_PREFECT)
        places |= {"prefect": f"http://{HOST}:{prefect}", "since": datetime.now(UTC).isoformat()}
        commands: Commands = {"prefect": _spell_prefect(prefect, home)}
        tracking, artifacts = resolve_tracking(settings.mlflow.tracking_uri, settings.root)
        places["mlflow"] = tracking
        if not tracking.startswith(("http://", "https://")):
            mlflow = take_port(port_mlflow, USUAL_MLFLOW)
            places["mlflow"] = f"http://{HOST}:{mlflow}"
            commands["mlflow"] = _spell_mlflow(mlflow, home)
        metrics = take_port(None, USUAL_METRICS)
        places["metrics"] = f"http://{HOST}:{metrics}/metrics"
        commands["metrics"] = [*_ERRATA, "metrics", "--serve", f"{HOST}:{metrics}"], checkout
        environment = _spell_environment(settings, places, home) | _spell_store(tracking, artifacts)
        children: dict[str, Child] = {}
        try:
            end_family(home, (), pressed)  # of one that was killed
            _write_state(home, places)
            _announce(places, out)
            _start_servers(commands, children, environment, home, places, pressed)
            settle_past(f"{places['prefect']}/api")
            _register(every, schedules, environment, home, checkout, pressed)
            commands["worker"] = _spell_worker(checkout)
            children["worker"] = start_child("worker", commands["worker"][0], home, environment, commands["worker"][1])
            places["state"] = "ready"
            _write_state(home, places)
            _watch(settings, out, places, commands, children, environment, home, pressed)
        except KeyboardInterrupt:
            pass
        finally:
            out.print("stopping")
            (home / "state.json").unlink(missing_ok=True)
            end_family(home, [child.pid for name, child in children.items() if name != "worker"], lambda: pressed(2))
        out.print("stopped; what was under way goes on with the next run")


def read_state(home: Path) -> dict[str, Any] | None:
    """Where everything is of the `up` with this home, as long as it runs."""
    with _hold(home / "lock") as mine, suppress(FileNotFoundError, json.JSONDecodeError):
        if not mine:
            found: dict[str, Any] = json.loads((home / "state.json").read_text())
            return found
    return None


def _point_to_other(home: Path, out: Console) -> None:
    places = read_state(home)
    if places is None:
        out.print("errata up for this root is starting or stopping; ask again in a moment")
    else:
        out.print(f"up since {places['since'][:19]}, {places['state']}")
        _announce(places, out)


def _announce(places: dict[str, Any], out: Console) -> None:
    out.print(views.build_pairs([(label, escape(place)) for label, place in describe_places(places)]))


@contextmanager
def _hold(path: Path) -> Iterator[bool]:
    """Whether the lock is ours. The system gives it back when its holder dies, however that happens; children do not inherit it."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _count_signals() -> Callable[..., bool]:
    """Count what asks us to end, from now on; tells whether it came at least so many times."""
    count = 0

    def press(*_: Any) -> None:
        nonlocal count
        count += 1

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, press)
    return lambda times=1: count >= times


def _spell_environment(settings: Settings, places: dict[str, Any], home: Path) -> dict[str, str]:
    """What every process gets. The settings are those of this process, wherever a run is carried out."""
    environment = {name: value for name, value in os.environ.items() if name not in _OURS}
    environment |= spell_environment(settings)
    environment |= {"ERRATA_MLFLOW__TRACKING_URI": places["mlflow"], "MLFLOW_TRACKING_URI": places["mlflow"]}
    environment |= {"PREFECT_API_URL": f"{places['prefect']}/api", "PREFECT_HOME": str(home / "prefect")}
    environment |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment["NO_PROXY"] = ",".join(filter(None, (os.environ.get("NO_PROXY"), HOST, "localhost")))
    for name, value in {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # processes for features that we do not use
        "MLFLOW_UVICORN_OPTS": "--log-level warning",  # it would log every request
        "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER": "json",  # of the worker and its runs: their output goes to a file
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
    }.items():
        environment.setdefault(name, value)
    return environment


def _spell_store(tracking: str, artifacts: str | None) -> dict[str, str]:
    """What MLflow's server reads: not on its command line, which everybody sees and which would hold a password."""
    if tracking.startswith("sqlite:///"):
        tracking = f"sqlite:///{Path(tracking.removeprefix('sqlite:///')).absolute()}"
    return {"MLFLOW_BACKEND_STORE_URI": tracking, **({"MLFLOW_DEFAULT_ARTIFACT_ROOT": artifacts} if artifacts else {})}


def _spell_prefect(port: int, home: Path) -> tuple[list[str], Path]:
    return [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)], home


def _spell_mlflow(port: int, home: Path) -> tuple[list[str], Path]:
    # Clients of this machine write files themselves: a version looks the same to those who open the database without this server.
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1", "--no-serve-artifacts"]
    return command, home


def _spell_worker(checkout: Path) -> tuple[list[str], Path]:
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
    return [*command, "--name", "errata-up", "--limit", str(_RUNS)], checkout


def _start_servers(
    commands: Commands,
    children: dict[str, Child],
    environment: dict[str, str],
    home: Path,
    places: dict[str, Any],
    pressed: Callable[..., bool],
) -> None:
    for name, (command, folder) in commands.items():
        children[name] = start_child(name, command, home, environment, folder)
    health = {"prefect": f"{places['prefect']}/api/health", "mlflow": f"{places['mlflow']}/health", "metrics": places["metrics"]}
    for name in commands:
        wait_until_healthy(health[name], name, children[name], home, lambda: _check(pressed))


def _register(
    every: int | None, schedules: bool, environment: dict[str, str], home: Path, checkout: Path, pressed: Callable[..., bool]
) -> None:
    command = [*_ERRATA, "deploy", "--pool", POOL]
    command += [] if every is None else ["--every", str(every)]
    command += [] if schedules else ["--no-schedules"]
    child = start_child("deploy", command, home, environment, checkout)
    while child.poll() is None:
        _check(pressed)
        time.sleep(0.2)
    if child.returncode != 0:
        raise ErrataError(f"up: expected the deployments to be registered, found a fault:\n{read_tail(home, 'deploy')}")


def _watch(
    settings: Settings,
    out: Console,
    places: dict[str, Any],
    commands: Commands,
    children: dict[str, Child],
    environment: dict[str, str],
    home: Path,
    pressed: Callable[..., bool],
) -> None:
    """Show what happens, until somebody asks us to end."""
    api, seen = f"{places['prefect']}/api", dict[str, str]()
    streams = [open_stream(settings.root, name, settings.cache) for name in places["streams"]]
    told = {stream.name: stream.head.seq for stream in streams}
    again = dict[str, float]()
    lines: list[str] = []

    def tell(moment: str, text: str) -> None:
        lines.append(spell_line(moment, text))
        del lines[:-100]
        if not out.is_terminal:
            out.print(escape(lines[-1]), soft_wrap=True)

    tell(datetime.now(UTC).isoformat(), f"ready: {', '.join(places['streams'])} served")
    with Live(console=out, auto_refresh=False) if out.is_terminal else nullcontext() as live:
        while True:
            for name in _mend(api, commands, children, again, environment, home):
                tell(datetime.now(UTC).isoformat(), f"{name} had ended and was started again; {home / name}.log says why")
            rows, following = describe_streams(streams), None
            for stream in streams:
                for moment, text in tell_commits(stream, told[stream.name]):
                    tell(moment, text)
                told[stream.name] = stream.head.seq
            with suppress(OSError):  # it is being started again
                for moment, text in read_news(api, seen, places["since"]):
                    tell(moment, text)
                following = find_next(api)
            if live is not None:
                live.update(build_screen(places, rows, following, lines), refresh=True)
            end = time.monotonic() + _LOOK
            while time.monotonic() < end:
                _check(pressed)
                time.sleep(0.1)


def _mend(
    api: str, commands: Commands, children: dict[str, Child], again: dict[str, float], environment: dict[str, str], home: Path
) -> Iterator[str]:
    """Start what has ended once more; its name. A worker comes back once the runs it has left open are closed."""
    for name, (command, folder) in commands.items():
        if children[name].poll() is None:
            continue
        if name in again and time.monotonic() - again[name] < _YOUNG:
            raise ErrataError(f"up: expected {name} to run, found it ended with {children[name].returncode}:\n{read_tail(home, name)}")
        end_session(home, children[name].pid)
        if name == "worker":
            try:
                close_runs(api, "its worker ended")
            except OSError:  # the server is being started again, too: the next look tries once more
                continue
        children[name], again[name] = start_child(name, command, home, environment, folder), time.monotonic()
        yield name


def _check(pressed: Callable[..., bool]) -> None:
    if pressed():
        raise KeyboardInterrupt


def _write_state(home: Path, places: dict[str, Any]) -> None:
    part = home / "state.json.part"
    part.write_text(json.dumps(places, indent=1))
    part.replace(home / "state.json")
