"""What an edit costs: seconds and CPU-seconds per edit for keys, z and solve, beside the plain computation in the same run.

    python -m benchmarks.edit_speed [--model builtin|gpt2|both] [--batches 1,10,100] [--plain 2]

`builtin` is the built-in base with its own profile. `gpt2` is a random model of GPT-2 small's shape (12 layers, 768 wide; edit layers
0–4, 20 steps, six contexts of about ten tokens): random weights cost what trained ones cost, as long as no edit ends early, which none
does here. One thread. The plain computation is `benchmarks.reference`: one edit at a time, whole model, all logits, LU solve.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, Literal
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.common import load_builtin
from benchmarks.reference import compute_keys, compute_residual, solve_plain
from errata.builtin import CAVEAT
from errata.editors.base import Pairs
from errata.editors.d4s import editor as d4s_editor
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments
from errata.edits import Edit
from errata.modeling.loading import Base, hold_base
from errata.profiles import PrepareOptions, Profile, SolveOptions

STAGES = ("keys", "z", "solve")
_PUBLISHED = "The published MEMIT code on this shape, one thread, measured elsewhere: 19.5 CPU-seconds per edit, 71–94 % of it z."
_CONTEXTS = (
    "{}",
    "The other day I was thinking about the weather. {}",
    "Therefore we went to the house of my friend. {}",
    "Because of the rain they had to stay inside. {}",
    "I do not know what you want from me. {}",
    "You can see the river from the old bridge. {}",
)

out = Console(width=110)


class Stopwatch:
    """Wall and CPU seconds by stage."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall[name] += time.perf_counter() - wall
            self.cpu[name] += time.process_time() - cpu

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return timed


def run(
    model: Annotated[Literal["builtin", "gpt2", "both"], typer.Option(help="What to edit.")] = "both",
    batches: Annotated[str, typer.Option(help="Edits per batch, comma-separated.")] = "1,10,100",
    plain: Annotated[int, typer.Option(min=1, help="Edits of the plain computation.")] = 2,
) -> None:
    torch.set_num_threads(1)
    sizes = [int(size) for size in batches.split(",")]
    if model in ("builtin", "both"):
        base, editor, world = load_builtin()
        profile = editor._profile  # the plain computation needs the options themselves
        edits = world.make_edits(max(*sizes, plain), 0, "distinct")
        out.print(f"[dim]{CAVEAT}[/]")
        _compare("the built-in base", base, editor, profile, editor._moments, edits, sizes, plain)
    if model in ("gpt2", "both"):
        base, editor, profile, moments, edits = make_random_gpt2(max(*sizes, plain))
        _compare("a random model of GPT-2 small's shape", base, editor, profile, moments, edits, sizes, plain)
        out.print(f"[dim]{_PUBLISHED}[/]")


def make_random_gpt2(count: int) -> tuple[Base, D4S, Profile, Moments, list[Edit]]:
    """GPT-2 small's shape with random weights, a byte-level vocabulary made in place, and edits for it."""
    first = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas")
    last = ("Keller", "Lindt", "Moser", "Novak", "Olsen", "Peters", "Quint", "Rossi", "Sommer", "Tanner")
    prompts = ("{} plays the sport of", "The mother tongue of {} is", "{} works in the city of", "The favourite colour of {} is")
    targets = ("tennis", "French", "Paris", "green", "chess", "Danish", "New York", "red")
    names = [f"{a} {b}" for a in first for b in last]
    edits = [
        Edit(id=str(index), subject=names[index % 100], prompt=prompts[index % 4], target_new=targets[index % 8]) for index in range(count)
    ]
    texts = [f"{edit.rewrite_prompt} {edit.target_new}." for edit in edits] + [context.replace("{}", "") for context in _CONTEXTS]
    torch.manual_seed(0)
    base = hold_base(GPT2LMHeadModel(GPT2Config()), _train_tokenizer(texts))
    prepare = PrepareOptions(layers=(0, 1, 2, 3, 4), contexts=_CONTEXTS, steps=20)
    width = base.layout.read_weight(base.model, 0).shape[1]
    sample = torch.randn(width + 1_000, width)
    moments = Moments(base.digest, "random", 0, len(sample), dict.fromkeys(prepare.layers, sample.T @ sample / len(sample)))
    profile = Profile(base=base.digest, prepare=prepare, solve=SolveOptions(lam=15_000, spread="even", moments="random"))
    return base, D4S(profile, moments, base.layout), profile, moments, edits


def _train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2_000, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def _compare(
    title: str, base: Base, editor: D4S, profile: Profile, moments: Moments, edits: Sequence[Edit], sizes: Sequence[int], plain: int
) -> None:
    editor.prepare(base, edits[:1])  # warm-up, not measured
    solves = _measure_solves(base, editor, profile)
    # Small batches are repeated over the edits of the plain computation: one alone says little on a busy machine.
    counts = {size: max(size, plain // size * size) for size in sizes}
    measured = {size: _measure(base, editor, edits[:count], size) for size, count in counts.items()}
    slow, slow_solve = _measure_plain(base, profile, moments, edits[:plain])
    table = Table(title=f"{title}: CPU-seconds per edit (wall-clock seconds), {torch.get_num_threads()} thread", title_justify="left")
    for name in ("batch", *STAGES, "all", "z of it", "plain / ours"):
        table.add_column(name, justify="right")
    for size, watch in measured.items():
        reference = sum(slow.cpu.values()) / plain + slow_solve.cpu["solve"] / size
        table.add_row(str(size), *_describe(watch, counts[size]), f"{reference * counts[size] / watch.cpu['all']:.1f} ×")
    for size in sizes:
        watch = Stopwatch()
        for name in STAGES:
            share = 1 / size if name == "solve" else 1 / plain
            source = slow_solve if name == "solve" else slow
            watch.wall[name], watch.cpu[name] = source.wall[name] * share, source.cpu[name] * share
        watch.wall["all"], watch.cpu["all"] = sum(watch.wall.values()), sum(watch.cpu.values())
        table.add_row(f"plain, {size}", *_describe(watch, 1), "", style="dim")
    out.print(table)
    out.print(
        "[dim]CPU-seconds of one solve by the edits a stream holds: "
        + ", ".join(f"{live} {seconds:.2f}" for live, seconds in solves.items())
        + f" (the first includes the factors of C, made once per process). Plain: {plain} edits one by one, one LU solve per batch. "
        "Evaluation and commit: `python -m benchmarks.growth`.[/]"
    )


def _measure_solves(base: Base, editor: D4S, profile: Profile) -> dict[str, float]:
    """Solving random pairs: what they hold does not matter to the time."""
    shapes = {layer: base.layout.read_weight(base.model, layer).shape for layer in profile.prepare.layers}
    d_out, d_in = shapes[profile.prepare.layers[0]]
    seconds = {}
    for count in (1, 1, 100, d_in // 4, d_in // 4 + 1):
        keys = {layer: torch.randn(count, d_in) for layer in shapes}
        pairs = Pairs(base.digest, profile.prepare.digest, tuple((str(row),) for row in range(count)), torch.randn(count, d_out), keys)
        state, watch = editor.merge(editor.empty_state(), pairs, None), Stopwatch()
        with watch.stage("solve"):
            editor.solve(state)
        form = "sums" if state.pairs is None else "pairs"
        seconds["first" if not seconds else f"{count} ({form})"] = watch.cpu["solve"]
    return seconds


def _measure(base: Base, editor: D4S, edits: Sequence[Edit], size: int) -> Stopwatch:
    """Batches of `size` through the product's own code: prepare, merge, solve, each into an empty stream."""
    watch = Stopwatch()
    with ExitStack() as stack:
        stack.enter_context(patch.object(d4s_editor, "read_base", watch.around("keys", d4s_editor.read_base)))
        stack.enter_context(patch.object(d4s_editor, "optimise_targets", watch.around("z", d4s_editor.optimise_targets)))
        stack.enter_context(watch.stage("all"))
        for start in range(0, len(edits), size):
            prepared = editor.prepare(base, edits[start : start + size])
            assert prepared.pairs is not None and not prepared.refused
            with watch.stage("solve"):
                editor.solve(editor.merge(editor.empty_state(), prepared.pairs, None))
    return watch


def _measure_plain(base: Base, profile: Profile, moments: Moments, edits: Sequence[Edit]) -> tuple[Stopwatch, Stopwatch]:
    """Stages of all `edits` together, and of one solve."""
    watch, solve = Stopwatch(), Stopwatch()
    residuals, keys = [], []
    for edit in edits:
        with watch.stage("z"):
            residuals.append(compute_residual(base, edit, profile.prepare).residual)
        with watch.stage("keys"):
            keys.append(compute_keys(base, edit, profile.prepare))
    stacked = {layer: torch.stack([key[layer] for key in keys]) for layer in profile.prepare.layers}
    with solve.stage("solve"):
        solve_plain(torch.stack(residuals), stacked, moments.c, profile.solve.lam, len(profile.prepare.layers))
    return watch, solve


def _describe(watch: Stopwatch, edits: int) -> list[str]:
    cells = [f"{watch.cpu[name] / edits:.3f} ({watch.wall[name] / edits:.3f})" for name in (*STAGES, "all")]
    return [*cells, f"{watch.cpu['z'] / watch.cpu['all']:.0%}"]


if __name__ == "__main__":
    typer.run(run)
