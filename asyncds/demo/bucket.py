"""The demo's images, and the server that they are put on."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from hashlib import md5
from io import BytesIO
from typing import Any

from asyncds.errors import ConfigurationError
from asyncds.manifest import normalise_etag
from asyncds.portal import Portal
from asyncds.progress import Advance, progress_bar
from asyncds.settings import Settings
from asyncds.store import Connection
from asyncds.store.translate import translate

__all__ = ["BUCKET", "REGION", "Login", "digits", "upload"]

BUCKET = "mnist"
REGION = "us-east-1"
_TEST_EVERY = 5
_UPLOADS = 32
_CONNECT_S = 5.0


@dataclass(frozen=True)
class Login:
    """Makes sessions for the server at `endpoint`, in any process: a `session_factory`.

    `keys` are those of a server that lives as long as the demo. Keys of the user are none of them: each process looks
    them up in its environment, so that they are never pickled.
    """

    endpoint: str
    keys: tuple[str, str] | None = field(default=None, repr=False)

    def connection(self) -> Connection:
        if self.keys is None:
            return Connection.resolve(Settings(), endpoint=self.endpoint)
        access, secret = self.keys
        return Connection("AWS", self.endpoint, REGION, access_key=access, secret_key=secret, path_style=True)

    @property
    def region(self) -> str:
        return self.connection().region or REGION

    def __call__(self) -> Any:
        from aiobotocore.session import AioSession

        connection, session = self.connection(), AioSession()
        if connection.profile is not None:
            session.set_config_variable("profile", connection.profile)
        if connection.access_key is not None:
            session.set_credentials(connection.access_key, connection.secret_key, connection.session_token)
        return session


def digits() -> dict[str, bytes]:
    """The images as PNG files, by key: `train/<label>/<nnnn>.png`, every fifth one under `test/`."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits, images = load_digits(), {}
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "train" if number % _TEST_EVERY else "test"
        file = BytesIO()
        Image.fromarray((pixels * (255 / 16)).astype("uint8")).save(file, "PNG")
        images[f"{part}/{label}/{number:04}.png"] = file.getvalue()
    return images


def upload(login: Login, images: Mapping[str, bytes]) -> None:
    portal = Portal.enter()
    try:
        with progress_bar(f"uploading to s3://{BUCKET}", len(images)) as advance:
            portal.call(_put_missing(login, images, advance))
    finally:
        portal.leave()


async def _put_missing(login: Login, images: Mapping[str, bytes], advance: Advance) -> None:
    """Upload what is not there in this version. Raises `ConfigurationError` if there is anything else."""
    slots = asyncio.Semaphore(_UPLOADS)
    try:
        async with _client(login) as client:
            client.meta.events.register_last("before-call.s3", _send_at_once)
            present = await _present(client, images, login.endpoint)
            missing = [
                key for key, body in images.items() if present.get(key) != md5(body, usedforsecurity=False).hexdigest()
            ]
            advance(len(images) - len(missing))
            async with asyncio.TaskGroup() as group:
                for key in missing:
                    group.create_task(_put(client, key, images[key], slots, advance))
    except ExceptionGroup as failed:
        error = failed.exceptions[0]
        raise translate(error, f"uploading to s3://{BUCKET}", login.connection().hint) from error
    except Exception as error:
        raise translate(error, f"s3://{BUCKET} at {login.endpoint}", login.connection().hint) from error


def _client(login: Login) -> Any:
    from aiobotocore.config import AioConfig

    config = AioConfig(
        max_pool_connections=_UPLOADS,
        connect_timeout=_CONNECT_S,
        retries={"total_max_attempts": 5},
        s3={"addressing_style": "path"},
    )
    return login().create_client("s3", endpoint_url=login.endpoint, region_name=login.region, config=config)


def _send_at_once(params: dict[str, Any], **_: Any) -> None:
    """Do without botocore's `Expect: 100-continue`: aiohttp waits for ever if an error is what comes instead of it."""
    params["headers"].pop("Expect", None)


async def _put(client: Any, key: str, body: bytes, slots: asyncio.Semaphore, advance: Advance) -> None:
    async with slots:
        await client.put_object(Bucket=BUCKET, Key=key, Body=body, ContentType="image/png")
    advance()


async def _present(client: Any, images: Mapping[str, bytes], endpoint: str) -> dict[str, str | None]:
    """The ETags of the images that are there, in a bucket that is made if need be."""
    etags = {}
    try:
        async for key, etag in _listed(client):
            if key not in images:
                place = f"s3://{BUCKET}/{key} at {endpoint}"
                raise ConfigurationError(f"{place} is not of the demo, which does not mix with it: use another server")
            etags[key] = etag
    except client.exceptions.NoSuchBucket:
        await client.create_bucket(Bucket=BUCKET)
    return etags


async def _listed(client: Any) -> AsyncIterator[tuple[str, str | None]]:
    for part in ("train/", "test/"):
        async for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=part):
            for entry in page.get("Contents", ()):
                yield entry["Key"], normalise_etag(entry.get("ETag"))
