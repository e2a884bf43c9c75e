"""How to make a store, in any process: what constructors are given by keyword, sorted out."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from asyncds.errors import ConfigurationError
from asyncds.retry import Retry
from asyncds.settings import Settings
from asyncds.store import Connection, ObjectStore, S3Store
from asyncds.store.integrity import HowVerified

__all__ = ["StoreRecipe"]

# The defaults of s3torchconnector's S3ClientConfig: a value that equals them was not chosen.
_CRT_GBPS, _CRT_ATTEMPTS = 10.0, 10
_PER_GBPS = 25.6  # requests in flight


@dataclass(frozen=True)
class StoreRecipe:
    """How to make the store, in any process, with the credentials that are found there: none are pickled."""

    settings: Settings
    endpoint: str | None = None
    region: str | None = None
    unsigned: bool = False
    path_style: bool | None = None
    profile: str | None = None
    session_factory: Callable[[], Any] | None = field(default=None, repr=False)  # a partial shows its arguments
    store: ObjectStore | None = None

    @classmethod
    def of(
        cls,
        *,
        region: str | None = None,
        endpoint: str | None = None,
        profile: str | None = None,
        unsigned: bool = False,
        s3client_config: Any = None,
        session_factory: Callable[[], Any] | None = None,
        store: ObjectStore | None = None,
        **settings: Any,
    ) -> "StoreRecipe":
        """Sort the keyword arguments of a constructor into settings and what the store is made from.

        `s3client_config` is anything with the attributes of `s3torchconnector.S3ClientConfig`. What it says about
        concurrency and attempts counts where it is not its default, and where neither argument nor environment does.
        Raises `ConfigurationError`.
        """
        values = Settings(**settings)
        if store is not None and values.verify_md5:
            raise ConfigurationError(
                "verify_md5 is about what S3 sends: a store of yours compares by itself; leave ASYNCDS_VERIFY_MD5 off"
            )
        gbps = getattr(s3client_config, "throughput_target_gbps", None) or _CRT_GBPS
        if gbps != _CRT_GBPS:
            values = values.with_defaults(concurrency=min(4096, math.ceil(_PER_GBPS * gbps)))
        attempts = getattr(s3client_config, "max_attempts", None) or _CRT_ATTEMPTS
        if attempts != _CRT_ATTEMPTS:
            values = values.with_defaults(retries=attempts - 1)
        return cls(
            values,
            endpoint=endpoint,
            region=region,
            profile=profile or getattr(s3client_config, "profile", None),
            unsigned=unsigned or bool(getattr(s3client_config, "unsigned", False)),
            path_style=True if getattr(s3client_config, "force_path_style", False) else None,
            session_factory=session_factory,
            store=store,
        )

    def connection(self) -> Connection:
        return Connection.resolve(
            self.settings,
            endpoint=self.endpoint,
            region=self.region,
            unsigned=self.unsigned,
            path_style=self.path_style,
            profile=self.profile,
            session=self.session_factory() if self.session_factory is not None else None,
        )

    def make(
        self, concurrency: int, retry: Retry, on_get: Callable[[str, HowVerified], None] | None = None
    ) -> ObjectStore:
        """Make the store. `on_get` is told, for each GET that brought something, which lane it took and why, and how
        what came was verified."""
        if self.store is not None:
            return self.store
        return S3Store(
            self.connection(),
            concurrency=concurrency,
            timeout=self.settings.timeout,
            retry=retry,
            session_factory=self.session_factory,
            lean=self.settings.lane == "auto",
            verify_md5=self.settings.verify_md5,
            on_get=on_get,
        )

    @property
    def url(self) -> str | None:
        return None if self.store is not None else self.connection().endpoint

    @property
    def identity(self) -> str:
        return self.store.endpoint if self.store is not None else self.connection().identity
