"""Key groups: who shares a pair, what a joint pair is, and which pairs a change touches."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from errata.candidates import name_pair, prepare_batch
from errata.editors import base
from errata.editors.base import list_units
from errata.editors.catalogue import make_editor
from errata.editors.d4s import groups
from errata.editors.d4s.groups import group_keys, read_bare_keys
from errata.editors.d4s.moments import Moments, collect_moments
from errata.editors.rows import build_rows
from errata.edits import Edit, digest_of
from errata.grouping import Placed, regroup
from errata.manifests import PairRef
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.modeling.trace import trace_inputs
from errata.profiles import PrepareOptions, Profile, SolveOptions

Make = Callable[..., Edit]
A, B, C, D = (PairRef(pairs=letter * 64, row=0) for letter in "abcd")


class Grouping:
    """An editor that groups as it is told."""

    def __init__(self, *told: Sequence[str]) -> None:
        self.told, self.asked = told, list[list[str]]()

    def find_groups(self, base: Any, edits: Sequence[Edit]) -> list[tuple[str, ...]]:
        self.asked.append([edit.edit_id for edit in edits])
        return [tuple(sorted(ids)) for ids in self.told]


@pytest.fixture
def edit(make_edit: Make) -> Callable[[str], Edit]:
    return lambda name: make_edit(0, id=name)


def change(editor: Any, edit: Any, coming: str = "", staying: dict[str, PairRef] | None = None, leaving: Sequence[PairRef] = ()) -> Any:
    placed = [Placed(edit(name), ref) for name, ref in (staying or {}).items()]
    found = regroup(editor, None, [edit(name) for name in coming], placed, leaving)  # type: ignore[arg-type]
    return "".join(item.edit_id for item in found.edits), found.groups, found.remove


def test_an_edit_alone_touches_no_other_pair(edit: Any) -> None:
    editor = Grouping()
    assert change(editor, edit, "x") == ("x", (), ())
    assert editor.asked == [], "keys of a lone edit are not read"
    assert change(editor, edit, "x", {"a": A, "b": B}) == ("x", (), ())
    assert change(Grouping("ab"), edit, "x", {"a": A, "b": A}) == ("x", (), ()), "a group that nobody joins or leaves stays as it is"


def test_who_joins_changes_the_pair_of_the_others(edit: Any) -> None:
    assert change(Grouping("ax"), edit, "x", {"a": A, "b": B}) == ("ax", (("a", "x"),), (A,))
    assert change(Grouping("abx"), edit, "xy", {"a": A, "b": A}) == ("abxy", (("a", "b", "x"),), (A,))
    assert change(Grouping("xy"), edit, "yx") == ("xy", (("x", "y"),), ())
    assert change(Grouping("abx"), edit, "x", {"a": A, "b": B}) == ("abx", (("a", "b", "x"),), (A, B)), "it connects two"


def test_who_leaves_changes_the_pair_of_the_others(edit: Any) -> None:
    assert change(Grouping(), edit, "", {"b": A}, [A]) == ("b", (), (A,))
    assert change(Grouping("bc"), edit, "", {"b": A, "c": A}, [A]) == ("bc", (("b", "c"),), (A,))
    assert change(Grouping(), edit, "", {"b": B}, [A]) == ("", (), (A,)), "others keep theirs"
    assert change(Grouping("bx"), edit, "x", {"b": A, "c": C}, [A, A]) == ("bx", (("b", "x"),), (A,)), "a member is replaced"
    assert change(Grouping(), edit, "", {"b": B, "c": B}, [A]) == ("bc", (), (A, B)), "the one who left had connected them"


def test_units_are_in_canonical_order() -> None:
    assert list_units("dcba", [("b", "d"), ("a", "z")]) == [("b", "d"), ("c",), ("a",)]
    assert list_units([], [("a", "b")]) == []


def test_keys_are_grouped_by_name_and_likeness() -> None:
    def turn(degrees: float) -> list[float]:
        angle = torch.tensor(degrees).deg2rad()
        return [float(angle.cos()), float(angle.sin())]

    keys = torch.tensor([turn(0), turn(17), turn(34), turn(0), turn(60), turn(34)])
    names = ["x", "x", "x", "y", "x", "y"]
    # 17° is a cosine of .956: neighbours connect, and so do those that they connect; 26° is not.
    assert group_keys(names, {1: keys}) == [(0, 1, 2), (3,), (4,), (5,)]
    assert group_keys(names, {1: keys, 2: torch.tensor([turn(60 * i) for i in range(6)])}) == [(i,) for i in range(6)], "in every layer"
    assert group_keys(names, {1: 1e3 * keys}) == group_keys(names, {1: keys})


@pytest.fixture(scope="module")
def moments(editable: Base, editable_options: PrepareOptions, sentences: Sequence[str]) -> Moments:
    return collect_moments(editable, editable_options.layers, sentences)


def build(base: Base, options: PrepareOptions, moments: Moments) -> Any:
    solve = SolveOptions(lam=1.0, spread="single", moments="0" * 64)
    return make_editor("d4s", Profile(base=base.digest, prepare=options, solve=solve), moments, base.layout)


def test_bare_keys_are_those_of_a_plain_pass(editable: Base, make_edit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = [make_edit(person, person % 3) for person in range(4)]
    contexts = ("{}", "They say that {}")
    rows = [build_rows(editable.tokenizer, edit, contexts, editable.context) for edit in edits]
    monkeypatch.setattr(groups, "_ROWS", 3)  # in two passes
    keys = read_bare_keys(editable, rows, (0, 1))
    for place, edit in enumerate(edits):
        prompt = edit.rewrite_prompt  # ends in its subject
        ids = editable.tokenizer(prompt, return_tensors="pt")
        modules = {layer: editable.layout.projection_of(editable.model, layer) for layer in (0, 1)}
        with torch.no_grad(), trace_inputs(modules, lambda inputs: inputs[0, -1].float()) as plain:
            editable.model(**ids)
        for layer in (0, 1):
            torch.testing.assert_close(keys[layer][place], plain[layer], rtol=1e-4, atol=1e-5)


def test_subjects_that_differ_are_never_grouped(
    editable: Base, editable_options: PrepareOptions, moments: Moments, make_edit: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "NEARLY_EQUAL", -1.0)
    editor = build(editable, editable_options, moments)
    edits = [make_edit(0, 0), make_edit(1, 0), make_edit(0, 1), make_edit(2, 0)]
    shouted = edits[0].model_copy(update={"subject": edits[0].subject.upper(), "relation_id": "P9"})
    (found,) = editor.find_groups(editable, [*edits, shouted])
    assert found == tuple(sorted((edits[0].edit_id, edits[2].edit_id, shouted.edit_id)))
    assert editor.find_groups(editable, edits[1:]) == []


def test_a_joint_pair_is_one_z_for_all_its_edits(
    editable: Base, editable_options: PrepareOptions, moments: Moments, make_edit: Make
) -> None:
    editor = build(editable, editable_options, moments)
    first, second, other = make_edit(0, 0, 0), make_edit(0, 1, 1), make_edit(1, 0, 2)
    group = tuple(sorted((first.edit_id, second.edit_id)))
    prepared = editor.prepare(editable, [second, other, first], None, [group])
    assert prepared.pairs is not None and prepared.pairs.owners == (group, (other.edit_id,))
    alone = editor.prepare(editable, [first, other, second]).pairs
    assert alone is not None
    place = {owners[0]: row for row, owners in enumerate(alone.owners)}
    both = [place[edit_id] for edit_id in group]
    torch.testing.assert_close(prepared.pairs.keys[1][0], alone.keys[1][both].mean(dim=0))
    torch.testing.assert_close(prepared.pairs.residuals[1], alone.residuals[place[other.edit_id]], rtol=1e-3, atol=1e-4)
    assert prepared.notes[first.edit_id].loss == prepared.notes[second.edit_id].loss
    assert prepared.notes[first.edit_id].target_nll != prepared.notes[second.edit_id].target_nll
    # What it was optimised for holds with the joint shift at both sites.
    state = editor.merge(editor.empty_state(), prepared.pairs, None)
    from errata.evaluation.generation import generate_answers

    with attach(editable, [editor.solve(state)]):
        answers = generate_answers(editable, [edit.rewrite_prompt for edit in (first, second, other)], max_new_tokens=1, batch_tokens=512)
    assert [answer.strip() for answer in answers] == [first.target_new, second.target_new, other.target_new]


def test_twice_the_same_prompt_is_the_pair_of_one(
    editable: Base, editable_options: PrepareOptions, moments: Moments, make_edit: Make
) -> None:
    """The loss of a unit is a mean, so its gradient does not grow with its edits."""
    options = editable_options.model_copy(update={"lr": 0.05, "steps": 6})  # within the ball of one: the room of two is not used
    editor = build(editable, options, moments)
    edit = make_edit(0)
    twin = edit.model_copy(update={"id": "twin"})
    one = editor.prepare(editable, [edit]).pairs
    two = editor.prepare(editable, [edit, twin], None, [(edit.edit_id, "twin")]).pairs
    assert one is not None and two is not None and len(two) == 1
    torch.testing.assert_close(two.residuals, one.residuals, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two.keys[1], one.keys[1])


def test_a_refused_edit_leaves_its_group(editable: Base, editable_options: PrepareOptions, moments: Moments, make_edit: Make) -> None:
    editor = build(editable, editable_options, moments)
    good, long = make_edit(0), make_edit(0, 1, id="long", target_new="word " * 80)
    prepared = editor.prepare(editable, [good, long], None, [(good.edit_id, "long")])
    assert prepared.pairs is not None and prepared.pairs.owners == ((good.edit_id,),)
    assert prepared.refused.keys() == {"long"}


def test_a_stored_joint_pair_is_used_again(editable: Base, editable_options: PrepareOptions, moments: Moments, make_edit: Make) -> None:
    editor = build(editable, editable_options, moments)
    edits = [make_edit(0, 0), make_edit(0, 1), make_edit(1, 0)]
    group = tuple(sorted(edit.edit_id for edit in edits[:2]))
    data: dict[str, bytes] = {}
    names: list[dict[str, Sequence[float]]] = []

    class Blobs(base.Blobs):
        def get(self, digest: str) -> bytes:
            return data[digest]

        def put(self, content: bytes) -> str:
            data[digest_of(content)] = content
            return digest_of(content)

    first = prepare_batch(Blobs(), editor, editable, edits, {}, lambda _, losses: names.append(dict(losses)), groups=[group])
    assert first.refs[edits[0].edit_id] == first.refs[edits[1].edit_id] != first.refs[edits[2].edit_id]
    by_id = {edit.edit_id: edit for edit in edits}
    joint = name_pair([by_id[edit_id] for edit_id in group])
    assert set(names[0]) == {joint, name_pair([edits[2]])} and len(names[0][joint]) == 2

    from errata.candidates import StoredPair

    known = {joint: StoredPair(ref=first.refs[group[0]], losses=tuple(names[0][joint]))}
    again = prepare_batch(Blobs(), editor, editable, edits[:2], known, lambda *_: pytest.fail("prepared anew"), groups=[group])
    assert again.refs == {edit_id: first.refs[edit_id] for edit_id in group}
    assert again.losses == {edit_id: first.losses[edit_id] for edit_id in group}
    made = len(names)
    prepare_batch(Blobs(), editor, editable, edits[:1], known, lambda _, losses: names.append(dict(losses)))
    assert len(names) == made + 1, "alone it is another pair"
