"""Finding the fact that a question asks for: how fast at 10,000 to 1,000,000 facts, and how often right on CounterFact.

    OMP_NUM_THREADS=1 python -m benchmarks.retrieval [--sizes 10000,100000,1000000] [--records 400] [--parts guard,routing,names,nearest]

guard    Which similarity tells a paraphrase of an edit from another question about its subject: five of them on CounterFact with ParaRel,
         and on KnowEdit's zsRE and wiki_counterfact. Floors are sought on half of the records and judged on the other half.
routing  All edits of a file are live; questions are put to `FactStore` in both scopes.
names    To match and to route. Names are drawn from T-REx's by pairing words of two; a question has one of them in one of CounterFact's
         templates.
nearest  Demonstrations, both forms at every size.

The data sets lie beside the checkout, in `../shared/data`; without them guard and routing are skipped, and names are made up.
"""

import json
import os
import random
import re
import statistics
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from errata.retrieval import nearest
from errata.retrieval.demonstrations import spell_stored
from errata.retrieval.encoder import Encoder, load_encoder
from errata.retrieval.facts import Fact
from errata.retrieval.nearest import NearestFacts
from errata.retrieval.routing import FLOOR, PLACEHOLDER, FactStore, find_floor, spell_asked, spell_relation
from errata.retrieval.subjects import SubjectIndex, fold_text

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ENRICHED = "edits/counterfact_dev_enriched_3000.json"
DEV = "edits/counterfact_dev_10000.json"
WIDTH, SHOWN = 384, 12

out = Console(width=140)
T = TypeVar("T")


def run(
    sizes: Annotated[str, typer.Option(help="Facts, comma separated.")] = "10000,100000,1000000",
    records: Annotated[int, typer.Option(help="Edits of each file that questions are taken from.")] = 400,
    parts: Annotated[str, typer.Option(help="Of guard, routing, names and nearest.")] = "guard,routing,names,nearest",
) -> None:
    torch.set_num_threads(1)
    _print_load("at the start")
    asked = set(parts.split(","))
    if asked & {"guard", "routing"} and not (DATA / ENRICHED).is_file():
        out.print(f"[yellow]guard and routing are skipped: expected CounterFact as {DATA / ENRICHED}, found no such file[/]")
        asked -= {"guard", "routing"}
    encoder = load_encoder(device="cpu")
    if "guard" in asked:
        _compare_guards(encoder, records)
    if "routing" in asked:
        for name in (ENRICHED, DEV):
            _judge_routing(encoder, name, records)
    counts = [int(size) for size in sizes.split(",")]
    if "names" in asked:
        _time_names(encoder, counts)
    if "nearest" in asked:
        _time_demonstrations(counts)
    _print_load("at the end")


# What was asked, and what should be found.


def read_facts(name: str) -> tuple[list[Fact], list[dict[str, Any]]]:
    """The edits of one of the CounterFact files as facts, each with its record."""
    made = []
    for record in json.loads((DATA / name).read_text()):
        prompt = record["prompt"] if "{}" in record["prompt"] else record["prompt"].replace(record["subject"], "{}", 1)
        made.append((Fact(str(record["case_id"]), record["subject"], prompt, record["target_new"]), record))
    return [fact for fact, _ in made], [record for _, record in made]


def list_templates() -> dict[str, list[str]]:
    """Relation → prompts of CounterFact."""
    found = defaultdict(set)
    for record in json.loads((DATA / ENRICHED).read_text()):
        found[record["relation_id"]].add(record["prompt"])
    return {relation: sorted(prompts) for relation, prompts in sorted(found.items())}


def list_noise() -> list[str]:
    """Sentences of WikiText that stand before a question without having to do with it."""
    lines = (DATA / "corpora/wikitext2_valid.txt").read_text().splitlines()
    return [part.strip() + "." for line in lines if not line.strip().startswith("=") for part in line.split(" . ") if 30 < len(part) < 120]


def draw_questions(records: int) -> list[tuple[str, Fact, str]]:
    """Kind (`in …` or `out …`), fact and question. Every question names the fact's subject."""
    chance, templates, noise = random.Random(0), list_templates(), list_noise()
    made = []
    facts, own = read_facts(ENRICHED)
    for place in chance.sample(range(len(facts)), records):
        fact, record = facts[place], own[place]
        paraphrases = [("in ParaRel", prompt) for prompt in record["paraphrase_prompts"][:1]] + [
            ("in CounterFact", record["cf_rephrase_prompt"])
        ]
        others = chance.sample([relation for relation in templates if relation != record["relation_id"]], 2)
        asked = paraphrases + [("out CounterFact", chance.choice(templates[other]).replace("{}", fact.subject)) for other in others]
        asked += [(f"{kind} + noise", f"{chance.choice(noise)} {text}") for kind, text in asked if chance.random() < 0.5]
        made += [(kind, fact, text) for kind, text in asked]
    for name, path in (("zsRE", "edits/knowedit_zsre_1304.json"), ("wiki", "edits/knowedit_wiki_counterfact_dev.json")):
        for place, record in enumerate(chance.sample(json.loads((DATA / path).read_text()), records // 2)):
            if record["prompt"].count(record["subject"]) == 1:
                fact = Fact(f"{name}-{place}", record["subject"], record["prompt"].replace(record["subject"], "{}"), record["target_new"])
                asked = [(f"in {name}", record["rephrase_prompt"])] if record.get("rephrase_prompt") else []
                asked += [(f"out {name}", item["prompt"]) for item in record.get("locality", {}).get("Relation_Specificity", [])[:1]]
                made += [(kind, fact, text) for kind, text in asked if fact.subject in text]
    named = [item for item in made if _name_subject(item[1]).find(item[2])]
    out.print(f"{len(made) - len(named)} of {len(made):,} questions spell the name as a part of a longer word: they are left out")
    return named


def _compare_guards(encoder: Encoder, records: int) -> None:
    questions = draw_questions(records)

    def mask(fact: Fact, text: str) -> str:
        return re.sub(re.escape(fact.subject), PLACEHOLDER, text)

    def ask(fact: Fact, text: str) -> str:
        return spell_asked(text, _name_subject(fact).find(text), fact.id)

    forms: dict[str, Callable[[Fact, str], tuple[str, str]]] = {
        "plain": lambda fact, text: (text, fact.rewrite_prompt),
        "paper": lambda fact, text: (f"New Fact: {text}\nPrompt: {text}", spell_stored(fact)),
        "name": lambda fact, text: (mask(fact, text), spell_relation(fact)),
        "name, sentence": lambda fact, text: (ask(fact, text), spell_relation(fact)),
        "the same + target": lambda fact, text: (f"{ask(fact, text)} {fact.target}", f"{spell_relation(fact)} {fact.target}"),
    }
    pairs = {form: [spell(fact, text) for _, fact, text in questions] for form, spell in forms.items()}
    texts = list(dict.fromkeys(text for made in pairs.values() for pair in made for text in pair))
    rows = dict(zip(texts, encoder.encode(texts), strict=True))
    halves = [int(random.Random(fact.subject).random() < 0.5) for _, fact, _ in questions]
    kinds = sorted({kind for kind, _, _ in questions})
    columns: dict[str, list[str]] = {}
    for form, made in pairs.items():
        scores = [float(rows[asked] @ rows[stored]) for asked, stored in made]
        floors, rights, taken = [], [], defaultdict(list)
        for half in (0, 1):
            floor = find_floor(*(_pick(questions, scores, halves, half, kind) for kind in ("in", "out")))
            inside, outside = (np.array(_pick(questions, scores, halves, 1 - half, kind)) for kind in ("in", "out"))
            floors.append(floor)
            rights.append((np.mean(inside >= floor) + np.mean(outside < floor)) / 2)
            for (kind, _, _), score, own in zip(questions, scores, halves, strict=True):
                if own != half:
                    taken[kind].append(score >= floor)
        both = [_pick(questions, scores, [0] * len(scores), 0, kind) for kind in ("in", "out")]
        auc = np.mean(np.searchsorted(np.sort(both[1]), both[0]) / len(both[1]))
        columns[form] = [f"{auc:.3f}", f"{np.mean(rights):.3f}", f"{floors[0]:.3f}, {floors[1]:.3f}", f"{find_floor(*both):.3f}"]
        columns[form] += [f"{np.mean(taken[kind]):.3f}" for kind in kinds]
    table = Table(title=f"{len(questions):,} questions that name the subject of an edit: which ask for the edit (FLOOR is {FLOOR})")
    for name in ("", *columns):
        table.add_column(name, justify="right" if name else "left")
    counts = [f"{kind} ({sum(own == kind for own, _, _ in questions)})" for kind in kinds]
    for cells in zip(("AUC", "right", "floors of the halves", "floor of all", *counts), *columns.values(), strict=True):
        table.add_row(*cells)
    out.print(table)
    out.print(
        "[dim]plain: as they are; paper: its sentences; name: replaced by a neutral word; sentence: from the one with the name on.\n"
        "right: balanced accuracy on the half that the floor was not sought on; per kind: share taken as in scope.[/]"
    )


def _name_subject(fact: Fact) -> SubjectIndex:
    own = SubjectIndex()
    own.add(fact.subject, fact.id)
    return own


def _pick(questions: Sequence[tuple[str, Fact, str]], scores: Sequence[float], halves: Sequence[int], half: int, kind: str) -> list[float]:
    return [score for (own, _, _), score, part in zip(questions, scores, halves, strict=True) if part == half and own.startswith(kind)]


def _judge_routing(encoder: Encoder, name: str, records: int) -> None:
    facts, own = read_facts(name)
    chance, templates = random.Random(1), list_templates()
    stores = {scope: FactStore(facts, encoder=lambda: encoder, scope=scope) for scope in ("guarded", "paper")}  # type: ignore[arg-type]
    asked: list[tuple[str, str | None, str]] = []
    for place in chance.sample(range(len(facts)), records):
        fact, record = facts[place], own[place]
        asked.append(("rewrite prompts", fact.id, fact.rewrite_prompt))
        asked += [("paraphrases, ParaRel", fact.id, prompt) for prompt in record.get("paraphrase_prompts", [])[:1]]
        paraphrase = record.get("cf_rephrase_prompt") or record["rephrase_prompt"]
        noisy = re.search(r"\w\w\w[.!?]\s", paraphrase[: paraphrase.rfind(fact.subject)])
        asked.append(("paraphrases, CounterFact, noise before" if noisy else "paraphrases, CounterFact", fact.id, paraphrase))
        asked += [("neighbours", None, prompt) for prompt in (record.get("neighborhood_prompts") or [record["locality_prompt"]])[:2]]
        same = {other.prompt for other in facts if other.subject == fact.subject}
        apart = [prompts for relation, prompts in templates.items() if relation != record.get("relation_id") and not same & set(prompts)]
        other = chance.choice(chance.choice(apart))
        asked.append(("another relation of the subject", None, other.replace("{}", fact.subject)))
    names = SubjectIndex()
    for fact in facts:
        names.add(fact.subject, fact.id)
    asked = [
        (f"{kind} that name a live subject" if kind == "neighbours" and names.find(text) else kind, right, text)
        for kind, right, text in asked
    ]
    known = {fact.id: fact for fact in facts}
    table = Table(title=f"{Path(name).stem}: {len(facts):,} live facts, {len(asked):,} questions from {records} edits")
    for column in ("questions", "", "scope", "right", "another fact", "none", "case 1/2/3/4"):
        table.add_column(column, justify="left" if column in ("questions", "scope") else "right")
    for kind in dict.fromkeys(kind for kind, _, _ in asked):
        some = [(right, text) for own, right, text in asked if own == kind]
        for scope, store in stores.items():
            routes = store.route([text for _, text in some])
            found = [_tell(known, route.fact, right) for route, (right, _) in zip(routes, some, strict=True)]
            cases = "/".join(str(sum(route.case == case for route in routes)) for case in (1, 2, 3, 4))
            shares = [f"{found.count(what) / len(found):.3f}" for what in ("right", "other", "none")]
            if kind.endswith("live subject"):  # which of them ask for that subject's edit nobody has written down
                shares = ["–", shares[1], shares[0]]
            table.add_row(kind if scope == "guarded" else "", str(len(some)) if scope == "guarded" else "", scope, *shares, cases)
    out.print(table)
    out.print("[dim]right: the edit's own fact, or another one with its prompt and subject; for neighbours and other relations: none.[/]")


def _tell(known: dict[str, Fact], found: Fact | None, right: str | None) -> str:
    if right is None:
        return "right" if found is None else "other"
    if found is None:
        return "none"
    wanted = known[right]
    same = found.id == right or fold_text(found.rewrite_prompt) == fold_text(wanted.rewrite_prompt)
    return "right" if same else "other"


# How fast.


def draw_facts(count: int) -> list[Fact]:
    """Facts of distinct subjects, two to six words each, in CounterFact's templates."""
    chance = random.Random(0)
    if (DATA / "facts/pararel/trex_lms_vocab").is_dir():
        files = sorted((DATA / "facts/pararel/trex_lms_vocab").glob("P*.jsonl"))
        labels = sorted({json.loads(line)["sub_label"] for file in files for line in file.read_text().splitlines() if line})
        templates = sorted({prompt for prompts in list_templates().values() for prompt in prompts})
    else:
        labels = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(3, 9))).title() for _ in range(30_000)]
        templates = ["The mother tongue of {} is", "{} is located in", "{} was created by"]
    names: set[str] = set()
    while len(names) < count:
        first, second = chance.choice(labels).split(), chance.choice(labels).split()
        names.add(" ".join(first[: max(1, len(first) - 1)] + second[-2:]))
    made = sorted(names)
    chance.shuffle(made)
    return [Fact(f"{place:016x}", name, chance.choice(templates), "X") for place, name in enumerate(made)]


def _time_names(encoder: Encoder, sizes: Sequence[int]) -> None:
    table = Table(title="finding facts, one query at a time, median (99th percentile) in µs")
    for name in ("facts", "names: add s", "MB", "match", "long text", "store: add s", "MB", "paper", "guarded", "remove", "append"):
        table.add_column(name, justify="right")
    every = draw_facts(max(sizes))
    for size in sizes:
        table.add_row(f"{size:,}", *_time_store(encoder, every[:size], every[-1]))
    out.print(table)
    out.print(
        "[dim]match: names in a question of one sentence; long text: in 400 words of WikiText; paper: case 2, nothing encoded; guarded:\n"
        "with one question encoded, templates known; MB as Python counts its objects, facts not counted.[/]"
    )


def _time_demonstrations(sizes: Sequence[int]) -> None:
    table = Table(title=f"{SHOWN} nearest of vectors {WIDTH} wide (400 templates' worth of directions, spread): median ms per query")
    for name in ("facts", "form", "add s", "one query", "in 64", f"of the nearest {SHOWN}", "append 100, ms", "remove 100, ms", "MB"):
        table.add_column(name, justify="left" if name == "form" else "right")
    for size in sizes:
        for cells in _time_nearest(size):
            table.add_row(f"{size:,}", *cells)
    out.print(table)


def _time_store(encoder: Encoder, facts: Sequence[Fact], new: Fact) -> Iterator[str]:
    chance = random.Random(1)
    drawn = chance.sample(facts, 300)
    asked = [f"Where {fact.subject}'s story began, {fact.rewrite_prompt}" for fact in drawn]
    noise = " ".join(list_noise()).split() if DATA.is_dir() else [word for fact in drawn for word in fact.subject.split()]
    long = [f"{' '.join(noise[start : start + 400])} {fact.subject}?" for start, fact in enumerate(drawn[:50])]

    def fill_names() -> SubjectIndex:
        names = SubjectIndex()
        for fact in facts:
            names.add(fact.subject, fact.id)
        return names

    names, seconds, size = _weigh(fill_names)
    yield from (f"{seconds:.1f}", f"{size:.0f}", _time_each(names.find, asked), _time_each(names.find, long))
    del names
    store, seconds, size = _weigh(lambda: FactStore(facts, encoder=lambda: encoder, scope="paper"))
    yield from (f"{seconds:.1f}", f"{size:.0f}", _time_each(lambda query: store.route([query]), asked))
    store.scope = "guarded"
    store.route(asked)
    yield _time_each(lambda query: store.route([query]), [f"{query} and" for query in asked[:100]])
    yield _time_each(lambda fact: store.remove([fact.id]), drawn)
    yield _time_each(lambda fact: store.add([fact]), drawn)


def _weigh(make: Callable[[], T]) -> tuple[T, float, float]:
    """What was made, the seconds it took, and its megabytes (made twice: counting is slow)."""
    start = time.perf_counter()
    made = make()
    seconds = time.perf_counter() - start
    del made
    tracemalloc.start()
    made = make()
    size = tracemalloc.get_traced_memory()[0] / 1e6
    tracemalloc.stop()
    return made, seconds, size


def _time_each(call: Callable[[T], object], inputs: Sequence[T]) -> str:
    taken = []
    for item in inputs:
        start = time.perf_counter()
        call(item)
        taken.append((time.perf_counter() - start) * 1e6)
    return f"{statistics.median(taken):.1f} ({sorted(taken)[int(0.99 * len(taken))]:.0f})"


def _time_nearest(size: int) -> Iterator[tuple[str, ...]]:
    """Both forms at this size, whatever the size would choose."""
    chance = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(400, WIDTH, generator=chance), dim=1)

    def draw(count: int) -> torch.Tensor:
        around = centres[torch.randint(len(centres), (count,), generator=chance)]
        return torch.nn.functional.normalize(around + torch.randn(count, WIDTH, generator=chance) / WIDTH**0.5, dim=1)

    rows, queries = draw(size), draw(128)
    exact: list[list[str]] = []
    for form, begin in (("all", size + 10**9), ("groups", 0)):
        chosen, nearest.CELLS_FROM = nearest.CELLS_FROM, begin
        index = NearestFacts("cpu")
        start = time.perf_counter()
        index.add([str(place) for place in range(size)], rows)
        building = time.perf_counter() - start
        single = []
        for query in queries[:50]:
            start = time.perf_counter()
            index.search(query[None], SHOWN)
            single.append((time.perf_counter() - start) * 1e3)
        start = time.perf_counter()
        found = index.search(queries[:64], SHOWN)[1]
        several = (time.perf_counter() - start) / 64 * 1e3
        exact = exact or found
        share = np.mean([len(set(ours) & set(theirs)) / SHOWN for ours, theirs in zip(found, exact, strict=True)])
        start = time.perf_counter()
        index.remove([str(place) for place in range(100)])
        removing = (time.perf_counter() - start) * 1e3
        start = time.perf_counter()
        index.add([f"new-{place}" for place in range(100)], queries[:100])
        appending = (time.perf_counter() - start) * 1e3
        nearest.CELLS_FROM = chosen
        mark = " ·" if (size >= chosen) == (form == "groups") else ""
        weight = size * WIDTH * (4 if form == "all" else 6) / 1e6
        yield (
            form + mark,
            f"{building:.1f}",
            f"{statistics.median(single):.2f}",
            f"{several:.2f}",
            f"{share:.3f}",
            f"{appending:.1f}",
            f"{removing:.1f}",
            f"{weight:.0f}",
        )


def _print_load(when: str) -> None:
    out.print(f"[dim]load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores, {when}[/]")


if __name__ == "__main__":
    typer.run(run)
