"""JSON sent to a service, several requests at a time, again where that can help.

Only the standard library: one connection a request, no proxies, no redirects.
"""

import datetime
import email.utils
import http.client
import io
import json
import math
import random
import socket
import ssl
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from fastrl.rewards._secret import key_from_environment, without_key
from fastrl.rewards._transport import (
    BadStatus,
    ConnectionFailed,
    RequestError,
    TimedOut,
    TooLarge,
    Transport,
    check_transport,
    parts_of,
)

_TRY_AGAIN = {408, 429}  # and from 500 on
_SHOWN = 300  # characters of a server's message in ours
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Reply:
    """What came of one request: a body or an error, and how often it was sent again."""

    body: bytes | None
    error: RequestError | None
    retries: int


class JSONClient:
    """Sends bodies to one address with POST.

    Args:
        owner: whose requests these are, for messages.
        url: http or https; without user and password.
        transport: how.
    Raises:
        ValueError: url or transport cannot be used.
    """

    def __init__(self, owner: str, url: str, transport: Transport) -> None:
        check_transport(owner, transport)
        self.owner, self.transport = owner, transport
        self._parts = parts_of(owner, url)
        # Without the query, which may hold what nobody else should see.
        self.address = self._parts._replace(query="", fragment="").geturl()
        self.jitter = random.Random().random

    def post(self, bodies: Sequence[Any]) -> Generator[tuple[int, Reply], None, None]:
        """Send all; each one's index and reply, as they come.

        Where the iterator is closed early, no further request is made.

        Raises:
            ValueError: the key is not in the environment.
            TypeError: a body is not JSON.
        """
        encoded = [self._encoded(body) for body in bodies]
        if not encoded:
            return
        name = self.transport.key_variable
        run = _Run(self, None if name is None else key_from_environment(name, self.owner))
        pool = ThreadPoolExecutor(min(self.transport.concurrency, len(encoded)))
        try:
            indices = {pool.submit(run.ask, body): i for i, body in enumerate(encoded)}
            for future in as_completed(indices):
                yield indices[future], future.result()
        finally:
            run.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _encoded(self, body: Any) -> bytes:
        try:
            return json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{self.owner}: expected prompts, completions and columns that JSON knows, got "
                f"{error}. Name only columns of texts, finite numbers, bools, lists and dicts."
            ) from error

    def connection(self, timeout: float) -> http.client.HTTPConnection:
        """A new one, not yet open."""
        kind = (
            http.client.HTTPSConnection
            if self._parts.scheme == "https"
            else http.client.HTTPConnection
        )
        # Without a port http.client looks for one in the address, and finds some in an IPv6 one.
        port = self._parts.port or kind.default_port
        return kind(str(self._parts.hostname), port, timeout=timeout)

    def target(self) -> str:
        """Path and query."""
        path = self._parts.path or "/"
        return f"{path}?{self._parts.query}" if self._parts.query else path


class _Run:
    """The requests of one call; they share its deadline, and the pause a server asks for."""

    def __init__(self, client: JSONClient, key: str | None) -> None:
        self.client, self.transport, self._key = client, client.transport, key
        limit = self.transport.deadline
        self.end = math.inf if limit is None else time.monotonic() + limit
        self.not_before = -math.inf
        self.stop = threading.Event()

    def ask(self, body: bytes) -> Reply:
        """Send until there is an answer, or nothing that could help."""
        attempt, error = 0, None
        while True:
            pause = self.not_before - time.monotonic()
            if error is not None:
                pause = max(pause, self._backoff(attempt))
            if time.monotonic() + max(pause, 0.0) >= self.end:
                return Reply(None, error or self._late("before it was sent"), attempt)
            if self.stop.wait(max(pause, 0.0)):
                return Reply(None, error or self._late("before it was broken off"), attempt)
            attempt += error is not None
            answer = self._attempt(body)
            if isinstance(answer, bytes):
                return Reply(answer, None, attempt)
            error = answer
            wanted = error.retry_after or 0.0
            too_long = wanted > self.transport.max_wait
            if not error.may_help_again or too_long or attempt == self.transport.retries:
                return Reply(None, error, attempt)
            self.not_before = max(self.not_before, time.monotonic() + wanted)

    def _backoff(self, attempt: int) -> float:
        seconds = self.transport.backoff * 2.0 ** min(attempt, 60)
        return min(seconds, self.transport.max_wait) * (0.5 + 0.5 * self.client.jitter())

    def _attempt(self, body: bytes) -> bytes | RequestError:
        """The answer, or why there is none.

        Errors are returned, not raised, so that none has a cause or a frame that knows the key.
        """
        end = min(self.end, time.monotonic() + self.transport.timeout)
        try:
            return self._exchange(body, end)
        except TimeoutError:
            return self._late(f"within {self.transport.timeout} s")
        except ssl.SSLCertVerificationError as error:
            return ConnectionFailed(self._message("a certificate to trust", error))
        except (OSError, http.client.HTTPException) as error:
            message = self._message("an answer", error)
            return ConnectionFailed(message, may_help_again=True)

    def _exchange(self, body: bytes, end: float) -> bytes | RequestError:
        connection = self.client.connection(_left(end))
        connection.response_class = lambda sock, **options: http.client.HTTPResponse(  # type: ignore
            _TimedSocket(sock, end),  # type: ignore[arg-type]
            **options,
        )
        try:
            connection.connect()
            connection.sock.settimeout(_left(end))
            connection.request("POST", self.client.target(), body, self._headers())
            connection.sock.settimeout(_left(end))
            with connection.getresponse() as response:
                return self._answer(response)
        finally:
            connection.close()

    def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/json", **(self.transport.headers or {})}
        headers |= {"Content-Type": "application/json", "Connection": "close"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        return headers

    def _answer(self, response: http.client.HTTPResponse) -> bytes | RequestError:
        limit, status = self.transport.max_bytes, response.status
        if not 200 <= status < 300:
            return self._bad_status(response)
        chunks, size = [], 0
        while size <= limit and (response.length or 0) <= limit:
            chunk = response.read(_CHUNK)
            if not chunk:
                break
            chunks.append(chunk)
            size += len(chunk)
        else:
            return TooLarge(self._message(f"at most {limit} bytes", "more"), status=status)
        if response.length:  # with a size to read, http.client takes a body cut short as whole
            raise http.client.IncompleteRead(b"", response.length)
        return b"".join(chunks)

    def _bad_status(self, response: http.client.HTTPResponse) -> RequestError:
        status = response.status
        got = f"{status} {response.reason}"
        if 300 <= status < 400:
            got += ", and redirects are not followed"
        else:
            got += f": {response.read(_CHUNK).decode('utf-8', 'replace')}"
        return BadStatus(
            self._message("status 200", got),
            status=status,
            may_help_again=status in _TRY_AGAIN or status >= 500,
            retry_after=_retry_after(response.headers.get("Retry-After")),
        )

    def _late(self, when: str) -> TimedOut:
        message = self._message("an answer", f"none {when}")
        return TimedOut(message, may_help_again=True)

    def _message(self, wanted: str, got: object) -> str:
        shown = str(got) or type(got).__name__
        shown = " ".join(without_key(shown, self._key).split())[:_SHOWN]
        return (
            f"{self.client.owner}: expected {wanted} from {self.client.address}, got {shown}. "
            "See whether the service runs, at this address, and with this key."
        )


class _TimedSocket:
    """A socket whose reads share one end in time, so that a slow drip ends as well."""

    def __init__(self, sock: socket.socket, end: float) -> None:
        self._sock, self._end = sock, end

    def makefile(self, mode: str) -> io.BufferedReader:
        """What http.client reads from."""
        return io.BufferedReader(_TimedReader(self._sock, self._end))


class _TimedReader(io.RawIOBase):
    def __init__(self, sock: socket.socket, end: float) -> None:
        self._sock, self._end = sock, end
        self._raw = sock.makefile("rb", buffering=0)  # keeps the socket open

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left(self._end))
        return self._raw.readinto(buffer)  # type: ignore[attr-defined]

    def close(self) -> None:
        self._raw.close()
        super().close()


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _retry_after(value: str | None) -> float | None:
    """Seconds from now, of a header with seconds or a date; None where it is neither."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.timezone.utc)
    return max(0.0, (when - datetime.datetime.now(datetime.timezone.utc)).total_seconds())
