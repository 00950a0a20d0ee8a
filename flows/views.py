"""How the console shows things: rich tables for people. Commands print JSON themselves."""

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from errata.redaction import redact
from flows import risks

Facts = Mapping[str, Any]

_STYLES = {"live": "green", "quarantined": "yellow", "rejected": "red", "refused": "red", "accept": "green", "reject": "red"}
_STYLES |= {"hold": "yellow", **dict.fromkeys(("withdrawn", "reverted", "erased"), "magenta")}


def show_share(value: float | None) -> str:
    """A proportion with three digits; a dash where nothing was measured."""
    return "–" if value is None else f"{value:.3f}"


def show_seconds(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()) or "–"


def show_age(seconds: float) -> str:
    """`3 min`, `5 h`, `12 days`."""
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def show_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"[{_STYLES.get(name, 'default')}]{number} {name}[/]" for name, number in counts.items()) or "–"


def paint(word: str) -> str:
    return f"[{_STYLES[word]}]{word}[/]" if word in _STYLES else escape(word)


def build_pairs(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values, without lines; values are markup."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def build_status(facts: Facts) -> RenderableType:
    base = facts["base"]
    last = facts["last"]
    return build_pairs(
        [
            ("stream", f"[bold]{facts['stream']}[/] in {escape(facts['root'])}"),
            ("base", escape(f"{base.get('kind')} {base.get('source')} ({str(base.get('digest'))[:12]})")),
            (
                "champion",
                f"commit {facts['champion']}, {show_age(facts['champion_age_seconds'])} old"
                + (f"; commit {waiting} waits for [bold]errata approve[/]" if (waiting := facts["challenger"]) is not None else ""),
            ),
            *(("held", escape(f"commit {held['commit']}: {held['reason']}")) for held in facts["held"]),
            ("live", str(facts["live"])),
            *([("tiers", show_tiers(facts["tiers"]))] if facts["tiers"]["memory"] or facts["tiers"]["adapter"] else []),
            ("pending", f"{facts['pending']}" + (f" in {len(facts['waiting_files'])} files" if facts["waiting_files"] else "")),
            ("quarantined", f"{facts['quarantined']} quarantined, {facts['rejected']} rejected"),
            (
                "taken back",
                f"{facts['records'].get('withdrawn', 0)} withdrawn, {facts['records'].get('reverted', 0)} rolled back"
                + (f", {gone} erased" if (gone := facts["records"].get("erased", 0)) else ""),
            ),
            ("last commit", f"{last['commit']} ({last['kind']}, {escape(last['time'][:19])}): {show_seconds(last['seconds'])}"),
        ]
    )


def show_tiers(tiers: Facts) -> str:
    """Where live edits answer from."""
    told = f"{tiers['weights']} in the weights, {tiers['adapter']} in the adapter, {tiers['memory']} in memory"
    if not tiers["unconsolidated"]:
        return told
    return f"{told}; {tiers['unconsolidated']} nowhere else, the oldest for {show_age(tiers['oldest_seconds'])}"


def build_log(rows: Sequence[Facts]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("commit", "kind", "time", "records", "eff.", "gen.", "spec.", "ret.", "|W|"):
        table.add_column(name, justify="left" if name in ("kind", "time", "records") else "right", no_wrap=name != "records")
    for row in rows:
        norms = [value for value in row["norms"].values() if value is not None]
        table.add_row(
            f"{row['commit']}{' *' if row['champion'] else ''}",
            row["kind"],
            row["time"][5:16].replace("T", " "),
            show_counts(row["outcomes"]),
            *(show_share(row[name]) for name in ("efficacy", "generalization", "specificity", "retention")),
            f"{max(norms):.2f}" if norms else "–",
        )
    return table


def build_commit(facts: Facts) -> RenderableType:
    written = facts["written"]
    head = build_pairs(
        [
            ("commit", f"[bold]{facts['commit']}[/] {facts['kind']}" + (" (champion)" if facts["champion"] else "")),
            ("written", escape(f"{facts['time'][:19]} by {facts['actor']} on {written.get('host')}")),
            ("decision", f"{paint(facts['decision'])}" if facts["decision"] else "–"),
            ("reasons", escape(" ".join(facts["reasons"])) or "–"),
            (
                "measured",
                ", ".join(f"{name} {show_share(facts[name])}" for name in ("efficacy", "generalization", "specificity", "retention")),
            ),
            ("norms", ", ".join(f"{name} {show_share(value)}" for name, value in facts["norms"].items()) or "–"),
            *([("cast", describe_casting(facts["casting"]))] if facts["casting"] else []),
            *([("risk", escape(risks.show_batch(facts["risks"])))] if facts["risks"] else []),
            *([("serves again", f"commit {written['target']}")] if "target" in written else []),
            *([("withdrawn", describe_withdrawal(facts["withdrawal"]))] if facts.get("withdrawal") else []),
            ("cost", show_seconds(facts["seconds"])),
            ("manifest", str(written.get("manifest"))),
        ]
    )
    table = Table(box=None, pad_edge=False)
    for name in ("record", "outcome", "edit", "why"):
        table.add_column(name, overflow="fold")
    for record in facts["records"]:
        why = record.get("reason") or (f"by {record['by']}" if record.get("by") else "")
        table.add_row(
            escape(record.get("occurrence") or record.get("origin", "")),
            paint(record["outcome"]),
            escape(record.get("edit", "")),
            escape(why),
        )
    return Group(head, "", table)


def build_edit(facts: Facts) -> RenderableType:
    edit, measured = facts["edit"], facts["measured"]
    rows = [
        ("edit", f"[bold]{escape(facts['occurrence'])}[/] {paint(facts['status'])}"),
        ("says", escape(f"{edit['prompt'].replace('{}', edit['subject'])} → {edit['target_new']}")),
        ("from", escape(facts["origin"]) or "–"),
        ("same subject", escape(", ".join(facts["same_subject"])) or "no other live edit"),
        *([("answers from", ", ".join(facts["tiers"]))] if facts["tiers"] else []),
        *([("shares its pair", f"with {escape(', '.join(facts['shares_pair']))}")] if facts["shares_pair"] else []),
    ]
    rows += [("risk", risks.show_risk(facts["risk"]))] if facts["risk"] else []
    if measured:
        held = measured["held_out"]
        rows += [
            ("answer before", escape(measured["answer_before"])),
            ("answer", escape(measured["answer"])),
            (
                "measured",
                f"efficacy {'yes' if measured['efficacy'] else 'no'}, generalization {show_share(held['generalization']['value'])}, "
                f"specificity {show_share(held['specificity']['value'])}"
                + (", already known to the base" if measured["already_known"] else ""),
            ),
        ]
    history = Table(box=None, pad_edge=False)
    for name in ("occurrence", "status", "by", "why"):
        history.add_column(name, overflow="fold")
    for item in facts["history"]:
        history.add_row(escape(item["occurrence"]), paint(item["status"]), escape(item["by"] or ""), escape(item["reason"] or ""))
    return Group(build_pairs(rows), "", history)


def build_quarantine(rows: Sequence[Facts]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("edit", "status", "says", "why"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(escape(row["occurrence"]), paint(row["status"]), escape(row["edit"]), escape(row["reason"] or ""))
    return table


def build_batches(rows: Sequence[Facts]) -> Table:
    """One line per batch of an apply run."""
    table = Table(box=None, pad_edge=False)
    for name in ("commit", "outcome", "effic.", "greedy", "gener.", "specif.", "retent.", "|W|", "risk", "s"):
        table.add_column(name, justify="left" if name == "outcome" else "right", no_wrap=name != "outcome")
    for row in rows:
        metrics = row["metrics"]
        ratios = [value for name, value in metrics.items() if name.endswith("mean_abs_ratio")]
        table.add_row(
            str(row["commit"]) if row["commit"] is not None else "none",
            _describe_outcome(row),
            *(
                show_share(metrics.get(name))
                for name in ("efficacy", "greedy", "held_out.generalization", "held_out.specificity", "retention")
            ),
            f"{max(ratios):.2f}" if ratios else "–",
            risks.show_spread(row["risks"]),
            f"{sum(row['seconds'].values()):.1f}",
        )
    return table


def build_withdrawal(facts: Facts) -> RenderableType:
    """What became of a withdrawal."""
    metrics = facts["metrics"]
    head = build_pairs(
        [
            ("commit", str(facts["commit"]) if facts["commit"] is not None else "none"),
            ("decision", f"{paint(facts['decision'])}: {escape(' '.join(facts['reasons']))}"),
            ("live", f"{facts['live']} edits without {'it' if len(facts['withdrawn']) == 1 else 'them'}"),
            ("measured", describe_withdrawal(facts["measured"]) if facts["measured"] else "–"),
            ("the others", f"retention {show_share(metrics.get('retention'))}"),
            ("cost", show_seconds(facts["seconds"])),
        ]
    )
    table = Table(box=None, pad_edge=False)
    for name in ("withdrawn", "base", "now", "as the base"):
        table.add_column(name, overflow="fold")
    rows = {row["id"]: row for row in (facts["measured"] or {"rows": ()})["rows"]}
    for occurrence in facts["withdrawn"]:
        row = rows.get(occurrence.rpartition("@")[0])
        said = (escape(row["answer_base"]), escape(row["answer"]), "yes" if row["consistent"] else "no") if row else ("–", "–", "–")
        table.add_row(escape(occurrence), *said)
    return Group(head, "", table)


def describe_withdrawal(measured: Facts) -> str:
    """Consistency, and exactness where it was measured."""
    rows = measured["rows"]
    said = f"{sum(row['consistent'] for row in rows)} of {len(rows)} prompts answer as the base again, "
    said += f"{sum(row['greedy'] for row in rows)} greedily"
    if exactness := measured.get("exactness"):
        bits = "the same to the bit as" if exactness["identical"] else f"within {exactness['relative']:.1e} of"
        said += f"; weights {bits} a rebuild without {'it' if len(rows) == 1 else 'them'}"
    return said


def describe_casting(measured: Facts) -> str:
    """What each edited weight of fewer bits than the change loses of it."""
    return ", ".join(f"{name} {part['error']:.1%} off, {part['lost']:.1%} of it lost" for name, part in measured.items())


def _describe_outcome(row: Facts) -> str:
    rounds = f" after {row['rounds']} rounds" if row["rounds"] > 1 else ""
    deferred = f", {row['deferred']} deferred" if row["deferred"] else ""
    return f"{paint(row['decision'])}{rounds}: {show_counts(row['outcomes'])}{deferred}"


def build_answers(rows: Sequence[Facts]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("prompt", "base", "champion"):
        table.add_column(name, overflow="fold")
    for row in rows:
        changed = row["base"] != row["champion"]
        table.add_row(escape(row["prompt"]), escape(row["base"]), f"[{'bold green' if changed else 'default'}]{escape(row['champion'])}[/]")
    return table


def build_check(facts: Facts) -> RenderableType:
    """What would become of the records of a file."""
    rows = [
        ("records", str(facts["records"])),
        (
            "would be written",
            f"[green]{facts['writable']}[/]" + (f", replacing {facts['replacements']} live edits" if facts["replacements"] else ""),
        ),
        ("refused", f"[red]{facts['refused']}[/]" if facts["refused"] else "0"),
        (
            "duplicates",
            f"{facts['duplicates']}" + (f", {facts['live_duplicates']} of them live already" if facts["live_duplicates"] else ""),
        ),
        ("conflicts", f"{facts['conflicts']} (the later one wins; {facts['superseded']} superseded)"),
        ("stale, withheld", f"{facts['stale']}, {facts['withheld']}"),
        ("repeated subjects", f"{facts['repeated_subjects']} subjects with {facts['edits_of_repeated_subjects']} edits"),
        (
            "probes",
            f"{facts['probes']}: {facts['with_paraphrases']} edits with paraphrases, {facts['with_neighbors']} with neighbours, "
            f"{facts['with_portability']} with portability prompts",
        ),
        ("forms", escape(", ".join(f"{number} {name}" for name, number in facts["sources"].items())) or "–"),
    ]
    rows += [
        (
            f"refused {group['count']}×",
            escape(f"{group['field']}: " if group["field"] else "") + escape(f"{group['reason']} ({', '.join(group['origins'])})"),
        )
        for group in facts["refusals"]
    ]
    rows += [("conflict", escape(_spell_conflict(item))) for item in facts["first_conflicts"]]
    return build_pairs(rows)


def _spell_conflict(item: Facts) -> str:
    said = item["prompt"].replace("{}", item["subject"])
    return f"{said}: {item['earlier_target']} ({item['earlier']}), then {item['later_target']} ({item['later']})"


def show_size(size: float) -> str:
    """`3 B`, `5.0 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def build_estimate(facts: Facts, base: str, profile: str, drop_answered: bool) -> RenderableType:
    """What a rebase would take."""
    missing, answered = facts["pairs"] - facts["prepared"], facts["answered"]
    time = f", about {show_age(facts['seconds'])} for them here" if missing and facts["seconds"] is not None else ""
    fate = "taken back" if drop_answered else "carried over all the same; --drop-answered takes them back"
    said = f"{len(answered)} edits: {_name_some(answered)}; {fate}" if answered else "none of the edits"
    weights, sums = show_size(facts["base_bytes"]), show_size(facts["sum_bytes"])
    return build_pairs(
        [
            ("to", f"base {base[:12]}, profile {profile[:12]}"),
            ("edits", f"{facts['edits']} to carry over, in {facts['pairs']} pairs"),
            ("to prepare", f"{missing} pairs{time}; {facts['prepared']} are stored"),
            ("memory", f"{weights} for the base, up to {sums} for the sums, and what preparing takes"),
            ("answered", f"the base answers {escape(said)}"),
        ]
    )


def build_rebase(facts: Facts) -> RenderableType:
    """What became of a rebase."""
    metrics = facts["metrics"]
    ratios = [value for name, value in metrics.items() if name.endswith("mean_abs_ratio")]
    shares = {name: metrics.get(key) for name, key in (("efficacy", "efficacy"), ("specificity", "held_out.specificity"))}
    measured = [f"{name} {show_share(value)}" for name, value in shares.items()] + [f"|W| {max(ratios):.2f}" if ratios else ""]
    return build_pairs(
        [
            ("commit", str(facts["commit"]) if facts["commit"] is not None else "none"),
            ("decision", f"{paint(facts['decision'])}: {escape(' '.join(facts['reasons']))}"),
            ("live", f"{facts['live']} edits, {len(facts['withdrawn'])} taken back, {len(facts['quarantined'])} in quarantine"),
            ("measured", ", ".join(filter(None, measured))),
            ("cost", show_seconds(facts["seconds"])),
        ]
    )


_FOUND = dict.fromkeys(("mended", "replaced"), "green") | dict.fromkeys(("unequal", "differs", "lost"), "red")
_FOUND |= {"mendable": "yellow", "erased": "magenta"}
_COMPARED = {"bits": "equal to the bit", "float64": "equal to 1e-8 in float64", "float32": "equal within float32 rounding"}


def build_rebuild(facts: Facts) -> RenderableType:
    """What a rebuild compared, found and did."""
    compared = ", ".join(f"{number} {_COMPARED[name]}" for name, number in facts["compared"].items())
    verdict = "[green]all as the log says[/]" if facts["sound"] else "[red]the log and what is stored part[/]"
    rows = [
        ("stream", f"[bold]{escape(facts['stream'])}[/] up to commit {facts['to']}: {verdict}"),
        ("recipe", facts["recipe"] or "cannot be known"),
        ("weights", (compared or "none compared") + (f"; at most {facts['worst']:.1e} apart" if facts["worst"] else "")),
        ("took", f"{facts['seconds']:.1f} s"),
    ]
    if facts["archived"]:
        rows.append(("archived", f"{len(facts['archived'])} versions whose weights are given up; `errata rebuild --to` makes them again"))
    if facts["unverified"]:
        rows.append(("not compared", f"commits {', '.join(map(str, facts['unverified']))}: something before them is lost"))
    if facts["commit"] is not None:
        rows.append(("committed", f"commit {facts['commit']} (rebuild) points to the new objects"))
    table = Table(box=None, pad_edge=False)
    for name in ("commit", "what", "found", "detail", "edits"):
        table.add_column(name, overflow="fold")
    for item in facts["findings"]:
        said = f"[{_FOUND[item['state']]}]{item['state']}[/]"
        table.add_row(
            str(item["commit"]), f"{item['what']} {(item['digest'] or '')[:12]}", said, escape(item["detail"]), _name_some(item["edits"])
        )
    return Group(build_pairs(rows), *(["", table] if facts["findings"] else []))


def _name_some(names: Sequence[str], shown: int = 5) -> str:
    return escape(", ".join(names[:shown])) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def build_findings(rows: Sequence[Facts]) -> Table:
    marks = {"good": "[green]good[/]", "note": "[yellow]note[/]", "fault": "[red]fault[/]"}
    table = Table(box=None, pad_edge=False)
    for name in ("", "what", "found", "to do"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(marks[row["state"]], escape(row["what"]), escape(row["found"]), escape(row["remedy"]))
    return table


def print_error(message: str, mark: str = "[red]error:[/] ") -> None:
    """Tell what went wrong: in words at a terminal, as a log line elsewhere."""
    if sys.stderr.isatty():
        Console(stderr=True, soft_wrap=True).print(f"{mark}{escape(redact(message))}", highlight=False)
    else:
        logging.getLogger("errata").error("%s", message)
