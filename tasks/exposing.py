"""What monitors scrape, in Prometheus' text format, read from storage alone: no torch, no MLflow, no Prefect, and nothing is measured.

    errata_weight_norm_ratio{stream,layer}        the newest report of the watch
    errata_retention{stream,age}                  the same
    errata_edits_total{stream,outcome}            the folded log
    errata_memory_only_edits{stream}              the folded log
    errata_memory_only_age_seconds{stream}        the same
    errata_batch_age_seconds{stream}              the inbox
    errata_champion_commit{stream}                the folded log
    errata_alias_lag_commits{stream}              the folded log against what the alias was last seen to show
    errata_last_success_timestamp_seconds{stream} the sign of life that every finished run leaves

`errata_edits_total` is a gauge in spite of its name: an edit that is replaced or withdrawn changes its outcome.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, generate_latest, start_http_server, write_to_textfile
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from errata.errors import ErrataError, InputError
from errata.settings import Settings
from errata.watching import WatchReport
from registry.marks import find_oldest_waiting, find_shown, find_success, read_watch
from registry.stream import Stream, list_streams, open_stream
from registry.tiers import find_unconsolidated, measure_wait

_FAMILIES = {
    "errata_weight_norm_ratio": ("mean |W| / mean |W0| of an edited layer, when the watch last looked.", "layer"),
    "errata_retention": ("Efficacy of live edits by their age in commits, when the watch last looked.", "age"),
    "errata_edits_total": ("Records by what became of them, as they stand now; it can fall.", "outcome"),
    "errata_memory_only_edits": ("Live edits that nothing but memory answers.", None),
    "errata_memory_only_age_seconds": ("How long the oldest of them has been live; 0 where there is none.", None),
    "errata_batch_age_seconds": ("How long the oldest file in the inbox has waited; 0 where none waits.", None),
    "errata_champion_commit": ("The commit that is served.", None),
    "errata_alias_lag_commits": ("How many commits MLflow's alias is behind the champion of the log.", None),
    "errata_last_success_timestamp_seconds": ("When a run last came to its end, whether or not edits waited.", None),
}

_log = logging.getLogger(__name__)

Sample = tuple[str, str | None, float]
"""Name of the metric, value of its own label if it has one, and the number."""


class StreamCollector(Collector):
    """Reads streams anew at every scrape. One that cannot be read has no samples, and the others are not kept back by it."""

    def __init__(self, settings: Settings, streams: Sequence[str]) -> None:
        self._settings, self._streams = settings, streams

    def collect(self) -> Iterable[GaugeMetricFamily]:
        families = {
            name: GaugeMetricFamily(name, told, labels=["stream", *([label] if label else [])]) for name, (told, label) in _FAMILIES.items()
        }
        for stream in self._streams or list_streams(self._settings.root):
            try:
                samples = list(_read_stream(self._settings, stream))
            except ErrataError as error:
                _log.warning("stream %s has no metrics: %s", stream, error)
                continue
            for name, label, value in samples:
                families[name].add_metric([stream, *([label] if label is not None else [])], value)
        return families.values()


def build_registry(settings: Settings, streams: Sequence[str] = ()) -> CollectorRegistry:
    """The metrics of some streams, or of all streams of the root, those that are made later included."""
    registry = CollectorRegistry()
    registry.register(StreamCollector(settings, streams))
    return registry


def spell_metrics(registry: CollectorRegistry) -> str:
    """The exposition as text."""
    return generate_latest(registry).decode()


def write_metrics(registry: CollectorRegistry, path: Path) -> None:
    """Write the exposition for node_exporter's textfile collector, at once or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        write_to_textfile(str(path), registry)
    except OSError as error:
        raise InputError(f"{path}: expected a file that can be written ({error.strerror or error})") from None


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> tuple[WSGIServer, Thread]:
    """Serve the exposition at `/metrics` from a thread of its own; `shutdown()` of the server ends it.

    Args:
        port: 0 takes a free one, which is the server's `server_port`.

    Raises:
        InputError: nothing can listen there.
    """
    try:
        return start_http_server(port, host, registry)
    except (OSError, OverflowError) as error:
        raise InputError(f"{host}:{port}: expected an address to listen at ({error})") from None


def _read_stream(settings: Settings, name: str) -> Iterator[Sample]:
    stream = open_stream(settings.root, name, settings.cache)
    try:
        data = read_watch(stream)
        report = WatchReport.from_bytes(data) if data else None
        yield from _read_report(report) if report else ()
        for outcome, number in stream.index.counts().items():
            yield "errata_edits_total", outcome, number
        waiting = find_unconsolidated(stream)
        yield "errata_memory_only_edits", None, len(waiting)
        yield "errata_memory_only_age_seconds", None, measure_wait(stream, waiting) or 0.0
        yield from _read_life(stream)
    finally:
        stream.index.close()


def _read_report(report: WatchReport) -> Iterator[Sample]:
    for layer in report.layers:
        # Not a number, rather than nothing: weights that are not finite must not look like a watch that has not come by.
        yield "errata_weight_norm_ratio", layer.name, _spell(layer.norms.mean_abs_ratio)
    for age in report.ages:
        yield "errata_retention", age.age, _spell(age.retained.value)


def _read_life(stream: Stream) -> Iterator[Sample]:
    oldest, champion = find_oldest_waiting(stream), stream.head.champion
    yield "errata_batch_age_seconds", None, max((datetime.now(UTC) - oldest).total_seconds(), 0.0) if oldest else 0.0
    yield "errata_champion_commit", None, champion
    yield "errata_alias_lag_commits", None, champion - (find_shown(stream) or 0)
    yield "errata_last_success_timestamp_seconds", None, find_success(stream).timestamp()


def _spell(value: float | None) -> float:
    return float("nan") if value is None else value
