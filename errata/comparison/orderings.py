"""The orderings of the published tables (algorithms.md, Part 6), each asked of every stream: whether it holds, and by which numbers.

Nothing is tuned until they hold. Where one does not, the reason given is what is likely, not what was shown.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from errata.comparison.summary import Comparison


class Found(NamedTuple):
    """What one stream says to a claim."""

    holds: bool
    numbers: str


@dataclass(frozen=True)
class Stream:
    """One stream in batches of one size, as a claim looks at it."""

    comparison: Comparison
    batch: int
    seed: int

    def end(self, method: str, measure: str) -> float:
        """After the last edit. Raises LookupError: not measured."""
        return self.at(method, None, measure)

    def at(self, method: str, edits: int | None, measure: str) -> float:
        """Raises LookupError: not measured."""
        value = self.comparison.read(method, self.batch, self.seed, edits, measure)
        if value is None:
            raise LookupError(f"{method}: no {measure}")
        return value

    def walk(self, method: str, measure: str, first: int) -> list[float]:
        """At every stop from `first` edits on. Raises LookupError: fewer than two."""
        stops = [stop for stop in self.comparison.list_stops(self.batch) if stop >= first]
        if len(stops) < 2:
            raise LookupError("too short a stream")
        return [self.at(method, stop, measure) for stop in stops]


@dataclass(frozen=True)
class Claim:
    """One ordering."""

    text: str
    source: str
    check: Callable[[Stream], Found]
    otherwise: str
    """The likely reason where it does not hold on a small base."""


class Verdict(NamedTuple):
    claim: Claim
    batch: int
    found: dict[int, Found]
    """Seed → what its stream says."""


def judge_claims(comparison: Comparison) -> list[Verdict]:
    """Every claim that the measured methods allow, for every size of batches."""
    verdicts = []
    for claim in CLAIMS:
        for batch in comparison.batches:
            found = {}
            for seed in comparison.seeds:
                try:
                    found[seed] = claim.check(Stream(comparison, batch, seed))
                except LookupError:
                    continue
            if found:
                verdicts.append(Verdict(claim, batch, found))
    return verdicts


def _spell(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.3f}".removeprefix("0")


def _compare(left: float, sign: str, right: float, slack: float = 0.0) -> Found:
    """`left sign right`; `slack` is added to the side that makes it easier, and said."""
    holds = left < right + slack if sign == "<" else left <= right + slack
    return Found(holds, f"{_spell(left)} {sign} {_spell(right)}" + (f" + {slack:g}" if slack else ""))


def _rank(names: Sequence[str], measure: str) -> Callable[[Stream], Found]:
    """Each below the next at the end of the stream."""

    def check(stream: Stream) -> Found:
        values = [stream.end(name, measure) for name in names]
        holds = all(left < right for left, right in zip(values, values[1:], strict=False))
        return Found(holds, " < ".join(map(_spell, values)))

    return check


def _keeps(method: str, measure: str, slack: float) -> Callable[[Stream], Found]:
    """After the last edit no lower than after the first hundred, but for `slack`."""

    def check(stream: Stream) -> Found:
        walked = stream.walk(method, measure, 100)
        return _compare(walked[0], "≤", walked[-1], slack)

    return check


def _reaches(method: str, measure: str, least: float) -> Callable[[Stream], Found]:
    return lambda stream: _compare(least, "≤", stream.end(method, measure))


def _stays_below(method: str, measure: str, most: float) -> Callable[[Stream], Found]:
    return lambda stream: _compare(stream.end(method, measure), "≤", most)


def _near(method: str, other: str, measure: str, slack: float) -> Callable[[Stream], Found]:
    return lambda stream: _compare(abs(stream.end(method, measure) - stream.end(other, measure)), "≤", slack)


def _falls(stream: Stream) -> Found:
    walked = stream.walk("d4s", "specificity", 1)
    return Found(all(left >= right for left, right in zip(walked, walked[1:], strict=False)), " ≥ ".join(map(_spell, walked)))


def _falls_slower(stream: Stream) -> Found:
    drops = [walked[0] - walked[-1] for walked in (stream.walk(name, "specificity", 100) for name in ("d4s", "memit"))]
    return _compare(drops[0], "<", drops[1])


def _halves(stream: Stream) -> Found:
    share = stream.end("d4s", "generalization") / max(stream.end("d4s", "efficacy"), 1e-9)
    return Found(0.3 <= share <= 0.7, f"{_spell(share)} of its efficacy")


def _crosses(stream: Stream) -> Found:
    early, late = (stream.at("memit", edits, "efficacy") - stream.at("d4s", edits, "efficacy") for edits in (100, None))
    return Found(early >= 0 > late, f"MEMIT − D4S {early:+.3f} after 100, {late:+.3f} at the end")


def _bounds(stream: Stream) -> Found:
    walked = stream.walk("d4s", "norm_ratio", 100)
    return Found(walked[-1] <= 1.5 * walked[0], f"{walked[0]:.2f} → {walked[-1]:.2f}")


def _stays_like_memory(method: str) -> Callable[[Stream], Found]:
    return lambda stream: _compare(abs(stream.end(method, "es") - stream.end(method, "ps")), "≤", 0.05)


_SMALL = (
    "Where a stream leaves room in the layers nothing is forgotten. Where it overfills them D4S gives up efficacy for what C protects, and "
    "MEMIT specificity for its latest edits: look at both."
)
_ROOM = "The base is small: its layers have fewer directions than a stream has edits, and what one edit takes another one misses."

CLAIMS: tuple[Claim, ...] = (
    Claim("D4S keeps its efficacy from 100 edits to the last (− .05)", "D4S Table 2", _keeps("d4s", "efficacy", 0.05), _ROOM),
    Claim(
        "MEMIT without history forgets: less than half of its edits are left", "D4S Table 2", _stays_below("memit", "efficacy", 0.5), _SMALL
    ),
    Claim("ROME forgets: less than a fifth is left", "D4S Table 2", _stays_below("rome", "efficacy", 0.2), _SMALL),
    Claim("MEMIT may lead after 100 edits, D4S after the last", "D4S Table 2", _crosses, _SMALL),
    Claim("efficacy: MEMIT < D4S", "D4S Table 2", _rank(("memit", "d4s"), "efficacy"), _SMALL),
    Claim("score: MEMIT < D4S", "D4S Table 2, whose mean is arithmetic", _rank(("memit", "d4s"), "score"), _SMALL),
    Claim(
        "efficacy: ROME < R-ROME",
        "rebuilding ROME",
        _rank(("rome", "r_rome"), "efficacy"),
        "A profile without contexts, or contexts that hardly move keys: the two keys of ROME agree.",
    ),
    Claim("efficacy: MEMIT < MEMIT with history", "AlphaEdit; algorithms.md §T", _rank(("memit", "memit_history"), "efficacy"), _SMALL),
    Claim("efficacy: MEMIT < AlphaEdit", "AlphaEdit Table 1", _rank(("memit", "alphaedit"), "efficacy"), _SMALL),
    Claim("efficacy: constrained fine-tuning < D4S", "D4S Table 2", _rank(("ft", "d4s"), "efficacy"), "The ball is wide for this base."),
    Claim(
        "efficacy: LoRA fine-tuning in sequence < D4S",
        "LTE, RECIPE tables",
        _rank(("lora", "d4s"), "efficacy"),
        "Too few edits to overwrite each other.",
    ),
    Claim(
        "GRACE recalls what it was told (≥ .95)",
        "D4S Table 2",
        _reaches("grace", "efficacy", 0.95),
        "Keys of this base lie within each other's ε.",
    ),
    Claim(
        "GRACE does not generalise (≤ .1)",
        "D4S Table 2",
        _stays_below("grace", "generalization", 0.1),
        "Paraphrases of this base end in states that lie within ε.",
    ),
    Claim(
        "GRACE leaves all else (specificity ≥ .95)",
        "D4S Table 2",
        _reaches("grace", "specificity", 0.95),
        "Neighbours of this base end in states that lie within ε.",
    ),
    Claim("generalization: GRACE < D4S", "D4S Table 2", _rank(("grace", "d4s"), "generalization"), _ROOM),
    Claim("D4S's specificity only falls", "D4S Table 2", _falls, "Sampling: the same neighbours are not asked at each stop."),
    Claim("D4S's specificity falls more slowly than MEMIT's", "D4S Table 2", _falls_slower, _SMALL),
    Claim(
        "D4S generalises to about half of its efficacy (.3–.7)",
        "D4S CounterFact",
        _halves,
        "Few templates: this base reads paraphrases at the same place.",
    ),
    Claim(
        "D4S's norm is bounded: at most 1.5 times that after 100 edits",
        "D4S Fig. 5",
        _bounds,
        "The bump of Part 5: the norm peaks where edits reach the rank of the keys, and this stream ends before or at it.",
    ),
    Claim(
        "norm: D4S < MEMIT",
        "D4S Fig. 5",
        _rank(("d4s", "memit"), "norm_ratio"),
        "Fixed targets: D4S fits all edits, MEMIT forgets them, which takes less weight (algorithms.md, Part 5).",
    ),
    Claim("norm: D4S < ROME", "D4S Fig. 5", _rank(("d4s", "rome"), "norm_ratio"), _SMALL),
    Claim(
        "D4S leaves abilities as they were (− .05)",
        "D4S Table 4",
        lambda stream: _compare(stream.end("base", "ability"), "≤", stream.end("d4s", "ability"), 0.05),
        _ROOM,
    ),
    Claim(
        "MIKE answers paraphrases as it does prompts (|ES − PS| ≤ .05)",
        "MIKE Table 2",
        _stays_like_memory("mike"),
        "Routing is real here, and guarded: a paraphrase far from all known ones gets no fact. The paper routes nothing.",
    ),
    Claim("NS: MIKE < base", "MIKE Table 2", _rank(("mike", "base"), "ns"), "Routing keeps neighbours out; the paper's are shown facts."),
    Claim(
        "NS: IKE < MEMIT < DistillMIKE < base",
        "MIKE Table 2",
        _rank(("ike", "memit", "distillmike", "base"), "ns"),
        "A short stream leaves the others at their ceiling; or this base reads its context less well than a large one.",
    ),
    Claim(
        "PS: MEMIT < DistillMIKE < MIKE",
        "MIKE Table 2",
        _rank(("memit", "distillmike", "mike"), "ps"),
        "A short stream leaves MEMIT at its ceiling; or this base reads its context less well than a large one; and routing is real here.",
    ),
    Claim(
        "iReVa recalls what it was told (≥ .95)",
        "iReVa Table 1",
        _reaches("ireva", "efficacy", 0.95),
        "Tokens of a target that are alike in this base's last layers.",
    ),
    Claim(
        "iReVa leaves neighbours as the base has them (truth within .05)",
        "iReVa Table 1",
        _near("ireva", "base", "truth", 0.05),
        "States of this base's late layers lie nearer than θ.",
    ),
    Claim(
        "retrofit moves iReVa's efficacy by at most .01",
        "iReVa Table 3",
        _near("ireva", "ireva_retrofit", "efficacy", 0.01),
        "A threshold that training moves matters where states lie close.",
    ),
    Claim(
        "teacher forcing flatters: D4S says at most what it is scored for",
        "Mirage of model editing",
        lambda stream: _compare(stream.end("d4s", "said"), "≤", stream.end("d4s", "efficacy"), 0.02),
        "Greedy answers are asked of a sample.",
    ),
)
