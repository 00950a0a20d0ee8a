"""D4S as an editor: closed-form weight edits on frozen keys, with sums as the only state (design §5).

The published code (nlpkeg/D4S at c049ea7) keeps its sums in a module global, cannot save or take back anything, and measures upper keys
under lower updates, which makes them depend on order. Here keys and residuals are read from the base only, so that pairs commute. Keys as
published are an option (`cascade`); they are frozen into the pair once they are read, so that sums stay sums.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch

from errata.editors.artifacts import Fetch, WeightDelta
from errata.editors.base import Pairs, Preparation, Prepared, Progress, list_units
from errata.editors.d4s.fits import solve_for_fit
from errata.editors.d4s.groups import group_keys, read_bare_keys
from errata.editors.d4s.moments import Moments
from errata.editors.d4s.reading import read_base, read_keys
from errata.editors.d4s.solve import PairSystem, SumSystem, estimate_condition, factor_moments
from errata.editors.d4s.state import D4SState
from errata.editors.d4s.targets import optimise_targets
from errata.editors.rows import EditRows, build_all_rows
from errata.edits import Edit
from errata.errors import BaseMismatchError, EditorError
from errata.modeling.layout import ModelLayout
from errata.modeling.loading import Base
from errata.modeling.patch import attach, require_untouched
from errata.profiles import Profile

CHUNK_TOKENS = 4_096
"""Padded tokens optimised side by side. Bounds the memory of one step, while matrix products are already as wide as they need to be."""
_UNCROSSED = "state: expected the cross moments that spread 'refresh' needs, found sums without them: the pairs have to be summed anew"


class D4S:
    """`W_l = W0_l + rk_l (λ C_l + kk_l)⁻¹ / share_l`, everything anchored at the base W0.

    With frozen keys, what the layers 1 … L of a model do to one pair adds up to `Σ X_l k_l` at the site, to first order. The spread says
    what each is asked for. `refresh`, bottom-up, asks layer l for `(r − Σ_{m<l} X_m k_m) / (L − l + 1)`: what the layers below leave of
    the residual, divided among those still to come, so that all do equal parts if each writes what it is asked. Summed over pairs,
    `Σ (r − Σ X_m k_m) k_lᵀ = rk_l − Σ_{m<l} X_m kx_ml` with `kx_ml = Σ k_m k_lᵀ`, which is additive, hence

        X_l = (rk_l − Σ_{m<l} X_m kx_ml) (λ C_l + kk_l)⁻¹ / (L − l + 1)

    MEMIT measures that remainder on the edited model, with keys that move; here it follows from stored sums, in any order of edits.
    """

    name = "d4s"
    version = "1"

    def __init__(
        self,
        profile: Profile,
        moments: Moments,
        layout: ModelLayout,
        *,
        scratch: Path | None = None,
        hoards: bool = True,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        """
        Args:
            scratch: folder for sums that are too large for memory; None is the system's place for temporary files.
            chunk_tokens: padded tokens of edits that are optimised side by side.
            hoards: whether factors of all layers are kept until they are wanted again, d_in² float64 each, or one at a time.

        Raises:
            BaseMismatchError: the moments are of another base.
            EditorError: an edited layer has no moments.
        """
        if moments.base != profile.base:
            raise BaseMismatchError(f"second moments: expected base {profile.base[:12]}, found {moments.base[:12]}")
        missing = set(profile.prepare.layers) - set(moments.c)
        if missing:
            raise EditorError(f"second moments: expected layers {list(profile.prepare.layers)}, found none for {sorted(missing)}")
        self._profile, self._moments, self._layout = profile, moments, layout
        self._scratch, self._hoards, self._chunk_tokens = scratch, hoards, chunk_tokens
        # Layer → factor of C, made when first wanted: C never changes.
        self._factors: dict[int, torch.Tensor] = {}
        # The last state solved and its systems: `measure_fits` asks about the state that `solve` has just factored.
        self._formed: tuple[D4SState | None, dict[int, PairSystem | SumSystem]] = (None, {})

    @property
    def order_free(self) -> bool:
        """Every spread is linear in sums over pairs, `d4s_code` too; only keys that are read under lower updates know what came before."""
        return self._profile.prepare.keying == "frozen"

    @property
    def options(self) -> Mapping[str, Any]:
        return self._profile.solve.model_dump(mode="json")

    def change(self, profile: Profile) -> Self:
        """An editor of another profile of the same base and second moments. Factors of C, which no profile changes, are shared."""
        limits: dict[str, Any] = {"scratch": self._scratch, "hoards": self._hoards, "chunk_tokens": self._chunk_tokens}
        other = type(self)(profile, self._moments, self._layout, **limits)
        other._factors = self._factors
        return other

    def find_lambda(self, pairs: Pairs, fit: float) -> float:
        """The λ at which the median ρ of pairs that are alone in the model would be `fit` under the spread `even`; to three digits."""
        return solve_for_fit(pairs.keys, self._factor, fit)

    def find_groups(self, base: Base, edits: Sequence[Edit]) -> list[tuple[str, ...]]:
        """See `Editor.find_groups`: edits of one subject whose bare keys are nearly equal.

        Raises:
            BaseMismatchError: as `prepare`.
        """
        self._require_base(base)
        subjects = Counter(edit.subject_key for edit in edits)
        rows, _ = self._build_rows(base, [edit for edit in edits if subjects[edit.subject_key] > 1])
        if not rows:
            return []
        names = [edit.subject_key for edit in edits if edit.edit_id in rows]
        ids = list(rows)
        groups = group_keys(names, read_bare_keys(base, list(rows.values()), self._profile.prepare.layers))
        return [tuple(sorted(ids[index] for index in group)) for group in groups if len(group) > 1]

    def prepare(
        self,
        base: Base,
        edits: Sequence[Edit],
        on_progress: Progress | None = None,
        groups: Sequence[Sequence[str]] = (),
        state: D4SState | None = None,
    ) -> Prepared:
        """Pairs of edits, read from the base, in chunks that fit in memory.

        Args:
            groups: ids of edits that share one pair; all others have one of their own. One that is refused leaves its group.
            state: what they will be added to; looked at where keys cascade.

        Raises:
            BaseMismatchError: the profile is for another base, or the base carries an artifact now.
            EditorError: keys cascade, and a system of the state cannot be solved.
        """
        self._require_base(base)
        options = self._profile.prepare
        rows, refused = self._build_rows(base, edits)
        parts: list[Pairs] = []
        notes: dict[str, Preparation] = {}
        done = 0
        for chunk in chunk_units(rows, list_units(rows, groups), self._chunk_tokens):
            chosen = [[rows[edit_id] for edit_id in unit] for unit in chunk]
            reading = read_base(base, chosen, options.layers)
            residuals, measured = optimise_targets(base, chosen, reading, options)
            keys = {layer: key.cpu() for layer, key in reading.keys.items()}
            told = dict(zip((edit_id for unit in chunk for edit_id in unit), measured, strict=True))
            finite = []
            for index, unit in enumerate(chunk):
                if _is_finite(told[unit[0]], residuals[index], [key[index] for key in keys.values()]):
                    finite.append(index)
                    notes |= {edit_id: told[edit_id] for edit_id in unit}
                else:
                    refused |= dict.fromkeys(unit, "its optimisation gave non-finite values")
            parts.append(Pairs(base.digest, options.digest, tuple(chunk), residuals, keys).take(finite))
            done += len(told)
            if on_progress:
                on_progress(done, len(rows))
        pairs = Pairs.concatenate(parts) if notes else None
        if pairs is not None and not self.order_free:
            pairs = self._cascade(base, pairs, rows, self.empty_state() if state is None else state)
        return Prepared(pairs, notes, refused)

    def _cascade(self, base: Base, pairs: Pairs, rows: Mapping[str, EditRows], state: D4SState) -> Pairs:
        """The pairs with the keys of each layer above the first read on the base with the layers below solved for all that is live and for
        these (nlpkeg/D4S `memit_main.py`; algorithms.md §1.1). The weights of a layer depend on keys up to it alone, so bottom-up each has
        what it needs; keys further up are still those of the base, and are not looked at."""
        units = chunk_units(rows, pairs.owners, self._chunk_tokens)
        below: dict[int, torch.Tensor] = {}
        for lower, layer in pairwise(self._profile.prepare.layers):
            below[lower] = self._solve_layer(self.merge(state, pairs, None), lower, below)
            written = {self._layout.weight_name(number): delta.float() for number, delta in below.items()}
            with attach(base, [WeightDelta(base.digest, written)]):
                parts = [read_keys(base, [[rows[edit_id] for edit_id in unit] for unit in chunk], layer).cpu() for chunk in units]
            pairs = replace(pairs, keys={**pairs.keys, layer: torch.cat(parts)})
        return pairs

    def empty_state(self) -> D4SState:
        return D4SState.empty(self._profile.base, self._profile.prepare.digest)

    def load_state(self, source: bytes | Path, fetch: Fetch | None = None) -> D4SState:
        """
        Args:
            fetch: not asked, since a state has no parts.

        Raises:
            FormatError: not a state.
            BaseMismatchError: a state of another base or other prepare options.
            EditorError: sums without the cross moments that this spread needs; the pairs have to be summed anew.
        """
        state = self.carry_state(D4SState.load(source))
        if state is None:
            raise EditorError(_UNCROSSED)
        return state

    def carry_state(self, state: D4SState) -> D4SState | None:
        """See `Editor.carry_state`: only sums without cross moments cannot be refreshed."""
        self._require_site(state)
        if self._refreshes:
            return state if state.crossed else None
        return state.forget_crosses()

    def merge(self, state: D4SState, add: Pairs | None, remove: Pairs | None) -> D4SState:
        """Removal first, so that a replacement in a batch never passes through a doubled key."""
        if remove is not None and len(remove):
            state = state.remove(remove)
        if add is not None and len(add):
            state = state.add(add, self._refreshes)
        return state.settle(self._scratch)

    def solve(self, state: D4SState) -> WeightDelta | None:
        """See `Editor.solve`. Raises EditorError: the system is singular, or its solution is not finite."""
        deltas = {name: delta.float() for name, delta in self._solve_layers(state)}
        return WeightDelta(self._profile.base, deltas) if deltas else None

    def solve_exact(self, state: D4SState) -> dict[str, torch.Tensor]:
        """See `Editor.solve_exact`. Raises as `solve`."""
        return dict(self._solve_layers(state))

    def _solve_layers(self, state: D4SState) -> Iterator[tuple[str, torch.Tensor]]:
        """Layer by layer, so that who rounds the deltas need not hold all of them in float64; `refresh` has to."""
        self._require_own(state)
        if state.count == 0:
            return
        below: dict[int, torch.Tensor] = {}
        for layer in self._profile.prepare.layers:
            delta = self._solve_layer(state, layer, below)
            if self._refreshes:
                below[layer] = delta
            yield self._layout.weight_name(layer), delta

    def _solve_layer(self, state: D4SState, layer: int, below: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """One layer's ΔW [d_out, d_in] float64, given those below, which `refresh` subtracts. Raises as `solve`."""
        right = state.read_right(layer, below if self._refreshes else {})
        delta: torch.Tensor = self._form(state, layer).solve(right) / self._shares[layer]
        if not torch.isfinite(delta).all():
            raise EditorError(f"layer {layer}: the solved delta is not finite")
        return delta

    def measure_fits(self, state: D4SState, pairs: Pairs) -> torch.Tensor:
        """ρ of each pair: the fraction of its whole residual r that its own part of the weights realises, `Σ_l X_l k_l` with all other
        residuals at zero being ρ·r: [n] float64. Near 0 the edit is not written; near 1 λ no longer protects anything; above 1, as
        `d4s_code` can be, it overshoots.

        Weights are linear in residuals, hence this asks keys alone: X_l holds `r g_lᵀ`, `g_l = A_l⁻¹ (k_l − Σ_{m<l} kx_mlᵀ g_m) / share_l`
        with `A = λC + kk` and, but for `refresh`, without the sum over m; ρ = Σ_l g_l·k_l.
        """
        self._require_own(state)
        if not self._refreshes:
            fits = [self._form(state, layer).measure_fit(pairs.keys[layer]) / share for layer, share in self._shares.items()]
            return torch.stack(fits).sum(dim=0)
        total = torch.zeros(len(pairs), dtype=torch.float64)
        below: dict[int, torch.Tensor] = {}
        for layer, share in self._shares.items():
            keys = pairs.keys[layer].double().T
            left = keys
            for lower, gain in below.items():
                left = left - state.carry(lower, layer, gain)
            below[layer] = self._form(state, layer).divide(left) / share
            total += (keys * below[layer]).sum(dim=0)
        return total

    def find_uncovered(self, state: D4SState) -> dict[str, str]:
        """See `Editor.find_uncovered`: what is subtracted leaves nothing."""
        self._require_own(state)
        return {}

    def measure_conditions(self, state: D4SState) -> dict[str, float]:
        """See `Editor.measure_conditions`: of λC + kk (`estimate_condition`). Raises EditorError: a system is singular."""
        self._require_own(state)
        layers = self._profile.prepare.layers if state.count else ()
        return {self._layout.weight_name(layer): estimate_condition(self._form(state, layer)) for layer in layers}

    def _build_rows(self, base: Base, edits: Sequence[Edit]) -> tuple[dict[str, EditRows], dict[str, str]]:
        options = self._profile.prepare
        return build_all_rows(base.tokenizer, edits, options.contexts, base.span, options.site)

    def _require_base(self, base: Base) -> None:
        if base.digest != self._profile.base:
            raise BaseMismatchError(f"profile is for the base {self._profile.base[:12]}, this model is {base.digest[:12]}")
        require_untouched(base)

    @property
    def _refreshes(self) -> bool:
        return self._profile.solve.spread == "refresh"

    @property
    def _shares(self) -> dict[int, int]:
        """Layer, ascending → what it is asked for is divided by this."""
        layers = self._profile.prepare.layers
        even = self._profile.solve.spread == "even"
        return {layer: len(layers) if even else len(layers) - below for below, layer in enumerate(layers)}

    def _require_own(self, state: D4SState) -> None:
        self._require_site(state)
        if self._refreshes and not state.crossed:
            raise EditorError(_UNCROSSED)

    def _require_site(self, state: D4SState) -> None:
        expected = {"base": self._profile.base, "prepare options": self._profile.prepare.digest}
        for name, found in (("base", state.base), ("prepare options", state.prepare)):
            if found != expected[name]:
                raise BaseMismatchError(f"state: expected {name} {expected[name][:12]}, found {found[:12]}")

    def _form(self, state: D4SState, layer: int) -> PairSystem | SumSystem:
        """One layer's system, in the form of the state. Raises EditorError: it is singular."""
        lam, c = self._profile.solve.lam, self._moments.c[layer]
        if state is not self._formed[0]:
            self._formed = (state, {})
        systems = self._formed[1]
        if layer in systems:
            return systems[layer]
        if not self._hoards:
            systems.clear()
        try:
            if state.pairs is None:
                systems[layer] = SumSystem.form(state.kk[layer], c, lam)
            else:
                systems[layer] = PairSystem.form(state.pairs.keys[layer], self._factor(layer), lam)
        except EditorError as error:
            raise EditorError(f"layer {layer}: {error}") from None
        return systems[layer]

    def _factor(self, layer: int) -> torch.Tensor:
        """Cholesky factor of one layer's C. Raises EditorError: C is not positive definite."""
        if layer not in self._factors:
            if not self._hoards:
                self._factors.clear()
            self._factors[layer] = factor_moments(self._moments.c[layer])
        return self._factors[layer]


def chunk_units(rows: Mapping[str, EditRows], units: Iterable[tuple[str, ...]], tokens: int) -> list[list[tuple[str, ...]]]:
    """Units in their order, cut so that a chunk's padded tokens stay below `tokens`."""
    chunks: list[list[tuple[str, ...]]] = []
    longest, count = 0, 0
    for unit in units:
        wide = max(len(row.ids) for edit_id in unit for row in rows[edit_id].contexts)
        more = sum(len(rows[edit_id].contexts) for edit_id in unit) + 1
        longest, count = max(longest, wide), count + more
        if not chunks or longest * count > tokens:
            chunks.append([])
            longest, count = wide, more
        chunks[-1].append(unit)
    return chunks


def _is_finite(note: Preparation, residual: torch.Tensor, keys: Sequence[torch.Tensor]) -> bool:
    return math.isfinite(note.loss) and all(bool(torch.isfinite(tensor).all()) for tensor in (residual, *keys))
