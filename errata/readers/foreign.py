"""The forms that data sets come in, each translated into the fields of an `Edit` (design §1 names the words).

Nothing is validated here beyond what translation needs: `Edit` does that. Fields not named here are ignored.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from errata.edits import SLOT, normalise
from errata.errors import RecordError
from errata.validation import show_value


def open_slot(prompt: str, subject: str, *, field: str = "prompt") -> str:
    """Put `{}` in place of the subject's first occurrence: as it is spelt if it occurs so, else without regard to case.

    Raises:
        RecordError: the subject does not occur.
    """
    prompt, subject = normalise(prompt), normalise(subject)
    start = prompt.find(subject)
    end = start + len(subject)
    if start < 0:
        start, end = _find_folded(prompt, subject)
    if start < 0:
        raise RecordError(f"expected the subject {show_value(subject)} in the prompt, found {show_value(prompt)}", field=field)
    return prompt[:start] + SLOT + prompt[end:]


def _find_folded(prompt: str, subject: str) -> tuple[int, int]:
    """Where `subject` occurs regardless of case, or (-1, -1). Folding may lengthen a character (ß → ss): positions are mapped back."""
    folded, starts = "", []
    for position, char in enumerate(prompt):
        folded += char.casefold()
        starts += [position] * len(char.casefold())
    start = folded.find(subject.casefold())
    if start < 0:
        return -1, -1
    return starts[start], starts[start + len(subject.casefold()) - 1] + 1


def _template(prompt: Any, subject: Any, field: str) -> Any:
    """`prompt` with its slot; left alone where it has one, or where validation will refuse it or the subject anyway."""
    if not isinstance(prompt, str) or not isinstance(subject, str) or SLOT in prompt or not prompt.strip() or not subject.strip():
        return prompt
    return open_slot(prompt, subject, field=field)


def _drop_absent(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _flatten(value: Any) -> Iterable[Any]:
    """The answers in a string, a list, or KnowEdit's list of lists of aliases; empty ones are left out."""
    if isinstance(value, list):
        for item in value:
            yield from _flatten(item)
    elif value is not None and not (isinstance(value, str) and not value.strip()):
        yield value


def _answers(value: Any) -> list[Any]:
    answers: list[Any] = []
    for item in _flatten(value):
        if item not in answers:
            answers.append(item)
    return answers


def _first_answer(value: Any) -> Any:
    return next(iter(_answers(value)), None)


def _note_case(record: Mapping[str, Any]) -> str | None:
    case = record.get("case_id")
    return f"case_id {case}" if isinstance(case, int) else None


def _listed(value: Any) -> list[Any]:
    """A field that holds one text, several, or nothing."""
    if isinstance(value, list):
        return value
    return [] if value is None or value == "" else [value]


def read_counterfact(record: Mapping[str, Any]) -> dict[str, Any]:
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, dict):
        raise RecordError(f"expected an object, found {show_value(rewrite)}", field="requested_rewrite")

    def text_of(name: str) -> Any:
        value = rewrite.get(name)
        return value.get("str") if isinstance(value, dict) else value

    return _drop_absent(
        {
            "subject": rewrite.get("subject"),
            "prompt": _template(rewrite.get("prompt"), rewrite.get("subject"), "requested_rewrite.prompt"),
            "target_new": text_of("target_new"),
            "target_true": text_of("target_true") or None,
            "relation_id": rewrite.get("relation_id") or None,
            "paraphrase_prompts": record.get("paraphrase_prompts"),
            "neighborhood_prompts": record.get("neighborhood_prompts"),
            "source": "CounterFact",
            "note": _note_case(record),
        }
    )


def read_enriched(record: Mapping[str, Any]) -> dict[str, Any]:
    paraphrases, neighbours = _listed(record.get("paraphrase_prompts")), _listed(record.get("neighborhood_prompts"))
    return _drop_absent(
        {
            "subject": record.get("subject"),
            "prompt": _template(record.get("prompt"), record.get("subject"), "prompt"),
            "target_new": record.get("target_new"),
            "target_true": record.get("target_true") or None,
            "relation_id": record.get("relation_id") or None,
            "paraphrase_prompts": paraphrases + [p for p in _listed(record.get("cf_rephrase_prompt")) if p not in paraphrases],
            "neighborhood_prompts": neighbours + [p for p in _listed(record.get("cf_locality_prompt")) if p not in neighbours],
            "source": "CounterFact (enriched)",
            "note": _note_case(record),
        }
    )


def read_flat(record: Mapping[str, Any]) -> dict[str, Any]:
    # Without an answer of its own, a neighbour's is target_true: CounterFact's neighbours share the true object.
    own = _answers(record.get("locality_ground_truth"))
    neighbours = [{"prompt": p, "answers": own} if own else p for p in _listed(record.get("locality_prompt"))]
    return _drop_absent(
        {
            "subject": record.get("subject"),
            "prompt": _template(record.get("prompt"), record.get("subject"), "prompt"),
            "target_new": record.get("target_new"),
            "target_true": _first_answer(record.get("ground_truth")),
            "relation_id": record.get("relation_id") or None,
            "paraphrase_prompts": _listed(record.get("rephrase_prompt")),
            "neighborhood_prompts": neighbours,
            "source": "CounterFact (flattened)",
            "note": _note_case(record),
        }
    )


def read_zsre(record: Mapping[str, Any]) -> dict[str, Any]:
    """MEND's zsRE. The new object is `alt`, as in D4S and iReVa; MEMIT and MIKE write `answers[0]` instead (algorithms.md, I.P)."""
    return _drop_absent(
        {
            "subject": record.get("subject"),
            "prompt": _template(record.get("src"), record.get("subject"), "src"),
            "target_new": record.get("alt"),
            "target_true": _first_answer(record.get("answers")),
            "paraphrase_prompts": _listed(record.get("rephrase")),
            "neighborhood_prompts": [{"prompt": p, "answers": _answers(record.get("loc_ans"))} for p in _listed(record.get("loc"))],
            "source": "zsRE",
        }
    )


def read_knowedit(record: Mapping[str, Any]) -> dict[str, Any]:
    return _drop_absent(
        {
            "subject": record.get("subject"),
            "prompt": _template(record.get("prompt"), record.get("subject"), "prompt"),
            "target_new": record.get("target_new"),
            "target_true": _first_answer(record.get("ground_truth")),
            "paraphrase_prompts": _listed(record.get("rephrase_prompt")),
            "neighborhood_prompts": _read_subsets(record, "locality"),
            "portability_prompts": _read_subsets(record, "portability"),
            "source": "KnowEdit",
        }
    )


def _read_subsets(record: Mapping[str, Any], name: str) -> list[Any]:
    """KnowEdit's `{subset: [{prompt, ground_truth}]}`, all subsets in one list."""
    subsets = record.get(name)
    if subsets is not None and not isinstance(subsets, dict):
        raise RecordError(f"expected an object of lists, found {show_value(subsets)}", field=name)
    probes = []
    for subset, items in (subsets or {}).items():
        for position, item in enumerate(_listed(items)):
            if not isinstance(item, dict):
                reason = f"expected an object with prompt and ground_truth, found {show_value(item)}"
                raise RecordError(reason, field=f"{name}.{subset}[{position}]")
            probes.append({"prompt": item.get("prompt"), "answers": _answers(item.get("ground_truth"))})
    return probes
