"""Which endpoint, which region, whose credentials: a pure decision from settings and arguments."""

import functools
import ipaddress
import re
import warnings
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import SecretStr

from asyncds.errors import ConfigurationError
from asyncds.settings import Settings

__all__ = ["NOT_USED", "Connection"]

NOT_USED = "MINIO_URL is not used"

_AWS = "https://s3.amazonaws.com"
_HOST = re.compile(r"(?!.*[-\w]{64})[-.:%\w]+")
_PRIVATE_SUFFIXES = (".local", ".localhost", ".internal", ".lan", ".home.arpa", ".cluster.local", ".svc")


@dataclass(frozen=True)
class Connection:
    """Everything that a client is made from. `AWS_*` and `MINIO_*` are families: AWS comes first, and keys of one are
    never sent to the endpoint of the other.

    `endpoint` None means AWS itself; without keys the provider chain of botocore decides (profile, instance role,
    web identity, SSO), except for a MinIO without keys, which is read anonymously.
    """

    family: Literal["AWS", "MINIO"]
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    unsigned: bool = False
    path_style: bool | None = None
    hint: str = ""

    @classmethod
    def resolve(
        cls,
        settings: Settings,
        *,
        endpoint: str | None = None,
        region: str | None = None,
        unsigned: bool = False,
        path_style: bool | None = None,
        profile: str | None = None,
        session: Any = None,
    ) -> "Connection":
        """Decide. A `profile` that is given here comes before keys of the environment; where the caller brings a
        `session`, its credentials count. An endpoint that only the AWS configuration names is found there.

        Raises `ConfigurationError` for an endpoint with a missing or superfluous scheme, or half a pair of keys.
        """
        if profile is not None:
            keys = dict.fromkeys(("access_key", "secret_key", "session_token"))
            settings = settings.model_copy(update=keys | {"profile": profile})
        family, url = _family(settings, None if endpoint is None else _checked(endpoint, "endpoint"))
        if family == "AWS" and url is None:
            url = _configured_endpoint(session, settings.profile)
        _warn_of_plain_http(url)
        access, secret, token = (None, None, None) if session is not None else _keys(settings, family)
        if (access is None) != (secret is None):
            names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
            names = names if family == "AWS" else ("MINIO_ACCESS_KEY", "MINIO_SECRET_KEY")
            raise ConfigurationError(
                f"{names[access is not None]} is missing where {names[access is None]} is set: "
                "both have to be in the environment, or both in the .env file"
            )
        return cls(
            family=family,
            endpoint=url,
            region=region or settings.region,
            profile=settings.profile if family == "AWS" else None,
            access_key=None if unsigned else access,
            secret_key=None if unsigned else secret,
            session_token=None if unsigned else token,
            unsigned=unsigned or (family == "MINIO" and access is None),
            path_style=path_style if path_style is not None else url is not None or None,
            hint=_hint(settings, family, url),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        keys = ("access_key", "secret_key", "session_token")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in keys}
        return _restored, (values, self.access_key is not None)

    @property
    def credentials(self) -> str:
        """Which are sent, for people; none are in it."""
        if self.unsigned:
            return "anonymous"
        if self.access_key is not None:
            return "MINIO_ACCESS_KEY" if self.family == "MINIO" else "AWS_ACCESS_KEY_ID"
        return f"profile {self.profile}" if self.profile is not None else "what botocore finds: a profile, a role, SSO"

    @property
    def identity(self) -> str:
        """What the cache calls this store. All of AWS is one: its bucket names are unique."""
        if self.endpoint is None:
            return _AWS
        if _is_aws(self.endpoint) and not self.endpoint.endswith(".cn"):
            return _AWS
        parts = urlsplit(self.endpoint)
        return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"


def _restored(values: dict[str, Any], has_keys: bool) -> Connection:
    """A connection from a pickle, with the keys of its family that this process has, if it had any."""
    connection = Connection(**values)
    if not has_keys:
        return connection
    access, secret, token = _keys(Settings(), connection.family)
    return replace(connection, access_key=access, secret_key=secret, session_token=token)


def _keys(settings: Settings, family: str) -> tuple[str | None, str | None, str | None]:
    aws = (settings.access_key, settings.secret_key, settings.session_token)
    minio = (settings.minio_access_key, settings.minio_secret_key, None)
    access, secret, token = map(_reveal, aws if family == "AWS" else minio)
    return access, secret, token


def _family(settings: Settings, endpoint: str | None) -> tuple[Literal["AWS", "MINIO"], str | None]:
    """The family whose credentials are used, and the endpoint they are sent to."""
    aws_named = bool(settings.access_key or settings.profile)
    named = settings.endpoint_s3 or settings.endpoint
    if endpoint is None and named:
        name = "AWS_ENDPOINT_URL_S3" if settings.endpoint_s3 else "AWS_ENDPOINT_URL"
        url = _checked(named, name)
        if settings.minio_url and _minio_endpoint(settings) != url:
            _warn_of_two_servers(name, url, settings.minio_url)
        return "AWS", url
    if endpoint is None:
        return ("MINIO", _minio_endpoint(settings)) if settings.minio_url and not aws_named else ("AWS", None)
    if named and named.rstrip("/") == endpoint:
        return "AWS", endpoint
    if settings.minio_url:
        return ("MINIO" if _minio_endpoint(settings) == endpoint else "AWS"), endpoint
    return ("MINIO" if settings.minio_access_key and not aws_named and not _is_aws(endpoint) else "AWS"), endpoint


def _configured_endpoint(session: Any, profile: str | None) -> str | None:
    """What the user's session, or the AWS configuration and its profile, name as the endpoint of S3.

    botocore would use it anyway; the cache has to know, because the same name is another object elsewhere.
    """
    from botocore.configprovider import ConfiguredEndpointProvider
    from botocore.exceptions import BotoCoreError, ProfileNotFound
    from botocore.session import Session

    inner = getattr(session, "_session", session) if session is not None else Session(profile=profile)
    try:
        config, scoped = inner.full_config, inner.get_scoped_config()
        if str(scoped.get("ignore_configured_endpoint_urls", "")).lower() == "true":
            return None
        url = ConfiguredEndpointProvider(config, scoped, "s3", environ={}).provide()
    except ProfileNotFound:
        return None  # the client says so, when there is something to ask
    except (BotoCoreError, AttributeError) as error:  # the latter: of text where there should be a section
        raise ConfigurationError(f"the AWS configuration cannot be used: {error}") from None
    return None if url is None else _checked(url, "endpoint_url in the AWS configuration")


def _checked(url: str, name: str) -> str:
    if "@" in url:
        raise ConfigurationError(f"{name} must hold no user name or password: use the variables for keys instead")
    try:
        parts = urlsplit(url)
        complete = parts.scheme in ("http", "https") and bool(parts.hostname)
        possible = bool(_HOST.fullmatch(parts.hostname or "")) and (parts.port or 1) > 0
    except ValueError:
        complete, possible = "://" in url, False
    if complete and not possible:
        raise ConfigurationError(
            f"{name}={url!r} is no http:// or https:// URL with a host and port that can be: write http://host:port"
        )
    if not complete:
        bare = url.rpartition("://")[2].removeprefix("//")
        scheme = "http" if _is_private(bare.partition("/")[0].rpartition(":")[0] or bare) else "https"
        raise ConfigurationError(f"{name}={url!r} is no http:// or https:// URL: write {scheme}://{bare}")
    return url.rstrip("/")


def _minio_endpoint(settings: Settings) -> str:
    url = settings.minio_url or ""
    if "@" in url:
        return _checked(url, "MINIO_URL")
    if "://" in url:
        scheme, _, bare = url.partition("://")
        secure = str(scheme == "https").lower()
        raise ConfigurationError(
            f"MINIO_URL={url!r} must be host:port without a scheme: write MINIO_URL={bare.rstrip('/')} "
            f"and MINIO_SECURE={secure}"
        )
    return _checked(f"{'https' if settings.minio_secure else 'http'}://{url}", "MINIO_URL")


def _hint(settings: Settings, family: str, endpoint: str | None) -> str:
    if family == "AWS" and endpoint is None and settings.minio_url:
        return (
            f"{NOT_USED}, because AWS_ACCESS_KEY_ID or AWS_PROFILE is set: unset that, or set AWS_ENDPOINT_URL as well"
        )
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return "check {} and {}".format(*(names if family == "AWS" else ("MINIO_ACCESS_KEY", "MINIO_SECRET_KEY")))


def _reveal(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret is not None else None


def _is_aws(url: str) -> bool:
    return (urlsplit(url).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _is_private(host: str) -> bool:
    """Whether plain HTTP to this host stays inside: loopback and private addresses, and names that are not public."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_private
    except ValueError:
        return "." not in host or host.endswith(_PRIVATE_SUFFIXES)


@functools.cache
def _warn_of_two_servers(name: str, url: str, minio_url: str) -> None:
    warnings.warn(f"MINIO_URL={minio_url} is not used: {name}={url} comes first; unset one of them", stacklevel=2)


@functools.cache
def _warn_of_plain_http(url: str | None) -> None:
    parts = urlsplit(url or "")
    if parts.scheme == "http" and not _is_private(parts.hostname or ""):
        warnings.warn(f"{url} is plain http to a public host: data can be read and changed on the way", stacklevel=2)
