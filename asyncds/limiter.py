"""How many requests may be in flight: a controller that is told what came of them, and has no clock and no loop."""

import math
import resource

__all__ = ["Limiter", "most"]

_LEAST, _START, _MOST = 4, 128, 1024
_REQUEST = 64 << 10  # bytes that would come in the time that a request takes beside those of its object
_PRICE = 0.1  # of what goodput may rise by, in proportion to the limit: less is not worth a longer queue
_LONGEST_STEP, _SHORTEST_STEP = math.log(2), math.log(1.12)
_LONGEST_STEP_DOWN = math.log(1.3)  # one too many costs goodput, and one up only a queue
_EVIDENCE = math.log(2)  # generations of answers by which a step of one, on the logarithmic scale, is judged
_SURPRISE = 0.35  # beyond what a step can change: the network is another one
_SHORTEST_LOOK_S = 0.06
_FEW = 32  # answers: of fewer, no share of failures is spoken of
_BAD = 0.1


def most() -> int:
    """The highest limit that this process can have: half of the files that it may open are for others than sockets."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if files == resource.RLIM_INFINITY else min(_MOST, max(_LEAST, files // 2))


class Limiter:
    """Looks for the fewest requests in flight that bring about as much as any number would.

    What is brought is counted in bytes, and each object as 64 KiB more: for small objects that is objects per second,
    for large ones bytes per second, and for a mixture neither a few giants nor many dwarfs look like a change.

    It climbs the hill of `ln(goodput) - 0.1 ln(limit)`, which is the logarithm of a generalised "power" (L. Kleinrock,
    "Power and deterministic rules of thumb", ICC 1979): up as long as a limit that is twice as high brings 7 % more;
    down where fewer would do. That holds whether the store, the network, this process's CPU or its disk has had enough:
    none of them is asked. Every step is judged by what came after it had taken effect, against what came before.
    A step that has paid is followed by one twice as long, up to a doubling, a step that has not by one half as long,
    back; the shorter a step is, the longer it is looked at: noise weighs more in it. Where goodput changes by more than
    a step explains, the network is another one, and the search begins anew, upwards.

    Failures count twice. Goodput is multiplied by the share of answers that are none, as utilities in PCC fall with
    loss (M. Dong et al., NSDI 2015): what fails at any limit decides nothing. And where the failures of a generation of
    answers, which are as many as the limit, exceed the usual share by more than a tenth, the limit is cut at once, and
    once, by half of the excess, as DCTCP does for a share of marked packets (RFC 8257, 3.3); the next step undoes it.

    Time in which nobody was kept waiting by the limit tells nothing about it, and is left out.
    """

    def __init__(self, *, least: int = _LEAST, start: int = _START, most: int = _MOST) -> None:
        self.least = min(least, most)
        self.most = most
        self._limit = float(max(self.least, min(start, most)))
        self._step = _LONGEST_STEP
        self._up = True
        self._before: float | None = None  # the height of the hill where the last step began
        self._answers = self._failures = 0  # of the generation, whoever was waiting
        self._usual = 0.0  # share of failures, over the last generations
        self._settled = False  # whether what comes now was asked for under this limit
        self._look()

    @property
    def limit(self) -> int:
        return round(self._limit)

    def __repr__(self) -> str:
        return f"<Limiter {self.limit} of {self.least} to {self.most}>"

    def told(self, seconds: float, objects: int, size: int, failures: int, *, bound: bool) -> int:
        """Take what came in the last `seconds`: objects, their bytes, and failures; return the limit from now on.

        `bound` is whether somebody has waited all the while only because of the limit.
        """
        self._answers += objects + failures
        self._failures += failures
        if bound:
            self._seconds += seconds
            self._lost += failures
            self._seen += objects + failures
            self._brought += objects * _REQUEST + size
        if self._answers >= max(self._limit, _FEW):
            share, self._answers, self._failures = self._failures / self._answers, 0, 0
            excess = share - self._usual
            self._usual += excess / 4
            if excess > _BAD:
                self._cut(excess)
        if not self._settled:
            if self._seen >= self._limit:
                self._settled = True
                self._look()
        elif self._seen >= self._limit * _EVIDENCE / self._step and self._seconds >= _SHORTEST_LOOK_S:
            self._judge()
        return self.limit

    def _look(self) -> None:
        self._seconds, self._seen, self._lost, self._brought = 0.0, 0, 0, 0

    def _judge(self) -> None:
        """Go on from here, or back."""
        if not self._brought:  # nothing is to be learnt from an outage
            self._look()
            return
        goodput = self._brought / self._seconds * (1 - self._lost / self._seen)
        height = math.log(goodput) - _PRICE * math.log(self._limit)
        if self._before is not None:
            self._learn(height - self._before)
        self._before = height
        self._up = self._limit <= self.least or (self._up and self._limit < self.most)
        if not self._up:
            self._step = min(self._step, _LONGEST_STEP_DOWN)
        self._go(self._limit * math.exp(self._step if self._up else -self._step))

    def _learn(self, gain: float) -> None:
        """Choose the next step by what the last one has gained."""
        if abs(gain) > self._step + _SURPRISE:
            self._up, self._step = True, _LONGEST_STEP
        elif gain >= 0:
            self._step = min(_LONGEST_STEP, 2 * self._step)
        else:
            self._up, self._step = not self._up, max(_SHORTEST_STEP, self._step / 2)

    def _cut(self, excess: float) -> None:
        """Back off at once; the next look is the base of a step back to where the limit was."""
        self._step = max(_SHORTEST_STEP, -math.log(1 - excess / 2))
        self._up, self._before = True, None
        self._go(self._limit * (1 - excess / 2))

    def _go(self, limit: float) -> None:
        self._limit = max(float(self.least), min(limit, float(self.most)))
        self._settled = False
        self._look()
