"""The record forms we recognise. Unknown fields are ignored in foreign forms; in our own form an unknown field is a misspelt one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from errata.edits import Edit
from errata.errors import RecordError
from errata.readers import foreign
from errata.validation import show_names

ENVELOPE = frozenset({"origin", "again", "force"})
"""Fields of a `Submission` that a row of our own form may carry beside the edit's."""
OWN_FIELDS = frozenset(Edit.model_fields) | ENVELOPE

_FLAT_MARKS = frozenset({"ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth"})
_ENRICHED_MARKS = frozenset({"cf_rephrase_prompt", "cf_locality_prompt", "case_id"})


@dataclass(frozen=True)
class Form:
    """One way of writing an edit."""

    name: str
    fields: str
    """Its telling fields, for the message that names all forms."""
    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    spelling: Mapping[str, str] = field(default_factory=dict)
    """Our field name → theirs, so that an error names the field the user wrote."""


def recognise(record: Mapping[str, Any]) -> Form:
    """The form of one record.

    Raises:
        RecordError: it has the telling fields of none.
    """
    for form in FORMS:
        if form.fits(record):
            return form
    found = f"an object with {show_names(record)}" if record else "an empty object"
    raise RecordError(f"expected {describe_forms()}; found {found}")


def describe_forms() -> str:
    *most, last = (f"{form.name} ({form.fields})" for form in FORMS)
    return f"one of the known forms: {', '.join(most)} or {last}"


def _read_own(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ENVELOPE}


OWN = Form(
    "our JSON lines",
    "subject, prompt with {}, target_new",
    lambda record: not record.keys().isdisjoint({"subject", "prompt", "target_new"}),
    _read_own,
)
FORMS = (
    Form(
        "CounterFact",
        "requested_rewrite",
        lambda record: "requested_rewrite" in record,
        foreign.read_counterfact,
        {name: f"requested_rewrite.{name}" for name in ("subject", "prompt", "target_new", "target_true", "relation_id")},
    ),
    Form(
        "zsRE",
        "src, alt, answers, loc",
        lambda record: "src" in record and not record.keys().isdisjoint({"alt", "answers", "loc"}),
        foreign.read_zsre,
        {
            "prompt": "src",
            "target_new": "alt",
            "target_true": "answers",
            "paraphrase_prompts": "rephrase",
            "neighborhood_prompts": "loc",
        },
    ),
    Form(
        "KnowEdit",
        "prompt, ground_truth, locality, portability",
        lambda record: "prompt" in record and not record.keys().isdisjoint({"locality", "portability"}),
        foreign.read_knowedit,
        {
            "target_true": "ground_truth",
            "paraphrase_prompts": "rephrase_prompt",
            "neighborhood_prompts": "locality",
            "portability_prompts": "portability",
        },
    ),
    Form(
        "flattened CounterFact",
        "prompt, ground_truth, rephrase_prompt, locality_prompt",
        lambda record: "prompt" in record and not record.keys().isdisjoint(_FLAT_MARKS),
        foreign.read_flat,
        {"target_true": "ground_truth", "paraphrase_prompts": "rephrase_prompt", "neighborhood_prompts": "locality_prompt"},
    ),
    Form(
        "enriched CounterFact",
        "cf_rephrase_prompt, cf_locality_prompt",
        lambda record: "prompt" in record and not record.keys().isdisjoint(_ENRICHED_MARKS),
        foreign.read_enriched,
    ),
    OWN,
)
