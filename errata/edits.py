"""The edit: one fact to write, its probes, and what makes two edits the same or contradict (design §3)."""

import hashlib
import io
import json
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Any, BinaryIO, Literal, Self, cast

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

SLOT = "{}"
MAX_TEXT = 4_000
"""Longest text of one field, in characters. Longer facts are passages, not edits; a prompt must fit the context."""

MAX_NAME = 200
_SURROGATE = re.compile("[\ud800-\udfff]")


def normalise(text: str) -> str:
    """NFC and trimmed: two spellings of the same characters are the same text."""
    return unicodedata.normalize("NFC", text).strip()


def _require_unicode(text: str) -> str:
    # JSON can spell half of a surrogate pair ("\\ud800"); no file can hold it and no digest be taken of it.
    if found := _SURROGATE.search(text):
        raise ValueError(f"expected Unicode text, found the lone surrogate \\u{ord(found[0]):04x}")
    return text


def _require_name(name: str) -> str:
    name = unicodedata.normalize("NFC", _require_unicode(name))
    if not 1 <= len(name) <= MAX_NAME:
        raise ValueError(f"expected 1 to {MAX_NAME} characters, found {len(name)}")
    if found := re.search(r"[\s@/\\]", name):
        raise ValueError(f"expected a name without white space, '@', '/' or '\\', found {found[0]!r} in {name[:80]!r}")
    return name


def _require_text(text: str) -> str:
    text = normalise(_require_unicode(text))
    if not text:
        raise ValueError("expected some text, found an empty string")
    if len(text) > MAX_TEXT:
        raise ValueError(f"expected at most {MAX_TEXT} characters, found {len(text)}")
    return text


Text = Annotated[str, AfterValidator(_require_text)]
Remark = Annotated[str, AfterValidator(_require_unicode), Field(max_length=MAX_TEXT)]
Name = Annotated[str, AfterValidator(_require_name)]


class Probe(BaseModel):
    """A question asked of the model to see what an edit did beside its own prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Text
    """Full text, no slot."""
    answers: tuple[Text, ...] = ()
    """Acceptable answers; empty where only agreement with the base can be judged."""
    kind: Literal["neighborhood", "portability"] = "neighborhood"


def _probes_of(kind: str) -> BeforeValidator:
    def read(value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return tuple(
            {"prompt": item, "kind": kind} if isinstance(item, str) else {"kind": kind, **item} if isinstance(item, dict) else item
            for item in value
        )

    return BeforeValidator(read)


class Edit(BaseModel):
    """One fact to write into the model.

    Raises:
        pydantic.ValidationError: a field is missing, empty, too long or unknown; the prompt has not exactly one `{}`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Name | None = None
    """The producer's name for this edit. Without one, `edit_id` is a digest of the content."""
    subject: Text
    prompt: Text
    """Exactly one `{}` where the subject stands."""
    target_new: Text
    target_true: Text | None = None
    aliases: tuple[Text, ...] = ()
    """Other names of the subject, by which the edit memory finds the fact."""
    paraphrase_prompts: tuple[Text, ...] = ()
    neighborhood_prompts: Annotated[tuple[Probe, ...], _probes_of("neighborhood")] = ()
    portability_prompts: Annotated[tuple[Probe, ...], _probes_of("portability")] = ()
    relation_id: Text | None = None
    source: Remark | None = None
    submitted_at: AwareDatetime | None = None
    note: Remark | None = None

    @model_validator(mode="before")
    @classmethod
    def _answer_plain_neighbours(cls, data: Any) -> Any:
        # CounterFact's neighbours are plain strings whose true answer is the edit's own target_true.
        if isinstance(data, dict) and data.get("target_true") and isinstance(data.get("neighborhood_prompts"), list | tuple):
            true = data["target_true"]
            probes = [{"prompt": p, "answers": (true,)} if isinstance(p, str) else p for p in data["neighborhood_prompts"]]
            data = {**data, "neighborhood_prompts": probes}
        return data

    @model_serializer(mode="wrap")
    def _omit_no_aliases(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Rows from before there were aliases keep their bytes."""
        content: dict[str, Any] = spell(self)
        return content if self.aliases else {name: value for name, value in content.items() if name != "aliases"}

    @model_validator(mode="after")
    def _check_slot(self) -> "Edit":
        count = self.prompt.count(SLOT)
        if count != 1:
            raise ValueError(f"prompt: expected exactly one '{{}}' where the subject stands, found {count} in {self.prompt[:80]!r}")
        others = {"subject": self.subject, "target_new": self.target_new}
        others |= {f"aliases[{i}]": text for i, text in enumerate(self.aliases)}
        others |= {f"paraphrase_prompts[{i}]": text for i, text in enumerate(self.paraphrase_prompts)}
        others |= {f"neighborhood_prompts[{i}].prompt": probe.prompt for i, probe in enumerate(self.neighborhood_prompts)}
        others |= {f"portability_prompts[{i}].prompt": probe.prompt for i, probe in enumerate(self.portability_prompts)}
        for field, text in others.items():
            if SLOT in text:
                raise ValueError(f"{field}: expected full text, '{{}}' stands in prompt only, found {text[:80]!r}")
        return self

    @property
    def rewrite_prompt(self) -> str:
        """The prompt with the subject in its slot."""
        return self.prompt.replace(SLOT, self.subject)

    @property
    def content_id(self) -> str:
        """16 hex digits over subject, prompt, target_new and relation_id: nothing else is identity (design §3)."""
        content = {"subject": self.subject, "prompt": self.prompt, "target_new": self.target_new, "relation_id": self.relation_id}
        return hashlib.sha256(canonical_json(content)).hexdigest()[:16]

    @property
    def edit_id(self) -> str:
        return self.id or self.content_id

    @property
    def subject_key(self) -> str:
        """What edits of one subject have in common, however it is cased. 32 hex digits."""
        return digest_subject(self.subject)

    @property
    def slot(self) -> str:
        """The conflict slot: two live edits may not share one. (casefolded subject, relation_id), else (subject, prompt)."""
        subject = normalise(self.subject.casefold())
        parts = ["relation", subject, self.relation_id] if self.relation_id else ["prompt", subject, self.prompt]
        return hashlib.sha256(canonical_json(parts)).hexdigest()[:32]


def digest_subject(subject: str) -> str:
    """The `subject_key` of edits of this subject."""
    return digest_of(normalise(subject.casefold()).encode())[:32]


class Submission(BaseModel):
    """An edit as it arrives: the fact, where it came from, and what its producer insists on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    edit: Edit
    origin: str = ""
    """`file:line` or `file[index]`, for people."""
    again: bool = False
    """Propose it although it was withdrawn, quarantined or rejected before."""
    force: bool = False
    """Propose it although its `submitted_at` is older than that of the live edit it replaces."""
    arrived: datetime | None = None
    """When its file arrived, by the storage's clock: what stands for `submitted_at` where an urgent file has overtaken it."""


class Risk(BaseModel):
    """What an edit costs, foretold from its target alone: the stranger and the longer a target is to the base, the more weights have to
    move for it (the data side of D4S).

    Source: the D4S paper's analysis of edited data, perplexity and length of targets; that their product orders edits best is ours
    (`benchmarks/edit_costs.py`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    perplexity: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    """Of target_new under the untouched base, exp of its mean loss per token after the rewrite prompt, teacher forced; None where that is
    not finite."""
    tokens: int = Field(ge=1)
    """Of target_new."""

    @classmethod
    def over(cls, logprobs: Sequence[float]) -> Self:
        """Of a target whose tokens have these natural log-probabilities, one at least."""
        mean = -math.fsum(logprobs) / len(logprobs)
        # Rounding may leave a certain token a hair above probability 1; e^709 is the last float. Six digits, so that what is stored does
        # not depend on how many threads computed it.
        perplexity = float(f"{math.exp(max(mean, 0.0)):.6g}") if mean < 709 else None
        return cls(perplexity=perplexity, tokens=len(logprobs))

    @property
    def figure(self) -> float:
        """What orders edits: surprise in nats, tokens · ln perplexity, the target's whole negative log-likelihood. Infinite where the
        perplexity is not finite."""
        return math.inf if self.perplexity is None else self.tokens * math.log(self.perplexity)


class Refusal(BaseModel):
    """A record that could not become an edit, and why."""

    model_config = ConfigDict(frozen=True)

    origin: str
    field: str | None = None
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.field}: {self.reason}" if self.field else f"{self.origin}: {self.reason}"


def spell_submission(record: Submission) -> bytes:
    """A submission as a line of an inbox file."""
    line = record.edit.model_dump(mode="json", exclude_none=True, exclude_defaults=True) | {"origin": record.origin}
    return canonical_json(line | {name: True for name in ("again", "force") if getattr(record, name)})


def canonical_json(value: Any) -> bytes:
    """One spelling per value: sorted keys, no spaces, NFC text, UTF-8. Digests are taken over these bytes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_encode)
    return unicodedata.normalize("NFC", text).encode()


def _encode(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"cannot write {type(value).__name__} as canonical JSON")


def digest_of(data: bytes) -> str:
    """sha256 in 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def digest_written(write: Callable[[BinaryIO], object]) -> str:
    """`digest_of` what `write` writes, which is held nowhere."""
    sink = _Digesting()
    write(cast(BinaryIO, sink))
    return sink.sha256.hexdigest()


class _Digesting(io.RawIOBase):
    """A file that keeps nothing but the digest."""

    def __init__(self) -> None:
        super().__init__()
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return memoryview(data).nbytes
