"""Ability sets: multiple-choice questions in JSONL, by which one sees whether a model still can what it could. Imports no torch."""

import json
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from errata.errors import InputError
from errata.validation import explain_errors


class AbilityQuestion(BaseModel):
    """One line of an ability set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str = Field(min_length=1)
    """Text that each of the choices may continue."""
    choices: tuple[str, ...] = Field(min_length=2)
    answer: int = Field(ge=0)
    """Place of the right choice, from 0."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer: expected a place among {len(self.choices)} choices, counted from 0, found {self.answer}")
        return self


def read_abilities(path: Path) -> list[AbilityQuestion]:
    """The questions of a file, in order.

    Raises:
        InputError: it cannot be read, holds no question, or a line is none; the message names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} (watch.ability_set): expected a readable JSONL file in UTF-8 ({error})") from None
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            questions.append(AbilityQuestion.model_validate(json.loads(line)))
        except ValidationError as error:
            raise InputError(f"{path}:{number}: " + "; ".join(map(str, explain_errors(error)))) from None
        except ValueError as error:
            raise InputError(f"{path}:{number}: expected JSON, found {line[:40]!r} ({error})") from None
    if not questions:
        raise InputError(f"{path} (watch.ability_set): expected at least one question, found none")
    return questions
