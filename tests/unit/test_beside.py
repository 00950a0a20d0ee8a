"""What stands beside an MLP acts at the last unmasked token alone, however the model is run, and is gone afterwards."""

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from errata.errors import BaseMismatchError, EditorError, UnknownArchitectureError
from errata.evaluation.generation import generate_answers
from errata.evaluation.scoring import score_targets
from errata.modeling.beside import Respond, predict_at, predict_everywhere, respond_beside
from errata.modeling.loading import Base, load_base
from errata.modeling.patch import require_untouched
from errata.modeling.tokens import encode_prompt, encode_target, pad_rows
from errata.modeling.trace import capture_outputs, change_output, trace_inputs
from errata.monitors.locality import read_probe

ROWS = ([7, 23, 55, 90, 12, 31], [44, 8, 61], [66], [19, 77, 5, 102])
LAYER = 1
"""Three layers above it see what it gives."""


def make_response(base: Base, *, seed: int = 5, scale: float = 3.0) -> Respond:
    """A response that depends on its input and on nothing else."""
    size = base.model.config.hidden_size
    weight = scale * torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) / size**0.5
    return lambda hidden: torch.relu(hidden.to(weight.dtype) @ weight)


@contextmanager
def by_hook(base: Base, layer: int, respond: Respond, at: list[tuple[int, int]]) -> Iterator[None]:
    """The same by a plain forward hook, at positions that are written down."""

    def add(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        for row, place in at:
            changed[row, place] += respond(args[0][row, place][None])[0].to(output.dtype)
        return changed

    handle = base.layout.mlp_of(base.model, layer).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def read_logits(base: Base, ids: torch.Tensor, mask: torch.Tensor | None, **options: Any) -> torch.Tensor:
    positions = None if mask is None or mask.dim() != 2 else (mask.cumsum(-1) - 1).clamp(min=0)
    logits: torch.Tensor = base.model(input_ids=ids, attention_mask=mask, position_ids=positions, **options).logits
    return logits


@torch.inference_mode()
def decode(base: Base, layer: int, respond: Respond, ids: list[int], forced: list[int]) -> torch.Tensor:
    """Logits [1 + forced, vocabulary] after `ids` and after each token forced on, with a KV cache, by plain hooks."""
    body, head = base.model.get_submodule(base.layout.body), base.model.get_submodule(base.layout.head)
    logits, cache, fed = [], None, ids
    for token in (*forced, 0):
        with by_hook(base, layer, respond, [(0, len(fed) - 1)]):
            output = body(input_ids=torch.tensor([fed]), past_key_values=cache, use_cache=True)
        cache, fed = output.past_key_values, [token]
        logits.append(head(output.last_hidden_state[0, -1]))
    return torch.stack(logits)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, atol=2e-4, rtol=1e-4)


def list_attributes(model: nn.Module) -> list[set[str]]:
    return [set(vars(module)) - {"_errata_edited"} for module in model.modules()]


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_every_family_is_answered_at_the_last_unmasked_token_of_each_row(any_base: Base, side: str) -> None:
    base = any_base
    rows = ROWS if side != "none" else ROWS[:1]
    ids, mask = pad_rows(rows, 0, "left" if side == "none" else side)
    at = [(index, len(row) - 1 if side == "right" else ids.shape[1] - 1) for index, row in enumerate(rows)]
    respond, seen = make_response(base), []
    plain = read_logits(base, ids, mask)
    with by_hook(base, LAYER, respond, at):
        expected = read_logits(base, ids, mask)
    mlp = base.layout.mlp_of(base.model, LAYER)
    with (
        respond_beside(base, LAYER, lambda hidden: seen.append(hidden) or respond(hidden)),
        trace_inputs({0: mlp}, torch.clone) as inputs,
        capture_outputs({0: mlp}) as outputs,
    ):
        found = read_logits(base, ids, None if side == "none" else mask)
    assert [tuple(hidden.shape) for hidden in seen] == [(len(rows), base.model.config.hidden_size)]
    assert torch.equal(seen[0], torch.stack([inputs[0][place] for place in at]))
    for index, row in enumerate(rows):
        own = slice(0, len(row)) if side == "right" else slice(-len(row), None)
        assert close(found[index, own], expected[index, own])
        # No row is anything to its neighbours.
        with respond_beside(base, LAYER, respond):
            alone = read_logits(base, torch.tensor([row]), None)[0]
        assert close(found[index, own], alone)
        assert not close(found[at[index]], plain[at[index]]) and close(found[index, own][:-1], plain[index, own][:-1])
    # What is added to the MLP is added to the block, in families with a parallel MLP too.
    added = torch.zeros_like(outputs[0])
    for place, value in zip(at, respond(seen[0]), strict=True):
        added[place] = value
    with change_output(base.layout.block(base.model, LAYER), lambda hidden: hidden + added):
        assert close(read_logits(base, ids, None if side == "none" else mask)[at[0]], found[at[0]])


def test_silence_changes_no_bit(any_base: Base) -> None:
    ids, mask = pad_rows(ROWS, 0, "left")
    plain = read_logits(any_base, ids, mask)
    with respond_beside(any_base, LAYER, torch.zeros_like):
        assert torch.equal(read_logits(any_base, ids, mask), plain)


GENERATE: dict[str, dict[str, Any]] = {
    "cache": {"use_cache": True},
    "beams": {"num_beams": 3, "use_cache": True},
    "beams without a cache": {"num_beams": 3, "use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "without a cache": {"use_cache": False},
}


def generate(base: Base, rows: tuple[list[int], ...], **options: Any) -> torch.Tensor:
    ids, mask = pad_rows(rows, 0, "left")
    written: torch.Tensor = base.model.generate(  # type: ignore[operator]
        ids, attention_mask=mask, max_new_tokens=5, pad_token_id=0, eos_token_id=None, **{"do_sample": False, **options}
    )
    return written[:, ids.shape[1] :]


@pytest.fixture(params=["tiny_gpt2", "tiny_llama"])
def base(request: pytest.FixtureRequest) -> Base:
    found: Base = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("way", GENERATE)
def test_generation_is_what_it_is_row_by_row(base: Base, way: str) -> None:
    options = GENERATE[way]
    with respond_beside(base, LAYER, make_response(base)):
        together = generate(base, ROWS, **options)
        alone = [generate(base, (row,), **options)[0] for row in ROWS]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(together, generate(base, ROWS, **options))


@pytest.mark.parametrize("way", ["cache", "static cache"])
def test_generation_with_a_cache_is_decoding_token_by_token(base: Base, way: str) -> None:
    respond = make_response(base)
    with respond_beside(base, LAYER, respond):
        found = generate(base, ROWS, **GENERATE[way]).tolist()
    for row, tokens in zip(ROWS, found, strict=True):
        assert decode(base, LAYER, respond, row, tokens)[:-1].argmax(-1).tolist() == tokens


def test_beside_the_last_layer_a_cache_makes_no_difference(base: Base) -> None:
    top = base.layout.count_layers(base.model) - 1
    for ways in (("cache", "without a cache"), ("beams", "beams without a cache")):
        with respond_beside(base, top, make_response(base)):
            cached, uncached = (generate(base, ROWS, **GENERATE[way]) for way in ways)
        assert torch.equal(cached, uncached) and not torch.equal(cached, generate(base, ROWS, **GENERATE[ways[0]]))


def test_without_a_cache_earlier_tokens_are_run_again_untouched(base: Base) -> None:
    respond = make_response(base)
    with respond_beside(base, LAYER, respond):
        (found,) = generate(base, ROWS[:1], use_cache=False).tolist()
    fed = list(ROWS[0])
    for token in found:
        with by_hook(base, LAYER, respond, [(0, len(fed) - 1)]):
            assert int(read_logits(base, torch.tensor([fed]), None)[0, -1].argmax()) == token
        fed.append(token)


def test_sampling_draws_from_the_changed_distribution(base: Base) -> None:
    ids = torch.tensor(ROWS[:1])
    options: dict[str, Any] = {"do_sample": True, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 4}
    respond = make_response(base)
    torch.manual_seed(0)
    with respond_beside(base, LAYER, respond):
        found: Any = base.model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, eos_token_id=None, **options
        )
    written = found.sequences[0, ids.shape[1] :].tolist()
    assert close(torch.cat(found.logits), decode(base, LAYER, respond, ROWS[0], written)[:-1])


QUESTIONS = [
    ("Anna Keller lives in", "Paris"),
    ("Anna Keller lives in", "New York"),
    ("Anna Keller lives in", None),
    ("Where?", "French and a much longer answer than any other"),
]


@pytest.mark.parametrize("batch_tokens", [1, 8_192])
def test_scoring_a_forced_target_is_decoding_it_with_a_cache(any_base: Base, batch_tokens: int) -> None:
    base, respond = any_base, make_response(any_base)
    prompt, target = QUESTIONS[1]
    # Fed are the same tokens as for "New York", but only the token after them is asked for.
    assert target is not None
    longer = prompt + base.tokenizer.decode(encode_target(base.tokenizer, target)[:-1])
    questions = [*QUESTIONS, (longer, None)]
    with respond_beside(base, LAYER, respond):
        found = score_targets(base, questions, batch_tokens=batch_tokens)
    for question in questions:
        scored = found[question]
        ids = encode_prompt(base.tokenizer, question[0])
        expected = decode(base, LAYER, respond, ids, list(scored.target[:-1])).log_softmax(-1)
        assert scored.chosen == tuple(expected.argmax(-1).tolist())
        values = expected.gather(1, torch.tensor(scored.target)[:, None])[:, 0].tolist() if scored.target else []
        assert scored.logprobs == pytest.approx(values, abs=5e-4)


def test_greedy_answers_and_the_probe_are_decoding_too(base: Base) -> None:
    respond = make_response(base)
    prompts = ["Anna Keller lives in", "Where?", "The weather is"]
    text = "The weather is fine today."
    with respond_beside(base, LAYER, respond):
        together = generate_answers(base, prompts, max_new_tokens=6, batch_tokens=8_192)
        assert [generate_answers(base, [prompt], max_new_tokens=6, batch_tokens=1)[0] for prompt in prompts] == together
        reading = read_probe(base, [text])
    ids = encode_prompt(base.tokenizer, text)
    assert close(reading.logprobs[0], decode(base, LAYER, respond, ids[:1], ids[1:]).log_softmax(-1))
    assert not close(reading.logprobs[0], read_probe(base, [text]).logprobs[0])


def test_positions_asked_for_are_active_and_only_those(base: Base) -> None:
    respond = make_response(base)
    ids, mask = pad_rows(ROWS, 0, "right")
    at = [(0, 2), (0, 5), (3, 1)]
    with by_hook(base, LAYER, respond, at):
        expected = read_logits(base, ids, mask)
    rows, places = torch.tensor([*at, at[0]]).T  # one of them twice
    sizes: list[int] = []
    with respond_beside(base, LAYER, lambda hidden: sizes.append(len(hidden)) or respond(hidden)):
        usual = read_logits(base, ids, mask)
        with predict_everywhere(), predict_at(rows, places):
            assert close(read_logits(base, ids, mask), expected)
        assert torch.equal(read_logits(base, ids, mask), usual)
        with pytest.raises(KeyError), predict_everywhere():
            raise KeyError
        assert torch.equal(read_logits(base, ids, mask), usual)
    assert sizes == [len(ROWS), len(at), len(ROWS), len(ROWS)]


def test_masks_come_in_many_forms(base: Base) -> None:
    respond = make_response(base)
    ids, mask = pad_rows(ROWS, 0, "right")
    body = base.model.get_submodule(base.layout.body)
    embedded = base.model.get_input_embeddings()(ids)
    square = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    with respond_beside(base, LAYER, respond), torch.inference_mode():
        usual = body(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(body(input_ids=ids, attention_mask=mask.bool()).last_hidden_state, usual)
        assert torch.equal(body(inputs_embeds=embedded, attention_mask=mask).last_hidden_state, usual)
        given = {"gpt2": (ids, None, mask), "llama": (ids, mask)}[base.model.config.model_type]
        assert torch.equal(body(*given).last_hidden_state, usual)
        whole = body(input_ids=ids[:1]).last_hidden_state
        assert close(body(input_ids=ids[:1], attention_mask=square).last_hidden_state, whole)


def test_a_row_without_an_unmasked_token_gets_nothing(base: Base) -> None:
    ids = torch.tensor([ROWS[1], ROWS[1]])
    layer = base.layout.count_layers(base.model) - 1
    for fed, cache in ((ids, None), (ids[:, :1], base.model(input_ids=ids, use_cache=True).past_key_values)):
        mask = torch.ones(2, fed.shape[1] + (ids.shape[1] if cache else 0), dtype=torch.long)
        mask[1, -fed.shape[1] :] = 0
        options = {"position_ids": torch.arange(fed.shape[1]).expand(2, -1), "use_cache": True}

        def run() -> torch.Tensor:
            with torch.inference_mode():
                out = base.model(input_ids=fed, attention_mask=mask, past_key_values=copy.deepcopy(cache), **options)  # noqa: B023
            logits: torch.Tensor = out.logits
            return logits

        plain = run()
        # What is not finite must not get through either.
        poison = torch.tensor([[1.0], [float("nan")]])
        with respond_beside(base, layer, lambda hidden: hidden * poison):  # noqa: B023
            found = run()
        assert torch.equal(found[1], plain[1])
        assert not torch.equal(found[0, -1], plain[0, -1]) and torch.equal(found[0, :-1], plain[0, :-1])


def test_threads_that_run_one_model_do_not_see_each_others_tokens(base: Base) -> None:
    respond = make_response(base)
    left, right = (pad_rows(ROWS, 0, side) for side in ("left", "right"))
    ways: list[Callable[[], torch.Tensor]] = [lambda: read_logits(base, *left), lambda: read_logits(base, *right)]

    def everywhere() -> torch.Tensor:
        with predict_everywhere():
            return read_logits(base, *left)

    ways.append(everywhere)
    with respond_beside(base, LAYER, respond):
        expected = [way() for way in ways]
    meet = threading.Barrier(len(ways), timeout=60)

    def respond_together(hidden: torch.Tensor) -> torch.Tensor:
        meet.wait()  # all are between body and MLP now
        return respond(hidden)

    with respond_beside(base, LAYER, respond_together), ThreadPoolExecutor(len(ways)) as pool:
        for _ in range(5):
            found = list(pool.map(lambda way: way(), ways))
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_interrupted_passes_leave_nothing_behind(base: Base) -> None:
    respond = make_response(base)
    left, right = (pad_rows(ROWS, 0, side) for side in ("left", "right"))
    mlp = base.layout.mlp_of(base.model, LAYER)
    hidden = torch.randn(1, 2, base.model.config.hidden_size)
    with respond_beside(base, LAYER, respond):
        expected = read_logits(base, *right)
        for layer in (0, LAYER, 3):
            with trace_inputs({layer: base.layout.block(base.model, layer)}, torch.clone, stop=True):
                read_logits(base, *left)
            assert torch.equal(read_logits(base, *right), expected)
            with pytest.raises(EditorError, match="found it run alone"):
                mlp(hidden)
    with pytest.raises(ZeroDivisionError), respond_beside(base, LAYER, lambda hidden: 1 / 0):  # type: ignore[arg-type, return-value]
        read_logits(base, *left)
    with respond_beside(base, LAYER, respond):
        assert torch.equal(read_logits(base, *right), expected)


def test_it_is_refused_twice_and_gone_afterwards(base: Base) -> None:
    ids, mask = pad_rows(ROWS, 0, "left")
    plain, before = read_logits(base, ids, mask), list_attributes(base.model)
    respond, other = make_response(base), make_response(base, seed=6)
    with respond_beside(base, LAYER, respond):
        once = read_logits(base, ids, mask)
        with pytest.raises(BaseMismatchError, match="found an artifact on the MLP of layer 1"):
            require_untouched(base)
        with pytest.raises(BaseMismatchError, match="the MLP of layer 1 carries"), respond_beside(base, LAYER, respond):
            pytest.fail("attached twice")
        assert torch.equal(read_logits(base, ids, mask), once)
    with pytest.raises(UnknownArchitectureError), respond_beside(base, 4, respond):
        pytest.fail("attached nowhere")
    with pytest.raises(KeyError), respond_beside(base, LAYER, respond):
        raise KeyError
    # Two layers, the first to come the first to go.
    first, second = ExitStack(), ExitStack()
    first.enter_context(respond_beside(base, LAYER, respond))
    second.enter_context(respond_beside(base, 2, other))
    both = read_logits(base, ids, mask)
    first.close()
    rest = read_logits(base, ids, mask)
    second.close()
    with respond_beside(base, 2, other):
        assert torch.equal(read_logits(base, ids, mask), rest)
        with respond_beside(base, LAYER, respond):
            assert torch.equal(read_logits(base, ids, mask), both)
    assert not torch.equal(both, once) and not torch.equal(both, rest)
    require_untouched(base)
    assert list_attributes(base.model) == before and torch.equal(read_logits(base, ids, mask), plain)


def test_copies_that_share_weights_are_models_of_their_own(base: Base) -> None:
    from registry.served_model import _share

    respond = make_response(base)
    ids, mask = pad_rows(ROWS, 0, "left")
    plain = read_logits(base, ids, mask)
    shared = _share(base)
    with respond_beside(shared, LAYER, respond):
        edited = read_logits(shared, ids, mask)
        assert not torch.equal(edited, plain) and torch.equal(read_logits(base, ids, mask), plain)
        require_untouched(base)
        deep = copy.deepcopy(shared.model)
    assert torch.equal(read_logits(shared, ids, mask), plain)
    # A copy made in between keeps what it was made with, on its own weights.
    assert torch.equal(deep(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits, edited)
    for weight in deep.parameters():
        weight.data.zero_()
    assert torch.equal(read_logits(base, ids, mask), plain) and not deep(input_ids=ids).logits.any()


def test_gradients_reach_the_response_from_active_positions_alone(base: Base) -> None:
    ids, mask = pad_rows(ROWS, 0, "left")
    body = base.model.get_submodule(base.layout.body)
    weight = torch.full([base.model.config.hidden_size], 0.5, requires_grad=True)
    direction = torch.randn(base.model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    ways = (
        respond_beside(base, LAYER, lambda hidden: hidden * weight),
        by_hook(base, LAYER, lambda hidden: hidden * weight, [(row, 5) for row in range(len(ROWS))]),
    )
    gradients = []
    for way in ways:
        with way:
            states = body(input_ids=ids, attention_mask=mask).last_hidden_state @ direction
        gradients += torch.autograd.grad(states[:, -1].sum(), weight, retain_graph=True)
        assert not torch.autograd.grad(states[:, :-1].sum(), weight)[0].any()
    assert close(*gradients) and gradients[0].norm() > 1e-3


def test_a_response_in_another_dtype_is_cast_once(gpt2_of: Callable[..., Base]) -> None:
    base = gpt2_of(dtype="bfloat16")
    ids, mask = pad_rows(ROWS, 0, "left")
    respond = make_response(base)  # float32, as re-scored candidates are
    with respond_beside(base, LAYER, respond):
        found = read_logits(base, ids, mask)
        assert generate(base, ROWS).shape == (len(ROWS), 5)
    with by_hook(base, LAYER, respond, [(row, 5) for row in range(len(ROWS))]):
        assert torch.equal(read_logits(base, ids, mask), found)
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize("places", ["memory", "disk"])
def test_it_stands_beside_offloaded_blocks(base: Base, places: str, tmp_path: Path) -> None:
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    layout, body = base.layout, base.model.get_submodule(base.layout.body)
    modules = [f"{layout.body}.{name}" for name, _ in body.named_children()] + [layout.head]
    device_map: Any = {"": "cpu"} if places == "memory" else dict.fromkeys(modules, "disk")
    spread = load_base(tmp_path / "model", device="cpu", device_map=device_map, offload=tmp_path / "offload")
    ids, mask = pad_rows(ROWS, 0, "right")
    respond, before = make_response(base), list_attributes(spread.model)
    plain = read_logits(spread, ids, mask)
    with respond_beside(base, LAYER, respond):
        expected, written = read_logits(base, ids, mask), generate(base, ROWS)
    with respond_beside(spread, LAYER, respond):
        assert torch.equal(read_logits(spread, ids, mask), expected) and torch.equal(generate(spread, ROWS), written)
    assert torch.equal(read_logits(spread, ids, mask), plain) and list_attributes(spread.model) == before


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def follow(base: Base, compiled: Callable[..., Any], ids: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether the compiled model gives what the model itself gives now."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found = compiled(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return close(found, read_logits(base, ids, mask))


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_model_follows(base: Base) -> None:
    """Dynamo's own part, with the graph run as it was traced: what it would miss, every backend would."""
    left, right = (pad_rows(ROWS, 0, side) for side in ("left", "right"))
    respond, compiled = make_response(base), torch.compile(base.model, backend="eager")
    plain = read_logits(base, *left)
    # Compiled first, attached afterwards.
    assert follow(base, compiled, *left)
    with respond_beside(base, LAYER, respond):
        assert follow(base, compiled, *left) and follow(base, compiled, *right)
        with predict_everywhere():
            assert follow(base, compiled, *left)
        assert follow(base, compiled, *left)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(follow, base, compiled, *right).result()
    assert follow(base, compiled, *left)
    # Attached first, compiled afterwards, run on without.
    torch.compiler.reset()
    with respond_beside(base, 2, respond):
        compiled = torch.compile(base.model, backend="eager")
        assert follow(base, compiled, *left) and not close(read_logits(base, *left), plain)
    assert follow(base, compiled, *left) and torch.equal(read_logits(base, *left), plain)


@pytest.mark.long
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_model_compiled_to_machine_code_follows(tiny_gpt2: Base) -> None:
    base, respond = tiny_gpt2, make_response(tiny_gpt2)
    left, right = (pad_rows(ROWS, 0, side) for side in ("left", "right"))
    compiled = torch.compile(base.model)
    assert follow(base, compiled, *left)
    with respond_beside(base, LAYER, respond):
        assert follow(base, compiled, *left) and follow(base, compiled, *right)
    assert follow(base, compiled, *left)


@pytest.mark.long
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_model_generates_the_same(gpt2_of: Callable[..., Base]) -> None:
    base = gpt2_of()
    with respond_beside(base, LAYER, make_response(base)):
        expected = generate(base, ROWS)
        base.model.forward = torch.compile(base.model.forward, backend="eager")  # type: ignore[method-assign]
        assert torch.equal(generate(base, ROWS), expected)
    assert not torch.equal(generate(base, ROWS), expected)
