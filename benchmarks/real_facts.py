"""A small base that knows real facts, and edits of what it knows: T-REx facts in ParaRel's patterns, CounterFact's records.

    python -m benchmarks.real_facts [--data ../shared/data] [--out FOLDER] [--family gpt2|llama] [--facts 4000] [--minutes 8] [--seed 0]
                                    [--calibrate]

Trains with the built-in base's trainer (`errata.training`), once: the same arguments find the result in the cache. OUT/base is a model
folder with its `train_report.json`; OUT/corpus.txt states every fact once, for second moments; OUT/edits.jsonl holds CounterFact's records
whose truth the base knows (strict argmax of the rewrite prompt), with neighbours that it knows, in the form that `errata submit` reads. Of
each fact one pattern is never trained; of an edit's it is the paraphrase that evaluation holds out.
"""

import json
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console

from benchmarks.common import MemoryBlobs
from benchmarks.edit_quality import share, write_stream
from benchmarks.fact_choice import NEIGHBOURS, Choice, choose_facts, read_patterns, read_records, read_truths
from errata.builtin import REPORT_FILE, TrainingSettings
from errata.candidates import load_artifacts
from errata.comparison.method import SPLIT_SEED
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import collect_moments
from errata.editors.d4s.reading import read_base
from errata.editors.rows import build_rows
from errata.edits import SLOT, Edit, Probe, canonical_json, digest_of
from errata.errors import ErrataError
from errata.evaluation.metrics import all_correct
from errata.evaluation.probes import split_probes
from errata.evaluation.scoring import score_targets
from errata.modeling.loading import Base, choose_device, load_base
from errata.modeling.patch import attach
from errata.placing import provide_folder
from errata.profiles import PrepareOptions, Profile, SolveOptions
from errata.settings import load_settings
from errata.training import train_facts
from errata.training_tokens import train_tokenizer
from errata.world import FILLER
from tasks._progress import show_progress
from tasks._session import quiet_transformers

CAVEAT = (
    "Measured on a two-million-parameter model of a few thousand real facts: "
    "it tests the software and says nothing about large language models."
)
VOCABULARY = 4_000
"""Tokens: nearly every object is one."""
SETTINGS = TrainingSettings(tokens=3_000, threads=1, exchanged=0.5)
"""One thread: with two, waiting for each other took most of the CPU time wherever something else was running."""
STEPS_PER_MINUTE = {"gpt2": 66, "llama": 66}
"""Of CPU time, where the table of benchmarks/README.md was taken: minutes decide on steps by this rate and not by a clock, so that equal
arguments give the same base."""
_PREPARE = PrepareOptions(layers=(SETTINGS.site,), steps=40, lr_scale=3.0)
_LAM = 71.0
"""What `errata calibrate --edits 300 --budget 6` found on the GPT-2 base of the defaults."""

out = Console(width=140, soft_wrap=True)


def run(
    data: Annotated[Path, typer.Option(help="Folder with facts/pararel and edits/.")] = Path("../shared/data"),
    folder: Annotated[Path, typer.Option("--out", help="Where base, corpus and edits go.")] = Path("real"),
    family: Annotated[Literal["gpt2", "llama"], typer.Option(help="Architecture.")] = "gpt2",
    facts: Annotated[int, typer.Option(min=100, help="Facts to train.")] = 4_000,
    minutes: Annotated[float, typer.Option(min=0.1, help="CPU minutes to train, about.")] = 8.0,
    seed: Annotated[int, typer.Option(help="Of the choice and of the training.")] = 0,
    calibrate: Annotated[bool, typer.Option(help="Find a profile afterwards.")] = False,
    edits: Annotated[str, typer.Option(help="Edits that D4S writes for a first look, comma-separated; empty: none.")] = "300",
) -> None:
    quiet_transformers()
    out.print(f"[dim]{CAVEAT}[/]")
    choice = choose_facts(
        read_patterns(data / "facts/pararel/patterns"),
        read_truths(data / "facts/pararel/trex_lms_vocab"),
        read_records(data / "edits/counterfact_dev_enriched_3000.json"),
        facts,
        seed,
    )
    settings = shape_training(family, minutes, seed)
    report = provide_base(choice, settings, folder)
    out.print_json(json.dumps({name: value for name, value in report.items() if name != "settings"}))
    base, known = load_base(folder / "base", device="cpu"), read_known(folder)
    measure_keys(base, known)
    for count in (int(size) for size in edits.split(",") if size):
        measure_editing(base, known, folder, choice, settings, count)
    command = ["--base", str(folder / "base"), "--corpus", str(folder / "corpus.txt"), "--facts", str(folder / "edits.jsonl")]
    out.print(f"next: [bold]errata calibrate {' '.join(command)}[/]")
    if calibrate:
        from flows.console import app

        app(["calibrate", *command])


def shape_training(family: Literal["gpt2", "llama"], minutes: float, seed: int) -> TrainingSettings:
    """The settings of a family, with as many steps as the minutes bear."""
    steps = max(1, round(minutes * STEPS_PER_MINUTE[family]))
    inner = 768 if family == "llama" else SETTINGS.inner  # of three matrices instead of two
    return SETTINGS.model_copy(update={"family": family, "inner": inner, "steps": steps, "seed": seed})


def provide_base(choice: Choice, settings: TrainingSettings, folder: Path, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """Base, corpus and edits in `folder`, trained where the cache has none of these settings and facts.

    Returns:
        What `train_report.json` says.
    """
    stated = [[fact.subject, fact.relation.name, fact.object, fact.withheld] for fact in choice.facts]
    named = {"settings": settings, "vocabulary": vocabulary, "facts": stated, "edits": choice.edits}
    named |= {"relations": {fact.relation.name: fact.relation.templates for fact in choice.facts}}
    digest = digest_of(canonical_json(named))[:16]
    kept = provide_folder(load_settings().cache / "real" / digest, lambda draft: _train(choice, settings, vocabulary, draft))
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    report: dict[str, Any] = json.loads((folder / "base" / REPORT_FILE).read_text())
    return report


def _train(choice: Choice, settings: TrainingSettings, vocabulary: int, draft: Path) -> None:
    text = [f"{template.replace(SLOT, fact.subject)} {fact.object}." for fact in choice.facts for template in fact.trained_templates]
    tokenizer = train_tokenizer([*FILLER, *text], vocabulary)
    device = choose_device("auto")
    with show_progress(f"training on {len(choice.facts)} facts") as advance:
        report = train_facts(settings, choice.facts, tokenizer, draft / "base", lambda done, total, _: advance(done, total), device)
    (draft / "corpus.txt").write_text("\n".join(choice.corpus(settings.seed)) + "\n")
    base = load_base(draft / "base", device="cpu")
    edits = find_known(base, choice, settings.seed)
    lines = (canonical_json(edit.model_dump(mode="json", exclude_none=True, exclude_defaults=True)) for edit in edits)
    (draft / "edits.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    written = {
        "settings": settings.model_dump(mode="json"),
        **report,
        "device": str(device),
        "parameters": sum(parameter.numel() for parameter in base.model.parameters()),
        "vocabulary": len(tokenizer),
        "facts": len(choice.facts),
        "subjects": len({fact.subject for fact in choice.facts}),
        "relations": len({fact.relation.name for fact in choice.facts}),
        "records": len(choice.edits),
        "records_known": len(edits),
        "subjects_known": len({edit.subject_key for edit in edits}),
        "withheld_paraphrase_known": _share_withheld(base, edits),
        "neighbours_per_edit": round(sum(len(edit.neighborhood_prompts) for edit in edits) / max(len(edits), 1), 2),
    }
    (draft / "base" / REPORT_FILE).write_text(json.dumps(written, indent=1) + "\n")


def find_known(base: Base, choice: Choice, seed: int) -> list[Edit]:
    """The edits whose truth the base says, each with at most NEIGHBOURS neighbours of which it does too."""
    rng = random.Random(f"neighbours {seed}")
    near = choice.list_neighbours()
    candidates = {}
    for edit in choice.edits:
        pool = near.get((str(edit.relation_id), str(edit.target_true)), [])
        prompts = [edit.prompt.replace(SLOT, fact.subject) for fact in pool]
        candidates[edit.edit_id] = rng.sample(prompts, min(2 * NEIGHBOURS, len(prompts)))
    rows = [(edit.rewrite_prompt, str(edit.target_true)) for edit in choice.edits]
    rows += [(prompt, str(edit.target_true)) for edit in choice.edits for prompt in candidates[edit.edit_id]]
    rows = list(dict.fromkeys(rows))
    scored = score_targets(base, rows, batch_tokens=2_048)
    said = {row: all_correct(scored[row].chosen, scored[row].target) for row in rows}
    known = []
    for edit in choice.edits:
        true = str(edit.target_true)
        if said[edit.rewrite_prompt, true]:
            probes = [Probe(prompt=prompt, answers=(true,)) for prompt in candidates[edit.edit_id] if said[prompt, true]]
            known.append(edit.model_copy(update={"neighborhood_prompts": tuple(probes[:NEIGHBOURS])}))
    return known


def _share_withheld(base: Base, edits: list[Edit]) -> float:
    held = [(text, str(edit.target_true)) for edit in edits for text in split_probes(edit, SPLIT_SEED).held_out.paraphrases]
    return round(share(base, held), 4)


def read_known(folder: Path) -> list[Edit]:
    """The edits of `folder`, one per subject."""
    edits = map(Edit.model_validate_json, (folder / "edits.jsonl").read_text().splitlines())
    return list({edit.subject_key: edit for edit in edits}.values())


def measure_keys(base: Base, known: Sequence[Edit]) -> None:
    """How near to each other the keys of these edits' subjects lie, and how many directions they take, at every layer but the last."""
    units = [[build_rows(base.tokenizer, edit, (SLOT,), base.context)] for edit in known]
    layers = range(base.layout.count_layers(base.model) - 1)
    for layer, read in read_base(base, units, layers).keys.items():
        keys = read.double()
        near = torch.nn.functional.normalize(keys, dim=1)
        cosine = (near.sum(0).square().sum() - len(near)) / (len(near) * (len(near) - 1))
        energies = torch.linalg.svdvals(keys - keys.mean(0)).square()
        directions = int((energies.cumsum(0) / energies.sum() < 0.99).sum()) + 1
        told = f"mean cosine {cosine:.2f}, {directions} directions hold .99 of their variance"
        out.print(f"keys of {len(keys):,} subjects at layer {layer}, {keys.shape[1]:,} wide: {told}")


def measure_editing(base: Base, known: Sequence[Edit], folder: Path, choice: Choice, settings: TrainingSettings, count: int) -> None:
    """D4S on edits of distinct subjects, drawn from all, in batches of 20: strict argmax accuracy."""
    stream = random.Random(f"stream {settings.seed}").sample(known, min(count, len(known)))
    moments = collect_moments(base, _PREPARE.layers, (folder / "corpus.txt").read_text().splitlines())
    solve = SolveOptions(lam=_LAM, spread="single", moments=digest_of(moments.to_bytes()))
    editor = D4S(Profile(base=base.digest, prepare=_PREPARE, solve=solve), moments, base.layout)
    named = {edit.subject for edit in stream}
    far = [(fact.trained_templates[0].replace(SLOT, fact.subject), fact.object) for fact in choice.facts if fact.subject not in named]
    far = random.Random("untouched").sample(far, min(2_000, len(far)))
    near = [(probe.prompt, probe.answers[0]) for edit in stream for probe in edit.neighborhood_prompts]
    held = [(text, edit.target_new) for edit in stream for text in split_probes(edit, SPLIT_SEED).held_out.paraphrases]
    before = share(base, far)
    blobs = MemoryBlobs()
    manifest, _ = write_stream(blobs, base, editor, stream, 20)
    with torch.no_grad(), attach(base, load_artifacts(blobs, manifest)):
        efficacy = share(base, [(edit.rewrite_prompt, edit.target_new) for edit in stream])
        values = (efficacy, share(base, held), share(base, near), share(base, far))
    names = ("efficacy", "withheld pattern", "specificity", "untouched")
    told = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, values, strict=True))
    out.print(f"D4S, {len(stream)} edits, λ {_LAM:g}: {told} (base {before:.3f})")


if __name__ == "__main__":
    try:
        typer.run(run)
    except ErrataError as error:
        sys.exit(str(error))
