"""From a champion that drifts to somebody's telephone: through the real Prefect server's automations to a webhook on this machine."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.events import emit_event

from errata.edits import Edit
from errata.errors import ErrataError, InputError, SettingsError
from errata.profiles import PrepareOptions
from errata.settings import load_settings
from errata.watching import EVENTS

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]
ROOT = Path(__file__).parents[2]
OURS = ROOT / "deployments" / "alerts.yaml"


class Inbox:
    """A webhook's receiver."""

    def __init__(self) -> None:
        self.received: list[dict[str, str]] = []
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?token=secret-token"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def wait_for(self, event: str, patience: float = 60.0) -> str:
        """The text of the first message about an event."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            for message in list(self.received):
                if message["subject"].endswith(f": {event}"):
                    return message["text"]
            time.sleep(0.1)
        raise AssertionError(f"no message about {event} among {self.received}")


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    inbox = Inbox()
    yield inbox
    inbox.server.shutdown()
    inbox.server.server_close()


@pytest.fixture(autouse=True)
def _no_alerts_left(prefect_server: str) -> Iterator[None]:
    yield
    with get_client(sync_client=True) as client:
        for automation in client.read_automations():
            client.delete_automation(automation.id)
        for document in client.read_block_documents():
            client.delete_block_document(document.id)


@pytest.fixture
def told(inbox: Inbox, monkeypatch: pytest.MonkeyPatch, errata: Callable[..., Any]) -> Callable[..., dict[str, str]]:
    """Apply a file of alerts with the webhook's variable set; name → state."""
    monkeypatch.setenv("ALERTS_WEBHOOK_URL", inbox.url)

    def apply(file: Path = OURS, *options: str) -> dict[str, str]:
        done = errata("alerts", "apply", "--file", str(file), "--json", *options)
        assert done.code == 0, done.err
        return {item["name"]: item["state"] for item in done.json}

    return apply


@pytest.fixture
def reckless(desk: Any, editable_folder: Path, editable_options: PrepareOptions, sentences: Any, tmp_path: Path) -> Any:
    """A stream that D4S drives into norm growth: λ = 1e-6 protects nothing of the old keys, and a clamp of 6 lets δ become six times as
    long as the hidden state it is added to (0.75 is MEMIT's)."""
    from tasks.onboarding import start_stream

    shutil.rmtree(desk.root / "streams")
    profile, corpus = tmp_path / "profile.json", tmp_path / "corpus.txt"
    prepare = editable_options.model_copy(update={"clamp": 6.0, "lr_scale": 3.0, "stop_loss": 0.0})
    profile.write_text(json.dumps({"prepare": prepare.model_dump(mode="json"), "lam": 1e-6}))
    corpus.write_text("\n".join(sentences))
    start_stream(load_settings(), str(editable_folder), profile=str(profile), corpus=corpus)
    return desk


def test_norm_growth_is_told_and_the_gate_refuses(
    reckless: Any, make_edit: Make, inbox: Inbox, told: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.watch import watch_model

    assert told()["webhook"] == "created"
    monkeypatch.setenv("ERRATA_GATE__MAX_NORM_RATIO", "10")
    monkeypatch.setenv("ERRATA_GATE__MAX_ROUNDS", "1")
    monkeypatch.setenv("ERRATA_WATCH__NORM_RATIO", "4")
    monkeypatch.setenv("ERRATA_WATCH__MAX_LOCALITY_KL", "1e9")
    decisions, ratios = [], []
    for batch in range(9):
        reckless.submit(str(batch), *(make_edit(2 * batch + person, answer=batch) for person in range(2)))
        (summary,) = reckless.apply()
        decisions.append(summary.decision)
        ratios.append(max(value for name, value in summary.metrics.items() if name.endswith("mean_abs_ratio")))
        if summary.decision == "reject":
            break
    assert decisions[-1] == "reject" and "accept" in decisions, (decisions, ratios)
    served = decisions.count("accept")
    report = watch_model("main")
    assert report.commit == served
    assert ratios == sorted(ratios)

    refused = inbox.wait_for("errata.batch.rejected")
    grown = inbox.wait_for("errata.norm.exceeded")
    changed = inbox.wait_for("errata.champion.changed")
    assert "The gate refused a batch: mean |W| of transformer.h.1.mlp.c_proj.weight is" in refused
    lines = dict(line.split(": ", 1) for line in refused.splitlines()[1:])
    assert lines["Stream"] == "main" and lines["Champion"] == f"commit {served}, model version {served}"
    assert lines["Measured"] == f"norm ratio of transformer.h.1.mlp.c_proj.weight = {round(ratios[-1], 4)}"
    assert lines["Threshold"] == "10.0" and lines["To go back"] == f"errata rollback {served - 1} -s main"
    assert "/runs/flow-run/" in lines["Run"] and "Threshold: " in grown and "Stream: main" in changed
    assert "secret-token" not in refused


def test_applying_twice_is_applying_once(told: Callable[..., dict[str, str]], inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {item["name"] for part in yaml.safe_load(OURS.read_text()).values() for item in part}
    others = {"slack", "teams", "pagerduty", "email"}
    created = {name: "skipped" if name in others else "created" for name in names}
    assert told(OURS, "--dry-run") == created
    with get_client(sync_client=True) as client:
        assert client.read_automations() == []
        assert told() == created
        before = client.read_automations()
        assert told() == told(OURS, "--dry-run") == {name: state.replace("created", "unchanged") for name, state in created.items()}
        assert client.read_automations() == before
        monkeypatch.setenv("ERRATA_WATCH__COOLDOWN_MINUTES", "5")
        monkeypatch.setenv("ALERTS_WEBHOOK_URL", f"{inbox.url}-other")
        changed = {"webhook", "Errata: the model is damaged", "Errata: nobody is at work"}
        expected = {name: "skipped" if name in others else "updated" if name in changed else "unchanged" for name in names}
        assert told(OURS, "--dry-run") == told() == expected
        after = client.read_automations()
        assert {item.id for item in after} == {item.id for item in before}
        client.pause_automation(after[0].id)
        monkeypatch.setenv("ERRATA_WATCH__COOLDOWN_MINUTES", "6")
        told()
        assert [item.enabled for item in client.read_automations() if item.id == after[0].id] == [False]
        document = client.read_block_document_by_name("errata-webhook", "custom-webhook", include_secrets=False)
        assert "secret-token" not in json.dumps(document.data)


def test_every_kind_of_channel_is_made(told: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "ALERTS_SLACK_URL": "https://hooks.slack.com/services/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7F",
        "ALERTS_TEAMS_URL": "https://prod-NO.LOCATION.logic.azure.com:443/workflows/WFID/triggers/manual/paths/invoke?sig=SIGNATURE",
        "ALERTS_PAGERDUTY_INTEGRATION_KEY": "a" * 32,
        "ALERTS_PAGERDUTY_API_KEY": "b" * 20,
        "ALERTS_SENDGRID_API_KEY": "SG.abc.def",
        "ALERTS_EMAIL_FROM": "errata@example.com",
        "ALERTS_EMAIL_TO": "ann@example.com, bob@example.com",
    }.items():
        monkeypatch.setenv(name, value)
    assert set(told().values()) == {"created"}
    assert set(told().values()) == {"unchanged"}
    with get_client(sync_client=True) as client:
        (damage,) = client.read_automations_by_name("Errata: the model is damaged")
    assert len(damage.actions) == 5


def test_repeated_ones_are_cooled_down_per_stream_and_event(told: Callable[..., Any], inbox: Inbox, tmp_path: Path) -> None:
    file = tmp_path / "alerts.yaml"
    alert = {"name": "tests", "events": list(EVENTS), "channels": ["webhook"], "cooldown_minutes": 30, "streams": ["cooled-*"]}
    webhook = {"name": "webhook", "type": "webhook", "environment": {"url": "ALERTS_WEBHOOK_URL"}}
    file.write_text(yaml.safe_dump({"channels": [webhook], "alerts": [alert]}))
    told(file)

    def send(stream: str, event: str, number: int) -> None:
        payload = {"stream": stream, "message": f"number {number}"}
        emit_event(event, {"prefect.resource.id": f"errata.stream.{stream}", "errata.event": event}, payload=payload)

    end = time.monotonic() + 60
    while not inbox.received and time.monotonic() < end:
        send("cooled-1", EVENTS[0], 1)  # again and again: the server takes a moment to know a new automation
        time.sleep(0.5)
    end = time.monotonic() + 60
    while len(inbox.received) < 3 and time.monotonic() < end:
        send("cooled-1", EVENTS[0], 2)
        send("other", EVENTS[0], 3)
        send("cooled-2", EVENTS[0], 4)
        send("cooled-1", EVENTS[1], 5)
        time.sleep(1)
    time.sleep(2)
    assert sorted(message["text"].splitlines()[0] for message in inbox.received) == ["number 1", "number 4", "number 5"]


def test_our_file_tells_of_every_event() -> None:
    assert {event for alert in yaml.safe_load(OURS.read_text())["alerts"] for event in alert["events"]} == set(EVENTS)


WEBHOOK = "channels: [{name: hook, type: webhook, environment: {url: HOOK}}]"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("channels: [", InputError, "expected YAML"),
        ("channels: []", SettingsError, "alerts"),
        (f"{WEBHOOK}\nalerts: [{{name: a, events: [errata.nothing], channels: [hook]}}]", SettingsError, "errata.nothing"),
        (f"{WEBHOOK}\nalerts: [{{name: a, events: [errata.batch.rejected], channels: [other]}}]", SettingsError, "found 'other'"),
        ("channels: [{name: hook, type: webhook, environment: {adress: HOOK}}]\nalerts: []", SettingsError, "'url'"),
        ("channels: [{name: hook, type: pigeon, environment: {}}]\nalerts: []", SettingsError, "pigeon"),
    ],
)
def test_a_file_at_fault_is_named_with_its_field(tmp_path: Path, text: str, error: type[ErrataError], message: str) -> None:
    from tasks.alerting import read_alerts

    path = tmp_path / "alerts.yaml"
    path.write_text(text)
    with pytest.raises(error, match=message):
        read_alerts(path)
    with pytest.raises(InputError, match="--file"):
        read_alerts(tmp_path / "none.yaml")


def test_a_value_that_does_not_fit_is_not_shown(
    told: Callable[..., Any], errata: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALERTS_SENDGRID_API_KEY", "secret key with spaces")
    monkeypatch.setenv("ALERTS_EMAIL_FROM", "nobody")
    monkeypatch.setenv("ALERTS_EMAIL_TO", "ann@example.com")
    done = errata("alerts", "apply", "--file", str(OURS))
    assert done.code == 2 and "ALERTS_SENDGRID_API_KEY" in done.err and "secret key" not in done.err
