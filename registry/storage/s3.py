"""Storage in an S3 bucket, or anything that speaks S3 and honours `If-None-Match: *`. The only module that knows boto3.

Endpoint, region and credentials come from the environment as usual (`AWS_ENDPOINT_URL` or `AWS_ENDPOINT_URL_S3`, `AWS_REGION`,
`AWS_ACCESS_KEY_ID`, profiles, instance roles).
"""

import io
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from errata.errors import InputError, KeyExistsError, KeyMissingError, StorageError
from registry.storage.base import S3_SCHEME, Entry, check_key, is_hidden

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import CopySourceTypeDef, HeadObjectOutputTypeDef

_ATTEMPTS = 5
_PAUSE = 0.1
"""Seconds before the first repetition of a create that met another one in flight; doubled each time."""
_ONE_REQUEST = 5 * 10**9
"""Bytes that one request may carry, a little less than S3 allows."""
_MISSING = {"NoSuchKey", "404", "NotFound"}
_TAKEN = {"PreconditionFailed", "412"}
_IN_FLIGHT = {"ConditionalRequestConflict", "OperationAborted", "409"}


class S3Storage:
    """One prefix of one bucket.

    Raises:
        InputError: the URL names no bucket.
    """

    def __init__(self, url: str) -> None:
        bucket, _, prefix = url.removeprefix(S3_SCHEME).partition("/")
        if not bucket or "@" in bucket:
            raise InputError(f"root: expected s3://bucket/prefix, with credentials in AWS_* variables only; found {url!r}")
        self.url = url.rstrip("/")
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._client = _connect()

    def read(self, key: str) -> bytes:
        try:
            return self._client.get_object(Bucket=self._bucket, Key=self._name(key))["Body"].read()
        except (ClientError, BotoCoreError) as error:
            if _code(error) in _MISSING:
                raise KeyMissingError(f"{self.url}: expected an object {key!r}, found none") from None
            raise self._fault("read", key, error) from error

    def create(self, key: str, data: bytes) -> None:
        """As promised by the protocol. botocore repeats a request that met a 500, 503 or a lost connection; if the first one had
        landed, the repetition is refused with 412 like anyone else's."""
        self._put(key, lambda: data)

    def create_from(self, key: str, file: BinaryIO) -> None:
        def rewind() -> BinaryIO:
            file.seek(0)
            return file

        if file.seek(0, io.SEEK_END) <= _ONE_REQUEST:
            self._put(key, rewind)
            return
        if self.exists(key):
            raise KeyExistsError(f"{self.url}: expected no object {key!r}, found one")
        try:
            self._client.upload_fileobj(rewind(), self._bucket, self._name(key))
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise self._fault("create", key, error) from error

    def fetch_file(self, key: str, draft: Path) -> Path:
        try:
            self._client.download_file(self._bucket, self._name(key), str(draft))
        except (ClientError, BotoCoreError, Boto3Error) as error:
            if _code(error) in _MISSING:
                raise KeyMissingError(f"{self.url}: expected an object {key!r}, found none") from None
            raise self._fault("read", key, error) from error
        return draft

    def _put(self, key: str, body: Callable[[], bytes | BinaryIO]) -> None:
        name, pause = self._name(key), _PAUSE
        for attempt in range(_ATTEMPTS):
            try:
                self._client.put_object(Bucket=self._bucket, Key=name, Body=body(), IfNoneMatch="*")
                return
            except (ClientError, BotoCoreError) as error:
                # 409 says that another conditional write of this key was under way, not who won: look, and try again if nobody did.
                if _code(error) in _TAKEN or (_code(error) in _IN_FLIGHT and self.exists(key)):
                    raise KeyExistsError(f"{self.url}: expected no object {key!r}, found one") from None
                if _code(error) not in _IN_FLIGHT or attempt == _ATTEMPTS - 1:
                    raise self._fault("create", key, error) from error
            time.sleep(pause)
            pause *= 2

    def delete(self, key: str) -> None:
        try:
            self._client.delete_object(Bucket=self._bucket, Key=self._name(key))
        except (ClientError, BotoCoreError) as error:
            raise self._fault("delete", key, error) from error

    def exists(self, key: str) -> bool:
        return self._look_for(key) is not None

    def find(self, key: str) -> Entry | None:
        found = self._look_for(key)
        return Entry(key, found["ContentLength"], found["LastModified"]) if found else None

    def _look_for(self, key: str) -> "HeadObjectOutputTypeDef | None":
        try:
            return self._client.head_object(Bucket=self._bucket, Key=self._name(key))
        except (ClientError, BotoCoreError) as error:
            if _code(error) in _MISSING:
                return None
            raise self._fault("look for", key, error) from error

    def renew(self, key: str) -> None:
        """A copy onto itself, which S3 allows where the metadata change; the bytes never leave the server."""
        name, renewed = self._name(key), {"renewed": uuid.uuid4().hex}
        place: CopySourceTypeDef = {"Bucket": self._bucket, "Key": name}
        try:
            self._client.copy(place, self._bucket, name, ExtraArgs={"Metadata": renewed, "MetadataDirective": "REPLACE"})
        except (ClientError, BotoCoreError) as error:
            if _code(error) in _MISSING:
                raise KeyMissingError(f"{self.url}: expected an object {key!r}, found none") from None
            raise self._fault("renew", key, error) from error

    def sweep(self, before: datetime) -> int:
        """None: an upload is whole or was never there, and parts of larger ones are S3's own to clear (a lifecycle rule)."""
        return 0

    def list(self, prefix: str) -> Iterator[Entry]:
        for page in self._pages(prefix, delimiter=""):
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(self._prefix)
                if not is_hidden(key):
                    yield Entry(key, item["Size"], item["LastModified"])

    def list_folders(self, prefix: str) -> Iterator[str]:
        for page in self._pages(prefix, delimiter="/"):
            for item in page.get("CommonPrefixes", ()):
                name = item["Prefix"].removeprefix(self._prefix + prefix).rstrip("/")
                if not is_hidden(name):
                    yield name

    def _pages(self, prefix: str, delimiter: str) -> Iterator[Any]:
        try:
            yield from self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix, Delimiter=delimiter
            )
        except (ClientError, BotoCoreError) as error:
            raise self._fault("list", prefix, error) from error

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _fault(self, verb: str, key: str, error: ClientError | BotoCoreError | Boto3Error) -> StorageError:
        return StorageError(f"{self.url}: expected to {verb} {key!r}: {error}")


def _connect() -> "S3Client":
    config = Config(
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        # Values are checked by our own digests; older S3-compatible servers refuse the newer default checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return boto3.client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise StorageError(f"S3: expected a usable AWS_* configuration: {error}") from error


def _code(error: ClientError | BotoCoreError | Boto3Error) -> str:
    return error.response["Error"].get("Code", "") if isinstance(error, ClientError) else ""
