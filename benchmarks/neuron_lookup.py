"""What it costs to find the neuron that a token activates: by itself, and as part of decoding.

    python -m benchmarks.neuron_lookup [--sizes 1000,10000,30000,100000,300000] [--neurons 10000,100000] [--tokens 120] [--threads 1]

First table: the bare product of all keys (768 wide) with one query, and `KeyIndex.find_best` in each form on the same keys. Forms take
turns, query by query, and each query is new. Keys lie in 40 clusters, as the prompts of a relation do (cosine .66 inside a cluster, .25
across). `hits` are queries with a cosine of .98, .9 or .8 to some key, `misses` those of strangers in a known relation, of unknown
relations, and of no direction at all; the share is that of queries that get the row of `product`.

Second table: decoding on GPT-2 small's shape (12 layers, 768 wide, 12 heads, 50,257 tokens, random weights, float32), batch 1, KV cache,
prefill not counted, neurons at layer 11. Each token is computed once unedited, once with the bare key product at that layer, and once with
the patch of `errata.editors.neurons` beside that layer's MLP in each form; extra time is the median of the differences at one token, with
its standard error: what a busy machine disturbs least.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from benchmarks.tiny_base import write_base
from errata.editors.neurons import Block, NeuronPatch, Neurons
from errata.modeling.beside import respond_beside
from errata.modeling.loading import Base, hold_base, load_base
from errata.retrieval.index import CELLS, Form, KeyIndex, choose_form

WIDTH = 768
LAYER = 11
THETA = 0.75
FORMS: tuple[Form, ...] = ("product", "half", "cells")
RELATIONS = 40
SEVERAL = 4
"""Queries at once, as in a batch or a beam."""
_AGREEING = 300
"""Queries of each kind whose rows are compared."""
_PREFILL = 32
_WARM_UP = 5

out = Console(width=130)


def run(
    sizes: Annotated[str, typer.Option(help="Keys of the first table, comma-separated.")] = "1000,10000,30000,100000,300000",
    neurons: Annotated[str, typer.Option(help="Neurons of the second table, comma-separated.")] = "10000,100000",
    tokens: Annotated[int, typer.Option(min=10, help="Tokens decoded for each row of the second table.")] = 120,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch; faiss follows OMP_NUM_THREADS.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    _print_load("start")
    _compare_forms([int(size) for size in sizes.split(",")])
    _print_load("after the first table")
    _compare_decoding([int(size) for size in neurons.split(",")], tokens)
    _print_load("end")


def standardise(rows: torch.Tensor) -> torch.Tensor:
    """Mean removed, divided by the unbiased standard deviation: every row [d] gets the norm √(d−1)."""
    return (rows - rows.mean(dim=-1, keepdim=True)) / rows.std(dim=-1, keepdim=True)


def draw_keys(count: int, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """Standardised keys [count, width]; row r belongs to relation r % 40 and person r // 40. Cosines: any two .25, one person's .5, one
    relation's .66."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.arange(count)
    persons = _draw_directions((count - 1) // RELATIONS + 1, width, rng)[rows // RELATIONS]
    relations = _draw_directions(RELATIONS, width, rng)[rows % RELATIONS]
    keys = 0.41**0.5 * relations + 0.25**0.5 * persons
    keys += 0.25**0.5 * _draw_directions(1, width, rng)
    keys += 0.09**0.5 * _draw_directions(count, width, rng)
    return standardise(keys)


def draw_queries(keys: torch.Tensor, count: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Standardised queries [count, width] of each kind; those called `hit …` have that cosine to one of `draw_keys`' keys."""
    rng = torch.Generator().manual_seed(seed)
    width = keys.shape[1]

    def mix(share: float, directions: torch.Tensor) -> torch.Tensor:
        directions = directions / directions.norm(dim=1, keepdim=True)
        return standardise(share * directions + (1 - share**2) ** 0.5 * _draw_directions(count, width, rng))

    drawn = {}
    for cosine in (0.98, 0.9, 0.8):
        drawn[f"hit {cosine}"] = mix(cosine, keys[torch.randint(len(keys), (count,), generator=rng)])
    centres = torch.stack([keys[relation::RELATIONS].mean(dim=0) for relation in range(min(RELATIONS, len(keys)))])
    strangers = centres[torch.randint(len(centres), (count,), generator=rng)]
    drawn["miss, known relation"] = mix(0.66**0.5, strangers)
    drawn["miss, unknown relation"] = mix(0.25**0.5, keys.mean(dim=0, keepdim=True))
    drawn["miss, any direction"] = mix(0.0, keys[:1])
    return drawn


def _draw_directions(count: int, width: int, rng: torch.Generator) -> torch.Tensor:
    rows = torch.randn(count, width, generator=rng)
    return rows / rows.norm(dim=1, keepdim=True)


def attach_neurons(base: Base, keys: torch.Tensor, values: torch.Tensor, form: Form) -> Callable[[], AbstractContextManager[None]]:
    """The neurons of a patch as a served model has them, with the keys searched in one form: what is entered for each token.

    Args:
        keys, values: [N, d].
    """
    count = len(keys)
    block = Block(tuple((str(row),) for row in range(count)), (1,) * count, keys, values)
    patch = NeuronPatch(base.digest, LAYER, THETA, 80.0, silent=True, pooled=True, blocks=(block,), dead=frozenset(), parts={})
    neurons = Neurons(patch, KeyIndex(keys, form, tie=1e-4 * (WIDTH - 1)), keys, torch.cat([values, values.new_zeros(1, WIDTH)]))
    return lambda: respond_beside(base, LAYER, neurons)


@contextmanager
def attach_product(model: GPT2LMHeadModel, layer: int, keys: torch.Tensor) -> Iterator[None]:
    """The floor: the inner products of the last position with all keys, and nothing else."""

    def multiply(_: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        keys @ inputs[0][0, -1]

    handle = model.transformer.h[layer].mlp.register_forward_hook(multiply)
    try:
        yield
    finally:
        handle.remove()


def _compare_forms(sizes: Sequence[int]) -> None:
    table = Table(title=f"one query, keys {WIDTH} wide, {torch.get_num_threads()} thread(s): median ms (· = chosen for this size)")
    for name in ("keys", "form", "ms", "/ bare", f"{SEVERAL} queries", "hits", "misses", "build s", "MB"):
        table.add_column(name, justify="left" if name == "form" else "right")
    for size in sizes:
        keys = draw_keys(size)
        queries = draw_queries(keys, _AGREEING)
        indices, building = {}, {}
        for form in FORMS:
            start = time.perf_counter()
            indices[form] = KeyIndex(keys, form)
            building[form] = time.perf_counter() - start
        singles = [row[None] for kind in queries.values() for row in kind[: max(10, min(50, 2_000_000 // size // len(FORMS)))]]
        calls: dict[str, Callable[[torch.Tensor], Any]] = {"bare": lambda asked, keys=keys: keys @ asked[0]}
        calls |= {form: index.find_best for form, index in indices.items()}
        single = _time_in_turn(calls, singles)
        calls["bare"] = lambda asked, keys=keys: keys @ asked.T
        several = _time_in_turn(calls, [kind[start : start + SEVERAL] for kind in queries.values() for start in (0, SEVERAL, 2 * SEVERAL)])
        table.add_row(
            f"{size:,}", "bare", f"{single['bare']:.3f}", "1.00", f"{several['bare']:.2f}", "", "", "", f"{_count_mb(keys, None):.0f}"
        )
        rows = {kind: indices["product"].find_best(asked)[1] for kind, asked in queries.items()}
        for form, index in indices.items():
            same = {kind: (_find_rows(index, asked) == rows[kind]).double().mean().item() for kind, asked in queries.items()}
            chosen = " ·" if choose_form(size, keys.device) == form else ""
            table.add_row(
                "",
                form + chosen,
                f"{single[form]:.3f}",
                f"{single[form] / single['bare']:.2f}",
                f"{several[form]:.2f}",
                *("/".join(_spell_share(share) for kind, share in same.items() if kind.startswith(name)) for name in ("hit", "miss")),
                f"{building[form]:.2f}",
                f"{_count_mb(keys, form):.0f}",
            )
        table.add_section()
    out.print(table)
    out.print("[dim]hits: cosine .98/.9/.8; misses: known relation/unknown relation/any direction; MB: keys and what the form adds.[/]")


def _find_rows(index: KeyIndex, queries: torch.Tensor) -> torch.Tensor:
    """One by one, as in decoding: `half` would leave many at once to the product."""
    return torch.cat([index.find_best(query[None])[1] for query in queries])


def _time_in_turn(calls: Mapping[str, Callable[[torch.Tensor], Any]], queries: Sequence[torch.Tensor]) -> dict[str, float]:
    """Median milliseconds of each call, over all queries after a short warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for asked in (*queries[:_WARM_UP], *queries):
        for name, call in calls.items():
            start = time.perf_counter()
            call(asked)
            taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times[min(_WARM_UP, len(queries)) :]) for name, times in taken.items()}


def _count_mb(keys: torch.Tensor, form: Form | None) -> float:
    """Keys in float32; a copy in float16; for cells a number per key and the centres as well."""
    extra = {"half": keys.numel() * 2, "cells": keys.numel() * 2 + len(keys) * 8 + min(CELLS, len(keys)) * keys.shape[1] * 4}
    return (keys.numel() * 4 + extra.get(form or "", 0)) / 1e6


def _spell_share(share: float) -> str:
    return f"{share:.3f}".lstrip("0") if share < 1 else "1"


def _compare_decoding(counts: Sequence[int], tokens: int) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    with tempfile.TemporaryDirectory() as work:
        base = hold_base(model, load_base(write_base(Path(work)), device="cpu").tokenizer)  # no text is read here
    table = Table(title=f"decoding, GPT-2 small's shape, neurons at layer {LAYER}, {torch.get_num_threads()} thread(s): ms per token")
    for name in ("neurons", "", "ms per token", "extra ms", "extra / bare product", "over unedited"):
        table.add_column(name, justify="left" if not name else "right")
    notes = []
    for count in counts:
        keys = draw_keys(count)
        values = model.get_output_embeddings().weight[torch.arange(count) % model.config.vocab_size]
        modes: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "unedited": nullcontext,
            "bare product": lambda keys=keys: attach_product(model, LAYER, keys),
        }
        for form in FORMS:
            modes[form] = attach_neurons(base, keys, values, form)
        taken = _decode_in_turn(model, modes, tokens)
        unedited = statistics.median(taken["unedited"])
        extra = {
            mode: _measure_extra([a - b for a, b in zip(times, taken["unedited"], strict=True)])
            for mode, times in taken.items()
            if mode != "unedited"
        }
        floor, chosen = extra["bare product"], choose_form(count, keys.device)
        table.add_row(f"{count:,}", "unedited", f"{unedited:.2f}", "", "", "")
        for mode, (median, error) in extra.items():
            name = mode + (" ·" if mode == chosen else "")
            cells = (f"{median:.2f} ± {error:.2f}", f"{median / floor[0]:.2f}", f"{median / unedited:.1%}")
            table.add_row("", name, f"{statistics.median(taken[mode]):.2f}", *cells)
        table.add_section()
        notes.append(f"{count:,} neurons ({chosen}): " + _judge(extra[chosen], floor, unedited))
    out.print(table)
    for note in notes:
        out.print(note)
    out.print("[dim]The goal is set for 10,000.[/]")


def _decode_in_turn(
    model: GPT2LMHeadModel, modes: Mapping[str, Callable[[], AbstractContextManager[None]]], tokens: int
) -> dict[str, list[float]]:
    """Milliseconds of each token in each mode. The modes take turns at every token, each time in another order; a step that was timed is
    taken out of the cache again, so that all find the same one."""
    ids = torch.randint(model.config.vocab_size, (1, _PREFILL + _WARM_UP + tokens), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    model(ids[:, :_PREFILL], past_key_values=cache)
    taken: dict[str, list[float]] = {mode: [] for mode in modes}
    order = list(modes)
    for place in range(_PREFILL, ids.shape[1]):
        for mode in order:
            with modes[mode]():
                start = time.perf_counter()
                model(ids[:, place : place + 1], past_key_values=cache)
                taken[mode].append((time.perf_counter() - start) * 1e3)
            cache.crop(-1)
        model(ids[:, place : place + 1], past_key_values=cache)
        order = [*order[1:], order[0]]
    return {mode: times[_WARM_UP:] for mode, times in taken.items()}


def _measure_extra(differences: Sequence[float]) -> tuple[float, float]:
    """Median and its standard error, by the quartiles: single tokens are disturbed by much more than they differ."""
    low, median, high = statistics.quantiles(differences, n=4)
    return median, 0.93 * (high - low) / len(differences) ** 0.5


def _judge(extra: tuple[float, float], floor: tuple[float, float], unedited: float) -> str:
    """Each limit is met, not met, or not to be decided within two standard errors."""
    said = []
    for limit, blur, name in (
        (1.2 * floor[0], 1.2 * floor[1], "1.2 × bare product"),
        (0.08 * unedited, 0.0, "8 % over unedited"),
    ):
        undecided = abs(extra[0] - limit) < 2 * (extra[1] ** 2 + blur**2) ** 0.5
        said.append(f"≤ {name}: {'[yellow]not decided[/]' if undecided else '[green]met[/]' if extra[0] < limit else '[red]not met[/]'}")
    return ", ".join(said)


def _print_load(when: str) -> None:
    out.print(f"[dim]load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores, {when}[/]")


if __name__ == "__main__":
    typer.run(run)
