"""How requests are made, what may go wrong with them, and what is checked before."""

import math
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass

from fastrl.rewards._arguments import check_whole
from fastrl.rewards._secret import check_key_variable

_OUR_HEADERS = {"content-type", "content-length", "connection", "host", "transfer-encoding"}
_OF_KEYS = ("auth", "key", "token", "secret", "cookie", "password")  # in a header's name
_HEADER_VALUE = re.compile(r"[ -~]*")

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class RequestError(RuntimeError):
    """A request that got no answer; no key is in its message.

    Attributes:
        status: the HTTP status, or None.
        may_help_again: whether the same request may succeed later.
        retry_after: seconds that the server asked for, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        may_help_again: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.may_help_again = may_help_again
        self.retry_after = retry_after


class ConnectionFailed(RequestError):
    """No connection, or it ended before the answer did."""


class TimedOut(RequestError):
    """The whole answer was not there in time."""


class BadStatus(RequestError):
    """The server answered with a status other than 2xx."""


class TooLarge(RequestError):
    """The answer is longer than allowed."""


@dataclass(frozen=True)
class Transport:
    """How requests are made.

    Attributes:
        concurrency: requests under way at a time, at most.
        timeout: seconds for each request, from the connection to the last byte of the answer.
        retries: further requests after the first, at most.
        backoff: seconds before the first of them; twice as many before each next one, times a
            random number in [0.5, 1].
        max_wait: seconds before a retry, at most; a server that asks for more gets none.
        deadline: seconds for all requests of a call together, retries included; None: any.
        max_bytes: of an answer.
        headers: sent with each request; no keys.
        key_variable: the environment variable with the key, sent as a bearer token; or None.
    """

    concurrency: int = 4
    timeout: float = 30.0
    retries: int = 4
    backoff: float = 0.5
    max_wait: float = 60.0
    deadline: float | None = None
    max_bytes: int = 1 << 24
    headers: Mapping[str, str] | None = None
    key_variable: str | None = None


def parts_of(owner: str, url: str) -> urllib.parse.SplitResult:
    """Raises ValueError unless url is a plain http or https address."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_good = is_good and parts.username is None and parts.port != 0
        is_good = is_good and url.isascii() and url.isprintable() and " " not in url
        is_good = is_good and bool(str(parts.hostname).encode("idna"))
    except ValueError:
        is_good = False
    if not is_good:
        raise ValueError(
            f"{owner}: expected an address http://host/path or https://host/path, without user "
            "and password, got another, which is not shown. Pass such a one; a key comes from "
            "the environment (key_variable)."
        )
    return parts._replace(fragment="")


def check_transport(owner: str, transport: Transport) -> None:
    """Raises ValueError where it cannot be used."""
    for name, least in (("concurrency", 1), ("retries", 0), ("max_bytes", 1)):
        check_whole(owner, name, getattr(transport, name), least)
    for name in ("timeout", "backoff", "max_wait", "deadline"):
        value = getattr(transport, name)
        if name == "deadline" and value is None:
            continue
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise ValueError(
                f"{owner}: expected {name} above 0 seconds and finite, got {value!r}. Pass seconds."
            )
    check_key_variable(transport.key_variable, owner)
    _check_headers(owner, transport.headers or {})


def _check_headers(owner: str, headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        are_texts = isinstance(name, str) and isinstance(value, str)
        if not (are_texts and _HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value)):
            raise ValueError(
                f"{owner}: expected headers of names and texts in printable ASCII, got something "
                "else, which is not shown. Encode it."
            )
    refused = sorted(name for name in map(str.lower, headers) if _is_refused(name))
    if refused:
        raise ValueError(
            f"{owner}: expected headers without keys and without those that are set anyway, got "
            f"{refused}. A key comes from the environment: pass the name of its variable as "
            "key_variable."
        )


def _is_refused(name: str) -> bool:
    return name in _OUR_HEADERS or any(part in name for part in _OF_KEYS)
