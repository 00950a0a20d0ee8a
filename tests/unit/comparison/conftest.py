"""A base that takes edits, shared by the tests of the comparison."""

from pathlib import Path

import pytest

from benchmarks.tiny_base import write_base
from errata.modeling.loading import Base, load_base


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder: Path = write_base(tmp_path_factory.mktemp("tiny") / "base")
    return load_base(folder, device="cpu")
