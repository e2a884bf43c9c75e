"""aiobotocore's clients: from which session, with what configuration, and whether others have a say in them."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import cache
from typing import Any

from botocore.loaders import create_loader

from asyncds.errors import DatasetClosed
from asyncds.store.connection import Connection
from asyncds.store.guard import guard
from asyncds.store.masking import mask_logs
from asyncds.store.pages import read_pages_first

__all__ = ["Clients", "has_foreign_handlers"]

_EACH_ANEW = {"force_close": True, "keepalive_timeout": None}
_KNOWN = {"botocore", "aiobotocore", "boto3", "aioboto3", "asyncds"}
_EVENTS = [
    "provide-client-params",
    "before-parameter-build",
    "before-endpoint-resolution",
    "before-call",
    "request-created",
    "choose-signer",
    "before-sign",
    "before-send",
    "response-received",
    "before-parse",
    "needs-retry",
    "after-call",
]


class Clients:
    """Two guarded clients of an endpoint: one that keeps its connections, and one that makes each anew.

    Each is made when it is first asked for, from one session, whose credentials they share; `prepare` is given it
    before it is used. Lives on one event loop.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        concurrency: int,
        connect_timeout: float,
        read_timeout: float,
        session_factory: Callable[[], Any] | None,
        prepare: Callable[[Any], None],
    ) -> None:
        self._connection = connection
        self._options = {
            "max_pool_connections": concurrency,
            "connect_timeout": connect_timeout,
            "read_timeout": read_timeout,
        }
        self._session_factory = session_factory
        self._prepare = prepare
        self._session: Any = None
        self._making = asyncio.Lock()
        self._made: dict[bool, Any] = {}
        self._opened = AsyncExitStack()
        self._closed = False

    async def client(self, *, anew: bool = False) -> Any:
        """Return the client that keeps its connections, or the one that makes each anew.

        Raises what botocore does, and `DatasetClosed` after `aclose`.
        """
        if anew:
            await self.client()  # whose connector's arguments the other has, too
        if anew not in self._made:
            async with self._making:
                if anew not in self._made and not self._closed:
                    self._made[anew] = await self._open(anew)
                if self._closed:
                    await self._opened.aclose()
                    raise DatasetClosed("the store was closed meanwhile")
        return self._made[anew]

    async def aclose(self) -> None:
        """Close their connections; none is made any more, and one that is being made closes itself: nobody waits."""
        self._closed = True
        await self._opened.aclose()

    async def _open(self, anew: bool) -> Any:
        mask_logs()
        if self._session is None:
            self._session = (self._session_factory or self._own_session)()
        make = getattr(self._session, "create_client", None) or self._session.client
        async with AsyncExitStack() as opened:
            client = await opened.enter_async_context(make("s3", **self._arguments(anew)))
            guard(client, follow_regions=self._connection.endpoint is None)
            read_pages_first(client.meta.events)
            self._prepare(client)
            self._opened.push_async_callback(opened.pop_all().aclose)
        return client

    def _connector_args(self) -> dict[str, Any]:
        """What a session of the user's wants of connections: a resolver, say."""
        return dict(getattr(self._made[False].meta.config, "connector_args", None) or {})

    def _own_session(self) -> Any:
        from aiobotocore.session import AioSession

        session = AioSession()
        session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
        if self._connection.profile is not None:
            session.set_config_variable("profile", self._connection.profile)
        return session

    def _arguments(self, anew: bool) -> dict[str, Any]:
        from aiobotocore.config import AioConfig
        from botocore import UNSIGNED

        connection = self._connection
        style = {True: {"addressing_style": "path"}, False: {"addressing_style": "virtual"}, None: None}
        config = AioConfig(
            **self._options,
            retries={"total_max_attempts": 1},
            s3=style[connection.path_style],
            **({"signature_version": UNSIGNED} if connection.unsigned else {}),
            **({"connector_args": self._connector_args() | _EACH_ANEW} if anew else {}),
        )
        arguments: dict[str, Any] = {"endpoint_url": connection.endpoint, "config": config}
        arguments["region_name"] = connection.region or _region_of(self._session) or "us-east-1"
        if self._session_factory is None and connection.access_key is not None:
            arguments["aws_access_key_id"] = connection.access_key
            arguments["aws_secret_access_key"] = connection.secret_key
            arguments["aws_session_token"] = connection.session_token
        return arguments


def has_foreign_handlers(client: Any) -> bool:
    """Whether somebody else than botocore and asyncds has a say in a GET: what he does to each is not repeated."""
    emitter = getattr(client.meta.events, "_emitter", client.meta.events)
    handlers = getattr(emitter, "_handlers", None)
    if handlers is None:
        return True
    found = [handler for event in _EVENTS for handler in handlers.prefix_search(f"{event}.s3.GetObject")]
    return any(_home(handler) not in _KNOWN for handler in found)


def _home(handler: Any) -> str:
    """The package of a handler; a bound method's is that of its class."""
    function = getattr(handler, "func", handler)  # of a partial
    module = getattr(function, "__module__", None) or type(function).__module__
    return str(module).partition(".")[0]


@cache
def _loader(data_path: str | None) -> Any:
    """What reads botocore's descriptions of services, which takes a tenth of a second: once for a process and those
    that are forked from it."""
    return create_loader(data_path)


def _region_of(session: Any) -> str | None:
    """The region of a profile, or of the user's session."""
    if hasattr(session, "get_config_variable"):
        return session.get_config_variable("region")  # type: ignore[no-any-return]
    return getattr(session, "region_name", None)
