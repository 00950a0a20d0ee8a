"""Who is told of which events: notification blocks and automations of a Prefect server, made from a file (`deployments/alerts.yaml`).

Everything goes by name: what is there already is compared and changed only where it differs, so that applying twice is applying once.
What the file no longer names stays; whoever disabled an automation by hand finds it disabled. Secrets come from the environment alone.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import yaml
from prefect.automations import AutomationCore, EventTrigger, Posture, SendNotification
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.notifications import (
    CustomWebhookNotificationBlock,
    MicrosoftTeamsWebhook,
    PagerDutyWebHook,
    SendgridEmail,
    SlackWebhook,
)
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from errata.errors import ErrataError, InputError, SettingsError
from errata.validation import explain_errors
from errata.watching import EVENTS

_BLOCKS: dict[str, type[NotificationBlock]] = {
    "webhook": CustomWebhookNotificationBlock,
    "slack": SlackWebhook,
    "teams": MicrosoftTeamsWebhook,
    "pagerduty": PagerDutyWebHook,
    "email": SendgridEmail,
}
_NEEDED = {
    "webhook": {"url"},
    "slack": {"url"},
    "teams": {"url"},
    "pagerduty": {"integration_key", "api_key"},
    "email": {"api_key", "sender_email", "to_emails"},
}
"""Fields that must come from the environment. Addresses are no secrets, but as much a matter of the installation."""
_SUBJECT = "[errata] {{ event.payload.stream }}: {{ event.event }}"
_BODY = """{{ event.payload.message }}
Stream: {{ event.payload.stream }}
Champion: commit {{ event.payload.commit }}, model version {{ event.payload.version or "none" }}
Measured: {{ event.payload.measure }} = {{ event.payload.value | round(4) if event.payload.value is number else "-" }}
Threshold: {{ event.payload.threshold | round(4) if event.payload.threshold is number else "-" }}
Run: {{ event.payload.run_link or event.payload.run or "none" }}
To go back: {{ event.payload.rollback or "there is no earlier state" }}"""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Channel(_Part):
    """A notification block, named `errata-<name>`."""

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    type: Literal["webhook", "slack", "teams", "pagerduty", "email"]
    environment: dict[str, str]
    """Field of the block → variable that holds its value."""

    @model_validator(mode="after")
    def _check(self) -> "Channel":
        if (needed := _NEEDED[self.type]) != self.environment.keys():
            raise ValueError(f"environment: expected a variable for each of {sorted(needed)}, found {sorted(self.environment)}")
        return self


class Alert(_Part):
    """An automation."""

    name: str = Field(min_length=1)
    events: tuple[Literal[EVENTS], ...] = Field(min_length=1)
    channels: tuple[str, ...] = Field(min_length=1)
    streams: tuple[str, ...] = ("*",)
    cooldown_minutes: Annotated[float, Field(ge=0)] | None = None
    """The same event of the same stream is not told again within this time. None: `watch.cooldown_minutes`."""


class AlertFile(_Part):
    channels: tuple[Channel, ...]
    alerts: tuple[Alert, ...]

    @model_validator(mode="after")
    def _check(self) -> "AlertFile":
        known = [channel.name for channel in self.channels]
        for kind, names in (("channel", known), ("alert", [alert.name for alert in self.alerts])):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{kind}s: expected each name once, found {twice[0]!r} twice")
        if missing := sorted({name for alert in self.alerts for name in alert.channels} - set(known)):
            raise ValueError(f"channels: expected one of {', '.join(known) or 'none'}, found {missing[0]!r}")
        return self


class Change(_Part):
    """What became of one channel or alert, or would."""

    kind: Literal["channel", "alert"]
    name: str
    state: Literal["created", "updated", "unchanged", "skipped"]
    detail: str = ""


def read_alerts(path: Path) -> AlertFile:
    """
    Raises:
        InputError: the file cannot be read, or is not YAML.
        SettingsError: it is not as `AlertFile` says; the message names the field.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: expected a readable file of alerts ({error.strerror or error}); name yours with --file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected YAML in UTF-8 ({' '.join(str(error).split())})") from None
    try:
        return AlertFile.model_validate(content)
    except ValidationError as error:
        raise SettingsError(f"{path}: " + "; ".join(": ".join(filter(None, item)) for item in explain_errors(error))) from None


def apply_alerts(file: AlertFile, environment: Mapping[str, str], cooldown_minutes: float, dry_run: bool = False) -> list[Change]:
    """Make the server's blocks and automations those of the file. Channels whose variables are not set are left out, and so are alerts
    that have no other.

    Args:
        environment: where secrets are looked up.
        cooldown_minutes: of alerts that have none of their own.
        dry_run: compare, and change nothing.

    Raises:
        ErrataError: there is no server.
        SettingsError: a variable's value is none for its block.
    """
    if PREFECT_API_URL.value() is None:
        raise ErrataError("alerts: expected a Prefect server at PREFECT_API_URL, found none; automations live there")
    changes, blocks = [], dict[str, UUID | None]()
    with get_client(sync_client=True) as client:
        for channel in file.channels:
            change, found = _place_channel(client, channel, environment, dry_run)
            changes.append(change)
            if change.state != "skipped" or found:
                blocks[channel.name] = found
        for alert in file.alerts:
            reached = {name: blocks[name] for name in alert.channels if name in blocks}
            cooldown = cooldown_minutes if alert.cooldown_minutes is None else alert.cooldown_minutes
            changes.append(_place_alert(client, alert, reached, timedelta(minutes=cooldown), dry_run))
    return changes


def _place_channel(
    client: SyncPrefectClient, channel: Channel, environment: Mapping[str, str], dry_run: bool
) -> tuple[Change, UUID | None]:
    """What became of a block, and its id where the server has it."""
    kind, name = _BLOCKS[channel.type], f"errata-{channel.name}"
    try:
        document = client.read_block_document_by_name(name, kind.get_block_type_slug(), include_secrets=True)
    except ObjectNotFound:
        document = None
    if unset := [variable for variable in channel.environment.values() if not environment.get(variable)]:
        detail = f"{', '.join(unset)}: not set" + ("; the block stays as it is" if document else "")
        return Change(kind="channel", name=channel.name, state="skipped", detail=detail), document.id if document else None
    wanted = _build_block(channel, environment)
    fields = set(kind.model_fields)  # a loaded block has its document's names besides
    if document is not None and kind._from_block_document(document).model_dump(include=fields) == wanted.model_dump(include=fields):
        return Change(kind="channel", name=channel.name, state="unchanged"), document.id
    made = None if dry_run else wanted.save(name, overwrite=True)
    known = document.id if document else made
    return Change(kind="channel", name=channel.name, state="updated" if document else "created", detail=f"block {name}"), known


def _build_block(channel: Channel, environment: Mapping[str, str]) -> NotificationBlock:
    values: dict[str, Any] = {field: environment[variable] for field, variable in channel.environment.items()}
    if channel.type == "webhook":
        # The address may hold a token, which the block keeps to itself only among its secrets.
        text = {"subject": "{{subject}}", "text": "{{body}}"}
        values = {"name": "errata", "url": "{{address}}", "json_data": text, "secrets": {"address": values["url"]}}
    elif channel.type == "email":
        values["to_emails"] = [item.strip() for item in values["to_emails"].split(",")]
    try:
        return _BLOCKS[channel.type](**values)
    except (ValidationError, TypeError, ValueError):
        # What Pydantic and Apprise say of it would show the value.
        named = ", ".join(channel.environment.values())
        raise SettingsError(f"{named}: expected values for a {channel.type} channel, found others") from None


def _place_alert(client: SyncPrefectClient, alert: Alert, reached: Mapping[str, UUID | None], cooldown: timedelta, dry_run: bool) -> Change:
    if not reached:
        return Change(kind="alert", name=alert.name, state="skipped", detail=f"none of its channels is there: {', '.join(alert.channels)}")
    found = next(iter(client.read_automations_by_name(alert.name)), None)
    ids = [block for block in reached.values() if block is not None]
    wanted = _build_automation(alert, ids, cooldown, found.enabled if found else True)
    detail = f"{', '.join(alert.events)} to {', '.join(reached)}, at most every {cooldown.total_seconds() / 60:g} minutes"
    if found is not None and len(ids) == len(reached) and _tell_apart(found) == _tell_apart(wanted):
        return Change(kind="alert", name=alert.name, state="unchanged", detail=detail)
    if not dry_run:
        if found is None:
            client.create_automation(wanted)
        else:
            client.update_automation(found.id, wanted)
    return Change(kind="alert", name=alert.name, state="created" if found is None else "updated", detail=detail)


def _build_automation(alert: Alert, blocks: list[UUID], cooldown: timedelta, enabled: bool) -> AutomationCore:
    # A reactive trigger fires with its first event and then waits for the rest of `within`: the cooldown, for each stream and event.
    trigger = EventTrigger(
        expect=set(alert.events),
        match={"prefect.resource.id": [f"errata.stream.{stream}" for stream in alert.streams]},
        for_each={"prefect.resource.id", "errata.event"},
        posture=Posture.Reactive,
        threshold=1,
        within=cooldown,
    )
    return AutomationCore(
        name=alert.name,
        description="Made by `errata alerts apply`, which makes it so again.",
        enabled=enabled,
        tags=["errata"],
        trigger=trigger,
        actions=[SendNotification(block_document_id=block, subject=_SUBJECT, body=_BODY) for block in blocks],
    )


def _tell_apart(automation: AutomationCore) -> dict[str, Any]:
    """What two automations of one name may differ in."""
    return automation.model_dump(include={"description", "tags", "trigger", "actions"})
