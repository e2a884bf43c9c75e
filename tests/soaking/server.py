"""An S3 server whose every answer may be a fault, drawn anew for each request, and which counts what it did."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from asyncds.testing import Fault, S3Server
from asyncds.testing.connection import Connection
from asyncds.testing.host import Factory
from asyncds.testing.service import S3Service
from asyncds.testing.wire import Request
from soaking.objects import body, keys, size_of

BUCKET = "soak"
_KEPT = 60  # prefixes; those before are forgotten
_MERCY = 0.3  # the share of faults that is left after each one in a row: pauses grow, and with them the epoch's end
_HTML = b"<html><body><h1>503 Service Temporarily Unavailable</h1></body></html>"

Draw = Callable[[random.Random, int], Fault]

# Each drawn for an object of so many bytes, which is never empty.
CHEAP: dict[str, Draw] = {
    "status 500": lambda chance, size: Fault.status(500),
    "status 502, a page of HTML": lambda chance, size: Fault.status(502, body=_HTML),
    "status 503": lambda chance, size: Fault.status(503),
    "status 504": lambda chance, size: Fault.status(504),
    "status 429": lambda chance, size: Fault.status(429),
    "status 200, an error's document": lambda chance, size: Fault.status(200, "InternalError"),
    "reset before the status": lambda chance, size: Fault.reset(None),
    "reset within the body": lambda chance, size: Fault.reset(chance.choice([0, 1, size // 2, size - 1])),
    "reset at any byte": lambda chance, size: Fault.reset(chance.randrange(size)),
    "closed at any byte": lambda chance, size: Fault.close(chance.randrange(size)),
    "truncated": lambda chance, size: Fault.truncated(chance.randrange(size)),
    "padded": lambda chance, size: Fault.padded(chance.randbytes(chance.randrange(1, 3000))),
    "no length, cut": lambda chance, size: Fault.no_length(after=chance.randrange(size)),
    "another object of another size": lambda chance, size: Fault.body(chance.randbytes(size + 7)),
}
SLOW: dict[str, Draw] = {
    "stall before the status": lambda chance, size: Fault.stall(),
    "stall within the body": lambda chance, size: Fault.stall(chance.randrange(size)),
}
# Which nobody notices without the object's MD5.
FLIPPED: dict[str, Draw] = {"another object of the same size": lambda chance, size: Fault.body(chance.randbytes(size))}
# Not to be retried: the right answer is an error.
FINAL: dict[str, Draw] = {
    "status 403": lambda chance, size: Fault.status(403),
    "status 404": lambda chance, size: Fault.status(404),
    "another ETag": lambda chance, size: Fault.etag('"00000000000000000000000000000000"'),
    "another object with its own ETag": lambda chance, size: Fault.body(chance.randbytes(size), own_etag=True),
    "a redirect elsewhere": lambda chance, size: Fault.status(307, headers={"Location": "http://127.0.0.2:9/"}),
}
# Answers that are late, but in time: no reason for another request.
LATE: dict[str, Draw] = {
    "late": lambda chance, size: Fault.delay(chance.uniform(0, 0.1)),
    "late within the body": lambda chance, size: Fault.stall(chance.randrange(size), resume_s=chance.uniform(0, 0.1)),
}
MENU: dict[str, dict[str, Draw]] = {"cheap": CHEAP, "slow": SLOW, "flipped": FLIPPED, "final": FINAL, "late": LATE}
_OF_LISTINGS = ("status 500", "status 503", "status 429", "reset before the status", "closed at any byte")


class DrawingService(S3Service):
    """The server proper. Objects under a prefix are there from its first listing on."""

    def __init__(self, seed: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._chance = random.Random(seed)
        self._shares: Mapping[str, float] = {}
        self._prefixes: list[str] = []
        self.begin_round({})

    def begin_round(self, shares: Mapping[str, float]) -> None:
        """Draw faults of each part of the menu for such a share of the requests from now on, and count anew."""
        self.reset_counts()  # those of an hour would be of millions of keys
        self._shares = shares
        self._drawn: Counter[str] = Counter()
        self._met: Counter[bytes] = Counter()
        self._asked: Counter[bytes] = Counter()
        self._ill: Counter[bytes] = Counter()
        self._faulted_reads = 0

    def tally(self) -> dict[str, Any]:
        """What was drawn since the round began, and how often objects were asked for beyond the faults they met.

        `beyond` has triples: a prefix, a number, and how many objects of the prefix were asked for so often.
        """
        beyond = Counter((_prefix(key), asked - self._met[key]) for key, asked in self._asked.items())
        return {
            "faults": dict(self._drawn),
            "faulted_reads": self._faulted_reads,
            "requests": self._asked.total(),
            "objects": len(self._asked),
            "beyond": [(prefix, number, count) for (prefix, number), count in beyond.items()],
        }

    def begin(self, request: Request) -> Fault | None:
        fault = super().begin(request)
        if request.operation == "GET" and request.bucket == BUCKET:
            return fault or self._fault_of_object(request.key)
        if request.operation == "LIST" and request.bucket == BUCKET:
            self._fill(request.query.get("prefix", ""))
            return fault or self._fault_of_listing()
        return fault

    def _fault_of_object(self, key: bytes) -> Fault | None:
        self._asked[key] += 1
        part, name = self._draw(_MERCY ** self._ill[key])
        if part is None:
            self._faulted_reads += self._ill.pop(key, 0) > 0  # it comes after all, to whoever waits for it
            return None
        self._drawn[name] += 1
        if part != "late":
            self._met[key] += 1
            self._ill[key] += 1
        return MENU[part][name](self._chance, size_of(key.decode()))

    def _fault_of_listing(self) -> Fault | None:
        if self._chance.random() >= self._shares.get("cheap", 0) / 2:
            return None
        name = self._chance.choice(_OF_LISTINGS)
        self._drawn[f"listing: {name}"] += 1
        return CHEAP[name](self._chance, 1000)

    def _draw(self, mercy: float) -> tuple[str | None, str]:
        chance = self._chance.random() / mercy
        for part, share in self._shares.items():
            chance -= share
            if chance < 0:
                return part, self._chance.choice(list(MENU[part]))
        return None, ""

    def _fill(self, prefix: str) -> None:
        if prefix.endswith("/") and prefix not in self._prefixes:
            self._prefixes.append(prefix)
            self._store.put_many(BUCKET, {key: body(key) for key in keys(prefix)})
        while len(self._prefixes) > _KEPT:
            for key in keys(self._prefixes.pop(0)):
                self._store.delete(BUCKET, key)

    # an outage

    def go_down(self) -> None:
        """Refuse connections, and end those that are there, until `come_up`."""
        self._port = self._server.sockets[0].getsockname()[1]
        self._server.close()
        for connection in tuple(self._connections):
            connection.abort()

    def come_up(self) -> None:
        """Listen again, at the same port, a moment from now."""
        self._coming_up = asyncio.ensure_future(self._listen())

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), "127.0.0.1", self._port, backlog=1024)


def _prefix(key: bytes) -> str:
    return key[: key.rindex(b"/") + 1].decode()


class SoakServer(S3Server):
    """An S3 server in a process of its own that draws its faults from a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(process=True)
        self._seed = seed

    def _factory(self) -> Factory:
        made = super()._factory()
        assert isinstance(made, partial)
        return partial(DrawingService, self._seed, *made.args, **made.keywords)

    def begin_round(self, shares: Mapping[str, float]) -> None:
        """See `DrawingService`; so for the others."""
        self._call("begin_round", shares)

    def tally(self) -> dict[str, Any]:
        found: dict[str, Any] = self._call("tally")
        return found

    def go_down(self) -> None:
        self._call("go_down")

    def come_up(self) -> None:
        self._call("come_up")
