"""A corpus is read in shards that are independent, complete and the same every time; a bad line costs itself and nothing else."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import errata.corpus
from errata.corpus import MAKESHIFT, WORLD, Fault, find_corpus, open_corpus
from errata.errors import InputError
from errata.world import make_world

LINES = st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp", "Zs")), max_size=30), min_size=1, max_size=40)


def read_all(path: Path, shards: int, seed: int = 0) -> list[str]:
    corpus = open_corpus(path)
    return [passage for shard in range(shards) for passage in corpus.read(shard, shards, seed=seed)]


@settings(max_examples=60, deadline=None)
@given(
    files=st.lists(LINES, min_size=1, max_size=3),
    shards=st.integers(1, 5),
    seed=st.integers(0, 3),
    step=st.integers(1, 40),
    end=st.booleans(),
)
def test_every_passage_is_in_exactly_one_shard(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[str]], shards: int, seed: int, step: int, end: bool
) -> None:
    """Whatever the blocks: characters, lines and files of any length."""
    folder = tmp_path_factory.mktemp("corpus")
    files[0][0] += "x"  # one with text
    for index, lines in enumerate(files):
        (folder / f"{index}.txt").write_text("\n".join(lines) + ("\n" if end else ""), encoding="utf-8")
    wanted = Counter(line.strip() for lines in files for line in lines if line.strip())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(errata.corpus, "_BLOCK", step)
        patch.setattr(errata.corpus, "_BLOCKS", 1)
        assert Counter(read_all(folder, shards, seed)) == wanted


def test_the_order_is_the_seed_s(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(f"passage {number}" for number in range(200)))
    assert read_all(path, 4, seed=1) == read_all(path, 4, seed=1) != read_all(path, 4, seed=2)
    sizes = [len(list(open_corpus(path).read(shard, 4))) for shard in range(4)]
    assert min(sizes) > 30  # shards are about equal, and none is a stretch of the file
    numbers = [int(passage.split()[1]) for passage in open_corpus(path).read(0, 4)]
    assert numbers != sorted(numbers) and max(numbers) - min(numbers) > 150


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.jsonl").write_text('{"text": "from jsonl", "url": "elsewhere"}\n')
    (tmp_path / "a.txt").write_text("\ufefffrom text\r\n\r\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not read")
    corpus = open_corpus(tmp_path)
    assert [path.name for path in corpus.files] == ["a.txt", "z.jsonl"]
    assert sorted(corpus.read()) == ["from jsonl", "from text"]


def test_the_digest_is_of_the_contents(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    for folder, name, text in ((first, "a.txt", "one\n"), (second, "other.txt", "one\n"), (third, "a.txt", "two\n")):
        folder.mkdir()
        (folder / name).write_text(text)
    assert open_corpus(first).digest() == open_corpus(second).digest() == open_corpus(first / "a.txt").digest()
    assert open_corpus(first).digest() != open_corpus(third).digest()
    (second / "other.txt").rename(second / "other.jsonl")
    (second / "other.jsonl").write_text('{"text": "one"}')
    assert open_corpus(first).digest() != open_corpus(second).digest()


def test_a_wrong_line_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    good = [json.dumps({"text": f"passage {number}"}) for number in range(4)]
    wrong = [b'{"text": 3}', b'{"text": "cut', b"[1]", b'{"text": "\xff"}', b'{"txt": "typo"}']
    path.write_bytes(b"\n".join([good[0].encode(), *wrong[:2], good[1].encode(), b"", *wrong[2:], good[2].encode(), good[3].encode()]))
    faults: list[Fault] = []
    assert sorted(open_corpus(path).read(on_fault=faults.append)) == [f"passage {number}" for number in range(4)]
    assert sorted(str(fault).removeprefix(f"{path}:").partition(":")[0] for fault in faults) == ["2", "3", "6", "7", "8"]
    said = {str(fault).removeprefix(f"{path}:") for fault in faults}
    assert '3: expected one JSON object per line, found \'{"text": "cut\'' in said
    assert "7: expected UTF-8, found the byte ff" in said
    assert any('expected an object with a passage as "text"' in fault for fault in said)


def test_a_very_long_line_is_read_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errata.corpus, "_LONGEST", 33)
    path = tmp_path / "corpus.txt"
    path.write_text("ä" * 400 + "\nshort\n", encoding="utf-8")
    assert sorted(map(len, open_corpus(path).read())) == [5, 16]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("nowhere.txt", None, "expected a readable text file"),
        ("empty.txt", b"", "expected some text, found none"),
        ("blank.txt", b"\n  \n\n", "expected some text, found none"),
        ("utf16.txt", "text".encode("utf-16"), "utf16.txt:1: expected UTF-8"),
        ("wrong.jsonl", b"plain text\n", "wrong.jsonl:1: expected one JSON object per line"),
        ("folder/readme.md", b"text", "expected *.txt or *.jsonl in this folder, found none"),
    ],
)
def test_what_is_no_corpus_is_refused(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(InputError, match=says.replace("*", r"\*")):
        open_corpus(path.parent if name.startswith("folder") else path)


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("one\n")
    corpus = open_corpus(path)
    path.write_text("one\ntwo\n")
    with pytest.raises(InputError, match="expected 4 bytes"):
        list(corpus.read())


def test_the_project_makes_small_corpora(tmp_path: Path) -> None:
    world = find_corpus(WORLD, tmp_path)
    assert sorted(world.read()) == sorted(make_world().corpus(seed=0))
    assert find_corpus(WORLD, tmp_path) == world
    makeshift = list(find_corpus(MAKESHIFT, tmp_path).read())
    assert len(makeshift) == len(set(makeshift)) > 5_000
    assert len(list((tmp_path / "corpora").iterdir())) == 2
