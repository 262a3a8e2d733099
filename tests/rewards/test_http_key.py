"""The key of a service: sent, taken from the environment alone, and shown nowhere."""

import json
import pickle
import traceback

import pytest
from misbehaving_server import ask, lengths, send, serving

from fastrl.rewards._transport import RequestError
from fastrl.rewards.http_reward import HTTPReward

QUICK = dict(timeout=5.0, retries=1, backoff=0.01, batch_size=2)
KEY = "sk-Proj/9f8e7d6c5b4a+39281706"


@pytest.fixture
def server():
    with serving(lengths) as server:
        yield server


def echo_status(number):
    return lambda handler, body: send(
        handler, number, json.dumps({"error": f"no such key {handler.headers['Authorization']}"})
    )


def echo_reason(handler, body):
    send(handler, 400, "", reason="bad " + handler.headers["Authorization"])


def echo_no_http(handler, body):
    handler.wfile.write(f"{handler.headers['Authorization']}\r\n\r\n".encode())


def echo_part(handler, body):
    send(handler, 400, f"your key begins with {KEY[:14]} and ends with {KEY[-10:].upper()}")


def echo_location(handler, body):
    send(handler, 302, "", Location="http://127.0.0.1/?" + KEY)


def echo_in_reward(handler, body):
    send(handler, 200, json.dumps({"rewards": [handler.headers["Authorization"]]}))


def echo_behind_much(handler, body):
    send(handler, 500, "x" * (300 - 12) + KEY)  # the message is cut within the key


ECHOES = [echo_status(n) for n in (400, 401, 500)]
ECHOES += [echo_reason, echo_no_http, echo_part, echo_location, echo_in_reward, echo_behind_much]


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("errors", ["none", "raise"])
def test_the_key_is_sent_and_shown_nowhere(
    server, monkeypatch, tmp_path, caplog, capfd, echo, errors
):
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    file = tmp_path / "cache.jsonl"
    reward = HTTPReward(
        server.url, key_variable="JUDGE_KEY", cache_file=file, errors=errors, **QUICK
    )
    server.script = [echo] * 2
    shown = []
    try:
        shown += [str(part) for part in ask(reward, ["a"])]
    except RequestError as error:
        assert error.__context__ is None and error.__cause__ is None
        shown += [str(error), repr(error), repr(vars(error)), *traceback.format_exception(error)]
        frames = traceback.TracebackException.from_exception(error, capture_locals=True)
        # The server runs in this process too, so only our own frames count.
        shown += [str(frame.locals) for frame in frames.stack if "/fastrl/" in frame.filename]
    server.script = []
    assert ask(reward, ["bb"])[0] == [2.0]
    assert all(h["Authorization"] == f"Bearer {KEY}" for _, h, _ in server.requests)
    shown += [repr(reward), repr(vars(reward)), caplog.text, *capfd.readouterr()]
    shown += [pickle.dumps(reward).decode("latin-1"), file.read_text()]
    for part in [KEY[i : i + 8].lower() for i in range(len(KEY) - 7)]:
        assert part not in "\n".join(shown).lower()


def test_keys_come_only_from_the_environment(server, monkeypatch):
    with pytest.raises(TypeError):
        HTTPReward(server.url, key=KEY)
    for call in (
        lambda: HTTPReward(server.url, key_variable=KEY),
        lambda: HTTPReward(server.url, headers={"authorization": f"Bearer {KEY}"}),
        lambda: HTTPReward(f"http://user:{KEY}@127.0.0.1/"),
    ):
        with pytest.raises(ValueError, match="HTTPReward: expected") as raised:
            call()
        assert KEY not in str(raised.value)
    reward = HTTPReward(server.url, key_variable="JUDGE_KEY", **QUICK)
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ValueError, match="environment variable JUDGE_KEY, got none"):
        ask(reward, ["a"])
    monkeypatch.setenv("JUDGE_KEY", "one two\r\nX-Other: three")
    with pytest.raises(ValueError, match="printable ASCII") as raised:
        ask(reward, ["a"])
    assert "three" not in str(raised.value) and server.requests == []
    monkeypatch.setenv("JUDGE_KEY", "k1")
    ask(reward, ["a"])
    monkeypatch.setenv("JUDGE_KEY", "k2")  # read for each call
    ask(reward, ["b"])
    assert [h["Authorization"] for _, h, _ in server.requests] == ["Bearer k1", "Bearer k2"]
