"""Everything that asyncds raises, sorted by what the caller can do about it.

    AsyncdsError
    ├── ConfigurationError (ValueError)            correct the call, the variable or the URI it names
    │   └── EmptyDataset                           the prefix or the filter leaves no object
    ├── CacheError (OSError)                       choose a cache directory that can be used
    ├── DatasetClosed (RuntimeError)               do not use a dataset after close()
    ├── RankLost (RuntimeError)                    look at what the rank that has ended says
    └── StoreError (OSError)                       what the store, or the way to it, answered
        ├── AccessDenied (PermissionError)         check the credentials and the bucket's policy
        ├── BucketNotFound (FileNotFoundError)     check the bucket's name and the endpoint
        ├── ObjectNotFound (FileNotFoundError)     list the prefix again
        ├── ObjectChanged                          list the prefix again, with refresh
        ├── EndpointUnreachable (ConnectionError)  check the host, the port and the network; retried
        ├── EndpointUntrusted                      check the host's name, its certificate and AWS_CA_BUNDLE
        ├── TransferFailed                         the store or the network is ill; retried
        └── DeadlineExceeded (TimeoutError)        no complete answer in time, whatever was tried

Every class is rebuilt from its message alone, because the DataLoader re-raises a worker's error as
`type(error)(message)`. No message, attribute or cause holds a credential.
"""

__all__ = [
    "AccessDenied",
    "AsyncdsError",
    "BucketNotFound",
    "CacheError",
    "ConfigurationError",
    "DatasetClosed",
    "DeadlineExceeded",
    "EmptyDataset",
    "EndpointUnreachable",
    "EndpointUntrusted",
    "ObjectChanged",
    "ObjectNotFound",
    "RankLost",
    "StoreError",
    "TransferFailed",
]


class AsyncdsError(Exception):
    """Base of all errors of asyncds. `exit_code` is what the command line exits with."""

    exit_code = 1
    transient = False
    """Whether the same request may succeed when it is sent again."""
    remedy = ""
    """What to do about it: appended to the message once no further attempt will be made."""
    retry_after = 0.0
    """Seconds that the store asks to wait for before the next attempt."""

    def because(self, remedy: str) -> "AsyncdsError":
        """Set the remedy of this one error, and return it for `raise`."""
        self.remedy = remedy
        return self


class ConfigurationError(AsyncdsError, ValueError):
    """An argument, a variable or a URI that cannot mean anything."""

    exit_code = 2


class EmptyDataset(ConfigurationError):
    """Nothing is there to train from: no object under the prefix, or none that passes the filter."""

    exit_code = 1


class CacheError(AsyncdsError, OSError):
    """The cache directory cannot be used."""


class DatasetClosed(AsyncdsError, RuntimeError):
    """The dataset, or what it shares with others, was closed."""


class RankLost(AsyncdsError, RuntimeError):
    """Another rank of the job, which lists for all, has ended, or the store by which ranks find each other has."""


class StoreError(AsyncdsError, OSError):
    """The store answered with an error that has no class of its own."""


class AccessDenied(StoreError, PermissionError):
    """401 or 403: wrong or missing credentials, or a policy that forbids the request."""


class BucketNotFound(StoreError, FileNotFoundError):
    """The bucket does not exist at this endpoint."""


class ObjectNotFound(StoreError, FileNotFoundError):
    """The key does not exist, or does not any more."""

    remedy = "it was deleted after the listing, or the URI is wrong: list the prefix again"


class ObjectChanged(StoreError):
    """The object is not the version that the manifest names."""

    remedy = "it was overwritten after the listing: create the dataset again, with refresh=True for given URIs"


class EndpointUnreachable(StoreError, ConnectionError):
    """No connection: refused, unknown host, or no route."""

    transient = True
    remedy = "check that the server runs, and the host and port in AWS_ENDPOINT_URL or MINIO_URL"


class EndpointUntrusted(StoreError):
    """The certificate is not that of the host, has expired, or comes from an authority that is not known here."""


class TransferFailed(StoreError):
    """A server error, a broken connection, or a body that is not what was announced."""

    transient = True


class DeadlineExceeded(StoreError, TimeoutError):
    """The object did not arrive within its deadline."""
