"""A local HTTP server that does, request by request, what a script says."""

import json
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[["Handler", Any], None]


class Handler(BaseHTTPRequestHandler):
    """Counts requests, and hands each to the next behaviour of the script."""

    server: "MisbehavingServer"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body))
            server.times.append(time.monotonic())
            behave = server.script.pop(0) if server.script else None
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        self.is_active = True
        try:
            if behave is None:
                answer = json.dumps(server.answer(body))
                self.leave()  # before the client has it, and asks again
                send(self, 200, answer)
            else:
                behave(self, body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up, as it should
        finally:
            self.leave()

    def leave(self):
        with self.server.lock:
            self.server.active -= self.is_active
            self.is_active = False

    do_GET = do_POST

    def log_message(self, *args):
        pass


class MisbehavingServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.script = answer, []
        self.requests, self.times = [], []
        self.active = self.most_active = 0
        self.lock, self.done = threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(answer):
    """A server that answers each request with the JSON of answer(body), but for its script."""
    server = MisbehavingServer(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.done.set()
        server.shutdown()
        thread.join()
        server.server_close()


def send(handler, status, text, *, reason=None, **headers):
    body = text.encode()
    handler.send_response(status, reason)
    handler.send_header("Content-Length", str(len(body)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def status(number, text="no", **headers) -> Behaviour:
    return lambda handler, body: send(handler, number, text, **headers)


def text(content) -> Behaviour:
    """Status 200 with these words."""
    return lambda handler, body: send(handler, 200, content)


def hang(handler, body):
    handler.server.done.wait(5)


def close(handler, body):
    handler.close_connection = True


def truncated(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"rewards": [1.0]}')


def truncated_chunks(handler, body):
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b'100\r\n{"rewards": [1.0]}')
    handler.close_connection = True


def no_http(handler, body):
    handler.wfile.write(b"hello, this is not HTTP\r\n\r\n")


def drip(handler, body):
    """A byte now and then: no single read ever takes long."""
    handler.send_response(200)
    handler.end_headers()
    _drip(handler, b'{"rewards": [' + b" " * 200)


def drip_headers(handler, body):
    _drip(handler, b"HTTP/1.0 200 OK\r\nX-Slow: " + b"a" * 200)


def _drip(handler, data):
    for byte in data:
        handler.wfile.write(bytes([byte]))
        if handler.server.done.wait(0.02):
            return


def huge(handler, body):
    """More than any client wants, without saying how much."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" " * 65536)


def huge_and_says_so(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", str(10**12))
    handler.end_headers()
    handler.wfile.write(b" " * 1000)


def lengths(body):
    return {"rewards": [len(completion) for completion in body["completions"]]}


def ask(reward, completions, **columns):
    """The rewards, the metrics, and the text of the warnings."""
    metrics = {}
    prompts = ["p"] * len(completions)
    ids = [[1]] * len(completions)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rewards = reward(prompts, completions, ids, log_metric=metrics.__setitem__, **columns)
    said = " ".join(str(warning.message) for warning in caught)
    return rewards, {name.split("/")[1]: int(n) for name, n in metrics.items()}, said
