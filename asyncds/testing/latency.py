"""How long answers take: one number, as networks have it, or with stragglers."""

import math
import random
from dataclasses import dataclass
from statistics import NormalDist

from asyncds.errors import ConfigurationError

_Z99 = NormalDist().inv_cdf(0.99)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Latencies as networks have them: half of them above `median` seconds, one in a hundred above `p99`."""

    median: float
    p99: float

    def __post_init__(self) -> None:
        if not 0 < self.median <= self.p99 < float("inf"):
            raise ConfigurationError(f"{self!r}: the median lies above 0, and p99 not below it")

    def draw(self, generator: random.Random) -> float:
        """One of them, in seconds."""
        return generator.lognormvariate(math.log(self.median), math.log(self.p99 / self.median) / _Z99)


@dataclass(frozen=True, slots=True)
class Stragglers:
    """Latencies of which a fraction is so many times as long: `Stragglers(0.01, fraction=0.01, times=20)`.

    `usual` is the latency of the others: a number of seconds, or a `LogNormal`.
    """

    usual: float | LogNormal
    fraction: float = 0.01
    times: float = 20.0

    def __post_init__(self) -> None:
        checked(self.usual)
        if not (0 <= self.fraction <= 1 and 1 <= self.times < float("inf")):
            raise ConfigurationError(f"{self!r}: a fraction lies between 0 and 1, and `times` is at least 1")

    def draw(self, generator: random.Random) -> float:
        """One of them, in seconds."""
        usual = self.usual.draw(generator) if isinstance(self.usual, LogNormal) else self.usual
        return usual * (self.times if generator.random() < self.fraction else 1)


Latency = float | LogNormal | Stragglers


def checked(latency: Latency) -> Latency:
    """Return it. Raises `ConfigurationError` for a number of seconds that cannot be waited for."""
    if isinstance(latency, LogNormal | Stragglers):
        return latency
    if not 0 <= latency < float("inf"):
        raise ConfigurationError(f"latency is a number of seconds, at least 0, not {latency!r}")
    return float(latency)
