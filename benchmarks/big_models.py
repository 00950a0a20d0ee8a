"""What 1,000 edits take on random models of GPT-2 XL's and GPT-J's shape: seconds per edit by stage, memory, share of the peak.

    python -m benchmarks.big_models --shape gpt2-xl [--dtypes float32,bfloat16] [--edits 1000] [--batch 100] [--device auto]
    python -m benchmarks.big_models --shape toy --edits 40 --batch 20          # tries the benchmark itself, on any CPU

Subjects, prompts and targets are random words of a vocabulary made in place: times and bytes are those of a real model, answers mean
nothing. FLOPs of one batch are counted by torch while its z are optimised, forward and backward, and set against the same stage of the
batches after it and a large matrix product in the same dtype on the same device.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.common import Stopwatch
from benchmarks.opening import read_peak, reset_peak
from errata.editors.d4s import editor as d4s
from errata.editors.d4s.moments import collect_moments
from errata.edits import Edit
from errata.evaluation.metrics import all_correct
from errata.evaluation.scoring import score_targets
from errata.modeling.loading import Base, choose_device, hold_base
from errata.modeling.patch import attach
from errata.monitors.norms import measure_casting
from errata.profiles import PrepareOptions, Profile, SolveOptions
from errata.report import Casting
from tasks._session import quiet_transformers

SHAPES: dict[str, tuple[dict[str, Any], tuple[int, ...], float]] = {
    "gpt2-xl": (
        {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50_257, "n_positions": 1024},
        tuple(range(13, 18)),
        20_000,
    ),
    "gptj": (
        {"model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64, "vocab_size": 50_400, "n_positions": 2048},
        tuple(range(3, 9)),
        15_000,
    ),
    "toy": ({"model_type": "gpt2", "n_embd": 64, "n_layer": 6, "n_head": 4, "vocab_size": 2_000, "n_positions": 128}, (2, 3), 100),
}
"""Configuration, edited layers and λ, the latter two as published for it (algorithms.md §1.2)."""
_WORDS = 1_900
_CONTEXTS = 6
_STAGES = ("keys", "z", "merge", "solve", "evaluate")

out = Console(width=140)


def run(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "gpt2-xl",
    dtypes: Annotated[str, typer.Option(help="Of the weights, comma-separated.")] = "float32,bfloat16",
    edits: Annotated[int, typer.Option(min=1)] = 1_000,
    batch: Annotated[int, typer.Option(min=1, help="Edits prepared, solved and evaluated together.")] = 100,
    tokens: Annotated[int, typer.Option(min=1, help="Keys counted for second moments.")] = 20_000,
    device: Annotated[str, typer.Option(help="As in errata.toml.")] = "auto",
) -> None:
    if shape not in SHAPES:
        raise typer.BadParameter(f"expected one of {', '.join(SHAPES)}, found {shape!r}")
    place = choose_device(device)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    table = Table(title=f"{edits:,} edits in batches of {batch} on a random model of {shape}'s shape, {name}")
    table.add_column("weights")
    measured = {}
    for dtype in dtypes.split(","):
        table.add_column(dtype, justify="right")
        measured[dtype] = _measure(shape, getattr(torch, dtype), edits, batch, tokens, place)
        if place.type == "cuda":
            torch.cuda.empty_cache()
    for row in next(iter(measured.values())):
        table.add_row(row, *(facts[row] for facts in measured.values()))
    out.print(table)


def _measure(shape: str, dtype: torch.dtype, edits: int, batch: int, tokens: int, device: torch.device) -> dict[str, str]:
    quiet_transformers()
    config, layers, lam = SHAPES[shape]
    rng = random.Random(0)
    base = make_base(config, dtype, device)
    _reset(device)
    watch = Stopwatch()
    with _stage(watch, "moments", device):
        moments = collect_moments(base, layers, _write_texts(rng, tokens), max_tokens=tokens)
    contexts = ("{}", *(f"{_say(rng, 8)} {{}}" for _ in range(_CONTEXTS - 1)))
    prepare = PrepareOptions(layers=layers, contexts=contexts, lr=0.5, stop_loss=0.0)
    profile = Profile(base=base.digest, prepare=prepare, solve=SolveOptions(lam=lam, spread="even", moments="-"))
    editor = d4s.D4S(profile, moments, base.layout)
    stream = make_edits(rng, edits)
    state, flops, counted, took = editor.empty_state(), 0.0, 0, 0
    artifact = None
    for start in range(0, len(stream), batch):
        part = stream[start : start + batch]
        # The counter slows what it counts, so the first batch is counted, and the others are timed; a single one is done twice.
        if not start:
            flops = _count_flops(lambda part=part: editor.prepare(base, part)) / len(part)
            if len(stream) > batch:
                state = editor.merge(state, editor.prepare(base, part).pairs, None)
                continue
        with _timed(watch, device):
            prepared = editor.prepare(base, part)
        with _stage(watch, "merge", device):
            state = editor.merge(state, prepared.pairs, None)
        with _stage(watch, "solve", device):
            artifact = editor.solve(state)
        assert artifact is not None, "the state has edits"
        with _stage(watch, "evaluate", device), attach(base, [artifact]):
            asked = [(edit.rewrite_prompt, edit.target_new) for edit in part]
            scored = score_targets(base, asked, batch_tokens=16_384)
            took += sum(all_correct(scored[row].chosen, scored[row].target) for row in asked)
        counted += len(part)
    assert artifact is not None
    peak, memory = measure_peak(dtype, device), _read_memory(device)
    casting = _measure_casting(base, artifact.deltas)
    rate = flops * counted / watch.wall["z"]
    each = {stage: watch.wall[stage] / counted for stage in _STAGES}
    return {
        "second moments, s": f"{watch.wall['moments']:.1f}",
        **{f"{stage}, s/edit": f"{seconds:.4f}" for stage, seconds in each.items()},
        "all, s/edit": f"{sum(each.values()):.4f}",
        "most memory, GiB": f"{memory:.2f}",
        "z, TFLOP/edit": f"{flops / 1e12:.4f}",
        "z, TFLOP/s": f"{rate / 1e12:.3f}",
        "matrix product, TFLOP/s": f"{peak / 1e12:.3f}",
        "share of it": f"{rate / peak:.1%}",
        "took": f"{took / counted:.2f}",
        "cast off by": "–" if casting is None else f"{casting.error:.1%}",
    }


def make_base(config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Base:
    """A random model with a vocabulary of words `w0`, `w1`, …, one token each."""
    words = ["<|endoftext|>", "a", "b", "is", *(f"w{index}" for index in range(_WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    known = {name: value for name, value in config.items() if name != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **known, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(made, dtype=dtype)
    return hold_base(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>"))


def make_edits(rng: random.Random, count: int) -> list[Edit]:
    """Subjects of two words, prompts of six, targets of one."""
    return [
        Edit(id=str(index), subject=_say(rng, 2), prompt=f"{_say(rng, 2)} {{}} {_say(rng, 4)}", target_new=_say(rng, 1))
        for index in range(count)
    ]


def measure_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square matrix product, the best of ten."""
    size = 8_192 if device.type == "cuda" else 1_024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        _wait(device)
        begun = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def _say(rng: random.Random, words: int) -> str:
    return " ".join(f"w{rng.randrange(_WORDS)}" for _ in range(words))


def _write_texts(rng: random.Random, tokens: int) -> list[str]:
    return [_say(rng, 100) for _ in range(tokens // 100 + 1)]


def _count_flops(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


@contextmanager
def _stage(watch: Stopwatch, name: str, device: torch.device) -> Iterator[None]:
    """A stage that begins and ends when the device has done what it was asked."""
    _wait(device)
    with watch.stage(name):
        yield
        _wait(device)


@contextmanager
def _timed(watch: Stopwatch, device: torch.device) -> Iterator[None]:
    """`D4S.prepare` with its two parts timed: reading keys, optimising z."""

    def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*values: Any) -> Any:
            with _stage(watch, name, device):
                return function(*values)

        return timed

    with (
        patch.object(d4s, "read_base", around("keys", d4s.read_base)),
        patch.object(d4s, "optimise_targets", around("z", d4s.optimise_targets)),
    ):
        yield


def _measure_casting(base: Base, deltas: Mapping[str, torch.Tensor]) -> Casting | None:
    parts = []
    for name, delta in deltas.items():
        weight = base.model.get_parameter(name).detach()
        parts.append(measure_casting(weight, base.layout.orient(delta).to(weight.device)))
    return Casting.over([part for part in parts if part])


def _reset(device: torch.device) -> None:
    reset_peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _read_memory(device: torch.device) -> float:
    """Most that was held since `_reset`, in GiB: on the accelerator, else resident in main memory."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else read_peak() / 1024


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    typer.run(run)
