"""The watch on a real stream: what it measures agrees with what the batches said, and stands where people look."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import mlflow
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import ArtifactSort

from errata.edits import Edit
from errata.errors import ErrataError
from errata.report import Report
from errata.watching import FAILED, NORM, STALLED, Alarm, WatchReport
from registry.marks import find_shown, find_success, mark_success, read_watch, store_watch

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]


@pytest.fixture(autouse=True)
def _random_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random base keeps nothing of itself on the probe."""
    monkeypatch.setenv("ERRATA_WATCH__MAX_LOCALITY_KL", "1e9")


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Events as they are emitted, with their payload."""
    from tasks import announcing

    events: list[dict[str, Any]] = []

    def listen(event: str, resource: dict[str, str], payload: dict[str, Any]) -> None:
        events.append({"event": event, "resource": resource["prefect.resource.id"], **payload})

    monkeypatch.setattr(announcing, "emit_event", listen)
    return events


def watch() -> WatchReport:
    from flows.watch import watch_model

    report: WatchReport = watch_model("main")
    return report


def test_a_champion_is_measured_and_shown(desk: Any, make_edit: Make) -> None:
    for number in range(3):
        desk.submit(str(number), *(make_edit(5 * number + person, answer=person) for person in range(5)))
        desk.apply()
    report = watch()
    stream = desk.open()
    accepted = Report.from_bytes(stream.objects.get(stream.log.read(3).report))
    (layer,) = report.layers
    assert (report.commit, report.head, report.shown, report.live, report.layers[0].layer) == (3, 3, 3, 15, 1)
    assert layer.norms.model_copy(update={"condition": None}) == accepted.norms[0], "the same weights, measured the same way"
    assert layer.norms.condition and layer.norms.condition > 1
    assert layer.growth and layer.growth > 0
    assert report.locality == accepted.locality
    assert report.perplexity_ratio and report.perplexity_ratio > 0 and report.ability is None
    youngest, older = report.ages
    assert (youngest.age, youngest.retained.edits, older.age, older.retained.edits) == ("0", 5, "1-9", 10)
    assert (youngest.immediate.value, youngest.retained.value, older.immediate.value) == (1.0, 1.0, 1.0)
    assert report.alarms == ()
    assert report.version == desk.versions()[3].number

    assert WatchReport.from_bytes(read_watch(stream) or b"") == report
    run = desk.versions()[3].run
    metrics = mlflow.get_run(run).data.metrics
    assert metrics["watch.norms.1.mean_abs_ratio"] == pytest.approx(layer.norms.mean_abs_ratio)
    assert metrics["watch.retention.0.retained"] == 1.0
    names = {item.path for item in mlflow.MlflowClient().list_artifacts(run, "watch")}
    assert names == {"watch/watch.json", "watch/retention.png", "watch/weight_norms.png"}
    found = read_newest()
    assert "commit 3" in found["watch-main-summary"].data and "retention at age 1-9" in found["watch-main-summary"].data
    assert "norm of layer 1" in found["watch-main-layers-and-ages"].data

    before = len(desk.versions())
    again = watch()
    assert again.model_dump(exclude={"time", "run", "seconds"}) == report.model_dump(exclude={"time", "run", "seconds"})
    assert len(desk.versions()) == before


def read_newest() -> dict[str, Any]:
    """Key → its newest artifact: other tests have a stream of this name on the same server."""
    with get_client(sync_client=True) as client:
        return {item.key: item for item in reversed(client.read_artifacts(sort=ArtifactSort.CREATED_DESC))}


def test_a_stream_without_edits_is_its_base(desk: Any) -> None:
    report = watch()
    assert (report.commit, report.version, report.layers, report.ages, report.live) == (0, None, (), (), 0)
    assert report.locality.kl == 0.0 and report.locality.agreement == 1.0 and report.perplexity_ratio == 1.0


def test_an_ability_set_is_asked_of_base_and_champion(desk: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    path = tmp_path / "abilities.jsonl"
    path.write_text('{"question": "The home of Anna Keller", "choices": ["Paris", "Rome", "Oslo"], "answer": 0}\n')
    monkeypatch.setenv("ERRATA_WATCH__ABILITY_SET", str(path))
    desk.submit("one", make_edit(0))
    desk.apply()
    report = watch()
    assert report.ability and report.ability.champion.value == 1.0 and report.ability.source == str(path)


def test_what_exceeds_a_threshold_is_said_with_the_way_back(
    desk: Any, make_edit: Make, heard: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.submit("one", make_edit(0))
    desk.apply()
    desk.submit("two", make_edit(1))
    desk.apply()
    assert [(event["event"], event["commit"], event["version"]) for event in heard] == [
        ("errata.champion.changed", 1, 1),
        ("errata.champion.changed", 2, 2),
    ]
    heard.clear()
    monkeypatch.setenv("ERRATA_WATCH__NORM_RATIO", "1.0001")
    report = watch()
    (event,) = heard
    assert event["event"] == NORM and event["resource"] == "errata.stream.main"
    assert event["value"] == report.layers[0].norms.mean_abs_ratio and event["threshold"] == 1.0001
    assert event["rollback"] == "errata rollback 1 -s main" and event["run"] == report.run and event["run"] in event["run_link"]
    assert [alarm.event for alarm in report.alarms] == [NORM]
    heard.clear()
    desk.roll_back(1)
    watch()
    told = {event["event"]: event for event in heard}
    assert told[NORM]["commit"] == 3 and told[NORM]["rollback"] == "errata rollback 0 -s main", "not back to what was rolled back"


def test_a_profile_says_what_its_base_bears(desk: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.profiles import Profile
    from tasks import _session

    desk.submit("one", make_edit(0))
    desk.apply()
    monkeypatch.setattr(_session, "get_profile", _with_ratio(_session.get_profile, Profile, 1.0001))
    assert [(alarm.event, alarm.threshold) for alarm in watch().alarms] == [(NORM, 1.0001)]


def _with_ratio(read: Callable[..., bytes], profile: Any, ratio: float) -> Callable[..., bytes]:
    return lambda *names: profile.model_validate_json(read(*names)).model_copy(update={"max_norm_ratio": ratio}).to_bytes()


def test_a_stream_at_which_nobody_works_is_stalled(desk: Any, make_edit: Make, heard: list[dict[str, Any]]) -> None:
    import os

    desk.submit("one", make_edit(0))
    desk.apply()
    assert datetime.now(UTC) - find_success(desk.open()) < timedelta(minutes=5)
    heard.clear()
    assert watch().alarms == ()
    mark = desk.root / "streams" / "main" / "marks" / "success"
    os.utime(mark, (0, mark.stat().st_mtime - 30 * 3_600))
    (alarm,) = watch().alarms
    assert (alarm.event, alarm.threshold) == (STALLED, 24.0) and alarm.value == pytest.approx(30, abs=0.5)
    assert [event["event"] for event in heard] == [STALLED]
    mark_success(desk.open())
    assert watch().alarms == ()


def test_a_watch_that_fails_says_so(desk: Any, heard: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_WATCH__ABILITY_SET", "nowhere.jsonl")
    with pytest.raises(ErrataError, match="nowhere"):
        watch()
    (event,) = heard
    assert event["event"] == FAILED and "nowhere.jsonl" in event["message"] and event["stream"] == "main"


def test_marks_keep_to_the_newest(desk: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from registry import marks

    stream = desk.open()
    assert find_shown(stream) is None and read_watch(stream) is None
    desk.submit("one", make_edit(0))
    desk.apply()
    desk.submit("two", make_edit(1))
    desk.apply()
    stream = desk.open()
    assert find_shown(stream) == 2
    assert len(list(stream.storage.list(stream.key("marks/shown/")))) == 1
    monkeypatch.setattr(marks, "_KEPT", 2)
    moment = datetime(2026, 11, 1, tzinfo=UTC)
    for number, seq in enumerate((9, 10, 9)):
        store_watch(stream, seq, moment + timedelta(seconds=number), str(number).encode())
    assert read_watch(stream) == b"1", "of the newest commit"
    assert len(list(stream.storage.list(stream.key("watch/")))) == 2


def test_outside_of_a_run_and_without_a_server_nobody_is_told(desk: Any, monkeypatch: pytest.MonkeyPatch, heard: list[Any]) -> None:
    from tasks._session import open_named
    from tasks.announcing import announce

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    announce(*open_named("main"), [Alarm(event=NORM, measure="m", value=1.0, threshold=1.0, message="")])
    assert heard == []


def test_where_mlflow_is_a_server_prefect_shows_its_figures(desk: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import watching

    desk.submit("one", make_edit(0))
    desk.apply()
    report = watch()
    version = desk.versions()[1]
    logged: list[Any] = []

    class Server:
        tracking_uri = "http://mlflow:5000/"

        def find_version(self, *_: Any) -> Any:
            return version

        def log_watch(self, *given: Any) -> None:
            logged.append(given)

    monkeypatch.setattr(watching, "open_registry", lambda _: Server())
    watching.show_watch("main", report)
    assert logged[0][0] == version
    assert read_newest()["watch-main-retention"].data == f"http://mlflow:5000/get-artifact?path=watch/retention.png&run_uuid={version.run}"
