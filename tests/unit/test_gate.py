"""The gate decides from the report alone: who is to blame, who is tried again, and that nothing over budget is ever accepted."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.gate import Decision, decide, decide_whole, find_batch_faults, find_edit_faults, settle
from errata.report import Diagnosis, EditRow, Locality, Mean, ProbeScores, Report, Retention, WeightNorms
from errata.settings import GateSettings

GATE = GateSettings()


def make_row(
    name: str, *, took: bool = True, kept: float | None = 1.0, neighbours: int = 10, nll: float | None = 0.05, finite: bool = True
) -> EditRow:
    specificity = Mean(value=kept, edits=int(kept is not None), prompts=neighbours if kept is not None else 0)
    return EditRow(
        id=name,
        already_known=False,
        efficacy=took,
        token_accuracy=float(took),
        success=took,
        magnitude=0.5,
        greedy=took,
        loss=0.1 if took else 3.0,
        answer_before="",
        answer="",
        held_out=ProbeScores(),
        paper=ProbeScores(specificity=specificity),
        diagnosis=Diagnosis(loss=nll, finite=finite),
    )


def make_report(
    rows: Sequence[EditRow],
    *,
    retention: tuple[float, int] | None = (1.0, 50),
    previous: float | None = 1.0,
    specificity: tuple[float, int] | None = (1.0, 50),
    kl: float | None = 0.01,
    norm: float | None = 1.5,
    nonfinite: int = 0,
    fault: str | None = None,
) -> Report:
    def mean(pair: tuple[float, int] | None) -> Mean:
        return Mean() if pair is None else Mean(value=pair[0], edits=pair[1], prompts=pair[1])

    efficacy = Mean.over([float(row.efficacy)] for row in rows)
    return Report(
        seed=0,
        rows=tuple(rows),
        already_known=0,
        efficacy=efficacy,
        token_accuracy=efficacy,
        success=efficacy,
        magnitude=Mean(),
        greedy=efficacy,
        held_out=ProbeScores(specificity=mean(specificity)),
        paper=ProbeScores(),
        retention=Retention(efficacy=mean(retention), previous=previous),
        locality=Locality(kl=kl, agreement=1.0, positions=100),
        norms=(WeightNorms(weight="w", mean_abs_ratio=norm, frobenius_ratio=norm, spectral=1.0, spectral_ratio=1.0),),
        nonfinite=nonfinite,
        fault=fault,
    )


def names(count: int) -> list[str]:
    return [f"e{index}" for index in range(count)]


def healthy(count: int) -> list[EditRow]:
    return [make_row(name) for name in names(count)]


def test_a_clean_batch_is_accepted_whole() -> None:
    decision = decide(make_report(healthy(4)), [], GATE)
    assert (decision.verdict, decision.rest, decision.drop, decision.defer) == ("accept", tuple(names(4)), (), ())
    assert "efficacy 1.000 over 4 prompts" in decision.reasons[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            make_row("bad", took=False),
            "0.000 of its target's tokens are the model's choice, at 3.000 nats per token, expected all",
        ),
        (make_row("bad", nll=2.5), "z was not reached: 2.500 nats per token of the target remain, expected at most 1.000"),
        (make_row("bad", nll=None, finite=False), "not finite"),
        (make_row("bad", kept=0.4), "neighbours are broken: agreement with the base is 0.400 over 10 prompts, expected at least 0.500"),
        (
            make_row("bad").model_copy(update={"broken": ("old",)}),
            "shares its pair with older edits of its subject that no longer take: old",
        ),
    ],
)
def test_an_edit_at_fault_is_dropped_and_the_others_go_on_together(row: EditRow, reason: str) -> None:
    decision = decide(make_report([*healthy(9), row]), [], GATE)
    assert (decision.verdict, decision.rest, decision.defer) == ("retry", tuple(names(9)), ())
    assert [fault.id for fault in decision.drop] == ["bad"] and reason in decision.drop[0].reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"norm": 12.0}, "mean |W| of w is 12.00 times the base's, expected at most 10.00 times."),
        ({"kl": 0.8}, "KL(base ‖ candidate) on the fixed probe is 0.800 nats over 100 positions, expected at most 0.500."),
        ({"specificity": (0.7, 20)}, "Agreement with the base on held-out neighbours is 0.700 over 20 prompts, expected at least 0.800."),
        ({"retention": (0.8, 50), "previous": None}, "Retention is 0.800 over 50 prompts, expected at least 0.850."),
        ({"retention": (0.88, 50)}, "0.120 below the previous version's 1.000; expected a drop of at most 0.100."),
        ({"nonfinite": 3}, "not finite (logits of 3 prompts)"),
        ({"kl": None}, "not finite (logits on the fixed probe)"),
        ({"norm": None}, "not finite (weight w)"),
        ({"fault": "W0 + Δ is not finite"}, "could not be measured: W0 + Δ is not finite."),
    ],
)
def test_a_fault_of_the_batch_halves_it(fields: dict[str, object], reason: str) -> None:
    decision = decide(make_report(healthy(5), **fields), [], GATE)  # type: ignore[arg-type]
    assert (decision.verdict, decision.rest, decision.defer) == ("retry", ("e0", "e1"), ("e2", "e3", "e4"))
    assert decision.drop == () and any(reason in sentence for sentence in decision.reasons)
    alone = decide(make_report(healthy(1), **fields), [], GATE)  # type: ignore[arg-type]
    assert (alone.verdict, alone.rest) == ("reject", ())
    assert alone.drop[0].id == "e0" and settle([alone])["e0"].outcome == "quarantined"


def test_where_most_of_a_batch_did_not_take_the_batch_is_to_blame() -> None:
    rows = [make_row(name, took=index < 4) for index, name in enumerate(names(10))]
    decision = decide(make_report(rows), [], GATE)
    assert (decision.drop, decision.rest) == ((), tuple(names(5))) and "Efficacy is 0.400 over 10 prompts" in decision.reasons[0]
    few = [make_row(name, took=index < 1) for index, name in enumerate(names(4))]
    assert len(decide(make_report(few), [], GATE).drop) == 3, "fewer than n_min edits say nothing about the batch"


def test_where_logits_are_not_finite_no_edit_is_blamed_for_its_answers_but_a_bad_pair_is() -> None:
    rows = [make_row(name, took=False, kept=0.0) for name in names(8)]
    assert find_edit_faults(make_report(rows, nonfinite=9), GATE) == ()
    rows[3] = make_row("e3", took=False, finite=False)
    assert [fault.id for fault in find_edit_faults(make_report(rows, nonfinite=9), GATE)] == ["e3"]


def test_a_proportion_over_too_few_cases_does_not_decide_alone() -> None:
    few = make_report([*healthy(3), make_row("bad", kept=0.0, neighbours=4)], retention=(0.0, 4), specificity=(0.0, 4))
    assert decide(few, [], GATE).verdict == "accept"
    together = make_report([*healthy(3), make_row("bad", kept=0.0, neighbours=4)], specificity=(0.7, 20))
    # Beside a batch that lacks specificity as a whole, four neighbours are evidence enough.
    assert [fault.id for fault in decide(together, [], GATE).drop] == ["bad"]


def test_what_was_not_measured_is_no_fault() -> None:
    unmeasured = make_report([make_row("e0", kept=None, nll=None)], retention=None, previous=None, specificity=None)
    assert decide(unmeasured, [], GATE).verdict == "accept"


def test_a_budget_met_exactly_is_met() -> None:
    retention = (sum([0.9] * 50) / 50 - 1e-12, 50)
    exact = make_report(healthy(3), retention=retention, specificity=(0.8, 30), kl=GATE.max_locality_kl, norm=GATE.max_norm_ratio)
    assert decide(exact, [], GATE).verdict == "accept"


def test_the_last_round_rejects_what_is_left_and_still_names_the_guilty() -> None:
    first = decide(make_report(healthy(8), kl=2.0), [], GATE)
    second = decide(make_report(healthy(4), kl=2.0), [first], GATE)
    third = decide(make_report([make_row("e0", took=False), make_row("e1")]), [first, second], GATE)
    assert (third.verdict, third.rest) == ("reject", ("e1",)) and "round 3 of at most 3" in third.reasons[-1]
    settled = settle([first, second, third])
    assert {name: end.outcome for name, end in settled.items()} == {
        **dict.fromkeys(("e2", "e3", "e4", "e5", "e6", "e7"), "deferred"),
        "e0": "quarantined",
        "e1": "rejected",
    }
    assert "KL" in settled["e5"].reason and "did not take" in settled["e0"].reason


def test_a_withdrawal_is_judged_as_a_whole() -> None:
    """It has no edits of its own to drop or to halve."""
    decision = decide(make_report([], specificity=None), [], GATE)
    assert (decision.verdict, decision.drop, decision.rest) == ("accept", (), ())
    decision = decide(make_report([], specificity=None, retention=(0.5, 50), norm=20.0), [], GATE)
    assert (decision.verdict, decision.drop, decision.rest) == ("reject", (), ())
    assert any("Retention" in reason for reason in decision.reasons) and any("mean |W|" in reason for reason in decision.reasons)


def test_a_report_about_other_edits_is_refused() -> None:
    first = decide(make_report(healthy(8), kl=2.0), [], GATE)
    with pytest.raises(ValueError, match="the 4 edits that round 1 left"):
        decide(make_report(healthy(8)), [first], GATE)
    with pytest.raises(ValueError, match="found retry"):
        settle([first])


rates = st.none() | st.tuples(st.sampled_from([0.0, 0.5, 0.79, 0.84, 0.9, 1.0]), st.sampled_from([1, 4, 5, 60]))
row_fields = st.fixed_dictionaries(
    {
        "took": st.sampled_from([True, True, True, False]),
        "kept": st.sampled_from([None, 0.0, 0.6, 1.0]),
        "neighbours": st.sampled_from([2, 10]),
        "nll": st.sampled_from([None, 0.01, 0.01, 5.0]),
        "finite": st.sampled_from([True, True, True, False]),
    }
)
report_fields = st.fixed_dictionaries(
    {
        "retention": rates,
        "previous": st.none() | st.sampled_from([0.5, 0.95, 1.0]),
        "specificity": rates,
        "kl": st.sampled_from([None, 0.01, 0.01, 0.6]),
        "norm": st.sampled_from([None, 1.1, 1.1, 11.0]),
        "nonfinite": st.sampled_from([0, 0, 0, 2]),
        "fault": st.sampled_from([None, None, None, "broken"]),
    }
)


@settings(deadline=None, max_examples=300)
@given(st.data(), st.integers(1, 25), st.integers(1, 5))
def test_every_batch_ends_in_time_once_per_edit_and_within_budget(data: st.DataObject, count: int, max_rounds: int) -> None:
    gate = GateSettings(max_rounds=max_rounds)
    tried, decisions = names(count), list[Decision]()
    while not decisions or decisions[-1].verdict == "retry":
        rows = [make_row(name, **data.draw(row_fields)) for name in tried]
        report = make_report(rows, **data.draw(report_fields))
        decision = decide(report, decisions, gate)
        assert decision == decide(Report.from_bytes(report.to_bytes()), list(decisions), gate), "pure, also through storage"
        assert sorted([fault.id for fault in decision.drop] + [*decision.defer, *decision.rest]) == sorted(tried)
        if decision.verdict == "accept":
            assert not violations(report, gate)
        else:
            assert (decision.reasons and len(decision.rest) < len(tried)) or len(decisions) + 1 == max_rounds
        decisions.append(decision)
        tried = list(decision.rest)
        assert len(decisions) <= max_rounds
    settled = settle(decisions)
    assert sorted(settled) == sorted(names(count))
    assert all(end.reason for end in settled.values() if end.outcome != "accepted")


def violations(report: Report, gate: GateSettings) -> list[str]:
    """The budgets spelled out once more, independently of the gate's own code."""

    def short(mean: Mean, least: float) -> bool:
        return mean.value is not None and mean.prompts >= gate.n_min and mean.value < least

    retention = report.retention
    norm, kl = report.norms[0].mean_abs_ratio, report.locality.kl
    found = {
        "fault": bool(report.fault or report.nonfinite),
        "norm": norm is None or norm > gate.max_norm_ratio,
        "locality": kl is None or kl > gate.max_locality_kl,
        "specificity": short(report.held_out.specificity, gate.min_specificity),
        "retention": short(retention.efficacy, gate.min_retention),
        "drop": retention.previous is not None and short(retention.efficacy, retention.previous - gate.max_retention_drop - 1e-6),
    }
    for row in report.rows:
        assert row.diagnosis is not None
        found |= {
            f"{row.id} efficacy": not row.efficacy,
            f"{row.id} z": not row.diagnosis.finite or (row.diagnosis.loss or 0) > gate.max_z_loss,
            f"{row.id} neighbours": short(row.paper.specificity, gate.min_own_specificity),
        }
    return [name for name, violated in found.items() if violated]


@given(report_fields)
def test_a_looser_gate_never_finds_more(fields: dict[str, object]) -> None:
    report = make_report(healthy(6), **fields)  # type: ignore[arg-type]
    loose = GateSettings(min_retention=0, max_retention_drop=1, min_specificity=0, max_locality_kl=100, max_norm_ratio=100)
    assert len(find_batch_faults(report, loose)) <= len(find_batch_faults(report, GATE))


def test_a_candidate_of_live_edits_is_judged_as_a_whole() -> None:
    """Those of them that do not take are retention, and nobody's fault; every other budget holds as ever."""
    forgotten = [make_row(f"e{number}", took=number > 25) for number in range(40)]
    assert find_batch_faults(make_report(forgotten), GATE), "as a new batch it would be refused"
    decision = decide_whole(make_report(forgotten, retention=(0.95, 40), previous=0.95), GATE)
    assert (decision.verdict, decision.drop, decision.defer, decision.rest) == ("accept", (), (), ())
    for report, said in (
        (make_report(forgotten, retention=(0.2, 40)), "Retention is 0.200"),
        (make_report(forgotten, specificity=(0.1, 40)), "Agreement with the base"),
        (make_report(forgotten, kl=50.0), "KL"),
        (make_report(forgotten, norm=1e6), "mean |W|"),
        (make_report(forgotten, nonfinite=1), "not finite"),
        (make_report(forgotten, fault="no weights"), "could not be measured"),
    ):
        refused = decide_whole(report, GATE)
        assert refused.verdict == "reject" and said in " ".join(refused.reasons)
