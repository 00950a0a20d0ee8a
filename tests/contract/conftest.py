"""Every storage under the same promises. S3 is moto unless ERRATA_TEST_S3_ENDPOINT names a server (credentials from AWS_*)."""

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.storage.base import Storage, open_storage


@pytest.fixture(params=["local", "memory", "s3"])
def open_again(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Storage]:
    """Opens one fresh, empty place, as another writer would."""
    if request.param == "s3":
        url = f"s3://{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"
    else:
        url = str(tmp_path / "root") if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    return lambda: open_storage(url)


@pytest.fixture
def storage(open_again: Callable[[], Storage]) -> Storage:
    return open_again()
