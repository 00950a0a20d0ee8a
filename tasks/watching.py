"""Champion to report: what it is like now, shown where people look, and events for what they must hear of."""

import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.runtime import flow_run

from errata.candidates import load_artifacts, load_state
from errata.checkup import check_champion
from errata.edits import digest_subject
from errata.errors import KeyMissingError
from errata.monitors.forgetting import AGES, Age, Remembered, plot_retention, summarise_age
from errata.monitors.locality import PROBE_TEXTS
from errata.readers.abilities import AbilityQuestion, read_abilities
from errata.report import Report
from errata.settings import Settings
from errata.watching import FAILED, Ability, Alarm, LayerWatch, WatchReport, find_alarms, find_growth, find_stall
from errata.world import FILLER, make_world
from registry.events import AcceptedCommit
from registry.fold import EditRow
from registry.marks import find_oldest_waiting, find_success, store_watch
from registry.stream import Stream
from tasks._session import Model, load_under, open_named, read_manifest
from tasks._task import stage
from tasks.announcing import announce
from tasks.projecting import open_registry, plot_history

_LOOKED_BACK = 50
"""Accepted commits whose norms say how fast weights grow: what a watch costs may not grow with history."""
_QUESTIONS = 100
"""Of the built-in world's ability set."""


@stage
def measure_champion(stream: str) -> WatchReport:
    """All measurements of a stream's champion, with its alarms."""
    settings, opened = open_named(stream)
    begun, moment = time.perf_counter(), datetime.now(UTC)
    head = opened.head
    champion = opened.log.read(head.champion)
    manifest = read_manifest(opened, champion.manifest or "")
    model = load_under(settings, opened, manifest)
    state = load_state(opened.objects, model.editor, manifest.layers[0].state)
    samples = sample_ages(opened, head.champion, settings)
    rows = [row for _, sample in samples for row in sample]
    source, questions = choose_questions(settings, opened, model)
    found = check_champion(
        model.base,
        load_artifacts(opened.objects, manifest),
        model.editor.measure_conditions(state),
        list(opened.read_edits(rows)),
        questions,
        FILLER if model.ref.kind == "builtin" else PROBE_TEXTS,
        settings.evaluate.batch_tokens,
    )
    immediate, retained = read_immediate(opened, rows), dict(zip(rows, found.retained, strict=True))
    registry = open_registry(settings)
    version, shown = registry.find_version(opened.name, head.champion), registry.champion(opened.name)
    points = read_points(opened, head.champion)
    report = WatchReport(
        stream=opened.name,
        time=moment.isoformat(),
        run=flow_run.get_id(),
        commit=head.champion,
        head=head.seq,
        version=version.number if version else None,
        shown=shown.commit if shown else None,
        live=opened.index.counts().get("live", 0),
        layers=tuple(
            LayerWatch(layer=layer, part=part, norms=norms, growth=find_growth(points.get(norms.weight, {})))
            for norms in found.norms
            for layer, part in [model.base.layout.split_name(norms.weight)]
        ),
        ages=tuple(
            summarise_age(age, [Remembered(row.id, immediate.get(row.occurrence), retained[row]) for row in sample])
            for age, sample in samples
            if sample
        ),
        locality=found.locality,
        perplexity_base=found.perplexity_base,
        perplexity=found.perplexity,
        ability=Ability(source=source, base=found.ability[0], champion=found.ability[1]) if questions else None,
        seconds=round(time.perf_counter() - begun, 3),
    )
    ratio = settings.watch.norm_ratio or model.profile.max_norm_ratio or settings.gate.max_norm_ratio
    return report.model_copy(update={"alarms": find_alarms(report, ratio, settings.watch, settings.gate.n_min)})


@stage
def show_watch(stream: str, report: WatchReport) -> None:
    """The report as an object of the stream's storage, as metrics and figures of the champion's MLflow run, and as Prefect artifacts."""
    settings, opened = open_named(stream)
    moment = datetime.fromisoformat(report.time)
    store_watch(opened, report.commit, moment, report.to_bytes())
    key = "".join(character if character.isalnum() else "-" for character in f"watch-{stream}".lower())
    create_table_artifact(table=list_rows(report), key=f"{key}-layers-and-ages", description=f"What the watch measured of {stream}")
    create_markdown_artifact(markdown=spell_markdown(report), key=f"{key}-summary", description=f"The champion of {stream}")
    registry = open_registry(settings)
    version = registry.find_version(stream, report.commit) if report.version else None
    if version is None:
        return
    with tempfile.TemporaryDirectory(prefix="errata-") as work:
        written = Path(work, "watch.json")
        written.write_bytes(report.to_bytes())
        files = [written, plot_retention(report.ages, Path(work, "retention.png"))]
        if (norms := plot_history(opened, report.commit, Path(work))) is not None:
            files.append(norms)
        step = int((moment - opened.log.read(report.commit).time).total_seconds() // 60)
        registry.log_watch(version, report.metrics(), int(moment.timestamp() * 1000), max(step, 0), files)
    if registry.tracking_uri.startswith("http"):
        for name in (path.name for path in files if path.suffix == ".png"):
            url = f"{registry.tracking_uri.rstrip('/')}/get-artifact?path=watch/{name}&run_uuid={version.run}"
            create_image_artifact(image_url=url, key=f"{key}-{name.partition('.')[0].replace('_', '-')}", description=name)


@stage
def raise_alarms(stream: str, report: WatchReport) -> list[Alarm]:
    """Emit the events of a report, and that of a stream where nobody is at work any more; all of them."""
    settings, opened = open_named(stream)
    stall = judge_life(settings, opened)
    alarms = [*report.alarms, *([stall] if stall else [])]
    announce(settings, opened, alarms, report.version)
    return alarms


@stage
def announce_failure(stream: str, reason: str) -> None:
    """Say that the watch itself failed: nobody is looking."""
    settings, opened = open_named(stream)
    message = f"The watch failed: {reason}"
    announce(settings, opened, [Alarm(event=FAILED, measure="the watch", value=None, threshold=None, message=message)])


def judge_life(settings: Settings, stream: Stream) -> Alarm | None:
    """Dead man: see `find_stall`. Ages are by this machine's clock against the storage's; hours, not seconds, are judged."""
    now, oldest = datetime.now(UTC), find_oldest_waiting(stream)
    accepted = stream.log.read(stream.head.accepted).time
    return find_stall(
        (now - oldest).total_seconds() if oldest else None,
        (now - accepted).total_seconds(),
        (now - find_success(stream)).total_seconds(),
        settings.watch.stalled_hours,
    )


def sample_ages(stream: Stream, champion: int, settings: Settings) -> list[tuple[Age, list[EditRow]]]:
    """A seeded sample of the live edits of each age, counted back from the champion's commit."""
    samples = []
    for age in AGES:
        first = 0 if age.last is None else max(champion - age.last, 0)
        size, seed = settings.watch.sample, settings.evaluate.seed
        samples.append((age, stream.index.sample_between(first, champion - age.first, size, seed) if age.first <= champion else []))
    return samples


def read_immediate(stream: Stream, rows: Sequence[EditRow]) -> dict[str, bool]:
    """Occurrence → whether it took when it was accepted, by the report of that commit; left out where that is gone."""
    found: dict[str, bool] = {}
    for seq in sorted({row.seq for row in rows}):
        commit = stream.log.read(seq)
        try:
            report = Report.from_bytes(stream.objects.get(commit.report)) if commit.report else None
        except KeyMissingError:
            report = None
        found |= {f"{row.id}@{seq}": row.efficacy for row in (report.rows if report else ())}
    return found


def read_points(stream: Stream, champion: int) -> dict[str, dict[int, float]]:
    """Weight → live edits → mean |W| / mean |W0|, of the last accepted commits up to the champion's; of equal counts the newest."""
    points: dict[str, dict[int, float]] = {}
    left = _LOOKED_BACK
    for seq in range(champion, 0, -1):
        commit = stream.log.read(seq)
        if not isinstance(commit, AcceptedCommit) or not commit.report:
            continue
        report = Report.from_bytes(stream.objects.get(commit.report))
        for norms in report.norms:
            if norms.mean_abs_ratio is not None and report.live is not None:
                points.setdefault(norms.weight, {}).setdefault(report.live, norms.mean_abs_ratio)
        left -= 1
        if not left:
            break
    return points


def choose_questions(settings: Settings, stream: Stream, model: Model) -> tuple[str, list[AbilityQuestion]]:
    """The ability set and where it is from. Of the built-in world's, those whose person no live edit is about."""
    if settings.watch.ability_set is not None:
        return str(settings.watch.ability_set), read_abilities(settings.watch.ability_set)
    if model.ref.kind != "builtin":
        return "", []
    asked = make_world().make_questions(_QUESTIONS, settings.evaluate.seed)
    return "built-in world", [question for person, question in asked if not stream.index.find_subject(digest_subject(person))]


def list_rows(report: WatchReport) -> list[dict[str, str | float | None]]:
    """Layers and ages as one table."""
    rows: list[dict[str, str | float | None]] = []
    for item in report.layers:
        said = f"×{item.norms.frobenius_ratio or 0:.3f} Frobenius, condition {item.norms.condition or 0:.1e}"
        said += f", cast {cast.error:.1%} off" if (cast := item.norms.casting) else ""
        rows.append({"what": f"norm of layer {item.name}", "before": 1.0, "now": item.norms.mean_abs_ratio, "more": said})
    for age in report.ages:
        said = f"{age.retained.edits} edits"
        rows.append({"what": f"retention at age {age.age}", "before": age.immediate.value, "now": age.retained.value, "more": said})
    if report.ability:
        said = f"{report.ability.champion.edits} questions"
        rows.append({"what": "ability", "before": report.ability.base.value, "now": report.ability.champion.value, "more": said})
    more = f"KL {report.locality.kl or 0:.4f} nats"
    rows.append({"what": "agreement with the base", "before": 1.0, "now": report.locality.agreement, "more": more})
    rows.append({"what": "perplexity on the probe", "before": report.perplexity_base, "now": report.perplexity, "more": ""})
    return rows


def spell_markdown(report: WatchReport) -> str:
    """A report as people read it in Prefect."""
    lines = [f"# {report.stream}: commit {report.commit}, version {report.version or 'none'}", "", f"{report.live} live edits.", ""]
    lines += [f"- **{alarm.event}**: {alarm.message}" for alarm in report.alarms] or ["All within the thresholds."]
    lines += ["", "| what | before | now | |", "|---|---|---|---|"]
    for row in list_rows(report):
        before, now = (f"{row[name]:.3f}" if isinstance(row[name], float) else "–" for name in ("before", "now"))
        lines.append(f"| {row['what']} | {before} | {now} | {row['more']} |")
    return "\n".join(lines) + "\n"
