"""What editing a base takes, before anything of it is loaded: bytes of each thing, where it will lie, whether there is room (design §11).

Weights, second moments, sums and pairs are counted exactly, from shapes. Activations are estimated, from what autograd keeps.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ByteSize, ConfigDict, TypeAdapter, ValidationError
from transformers import PreTrainedModel

from errata.editors.d4s.editor import CHUNK_TOKENS
from errata.editors.d4s.moments import BATCH_TOKENS
from errata.editors.d4s.state import HELD, count_snapshot, count_sums, keeps_pairs
from errata.errors import InputError, ModelError
from errata.modeling.layout import ModelLayout, find_layout
from errata.modeling.offload import list_free

_ROW = 16
"""Tokens of a row of an edit, its context included, that is as short as they come: many rows mean many predictions."""
_TARGET = 3
"""Tokens of its target."""
_LEAST = 256
"""Tokens of edits that are optimised side by side at least: below, a single edit may need more."""

Place = Literal["device", "memory", "disk"]


class Room(NamedTuple):
    """Bytes that can be had. On the CPU, `device` and `memory` are the same bytes."""

    device: int
    memory: int
    disk: int
    shared: bool
    """Whether the device computes in main memory."""


class Line(BaseModel):
    """One thing that needs room."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: str
    """When: things of other phases are gone by then, but for those that stay (`always`) and what is on the disk."""
    what: str
    place: Place
    bytes: int
    fits: bool
    """Whether it does beside what stays and what is listed before it in its phase and place."""


class Plan(BaseModel):
    """What it takes to write `edits` edits into one base."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    editor: str
    family: str
    dtype: str
    parameters: int
    layers: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    """[d_out, d_in] of each edited weight."""
    spread: str
    edits: int
    pair_bytes: int
    """Of one edit's pair, float32."""
    layer_bytes: int
    """Of one layer's sums, rk and kk in float64; the widest layer's."""
    chunk_tokens: int
    """Padded tokens of edits that are optimised side by side."""
    hoards: bool
    """Whether float64 factors of all edited layers are kept between solves."""
    lines: tuple[Line, ...]
    room: dict[Place, int]

    @property
    def fits(self) -> bool:
        return all(line.fits for line in self.lines)

    def require_fit(self) -> None:
        """Raises ModelError: something has no room; what it is, and what to do."""
        for line in self.lines:
            if not line.fits:
                there = sum(other.bytes for other in self.lines if other.place == line.place and other.phase in ("always", line.phase))
                raise ModelError(
                    f"plan: expected room for {line.what} ({line.phase}): {spell_bytes(there)} in all on the {line.place}, found "
                    f"{spell_bytes(self.room[line.place])}; {_ADVICE[line.place]}"
                )


_ADVICE: dict[Place, str] = {
    "device": 'device_map = "auto" leaves blocks in main memory and on the disk; fewer layers or bf16 weights take less',
    "memory": "a machine with more memory, or a profile with fewer layers",
    "disk": "free some, or point `cache` and `root` elsewhere",
}


def find_room(device: torch.device, disk: int, device_memory: int | None = None) -> Room:
    """What this machine has now.

    Args:
        device_memory: bytes to plan with instead of what the device has free.
    """
    free = list_free(device)
    if device_memory is not None:
        return Room(device_memory, free["cpu"], disk, False)
    if device.type == "cpu":
        return Room(free["cpu"], free["cpu"], disk, True)
    return Room(free.get(device.index or 0, free["cpu"]), free["cpu"], disk, False)


def count_weights(model: PreTrainedModel) -> int:
    """Bytes of a model's parameters and buffers, tied ones once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def count_factors(shapes: Sequence[tuple[int, int]]) -> int:
    """Bytes of the factors of C and of λC + kk of all layers, which solving the next batch wants again."""
    return sum(2 * 8 * d_in * d_in for _, d_in in shapes)


def can_hoard(shapes: Sequence[tuple[int, int]]) -> bool:
    """Whether factors of all layers may stay in memory: a quarter of what is free now."""
    return bool(count_factors(shapes) <= list_free(torch.device("cpu"))["cpu"] // 4)


def make_plan(
    model: PreTrainedModel,
    layers: Sequence[int],
    spread: str,
    room: Room,
    *,
    edits: int = 1_000,
    offloads: bool = False,
    layout: ModelLayout | None = None,
) -> Plan:
    """Count everything.

    Args:
        model: with its weights or without (`sketch_model`).
        layers: edited ones, ascending.
        edits: live at once.
        offloads: blocks that do not fit on the device go to main memory, then to the disk (`device_map = "auto"`).

    Raises:
        UnknownArchitectureError: no layout for its family, or no such layer.
    """
    layout = layout or find_layout(model)
    weights = [layout.read_weight(model, layer) for layer in layers]
    shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
    d_out, width = shapes[-1][0], max(d_in for _, d_in in shapes)
    squares, deltas = [d_in * d_in for _, d_in in shapes], sum(d_out * d_in for d_out, d_in in shapes)
    pair = 4 * (d_out + sum(d_in for _, d_in in shapes))
    layer_sums = max(8 * (d_out + d_in) * d_in for d_out, d_in in shapes)
    sums = count_sums(shapes, crossed=spread == "refresh")
    few = keeps_pairs(edits, [d_in for _, d_in in shapes])
    hoards = count_factors(shapes) <= room.memory // 4
    whole = few or sums <= HELD
    lines = _Lines(room)
    measuring = count_forward(model, width)
    least = count_activations(model, layout, max(layers), _LEAST)
    at_work = max(least, sum(8 * square for square in squares) + 8 * max(squares) + measuring)
    on_device = _place_weights(lines, model, room, at_work if offloads else None)
    lines.add("measure", f"second moments C of {len(layers)} layers, float64 until they are stored", "device", sum(8 * n for n in squares))
    lines.add("measure", "one batch's part of them", "device", 8 * max(squares))
    lines.add("measure", f"activations of {BATCH_TOKENS:,} tokens (estimate)", "device", measuring)
    chunk = choose_chunk(model, layout, max(layers), room.device - on_device)
    optimising = count_activations(model, layout, max(layers), chunk)
    lines.add("optimise", f"activations of {chunk:,} tokens of edits (estimate)", "device", optimising)
    lines.add("solve", "C of one layer, float32, mapped from the disk", "memory", 4 * max(squares))
    lines.add("solve", "the system of one layer and its factor, float64", "memory", 2 * 8 * max(squares))
    if hoards:
        lines.add("solve", "factors of all layers, kept", "memory", count_factors(shapes))
    if few:
        lines.add("solve", f"the pairs of {edits:,} edits, which are fewer than sums", "memory", edits * pair)
    elif whole:
        lines.add("solve", "sums rk and kk of all layers, and those before them", "memory", 2 * sums)
    else:
        lines.add("solve", "rk and kk of one layer, float64, and what is added to them", "memory", 2 * layer_sums)
        lines.add("solve", "pairs that wait to be summed, at most", "memory", layer_sums)
    if spread == "refresh":
        lines.add("solve", "solved deltas of all layers, float64", "memory", 8 * deltas)
    lines.add("solve", "the artifact, float32, and its bytes", "memory", 2 * 4 * deltas)
    lines.add("attach", "the artifact", "memory", 4 * deltas)
    lines.add("attach", "edited weights beside the base's own", "device", sum(weight.numel() * weight.element_size() for weight in weights))
    lines.add("attach", "W0 + Δ of one layer, float64", "device", 3 * 8 * max(d_out * d_in for d_out, d_in in shapes))
    lines.add("always", f"C of {len(layers)} layers, float32", "disk", 4 * sum(squares))
    lines.add("always", f"pairs of {edits:,} edits, float32", "disk", edits * pair)
    lines.add("always", "one snapshot of the state", "disk", edits * pair if few else count_snapshot(shapes, crossed=spread == "refresh"))
    if not whole:
        lines.add("always", "sums that are written on the way", "disk", sums)
    lines.add("always", "one artifact, float32", "disk", 4 * deltas)
    return Plan(
        editor="d4s",
        family=model.config.model_type,
        dtype=str(weights[0].dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=tuple(layers),
        shapes=tuple(shapes),
        spread=spread,
        edits=edits,
        pair_bytes=pair,
        layer_bytes=layer_sums,
        chunk_tokens=chunk,
        hoards=hoards,
        lines=tuple(lines.made),
        room={"device": room.device, "memory": room.memory, "disk": room.disk},
    )


def plan_neurons(model: PreTrainedModel, layer: int, room: Room, *, edits: int = 1_000, offloads: bool = False) -> Plan:
    """As `make_plan`, for an editor that writes neurons beside one layer: weights and second moments are not in it."""
    layout = find_layout(model)
    weight, head = layout.read_weight(model, layer), model.get_parameter(f"{layout.head}.weight")
    width, pair = head.shape[1], 2 * 4 * head.shape[1] * _TARGET
    lines = _Lines(room)
    measuring = count_forward(model, weight.shape[1])
    on_device = _place_weights(lines, model, room, measuring if offloads else None)
    chunk = choose_chunk(model, layout, layer, room.device - on_device)
    lines.add("prepare", f"activations of {BATCH_TOKENS:,} tokens (estimate)", "device", measuring)
    lines.add("solve", f"keys and values of {edits:,} edits of {_TARGET} tokens, float32", "memory", edits * pair)
    lines.add("attach", "keys and values where the model answers", "device", edits * pair)
    lines.add("always", f"pairs of {edits:,} edits, float32", "disk", edits * pair)
    lines.add("always", "blocks of neurons, float32", "disk", edits * pair)
    return Plan(
        editor="ireva",
        family=model.config.model_type,
        dtype=str(weight.dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=(layer,),
        shapes=((width, width),),
        spread="single",
        edits=edits,
        pair_bytes=pair,
        layer_bytes=0,
        chunk_tokens=chunk,
        hoards=False,
        lines=tuple(lines.made),
        room={"device": room.device, "memory": room.memory, "disk": room.disk},
    )


def _place_weights(lines: "_Lines", model: PreTrainedModel, room: Room, at_work: int | None) -> int:
    """Note where the base's weights lie; bytes of them on the device.

    Args:
        at_work: bytes that are to stay free there, where blocks that do not fit go elsewhere; None where none does.
    """
    total = count_weights(model)
    if at_work is None:
        lines.add("always", "weights", "device", total)
        return total
    on_device = min(total, max(room.device - at_work, 0))
    in_memory = 0 if room.shared else min(total - on_device, room.memory // 2)
    lines.add("always", "weights on the device", "device", on_device)
    lines.add("always", "weights in main memory, moved block by block", "memory", in_memory)
    lines.add("always", "weights on the disk, read block by block", "disk", total - on_device - in_memory)
    return on_device


def choose_chunk(model: PreTrainedModel, layout: ModelLayout, top: int, free: int) -> int:
    """Padded tokens of edits to optimise side by side in `free` bytes: `CHUNK_TOKENS`, or as often half of them as it takes."""
    tokens = CHUNK_TOKENS
    while tokens > _LEAST and count_activations(model, layout, top, tokens) > free:
        tokens //= 2
    return tokens


def count_activations(model: PreTrainedModel, layout: ModelLayout, top: int, tokens: int) -> int:
    """About the bytes that one step of optimising a chunk of edits keeps: the blocks above layer `top` with what autograd saves of them
    from the subject on, which half of the tokens are taken to be; cached keys and values before it; predictions."""
    sizes = _Sizes.of(model, layout.read_weight(model, top).shape[1])
    above = max(layout.count_layers(model) - 1 - top, 1)
    # Of a frozen projection nothing is saved; norms, attention and the MLP's product or activation save what they read. Measured by
    # tests/unit/test_plan.py with autograd's own hooks.
    block = 8 * sizes.hidden + 4 * sizes.cached + 6 * sizes.inner
    past = 2 * 2 * sizes.cached
    return tokens // 2 * sizes.bytes * (above * (block + past) + 8 * sizes.hidden) + count_predictions(model, tokens)


def count_predictions(model: PreTrainedModel, tokens: int) -> int:
    """Of that, what the distributions over the vocabulary take, if rows are short and many."""
    width = next(model.parameters()).element_size()
    return int(tokens // _ROW * (_TARGET + 1) * model.config.vocab_size * (2 * width + 3 * 4))


def count_forward(model: PreTrainedModel, inner: int) -> int:
    """About what one pass without gradients keeps at once, in blocks that are done with theirs when the next begins; and of the
    keys that are taken out in float64."""
    sizes = _Sizes.of(model, inner)
    return BATCH_TOKENS * (sizes.bytes * (8 * sizes.hidden + 4 * sizes.inner) + 8 * sizes.inner)


class _Sizes(NamedTuple):
    hidden: int
    cached: int
    """Width of a block's keys, and of its values."""
    inner: int
    bytes: int
    """Of one activation."""

    @classmethod
    def of(cls, model: PreTrainedModel, inner: int) -> "_Sizes":
        config: Any = model.config
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        cached = (getattr(config, "num_key_value_heads", None) or heads) * head
        return cls(config.hidden_size, cached, inner, next(model.parameters()).element_size())


class _Lines:
    """Lines as they are added, each judged beside those before it."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self.made: list[Line] = []

    def add(self, phase: str, what: str, place: Place, size: int) -> None:
        # A CPU's device and main memory are one.
        places: tuple[Place, ...] = ("device", "memory") if self._room.shared and place != "disk" else (place,)
        taken = sum(line.bytes for line in self.made if line.place in places and line.phase in ("always", phase))
        fits = taken + size <= getattr(self._room, place)
        self.made.append(Line(phase=phase, what=what, place=place, bytes=size, fits=fits))


def spell_bytes(size: int) -> str:
    """`1.3GiB`."""
    return ByteSize(size).human_readable()


def read_bytes(text: str) -> int:
    """Bytes of `24GiB`, `80 GB` or a plain number.

    Raises:
        InputError: it is none.
    """
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise InputError(f"expected bytes such as 24GiB, found {text!r}") from None
