"""What a distillation hands over: low-rank additions to weights (LoRA; Hu et al., 2021). This module travels inside every MLflow version.

An adapter is put on as a plain addition to the weights: exact, without cost at inference, and without PEFT, which only training needs.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch

from errata.editors.artifacts import Parts, pack_tensors, unpack_tensors
from errata.errors import FormatError
from errata.modeling.loading import Base
from errata.modeling.patch import add_deltas

_KIND = "lora_adapter"
_FORMAT = 1


@dataclass(frozen=True)
class LoraAdapter:
    """ΔW = (alpha / r)·B·A for some weights of one base."""

    base: str
    """Digest of the base it may be put on."""
    alpha: float
    a: Mapping[str, torch.Tensor]
    """Parameter name → A [r, d_in] float32."""
    b: Mapping[str, torch.Tensor]
    """Parameter name → B [d_out, r] float32. Same names and r as `a`."""
    student: tuple[str, ...] = ()
    """Digests of the artifacts beneath it that it was trained on, in order: only on top of them is it right."""
    absorbed: tuple[str, ...] = ()
    """Occurrences (`<edit id>@<seq>`) that it took in."""
    unlearned: tuple[str, ...] = ()
    """Occurrences that were live, and that it does not answer: what lies beneath it may have done so before."""

    @property
    def rank(self) -> int:
        return next(iter(self.a.values())).shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @cached_property
    def deltas(self) -> Mapping[str, torch.Tensor]:
        """Parameter name → scale·B·A [d_out, d_in] float32, multiplied in float64 when first asked for."""
        return {name: (self.scale * (self.b[name].double() @ a.double())).float() for name, a in self.a.items()}

    @property
    def written(self) -> Mapping[str, torch.Tensor]:
        return self.deltas

    @property
    def parts(self) -> Parts:
        return {}

    def attach(self, base: Base) -> AbstractContextManager[None]:
        """See `errata.modeling.patch.add_deltas`."""
        return add_deltas(base, self.deltas)

    def to_bytes(self) -> bytes:
        factors = {f"{side}.{name}": factor for side, of in (("a", self.a), ("b", self.b)) for name, factor in of.items()}
        tensors = {name: factor.detach().float().contiguous().cpu() for name, factor in factors.items()}
        metadata = {"base": self.base, "alpha": float(self.alpha), "student": self.student}
        metadata |= {"absorbed": self.absorbed, "unlearned": self.unlearned}
        return pack_tensors(_KIND, _FORMAT, tensors, metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises FormatError: not safetensors, another kind or a newer format, or factors that do not belong together."""
        tensors, metadata = unpack_tensors(data, _KIND, _FORMAT)
        a, b = ({name[2:]: tensors[name] for name in tensors if name.startswith(side)} for side in ("a.", "b."))
        if not a or a.keys() != b.keys() or len({*(t.shape[0] for t in a.values()), *(t.shape[1] for t in b.values())}) != 1:
            raise FormatError(f"expected {_KIND} with A and B of one rank for every weight, found {sorted(tensors)[:4]}")
        return cls(metadata["base"], metadata["alpha"], a, b, *(tuple(metadata[name]) for name in ("student", "absorbed", "unlearned")))
