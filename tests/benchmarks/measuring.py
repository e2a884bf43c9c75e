"""What the benchmarks beside other libraries share: fresh processes, a server's ceiling, rows of a table."""

import json
import os
import resource
import selectors
import socket
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit

Result = dict[str, Any]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark", "AWS_REGION": "us-east-1"}
_PATIENCE_S = 300


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


def cpu_seconds() -> float:
    """What this process has used, all of its threads, and the children that it has waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


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
    host, port = urlsplit(endpoint).hostname, urlsplit(endpoint).port
    requests = [f"GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode() for path in paths]
    buffer, got, asked = bytearray(1 << 20), 0, 0
    with selectors.DefaultSelector() as selector:
        for _ in range(connections):
            connection = socket.create_connection((host, port))
            connection.sendall(requests[asked % len(requests)])
            asked += 1
            selector.register(connection, selectors.EVENT_READ, [0])
        started = time.perf_counter()
        while time.perf_counter() - started < seconds or got < connections:
            for key, _ in selector.select():
                connection, missing = key.fileobj, key.data
                count = connection.recv_into(buffer)  # type: ignore[union-attr]
                if not missing[0]:
                    missing[0] = _whole(buffer[:count])
                missing[0] -= count
                if not missing[0]:
                    got += 1
                    connection.sendall(requests[asked % len(requests)])  # type: ignore[union-attr]
                    asked += 1
        rate = got / (time.perf_counter() - started)
        for key in tuple(selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
    return rate


def _whole(start: bytearray) -> int:
    """How long the answer is that starts so: S3Server sends the head at once."""
    head, _, _ = bytes(start[:4096]).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head[:100]
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    return len(head) + 4 + int(fields[b"content-length"])
