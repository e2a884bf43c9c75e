"""What asyncds hangs into aiobotocore and aiohttp: where a version has no place for it, nothing is sent at all."""

import aiobotocore.httpsession
import aiohttp
import pytest

from asyncds import CachedS3MapDataset, S3Reader
from asyncds.errors import StoreError
from asyncds.testing import S3Server

Session = aiobotocore.httpsession.AIOHTTPSession
CANNOT = "this version of aiobotocore cannot be guarded: install one from 2.25.1 on, below 4"


def renamed(monkeypatch):
    """`send` gets its sessions by another name."""
    monkeypatch.setattr(Session, "_sessions_for", Session._get_session, raising=False)
    monkeypatch.delattr(Session, "_get_session")


def left_behind(monkeypatch):
    """`send` gets its sessions in another way, and the old one is still there."""

    async def send(self, request):
        raise AssertionError("sent")

    monkeypatch.setattr(Session, "send", send)


def copied(monkeypatch):
    """A session shows a copy of its traces."""
    traces = property(lambda session: list(session._trace_configs))
    monkeypatch.setattr(aiohttp.ClientSession, "trace_configs", traces)


def no_context(monkeypatch):
    """A connector keeps its TLS context under another name."""
    get_session = Session._get_session

    async def hidden(self, proxy):
        session = await get_session(self, proxy)
        session.connector._ssl = True
        return session

    monkeypatch.setattr(Session, "_get_session", hidden)


@pytest.mark.parametrize("change", [renamed, left_behind, copied, no_context])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of aiohttp, of who sets attributes
def test_version_that_has_no_place_for_a_guard_is_refused_before_anything_is_sent(s3, monkeypatch, change):
    s3.put("mnist", "x", b"x")
    change(monkeypatch)
    for options in ({}, {"retries": 0}):
        for make in (CachedS3MapDataset.from_prefix, CachedS3MapDataset.from_objects):
            with make("s3://mnist/x", **options) as dataset, pytest.raises(StoreError, match=CANNOT):
                dataset[0]
    assert s3.stats.total == 0


def test_sender_that_somebody_has_wrapped_is_still_recognised(s3, monkeypatch):
    import functools

    send = Session.send

    @functools.wraps(send)
    async def traced(*arguments):
        return await send(*arguments)

    monkeypatch.setattr(Session, "send", traced)
    s3.put("mnist", "x", b"x")
    with CachedS3MapDataset.from_prefix("s3://mnist/", transform=S3Reader.read) as dataset:
        assert dataset[0] == b"x"


def test_who_asks_not_to_verify_is_not_made_to(tmp_path, monkeypatch):
    import trustme

    path = tmp_path / "certificate.pem"
    trustme.CA().issue_cert("elsewhere.example").private_key_and_cert_chain_pem.write_to_path(str(path))
    with S3Server(tls=(path, path)) as server:
        server.put("mnist", "x", b"x")
        options = {"endpoint": server.endpoint, "session_factory": Trusting}
        with CachedS3MapDataset.from_prefix("s3://mnist/", transform=S3Reader.read, **options) as dataset:
            assert dataset[0] == b"x"


class Trusting:
    """A session whose clients believe every certificate."""

    def __init__(self):
        from aiobotocore.session import AioSession

        self._session = AioSession()
        self._session.set_credentials("AKIA", "secret")

    def __getattr__(self, name):
        return getattr(self._session, name)

    def create_client(self, *arguments, **options):
        return self._session.create_client(*arguments, **options, verify=False)
