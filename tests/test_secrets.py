"""Secrets in no output: unmistakable values in every place for them, and a search through all that comes out."""

import base64
import contextlib
import functools
import hashlib
import io
import logging
import os
import pickle
import pickletools
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import aiobotocore.session
import pytest
import trustme
from torch.utils.data import DataLoader

from asyncds import CachedS3MapDataset, Connection, Fetcher, ObjectInfo, Retry, S3Store, Settings
from asyncds.cli import main
from asyncds.errors import AsyncdsError
from asyncds.store.masking import hide, mask, mask_logs
from asyncds.store.translate import translate
from asyncds.testing import Fault, S3Server

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]
# With what base64 and URLs write in another way: plus, slash, equals sign.
CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "Canary-secret+key/of=aws",
    "AWS_SESSION_TOKEN": "Canary-session+token/of=aws==",
    "MINIO_SECRET_KEY": "Canary-secret+key/of=minio",
}
CUSTOMER_KEY = "Canary-customer+key/of=sse-c-012"
OF_A_SESSION = "Canary-secret+key/of=session", "Canary-session+token/of=session"
PASSWORD = "Canary-password+of/url="
SECRETS = [*CANARIES.values(), CUSTOMER_KEY, *OF_A_SESSION, PASSWORD]
KEYS = [f"train/{number:03}" for number in range(12)]
LANES = pytest.mark.parametrize("lane", [pytest.param("auto", marks=pytest.mark.lean), "full"])
IMPATIENT = {"timeout": 1, "retries": 1, "first_contact": 0.3}


def spellings(secret: str) -> set[bytes]:
    """A secret as it is, as a URL has it, in hexadecimal, and within base64, wherever it begins there."""
    raw = secret.encode()
    within = {base64.b64encode(b"x" * shift + raw)[4 * (shift > 0) : -4] for shift in range(3)}
    return {raw, quote(secret).encode(), quote(secret, safe="").encode(), raw.hex().encode(), *within}


FORBIDDEN = {spelling: secret for secret in SECRETS for spelling in spellings(secret)}


def found_in(raw: bytes) -> set[str]:
    return {secret for spelling, secret in FORBIDDEN.items() if spelling in raw}


WAYS = [
    lambda secret: f"before {secret} after".encode(),
    lambda secret: quote(secret, safe="").encode(),
    lambda secret: base64.b64encode(secret.encode()),
    lambda secret: base64.b64encode(f"user:{secret}!".encode()),
    lambda secret: secret.encode().hex().encode(),
    lambda secret: pickle.dumps({"x": secret}),
]


@pytest.mark.parametrize("secret", SECRETS)
def test_search_finds_a_secret_however_it_is_written(secret):
    assert all(secret in found_in(write(secret)) for write in WAYS)


class Outputs:
    """All that comes out, by where it did."""

    def __init__(self) -> None:
        self.texts: dict[str, bytes] = {}

    def add(self, name: str, output: str | bytes) -> None:
        raw = output.encode() if isinstance(output, str) else output
        self.texts[name] = self.texts.get(name, b"") + raw

    def add_error(self, name: str, error: BaseException) -> None:
        self.add(name, "".join(traceback.format_exception(error)))
        self.add(name, f"{error!r} {error.args} {vars(error)}")
        self.add(name, pickle.dumps(error))

    def add_files(self, folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.add(f"file {path.name}", path.read_bytes())
            self.add("names of files", f"{path}\n")

    def add_pickle(self, name: str, value: object) -> None:
        raw, text = pickle.dumps(value), io.StringIO()
        pickletools.dis(raw, text)
        self.add(f"pickle of {name}", raw)
        self.add(f"pickle of {name}", text.getvalue())

    def leaks(self) -> dict[str, set[str]]:
        return {name: found for name, text in self.texts.items() if (found := found_in(text))}


@pytest.fixture
def outputs(monkeypatch, capfd, tmp_path_factory) -> Iterator[Outputs]:
    """What a test adds, and what is logged, warned of, and printed meanwhile, in workers, too: nothing of it may hold a
    secret."""
    for name, value in (CANARIES | {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)
    outputs, log, root = Outputs(), tmp_path_factory.mktemp("log") / "log", logging.getLogger()
    handler, level = logging.FileHandler(log), root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield outputs
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
    outputs.add("log", log.read_bytes())
    outputs.add("warnings", "".join(str(warning.message) for warning in warned))
    printed = capfd.readouterr()
    outputs.add("printed", printed.out + printed.err)
    outputs.add_files(Path(os.environ["ASYNCDS_CACHE_DIR"]))
    assert outputs.leaks() == {}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server(process=True) as server:
        server.put_many("mnist", {key: hashlib.shake_128(key.encode()).digest(500) for key in KEYS})
        server.put("mnist", "large", bytes(40_000))
        yield server


@pytest.fixture
def store(outputs, server, monkeypatch) -> Iterator[S3Server]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    yield server
    server.clear_scripts()


def add_customer_key(params, **_) -> None:
    params |= {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": CUSTOMER_KEY}


def session_of(secret: str, token: str) -> aiobotocore.session.AioSession:
    session = aiobotocore.session.AioSession()
    session.set_credentials("AKIASESSION", secret, token)
    session.register("provide-client-params.s3.GetObject", add_customer_key)
    return session


def session_with_secrets() -> aiobotocore.session.AioSession:
    return session_of(*OF_A_SESSION)


def read(file) -> bytes:
    return file.read()


def epoch(dataset: CachedS3MapDataset, workers: int) -> list[bytes]:
    loader = DataLoader(dataset, 4, num_workers=workers, collate_fn=list)
    return [sample for batch in loader for sample in batch]


@LANES
@pytest.mark.parametrize("factory", [None, session_with_secrets])
def test_dataset_and_all_that_it_is_made_of(outputs, store, lane, factory, tmp_path):
    options = {"transform": read, "lane": lane, "session_factory": factory}
    with CachedS3MapDataset.from_prefix("s3://mnist/", **options) as dataset:
        assert len(epoch(dataset, 1)) == len(epoch(dataset, 0)) == 13
        source = dataset._parts[0].source
        dataset.manifest.save(tmp_path / "saved.manifest")
        pickled = {
            "dataset": dataset,
            "subset": dataset.subset([1, 2]),
            "object": dataset.manifest[0],
            "recipe": source.recipe,
            "settings": source.settings,
            "store": source.recipe.make(4, Retry(1, 1, 1)),
            "connection": Connection.resolve(Settings()),
        }
        for name, value in pickled.items():
            outputs.add_pickle(name, value)
        others = {
            "manifest": dataset.manifest,
            "source": source,
            "cache": source.cache,
            "batches": dataset.loader(2).batch_sampler,
        }
        for name, value in (pickled | others).items():
            outputs.add(f"repr of {name}", f"{value!r} {value}")
        outputs.add("stats", f"{dataset.stats()} {dataset.failures()}")
    outputs.add_files(tmp_path)


def test_factory_that_has_secrets_for_arguments_is_not_shown(outputs, store):
    factory = functools.partial(session_of, *OF_A_SESSION)
    with CachedS3MapDataset.from_prefix("s3://mnist/", transform=read, session_factory=factory) as dataset:
        assert len(epoch(dataset, 0)) == 13
        source = dataset._parts[0].source
        for value in (dataset, source, source.recipe, source.recipe.make(4, Retry(1, 1, 1)), dataset.manifest):
            outputs.add("repr", f"{value!r} {value}")


@LANES
async def test_fetcher(outputs, store, lane):
    async with Fetcher.open(lane=lane) as fetcher:
        outputs.add("repr", repr(fetcher))
        connection = Connection.resolve(Settings())
        client = S3Store(connection, concurrency=2, timeout=5, retry=Retry(1, 5, 5), lean=lane == "auto")
        infos = [info async for page in client.list("mnist", "train/") for info in page]
        await client.aclose()
        async for fetched in fetcher.fetch(infos):
            outputs.add("repr", repr(fetched))
        outputs.add("repr", f"{fetcher!r} {client!r}")


REPEATED = (
    "<Error><Code>SignatureDoesNotMatch</Code><Message>The signature does not match\n"
    f"{CANARIES['AWS_SESSION_TOKEN']}\nerror: forged {'x' * 100_000}</Message><CanonicalRequest>"
    f"GET\n/\n\nx-amz-security-token:{CANARIES['AWS_SESSION_TOKEN']}\n</CanonicalRequest></Error>"
).encode()
TOKEN = CANARIES["AWS_SESSION_TOKEN"]
ELSEWHERE = f"http://127.0.0.1:9/?X-Amz-Security-Token={quote(TOKEN, safe='')}&X-Amz-Signature=0123456789abcdef"
WRONG_REGION = f"<Error><Code>AuthorizationHeaderMalformed</Code><Region>{TOKEN}</Region></Error>".encode()
QUOTED = f"<Error><Code>AccessDenied</Code><Message>you sent {quote(TOKEN, safe='')}</Message></Error>".encode()
FAULTS = {
    "403": Fault.status(403),
    "403 that repeats what was signed": Fault.status(403, body=REPEATED),
    "404": Fault.status(404),
    "500": Fault.status(500),
    "HTML": Fault.status(200, body=b"<html>"),
    "reset": Fault.reset(),
    "stall": Fault.stall(),
    "redirect": Fault.status(307, headers={"Location": "http://127.0.0.1:9/"}),
    "another ETag": Fault.etag('"another"'),
    "403 that repeats the token as in a URL": Fault.status(403, body=QUOTED),
    "500 that repeats the token for a code": Fault.status(500, TOKEN),
    "redirect that repeats the token": Fault.status(307, headers={"Location": ELSEWHERE}),
    "region that repeats the token": Fault.status(400, body=WRONG_REGION),
    "ETag that repeats the token": Fault.etag(f'"{TOKEN}"'),
}


# The lean lane leaves most others to it.
OF_THE_FULL_LANE = ["403 that repeats what was signed", "500", "redirect", "ETag that repeats the token"]


@pytest.mark.parametrize(
    ("fault", "lane"),
    [*((fault, "full") for fault in OF_THE_FULL_LANE)]
    + [pytest.param(fault, "auto", marks=pytest.mark.lean) for fault in FAULTS],
)
def test_errors_of_objects_and_listings(outputs, store, lane, fault):
    options = {"transform": read, "lane": lane, "session_factory": session_with_secrets} | IMPATIENT
    if "repeats" in fault:
        del options["session_factory"]  # what is repeated is the token of the environment
    with CachedS3MapDataset.from_prefix("s3://mnist/train/", **options) as dataset:
        assert len(dataset[0]) == 500
        store.script("mnist", None, [FAULTS[fault]], forever=True)
        with pytest.raises(AsyncdsError) as raised:
            dataset[1]
        outputs.add_error("error", raised.value)
    if "ETag" in fault or fault == "stall":  # a listing has no ETag, and a stall takes its time
        return
    store.script("mnist", None, [FAULTS[fault]], operation="LIST", forever=True)
    with CachedS3MapDataset.from_prefix("s3://mnist/", **options) as dataset:
        with pytest.raises(AsyncdsError) as raised:
            len(dataset)
        outputs.add_error("error of a listing", raised.value)
        assert len(str(raised.value).splitlines()) == 1
        assert len(str(raised.value)) < 1000


@LANES
async def test_error_of_one_attempt_and_its_cause(outputs, store, lane):
    key = ObjectInfo("mnist", KEYS[0])
    connection, retry = Connection.resolve(Settings()), Retry(0, 5, 5)
    made = S3Store(connection, concurrency=1, timeout=5, retry=retry, lean=lane == "auto")
    await made.get(key)
    for fault in (Fault.status(403, body=REPEATED), Fault.status(403, body=QUOTED), Fault.redirect(ELSEWHERE)):
        store.script("mnist", None, [fault], forever=True)
        with pytest.raises(AsyncdsError) as raised:
            await made.get(key)
        outputs.add_error("error", raised.value)
        assert raised.value.__cause__ is not None
        outputs.add_error("cause", raised.value.__cause__)
    await made.aclose()


def test_error_out_of_a_worker(outputs, store):
    with CachedS3MapDataset.from_prefix("s3://mnist/", transform=read) as dataset:
        assert len(dataset) == 13
        store.script("mnist", None, [Fault.status(403, body=REPEATED)], forever=True)
        with pytest.raises(AsyncdsError) as raised:
            epoch(dataset, 1)
        outputs.add_error("error", raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "Signature:\n0123456789abcdef",
        "authorization: AWS4-HMAC-SHA256 Credential=AKIA/x, SignedHeaders=host, Signature=0123456789abcdef",
        "{'Authorization': b'AWS4-HMAC-SHA256 Credential=AKIA, Signature=0123456789abcdef'}",
    ],
)
def test_signature_is_masked_however_it_is_logged(text):
    assert "0123456789abcdef" not in mask(text)
    assert mask("SignatureVersion: s3v4, SignedHeaders=host") == "SignatureVersion: s3v4, SignedHeaders=host"


def test_short_secret_does_not_garble_what_is_told():
    hide(["key", "NoSuch"])
    assert mask("NoSuchKey: the key is gone") == "NoSuchKey: the key is gone"


ENDPOINTS = {
    "nobody listens": "http://127.0.0.1:9",
    "unknown host": "http://no-such-host.invalid",
    "user and password": f"http://user:{PASSWORD}@127.0.0.1:9",
    "password, quoted": f"http://user:{quote(PASSWORD, safe='')}@127.0.0.1:9",
    "no scheme": f"user:{PASSWORD}@127.0.0.1:9",
}


@pytest.mark.parametrize(
    ("kind", "variable"),
    [
        *((kind, "AWS_ENDPOINT_URL") for kind in ENDPOINTS),
        ("user and password", "MINIO_URL"),
        ("user and password", "endpoint="),
        ("no scheme", "MINIO_URL"),
    ],
)
def test_wrong_endpoints(outputs, monkeypatch, variable, kind):
    given = {"endpoint": ENDPOINTS[kind]} if variable == "endpoint=" else {}
    if not given:
        monkeypatch.setenv(variable, ENDPOINTS[kind])
    if variable == "MINIO_URL":
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("MINIO_ACCESS_KEY", "minio")
    with pytest.raises(AsyncdsError) as raised:
        len(CachedS3MapDataset.from_prefix("s3://mnist/", **given, **IMPATIENT))
    outputs.add_error("error", raised.value)


@LANES
def test_proxy_with_a_password(outputs, store, monkeypatch, lane):
    monkeypatch.setenv("HTTP_PROXY", f"http://user:{quote(PASSWORD, safe='')}@127.0.0.1:9")
    monkeypatch.setenv("http_proxy", f"http://user:{quote(PASSWORD, safe='')}@127.0.0.1:9")
    with CachedS3MapDataset.from_prefix("s3://mnist/", lane=lane, **IMPATIENT) as dataset:
        with pytest.raises(AsyncdsError) as raised:
            len(dataset)
        outputs.add_error("error", raised.value)
        outputs.add("repr", f"{dataset!r} {dataset._parts[0].source.recipe!r}")


@LANES
def test_certificate_that_is_not_trusted(outputs, monkeypatch, tmp_path, lane):
    issued = trustme.CA().issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "public.crt")
    issued.private_key_pem.write_to_path(tmp_path / "private.key")
    with S3Server(tls=(tmp_path / "public.crt", tmp_path / "private.key")) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        with CachedS3MapDataset.from_prefix("s3://mnist/", lane=lane) as dataset:
            with pytest.raises(AsyncdsError, match="TLS is refused") as raised:
                len(dataset)
            outputs.add_error("error", raised.value)


COMMANDS = [
    *("warm s3://mnist/train/", "warm s3://mnist/train/ --json", "warm s3://mnist/no-such-thing/", "ls", "ls --json"),
    *("stats", "stats --json", "verify", "verify --json", "verify --fix", "config", "config --json"),
    *("tune s3://mnist/train/ --seconds 1", "clear --all --yes", "warm s3://no-such-bucket/"),
]


def test_commands(outputs, store, monkeypatch, capfd):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line has one of its own
    monkeypatch.setenv("MINIO_ACCESS_KEY", "minio")
    Path(".env").write_text(f"AWS_SESSION_TOKEN={CANARIES['AWS_SESSION_TOKEN']}\n")
    for command in COMMANDS:
        monkeypatch.setattr(sys, "argv", ["asyncds", *command.split()])
        with contextlib.suppress(SystemExit):
            main()
        printed = capfd.readouterr()
        assert printed.out + printed.err
        outputs.add(f"asyncds {command}", printed.out + printed.err)


# botocore's own log


def test_log_of_requests_is_there_without_the_secrets_in_it(outputs, store, caplog):
    with CachedS3MapDataset.from_prefix(
        "s3://mnist/train/", transform=read, lane="full", session_factory=session_with_secrets
    ) as dataset:
        epoch(dataset, 0)
    lines = [text for text in caplog.messages if "Sending http request" in text]
    assert len(lines) == 13
    for name in ("Authorization", "X-Amz-Security-Token"):
        assert all(f"'{name}': ***" in line for line in lines)
    assert sum("'x-amz-server-side-encryption-customer-key': ***" in line for line in lines) == 12
    assert all("url=http://127.0.0.1" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (
            "{'Authorization': b'AWS4 Credential=a/b, Signature=c', 'Host': b'h'}",
            "{'Authorization': ***, 'Host': b'h'}",
        ),
        ("host:h\nx-amz-security-token:a/b+c==\nx-amz-date:d", "host:h\nx-amz-security-token:***\nx-amz-date:d"),
        ("<SecretAccessKey>s/s</SecretAccessKey><Other>", "<SecretAccessKey>***</SecretAccessKey><Other>"),
        ('{"secretAccessKey":"s","sessionToken": "t", "x": 1}', '{"secretAccessKey":***,"sessionToken": ***, "x": 1}'),
        ("{'WebIdentityToken': 'abc', 'RoleArn': 'r'}", "{'WebIdentityToken': ***, 'RoleArn': 'r'}"),
        ("SignedHeaders=host;x-amz-security-token, x", "SignedHeaders=host;x-amz-security-token, x"),
        ("'SSECustomerKey': 'k', 'SSECustomerKeyMD5': 'm'", "'SSECustomerKey': ***, 'SSECustomerKeyMD5': 'm'"),
        ("nothing to see", "nothing to see"),
    ],
)
def test_value_behind_the_name_of_a_secret_is_masked(text, masked):
    assert mask(text) == masked


def test_logs_are_masked_once_and_only_those_of_botocore():
    mask_logs()
    mask_logs()
    filters = logging.getLogger("botocore.endpoint").filters
    assert len(filters) == len(set(filters))
    assert logging.getLogger().filters == logging.getLogger("a.library").filters == []


def test_errors_that_come_from_each_other_in_a_circle_are_masked():
    hide(["Canary-in-a-circle"])
    first, second = ValueError("Canary-in-a-circle"), OSError("Canary-in-a-circle")
    first.__cause__, second.__context__ = second, first
    translate(first, "s3://mnist/k")
    assert (first.args, second.args) == (("***",), ("***",))
