"""The student: a LoRA on a copy of the base that shares its tensors, with what lies beneath it attached. The only user of PEFT."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS
from torch import nn
from transformers.pytorch_utils import Conv1D

from errata.distill_options import DistillOptions
from errata.distillation.rows import Row, read_spans
from errata.editors.adapters import LoraAdapter
from errata.editors.artifacts import Artifact
from errata.errors import BaseMismatchError, InputError, ModelError
from errata.modeling.loading import Base, share_base
from errata.modeling.patch import attach, require_untouched

_ADAPTER = "default"
"""PEFT's name of the one adapter there is."""

Factors = dict[str, torch.Tensor]
"""`a.<parameter>` and `b.<parameter>` → A [r, d_in] and B [d_out, r], as they are trained."""


class Student:
    """A model that answers as base + what lies beneath + LoRA, and whose LoRA can be trained."""

    def __init__(self, base: Base, layers: Mapping[str, LoraLayer], options: DistillOptions, *, checkpointed: bool) -> None:
        """
        Args:
            base: the copy, with LoRA in it.
            layers: name of the adapted parameter → its LoRA.
            checkpointed: activations are computed anew for the backward pass.
        """
        self._base, self._layers, self._options, self._checkpointed = base, layers, options, checkpointed
        self.targets = tuple(layers)

    @property
    def device(self) -> torch.device:
        return self._base.device

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return int(self._base.model.config.hidden_size)

    @property
    def factors(self) -> Factors:
        """The trained parameters themselves."""
        found: Factors = {}
        for name, layer in self._layers.items():
            for side, of in (("a", layer.lora_A), ("b", layer.lora_B)):
                found[f"{side}.{name}"] = of[_ADAPTER].get_parameter("weight")
        return found

    def copy_factors(self) -> Factors:
        return {name: factor.detach().cpu().clone() for name, factor in self.factors.items()}

    def load_factors(self, factors: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, factor in self.factors.items():
                factor.copy_(factors[name])

    def answer(self, rows: Sequence[Row]) -> torch.Tensor:
        """Logits [positions, vocabulary] at the targets of rows, as it is served."""
        self._drop(False)
        with torch.inference_mode():
            return read_spans(self._base, [row.asked for row in rows], [len(row.target) for row in rows])

    def practise(self, rows: Sequence[Row]) -> torch.Tensor:
        """As `answer`, with gradients, with dropout, and on a GPU in mixed precision."""
        self._drop(True)
        with self._cast():
            return read_spans(self._base, [row.asked for row in rows], [len(row.target) for row in rows])

    def _cast(self) -> AbstractContextManager[object]:
        if self.device.type == "cuda" and self._options.mixed_precision and torch.cuda.is_bf16_supported():
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def _drop(self, on: bool) -> None:
        """Dropout of the LoRA alone: the base is the model that is served. Blocks are told that they are in training only where
        transformers asks them, to recompute."""
        for layer in self._layers.values():
            layer.lora_dropout.train(on)
        if self._checkpointed:
            for block in self._base.model.get_submodule(self._base.layout.blocks).children():
                block.training = on


@contextmanager
def seat_student(base: Base, beneath: Sequence[Artifact], options: DistillOptions, start: LoraAdapter | None = None) -> Iterator[Student]:
    """A student that starts where `start` ended, or at the model beneath. The base is not touched, and neither is torch's random state.

    Args:
        beneath: artifacts that lie under the LoRA, in order.

    Raises:
        BaseMismatchError: an artifact or `start` is for another base, an artifact is attached to the base, or `start` was trained on others
            weights or with another rank.
        InputError: no such targets, a target that is not a projection of a block, or one that an artifact beneath changes.
        ModelError: a base that is partly outside of memory.
    """
    require_untouched(base)
    if any(parameter.device.type == "meta" for parameter in base.model.parameters()):
        raise ModelError("distillation: expected a base whose weights are all in memory, found some that are offloaded")
    shared = share_base(base)
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        layers = _adapt(shared, options)
    changed = {name for artifact in beneath for name in artifact.deltas}
    if met := sorted(changed & layers.keys()):
        raise InputError(
            f"distillation: expected targets that no artifact beneath changes, found {met[0]}; choose other targets than {_show(options)}"
        )
    checkpointed = _computes_twice(base, beneath, options)
    if checkpointed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name is younger than the oldest transformers we take
            shared.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    student = Student(shared, layers, options, checkpointed=checkpointed)
    if start is not None:
        student.load_factors(_read_start(base, start, student, options))
    with attach(shared, beneath):
        yield student


def _computes_twice(base: Base, beneath: Sequence[Artifact], options: DistillOptions) -> bool:
    """Whether activations are computed anew for the backward pass. Not with anything beside an MLP: torch runs that pass in a thread of its
    own, which does not know where the targets are (`errata.modeling.beside`)."""
    return options.gradient_checkpointing and base.device.type == "cuda" and all(artifact.deltas for artifact in beneath)


def _read_start(base: Base, start: LoraAdapter, student: Student, options: DistillOptions) -> Factors:
    found = (start.base, start.rank, start.alpha, tuple(sorted(start.a)))
    if found != (expected := (base.digest, options.r, options.alpha, tuple(sorted(student.targets)))):
        raise BaseMismatchError(f"start: expected an adapter of base, rank, alpha and weights {expected}, found {found}")
    return {f"{side}.{name}": factor for side, of in (("a", start.a), ("b", start.b)) for name, factor in of.items()}


def _adapt(base: Base, options: DistillOptions) -> dict[str, LoraLayer]:
    """Put LoRA into the model. Returns them by the name that the adapted parameter had before."""
    family = base.model.config.model_type
    targets = options.targets or USUAL_TARGETS.get(family)
    if targets is None:
        raise InputError(f"targets: expected names of modules, since PEFT has no usual ones for {family!r}, found none")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(targets),
        fan_in_fan_out=base.layout.transposed,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, at PEFT
            adapted = get_peft_model(base.model, config)
    except ValueError as error:
        raise InputError(f"targets: expected names of modules of this {family}, found {_show(options)} ({error})") from None
    assert isinstance(adapted, PeftModel)
    layers: dict[str, LoraLayer] = {}
    for path, module in base.model.named_modules():
        if isinstance(module, LoraLayer):
            inner = module.get_base_layer()
            stored = (Conv1D,) if base.layout.transposed else (nn.Linear,)
            if not path.startswith(f"{base.layout.blocks}.") or not isinstance(inner, stored):
                raise InputError(f"targets: expected projections in the blocks of this {family}, found {path} ({type(inner).__name__})")
            layers[f"{path}.weight"] = module
    return layers


def _show(options: DistillOptions) -> str:
    return "PEFT's usual ones" if options.targets is None else ", ".join(options.targets)
