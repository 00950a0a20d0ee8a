"""Fine-tuning as a method of the comparison: on the targets of the batch that comes, on top of whatever earlier batches left."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional

from errata.comparison.method import Bench, Recipe
from errata.distill_options import DistillOptions
from errata.distillation.lessons import Lesson
from errata.distillation.rows import Row, read_spans
from errata.distillation.student import seat_student
from errata.editors.adapters import LoraAdapter
from errata.editors.artifacts import WeightDelta
from errata.edits import Edit
from errata.errors import EditorError, TokenizationError
from errata.modeling.loading import Base, share_base
from errata.modeling.patch import require_untouched
from errata.modeling.tokens import encode_prompt, encode_target

FT_STEPS = 25
FT_RADIUS = 4.0
"""ε in units of mean |W₀| / √d_in, at which the corner of the ball says about as much about any input as the weight itself, whatever
width and scale. The smallest power of two at which edits take that are alone: swept as ROME swept its own, on 24 edits of the built-in
base, of which 1 takes at 1, 12 at 2, and all at 4."""
ENOUGH = 1e-2
"""Mean loss of a chunk, in nats, below which it makes no step; once all do, tuning ends."""
LORA_STEPS = 70
LORA_LR = 5e-3
LORA_RANK, LORA_ALPHA, LORA_DROPOUT = 8, 32, 0.1
_CHUNK = 64
"""Edits per step (the published batch size of FT)."""


class FineTuning:
    """FT-L: the weight of the profile's last edited layer, within a ball around the base's own (ROME, appendix E; kmeng01/rome)."""

    def __init__(self, base: Base, layer: int) -> None:
        require_untouched(base)
        self._base, self._layer = base, layer
        # A model of its own over the same tensors, of which only the tuned weight is replaced.
        self._tuned = share_base(base)
        self._original = base.layout.orient(base.layout.read_weight(base.model, layer)).float()
        self._weight = self._original.clone()
        self.radius = find_radius(base, layer)
        """ε, in units of the weight."""
        self.refused: dict[str, str] = {}

    def write(self, edits: Sequence[Edit]) -> None:
        """See `Method.write`. Raises EditorError: a loss is not finite."""
        rows = _spell_rows(self._base, edits, self.refused)
        weight = self._weight.clone().requires_grad_()
        low, high = self._original - self.radius, self._original + self.radius
        # As published lr = ε: the first step goes to the edge.
        adam = torch.optim.Adam([weight], lr=self.radius)
        for _ in range(FT_STEPS if rows else 0):
            moved = False
            for chunk in _cut(rows):
                loss = self._measure(chunk, weight)
                if float(loss.detach()) < ENOUGH:
                    continue
                adam.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                adam.step()
                with torch.no_grad():
                    weight.clamp_(low, high)
                moved = True
            if not moved:
                break
        self._weight = weight.detach()

    def build_artifacts(self) -> list[WeightDelta]:
        """See `Method.build_artifacts`."""
        if torch.equal(self._weight, self._original):
            return []
        delta = self._base.layout.orient(self._weight - self._original).cpu()
        return [WeightDelta(self._base.digest, {self._base.layout.weight_name(self._layer): delta})]

    def count_bytes(self) -> int:
        """One weight in float32."""
        return self._weight.numel() * self._weight.element_size()

    def _measure(self, rows: Sequence[Row], weight: torch.Tensor) -> torch.Tensor:
        projection = self._tuned.layout.projection_of(self._tuned.model, self._layer)
        stored = projection._parameters.pop("weight")
        assert stored is not None
        # A plain tensor in the parameter's place, so that the loss knows what it was cast from.
        projection.__dict__["weight"] = weight.to(stored.dtype)
        try:
            logits = read_spans(self._tuned, [row.asked for row in rows], [len(row.target) for row in rows])
        finally:
            del projection.__dict__["weight"]
            projection.register_parameter("weight", stored)
        return _average_loss(logits, rows)


def find_radius(base: Base, layer: int) -> float:
    """ε, in units of the weight."""
    weight = base.layout.read_weight(base.model, layer).float()
    radius: float = FT_RADIUS * float(weight.abs().mean()) / weight.shape[1] ** 0.5
    return radius


class LoraTuning:
    """LoRA on the attention, trained batch after batch without replay (zjunlp/EasyEdit)."""

    def __init__(self, base: Base, seed: int) -> None:
        self._base = base
        self._options = DistillOptions(
            r=LORA_RANK, alpha=LORA_ALPHA, dropout=LORA_DROPOUT, lr=LORA_LR, seed=seed, mixed_precision=False, gradient_checkpointing=False
        )
        self._adapter: LoraAdapter | None = None
        self._writes = 0
        self.refused: dict[str, str] = {}

    def write(self, edits: Sequence[Edit]) -> None:
        """See `Method.write`. Raises EditorError: a loss is not finite."""
        rows = _spell_rows(self._base, edits, self.refused)
        if not rows:
            return
        device = self._base.device
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            seat_student(self._base, [], self._options, self._adapter) as student,
        ):
            # Dropout differs from batch to batch.
            torch.manual_seed(self._options.seed * 1_000_003 + self._writes)
            adam = torch.optim.Adam([factor.requires_grad_() for factor in student.factors.values()], lr=LORA_LR)
            for _ in range(LORA_STEPS):
                moved = False
                for chunk in _cut(rows):
                    loss = _average_loss(student.practise(chunk), chunk)
                    if float(loss.detach()) < ENOUGH:
                        continue
                    adam.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    adam.step()
                    moved = True
                if not moved:
                    break
            trained = student.copy_factors()
        a, b = ({name[2:]: factor.float() for name, factor in trained.items() if name.startswith(side)} for side in ("a.", "b."))
        self._adapter, self._writes = LoraAdapter(self._base.digest, self._options.alpha, a, b), self._writes + 1

    def build_artifacts(self) -> list[LoraAdapter]:
        """See `Method.build_artifacts`."""
        return [] if self._adapter is None else [self._adapter]

    def count_bytes(self) -> int:
        """The factors as an adapter is stored."""
        return 0 if self._adapter is None else len(self._adapter.to_bytes())


def _spell_rows(base: Base, edits: Sequence[Edit], refused: dict[str, str]) -> list[Row]:
    """Each edit's own prompt with its target; of a slot that comes twice the later one. What cannot be spelled goes to `refused`."""
    rows = []
    for edit in {edit.slot: edit for edit in edits}.values():
        ids = tuple(encode_prompt(base.tokenizer, edit.rewrite_prompt))
        try:
            target = tuple(encode_target(base.tokenizer, edit.target_new))
        except TokenizationError as error:
            refused[edit.edit_id] = str(error)
            continue
        if len(ids) + len(target) > base.context:
            refused[edit.edit_id] = f"expected prompt and target within {base.context} tokens, found {len(ids)} + {len(target)}"
            continue
        rows.append(Row(Lesson(edit.edit_id, "rewrite", edit.rewrite_prompt, True, ids, ids, (target,)), target))
    return rows


def _cut(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), _CHUNK):
        yield rows[start : start + _CHUNK]


def _average_loss(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Mean over edits of the mean NLL per token of their targets, from logits [positions, vocabulary]."""
    wanted = torch.tensor([token for row in rows for token in row.target], device=logits.device)
    weights = torch.tensor([1 / len(row.target) for row in rows for _ in row.target], device=logits.device) / len(rows)
    loss = (functional.cross_entropy(logits.float(), wanted, reduction="none") * weights).sum()
    if not torch.isfinite(loss):
        raise EditorError(f"fine-tuning: expected a finite loss, found {float(loss.detach())}")
    return loss


def start_ft(bench: Bench) -> FineTuning:
    return FineTuning(bench.base, bench.profile.prepare.layers[-1])


def start_lora(bench: Bench) -> LoraTuning:
    return LoraTuning(bench.base, bench.seed)


FT_RECIPE = Recipe(
    name="ft",
    title="FT, constrained",
    source="ROME, NeurIPS 2022, appendix E (kmeng01/rome: baselines/ft)",
    build=start_ft,
    differs="at the profile's last layer; ε is 4 · mean |W| / √d_in, around the weight of the base, where the published ball moves with "
    "every call; lr = ε as published for GPT-2 XL; every token of the target is forced, where the published code reads all of them off one "
    "place; nothing in it is drawn at random",
)
LORA_RECIPE = Recipe(
    name="lora",
    title="LoRA fine-tuning",
    source="LoRA, ICLR 2022 (zjunlp/EasyEdit: easyeditor/models/lora)",
    build=start_lora,
    differs="plain LoRA and not AdaLoRA; PEFT's usual attention projections; a whole batch per step, up to 64; one adapter goes on from "
    "batch to batch with a new optimiser; no step is made below a loss of .01, as in FT; the target alone is "
    "learned, without an end of text behind it",
)
