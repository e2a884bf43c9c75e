"""The way that asyncds replaces, as a measure: one request per sample."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from torch.utils.data import Dataset

from asyncds.demo.bucket import BUCKET, REGION, Login
from asyncds.reader import S3Reader
from asyncds.store import Connection
from asyncds.store.translate import translate

__all__ = ["PerSampleDataset", "uses_minio"]


class PerSampleDataset(Dataset[Any]):
    """Keys and labels in parallel lists, one client per worker, one request per sample."""

    def __init__(
        self,
        login: Login,
        endpoint: str,
        keys: Sequence[str],
        labels: Sequence[Any],
        transform: Callable[[S3Reader], Any],
    ) -> None:
        self._login = login
        self._endpoint = endpoint
        self._keys = keys
        self._labels = labels
        self._transform = transform
        self._read: Callable[[str], bytes] | None = None

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Any:
        key = self._keys[index]
        try:
            if self._read is None:
                self._read = _reader(replace(self._login.connection(), endpoint=self._endpoint))
            body = self._read(key)
        except Exception as error:
            raise translate(error, f"s3://{BUCKET}/{key}") from error
        return self._transform(S3Reader(BUCKET, key, body)), self._labels[index]


def uses_minio(connection: Connection) -> bool:
    return find_spec("minio") is not None and connection.access_key is not None


def _reader(connection: Connection) -> Callable[[str], bytes]:
    """The function that reads one object: with MinIO's SDK, or where that cannot be used with botocore."""
    if not uses_minio(connection):
        return _botocore_reader(connection)
    from minio import Minio

    client = Minio(
        urlsplit(connection.endpoint or "").netloc,
        connection.access_key,
        connection.secret_key,
        connection.session_token,
        secure=False,
        region=connection.region or REGION,
    )

    def read(key: str) -> bytes:
        response = client.get_object(BUCKET, key)
        try:
            return response.read()
        finally:
            response.close()
            response.release_conn()

    return read


def _botocore_reader(connection: Connection) -> Callable[[str], bytes]:
    from botocore.config import Config
    from botocore.session import Session

    client = Session(profile=connection.profile).create_client(
        "s3",
        connection.region or REGION,
        endpoint_url=connection.endpoint,
        aws_access_key_id=connection.access_key,
        aws_secret_access_key=connection.secret_key,
        aws_session_token=connection.session_token,
        config=Config(s3={"addressing_style": "path"}),
    )

    def read(key: str) -> bytes:
        body: bytes = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return body

    return read
