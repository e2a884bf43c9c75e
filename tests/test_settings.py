"""Settings: where a value comes from, what it may be, and that secrets stay where they are."""

import os
import pickle
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from asyncds.errors import ConfigurationError
from asyncds.settings import Options, Settings
from asyncds.store import Connection

SOURCES = [  # field, variable, argument, in the environment, in .env, and what each of the three means
    ("concurrency", "ASYNCDS_CONCURRENCY", 1, "2", "3", (1, 2, 3)),
    ("cache_dir", "ASYNCDS_CACHE_DIR", "/a", "/b", "/c", (Path("/a"), Path("/b"), Path("/c"))),
    ("cache_size", "ASYNCDS_CACHE_SIZE", "1GB", "2GB", "3GB", (10**9, 2 * 10**9, 3 * 10**9)),
    ("timeout", "ASYNCDS_TIMEOUT", 1.5, "2.5", "3.5", (1.5, 2.5, 3.5)),
    ("deadline", "ASYNCDS_DEADLINE", 1, "2", "3", (1.0, 2.0, 3.0)),
    ("first_contact", "ASYNCDS_FIRST_CONTACT", 1, "2", "3", (1.0, 2.0, 3.0)),
    ("retries", "ASYNCDS_RETRIES", 1, "2", "3", (1, 2, 3)),
    ("manifest_max_age", "ASYNCDS_MANIFEST_MAX_AGE", 1, "2", "3", (1.0, 2.0, 3.0)),
    ("endpoint", "AWS_ENDPOINT_URL", "http://a", "http://b", "http://c", ("http://a", "http://b", "http://c")),
    ("endpoint_s3", "AWS_ENDPOINT_URL_S3", "http://a", "http://b", "http://c", ("http://a", "http://b", "http://c")),
    ("region", "AWS_REGION", "a", "b", "c", ("a", "b", "c")),
    ("region", "AWS_DEFAULT_REGION", "a", "b", "c", ("a", "b", "c")),
    ("profile", "AWS_PROFILE", "a", "b", "c", ("a", "b", "c")),
    ("minio_url", "MINIO_URL", "a:1", "b:1", "c:1", ("a:1", "b:1", "c:1")),
    ("minio_secure", "MINIO_SECURE", False, "true", "0", (False, True, False)),
]
SECRETS = {
    "access_key": "AWS_ACCESS_KEY_ID",
    "secret_key": "AWS_SECRET_ACCESS_KEY",
    "session_token": "AWS_SESSION_TOKEN",
    "minio_access_key": "MINIO_ACCESS_KEY",
    "minio_secret_key": "MINIO_SECRET_KEY",
}


def env_file(**variables):
    Path(".env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))


def revealed(settings):
    """The credentials, by field, of those that are set."""
    values = {field: getattr(settings, field) for field in SECRETS}
    return {field: value.get_secret_value() for field, value in values.items() if value is not None}


@pytest.mark.parametrize(("field", "variable", "argument", "environment", "file", "meant"), SOURCES)
def test_argument_beats_environment_beats_file_beats_default(
    monkeypatch, field, variable, argument, environment, file, meant
):
    monkeypatch.delenv(variable, raising=False)
    default = getattr(Settings(), field)
    assert default not in meant or field == "minio_secure"
    env_file(**{variable: file})
    assert getattr(Settings(), field) == meant[2]
    monkeypatch.setenv(variable, environment)
    assert getattr(Settings(), field) == meant[1]
    assert getattr(Settings(**{field: argument}), field) == meant[0]
    monkeypatch.setenv(variable, "")
    assert getattr(Settings(), field) == meant[2], "an empty variable is one that is not set"
    assert getattr(Settings(env_file=None), field) == default


@pytest.mark.parametrize(
    ("meant", "strong", "weak"),
    [
        (lambda settings: Connection.resolve(settings).endpoint, "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        (lambda settings: settings.region, "AWS_REGION", "AWS_DEFAULT_REGION"),
    ],
)
def test_of_two_names_the_special_one_counts_but_the_environment_beats_the_file(monkeypatch, meant, strong, weak):
    monkeypatch.setenv(weak, "http://weak")
    monkeypatch.setenv(strong, "http://strong")
    assert meant(Settings()) == "http://strong"
    monkeypatch.delenv(strong)
    env_file(**{strong: "http://file"})
    assert meant(Settings()) == "http://weak"


def test_other_env_file_is_read_where_it_is_named(tmp_path):
    env_file(AWS_REGION="here")
    (tmp_path / "other.env").write_text("AWS_REGION=there\n")
    assert Settings(env_file=tmp_path / "other.env").region == "there"


@pytest.mark.parametrize(
    ("environment", "file", "expected"),
    [
        # all of a family comes from the place that names its first member
        ({"AWS_ACCESS_KEY_ID": "e", "AWS_SECRET_ACCESS_KEY": "e"}, ["AWS_SESSION_TOKEN"], "ee-"),
        ({"AWS_ACCESS_KEY_ID": "e"}, ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"], "e--"),
        ({"AWS_SESSION_TOKEN": "e"}, ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"], "ff-"),
        ({"AWS_SECRET_ACCESS_KEY": "e"}, ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"], "ff-"),
        ({"MINIO_ACCESS_KEY": "e"}, ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"], "fff"),
    ],
)
def test_credentials_of_a_family_come_from_one_place(monkeypatch, environment, file, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    env_file(**dict.fromkeys(file, "f"))
    found = revealed(Settings())
    assert "".join(found.get(field, "-") for field in ("access_key", "secret_key", "session_token")) == expected


def test_minio_keys_of_the_environment_replace_those_of_the_file(monkeypatch):
    monkeypatch.setenv("MINIO_ACCESS_KEY", "e")
    env_file(MINIO_ACCESS_KEY="f", MINIO_SECRET_KEY="f")
    assert revealed(Settings()) == {"minio_access_key": "e"}


NUMBERS = {
    "concurrency": (["0", "4097", "1.5", "many", "Auto"], "must be auto, or a whole number from 1 to 4096"),
    "timeout": (["0", "-1", "3601", "nan", "inf", "soon"], "must be a number above 0 to 3600"),
    "deadline": (["0", "86401", "x"], "must be a number above 0 to 86400"),
    "first_contact": (["0", "3601", "x"], "must be a number above 0 to 3600"),
    "retries": (["-1", "1001", "x"], "must be a whole number from 0 to 1000"),
    "manifest_max_age": (["-1", "1e10", "x"], "must be a number from 0"),
    "cache_size": (
        ["0", "-1", "0%", "101%", "-5GB", "50", "5e10", "5 apples", "nan", "inf"],
        "must be bytes with a unit, such as",
    ),
}
WRONG = [(field, value, allowed) for field, (values, allowed) in NUMBERS.items() for value in values]


@pytest.mark.parametrize(("field", "value", "allowed"), WRONG)
def test_wrong_value_is_one_line_that_names_variable_value_and_what_is_allowed(monkeypatch, field, value, allowed):
    with pytest.raises(ConfigurationError) as as_argument:
        Settings(**{field: value})
    assert str(as_argument.value).startswith(f"{field}={value!r}: {allowed}")
    variable = f"ASYNCDS_{field.upper()}"
    env_file(**{variable: f"'{value}'"})
    with pytest.raises(ConfigurationError) as in_file:
        Settings()
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as as_variable:
        Settings()
    assert str(in_file.value) == str(as_variable.value) == f"{variable}={str(as_argument.value).partition('=')[2]}"
    assert "\n" not in str(as_argument.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"minio_secure": "maybe"}, "minio_secure='maybe': must be true or false"),
        ({"cache_dir": ""}, "cache_dir='': must be a directory"),
        ({"cache_dir": 7}, "cache_dir=7: must be a directory"),
        ({"region": 7}, "region=7: must be a text"),
        ({"secret_key": 7.25}, "secret_key=***: must be a text"),
    ],
)
def test_wrong_value_of_another_kind(values, message):
    with pytest.raises(ConfigurationError) as caught:
        Settings(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("50GB", 50 * 10**9),
        ("1.5 GiB", 3 << 29),
        ("4096B", 4096),
        (4096, 4096),
        (5e10, 5 * 10**10),
        ("1 B", 1),
        ("50%", 0.5),
        (" 12.5 % ", 0.125),
        ("100%", 1.0),
        (0.3, 0.3),
        ("0.3", 0.3),
        (None, None),
    ],
)
def test_size_is_in_bytes_or_a_share_of_the_disk(text, meant):
    size = Settings(cache_size=text).cache_size
    assert size == meant
    assert type(size) is type(meant)


def test_directory_is_absolute_and_knows_home(monkeypatch):
    assert Settings(cache_dir="~/data").cache_dir == Path.home() / "data"
    assert Settings(cache_dir="data").cache_dir == Path.cwd() / "data"
    monkeypatch.delenv("ASYNCDS_CACHE_DIR")
    assert Settings().cache_dir.is_relative_to(Path.home())


@pytest.mark.parametrize("place", [os.environ.update, lambda variables: env_file(**variables)])
def test_secrets_are_masked_and_never_pickled(monkeypatch, place):
    canaries = {variable: f"canary-of-{field}" for field, variable in SECRETS.items()}
    for variable in canaries:
        monkeypatch.setenv(variable, "")  # registers the variable to be restored
    place(canaries)
    settings = Settings()
    assert sorted(revealed(settings).values()) == sorted(canaries.values())
    for shown in (repr(settings), str(settings), pickle.dumps(settings).decode("latin-1"), settings.model_dump_json()):
        assert "canary" not in shown


def test_unpickled_has_the_same_values_and_the_secrets_of_its_process(monkeypatch):
    env_file(AWS_SECRET_ACCESS_KEY="from-file", AWS_ACCESS_KEY_ID="from-file", ASYNCDS_RETRIES="7")
    settings = Settings(concurrency=3, cache_size="50%")
    raw = pickle.dumps(settings)
    monkeypatch.setenv("ASYNCDS_CONCURRENCY", "99")
    monkeypatch.setenv("AWS_REGION", "new")
    elsewhere = Path("elsewhere")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    twin = pickle.loads(raw)
    assert (twin.concurrency, twin.cache_size, twin.retries, twin.region) == (3, 0.5, 7, None)
    assert revealed(twin) == {"access_key": "from-file", "secret_key": "from-file"}
    assert twin == settings


def test_environment_is_never_written():
    env_file(AWS_ACCESS_KEY_ID="key", ASYNCDS_CONCURRENCY="5", UNRELATED="x")
    before = dict(os.environ)
    pickle.loads(pickle.dumps(Settings(region="here")))
    assert dict(os.environ) == before


def test_unknown_variable_gets_a_warning_and_unknown_argument_is_rejected(monkeypatch):
    monkeypatch.setenv("ASYNCDS_CONCURENCY", "5")
    env_file(MNIST_BUCKET_NAME="mnist", ASYNCDS_NONSENSE="1")
    with pytest.warns(UserWarning, match="is no variable") as warned:
        assert Settings().concurrency == "auto"
    first, second = (str(warning.message) for warning in warned)
    assert first == "ASYNCDS_CONCURENCY is no variable of asyncds: did you mean 'ASYNCDS_CONCURRENCY'?"
    assert all(
        f"ASYNCDS_{name.upper()}" in second for name in ("NONSENSE", *Options.__annotations__) if name != "env_file"
    )
    assert "ASYNCDS_ENV_FILE" not in second


def test_unknown_argument_is_rejected():
    with pytest.raises(ConfigurationError, match="'concurency': did you mean 'concurrency'"):
        Settings(concurency=5)
    with pytest.raises(ConfigurationError) as caught:
        Settings(nonsense=5)
    assert all(name in str(caught.value) for name in ("'nonsense'", *Options.__annotations__))


@pytest.mark.parametrize("size", ["100%", "50%", "1B", 1, 1.0])
def test_size_survives_a_pickle(size):
    settings = Settings(cache_size=size)
    again = pickle.loads(pickle.dumps(settings)).cache_size
    assert (again, type(again)) == (settings.cache_size, type(settings.cache_size))


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Settings().concurrency = 3


def test_with_defaults_changes_only_what_nobody_has_set(monkeypatch):
    monkeypatch.setenv("ASYNCDS_RETRIES", "7")
    settings = Settings(concurrency=3).with_defaults(concurrency=9, retries=9, timeout=9.0)
    assert (settings.concurrency, settings.retries, settings.timeout) == (3, 7, 9.0)


def test_every_option_is_a_setting():
    assert Options.__annotations__.keys() - Settings.model_fields.keys() == {"env_file"}


def test_every_setting_is_in_the_table_of_the_documentation():
    document = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text()
    defaults = {name: field.default for name, field in Settings.model_fields.items() if field.default_factory is None}
    rows = []
    for setting in Settings().explained():
        default = defaults.get(setting.name)
        text = str(default).lower() if isinstance(default, bool) else default if default is None else f"{default}"
        shown = "" if text is None else f"`{text.removesuffix('.0')}`"
        variables = ", ".join(f"`{variable}`" for variable in setting.variables)
        rows.append(f"| {variables} | {shown} | {setting.description} |")
    assert re.findall(r"^\| `.*$", document, re.MULTILINE) == rows, "\n".join(["the table has to be:", *rows])


def test_names_of_fields_are_no_variables_where_others_are(monkeypatch):
    monkeypatch.setenv("ASYNCDS_ENDPOINT", "http://elsewhere:9000")
    monkeypatch.setenv("ASYNCDS_SECRET_KEY", "canary")
    with pytest.warns(UserWarning, match="is no variable of asyncds"):
        settings = Settings()
    assert (settings.endpoint, settings.secret_key) == (None, None)
    assert "canary" not in str(settings.explained())
