"""`asyncds demo`: train on handwritten digits that lie in a bucket, and see where the time goes."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from asyncds.dataset import CachedS3MapDataset
from asyncds.demo.bucket import BUCKET, Login, digits, upload
from asyncds.demo.per_sample import PerSampleDataset, uses_minio
from asyncds.errors import AsyncdsError, ConfigurationError, EndpointUnreachable
from asyncds.progress import progress_bar
from asyncds.settings import Settings
from asyncds.store import Connection
from asyncds.testing import LatencyProxy, local_s3
from asyncds.vision import ImageTransform

__all__ = ["DemoEpoch", "DemoResult", "PerSample", "run"]

T = TypeVar("T")

_EXTRAS = ("sklearn", "PIL", "torchvision")
_LEARNING_RATE = 5e-3
_SEED = 0
# What the per-sample way gets through in about this time is measured: all of it, unless the link is slow.
_PER_SAMPLE_BUDGET_S = 20.0
_PER_SAMPLE_CPU_S = 0.002


@dataclass(frozen=True)
class DemoEpoch:
    """One epoch. `seconds` and `waiting_s` (for bytes and decoding) are those of the training pass. `gets` and
    `test_gets` were counted in front of the server, `hits` and `test_hits` by the datasets: what lay in the cache."""

    number: int
    loss: float
    accuracy: float
    seconds: float
    waiting_s: float
    gets: int
    test_gets: int
    hits: int
    test_hits: int


@dataclass(frozen=True)
class PerSample:
    """The training pass of the first epoch over the first `samples` images, with one request after another."""

    client: str
    samples: int
    seconds: float
    gets: int


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured. `train` and `test` are numbers of images."""

    train: int
    test: int
    epochs: tuple[DemoEpoch, ...]
    per_sample: PerSample


def run(
    *,
    endpoint: str | None = None,
    rtt: float = 0.010,
    epochs: int = 3,
    workers: int = 0,
    batch_size: int = 200,
    concurrency: int | str | None = None,
) -> DemoResult:
    """Upload scikit-learn's 1,797 digits, train on them through a round trip of `rtt` seconds, and print what it took.

    Starts a server of its own, or uses the one at `endpoint` (plain http, with the credentials of the environment),
    where the images then stay: in the bucket `mnist`, which is made if it is missing and may hold nothing else under
    `train/` and `test/`. Whatever else the demo starts or writes is gone when it returns or raises.

    Raises `ConfigurationError` for arguments that cannot mean anything, missing extras, and a bucket with images of
    the user's; and for the server what `asyncds.errors` lists.
    """
    _check(endpoint, epochs, workers, batch_size)
    images = digits()
    with ExitStack() as stack:
        login, server = _login(stack, endpoint)
        upload(login, images)
        proxy = _started(stack, LatencyProxy(login.endpoint, rtt, count_requests=True))
        stack.enter_context(_torch_kept())
        loading = _Loading(workers, batch_size, proxy)
        print(f"{len(images):,} handwritten digits, PNG files in s3://{BUCKET} on {server},")
        print(f"behind a round trip of {rtt * 1e3:g} ms, read and decoded by the stock DataLoader")
        print(f"({loading}):\n", flush=True)
        options: dict[str, Any] = {} if concurrency is None else {"concurrency": concurrency}
        options["cache_dir"] = stack.enter_context(TemporaryDirectory(prefix="asyncds-demo-"))
        train, test = (stack.enter_context(_dataset(login, proxy, part, options)) for part in ("train", "test"))
        results = tuple(_epochs(train, test, loading, epochs))
        result = DemoResult(len(train), len(test), results, _per_sample(login, train, loading))
    _print_comparison(result, f"{rtt * 1e3:g} ms round trip, {loading}")
    if endpoint is not None:
        print(f"The images stay in s3://{BUCKET} on {server}.")
    return result


def _check(endpoint: str | None, epochs: int, workers: int, batch_size: int) -> None:
    for name, value, least in (("epochs", epochs, 1), ("workers", workers, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise ConfigurationError(f"{name}={value}: must be at least {least}")
    if endpoint is not None and urlsplit(endpoint).scheme == "https":
        raise ConfigurationError(f"{endpoint}: the demo counts requests on the way and cannot see into TLS: use http")
    if any(find_spec(module) is None for module in _EXTRAS):
        raise ConfigurationError('the demo needs scikit-learn, pillow and torchvision: pip install "asyncds[demo]"')


def _started(stack: ExitStack, context: AbstractContextManager[T]) -> T:
    try:
        return stack.enter_context(context)
    except AsyncdsError:
        raise
    except (OSError, RuntimeError) as error:
        raise EndpointUnreachable(f"a server for the demo did not start: {error}") from error


def _login(stack: ExitStack, endpoint: str | None) -> tuple[Login, str]:
    """The server to use, and what to call it."""
    if endpoint is not None:
        url = Connection.resolve(Settings(), endpoint=endpoint).endpoint or endpoint
        return Login(url), url
    server = _started(stack, local_s3())
    return Login(server.endpoint, (server.access_key, server.secret_key)), f"a local server ({server.kind})"


# training: one loop for both ways of reading


@dataclass(frozen=True)
class _Loading:
    """How both ways load their batches, and who counts what they ask for."""

    workers: int
    batch_size: int
    proxy: LatencyProxy

    def __str__(self) -> str:
        return f"batch_size={self.batch_size}, num_workers={self.workers}"

    def loader(self, dataset: Dataset[Any], *, shuffle: bool) -> DataLoader[Any]:
        order = torch.Generator().manual_seed(_SEED)
        if isinstance(dataset, CachedS3MapDataset):
            return dataset.loader(self.batch_size, shuffle, num_workers=self.workers, generator=order)
        return DataLoader(dataset, self.batch_size, shuffle, num_workers=self.workers, generator=order)

    @property
    def gets(self) -> int:
        return self.proxy.stats.requests["GET"]


class _Learner:
    """A small network and its optimiser, equal at each start."""

    def __init__(self) -> None:
        torch.default_generator.manual_seed(_SEED)
        self._network = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.AdaptiveMaxPool2d(4), nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
        )
        self._optimiser = torch.optim.Adam(self._network.parameters(), _LEARNING_RATE)

    def train(self, loader: DataLoader[Any], title: str, samples: int) -> tuple[float, float, float]:
        """One pass: mean loss, seconds, and the seconds of these in which the loop waited for its next batch."""
        self._network.train()
        total = waiting_s = 0.0
        with progress_bar(title, samples, unit="images") as advance:
            started = asked = time.perf_counter()
            for pictures, labels in loader:
                waiting_s += time.perf_counter() - asked
                loss = self._step(pictures, labels)
                total += loss * len(labels)
                advance(len(labels), note=f"loss {loss:.3f}")
                asked = time.perf_counter()
        return total / samples, time.perf_counter() - started, waiting_s

    def _step(self, pictures: torch.Tensor, labels: torch.Tensor) -> float:
        loss = nn.functional.cross_entropy(self._network(pictures), labels)
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        return loss.item()

    @torch.no_grad()
    def accuracy(self, loader: DataLoader[Any], samples: int) -> float:
        self._network.eval()
        right = sum(int((self._network(pictures).argmax(1) == labels).sum()) for pictures, labels in loader)
        return right / samples


@contextmanager
def _torch_kept() -> Iterator[None]:
    """Leave torch's threads and random numbers as they were: the network is too small for more than one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


def _transform() -> ImageTransform:
    from torchvision import transforms

    return ImageTransform(transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]), mode="L")


def _dataset(login: Login, proxy: LatencyProxy, part: str, options: dict[str, Any]) -> CachedS3MapDataset:
    return CachedS3MapDataset.from_prefix(
        f"s3://{BUCKET}/{part}",
        label="parent",
        transform=_transform(),
        endpoint=proxy.endpoint,
        region=login.region,
        session_factory=login,
        env_file=None if login.keys else ".env",
        **options,
    )


def _epochs(train: CachedS3MapDataset, test: CachedS3MapDataset, loading: _Loading, epochs: int) -> Iterator[DemoEpoch]:
    """Train and test, and print a line after each epoch."""
    samples, learner = (len(train), len(test)), _Learner()
    training, testing = loading.loader(train, shuffle=True), loading.loader(test, shuffle=False)

    def counts() -> tuple[int, int, int]:
        return loading.gets, _resident(train.stats()), _resident(test.stats())

    print("                  test   seconds of training  GETs at server   from the cache")
    print("epoch   loss  accuracy    all  awaiting data    train   test     train   test", flush=True)
    for number in range(1, epochs + 1):
        start, before = counts(), train.stats()
        loss, seconds, waiting_s = learner.train(training, f"training, epoch {number}", samples[0])
        middle, after = counts(), train.stats()
        accuracy = learner.accuracy(testing, samples[1])
        end = counts()
        requests = middle[0] - start[0], end[0] - middle[0]
        epoch = DemoEpoch(number, loss, accuracy, seconds, waiting_s, *requests, end[1] - start[1], end[2] - start[2])
        print(_line(epoch), _statistics(before, after), sep="\n", flush=True)
        yield epoch


def _resident(stats: dict[str, float]) -> int:
    """Samples that lay in the cache before the epoch began."""
    return int(stats["samples"] - stats["gets"])


def _statistics(before: dict[str, float], after: dict[str, float]) -> str:
    """What the dataset itself says of a training pass."""
    during = {name: after[name] - before[name] for name in after}
    parts = list[str]()
    if during["gets"]:
        parts.append(f"{during['prefetch_hits']:,.0f} in advance")
        parts.append(f"GETs p50 {1e3 * after['latency_p50_s']:.0f}, p99 {1e3 * after['latency_p99_s']:.0f} ms")
    parts += [f"{during[name]:,.0f} {name}" for name in ("retries", "failures") if during[name]]
    return f"  {'; '.join([*parts, 'blocked {blocked_s:.2f} s, transforms {transform_s:.2f} s'.format(**during)])}"


def _line(epoch: DemoEpoch) -> str:
    learnt = f"{epoch.number:5}{epoch.loss:7.3f}{epoch.accuracy:10.1%}"
    took = f"{epoch.seconds:7.2f}{epoch.waiting_s:15.2f}"
    return f"{learnt}{took}{epoch.gets:9,}{epoch.test_gets:7,}{epoch.hits:10,}{epoch.test_hits:7,}"


def _per_sample(login: Login, train: CachedS3MapDataset, loading: _Loading) -> PerSample:
    """Measure a training pass over the first images, as many as a slow link gets through in a bearable time."""
    seconds_each = (loading.proxy.rtt + _PER_SAMPLE_CPU_S) / max(1, loading.workers)
    samples = min(len(train), max(1, int(_PER_SAMPLE_BUDGET_S / seconds_each)))
    keys = [info.key for info in train.manifest[:samples]]
    dataset = PerSampleDataset(login, loading.proxy.endpoint, keys, train.targets[:samples], _transform())
    loader = loading.loader(dataset, shuffle=True)
    before = loading.gets
    _, seconds, _ = _Learner().train(loader, "one GET per sample", samples)
    client = "MinIO SDK" if uses_minio(login.connection()) else "botocore"
    return PerSample(client, samples, seconds, loading.gets - before)


def _print_comparison(result: DemoResult, conditions: str) -> None:
    from rich.console import Console
    from rich.table import Table

    slow, (cold, *warm) = result.per_sample, result.epochs
    columns = [(f"one GET per sample\n({slow.client}), every epoch", slow.samples, slow.seconds, slow.gets)]
    columns.append(("asyncds\ncold epoch", result.train, cold.seconds, cold.gets))
    if warm:
        seconds, gets = (sum(values) / len(warm) for values in zip(*((e.seconds, e.gets) for e in warm), strict=True))
        columns.append(("asyncds\nwarm epoch", result.train, seconds, round(gets)))
    table = Table("")
    for name, *_ in columns:
        table.add_column(name, justify="right")
    speeds = [samples / seconds for _, samples, seconds, _ in columns]
    table.add_row("images", *(f"{samples:,}" for _, samples, _, _ in columns))
    table.add_row("GETs at the server", *(f"{gets:,}" for *_, gets in columns))
    table.add_row("seconds", *(f"{seconds:.2f}" for _, _, seconds, _ in columns))
    table.add_row("images per second", *(f"{speed:,.0f}" for speed in speeds))
    table.add_row("times as fast", *(f"{speed / speeds[0]:.1f}" for speed in speeds), style="bold")
    console = Console(highlight=False)
    console.print(f"\nOne training pass, {conditions}:")
    console.print(table)
    if slow.samples < result.train:
        whole = slow.seconds * result.train / slow.samples
        console.print(f"One GET per sample: measured on {slow.samples:,} images; all would take some {whole:.0f} s.")
