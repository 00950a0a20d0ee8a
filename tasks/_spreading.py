"""One stage, many calls: in threads of this process, or over a Ray cluster (`compute.runner`). What comes back has the order of the calls.

Calls are independent, and each may run twice: whoever dies in between loses only what was not stored yet.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ThreadPoolTaskRunner

from errata.errors import SettingsError
from errata.settings import Settings, load_settings, spell_environment

Listener = Callable[[int, int], None]
"""Called with (call, how far it has come)."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def spread(
    stage: Callable[..., Any],
    calls: Sequence[Mapping[str, Any]],
    *,
    on_step: Listener = lambda _call, _done: None,
    on_result: Callable[[Any], None] = lambda _result: None,
) -> list[Any]:
    """Run a stage once per call; the results in the order of the calls.

    Args:
        stage: a task, made by `tasks._task.stage`.
        calls: its arguments by name.
        on_step: told what the stage itself tells (`tell_step`), which nobody hears from another process.
        on_result: told each result as soon as it and those before it are there.

    Raises:
        SettingsError: the runner needs an extra that is not installed.
        Exception: the first one of a call; what has not begun is not begun any more.
    """
    settings, halted = load_settings(), threading.Event()

    def listen(call: int, done: int) -> None:
        if halted.is_set():
            raise CancelledError("nobody waits for it any more")
        on_step(call, done)

    heard = _listener.set(listen)
    try:
        with _make_runner(settings) as runner, _describe_remote(settings):
            futures = [runner.submit(stage, dict(call)) for call in calls]
            results = []
            try:
                for future in futures:
                    results.append(future.result())
                    on_result(results[-1])
            except BaseException:
                halted.set()
                _cancel(futures)
                raise
            return results
    finally:
        _listener.reset(heard)


def tell_step(call: int, done: int) -> None:
    """Within a stage that `spread` runs: say how far a call has come.

    Raises:
        CancelledError: the run was interrupted, or another call has failed.
    """
    if listener := _listener.get():
        listener(call, done)


def list_devices(settings: Settings) -> list[str]:
    """Where calls of this process run: on every GPU where there are several and none is named."""
    if settings.device in ("auto", "cuda") and torch.cuda.device_count() > 1:
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [settings.device]


def _make_runner(settings: Settings) -> Any:
    if settings.compute.runner == "thread":
        return ThreadPoolTaskRunner(max_workers=len(list_devices(settings)))  # torch itself uses all cores
    try:
        import ray  # noqa: F401
        from prefect_ray import RayTaskRunner
    except ImportError as error:
        raise SettingsError(
            f"compute.runner: expected what the runner 'ray' needs, found no {error.name}; pip install \"errata[ray]\""
        ) from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = {} if settings.compute.address else {"include_dashboard": False}
    return RayTaskRunner(address=settings.compute.address, init_kwargs={"log_to_driver": False, **own})


@contextmanager
def _describe_remote(settings: Settings) -> Iterator[None]:
    """What a call needs on a Ray cluster, entered when the cluster is reached."""
    if settings.compute.runner == "thread":
        yield
        return
    import ray
    from prefect_ray.context import remote_options

    gpus = settings.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
    variables = spell_environment(settings) | ({"ERRATA_DEVICE": "cuda"} if gpus else {})  # Ray shows a call its own GPU only
    options: dict[str, Any] = {"num_cpus": settings.threads or 1, "runtime_env": {"env_vars": variables}}
    if gpus:
        options |= {"num_gpus": 1, "max_calls": 0}  # else Ray ends the process after each call, and the base is loaded again for the next
    with remote_options(**options), _name_server():
        yield


@contextmanager
def _name_server() -> Iterator[None]:
    """Workers report to the server of this run, also where it is one that Prefect has started for the length of the run."""
    with get_client(sync_client=True) as client:
        url = str(client.api_url)
    with nullcontext() if PREFECT_API_URL.value() else temporary_settings({PREFECT_API_URL: url}):
        yield


def _cancel(futures: Sequence[Any]) -> None:
    """Ray goes on with what was submitted to a cluster unless it is told; of threads, only what has begun goes on."""
    for future in futures:
        if hasattr(future.wrapped_future, "cancel"):
            future.wrapped_future.cancel()
            continue
        import ray

        ray.cancel(future.wrapped_future)
