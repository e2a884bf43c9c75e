"""Connection: which endpoint, whose keys, and the message for what cannot be meant."""

import pickle

import pytest

from asyncds.errors import ConfigurationError
from asyncds.settings import Settings
from asyncds.store import Connection

AWS = {"AWS_ACCESS_KEY_ID": "aws-key", "AWS_SECRET_ACCESS_KEY": "aws-secret"}
MINIO = {"MINIO_ACCESS_KEY": "minio-key", "MINIO_SECRET_KEY": "minio-secret"}
LOCAL_URL = {"AWS_ENDPOINT_URL": "http://localhost:9000"}
MINIO_URL = {"MINIO_URL": "play.example:9000"}

DECISIONS = [  # variables, arguments; family, endpoint, access key
    ({}, {}, ("AWS", None, None)),
    (AWS, {}, ("AWS", None, "aws-key")),
    (MINIO, {}, ("AWS", None, None)),
    (MINIO | MINIO_URL, {}, ("MINIO", "https://play.example:9000", "minio-key")),
    (MINIO_URL, {}, ("MINIO", "https://play.example:9000", None)),
    (AWS | MINIO | MINIO_URL, {}, ("AWS", None, "aws-key")),
    (MINIO | MINIO_URL | {"AWS_PROFILE": "me"}, {}, ("AWS", None, None)),
    (AWS | LOCAL_URL | MINIO | MINIO_URL, {}, ("AWS", "http://localhost:9000", "aws-key")),
    (LOCAL_URL | MINIO | MINIO_URL, {}, ("AWS", "http://localhost:9000", None)),
    (LOCAL_URL | MINIO, {}, ("AWS", "http://localhost:9000", None)),
    (LOCAL_URL | AWS, {"endpoint": "http://other:1/"}, ("AWS", "http://other:1", "aws-key")),
    (AWS | MINIO | MINIO_URL, {"endpoint": "https://play.example:9000"}, ("MINIO", None, "minio-key")),
    (AWS | MINIO | MINIO_URL, {"endpoint": "https://other.example"}, ("AWS", None, "aws-key")),
    (MINIO | MINIO_URL, {"endpoint": "https://other.example"}, ("AWS", None, None)),
    (MINIO, {"endpoint": "http://minio:9000"}, ("MINIO", None, "minio-key")),
    (LOCAL_URL | MINIO, {"endpoint": "http://localhost:9000"}, ("AWS", None, None)),
    (MINIO, {"endpoint": "https://s3.eu-west-1.amazonaws.com"}, ("AWS", None, None)),
    (AWS, {"profile": "me"}, ("AWS", None, None)),
    (MINIO, {"endpoint": "http://minio:9000", "profile": "me"}, ("AWS", None, None)),
    (AWS | LOCAL_URL, {"unsigned": True}, ("AWS", "http://localhost:9000", None)),
]


def resolve(monkeypatch, variables, **arguments):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Connection.resolve(Settings(), **arguments)


def test_two_servers_are_told_apart_and_the_same_one_twice_is_no_contradiction(monkeypatch):
    same = {"AWS_ENDPOINT_URL": "https://minio.example:9000", "MINIO_URL": "minio.example:9000"}
    assert resolve(monkeypatch, same).endpoint == "https://minio.example:9000"
    with pytest.warns(UserWarning, match=r"MINIO_URL=other.example:9000 is not used: AWS_ENDPOINT_URL=https://minio"):
        assert resolve(monkeypatch, same | {"MINIO_URL": "other.example:9000"}).endpoint == same["AWS_ENDPOINT_URL"]


@pytest.mark.filterwarnings("ignore:MINIO_URL=.* is not used")
@pytest.mark.parametrize(("variables", "arguments", "expected"), DECISIONS)
def test_keys_of_one_family_never_meet_the_endpoint_of_the_other(monkeypatch, variables, arguments, expected):
    family, endpoint, key = expected
    connection = resolve(monkeypatch, variables, **arguments)
    given = arguments.get("endpoint", "").rstrip("/") or endpoint
    assert (connection.family, connection.endpoint, connection.access_key) == (family, given, key)
    secret = {"aws-key": "aws-secret", "minio-key": "minio-secret", None: None}
    assert connection.secret_key == secret[key]


def test_session_token_goes_with_its_keys_only(monkeypatch):
    token = {"AWS_SESSION_TOKEN": "token"}
    assert resolve(monkeypatch, AWS | token).session_token == "token"
    assert resolve(monkeypatch, {}, profile="me").session_token is None
    assert resolve(monkeypatch, {}, unsigned=True).session_token is None
    for name in AWS:
        monkeypatch.delenv(name)
    assert resolve(monkeypatch, MINIO | MINIO_URL).session_token is None


def test_profile_argument_comes_before_the_variable(monkeypatch):
    assert resolve(monkeypatch, {"AWS_PROFILE": "mine"}).profile == "mine"
    assert resolve(monkeypatch, {}, profile="yours").profile == "yours"


@pytest.mark.parametrize(("variables", "unsigned"), [(MINIO_URL, True), (MINIO_URL | MINIO, False), ({}, False)])
def test_only_a_minio_without_keys_is_read_anonymously_unasked(monkeypatch, variables, unsigned):
    assert resolve(monkeypatch, variables).unsigned is unsigned


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AWS_ACCESS_KEY_ID": "k"}, "AWS_SECRET_ACCESS_KEY is missing where AWS_ACCESS_KEY_ID is set"),
        ({"AWS_SECRET_ACCESS_KEY": "s"}, "AWS_ACCESS_KEY_ID is missing where AWS_SECRET_ACCESS_KEY is set"),
        (MINIO_URL | {"MINIO_ACCESS_KEY": "k"}, "MINIO_SECRET_KEY is missing where MINIO_ACCESS_KEY is set"),
        (MINIO_URL | {"MINIO_SECRET_KEY": "s"}, "MINIO_ACCESS_KEY is missing where MINIO_SECRET_KEY is set"),
    ],
)
def test_half_a_pair_of_keys_names_the_other_half(monkeypatch, variables, message):
    with pytest.raises(ConfigurationError) as caught:
        resolve(monkeypatch, variables)
    assert str(caught.value) == f"{message}: both have to be in the environment, or both in the .env file"


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000", "write http://localhost:9000"),
        ("AWS_ENDPOINT_URL", "10.0.0.1:9000", "write http://10.0.0.1:9000"),
        ("AWS_ENDPOINT_URL", "[::1]:9000", "write http://[::1]:9000"),
        ("AWS_ENDPOINT_URL", "minio", "write http://minio"),
        ("AWS_ENDPOINT_URL", "minio.svc:9000/", "write http://minio.svc:9000/"),
        ("AWS_ENDPOINT_URL", "//s3.example.com", "write https://s3.example.com"),
        ("AWS_ENDPOINT_URL", "s3.example.com:443", "write https://s3.example.com:443"),
        ("AWS_ENDPOINT_URL", "ftp://s3.example.com", "write https://s3.example.com"),
        ("AWS_ENDPOINT_URL", "http://[::1", "http:// or https:// URL"),
        ("MINIO_URL", "http://localhost:9000/", "write MINIO_URL=localhost:9000 and MINIO_SECURE=false"),
        ("MINIO_URL", "https://play.example", "write MINIO_URL=play.example and MINIO_SECURE=true"),
    ],
)
def test_scheme_missing_or_too_many_gets_the_right_value(monkeypatch, variable, value, remedy):
    with pytest.raises(ConfigurationError) as caught:
        resolve(monkeypatch, {variable: value})
    assert f"{variable}={value!r}" in str(caught.value)
    assert remedy in str(caught.value)


def test_endpoint_argument_is_called_what_it_is(monkeypatch):
    with pytest.raises(ConfigurationError, match=r"^endpoint='localhost:1' .* write http://localhost:1$"):
        resolve(monkeypatch, {}, endpoint="localhost:1")


def test_variable_for_s3_alone_is_called_what_it_is(monkeypatch):
    with pytest.raises(ConfigurationError, match=r"^AWS_ENDPOINT_URL_S3='localhost:1'"):
        resolve(monkeypatch, {"AWS_ENDPOINT_URL_S3": "localhost:1"})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_ENDPOINT_URL", "http://user:hunter2@localhost:9000"),
        ("AWS_ENDPOINT_URL", "user:hunter2@localhost:9000"),
        ("MINIO_URL", "user:hunter2@localhost:9000"),
        ("MINIO_URL", "http://user:hunter2@localhost:9000"),
    ],
)
def test_password_in_a_url_is_refused_and_not_shown(monkeypatch, variable, value):
    with pytest.raises(ConfigurationError) as caught:
        resolve(monkeypatch, {variable: value})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("secure", "scheme"), [(None, "https"), ("true", "https"), ("false", "http")])
def test_minio_is_secure_unless_told_otherwise(monkeypatch, secure, scheme):
    variables = {"MINIO_URL": "localhost:9000"} | ({} if secure is None else {"MINIO_SECURE": secure})
    assert resolve(monkeypatch, variables).endpoint == f"{scheme}://localhost:9000"


@pytest.mark.parametrize(
    ("variables", "argument", "style"),
    [({}, None, None), (LOCAL_URL, None, True), (MINIO_URL, None, True), (LOCAL_URL, False, False), ({}, True, True)],
)
def test_custom_endpoint_means_path_style_unless_told_otherwise(monkeypatch, variables, argument, style):
    assert resolve(monkeypatch, variables, path_style=argument).path_style is style


INSIDE = ["localhost", "127.0.0.1", "[::1]", "10.1.2.3", "192.168.0.9", "minio", "minio.svc", "nas.local"]


@pytest.mark.parametrize("host", INSIDE)
def test_plain_http_is_fine_inside(monkeypatch, host):
    assert resolve(monkeypatch, {"AWS_ENDPOINT_URL": f"http://{host}:9000"}).endpoint == f"http://{host}:9000"


@pytest.mark.parametrize("host", ["s3.example.com", "8.8.8.8", "[2001:4860:4860::8888]"])
def test_plain_http_to_a_public_host_warns(monkeypatch, host):
    with pytest.warns(UserWarning, match="plain http to a public host"):
        resolve(monkeypatch, {"AWS_ENDPOINT_URL": f"http://{host}:9000"})
    assert resolve(monkeypatch, {"AWS_ENDPOINT_URL": f"https://{host}"}).endpoint == f"https://{host}"


@pytest.mark.parametrize(
    ("endpoint", "identity"),
    [
        (None, "https://s3.amazonaws.com"),
        ("https://s3.eu-west-1.amazonaws.com", "https://s3.amazonaws.com"),
        ("http://LocalHost:9000/", "http://localhost:9000"),
        ("http://localhost:9001", "http://localhost:9001"),
        ("https://localhost:9000", "https://localhost:9000"),
        ("http://localhost:9000/one", "http://localhost:9000/one"),
        ("https://amazonaws.com.evil.example", "https://amazonaws.com.evil.example"),
    ],
)
def test_identity_tells_stores_apart(endpoint, identity):
    assert Connection("AWS", endpoint=endpoint).identity == identity


def test_region_argument_comes_before_the_variable(monkeypatch):
    assert resolve(monkeypatch, {"AWS_REGION": "eu-west-1"}).region == "eu-west-1"
    assert resolve(monkeypatch, {}, region="us-west-2").region == "us-west-2"


@pytest.mark.parametrize(
    ("variables", "named"),
    [(AWS, "AWS_ACCESS_KEY_ID"), (MINIO | MINIO_URL, "MINIO_ACCESS_KEY"), (AWS | MINIO_URL, "MINIO_URL is not used")],
)
def test_hint_names_the_keys_that_were_used(monkeypatch, variables, named):
    assert named in resolve(monkeypatch, variables).hint


@pytest.mark.parametrize(("variables", "key"), [(AWS | LOCAL_URL, "aws-key"), (MINIO | MINIO_URL, "minio-key")])
def test_pickled_connection_has_the_keys_of_the_process_it_is_in(monkeypatch, variables, key):
    connection = resolve(monkeypatch, variables | {"AWS_SESSION_TOKEN": "aws-token"})
    raw = pickle.dumps(connection)
    assert pickle.loads(raw) == connection
    assert not any(secret in raw for secret in (b"aws-key", b"aws-secret", b"aws-token", b"minio-key", b"minio-secret"))
    for name in AWS | MINIO:
        monkeypatch.delenv(name, raising=False)
    twin = pickle.loads(raw)
    assert (twin.endpoint, twin.family, twin.access_key, twin.secret_key) == (
        connection.endpoint,
        connection.family,
        None,
        None,
    )
    assert connection.access_key == key


def test_repr_shows_no_secret(monkeypatch):
    shown = repr(resolve(monkeypatch, AWS | {"AWS_SESSION_TOKEN": "aws-token"} | LOCAL_URL))
    assert "http://localhost:9000" in shown
    assert not any(secret in shown for secret in ("aws-key", "aws-secret", "aws-token"))


CONFIGURED = """
[profile one]
endpoint_url = http://localhost:1111
[profile two]
services = there
[services there]
s3 =
  endpoint_url = http://localhost:2222
[profile three]
endpoint_url = http://localhost:3333
ignore_configured_endpoint_urls = true
"""


@pytest.mark.parametrize(
    ("profile", "endpoint"), [("one", "http://localhost:1111"), ("two", "http://localhost:2222"), ("three", None)]
)
def test_endpoint_of_the_aws_configuration_is_known_to_the_cache(monkeypatch, tmp_path, profile, endpoint):
    (tmp_path / "config").write_text(CONFIGURED)
    connection = resolve(monkeypatch, {"AWS_CONFIG_FILE": str(tmp_path / "config")}, profile=profile)
    assert (connection.endpoint, connection.path_style) == (endpoint, endpoint and True)
    assert connection.identity == (endpoint or "https://s3.amazonaws.com")


@pytest.mark.parametrize("url", ["http://local host:9000", f"http://{'x' * 64}.example", "http://localhost:99999"])
def test_host_or_port_that_cannot_be_is_refused(monkeypatch, url):
    with pytest.raises(ConfigurationError, match="a host and port that can be"):
        resolve(monkeypatch, {}, endpoint=url)
