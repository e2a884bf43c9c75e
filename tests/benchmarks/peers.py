"""Cold and warm epochs of asyncds beside those of other libraries, and how far asyncds is from what is possible.

    python tests/benchmarks/peers.py [--kinds png,jpeg,1MB,64MB] [--rtt 0,0.001,0.01,0.05] [--workers 0,2] [--rounds 3]
        [--scale 1] [--only "asyncds, cold"] [--environments .venv-peers] [--json peers.json] [--plot peers.png]

Every run is a process of its own, forked from one that has imported torch and no more than that, contenders take turns,
and the server counts the requests. All read the same objects in the same batches, shuffled, and make the same of each;
only the loop over the loader is timed, up to its last batch. Cold is an empty cache, warm is a full one; a library
without a cache has one kind of epoch. Those that ask for one object after the other are timed over their first samples
only, because their rate does not change. Local files are in the page cache. litData is given the list of objects, and
reads ahead only where an epoch is not shuffled.

The bound is what asyncds could not be faster than with the CPU that it uses: the largest of four terms, over N samples.
Latency, N (L + S/b) / C, where L + S/b is what one connection takes for one object, and C how many requests were in
flight; N/Q, where Q is what the server answers to a client that only counts bytes; N c / k, where c is the CPU that all
of its processes used, and k the cores; N d / m, where d is the decoding of one sample, and m the processes that decode.
The server shares the cores, and one process without workers has one interpreter. torch has one thread in each process.
The garbage collector's one pass through what torch has loaded, 0.3 s, is made before the clock starts.
Prints Markdown tables.
"""

import argparse
import contextlib
import gc
import io
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environments import FOLDER, python_for, reason
from measuring import (
    CORES,
    CREDENTIALS,
    Forked,
    Result,
    ceiling,
    cpu_seconds,
    installed,
    ratio,
    serve,
    spread,
    table,
)

CONCURRENCY = 256  # what is taken for the requests in flight where answers come at once
SERIAL_S = 3.0  # about how long those that ask for one object after the other are timed
HEADER = ["", "samples/s", "spread", "asyncds cold to it", "asyncds warm to it", "GETs per sample", "other requests"]
HEADER += ["peak in flight", "CPU per sample"]
TERMS = ["latency", "server", "client CPU", "decoding"]


def run(options: argparse.Namespace) -> Result:
    """One epoch in this process."""
    import torch
    from contenders import CONTENDERS, KINDS, cache_of, loader_for, written

    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
    torch.set_num_threads(1)  # as in workers: threads that wait for each other's core cost five times the decoding
    name, (options.workers,) = options.run, options.workers
    cache = cache_of(name, options)
    dataset = CONTENDERS[name].make(options, cache)
    len(dataset)  # some list here
    torch.manual_seed(0)
    loader = loader_for(name, dataset, options)
    KINDS[options.kind].opened(io.BytesIO(next(KINDS[options.kind].bodies(1))[1]))
    gc.collect()  # or its one pass through all of torch falls into the epoch of whoever happens to need it
    seen, started, cpu = 0, time.perf_counter(), cpu_seconds()
    for batch in loader:
        seen += len(batch)
        seconds = time.perf_counter() - started
    assert seen == (options.few if CONTENDERS[name].serial else len(dataset)), f"{seen} samples came"
    result = {"samples": seen, "seconds": seconds, "cpu": cpu_seconds() - cpu}
    if options.fill:
        written(options, cache)
    if CONTENDERS[name].epoch == "cold":
        shutil.rmtree(cache, ignore_errors=True)
    return result | {"version": installed(CONTENDERS[name].library)}


class Runs(contextlib.ExitStack):
    """Runs contenders in processes of their own; one that has failed is not tried again."""

    server: Any
    folder: str

    def __init__(self, options: argparse.Namespace) -> None:
        from contenders import CONTENDERS

        super().__init__()
        self.options, self.contenders = options, CONTENDERS
        self.failed: dict[str, str] = {}
        self.forked: dict[str, Forked] = {}

    def __call__(self, name: str, kind: str, workers: int, few: int, *more: str) -> Result:
        if name in self.failed:
            return {"error": self.failed[name]}
        library, environments = self.contenders[name].library, self.options.environments
        self.server.reset_counts()
        python = python_for(library, environments)
        if python not in self.forked:
            self.forked[python] = self.enter_context(Forked(python, __file__))
        arguments = [f"--kind={kind}", f"--workers={workers}", f"--few={few}", f"--folder={self.folder}", *more]
        result = self.forked[python](f"--run={name}", *arguments)
        if "error" in result:
            self.failed[name] = reason(library, environments) or result["error"]
            return {"error": self.failed[name]}
        stats = self.server.stats
        sent = {"requests": dict(stats.requests), "bytes_sent": stats.bytes_sent, "peak": stats.max_in_flight}
        return result | sent

    def in_turns(self, kind: str, workers: int, few: int) -> dict[str, list[Result]]:
        """Every contender once per round."""
        names = self.options.only or list(self.contenders)
        rounds = [{name: self(name, kind, workers, few) for name in names} for _ in range(self.options.rounds)]
        return {name: [results[name] for results in rounds] for name in names}


def rates(runs: list[Result]) -> list[float]:
    return [run["samples"] / run["seconds"] for run in runs]


def whole(runs: list[Result]) -> bool:
    return not any("error" in run for run in runs)


def rows(results: dict[str, list[Result]], epochs: dict[str, str]) -> Iterator[list[object]]:
    """Medians and spreads, and asyncds' rate to each within each round, where both epochs are of one kind."""
    for name, runs in results.items():
        if not whole(runs):
            yield [name, next(run["error"] for run in runs if "error" in run), *[""] * (len(HEADER) - 2)]
            continue
        beside = []
        for epoch in ("cold", "warm"):
            ours = results.get(f"asyncds, {epoch}", [{"error": "not run"}])
            fit = whole(ours) and epochs[name] in (epoch, "every") and not name.startswith("asyncds")
            beside.append(ratio(rates(ours), rates(runs)) if fit else "")
        last, values = runs[-1], rates(runs)
        gets = last["requests"].get("GET", 0)
        yield [
            name,
            f"{statistics.median(values):,.4g}" if min(values) < 100 else f"{statistics.median(values):,.0f}",
            spread(values, 1 if min(values) < 100 else 0),
            *beside,
            f"{gets / last['samples']:.3g}",
            sum(last["requests"].values()) - gets,
            last["peak"],
            f"{1e6 * statistics.median(run['cpu'] / run['samples'] for run in runs):,.0f} µs",
        ]


class Limits:
    """What server and decoding allow, measured once for each kind of object, without a round trip."""

    def __init__(self, server: Any, bucket: str, bodies: dict[str, bytes], opened: Any) -> None:
        import torch

        torch.set_num_threads(1)
        server.latency = 0.0
        paths = [f"/{bucket}/{key}" for key in bodies]
        self.served = ceiling(server.endpoint, paths, min(16, len(paths)))
        self.alone = 1 / ceiling(server.endpoint, paths, 1)
        some = [body for body, _ in zip(bodies.values(), range(100), strict=False)]
        for body in some[:3]:
            opened(io.BytesIO(body))
        started = time.thread_time()
        for body in some:
            opened(io.BytesIO(body))
        self.decoding = (time.thread_time() - started) / len(some)

    def terms(self, run: Result, rtt: float, workers: int) -> list[float]:
        """Seconds that an epoch takes at least, as TERMS."""
        samples, gets = run["samples"], run["requests"].get("GET", 0)
        flying = run["peak"] if rtt else min(CONCURRENCY, gets)  # what is answered at once is not seen in flight
        share = run["bytes_sent"] and 1 / max(1, gets)  # of the bytes, one request's
        latency = gets * (rtt + self.alone * min(1, samples * share)) / max(1, flying)
        return [
            latency,
            samples / self.served if gets else 0.0,
            run["cpu"] / CORES,
            samples * self.decoding / min(CORES, max(1, workers)),
        ]


def bounds(results: dict[str, list[Result]], limits: Limits, rtt: float, workers: int) -> Iterator[list[object]]:
    """For asyncds, medians of the terms, the largest by name, and by how much the epoch exceeds it."""
    for epoch in ("cold", "warm"):
        runs = results.get(f"asyncds, {epoch}")
        if not runs or not whole(runs):
            continue
        terms = [limits.terms(run, rtt, workers) for run in runs]
        medians = [statistics.median(values) for values in zip(*terms, strict=True)]
        above = statistics.median(run["seconds"] / max(each) for run, each in zip(runs, terms, strict=True))
        seconds = statistics.median(run["seconds"] for run in runs)
        busy = statistics.median(run["cpu"] / run["seconds"] for run in runs)
        names = [f"{rtt * 1e3:g} ms, {workers} workers, {epoch}", f"{seconds:.2f} s"]
        binding = TERMS[medians.index(max(medians))]
        yield [*names, *(f"{value:.3f} s" for value in medians), binding, f"{above:.2f}", f"{busy:.2f}"]


def measure(options: argparse.Namespace) -> None:
    from contenders import KINDS, bucket_of

    from asyncds.testing import S3Server

    kept: list[Result] = []
    with Runs(options) as runs:
        for name in options.kinds.split(","):
            kind = KINDS[name]
            bodies = dict(kind.bodies(max(kind.batch, int(kind.objects * options.scale))))
            with tempfile.TemporaryDirectory() as runs.folder, S3Server(process=True) as runs.server:
                runs.server.put_many(bucket_of(name), bodies)
                for key, body in bodies.items():
                    path = Path(runs.folder, name, "files", key)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(body)
                os.environ |= CREDENTIALS | {"AWS_ENDPOINT_URL": runs.server.endpoint}
                kept += measured(name, bodies, runs, Limits(runs.server, bucket_of(name), bodies, kind.opened))
    print(f"\n{CORES} cores, which the server shares; {options.rounds} rounds;")
    print(f"{', '.join(sorted({run['version'] for run in kept if 'version' in run}))}")
    if options.json:
        options.json.write_text(json.dumps(kept, indent=1))
    if options.plot:
        draw(kept, options.plot)


def measured(name: str, bodies: dict[str, bytes], runs: Runs, limits: Limits) -> list[Result]:
    """All figures for one kind of object; prints its tables."""
    from contenders import KINDS

    epochs = {each: contender.epoch for each, contender in runs.contenders.items()}
    for warm in (each for each in runs.options.only or epochs if epochs[each] == "warm"):
        runs(warm, name, 0, len(bodies), "--fill")
    kind, bound, kept = KINDS[name], [], []
    for rtt, workers in itertools.product(runs.options.rtt, runs.options.workers):
        runs.server.latency = rtt
        few = min(len(bodies), max(10, int(SERIAL_S / (rtt + limits.alone + 0.001))) * max(1, workers))
        results = runs.in_turns(name, workers, few)
        print(f"\n{len(bodies):,} {kind.label}, batches of {kind.batch}, {rtt * 1e3:g} ms, {workers} workers\n")
        print(table(HEADER, rows(results, epochs)), flush=True)
        bound += bounds(results, limits, rtt, workers)
        place = {"kind": name, "rtt": rtt, "workers": workers}
        kept += [
            place | {"contender": each, "round": number} | run | {"terms": terms_of(each, run, limits, place)}
            for each, several in results.items()
            for number, run in enumerate(several)
        ]
    print(f"\nThe bound for {kind.label}: the server answers {limits.served:,.0f} GETs/s to a client that only counts")
    print(f"bytes, one connection {1 / limits.alone:,.0f}; decoding takes {limits.decoding * 1e6:,.0f} µs\n")
    print(table(["asyncds", "epoch", *TERMS, "binding", "times the bound", "cores busy"], bound), flush=True)
    return kept


def terms_of(name: str, run: Result, limits: Limits, place: dict[str, Any]) -> dict[str, float] | None:
    if not name.startswith("asyncds") or "error" in run:
        return None
    return dict(zip(TERMS, limits.terms(run, place["rtt"], place["workers"]), strict=True))


def draw(kept: list[Result], file: Path) -> None:
    """Samples per second over the round trip: a column for each kind of object, a row for each number of workers."""
    import matplotlib

    matplotlib.use("Agg")
    from contenders import CONTENDERS, KINDS
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(run["kind"] for run in kept))
    workers = sorted({run["workers"] for run in kept})
    trips = sorted({run["rtt"] for run in kept})
    libraries = list(dict.fromkeys(contender.library for contender in CONTENDERS.values()))
    figure, axes = pyplot.subplots(
        len(workers), len(kinds), figsize=(1.5 + 3.4 * len(kinds), 1.2 + 2.8 * len(workers)), squeeze=False
    )
    for (row, count), (column, kind) in ((r, c) for r in enumerate(workers) for c in enumerate(kinds)):
        panel = axes[row][column]
        for name, contender in CONTENDERS.items():
            points = {
                trips.index(rtt): statistics.median(rates(runs))
                for rtt in trips
                if (runs := [r for r in kept if (r["kind"], r["workers"], r["rtt"]) == (kind, count, rtt)
                             and r["contender"] == name]) and whole(runs)
            }  # fmt: skip
            style = {"warm": "--", "cold": "-", "every": ":" if "threads" in name else "-"}[contender.epoch]
            colour = f"C{libraries.index(contender.library)}"
            thick = 2.4 if contender.library == "asyncds" else 1.2
            face = "white" if contender.epoch == "warm" else colour
            marks = {"marker": "s" if "threads" in name else "o", "ms": 4, "mfc": face}
            panel.plot(list(points), list(points.values()), style, color=colour, lw=thick, label=name, **marks)
        panel.set(yscale="log", xticks=range(len(trips)), xticklabels=[f"{rtt * 1e3:g}" for rtt in trips])
        panel.set_title(f"{KINDS[kind].label}, {count} workers", fontsize=9)
        panel.grid(alpha=0.3, which="both")
        panel.margins(x=0.15)
    for panel in axes[-1]:
        panel.set_xlabel("round trip, ms")
    for panel in axes[:, 0]:
        panel.set_ylabel("samples/s")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4 if len(kinds) > 1 else 2, fontsize=8)
    figure.tight_layout(
        rect=(0, 0.9 / figure.get_figheight() if len(kinds) == 1 else 0.5 / figure.get_figheight(), 1, 1)
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def numbers(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="png,jpeg", help="of png, jpeg, 1MB, 64MB")
    parser.add_argument("--rtt", type=numbers(float), default=[0.01], help="seconds that the server takes to answer")
    parser.add_argument("--workers", type=numbers(int), default=[0, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="times the objects of each kind")
    parser.add_argument("--only", action="append", help="a contender, as in the tables; and again for another")
    parser.add_argument("--environments", type=Path, default=FOLDER, help="where environments.py has made them")
    parser.add_argument("--json", type=Path, help="a file for all figures of all runs")
    parser.add_argument("--plot", type=Path, help="a file for a chart")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    for hidden in ("--run", "--kind", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--few", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--fill", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        import contenders  # noqa: F401 - torch with it

        serve(lambda arguments: run(parser.parse_args(arguments)))
    else:
        measure(options)


if __name__ == "__main__":
    main()
