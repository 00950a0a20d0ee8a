"""What is known of one distillation. No torch here."""

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Distance(_Part):
    """Mean KL(teacher ‖ student) per target position, in nats; None where no lesson is of this scope. With `top_k` a lower bound."""

    inside: float | None = None
    outside: float | None = None


class Epoch(_Part):
    """The end of one pass over the lessons."""

    steps: int
    """Optimisation steps so far."""
    loss: float
    """Mean of the training loss over its steps."""
    distance: Distance
    """On validation."""


class DistilReport(_Part):
    """A distillation in numbers."""

    lessons_inside: int
    lessons_outside: int
    """Trained or held out; without the base's lessons, those out of scope are only measured."""
    lessons_validation: int
    """Of these, held out from training."""
    validation_trained: tuple[str, ...]
    """Scopes (`inside`, `outside`) whose distance is measured on lessons that are trained, since there were too few to hold any out."""
    targets: tuple[str, ...]
    """Parameters that are adapted."""
    teacher_rows: int
    """Forced candidates of all lessons."""
    teacher_reused: int
    """Rows whose predictions were on the disk already."""
    teacher_seconds: float
    """In this call."""
    teacher_tokens: int
    """That the teacher reads for all rows, without padding."""
    cache_bytes: int
    top_k: int | None
    steps: int
    student_seconds: float
    """In all calls, as far as checkpoints know."""
    student_tokens: int
    before: Distance
    after: Distance
    """Of what is returned."""
    curve: tuple[Epoch, ...]
    best_epoch: int
    """Counted from 1."""
    stopped_early: bool
