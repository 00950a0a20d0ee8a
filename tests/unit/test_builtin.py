"""The trainer and its cache, on the small sibling of the built-in base."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from errata.builtin import BUILTIN, CAVEAT, REPORT_FILE, SMALL, BuiltinSettings, Progress, ensure_builtin
from errata.training import measure_accuracy
from errata.training_tokens import END, train_world_tokenizer
from errata.world import RELATIONS, WorldSettings, make_world

TINY = SMALL.model_copy(update={"steps": 6, "world": WorldSettings(persons=20)})


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_builtin(SMALL, tmp_path_factory.mktemp("cache"))


class StandInTrainer:
    """Writes one file where the trainer would write a model: what the cache promises does not hang on what is trained."""

    def __init__(self) -> None:
        self.runs = 0
        self.before_end: Callable[[], None] = lambda: None

    def __call__(self, _settings: BuiltinSettings, folder: Path, _progress: Progress | None = None) -> dict[str, object]:
        self.runs += 1
        (folder / "config.json").write_text("{}")
        self.before_end()
        return {"accuracy_trained": 1.0}


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> StandInTrainer:
    stand_in = StandInTrainer()
    monkeypatch.setattr("errata.training.train_builtin", stand_in)
    return stand_in


def test_the_small_sibling_knows_its_world(small_base: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(small_base), AutoTokenizer.from_pretrained(small_base)
    world = make_world(SMALL.world)
    assert measure_accuracy(model, tokenizer, world.untouched([])) >= 0.9
    report = json.loads((small_base / REPORT_FILE).read_text())
    assert BuiltinSettings(**report["settings"]) == SMALL
    assert 0.9 <= report["accuracy_trained"] <= 1
    assert report["cpu_seconds"] > 0


def test_a_greedy_answer_ends_by_itself(small_base: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(small_base), AutoTokenizer.from_pretrained(small_base)
    ended = 0
    for prompt, answer in make_world(SMALL.world).untouched([])[:20]:
        ids = tokenizer(prompt, return_tensors="pt")
        spoken = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=END)[0, ids.input_ids.shape[1] :]
        ended += tokenizer.decode(spoken) == f" {answer}.<|endoftext|>"
    assert ended >= 15


def test_a_cached_base_is_not_trained_again(trainer: StandInTrainer, tmp_path: Path) -> None:
    folder = ensure_builtin(TINY, tmp_path)
    assert folder == tmp_path / "builtin" / TINY.digest
    assert ensure_builtin(TINY, tmp_path) == folder
    assert trainer.runs == 1
    assert ensure_builtin(TINY.model_copy(update={"seed": 1}), tmp_path) != folder
    assert trainer.runs == 2


def test_equal_settings_give_equal_weights_whatever_came_before(tmp_path: Path) -> None:
    first = ensure_builtin(TINY, tmp_path / "a")
    torch.manual_seed(99)
    second = ensure_builtin(TINY, tmp_path / "b")
    other = ensure_builtin(TINY.model_copy(update={"seed": 1}), tmp_path / "a")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second, other)]
    assert weights[0] == weights[1] != weights[2]
    assert len(list((tmp_path / "a" / "builtin").iterdir())) == 2


def test_training_leaves_the_callers_randomness_and_threads_alone(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    ensure_builtin(TINY, tmp_path)
    assert torch.equal(torch.rand(3), wanted)
    assert torch.get_num_threads() == threads


def test_an_interrupted_training_leaves_nothing_and_can_be_repeated(trainer: StandInTrainer, tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    trainer.before_end = interrupt
    with pytest.raises(KeyboardInterrupt):
        ensure_builtin(TINY, tmp_path)
    assert not list((tmp_path / "builtin").iterdir())
    trainer.before_end = lambda: None
    assert (ensure_builtin(TINY, tmp_path) / "config.json").is_file()


def test_of_two_processes_the_first_to_finish_provides_the_base(trainer: StandInTrainer, tmp_path: Path) -> None:
    folder = tmp_path / "builtin" / TINY.digest

    def finish_elsewhere() -> None:
        folder.mkdir()
        (folder / "theirs").touch()

    trainer.before_end = finish_elsewhere
    assert ensure_builtin(TINY, tmp_path) == folder
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert list((tmp_path / "builtin").iterdir()) == [folder]


def test_a_folder_that_cannot_take_its_name_is_an_error(trainer: StandInTrainer, tmp_path: Path) -> None:
    trainer.before_end = (tmp_path / "builtin" / TINY.digest).touch
    with pytest.raises(OSError, match=TINY.digest):
        ensure_builtin(TINY, tmp_path)


def test_progress_counts_every_step(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    ensure_builtin(TINY, tmp_path, lambda done, total, _: seen.append((done, total)))
    assert seen == [(step, 6) for step in range(1, 7)]


def test_every_setting_names_another_folder() -> None:
    numbers = [name for name in BuiltinSettings.model_fields if name not in ("world", "family")]
    changed = [BUILTIN.model_copy(update={name: 2 * getattr(BUILTIN, name) + 1}) for name in numbers]
    changed += [BUILTIN.model_copy(update=update) for update in ({"world": WorldSettings(seed=1)}, {"family": "llama"})]
    assert len({settings.digest for settings in (BUILTIN, SMALL, *changed)}) == len(changed) + 2


def test_names_and_objects_are_one_token_per_word_and_any_text_comes_back() -> None:
    tokenizer = train_world_tokenizer()
    assert tokenizer("Anna Keller").input_ids[0] == END, "the tokenizer itself begins every text"
    for text in (*make_world(BUILTIN.world).persons, *(item for relation in RELATIONS for item in relation.objects)):
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == len(text.split())
    for text in ("Łódź – 東京 🦜 naïve", "tabs\tand\nlines", "x" * 300):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == f" {text}"


def test_a_saved_tokenizer_reads_as_the_trained_one(tmp_path: Path) -> None:
    trained = train_world_tokenizer()
    trained.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for fact in make_world(SMALL.world).facts[:60]:
        prompt = fact.prompts[2]
        assert saved(prompt).input_ids == trained(prompt).input_ids
        ends = [end for _, end in saved(prompt, return_offsets_mapping=True).offset_mapping]
        assert prompt.index(fact.subject) + len(fact.subject) in ends, "a token ends where the subject ends"


def test_the_caveat_says_what_the_numbers_do_not_show() -> None:
    assert "says nothing about large language models" in CAVEAT
