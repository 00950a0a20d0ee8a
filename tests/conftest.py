"""What all tests share: a base that takes edits (`benchmarks.tiny_base`), an empty MLflow, a bucket."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.tiny_base import SENTENCES, build_edit, choose_options, write_base
from errata.edits import Edit

if TYPE_CHECKING:
    from errata.modeling.loading import Base
    from errata.profiles import PrepareOptions


def pytest_configure(config: pytest.Config) -> None:
    # Prefect makes its home as soon as it is imported. Not in the user's own.
    home = tempfile.mkdtemp(prefix="errata-tests-")
    os.environ["PREFECT_HOME"] = home
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))


@pytest.fixture(scope="session")
def make_edit() -> Callable[..., Edit]:
    return build_edit


@pytest.fixture(scope="session")
def sentences() -> Sequence[str]:
    """The corpus of the editable base."""
    return SENTENCES


@pytest.fixture(scope="session")
def editable_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The editable base as a model folder."""
    return write_base(tmp_path_factory.mktemp("editable"))


@pytest.fixture(scope="session")
def editable(editable_folder: Path) -> "Base":
    from errata.modeling.loading import load_base

    return load_base(editable_folder, device="cpu")


@pytest.fixture(scope="session")
def editable_options() -> "PrepareOptions":
    """Where and how edits are written into the editable base."""
    return choose_options()


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without content, to be copied: making one takes seconds."""
    from registry.models import ModelRegistry

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    ModelRegistry(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def builtin_base() -> Path:
    """The built-in base from the user's cache (`ERRATA_CACHE`), trained once, in about a minute, where the cache has none."""
    from errata.builtin import BUILTIN, ensure_builtin
    from errata.settings import load_settings

    return ensure_builtin(BUILTIN, load_settings().cache)


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """A bucket that exists, with AWS_* set so that boto3 finds it."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        endpoint = os.environ.get("ERRATA_TEST_S3_ENDPOINT")
        server = None
        if endpoint is None:
            from moto.server import ThreadedMotoServer

            server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
            server.start()
            host, port = server.get_host_and_port()
            endpoint = f"http://{host}:{port}"
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            patch.delenv("AWS_PROFILE", raising=False)
        patch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        if "AWS_DEFAULT_REGION" not in os.environ:
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        bucket = f"errata-test-{uuid.uuid4().hex[:12]}"
        client = boto3.client("s3")
        client.create_bucket(Bucket=bucket)
        yield bucket
        if server is not None:
            server.stop()
        else:
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
                for item in page.get("Contents", ()):
                    client.delete_object(Bucket=bucket, Key=item["Key"])
            client.delete_bucket(Bucket=bucket)
