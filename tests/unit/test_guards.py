"""The rules of the layout, as tests: whoever breaks one learns it here and not in a review."""

import ast
import importlib.metadata
import inspect
import json
import subprocess
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import pytest
from pydantic import AwareDatetime, BaseModel

ROOT = Path(__file__).parents[2]
ROOMS = ("errata", "registry", "tasks", "flows")
LONGEST = 400
"""Lines of a module, and nobody needs that many."""
HEAVY = ("torch", "transformers", "prefect", "mlflow", "sqlalchemy", "peft", "sentence_transformers", "matplotlib")
READING = ("commandline", "console*", "lookup", "views")
"""Modules of `flows/` behind `errata --help`, `status`, `log`, `show` and `submit --check`."""


def list_modules(*rooms: str) -> list[Path]:
    found = sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))
    assert found, f"no modules under {rooms}"
    return found


def test_no_flow_file_hides_another_module() -> None:
    """Prefect puts the folder of an entrypoint first on `sys.path` for good: `flows/evaluate.py` took over `import evaluate`."""
    stems = {path.stem for path in list_modules("flows")} - {"__init__"}
    ours = {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"}
    installed = {name for name in importlib.metadata.packages_distributions() if "." not in name}
    assert {"torch", "prefect", "mlflow"} <= installed
    assert not stems & (ours | installed | sys.stdlib_module_names)


@pytest.mark.parametrize("path", list_modules("flows"), ids=lambda path: path.stem)
def test_flow_files_define_no_types(path: Path) -> None:
    """An entrypoint is imported as `edit`, not `flows.edit`: a class of its own could not be read back anywhere else."""
    classes = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    assert classes == []


def test_packages_import_nothing() -> None:
    packages = [path for path in list_modules(*ROOMS) if path.name == "__init__.py"]
    assert {path.parent for path in list_modules(*ROOMS)} == {path.parent for path in packages}
    for path in packages:
        tree = ast.parse(path.read_text())
        assert len(tree.body) == (ast.get_docstring(tree) is not None), f"{path}: expected a docstring at most"


def test_no_module_is_longer_than_anyone_reads() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in list_modules(*ROOMS)}
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}


def test_tests_are_no_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_every_benchmark_can_be_started() -> None:
    """The tests run few of them; a name that moved would be found out when somebody wants figures."""
    modules = [f"benchmarks.{path.stem}" for path in list_modules("benchmarks") if path.stem != "__init__"]
    assert set(modules) <= import_alone(*modules)


def import_alone(*modules: str) -> set[str]:
    """The modules that a fresh interpreter holds after importing these."""
    code = f"import {', '.join(modules)}, sys, json; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout))


def test_reading_commands_import_nothing_heavy() -> None:
    found = [path for pattern in READING for path in (ROOT / "flows").glob(f"{pattern}.py")]
    loaded = import_alone(*(f"flows.{path.stem}" for path in found))
    assert "typer" in loaded
    assert sorted(loaded & set(HEAVY)) == []


def test_the_registry_is_light_until_mlflow_is_asked_for() -> None:
    light = [
        path
        for path in list_modules("registry")
        if path.stem not in ("__init__", "models", "packaging", "runs", "served_model", "trials", "verification")
    ]
    loaded = import_alone(*(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in light))
    assert {"registry.stream", "registry.storage.s3"} <= loaded
    assert sorted(loaded & set(HEAVY)) == []


PLAIN = (str, int, bool, float, NoneType, AwareDatetime)


def find_stages() -> Iterator[Any]:
    """Every function behind a task, and the flows."""
    for path in (*list_modules("tasks"), *list_modules("flows")):
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        yield from (value.fn for value in vars(module).values() if hasattr(value, "fn") and value.fn.__module__ == module.__name__)


def find_foreign(kind: Any, seen: tuple[Any, ...] = ()) -> Iterator[Any]:
    """The parts of an annotation that Prefect could not write as plain JSON."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in PLAIN or kind in seen or origin is typing.Literal:
        return
    if origin in (list, tuple, dict, Sequence, UnionType, typing.Union, typing.Annotated):
        for argument in arguments[:1] if origin is typing.Annotated else arguments:
            if argument is not Ellipsis:
                yield from find_foreign(argument, seen)
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        for field in kind.model_fields.values():
            yield from find_foreign(field.annotation, (*seen, kind))
    else:
        yield kind


def test_between_stages_pass_names_and_numbers_only() -> None:
    """Never a model or a tensor: Prefect hashes and stores what passes."""
    stages = list(find_stages())
    assert {"apply_edits", "order_batch", "prepare_pairs", "merge_pairs", "judge_candidate", "commit_batch", "project_versions"} <= {
        stage.__name__ for stage in stages
    }
    for stage in stages:
        hints = typing.get_type_hints(stage)
        assert hints.keys() == {*inspect.signature(stage).parameters, "return"}, f"{stage.__name__}: expected every parameter typed"
        foreign = {name: list(find_foreign(kind)) for name, kind in hints.items()}
        assert {name: kinds for name, kinds in foreign.items() if kinds} == {}, stage.__name__


def test_the_signature_check_finds_tensors() -> None:
    import torch

    class Result(BaseModel):
        model_config = {"arbitrary_types_allowed": True}
        deltas: dict[str, torch.Tensor]

    assert list(find_foreign(list[Result])) == [torch.Tensor]
    assert list(find_foreign(Path | None)) == [Path]


def test_every_stage_is_a_task_of_our_own_making() -> None:
    """Retries, persistence and caching are decided in `tasks/_task.py` and nowhere else."""
    for path in list_modules("tasks", "flows"):
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.module == "prefect"]
        names = {alias.name for node in imports for alias in node.names}
        assert "task" not in names or path.name == "_task.py", path
