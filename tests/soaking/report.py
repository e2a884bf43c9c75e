"""What a soak has found: sums over its rounds, and what of it breaks a promise."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from soaking.rounds import Round

MORE_RSS = 64 << 20  # bytes: what the allocator keeps differs by less
HEDGED = 0.03  # of the requests: 2 %, and what is saved for a start
MORE_DESCRIPTORS = 6  # those of the loop and of the cache, which stay, may not be there when a process has not read yet
MORE_THREADS = 6  # uvloop's four, which stay, may not be there when a process has not read yet
MILLION = 1_000_000


@dataclass
class Outcome:
    """What one round was like. `begun` says how many epochs began on each prefix, in all processes together, and `left`
    how many of those were left before their end.

    `beyond` is the server's: (prefix, how often objects were asked for beyond the faults that they met, objects).
    """

    round: Round
    begun: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    reads: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    untyped: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    mangled: Counter[str] = field(default_factory=Counter)
    outages: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    faulted_reads: int = 0
    requests: int = 0
    objects: int = 0
    beyond: list[tuple[str, int, int]] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)

    def allowed(self, prefix: str) -> int:
        """How often an object may be asked for beyond the faults that it meets: once, or once in each epoch where the
        cache does not keep it; and once more for all that drops what is in flight."""
        lost = self.kills.total() + self.outages + self.left[prefix] + self.errors.total()
        return lost + (1 if self.round.keeps else max(1, self.begun[prefix]))

    def violations(self) -> list[str]:
        """What breaks a promise, a line for each."""
        found = list(self.mistakes) + [f"an error that is none of asyncds:\n{text}" for text in self.untyped]
        if self.wrong:
            found.append(f"{self.wrong} samples had wrong bytes")
        if (others := self.errors.keys() - self.round.may_raise) and not self.untyped:
            text = ", ".join(f"{self.errors[name]} {name} ({self.examples.get(name)})" for name in sorted(others))
            found.append(f"errors that no fault of this round calls for: {text}")
        if self.round.must_read and not self.reads:
            found.append("nothing was read")
        hedges = HEDGED * self.requests
        for prefix, number, count in self.beyond:
            more = max(0, number - self.allowed(prefix)) * count
            if more <= hedges:
                hedges -= more  # second requests for what was late are no retries, and few
            else:
                found.append(
                    f"{prefix}: {count} objects were asked for {number} times beyond the faults that they met, "
                    f"where {self.allowed(prefix)} are allowed"
                )
        found += [f"the cache, {kind}: {lines[:3]}" for kind, lines in self.problems.items()]
        return [f"round {self.round.number} ({self.round.kind}): {line}" for line in found]


@dataclass
class Report:
    """Everything. `processes` says what each of them held when it began and when it ended."""

    seed: int
    seconds: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    processes: dict[str, list[dict[str, int]]] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)
    verified: str = ""

    def sum(self, name: str) -> Any:
        values = [getattr(outcome, name) for outcome in self.outcomes]
        return sum(values, Counter()) if values and isinstance(values[0], Counter) else sum(values)

    def violations(self) -> list[str]:
        """What breaks a promise, a line for each."""
        found = [line for outcome in self.outcomes for line in outcome.violations()]
        found += self.leftovers
        for name, held in self.processes.items():
            found += [f"{name}: {line}" for line in _growth(held)]
        return found

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            **{name: self.sum(name) for name in _SUMS},
            "wrong_samples": self.sum("wrong"),
            "examples": self._examples(),
            "hours_per_million_faulted_reads": self._hours(),
            "rounds": [{"kind": outcome.round.kind, "options": asdict(outcome.round)} for outcome in self.outcomes],
            "processes": {name: [held[0], held[-1]] for name, held in self.processes.items() if held},
            "leftovers": self.leftovers,
            "verify": self.verified,
            "violations": self.violations(),
        }

    def table(self) -> str:
        """For people."""
        rows = [
            ("seed", str(self.seed)),
            ("seconds, rounds", f"{self.seconds:.0f}, {len(self.outcomes)}"),
            ("reads", f"{self.sum('reads'):,}"),
            ("faulted reads", f"{self.sum('faulted_reads'):,} (a million takes {self._hours():.1f} h)"),
            ("wrong samples", f"{self.sum('wrong')}"),
            ("GETs, objects", f"{self.sum('requests'):,}, {self.sum('objects'):,}"),
            *(("fault", f"{count:8,} {name}") for name, count in sorted(self.sum("faults").items())),
            *(("disk", f"{count:8,} {name}") for name, count in sorted(self.sum("mangled").items())),
            *(("killed", f"{count:8,} {name}") for name, count in sorted(self.sum("kills").items())),
            ("outages", f"{self.sum('outages')}"),
            *(("error", f"{count:8,} {name}") for name, count in sorted(self.sum("errors").items())),
            *(("", f"{name}: {text}") for name, text in sorted(self._examples().items())),
            *((name, _held(held)) for name, held in self.processes.items() if held),
            ("cache", self.verified),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {text}" for name, text in rows)

    def _examples(self) -> dict[str, str]:
        """A message of each class of errors."""
        return {name: text for outcome in self.outcomes for name, text in outcome.examples.items()}

    def _hours(self) -> float:
        return round(self.seconds / 3600 * MILLION / max(1, self.sum("faulted_reads")), 2)


_SUMS = (
    *("reads", "faulted_reads", "requests", "objects", "outages"),
    *("faults", "mangled", "kills", "errors"),
)


def _held(held: list[dict[str, int]]) -> str:
    first, last = held[0], held[-1]
    return ", ".join(
        f"{name} {first[name] / unit:,.0f} → {last[name] / unit:,.0f}{text}"
        for name, unit, text in (("rss", 1e6, " MB"), ("threads", 1, ""), ("descriptors", 1, ""))
    )


def _growth(held: list[dict[str, int]]) -> list[str]:
    """What a process holds more of between rounds than in its first quarter: in the first rounds of each kind the
    allocator still takes what it keeps then."""
    if not held:
        return []
    first = {name: max(one[name] for one in held[: len(held) // 4 + 1]) for name in held[0]}
    last = held[-1]
    found = [f"{last['ours']} threads are left when all is closed"] if last["ours"] else []
    for name, more in (("rss", MORE_RSS), ("threads", MORE_THREADS), ("descriptors", MORE_DESCRIPTORS)):
        if last[name] > first[name] + more:
            found.append(f"{name} grew from {first[name]:,} to {last[name]:,}")
    return found
