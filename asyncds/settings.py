"""Every knob, its one default, and where its value may come from: arguments > environment > `.env` file > default."""

import difflib
import math
import multiprocessing
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict, get_args

import platformdirs
from annotated_types import Ge, Gt, Le
from pydantic import (
    AliasChoices,
    BeforeValidator,
    ByteSize,
    Field,
    PrivateAttr,
    SecretStr,
    TypeAdapter,
    ValidationError,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from asyncds.errors import ConfigurationError
from asyncds.mounts import network_filesystem

__all__ = ["Options", "Setting", "Settings", "or_close_to", "size"]

# Credentials that belong together: all of them come from the place that names the first, or a session token of the
# `.env` file would travel with the keys of the environment.
_CREDENTIALS = (
    ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    ("MINIO_ACCESS_KEY", "MINIO_SECRET_KEY"),
)
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_URLS = {"endpoint_s3", "endpoint", "minio_url"}


def size(value: object) -> object:
    """`"50GB"` and `5e10` as bytes, an int; `"50%"` and `0.5` as a share of the disk, a float up to 1."""
    if isinstance(value, float) and 0 < value <= 1:
        return value
    text = str(value).strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return int(TypeAdapter(ByteSize).validate_python(text))
    if text.endswith("%") or 0 < share < 1:
        if not 0 < share <= 1:
            raise ValueError("a share of the disk lies above 0% and up to 100%")
        return share
    if not math.isfinite(share):
        raise ValueError("not a size")
    if isinstance(value, str):
        raise ValueError("bytes of what: B, kB, MB, GB?")
    return int(share)


def _number(value: object) -> object:
    """`"100"` and 100 as a count, an int; `"0.01"` and `"1%"` as a share, a float below 1."""
    text = str(value).strip()
    number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not math.isfinite(number) or (number >= 1 and not number.is_integer()):
        raise ValueError("a count, or a share below 1")
    return number if 0 < number < 1 else int(number)


def _directory(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("not a path")
    return Path(value).expanduser().absolute()


def _default_directory() -> Path:
    """The user's cache directory; where that lies on a network filesystem, a local one that the job was given."""
    usual = platformdirs.user_cache_path()
    network = network_filesystem(usual)
    for name in ("SLURM_TMPDIR", "TMPDIR") if network is not None else ():
        place = os.environ.get(name)
        if place and network_filesystem(Path(place)) is None and _private(place):
            message = f"{usual} lies on a network filesystem ({network}): the cache is in {name}={place}"
            warnings.warn_explicit(f"{message}; set ASYNCDS_CACHE_DIR to choose", UserWarning, "asyncds", 1)
            return Path(place)
    return usual


def _private(place: str) -> bool:
    """Whether only this user can put something there: not a directory of all, such as /tmp."""
    try:
        status = os.stat(place)
    except OSError:
        return False
    return status.st_uid == os.geteuid() and not status.st_mode & stat.S_IWOTH


class Options(TypedDict):
    """The settings that constructors accept by keyword; `Settings` says what each means and what it is by default."""

    concurrency: NotRequired[int | str]
    cache_dir: NotRequired[str | Path]
    cache_size: NotRequired[int | float | str | None]
    cache_read_only: NotRequired[bool]
    admit: NotRequired[Literal["first", "smallest"]]
    strict: NotRequired[bool]
    on_error: NotRequired[Literal["raise", "replace", "skip"]]
    max_failures: NotRequired[int | float]
    decode_threads: NotRequired[int]
    lane: NotRequired[Literal["auto", "full"]]
    verify_md5: NotRequired[bool]
    timeout: NotRequired[float]
    deadline: NotRequired[float]
    first_contact: NotRequired[float]
    retries: NotRequired[int]
    hedging: NotRequired[bool]
    manifest_max_age: NotRequired[float]
    env_file: NotRequired[str | Path | None]


class Setting(NamedTuple):
    """A setting as people are told of it: with its variables, the strongest first, and nothing secret in its value."""

    name: str
    variables: list[str]
    value: str | int | float | bool | None
    origin: str
    description: str


class Settings(BaseSettings):
    """One frozen, validated set of values; secrets are masked in `repr` and never pickled.

    `os.environ` and the `.env` file of the working directory (or `env_file`) are read once, when an instance is made;
    neither is ever written. Variables `ASYNCDS_*` that mean nothing get a warning. An unpickled instance has the same
    values, and the secrets of the process it is in.

    Raises `ConfigurationError`, in one line that names the variable or argument, its value and what is allowed.
    """

    model_config = SettingsConfigDict(
        env_prefix="ASYNCDS_", env_ignore_empty=True, extra="ignore", frozen=True, populate_by_name=True
    )

    concurrency: Annotated[int, Ge(1), Le(4096)] | Literal["auto"] = Field(
        "auto", description="requests in flight per rank, shared out over its workers, or auto: as many as pay"
    )
    cache_dir: Annotated[Path, BeforeValidator(_directory)] = Field(
        default_factory=_default_directory,
        description="directory in which asyncds makes its own folder, `asyncds`",
    )
    cache_size: Annotated[int | float, BeforeValidator(size), Gt(0)] | None = Field(
        None,
        description="limit of the cache, such as 50GB or 30% of the disk; by default all but 5 % of the disk",
    )
    cache_read_only: bool = Field(False, description="write nothing to the cache; it may be another user's")
    admit: Literal["first", "smallest"] = Field(
        "first", description="which objects a cache that is too small keeps: those that come first, or the smallest"
    )
    strict: bool = Field(False, description="raise where the cache fails, instead of going on without it")
    on_error: Literal["raise", "replace", "skip"] = Field(
        "raise", description="what becomes of a sample that cannot be had: an error, another sample, or none"
    )
    max_failures: Annotated[int | float, BeforeValidator(_number)] = Field(
        100, ge=0, description="samples that may be replaced or skipped: a number, or a share of the dataset below 1"
    )
    decode_threads: int = Field(
        0, ge=0, le=256, description="threads for transforms, per process; 0: in order, in the calling thread"
    )
    lane: Literal["auto", "full"] = Field(
        "auto", description="how objects are asked for: by a lean lane of ours where it can, or all by aiobotocore"
    )
    verify_md5: bool = Field(
        False,
        description="compare bodies up to 16 MiB with ETags that are an MD5, as they are not under SSE-KMS or SSE-C",
    )
    timeout: float = Field(10.0, gt=0, le=3600, description="seconds without progress that end an attempt")
    deadline: float = Field(60.0, gt=0, le=86400, description="seconds for one object, with its retries")
    first_contact: float = Field(5.0, gt=0, le=3600, description="seconds for an endpoint to answer for the first time")
    retries: int = Field(100, ge=0, le=1000, description="further attempts for one object, within its deadline")
    hedging: bool = Field(True, description="whether an object that takes much longer than others is asked for twice")
    manifest_max_age: float = Field(
        0.0, ge=0, le=1e9, description="seconds for which a saved listing is used instead of a new one"
    )

    endpoint_s3: str | None = Field(
        None,
        validation_alias=_ENDPOINTS[0],
        description="endpoint of the store, http:// or https://; comes before AWS_ENDPOINT_URL",
    )
    endpoint: str | None = Field(
        None,
        validation_alias=_ENDPOINTS[1],
        description="endpoint of the store, http:// or https://; by default that of AWS",
    )
    region: str | None = Field(
        None,
        validation_alias=AliasChoices("AWS_REGION", "AWS_DEFAULT_REGION"),
        description="region of the bucket; by default us-east-1",
    )
    profile: str | None = Field(None, validation_alias="AWS_PROFILE", description="profile of the AWS configuration")
    access_key: SecretStr | None = Field(
        None, validation_alias="AWS_ACCESS_KEY_ID", description="key for AWS, or for AWS_ENDPOINT_URL"
    )
    secret_key: SecretStr | None = Field(None, validation_alias="AWS_SECRET_ACCESS_KEY", description="its secret")
    session_token: SecretStr | None = Field(
        None, validation_alias="AWS_SESSION_TOKEN", description="its token, where it is a temporary one"
    )
    minio_url: str | None = Field(None, validation_alias="MINIO_URL", description="host:port of a MinIO")
    minio_access_key: SecretStr | None = Field(
        None, validation_alias="MINIO_ACCESS_KEY", description="key for MINIO_URL; without it, that is read anonymously"
    )
    minio_secret_key: SecretStr | None = Field(None, validation_alias="MINIO_SECRET_KEY", description="its secret")
    minio_secure: bool = Field(True, validation_alias="MINIO_SECURE", description="whether MINIO_URL speaks TLS")

    _dotenv: str | Path | None = PrivateAttr(None)
    _arguments: frozenset[str] = PrivateAttr(frozenset())

    def __init__(self, *, env_file: str | Path | None = ".env", **values: Any) -> None:
        for name in values.keys() - type(self).model_fields.keys():
            raise ConfigurationError(f"no setting is called {name!r}{or_close_to(name, Options.__annotations__)}")
        try:
            super().__init__(_env_file=env_file, **values)
        except ValidationError as error:
            raise ConfigurationError(_explain(type(self).model_fields, values, error)) from None
        except (UnicodeDecodeError, OSError) as error:
            raise ConfigurationError(f"{env_file}: cannot be read as UTF-8 ({error})") from None
        self._arguments = frozenset(values)
        self._dotenv = None if env_file is None else Path(env_file).absolute()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        _warn_of_misspelt([*getattr(env_settings, "env_vars", ()), *getattr(dotenv_settings, "env_vars", ())])
        environment, file = _layers(env_settings, dotenv_settings)
        layers = (InitSettingsSource(settings_cls, init_kwargs=values) for values in (environment, file))
        return init_settings, *layers

    def __reduce__(self) -> tuple[Any, ...]:
        values = {name: value for name, value in self if not isinstance(value, SecretStr)}
        return _rebuild, (values | {"env_file": self._dotenv}, self._arguments)

    def explained(self) -> list["Setting"]:
        """Every setting, with the environment and the `.env` file read once more to tell where its value comes from."""
        kind = type(self)
        sources = EnvSettingsSource(kind), DotEnvSettingsSource(kind, env_file=self._dotenv)
        places = [*zip(("environment", str(self._dotenv)), sources, _layers(*sources), strict=True)]
        return [self._explained(name, field, places) for name, field in kind.model_fields.items()]

    def _explained(
        self, name: str, field: FieldInfo, places: "list[tuple[str, EnvSettingsSource, _Layer]]"
    ) -> "Setting":
        variables, value, origins = _variables(name, field), getattr(self, name), ["default"]
        for place, source, layer in reversed(places):
            if layer.keys() & {name, *variables}:
                set_there = [variable for variable in variables if source.env_vars.get(variable.lower())]
                origins.append(f"{place}: {set_there[0]}")
        if name in self._arguments:
            origins.append("argument")
        return Setting(name, variables, _shown(name, value), origins[-1], field.description or "")

    def with_defaults(self, **values: Any) -> "Settings":
        """Return a copy in which `values` replace what neither arguments nor environment have set."""
        return self.model_copy(update={name: v for name, v in values.items() if name not in self.model_fields_set})


_Layer = dict[str, Any]
# Those that have names of others have none that begin with ASYNCDS_.
_NOT_OURS = {name for name, field in Settings.model_fields.items() if field.validation_alias is not None}


def _layers(environment: Callable[[], _Layer], file: Callable[[], _Layer]) -> tuple[_Layer, _Layer]:
    """What the environment sets, and what the `.env` file does, without what must not be mixed."""
    strongest, weakest = ({k: v for k, v in layer().items() if k not in _NOT_OURS} for layer in (environment, file))
    for strong, weak in ((strongest, weakest), (weakest, strongest)):
        for name in (name for family in _CREDENTIALS if family[0] in strong for name in family):
            weak.pop(name, None)
    if strongest.keys() & set(_ENDPOINTS):
        weakest = {name: value for name, value in weakest.items() if name not in _ENDPOINTS}
    return strongest, weakest


def _shown(name: str, value: Any) -> Any:
    """A value without secrets: also not those that somebody wrote into a URL."""
    if isinstance(value, SecretStr):
        return "***"
    if isinstance(value, str) and name in _URLS:
        return re.sub(r"^(\w+://)?.*@", r"\1***@", value)
    return str(value) if isinstance(value, Path) else value


def _warn_of_misspelt(variables: Iterable[str]) -> None:
    if multiprocessing.parent_process() is not None:
        return  # it was said already
    known = [f"ASYNCDS_{name.upper()}" for name in Options.__annotations__ if name != "env_file"]
    for name in sorted({variable.upper() for variable in variables if variable.lower().startswith("asyncds_")}):
        if name not in known:
            message = f"{name} is no variable of asyncds{or_close_to(name, known)}"
            warnings.warn_explicit(message, UserWarning, "asyncds", 1)  # no line of code has caused it


def or_close_to(name: str, known: Iterable[str]) -> str:
    """What somebody who wrote `name` may have meant, or else all that there is."""
    bare = {text.removeprefix("ASYNCDS_"): text for text in known}  # what all have in common makes none alike
    close = difflib.get_close_matches(name.removeprefix("ASYNCDS_"), bare, n=1, cutoff=0.7)
    return f": did you mean {bare[close[0]]!r}?" if close else f"; there are {', '.join(sorted(known))}"


def _rebuild(values: dict[str, Any], arguments: frozenset[str]) -> Settings:
    settings = Settings(**values)
    settings._arguments = arguments
    return settings


def _explain(fields: dict[str, FieldInfo], arguments: dict[str, Any], error: ValidationError) -> str:
    """The first thing wrong, as `NAME=value: what is allowed`."""
    first = error.errors(include_url=False)[0]
    location = str(first["loc"][0])
    name = next((n for n, field in fields.items() if location in (n, *_variables(n, field))), location)
    field = fields[name]
    where = name if name in arguments else _variables(name, field)[0]
    value = "***" if "SecretStr" in str(field.annotation) else repr(first["input"])
    return f"{where}={value}: {_allowed(field)}"


def _variables(name: str, field: FieldInfo) -> list[str]:
    """The names of the environment variables that set a field, the strongest first."""
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return [str(choice) for choice in alias.choices]
    return [str(alias)] if alias else [f"ASYNCDS_{name.upper()}"]


def _allowed(field: FieldInfo) -> str:
    kinds = get_args(field.annotation)
    within = [constraint for kind in kinds for constraint in getattr(kind, "__metadata__", ())]
    bounds = {type(constraint): constraint for constraint in [*field.metadata, *within]}
    low = bounds.get(Ge) or bounds.get(Gt)
    if isinstance(low, Ge | Gt) and isinstance(high := bounds.get(Le), Le):
        kind = "a whole number" if field.annotation is int else "auto, or a whole number" if within else "a number"
        start = f"from {low.ge}" if isinstance(low, Ge) else f"above {low.gt}"
        return f"must be {kind} {start} to {high.le:g} ({field.description})"
    if get_args(field.annotation) and all(isinstance(choice, str) for choice in get_args(field.annotation)):
        return f"must be {' or '.join(get_args(field.annotation))}"
    if field.annotation is bool:
        return "must be true or false"
    if field.description and "limit" in field.description:
        return 'must be bytes with a unit, such as "50GB", or a share of the disk, such as "50%"'
    return "must be a directory" if field.annotation is Path else "must be a text"
