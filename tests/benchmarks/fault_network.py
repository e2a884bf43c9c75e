"""Faults of the network and of the server, from the listing to the last byte.

Where nothing else is said, a fault meets the first answer for each of eight objects; who asks again gets a good one.
Each run has listed before; where there is a cache, a new process reads it afterwards, and the worst of both counts.
"""

import base64
import contextlib
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import trustme
from fault_servers import Elsewhere, Keys, Relay, answer, http_server
from fault_trials import FIRST, LARGE, LARGE_KEY, SMALL, Outcome, Trial

from asyncds.testing import Fault, S3Server

HTML = b"<html><body><h1>An error occurred.</h1></body></html>"
DRIP = 5  # bytes per second
SOME = list(FIRST)[:8]  # whose answers are ill
OTHER_HOST = "127.0.0.2"

Steps = Callable[[str, bytes], list[Fault]]


def flipped(body: bytes) -> bytes:
    return body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]


def another(key: str) -> bytes:
    """The body of another object of the same size."""
    keys = list(FIRST)
    return FIRST[keys[(keys.index(key) + 2) % len(keys)]]


def chunked(body: bytes) -> Fault:
    """Half of what one chunk promised, and the end of the connection."""
    fault = Fault.body(b"%x\r\n" % len(body) + body[: len(body) // 2])
    return replace(fault, announces_length=False, extra_headers=(("Transfer-Encoding", "chunked"),))


def with_crc32(body: bytes, fault: Fault) -> Fault:
    checksum = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
    return replace(fault, extra_headers=(("x-amz-checksum-crc32", checksum),))


# how a fault is brought about


def scripted(steps: Steps, *, keys: Sequence[str] = SOME, forever: bool = False) -> Callable[[Trial], Outcome]:
    """The first answers for each of some objects are as the steps say; with `forever`, the last repeats."""

    def fault(trial: Trial) -> Outcome:
        with trial.start() as run:
            trial.open(run)
            for key in keys:
                trial.script(key, steps(key, FIRST[key]), forever=forever)
            first = trial.read(run)
        return trial.then_next_run(first)

    return fault


def status(number: int, times: int = 1, **how: Any) -> Callable[[Trial], Outcome]:
    return scripted(lambda key, body: [Fault.status(number, **how)] * times)


def storm(seconds: float) -> Callable[[Trial], Outcome]:
    """Every answer is a 503 for so long."""

    def fault(trial: Trial) -> Outcome:
        with trial.start() as run:
            trial.open(run)
            trial.script(None, [Fault.status(503)], forever=True)
            timer = threading.Timer(seconds, trial.server.clear_scripts)
            timer.start()
            first = trial.read(run)
            timer.join()
        return trial.then_next_run(first)

    return fault


def refused(trial: Trial) -> Outcome:
    with Relay(trial.server.endpoint) as relay, trial.start(relay.endpoint) as run:
        trial.open(run)
        relay.refuse()
        timer = threading.Timer(5, relay.accept)
        timer.start()
        first = trial.read(run)
        timer.join()
    return trial.then_next_run(first)


def between_batches(meddle: Callable[[Relay], None]) -> Callable[[Trial], Outcome]:
    """Half is read, something is done to the connections that were left open, and the rest is read."""

    def fault(trial: Trial) -> Outcome:
        with Relay(trial.server.endpoint) as relay, trial.start(relay.endpoint) as run:
            trial.open(run)
            run.ask("read", first=len(FIRST) // 2)
            meddle(relay)
            return trial.read(run)

    return fault


def drip(trial: Trial) -> Outcome:
    """One answer trickles; the next would not."""
    left = [DRIP]

    def rate(request: bytes) -> int | None:
        return left.pop() if left and b"GET" in request[:3] and LARGE_KEY.encode() in request else None

    with Relay(trial.server.endpoint) as relay, trial.start(relay.endpoint) as run:
        trial.open(run)
        relay.rate = rate
        first = trial.read(run)
    return trial.then_next_run(first)


def expired(trial: Trial, seconds: float, *, early: bool = False) -> Outcome:
    """Keys expire after half of the objects, when they say, or `early`; those who ask for new ones get them."""
    keys = Keys(seconds)

    def intercept(request: bytes) -> Any:
        if not keys.over or b"FIRSTKEY" not in request:
            return None
        body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
        return answer("400 Bad Request", body, Content_Type="application/xml")

    with http_server("127.0.0.1", keys) as provider, Relay(trial.server.endpoint, intercept) as relay:
        taken = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
        with trial.start(relay.endpoint, **taken, AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{provider}/keys") as run:
            trial.open(run)
            before = trial.judged(run.ask("read", first=len(FIRST) // 2))
            if before.kind != "right":
                return before._replace(note=f"{before.note}, before they expire")
            if early:
                keys.renew()
            while not keys.over:
                time.sleep(0.1)
            return trial.read(run)


def overwritten(trial: Trial) -> Outcome:
    with trial.start() as run:
        trial.open(run)
        keys = list(trial.truth)[:4]
        trial.serve({key: bytes(len(trial.truth[key]) + 7) for key in keys})
        return trial.read(run)


def redirect(code: int) -> Callable[[Trial], Outcome]:
    """One object is said to be on another host, which notes what it is told."""

    def fault(trial: Trial) -> Outcome:
        elsewhere = Elsewhere(LARGE)
        with http_server(OTHER_HOST, elsewhere) as host, trial.start(AWS_SESSION_TOKEN="canary-of-the-token") as run:
            trial.open(run)
            to = {"Location": f"{host}/{trial.bucket}/{LARGE_KEY}"}
            trial.script(LARGE_KEY, [Fault.status(code, headers=to, body=b"")], forever=True)
            outcome = trial.read(run)
        told = elsewhere.was_told()
        return Outcome("silently wrong", f"{told} sent elsewhere") if told else outcome

    return fault


def redirect_loop(trial: Trial) -> Outcome:
    with trial.start() as run:
        trial.open(run)
        to = {"Location": f"{trial.server.endpoint}/{trial.bucket}/{LARGE_KEY}"}
        trial.script(LARGE_KEY, [Fault.status(307, headers=to, body=b"")], forever=True)
        return trial.read(run)


@contextlib.contextmanager
def certificates(host: str) -> Iterator[tuple[Path, Path, Path]]:
    """A certificate for a host, its key, and the authority that signed it."""
    authority = trustme.CA()
    issued = authority.issue_cert(host)
    with tempfile.TemporaryDirectory() as folder:
        paths = tuple(Path(folder, name) for name in ("certificate.pem", "key.pem", "authority.pem"))
        issued.cert_chain_pems[0].write_to_path(str(paths[0]))
        issued.private_key_pem.write_to_path(str(paths[1]))
        authority.cert_pem.write_to_path(str(paths[2]))
        yield paths


def tls(trial: Trial, host: str = "127.0.0.1", *, trusted: bool = True) -> Outcome:
    """All objects over TLS, from a server that shows a certificate for this host; 'right' from an impostor is wrong."""
    with certificates(host) as (certificate, key, authority), S3Server(tls=(certificate, key), process=True) as server:
        server.put_many(trial.bucket, FIRST)
        bundle = dict.fromkeys(("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), str(authority))
        with trial.start(server.endpoint, **(bundle if trusted else {})) as run:
            trial.open(run)
            outcome = trial.read(run)
    impostor = host != "127.0.0.1" or not trusted
    return Outcome("silently wrong", "accepted") if impostor and outcome.kind == "right" else outcome


NETWORK: dict[str, Callable[[Trial], Outcome]] = {
    "503, twice": status(503, 2),
    "503 to every object, three times": scripted(lambda key, body: [Fault.status(503)] * 3, keys=list(FIRST)),
    "503 to all for 3 s": storm(3),
    "503 to all for 15 s": storm(15),
    **{f"{code}, twice": status(code, 2) for code in (500, 502, 504, 429)},
    "an HTML page under 502": status(502, body=HTML, headers={"Content-Type": "text/html"}),
    "an HTML page under 200": status(200, body=HTML, headers={"Content-Type": "text/html"}),
    "an error document under 200": status(200, code="InternalError"),
    "reset before the answer": scripted(lambda key, body: [Fault.reset(None)]),
    "reset at byte 0": scripted(lambda key, body: [Fault.reset(0)]),
    "reset at byte 1": scripted(lambda key, body: [Fault.reset(1)]),
    "reset mid-body": scripted(lambda key, body: [Fault.reset(len(body) // 2)]),
    "reset before the last byte": scripted(lambda key, body: [Fault.reset(len(body) - 1)]),
    "body ends before its Content-Length": scripted(lambda key, body: [Fault.close(len(body) // 2)]),
    "chunked body ends within a chunk": scripted(lambda key, body: [chunked(body)]),
    "no Content-Length, and the body is cut": scripted(lambda key, body: [Fault.no_length(after=len(body) // 2)]),
    "body cut, its Content-Length consistent": scripted(lambda key, body: [Fault.truncated(SMALL // 2)]),
    "body longer than listed": scripted(lambda key, body: [Fault.padded(7)]),
    "one bit flipped in one body": scripted(lambda key, body: [Fault.body(flipped(body))], keys=[LARGE_KEY]),
    "one bit flipped in one body that names its CRC32": scripted(
        lambda key, body: [with_crc32(body, Fault.body(flipped(body)))], keys=[LARGE_KEY]
    ),
    "another object's body, and its ETag": scripted(lambda key, body: [Fault.body(another(key), own_etag=True)]),
    "another object's body, same size, under the right ETag": scripted(
        lambda key, body: [Fault.body(another(key))], keys=[LARGE_KEY]
    ),
    "another object's ETag": scripted(lambda key, body: [Fault.etag(f'"{0:032x}"')]),
    "stall before the headers of one answer": scripted(lambda key, body: [Fault.stall()], keys=[LARGE_KEY]),
    "stall mid-body of one answer": scripted(lambda key, body: [Fault.stall(LARGE // 2)], keys=[LARGE_KEY]),
    f"one answer drips, {DRIP} bytes per second": drip,
    "one answer stalls, every time": scripted(lambda key, body: [Fault.stall()], keys=[LARGE_KEY], forever=True),
    "connections refused for 5 s": refused,
    "idle connections closed": between_batches(Relay.hang_up),
    "kept connections closed as a request arrives": between_batches(Relay.doom),
    "keys expire at their time": partial(expired, seconds=30),
    "keys expire before their time": partial(expired, seconds=3600, early=True),
    "403 for one object": scripted(lambda key, body: [Fault.status(403)], keys=[LARGE_KEY], forever=True),
    "404 for one object": scripted(lambda key, body: [Fault.status(404)], keys=[LARGE_KEY], forever=True),
    "RequestTimeTooSkewed": scripted(
        lambda key, body: [Fault.status(403, "RequestTimeTooSkewed")], keys=[LARGE_KEY], forever=True
    ),
    "4 objects overwritten after the listing": overwritten,
    **{f"{code} to another host": redirect(code) for code in (301, 302, 307)},
    "a redirect loop": redirect_loop,
    "TLS, authority known (no fault)": tls,
    "TLS, certificate for another host": partial(tls, host="elsewhere.example"),
    "TLS, unknown authority": partial(tls, trusted=False),
}
