"""What an edit costs: seconds and CPU-seconds for z, keys, solve, evaluation and commit, beside the plain computation in the same run.

    python -m benchmarks.edit_speed [--model builtin|gpt2|both] [--batches 1,10,100] [--plain 2]

`builtin` is the built-in base with its own profile. `gpt2` is a random model of GPT-2 small's shape (12 layers, 768 wide; edit layers
0–4, 20 steps, six contexts of about ten tokens): random weights cost what trained ones cost, as long as no edit ends early, which none
does here. One thread. The plain computation is `benchmarks.reference`: one edit at a time, whole model, all logits, LU solve.

Evaluation is that of the batch's own edits, with their paraphrases and neighbours and the fixed probe of locality; retention is not in
it. Commit is what a batch leaves in a stream on local storage, each object synced to disk; the model version in MLflow is not in it.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.common import Stopwatch, load_builtin
from benchmarks.reference import compute_keys, compute_residual, solve_plain
from errata.builtin import CAVEAT
from errata.candidates import start_manifest
from errata.editors.artifacts import WeightDelta
from errata.editors.base import Pairs
from errata.editors.d4s import editor as d4s_editor
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments
from errata.edits import Edit, Probe, canonical_json
from errata.evaluation.evaluate import evaluate_candidate
from errata.manifests import Change, Manifest, StateRef, extend_recipe
from errata.modeling.loading import Base, hold_base
from errata.monitors.locality import PROBE_TEXTS
from errata.profiles import PrepareOptions, Profile, SolveOptions
from errata.report import Report
from errata.settings import EvaluateSettings, load_settings
from errata.world import FILLER
from registry.commit import commit
from registry.events import EditsCommit, InitCommit
from registry.rows import BatchRow, FileUse, Outcome
from registry.stream import Stream, create_stream
from tasks.committing import describe_writer

PLAIN = ("z", "keys", "solve")
"""Stages that the plain computation has, too."""
STAGES = (*PLAIN, "evaluation", "commit")
_PUBLISHED = "The published MEMIT code on this shape, one thread, measured elsewhere: 19.5 CPU-seconds per edit, 71–94 % of it z."
_BUILTIN_PLAIN = 20
"""Least edits of the plain computation on the built-in base: one takes a few hundredths of a second, too short to be timed alone."""
_CONTEXTS = (
    "{}",
    "The other day I was thinking about the weather. {}",
    "Therefore we went to the house of my friend. {}",
    "Because of the rain they had to stay inside. {}",
    "I do not know what you want from me. {}",
    "You can see the river from the old bridge. {}",
)

out = Console(width=110)


@dataclass(frozen=True)
class Case:
    """A model and what is written into it."""

    title: str
    base: Base
    editor: D4S
    profile: Profile
    moments: Moments
    edits: Sequence[Edit]
    probe_texts: Sequence[str]


def run(
    model: Annotated[Literal["builtin", "gpt2", "both"], typer.Option(help="What to edit.")] = "both",
    batches: Annotated[str, typer.Option(help="Edits per batch, comma-separated.")] = "1,10,100",
    plain: Annotated[int, typer.Option(min=1, help="Edits of the plain computation.")] = 2,
) -> None:
    torch.set_num_threads(1)
    sizes = [int(size) for size in batches.split(",")]
    if model in ("builtin", "both"):
        out.print(f"[dim]{CAVEAT}[/]")
        enough = max(plain, _BUILTIN_PLAIN)
        _compare(make_builtin(max(*sizes, enough)), sizes, enough)
    if model in ("gpt2", "both"):
        _compare(make_random_gpt2(max(*sizes, plain)), sizes, plain)
        out.print(f"[dim]{_PUBLISHED}[/]")


def make_builtin(count: int) -> Case:
    """The built-in base and edits of its world, with paraphrases and neighbours of their own."""
    base, editor, world = load_builtin()
    # The plain computation needs the options themselves.
    return Case("built-in base", base, editor, editor._profile, editor._moments, world.make_edits(count, 0, "distinct"), FILLER)


def make_random_gpt2(count: int) -> Case:
    """GPT-2 small's shape with random weights, a byte-level vocabulary made in place, and edits for it."""
    first = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas")
    last = ("Keller", "Lindt", "Moser", "Novak", "Olsen", "Peters", "Quint", "Rossi", "Sommer", "Tanner")
    prompts = ("{} plays the sport of", "The mother tongue of {} is", "{} works in the city of", "The favourite colour of {} is")
    targets = ("tennis", "French", "Paris", "green", "chess", "Danish", "New York", "red")
    names = [f"{a} {b}" for a in first for b in last]
    edits = []
    for index in range(count):
        # Every hundred edits each person gets the next prompt, so that no edit replaces another.
        prompt, true = prompts[(index + index // 100) % 4], targets[(index + 1) % 8]
        edits.append(
            Edit(
                id=str(index),
                subject=names[index % 100],
                prompt=prompt,
                target_new=targets[index % 8],
                target_true=true,
                paraphrase_prompts=(f"They say it again: {prompt.format(names[index % 100])}",),
                neighborhood_prompts=tuple(Probe(prompt=prompt.format(names[(index + i) % 100]), answers=(true,)) for i in (1, 2)),
            )
        )
    texts = [f"{edit.paraphrase_prompts[0]} {edit.target_new}." for edit in edits] + [context.replace("{}", "") for context in _CONTEXTS]
    texts += PROBE_TEXTS
    torch.manual_seed(0)
    base = hold_base(GPT2LMHeadModel(GPT2Config()), _train_tokenizer(texts))
    prepare = PrepareOptions(layers=(0, 1, 2, 3, 4), contexts=_CONTEXTS, steps=20)
    width = base.layout.read_weight(base.model, 0).shape[1]
    sample = torch.randn(width + 1_000, width)
    moments = Moments(base.digest, "random", 0, len(sample), dict.fromkeys(prepare.layers, sample.T @ sample / len(sample)))
    profile = Profile(base=base.digest, prepare=prepare, solve=SolveOptions(lam=15_000, spread="even", moments="random"))
    return Case("random model of GPT-2 small's shape", base, D4S(profile, moments, base.layout), profile, moments, edits, PROBE_TEXTS)


def _train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2_000, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def _compare(case: Case, sizes: Sequence[int], plain: int) -> None:
    case.editor.prepare(case.base, case.edits[:1])  # warm-up, not measured
    solves = _measure_solves(case)
    _measure(case, 1, 1)  # warm-up, too
    # Small batches are repeated over the edits of the plain computation: one alone says little on a busy machine.
    counts = {size: max(size, plain // size * size) for size in sizes}
    measured = {size: _measure(case, count, size) for size, count in counts.items()}
    slow, slow_solve = _measure_plain(case, plain)
    table = Table(title=f"{case.title}: seconds per edit, {torch.get_num_threads()} thread (plain / ours: of z + keys + solve)")
    for name in ("batch", "", *PLAIN, "sum", "z of sum", "plain / ours", *STAGES[len(PLAIN) :], "all"):
        table.add_column(name, justify="right")
    for size, watch in measured.items():
        for unit, ours, theirs, solve in (("CPU", watch.cpu, slow.cpu, slow_solve.cpu), ("wall", watch.wall, slow.wall, slow_solve.wall)):
            each = {name: seconds / counts[size] for name, seconds in ours.items()}
            reference = {"z": theirs["z"] / plain, "keys": theirs["keys"] / plain, "solve": solve["solve"] / size}
            reference["sum"] = sum(reference.values())
            whole = each["sum"] + each["evaluation"] + each["commit"]
            rest = [_spell(seconds) for seconds in (each["evaluation"], each["commit"], whole)]
            table.add_row(str(size), unit, *_describe(each), f"{reference['sum'] / each['sum']:.1f} ×", *rest)
            table.add_row(f"plain, {size}", unit, *_describe(reference), style="dim")
        table.add_section()
    out.print(table)
    out.print(
        "[dim]CPU-seconds of one solve by the edits a stream holds: "
        + ", ".join(f"{live} {seconds:.2f}" for live, seconds in solves.items())
        + f" (the first includes the factors of C, made once per process). Plain: {plain} edits one by one, one LU solve per batch. "
        "How evaluation and commit grow with a stream: `python -m benchmarks.growth`.[/]"
    )


def _measure_solves(case: Case) -> dict[str, float]:
    """CPU-seconds by the number of pairs. They are random: what they hold does not matter to the time."""
    base, editor, profile = case.base, case.editor, case.profile
    shapes = {layer: base.layout.read_weight(base.model, layer).shape for layer in profile.prepare.layers}
    d_out, d_in = shapes[profile.prepare.layers[0]]
    seconds: dict[str, float] = {}
    for count in (1, 1, 100, d_in // 4, d_in // 4 + 1):
        keys = {layer: torch.randn(count, d_in) for layer in shapes}
        pairs = Pairs(base.digest, profile.prepare.digest, tuple((str(row),) for row in range(count)), torch.randn(count, d_out), keys)
        state, watch = editor.merge(editor.empty_state(), pairs, None), Stopwatch()
        with watch.stage("solve"):
            editor.solve(state)
        form = "sums" if state.pairs is None else "pairs"
        seconds["first" if not seconds else f"{count} ({form})"] = watch.cpu["solve"]
    return seconds


def _measure(case: Case, count: int, size: int) -> Stopwatch:
    """`count` edits in batches through the product's own code: each is prepared, solved alone, evaluated, and committed to one stream."""
    watch, base, editor = Stopwatch(), case.base, case.editor
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stream = _start_stream(Path(folder), case)
        stack.enter_context(patch.object(d4s_editor, "read_base", watch.around("keys", d4s_editor.read_base)))
        stack.enter_context(patch.object(d4s_editor, "optimise_targets", watch.around("z", d4s_editor.optimise_targets)))
        for start in range(0, count, size):
            batch = case.edits[start : start + size]
            with watch.stage("sum"):
                pairs = editor.prepare(base, batch).pairs
                assert pairs is not None and len(pairs) == len(batch)
                with watch.stage("solve"):
                    state = editor.merge(editor.empty_state(), pairs, None)
                    artifact = editor.solve(state)
            assert artifact is not None
            with watch.stage("evaluation"):
                fits = dict(zip((edit.edit_id for edit in batch), editor.measure_fits(state, pairs).tolist(), strict=True))
                report = evaluate_candidate(base, [artifact], batch, [], None, EvaluateSettings(), fits=fits, probe_texts=case.probe_texts)
            with watch.stage("commit"):
                _commit(stream, batch, pairs, artifact, report)
    return watch


def _start_stream(folder: Path, case: Case) -> Stream:
    base, profile, manifest = case.base.digest, case.profile.digest, start_manifest(case.editor, case.base.digest, case.profile.digest)
    writer = describe_writer(load_settings())
    init = InitCommit(seq=0, parent="", base={"digest": base}, profile=profile, editors=("d4s",), manifest=manifest.digest, **writer)
    return create_stream(str(folder / "root"), "speed", init, manifest.model_dump(mode="json"), folder / "cache")


def _commit(stream: Stream, edits: Sequence[Edit], pairs: Pairs, artifact: WeightDelta, report: Report) -> None:
    """Store all that a batch leaves behind, and commit it."""
    objects, head = stream.objects, stream.head
    raw = objects.put("".join(f"{edit.model_dump_json(exclude_none=True)}\n" for edit in edits).encode())
    stored = objects.put(pairs.to_bytes())
    change = objects.put(canonical_json([Change(op="add", pairs=stored, rows=tuple(range(len(edits)))).model_dump()]))
    before = Manifest.from_bytes(objects.get(head.manifest))
    layer = before.layers[0].model_copy(update={"artifact": objects.put(artifact.to_bytes()), "state": StateRef(pairs_since=(change,))})
    manifest = before.model_copy(update={"layers": (layer,), "recipe": extend_recipe(before.recipe, "add", pairs.digest_rows())})
    batch, outcomes = [], []
    for row, edit in enumerate(edits):
        place = {"occurrence": f"{edit.edit_id}@{head.seq + 1}", "origin": f"speed.jsonl:{row + 1}", "file": raw, "line": row + 1}
        batch.append(BatchRow(position=row, edit=edit, **place))
        outcomes.append(Outcome(outcome="live", pairs=stored, row=row, **place))
    draft = EditsCommit(
        seq=head.seq + 1,
        parent=head.digest,
        batch=objects.put_rows(item.model_dump(mode="json", exclude_none=True) for item in batch),
        outcomes=objects.put_rows(item.model_dump(mode="json", exclude_none=True) for item in outcomes),
        pairs=(stored,),
        manifest=objects.put(manifest.to_bytes()),
        report=objects.put(report.to_bytes()),
        files=(FileUse(digest=raw, name="speed.jsonl", lines=((1, len(edits)),), done=True),),
        promoted=True,
        **describe_writer(load_settings()),
    )
    commit(stream, draft, head)


def _measure_plain(case: Case, count: int) -> tuple[Stopwatch, Stopwatch]:
    """Stages of `count` edits together, and of one solve."""
    base, profile = case.base, case.profile
    watch, solve = Stopwatch(), Stopwatch()
    residuals, keys = [], []
    for edit in case.edits[:count]:
        with watch.stage("z"):
            residuals.append(compute_residual(base, edit, profile.prepare).residual)
        with watch.stage("keys"):
            keys.append(compute_keys(base, edit, profile.prepare))
    stacked = {layer: torch.stack([key[layer] for key in keys]) for layer in profile.prepare.layers}
    with solve.stage("solve"):
        solve_plain(torch.stack(residuals), stacked, case.moments.c, profile.solve.lam, len(profile.prepare.layers))
    return watch, solve


def _describe(each: Mapping[str, float]) -> list[str]:
    """The columns that both computations have."""
    return [*(_spell(each[name]) for name in (*PLAIN, "sum")), f"{each['z'] / each['sum']:.0%}"]


def _spell(seconds: float) -> str:
    """Four digits are more than a shared machine repeats."""
    return f"{seconds:.{3 if seconds < 10 else 2}f}"


if __name__ == "__main__":
    typer.run(run)
