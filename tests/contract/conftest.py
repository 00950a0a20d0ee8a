"""Every storage under the same promises. S3 is moto unless ERRATA_TEST_S3_ENDPOINT names a server (credentials from AWS_*)."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry.storage.base import Storage, open_storage


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
