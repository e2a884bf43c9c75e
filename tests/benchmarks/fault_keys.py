"""Faults of listings, keys that are hard to keep apart, and hostile servers and neighbours."""

import gzip
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fault_disk import NOBODY, places
from fault_servers import Relay, answer, zeros
from fault_trials import ACCESS, FIRST, LARGE_KEY, PREFIX, NothingToDo, Outcome, Trial

from asyncds.testing import Fault
from asyncds.testing.objects import etag_of

PAGE = 6
GIGABYTE = 1_000_000_000
TOKEN = "canary-of-the-token"
DATE = "2026-01-01T00:00:00.000Z"


# listings


class Pages:
    """Lists FIRST in pages of six, with a quirk at the second; the next token is the number of keys before it."""

    def __init__(self, quirk: str) -> None:
        self.quirk = quirk
        self.keys = sorted(FIRST)
        self.asked = 0  # for the second page

    def __call__(self, request: bytes) -> Any:
        target = request.split(b" ", 2)[1].decode() if request.startswith(b"GET ") else ""
        query = {name: values[-1] for name, values in parse_qs(urlsplit(target).query).items()}
        if "list-type" not in query:
            return None
        token = query.get("continuation-token")
        start = int(token.removeprefix("again-")) if token else self.after(query.get("start-after", ""))
        self.asked += start == PAGE
        if start == PAGE and (fault := self.instead()) is not None:
            return fault
        return answer("200 OK", self.page(start, again=token == "again-0"), Content_Type="application/xml")

    def after(self, key: str) -> int:
        return sum(each <= key for each in self.keys)

    def instead(self) -> Any:
        """What is answered in the place of the second page, if anything."""
        match self.quirk:
            case "fails twice" if self.asked <= 2:
                return answer("500 Internal Server Error", b"<Error><Code>InternalError</Code></Error>")
            case "fails":
                return answer("500 Internal Server Error", b"<Error><Code>InternalError</Code></Error>")
            case "is an error document" if self.asked == 1:
                return answer("200 OK", b"<Error><Code>InternalError</Code></Error>")
            case "is cut off" if self.asked == 1:
                return answer("200 OK", self.page(PAGE)[:-300])
        return None

    def page(self, start: int, *, again: bool = False) -> bytes:
        keys = self.keys[start : start + PAGE]
        if self.quirk == "is unsorted" and start == PAGE:
            keys.reverse()
        after = self.next_token(start, again)
        token = f"<NextContinuationToken>{after}</NextContinuationToken>" if after else ""
        truncated = str(start + PAGE < len(self.keys)).lower()
        contents = "".join(self.entry(key) for key in keys)
        return (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>faults</Name><Prefix>{PREFIX}</Prefix><KeyCount>{len(keys)}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"<IsTruncated>{truncated}</IsTruncated>{token}{contents}</ListBucketResult>"
        ).encode()

    def next_token(self, start: int, again: bool) -> str | None:
        if start + PAGE >= len(self.keys):
            return None
        if self.quirk == "names no next" and start == PAGE:
            return None
        if self.quirk == "names itself as next" and start == PAGE:
            return str(PAGE)
        if self.quirk == "is sent twice" and start == 0 and not again:
            return "again-0"
        return str(start + PAGE)

    def entry(self, key: str) -> str:
        etag, size = etag_of(FIRST[key]).strip('"'), len(FIRST[key])
        return (
            f"<Contents><Key>{key}</Key><LastModified>{DATE}</LastModified><ETag>&#34;{etag}&#34;</ETag>"
            f"<Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        )


def listing(quirk: str) -> Callable[[Trial], Outcome]:
    def fault(trial: Trial) -> Outcome:
        with Relay(trial.server.endpoint, Pages(quirk)) as relay, trial.start(relay.endpoint) as run:
            trial.open(run)
            return trial.read(run)

    return fault


# keys


def keys(*names: str) -> Callable[[Trial], Outcome]:
    """Objects under these keys, each with bytes of its own, read by two runs: the second finds them in the cache."""

    def fault(trial: Trial) -> Outcome:
        bodies = {PREFIX + name.format(trial.home.name): os.urandom(1000 + place) for place, name in enumerate(names)}
        trial.put(bodies)
        with trial.start() as run:
            trial.open(run)
            first = trial.read(run)
        outcome = trial.then_next_run(first)
        found = escaped(trial, set(bodies.values()))
        return Outcome("silently wrong", f"{found} written") if found else outcome

    return fault


def escaped(trial: Trial, bodies: set[bytes]) -> Path | None:
    """A file outside of the cache that holds one of these bodies."""
    top = trial.home.parent
    for folder in (*(each for each in top.iterdir() if each != trial.home), trial.home, Path(tempfile.gettempdir())):
        paths = folder.rglob("*") if folder in (trial.home,) else folder.glob("*")
        for path in paths:
            if trial.folder not in path.parents and path.is_file() and _holds(path, bodies):
                return path.relative_to(top) if path.is_relative_to(top) else path
    return None


def _holds(path: Path, bodies: set[bytes]) -> bool:
    try:
        return path.stat().st_size < 10_000 and path.read_bytes() in bodies
    except OSError:
        return False


# hostile servers and neighbours


def endless(trial: Trial) -> Outcome:
    """10 GB are announced, and at most 4 GB sent, for an object that is listed with 100 kB."""

    def intercept(request: bytes) -> Any:
        if not request.startswith(b"GET ") or LARGE_KEY.encode() not in request.split(b"\r\n", 1)[0]:
            return None
        return zeros(request, 10 * GIGABYTE, 4 * GIGABYTE, ETag=etag_of(FIRST[LARGE_KEY]))

    with Relay(trial.server.endpoint) as relay, trial.start(relay.endpoint) as run:
        trial.open(run)
        relay.intercept = intercept
        return trial.read(run)


@cache
def bomb() -> bytes:
    """3 MB that unpack to 3 GB."""
    return gzip.compress(bytes(GIGABYTE), 6) * 3


def gzip_bomb(trial: Trial) -> Outcome:
    """The bytes that are stored are right; who unpacks them needs 3 GB."""
    key = f"{PREFIX}bomb"
    trial.put({key: bomb()})
    with trial.start() as run:
        trial.open(run)
        trial.script(key, [Fault(extra_headers=(("Content-Encoding", "gzip"),))], forever=True)
        return trial.read(run)


def long_headers(trial: Trial) -> Outcome:
    with trial.start() as run:
        trial.open(run)
        headers = tuple((f"x-amz-meta-{number}", "a" * 10_000) for number in range(100))
        trial.script(LARGE_KEY, [Fault(extra_headers=headers)], forever=True)
        return trial.read(run)


def foreign_folder(trial: Trial) -> Outcome:
    """Another user of the machine owns the folder, and has changed what is in it."""
    trial.warm()
    if os.geteuid():
        raise NothingToDo  # only root can give files away
    for place in places(trial)[:3]:
        content = bytearray(place.path.read_bytes())
        content[place.offset : place.offset + 10] = b"of another"
        place.path.write_bytes(content)
    for path in (trial.folder, *trial.folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    return trial.next_run()


def secrets(trial: Trial) -> Outcome:
    """A refused epoch: secret key and token are looked for in what is printed, kept, pickled, and said by `repr`."""
    log = trial.home / "log"
    ours, trial.log = trial.log, log
    try:
        with trial.start(AWS_SESSION_TOKEN=TOKEN) as run:
            trial.open(run)
            text = run.ask("pickle").get("text", "")
            trial.script(LARGE_KEY, [Fault.status(403)], forever=True)
            trial.read(run)
    finally:
        trial.log = ours
    kept = {path: path.read_bytes() for path in trial.home.rglob("*") if path.is_file()}
    for canary in (ACCESS["AWS_SECRET_ACCESS_KEY"], TOKEN):
        if canary in text:
            return Outcome("silently wrong", "in a pickle")
        if found := [path for path, content in kept.items() if canary.encode() in content]:
            return Outcome("silently wrong", f"in {found[0].relative_to(trial.home)}")
    return Outcome("right")


KEYS: dict[str, Callable[[Trial], Outcome]] = {
    "a page of the listing fails twice": listing("fails twice"),
    "a page of the listing fails every time": listing("fails"),
    "a page of the listing is an error document under 200": listing("is an error document"),
    "a page of the listing is cut off": listing("is cut off"),
    "a page of the listing is sent twice": listing("is sent twice"),
    "a page of the listing is unsorted": listing("is unsorted"),
    "a page of the listing is not the last, and names no next": listing("names no next"),
    "a page of the listing names itself as the next": listing("names itself as next"),
    "keys `../../../outside`, `../../../../outside`": keys("../../../outside-{}", "../../../../outside-{}"),
    "keys `a//b` and `a/b`": keys("a//b", "a/b"),
    "keys `a` and `a/b`": keys("a", "a/b"),
    "keys `a/.` and `a/./b`": keys("a/.", "a/./b"),
    "keys `a%2Fb` and `a/b`": keys("a%2Fb", "a/b"),
    "keys `Case` and `case`": keys("Case", "case"),
    "keys `é` in NFC and NFD": keys("caf\u00e9", "cafe\u0301"),
    "keys with spaces, `+`, `?`, `#`, an emoji": keys("a b", "a+b", "a?b", "a#b", "\U0001f600"),
    "keys of 1,000 bytes": keys("x" * 995, "x" * 994 + "y"),
    "10 GB announced for 100 kB": endless,
    "an object that is a gzip bomb": gzip_bomb,
    "1 MB of headers": long_headers,
    "folder of another user, who changed 3 value files": foreign_folder,
    "secrets in output, files or pickles": secrets,
}
