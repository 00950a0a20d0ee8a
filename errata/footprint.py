"""What carrying edits to a base takes, before it is tried."""

from pydantic import BaseModel, ConfigDict

from errata.modeling.loading import Base
from errata.profiles import Profile


class Estimate(BaseModel):
    """Of a rebase."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    edits: int
    """Live edits to carry over."""
    answered: tuple[str, ...]
    """Occurrences whose answer the base gives without them."""
    pairs: int
    """That they need; edits of one subject may share one."""
    prepared: int
    """Pairs that are stored already, by this estimate or by an interrupted run."""
    seconds: float | None
    """Wall time of preparing the others here, at the pace of those that were timed; None where none was."""
    base_bytes: int
    """Of the base model's weights."""
    sum_bytes: int
    """See `count_sums`."""


def count_weights(base: Base) -> int:
    """Bytes of a base model in memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*base.model.parameters(), *base.model.buffers()))


def count_sums(base: Base, profile: Profile) -> int:
    """Bytes of solving a state of many edits, the most that is in memory at once besides the base: rk and kk in float64 and C in float32
    of every layer, and the factor of one with its copy; where the residual is refreshed, also kx of every two layers and the solved deltas,
    in float64."""
    total, largest = 0, 0
    widths: list[int] = []
    for layer in profile.prepare.layers:
        d_out, d_in = base.layout.read_weight(base.model, layer).shape
        total += 8 * (d_out * d_in + d_in * d_in) + 4 * (d_in * d_in + d_out * d_in)
        if profile.solve.spread == "refresh":
            total += 8 * (d_out * d_in + d_in * sum(widths))
        largest = max(largest, 2 * 8 * d_in * d_in)
        widths.append(d_in)
    return total + largest
