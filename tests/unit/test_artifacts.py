"""Stored tensors: equal contents are equal bytes in any process, and bytes that are not ours are named as such."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from errata.editors.adapters import LoraAdapter
from errata.editors.artifacts import WeightDelta, pack_tensors
from errata.editors.base import Pairs
from errata.editors.d4s.moments import Moments
from errata.editors.d4s.state import D4SState
from errata.editors.memory import EditMemory, FactBlock, MemoryOptions
from errata.errors import BaseMismatchError, EditorError, FormatError
from errata.retrieval.facts import Fact

KEYS = {1: torch.arange(8.0).view(2, 4), 3: torch.ones(2, 5)}
PAIRS = Pairs("b" * 64, "p" * 64, (("e1",), ("e2", "Zoë")), torch.arange(6.0).view(2, 3), KEYS)
DELTA = WeightDelta("b" * 64, {"h.1.weight": torch.arange(6.0).view(2, 3), "h.0.weight": torch.ones(1, 1)})
MOMENTS = Moments("b" * 64, "corpus", 3, 17, {1: torch.eye(4)})
ADAPTER = LoraAdapter(
    "b" * 64, 4.0, {"h.1.weight": torch.ones(2, 3)}, {"h.1.weight": torch.arange(10.0).view(5, 2)}, ("d" * 64,), ("e1@3", "Zoë@5")
)
FACT = Fact("e1@3", "Zoë", "{} speaks", "Danish", ("Z.",), ("Zoë was heard to speak",))
BLOCK = FactBlock((FACT,), torch.arange(3.0).view(1, 3))
MEMORY = EditMemory("b" * 64, MemoryOptions(floor=0.5), opened=BLOCK, gone=frozenset(["e2@1", "Zoë@0"]))
STORED = {
    "edit_memory": (MEMORY.to_bytes(), lambda data: EditMemory.from_bytes(data, lambda digest: b"")),
    "facts": (BLOCK.to_bytes(), FactBlock.from_bytes),
    "lora_adapter": (ADAPTER.to_bytes(), LoraAdapter.from_bytes),
    "weight_delta": (DELTA.to_bytes(), WeightDelta.from_bytes),
    "pairs": (PAIRS.to_bytes(), Pairs.from_bytes),
    "moments": (MOMENTS.to_bytes(), Moments.from_bytes),
    "d4s_state": (D4SState.empty("b" * 64, "p" * 64).add(PAIRS).to_bytes(), D4SState.load),
}


def test_a_delta_survives_storage() -> None:
    again = WeightDelta.from_bytes(DELTA.to_bytes())
    assert again.base == DELTA.base
    assert set(again.deltas) == set(DELTA.deltas)
    assert all(torch.equal(again.deltas[name], delta) for name, delta in DELTA.deltas.items())


def test_pairs_survive_storage() -> None:
    again = Pairs.from_bytes(PAIRS.to_bytes())
    assert (again.base, again.prepare, again.owners) == (PAIRS.base, PAIRS.prepare, PAIRS.owners)
    assert torch.equal(again.residuals, PAIRS.residuals)
    assert all(torch.equal(again.keys[layer], keys) for layer, keys in KEYS.items())
    assert again.digest_rows() == PAIRS.digest_rows()


def test_moments_survive_storage() -> None:
    again = Moments.from_bytes(MOMENTS.to_bytes())
    assert (again.base, again.corpus, again.seed, again.tokens) == (MOMENTS.base, MOMENTS.corpus, MOMENTS.seed, MOMENTS.tokens)
    assert torch.equal(again.c[1], MOMENTS.c[1])


def test_states_from_before_there_were_cross_moments_keep_their_name() -> None:
    """Of integers, so that no machine rounds them."""
    data, _ = STORED["d4s_state"]
    assert hashlib.sha256(data).hexdigest() == "cfa8fabac06c3ddcad56df6e137bb17b8d1b7c4f55ef7378061b3999d05d2e94"
    assert not D4SState.load(data).kx
    crossed = D4SState.empty("b" * 64, "p" * 64).add(PAIRS, crossed=True)
    assert torch.equal(D4SState.load(crossed.to_bytes()).kx[1, 3], KEYS[1].double().T @ KEYS[3].double())


def test_equal_contents_are_equal_bytes_however_they_were_made() -> None:
    reverse = WeightDelta(DELTA.base, dict(reversed(DELTA.deltas.items())))
    strided = WeightDelta(DELTA.base, {name: delta.double().T.contiguous().T for name, delta in DELTA.deltas.items()})
    assert DELTA.to_bytes() == reverse.to_bytes() == strided.to_bytes()
    other = Pairs(PAIRS.base, PAIRS.prepare, PAIRS.owners, PAIRS.residuals.clone(), dict(reversed(KEYS.items())))
    assert other.to_bytes() == PAIRS.to_bytes()
    assert PAIRS.take([1, 0]).take([1, 0]).to_bytes() == PAIRS.to_bytes()
    assert PAIRS.take([1, 0]).to_bytes() != PAIRS.to_bytes()


def test_bytes_are_equal_across_processes() -> None:
    """safetensors orders metadata by a hash that differs from process to process; ours must not show it."""
    program = """
import hashlib, torch
from errata.editors.base import Pairs
keys = {1: torch.arange(8.0).view(2, 4), 3: torch.ones(2, 5)}
pairs = Pairs("b" * 64, "p" * 64, (("e1",), ("e2", "Zoë")), torch.arange(6.0).view(2, 3), keys)
print(hashlib.sha256(pairs.to_bytes()).hexdigest())
"""
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root).stdout.strip()
    assert found == hashlib.sha256(PAIRS.to_bytes()).hexdigest()


@pytest.mark.parametrize("kind", STORED)
def test_bytes_that_cannot_be_read_are_named(kind: str) -> None:
    data, load = STORED[kind]
    load(data)
    foreign = save({"x": torch.ones(1)})
    for broken in (b"", b"{}", data[:20], data[:-3], b"\xff" * 64, foreign):
        with pytest.raises(FormatError, match=f"kind '{kind}'"):
            load(broken)


@pytest.mark.parametrize("kind", STORED)
def test_another_kind_or_a_newer_format_is_refused(kind: str) -> None:
    _, load = STORED[kind]
    with pytest.raises(FormatError, match=f"kind '{kind}', found 'other'"):
        load(pack_tensors("other", 1, {"x": torch.ones(1)}, {}))
    with pytest.raises(FormatError, match=f"expected {kind} of format 1, found 2"):
        load(pack_tensors(kind, 2, {"x": torch.ones(1)}, {}))


def test_rows_are_told_apart_by_everything_that_makes_them() -> None:
    first, second = PAIRS.digest_rows()
    assert first != second
    assert PAIRS.take([1]).digest_rows() == [second]
    assert Pairs.concatenate([PAIRS.take([1]), PAIRS.take([0])]).digest_rows() == [second, first]
    changed = Pairs(PAIRS.base, PAIRS.prepare, (("e9",), *PAIRS.owners[1:]), PAIRS.residuals, KEYS)
    nudged = Pairs(PAIRS.base, PAIRS.prepare, PAIRS.owners, PAIRS.residuals + torch.tensor([[1e-6], [0.0]]), KEYS)
    moved = Pairs("c" * 64, PAIRS.prepare, PAIRS.owners, PAIRS.residuals, KEYS)
    assert changed.digest_rows()[0] != first and changed.digest_rows()[1] == second
    assert nudged.digest_rows()[0] != first and nudged.digest_rows()[1] == second
    assert not set(moved.digest_rows()) & {first, second}


def test_blocks_of_pairs_must_belong_together() -> None:
    with pytest.raises(EditorError, match="at least one block"):
        Pairs.concatenate([])
    with pytest.raises(BaseMismatchError):
        Pairs.concatenate([PAIRS, Pairs("c" * 64, PAIRS.prepare, PAIRS.owners, PAIRS.residuals, KEYS)])
