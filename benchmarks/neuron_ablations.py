"""The ablations of iReVa's paper on the built-in base, each against the editor it is a change of, on the same streams.

    python -m benchmarks.neuron_ablations [--edits 500] [--seeds 3]

No activation threshold (also in training), no max-pool, no reconstruction loss, and the published gate instead of an exact zero. Measures
are those of `benchmarks.neuron_quality`. A change whose sign is not the paper's on every stream is shown as such, with the likely reason.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import MemoryBlobs, load_builtin
from benchmarks.edit_quality import Grown, grow_stream
from benchmarks.neuron_quality import MEASURES, PLAIN, TRAINED, ask_base, choose_published, measure_edits, print_load, spell_share
from errata.builtin import CAVEAT
from errata.candidates import load_artifacts
from errata.editors.artifacts import Artifact
from errata.editors.ireva.editor import IReVa
from errata.editors.neurons import NeuronPatch
from errata.edits import Edit
from errata.modeling.loading import Base
from errata.profiles import NeuronProfile
from errata.world import World

out = Console(width=150)


class Ablation(NamedTuple):
    """One change of iReVa, and what the paper says that it does."""

    name: str
    of: str
    change: Callable[[NeuronProfile], NeuronProfile]
    measure: str
    sign: int
    """Of the change in the paper; 0 where it has none."""
    paper: str
    why: str
    """The likely reason, where it does not hold here."""


def _change_gate(profile: NeuronProfile, **options: Any) -> NeuronProfile:
    return profile.model_copy(update={"solve": profile.solve.model_copy(update=options)})


def _drop_threshold(profile: NeuronProfile, *, gain: float) -> NeuronProfile:
    """In training as well."""
    trained = profile.prepare.retrofit and profile.prepare.retrofit.model_copy(update={"theta": 0.0, "gain": gain})
    prepare = profile.prepare.model_copy(update={"retrofit": trained})
    return _change_gate(profile.model_copy(update={"prepare": prepare}), theta=0.0, gain=gain)


def _drop_reconstruction(profile: NeuronProfile) -> NeuronProfile:
    assert profile.prepare.retrofit
    trained = profile.prepare.retrofit.model_copy(update={"reconstruction": 0.0})
    return profile.model_copy(update={"prepare": profile.prepare.model_copy(update={"retrofit": trained})})


_NOT_THRESHOLD = "with a gain that exact matches alone reach, what other inputs get may be too little to change an answer."
_NOT_POOL = (
    "a sum differs from a maximum only where several neurons fire, and here few keys are within θ of another one (line below); where they "
    "are, the own neuron is still the loudest. All of the paper's zsRE prompts end in the same word, which probably brings ten thousand "
    "keys much closer together."
)
_NOT_RECONSTRUCTION = (
    "its effect is elsewhere (table below): the product of a neuron with its own input grows, so that the fixed bias is no cosine of θ "
    "any more and neurons fire at strangers, which costs specificity. An edit's own input stays nearest to its own neuron, with keys this "
    "far apart."
)

ABLATIONS = tuple(
    Ablation(name, of, change, measure, sign, paper, why)
    for name, change, measure, sign, paper, why in (
        ("no threshold, α as it was (gain 320)", partial(_drop_threshold, gain=320.0), "specificity", -1, "NS 26.0 → 2.9", _NOT_THRESHOLD),
        ("no threshold, gain 80", partial(_drop_threshold, gain=80.0), "specificity", -1, "NS 26.0 → 2.9", _NOT_THRESHOLD),
        ("no max-pool", partial(_change_gate, pooling="sum"), "efficacy", -1, "ES 97 → 56", _NOT_POOL),
        ("no reconstruction loss", _drop_reconstruction, "efficacy", -1, "ES 97.5 → 92", _NOT_RECONSTRUCTION),
        ("gate as published", partial(_change_gate, gate="published"), "specificity", 0, "is the paper's", ""),
    )
    for of in ((TRAINED,) if change is _drop_reconstruction else (PLAIN, TRAINED))
)


def run(
    edits: Annotated[int, typer.Option(min=1, help="Edits per stream, written at once.")] = 500,
    seeds: Annotated[int, typer.Option(min=1, help="Streams.")] = 3,
) -> None:
    out.print(f"[dim]{CAVEAT}[/]")
    print_load("start")
    base, _, world = load_builtin()
    _ablate(base, world, edits, seeds)
    print_load("end")


def _ablate(base: Base, world: World, count: int, seeds: int) -> None:
    """Each change against the editor it is a change of, on the same streams, written at once."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    own: list[float] = []
    overlaps: list[tuple[float, float]] = []
    for seed in range(seeds):
        stream = world.make_edits(count, seed, "slots")
        said = ask_base(base, world, stream)
        profiles = {name: choose_published(base, name) for name in (PLAIN, TRAINED)}
        profiles |= {f"{case.name} {case.of}": case.change(profiles[case.of]) for case in ABLATIONS}
        for name, profile in profiles.items():
            grown, (artifact,) = _write_at_once(base, IReVa(profile, base.layout), stream)
            measured = measure_edits(base, world, stream, said, grown, artifact)
            found[name].append(measured["shares"])
            if name == PLAIN:
                overlaps.append(_measure_overlap(artifact))
        own.append(measured["base"]["specificity"])
        out.print(f"[dim]ablations, seed {seed}: done[/]")
    table = Table(
        title=f"ablations, {count:,} edits (base's own specificity {spell_share(statistics.mean(own))}): mean of the streams, and changes"
    )
    for name in ("what", "of", "measure", "whole", "without", "change on each stream", "paper", "sign as in the paper"):
        table.add_column(name)
    notes = []
    for case in ABLATIONS:
        whole, without = ([shares[case.measure] for shares in found[name]] for name in (case.of, f"{case.name} {case.of}"))
        changes = [round(after - before, 4) for before, after in zip(whole, without, strict=True)]
        agreeing = sum(change * case.sign > 0 for change in changes)
        verdict = f"{agreeing} of {len(changes)}" if case.sign else "–"
        means = (spell_share(statistics.mean(whole)), spell_share(statistics.mean(without)))
        table.add_row(case.name, case.of, case.measure, *means, " ".join(f"{change:+.3f}" for change in changes), case.paper, verdict)
        if case.sign and agreeing < len(changes):
            notes.append(f"{case.name} ({case.of}) does not hold here: {case.why}")
    out.print(table)
    for note in dict.fromkeys(notes):
        out.print(note)
    near, nearest = (statistics.mean(each) for each in zip(*overlaps, strict=True))
    out.print(f"Keys within θ of that of another edit: {near:.1%}; cosine with the nearest other key: median {nearest:.2f}.")
    rest = Table(title="all measures of the ablations")
    for name in ("what", *MEASURES[:4]):
        rest.add_column(name)
    for name, shares in found.items():
        rest.add_row(name, *(spell_share(statistics.mean(each[measure] for each in shares)) for measure in MEASURES[:4]))
    out.print(rest)


def _measure_overlap(artifact: Artifact) -> tuple[float, float]:
    """Share of keys that are within θ of another one, and the median cosine with the nearest other."""
    assert isinstance(artifact, NeuronPatch)
    keys = torch.cat([block.keys for block in artifact.blocks])
    nearest = (keys @ keys.T / (artifact.width - 1)).fill_diagonal_(-1.0).amax(dim=1)
    return float((nearest > artifact.theta).double().mean()), float(nearest.median())


def _write_at_once(base: Base, editor: IReVa, stream: Sequence[Edit]) -> tuple[Grown, list[Artifact]]:
    blobs = MemoryBlobs()
    *_, grown = grow_stream(blobs, base, editor, stream, len(stream))
    return grown, load_artifacts(blobs, grown.manifest)


if __name__ == "__main__":
    typer.run(run)
