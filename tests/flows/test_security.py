"""What a stranger's edit must not be able to do, and what is never loaded (SECURITY.md)."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.edits import Edit

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]
ROOT = Path(__file__).parents[2]
HOSTILE = "../../../outside"


def list_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_texts_of_edits_never_become_paths_or_code(
    desk: Any, make_edit: Make, errata: Callable[..., Any], tmp_path: Path, ask: Callable[[Edit], str]
) -> None:
    desk.submit("monday", make_edit(0))
    desk.apply()
    before = {path.name for path in tmp_path.parent.iterdir()} | {path.name for path in tmp_path.iterdir()}
    bad = {"relation_id": HOSTILE, "source": f"{HOSTILE}; rm -rf /", "note": "{{ 1 + 1 }} $(touch hacked) [red]x[/]"}
    climbing = {**make_edit(4).model_dump(mode="json", exclude_none=True), "id": f"{HOSTILE}/id"}
    desk.submit("tuesday", make_edit(1, id="..", **bad), make_edit(2, id="[bold]b[x]"), climbing)
    ran = errata("apply")
    assert ran.code == 0 and len(desk.live()) == 3 and "1 refused" in ran.out
    for words in (("show", ".."), ("log",), ("status",), ("bundle", "--to", str(tmp_path / "out.tar"))):
        assert errata(*words).code == 0
    assert "[bold]b[x]" in errata("show", "[bold]b[x]").out, "shown as it is, not as markup"
    after = {path.name for path in tmp_path.parent.iterdir()} | {path.name for path in tmp_path.iterdir()}
    assert after - before <= {"out.tar"}
    for name in list_files(desk.root):
        assert "outside" not in name and "hacked" not in name
    for name in (HOSTILE, "/etc/passwd", "a/../b", ".hidden", "UPPER", ""):
        told = errata("status", "--stream", name)
        assert told.code == 2, f"{name!r} is no stream"


def test_a_version_holds_no_pickle_and_needs_none(desk: Any, make_edit: Make) -> None:
    desk.submit("monday", make_edit(0))
    desk.apply()
    stored = list_files(desk.root)
    endings = {Path(name).suffix for name in stored}
    assert any(name.endswith(".safetensors") for name in stored)
    assert not endings & {".pkl", ".pickle", ".pt", ".bin", ".joblib", ".npy", ".npz"}, endings
    for name in stored:
        head = (desk.root / name).read_bytes()[:2]
        assert head not in (b"\x80\x04", b"\x80\x05"), f"{name} is a pickle"


def test_our_code_loads_neither_pickles_nor_foreign_code() -> None:
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for path in (path for room in ("errata", "registry", "tasks", "flows") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & forbidden, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("torch.load", "eval", "exec", "os.system"), path
                for word in node.keywords:
                    trusting = word.arg == "trust_remote_code" or (word.arg == "shell" and ast.unparse(word.value) == "True")
                    assert not trusting, f"{path}:{node.lineno}"
