"""The held-out split: disjoint, fixed, of the promised size."""

import pytest

from errata.edits import Edit
from errata.evaluation.probes import split_probes


def make_edit(paraphrases: list[str], neighbours: list[str]) -> Edit:
    fact = {"id": "e1", "subject": "A", "prompt": "{} is", "target_new": "B"}
    return Edit.model_validate({**fact, "paraphrase_prompts": paraphrases, "neighborhood_prompts": neighbours})


@pytest.mark.parametrize(("paraphrases", "neighbours", "held"), [(0, 0, (0, 0)), (1, 1, (1, 1)), (2, 10, (1, 5)), (5, 7, (1, 4))])
def test_one_paraphrase_and_half_the_neighbours_are_held_out(paraphrases: int, neighbours: int, held: tuple[int, int]) -> None:
    edit = make_edit([f"p{i}" for i in range(paraphrases)], [f"n{i}" for i in range(neighbours)])
    split = split_probes(edit, seed=0)
    assert (len(split.held_out.paraphrases), len(split.held_out.neighbours)) == held
    assert sorted(split.held_out.paraphrases + split.training.paraphrases) == sorted(edit.paraphrase_prompts)
    both = {probe.prompt for probe in split.held_out.neighbours + split.training.neighbours}
    assert both == {probe.prompt for probe in edit.neighborhood_prompts}


def test_a_text_listed_twice_never_stands_on_both_sides() -> None:
    split = split_probes(make_edit(["same", "same"], ["x", "y", "x", "y"]), seed=3)
    assert not set(split.held_out.paraphrases) & set(split.training.paraphrases)
    assert not {p.prompt for p in split.held_out.neighbours} & {p.prompt for p in split.training.neighbours}


def test_the_choice_is_fixed_for_ever_and_follows_id_and_seed_only() -> None:
    edit = make_edit(["a", "b", "c", "d"], [])
    assert split_probes(edit, 0).held_out.paraphrases == ("c",), "stored reports and trained distillations rely on this choice"
    shuffled = edit.model_copy(update={"paraphrase_prompts": ("d", "c", "b", "a"), "note": "other"})
    assert split_probes(shuffled, 0).held_out.paraphrases == split_probes(edit, 0).held_out.paraphrases
    assert len({split_probes(edit, seed).held_out.paraphrases for seed in range(20)}) > 1
    assert len({split_probes(edit.model_copy(update={"id": f"e{i}"}), 0).held_out.paraphrases for i in range(20)}) > 1
