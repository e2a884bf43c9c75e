"""The errors: rebuilt from one string by the DataLoader, pickled between processes, caught by their built-in bases."""

import pickle

import pytest

from asyncds import errors
from asyncds.errors import AsyncdsError, ConfigurationError, StoreError

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, AsyncdsError)]
BUILT_IN = {
    "AccessDenied": PermissionError,
    "BucketNotFound": FileNotFoundError,
    "CacheError": OSError,
    "ConfigurationError": ValueError,
    "DatasetClosed": RuntimeError,
    "DeadlineExceeded": TimeoutError,
    "EmptyDataset": ValueError,
    "EndpointUnreachable": ConnectionError,
    "ObjectNotFound": FileNotFoundError,
    "RankLost": RuntimeError,
    "StoreError": OSError,
}


@pytest.mark.parametrize("kind", CLASSES)
def test_class_is_rebuilt_from_its_message_alone(kind):
    message = "s3://bucket/key: 503 SlowDown after 4 attempts"
    assert str(kind(message)) == message
    rebuilt = kind(str(kind(message)))
    assert (type(rebuilt), str(rebuilt)) == (kind, message)


@pytest.mark.parametrize("kind", CLASSES)
def test_class_pickles_with_its_message_and_remedy(kind):
    error = kind("s3://bucket/ключ\n").because("try again")
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), str(twin), twin.remedy) == (kind, "s3://bucket/ключ\n", "try again")


@pytest.mark.parametrize("kind", CLASSES)
def test_dataloader_can_show_and_rebuild_it(kind):
    assert not issubclass(kind, KeyError), "torch prints a KeyError's message through repr"
    assert not hasattr(kind("text"), "message"), "torch would rebuild it with message=…"


def test_all_is_complete_and_sorted():
    assert errors.__all__ == sorted(kind.__name__ for kind in CLASSES)


@pytest.mark.parametrize(("name", "base"), BUILT_IN.items())
def test_built_in_base_catches_it(name, base):
    with pytest.raises(base):
        raise getattr(errors, name)("text")


def test_all_that_a_store_answers_is_caught_as_one():
    told = {"AccessDenied", "BucketNotFound", "ObjectNotFound", "ObjectChanged", "EndpointUnreachable"}
    told |= {"EndpointUntrusted", "TransferFailed", "DeadlineExceeded", "StoreError"}
    assert {kind.__name__ for kind in CLASSES if issubclass(kind, StoreError)} == told


def test_only_what_may_pass_is_transient():
    assert {kind.__name__ for kind in CLASSES if kind.transient} == {"EndpointUnreachable", "TransferFailed"}


def test_remedy_belongs_to_the_one_error_it_was_set_on():
    assert ConfigurationError("a").because("do this").remedy == "do this"
    assert ConfigurationError("b").remedy == ConfigurationError.remedy == ""


@pytest.mark.parametrize("kind", CLASSES)
def test_exit_code_tells_wrong_use_from_the_rest(kind):
    assert kind.exit_code == (2 if kind is ConfigurationError else 1)
