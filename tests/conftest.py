"""What all tests share: an environment that is clean of the developer's, S3 servers, processes, and pictures."""

import gc
import io
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any

import botocore.loaders
import botocore.session
import pytest
from PIL import Image

from asyncds import retry
from asyncds.store import S3Store
from asyncds.testing import S3Server

_FAMILIES = ("AWS_", "MINIO_", "ASYNCDS_", "XDG_")
# A shell that runs the suite in the background has it ignore Ctrl-C, and all that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")

ACCESS_KEY, SECRET_KEY = "AKIAEXAMPLE", "a-secret-of-the-tests"


@pytest.fixture(autouse=True, scope="session")
def shared_loader() -> Iterator[None]:
    """botocore reads its description of S3 once, and not for each client: that takes 20 ms instead of 100."""
    loader = botocore.loaders.create_loader()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", lambda *_: loader)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--lane", choices=["auto", "full"], default="auto", help="what ASYNCDS_LANE is where no test sets it"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--lane") == "full":
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("lean")])
        items[:] = [item for item in items if not item.get_closest_marker("lean")]


@pytest.fixture(autouse=True)
def chosen_lane(clean_environment, request, monkeypatch) -> None:
    """With `--lane full`, datasets and stores use the full lane, also those that a test makes itself."""
    if request.config.getoption("--lane") == "full":
        monkeypatch.setenv("ASYNCDS_LANE", "full")
        assert S3Store.__init__.__kwdefaults__["lean"] is True
        monkeypatch.setitem(S3Store.__init__.__kwdefaults__, "lean", False)
        count = S3Store._count

        def count_none_of_the_lean_lane(self, lane, verified):
            assert lane != "lean"
            count(self, lane, verified)

        monkeypatch.setattr(S3Store, "_count", count_none_of_the_lean_lane)


@pytest.fixture(autouse=True)
def full_retry_budget(monkeypatch) -> None:
    """What other tests have made this process repeat does not count."""
    monkeypatch.setattr(retry, "_budget", retry.RetryBudget())


@pytest.fixture(autouse=True)
def clean_environment(tmp_path_factory, monkeypatch) -> None:
    """No credentials, proxies, profile, `.env` file or cache of the developer; each test starts in an empty folder."""
    for name in list(os.environ):
        if name.startswith(_FAMILIES) or name.lower() in _PROXIES:
            monkeypatch.delenv(name)
    place = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("ASYNCDS_CACHE_DIR", str(place / "cache"))
    monkeypatch.chdir(place)


def _point_to(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_REGION", "us-east-1")


def _serve(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with server:
        server.create_bucket("mnist")
        _point_to(server, monkeypatch)
        yield server


@pytest.fixture
def bucket(server, monkeypatch) -> Iterator[S3Server]:
    """The `server` of the test's module, which has the same objects for all of its tests, as it was at first."""
    _point_to(server, monkeypatch)
    server.reset_counts()
    yield server
    server.clear_scripts()
    server.latency = 0


@pytest.fixture
def s3(monkeypatch) -> Iterator[S3Server]:
    """An S3 server in this process with the bucket `mnist`, which the environment's variables point to."""
    yield from _serve(S3Server(), monkeypatch)


@pytest.fixture
def s3_process(monkeypatch) -> Iterator[S3Server]:
    """As `s3`, in a process of its own: for tests that fork, or that compare times."""
    yield from _serve(S3Server(process=True), monkeypatch)


@pytest.fixture
def png() -> Callable[..., bytes]:
    """Make a PNG: `png(7)` is a grey square of 28 x 28 pixels of value 7, `png(7, size=64, mode="RGB")` another."""

    def make(value: int = 0, *, size: int = 28, mode: str = "L") -> bytes:
        file = io.BytesIO()
        Image.new(mode, (size, size), value if mode == "L" else (value, value, value)).save(file, "PNG")
        return file.getvalue()

    return make


@pytest.fixture
def child() -> Iterator[Callable[..., BaseProcess]]:
    """Run a function in a process: `child("fork", function, *arguments)` returns when it has ended well.

    With `wait=False` it returns the running process. Whatever still runs when the test ends is killed.
    """
    started: list[BaseProcess] = []

    def start(method: str, function: Callable[..., object], *arguments: Any, wait: bool = True) -> BaseProcess:
        process = multiprocessing.get_context(method).Process(target=function, args=arguments)
        process.start()
        started.append(process)
        if wait:
            process.join(50)
            assert process.exitcode == 0
        return process

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()
        process.close()


@pytest.fixture(scope="module")
def fork_server(request) -> Iterator[None]:
    """A fork server that starts with this module's environment, and with torch (or what the module names in PRELOADED),
    so that its children start quickly."""
    gc.collect()
    forkserver._forkserver._stop()
    preloaded = getattr(request.module, "PRELOADED", ["torch.utils.data", "asyncds.dataset"])
    multiprocessing.set_forkserver_preload(preloaded)
    yield
    multiprocessing.set_forkserver_preload(["__main__"])
    gc.collect()  # it ends when the last process does that was forked while it ran
    forkserver._forkserver._stop()
