"""What botocore logs at DEBUG, without the secrets in it: it prints requests with all of their headers, and answers."""

import logging
import re
from collections.abc import Iterable
from urllib.parse import quote

__all__ = ["hide", "mask", "mask_logs", "said"]

_MODULES = "auth", "awsrequest", "client", "credentials", "endpoint", "httpsession", "parsers", "utils"
_LOGGERS = [f"{package}.{module}" for package in ("botocore", "aiobotocore") for module in _MODULES]
_LOGGERS.append("asyncds.retry")  # which shows what botocore has raised
# By their names, and not only by the values that this process holds: who assumes a role gets them in an answer. The
# value is quoted, as in a dictionary or JSON, or ends with its word, line or element.
_NAMED = re.compile(
    r"((?:security-token|authorization|customer-?key|secret-?access-?key|session-?token|identity-?token|access-?token"
    r"|refresh-?token|bearer[-_]token|client-?secret|saml-?assertion|signature)[\"']?\s*[:=>]\s*)"
    r"(?:b?([\"']).*?\2|AWS4-[^\r\n]*|[^\s<&,}]+)",
    re.IGNORECASE,
)


_ESCAPE = re.compile("%[0-9A-F]{2}")
_SHORTEST = 8  # letters of a secret that is looked for: a shorter one is in many a word
_LONGEST, _LOOKED_AT = 200, 20_000  # letters of what an answer says
_hidden: set[str] = set()


def hide(secrets: Iterable[str]) -> None:
    """Mask these values, too, under whatever name they turn up: a server may repeat what it was sent."""
    for secret in secrets:
        if len(secret) >= _SHORTEST and secret not in _hidden:
            quoted = {quote(secret), quote(secret, safe="")}
            _hidden.update(quoted, {_ESCAPE.sub(lambda escape: escape[0].lower(), text) for text in quoted}, {secret})


def mask(text: str) -> str:
    """Return the text with `***` in place of each value that stands behind a secret's name, or is known for one."""
    for secret in tuple(_hidden):  # which another thread may add to
        text = text.replace(secret, "***")
    return _NAMED.sub(r"\1***", text)


def said(text: object) -> str:
    """What an answer says, in a line of some words, and without secrets: who answers may be anybody."""
    whole = str(text)
    masked = mask(whole[:_LOOKED_AT])
    if len(whole) > _LOOKED_AT:  # amid a secret, perhaps
        masked = masked[: max(0, len(masked) - max(map(len, tuple(_hidden)), default=0))]
    letters = (letter if letter.isprintable() else " " for letter in masked[:_LONGEST])
    return " ".join("".join(letters).split())


def _mask_record(record: logging.LogRecord) -> bool:
    try:
        text = record.getMessage()
    except Exception:  # logging tells of arguments that do not fit, and goes on
        return True
    record.msg, record.args = mask(text), ()
    if record.exc_info:
        record.exc_text = mask(logging.Formatter().formatException(record.exc_info))
    return True


def mask_logs() -> None:
    """Have botocore's loggers mask what they print, for all handlers, from now on. A second time it does nothing.

    A logger asks its filters for what it prints only, so that this costs nothing at the usual levels.
    """
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_mask_record)
