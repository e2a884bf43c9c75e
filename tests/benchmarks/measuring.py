"""What the benchmarks beside other libraries share: fresh processes, a server's ceiling, rows of a table."""

import contextlib
import itertools
import json
import os
import resource
import selectors
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self, cast
from urllib.parse import urlsplit

Result = dict[str, Any]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark", "AWS_REGION": "us-east-1"}
_PATIENCE_S = 120


def in_fresh_process(python: str, script: str, name: str, arguments: Sequence[str], **environment: str) -> Result:
    """What a run of one contender prints, as JSON; if it fails, why, in a line under `error`."""
    command = [python, script, "--run", name, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE_S, env=os.environ | environment
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it did not end within {_PATIENCE_S} s"}
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1][:200]}
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


class Forked:
    """Runs of a script in processes of their own, forked from one that has imported what takes seconds to import.

    `python script --serve` is that one, for as long as the context is open; it calls `serve`.
    """

    def __init__(self, python: str, script: str) -> None:
        self._command = [python, script, "--serve"]

    def __enter__(self) -> Self:
        self._parent = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._parent.communicate()

    def __call__(self, *arguments: str) -> Result:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        try:
            request = {"arguments": arguments, "environment": dict(os.environ)}
            print(json.dumps(request), file=self._parent.stdin, flush=True)
            answer = self._parent.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else {"error": "what it takes cannot be imported"}


def serve(run: Callable[[list[str]], Result]) -> None:
    """Answer each line of standard input by the result of a run, or by what became of it."""
    for line in sys.stdin:
        folder = Path(tempfile.mkdtemp())
        child = os.fork()
        if not child:
            with (folder / "errors").open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            request = json.loads(line)
            os.environ |= request["environment"]
            (folder / "answer").write_text(json.dumps(run(request["arguments"])))
            return  # and end as any process does
        status = _waited(child)
        if status == 0:
            result = json.loads((folder / "answer").read_text())
        elif status is None:
            result = {"error": f"it did not end within {_PATIENCE_S} s"}
        else:
            said = (folder / "errors").read_text().strip().splitlines()
            result = {"error": (said or [f"it ended with status {status}"])[-1][:200]}
        shutil.rmtree(folder)
        print(json.dumps(result), flush=True)


def _waited(child: int) -> int | None:
    """The exit status of a child, or None if it had to be killed."""
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def cpu_seconds() -> float:
    """What this process has used, all of its threads, and the children that it has waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@contextlib.contextmanager
def certificates() -> Iterator[tuple[Path, Path]]:
    """Files of a server on the loopback address: a certificate and its key; clients that are asked to trust it do."""
    import trustme

    with tempfile.TemporaryDirectory() as folder:
        place, authority = Path(folder), trustme.CA()
        issued = authority.issue_cert("127.0.0.1")
        issued.cert_chain_pems[0].write_to_path(place / "certificate.pem")
        issued.private_key_pem.write_to_path(place / "key.pem")
        authority.cert_pem.write_to_path(place / "authority.pem")
        # boto, and what asyncds learns from it, take the one; what is written in Rust and C the other, if they can.
        os.environ |= dict.fromkeys(["AWS_CA_BUNDLE", "SSL_CERT_FILE"], str(place / "authority.pem"))
        yield place / "certificate.pem", place / "key.pem"


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown; the first column is text, the others are figures."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def spread(values: Sequence[float], digits: int = 0) -> str:
    return f"{min(values):,.{digits}f} to {max(values):,.{digits}f}"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of ratios within rounds."""
    return f"{statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.2f}"


def ceiling(endpoint: str, paths: Sequence[str], connections: int, seconds: float = 1.0) -> float:
    """GETs per second that the server answers to a client that does next to nothing, on so many connections."""
    place = urlsplit(endpoint).hostname, urlsplit(endpoint).port
    tls = ssl.create_default_context(cafile=os.environ["AWS_CA_BUNDLE"]) if endpoint.startswith("https") else None
    requests = itertools.cycle(f"GET {path} HTTP/1.1\r\nhost: {place[0]}\r\n\r\n".encode() for path in paths)
    buffer, got = bytearray(1 << 20), 0
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for _ in range(connections):
            connection = stack.enter_context(socket.create_connection(place))
            if tls is not None:
                connection = stack.enter_context(tls.wrap_socket(connection, server_hostname=place[0]))
            connection.sendall(next(requests))
            selector.register(connection, selectors.EVENT_READ, [0])  # bytes that are missing
        started = time.perf_counter()
        while selector.get_map():  # until all are answered: the next run counts requests
            for key, _ in selector.select():
                connection, missing = cast(socket.socket, key.fileobj), key.data
                count = connection.recv_into(buffer)
                while isinstance(connection, ssl.SSLSocket) and connection.pending():
                    count += connection.recv_into(memoryview(buffer)[count:])
                missing[0] = (missing[0] or _length(buffer[:count])) - count
                if missing[0]:
                    continue
                got += 1
                if time.perf_counter() - started < seconds:
                    connection.sendall(next(requests))
                else:
                    selector.unregister(connection)
        return got / (time.perf_counter() - started)


def _length(start: bytearray) -> int:
    """How long the answer is that starts so: S3Server sends the head at once."""
    head, _, _ = bytes(start[:4096]).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head[:100]
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    return len(head) + 4 + int(fields[b"content-length"])
