"""What botocore logs at DEBUG, without the secrets in it: it prints requests with all of their headers, and answers."""

import logging
import re

__all__ = ["mask", "mask_logs"]

_LOGGERS = [
    f"{package}.{module}"
    for package in ("botocore", "aiobotocore")
    for module in ("auth", "awsrequest", "client", "credentials", "endpoint", "httpsession", "parsers", "utils")
]
# By their names, not by the values that this process holds: those of a role are others each hour, and who assumes one
# gets them in an answer. The value is quoted, as in a dictionary or JSON, or ends with its word, line or element.
_NAMED = re.compile(
    r"((?:security-token|authorization|customer-?key|secret-?access-?key|session-?token|identity-?token|access-?token"
    r"|refresh-?token|bearer[-_]token|client-?secret|saml-?assertion)[\"']?\s*[:=>]\s*)"
    r"(?:b?([\"']).*?\2|[^\s<&,}]+)",
    re.IGNORECASE,
)


def mask(text: str) -> str:
    """Return the text with `***` in place of each value that stands behind a secret's name."""
    return _NAMED.sub(r"\1***", text)


def _mask_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = mask(record.getMessage()), ()
    return True


def mask_logs() -> None:
    """Have botocore's loggers mask what they print, for all handlers, from now on. A second time it does nothing.

    A logger asks its filters for what it prints only, so that this costs nothing at the usual levels.
    """
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_mask_record)
