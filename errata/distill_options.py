"""What a distillation may be told. Published values: algorithms.md §2.3 and resolution K."""

from pydantic import BaseModel, ConfigDict, Field

from errata.edits import canonical_json, digest_of

_PUBLISHED_LR = 1e-4
_NARROW, _NARROW_LR = 512, 5e-3
"""Measured on the built-in bases, which are 128 wide: `benchmarks/README.md`. Nothing in between was tried."""


class DistillOptions(BaseModel):
    """How live edits become a LoRA. Everything here is part of the digest that names stored work."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(default=8, ge=1)
    """Rank."""
    alpha: int = Field(default=8, ge=1)
    """The change of a weight is alpha / r · B·A."""
    dropout: float = Field(default=0, ge=0, lt=1)
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the modules that are adapted, as PEFT matches them: `("q_proj", "v_proj")`. None: PEFT's own choice for the architecture
    (queries and values; `c_attn` in a GPT-2)."""
    lr: float | None = Field(default=None, gt=0)
    """AdamW's step size, constant. None: 1e-4, as published for GPT-J; for a model narrower than 512, which that would not move, 5e-3."""
    weight_decay: float = Field(default=0.01, ge=0)
    epochs: int = Field(default=10, ge=1)
    """Passes over the lessons at most."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimisation steps at most; None: as many as the epochs take."""
    batch_tokens: int = Field(default=256, ge=1)
    """Padded tokens that the student reads per step; one lesson at least. Few, since steps are what teaches: the paper makes one per prompt
    and candidate. On a GPU with a large model raise it."""
    teacher_tokens: int = Field(default=4_096, ge=1)
    """Padded tokens that the teacher reads at once. It says nothing about the result."""
    temperature: float = Field(default=1, gt=0)
    """Both distributions are softened by it."""
    top_k: int | None = Field(default=None, ge=1)
    """Tokens of the teacher's distribution that are kept at every position, all others in one bucket: much smaller on disk, and a lower
    bound on the divergence. None: the whole vocabulary."""
    base_teacher: bool = True
    """Whether lessons out of scope are taught, by the base. Without them specificity falls (paper: NS 78.6 → 72.9)."""
    in_weight: float = Field(default=1, gt=0)
    out_weight: float = Field(default=1, gt=0)
    """Weight of a position of a lesson in scope, and out of scope."""
    validation: float = Field(default=0.1, ge=0, le=0.5)
    """Share of the edits whose lessons, all but the rewrite prompt, are kept for validation; at least one. 0: no early stop."""
    patience: int = Field(default=3, ge=1)
    """Epochs without a better validation after which training stops."""
    checkpoint_steps: int = Field(default=200, ge=1)
    """Steps between checkpoints; there is one after every epoch, too."""
    mixed_precision: bool = True
    """bfloat16 in the student's training pass, where there is a GPU that has it."""
    gradient_checkpointing: bool = True
    """Activations are computed twice rather than kept, where there is a GPU."""
    seed: int = 0
    """Of the adapter's first values, the order of lessons, dropout, and the choice of validation edits."""

    def choose_lr(self, width: int) -> float:
        """The step size for a model whose residual stream is so wide."""
        return self.lr if self.lr is not None else _NARROW_LR if width < _NARROW else _PUBLISHED_LR

    @property
    def digest(self) -> str:
        return digest_of(canonical_json(self.model_dump(mode="json")))
