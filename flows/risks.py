"""What the reading commands say of risk (`errata.edits.Risk`): of an edit, of a batch, and which versions wait because of it."""

import math
from collections.abc import Mapping
from typing import Any

from errata.edits import Risk
from registry.stream import Stream

Facts = Mapping[str, Any]


def describe_risk(risk: Risk | None) -> Facts | None:
    """An edit's risk, with its figure; what is not finite is None."""
    if risk is None:
        return None
    return {**risk.model_dump(), "figure": risk.figure if math.isfinite(risk.figure) else None}


def list_held(stream: Stream) -> list[Facts]:
    """Versions that wait for approval because of their risk, with the reason, oldest first."""
    head = stream.head
    waiting = range(head.champion + 1, head.challenger + 1) if head.challenger is not None else ()
    return [{"commit": commit.seq, "reason": commit.reasons[0]} for commit in map(stream.log.read, waiting) if commit.decision == "hold"]


def show_risk(facts: Facts) -> str:
    """An edit's risk in a line."""
    tokens = f"{facts['tokens']} token{'s' if facts['tokens'] != 1 else ''}"
    if facts["figure"] is None:
        return f"not finite: the base cannot score the target's {tokens}"
    return f"{facts['figure']:.1f} nats: the target's perplexity is {facts['perplexity']:,.1f} per token, of {tokens}"


def show_spread(facts: Facts | None) -> str:
    """Median and worst risk of a batch; a dash where nothing was to be written."""
    if facts is None:
        return "–"
    return " / ".join("∞" if facts[name] is None else f"{facts[name]:.1f}" for name in ("median", "worst"))


def show_batch(facts: Facts) -> str:
    """A batch's risk in a line."""
    return f"{show_spread(facts)} nats (median / worst of {facts['edits']} edits; worst: {facts['edit']})"
