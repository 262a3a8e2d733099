"""HTTPReward against a local server that misbehaves, and what it sends, keeps and counts."""

import json
import threading
import time
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from misbehaving_server import (
    ask,
    close,
    drip,
    drip_headers,
    hang,
    huge,
    huge_and_says_so,
    lengths,
    no_http,
    serving,
    status,
    text,
    truncated,
    truncated_chunks,
)

from fastrl.rewards._requests import JSONClient, _retry_after, _Run
from fastrl.rewards._transport import (
    BadStatus,
    ConnectionFailed,
    TimedOut,
    TooLarge,
    Transport,
)
from fastrl.rewards.http_reward import HTTPReward

QUICK = dict(timeout=5.0, retries=1, backoff=0.01, batch_size=2)
KEY = "sk-Proj/9f8e7d6c5b4a+39281706"


@pytest.fixture
def server():
    with serving(lengths) as server:
        yield server


def counts(**some):
    return dict.fromkeys(("failures", "parse_errors", "retries", "cached"), 0) | some


def test_batches_go_out_and_rewards_come_back_in_order(server):
    reward = HTTPReward(server.url + "/score?v=1", columns="tag", headers={"X-A": "b"}, **QUICK)
    completions = ["a", "bb", "ccc", "dddd", "eeeee"]
    delays = {"a": 0.08, "ccc": 0.04, "eeeee": 0.0}
    server.answer = lambda body: time.sleep(delays[body["completions"][0]]) or lengths(body)
    rewards, metrics, said = ask(reward, completions, tag=list("12345"), other=[0] * 5)
    assert (rewards, metrics, said) == ([1.0, 2.0, 3.0, 4.0, 5.0], counts(), "")
    bodies = sorted((body for _, _, body in server.requests), key=lambda b: b["completions"][0])
    assert bodies[0] == {"prompts": ["p", "p"], "completions": ["a", "bb"], "tag": ["1", "2"]}
    assert [len(body["tag"]) for body in bodies] == [2, 2, 1]
    path, headers, _ = server.requests[0]
    assert path == "/score?v=1" and headers["X-A"] == "b" and "Authorization" not in headers
    with pytest.raises(ValueError, match="expected the column 'tag'"):
        ask(reward, ["a"])


def test_immediate_rewards_and_null(server):
    server.answer = lambda body: {"rewards": [[0.5] * len(i) for i in body["completion_ids"]]}
    reward = HTTPReward(server.url, immediate=True, **QUICK)
    assert reward(["p"] * 2, ["a", "b"], [[1, 2], [3]]) == [[0.5, 0.5], [0.5]]
    server.answer = lambda body: {"rewards": [None, [1, 2]]}
    assert reward(["q"] * 2, ["a", "b"], [[1, 2], [3, 4]]) == [None, [1.0, 2.0]]
    metrics = {}
    server.answer = lambda body: {"rewards": [[0.5, 0.5]]}  # a token too many
    assert reward(["q"], ["c"], [[1]], log_metric=metrics.__setitem__) == [None]
    assert metrics["http/parse_errors"] == 1


@pytest.mark.parametrize(
    "answer",
    [
        '{"rewards": [1.0',  # bad JSON
        "<html><body>Please log in</body></html>",
        "",
        "[1.0, 2.0]",
        '{"rewards": null}',
        '{"rewards": [1.0]}',  # one too few
        '{"rewards": [1.0, 2.0, 3.0]}',
        '{"rewards": [1.0, NaN]}',
        '{"rewards": [1.0, 1e999]}',
        '{"rewards": [1.0, 1' + "0" * 400 + "]}",
        '{"rewards": [1.0, "2.0"]}',
        '{"rewards": [1.0, true]}',
        '{"rewards": [1.0, [2.0]]}',
        "[" * 100_000,
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    ],
    ids=lambda answer: answer[:24],
)
def test_answers_that_cannot_be_read_are_no_reward_for_their_batch(server, answer):
    reward = HTTPReward(server.url, concurrency=1, **QUICK)
    server.script = [text(answer)]
    rewards, metrics, _ = ask(reward, ["a", "bb", "ccc"])
    assert rewards == [None, None, 3.0] and metrics == counts(parse_errors=2)
    assert ask(reward, ["a", "bb", "ccc"])[:2] == ([1.0, 2.0, 3.0], counts(cached=1))


@pytest.mark.parametrize(
    "behaviour, error",
    [
        (status(500), BadStatus),
        (status(503), BadStatus),
        (status(408), BadStatus),
        (status(429), BadStatus),
        (hang, TimedOut),
        (drip, TimedOut),
        (drip_headers, TimedOut),
        (close, ConnectionFailed),
        (truncated, ConnectionFailed),
        (truncated_chunks, ConnectionFailed),
        (no_http, ConnectionFailed),
    ],
    ids="500 503 408 429 hang drip drip_headers close truncated chunks no_http".split(),
)
def test_what_may_pass_is_tried_again_and_then_given_up(server, behaviour, error):
    # Long enough for what is answered at once, on a busy machine too.
    late = QUICK | {"timeout": 0.4} if error is TimedOut else QUICK
    reward = HTTPReward(server.url, **late)
    server.script = [behaviour]
    start = time.monotonic()
    assert ask(reward, ["a", "bb"])[:2] == ([1.0, 2.0], counts(retries=1))
    server.script = [behaviour, behaviour]
    rewards, metrics, said = ask(reward, ["ccc"])
    assert rewards == [None] and metrics == counts(failures=1, retries=1)
    assert "HTTPReward: expected" in said and "1 answers are missing" in said
    server.script = [behaviour, behaviour]
    with pytest.raises(error):
        ask(HTTPReward(server.url, errors="raise", **late), ["ccc"])
    assert time.monotonic() - start < 8  # 5 attempts; a drip would take 4 s each


def test_no_server_at_all(server):
    server.server_close()
    rewards, metrics, said = ask(HTTPReward(server.url, **QUICK), ["a"])
    assert rewards == [None] and metrics == counts(failures=1, retries=1) and "refused" in said


@pytest.mark.parametrize("number", [400, 403, 422])
def test_other_client_errors_are_not_tried_again(server, number):
    server.script = [status(number, "too\nlong")]
    rewards, metrics, said = ask(HTTPReward(server.url, **QUICK), ["a"])
    assert rewards == [None] and metrics == counts(failures=1) and f"{number} " in said
    assert "too long" in said and len(server.requests) == 1


@pytest.mark.parametrize("number", [301, 302, 307, 308, 401, 404])
def test_what_no_wait_mends_raises(server, monkeypatch, number):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(lengths) as other:
        server.script = [status(number, Location=other.url)]
        with pytest.raises(BadStatus, match=str(number)):
            ask(HTTPReward(server.url, key_variable="JUDGE_KEY", **QUICK), ["a"])
        assert other.requests == [] and len(server.requests) == 1


@pytest.mark.parametrize("behaviour", [huge, huge_and_says_so])
def test_large_answers_are_not_read(server, behaviour):
    server.script = [behaviour]
    reward = HTTPReward(server.url, max_bytes=100_000, errors="raise", **QUICK)
    with pytest.raises(TooLarge, match="at most 100000 bytes"):
        ask(reward, ["a"])
    assert len(server.requests) == 1


def test_the_server_says_how_long_to_wait(server):
    reward = HTTPReward(server.url, concurrency=1, max_wait=2.0, **QUICK)
    server.script = [status(429, Retry_After="1")]
    assert ask(reward, ["a", "bb"])[:2] == ([1.0, 2.0], counts(retries=1))
    first, second = server.times
    assert second - first >= 1.0
    server.script = [status(429, Retry_After="3")]
    assert ask(reward, ["ccc"])[:2] == ([None], counts(failures=1))


def test_retry_after_in_seconds_and_as_a_date():
    now = datetime.now(timezone.utc)
    assert _retry_after("7") == 7.0 and _retry_after(None) is None
    assert _retry_after("soon") is None and _retry_after("-1") is None
    later = format_datetime(now + timedelta(seconds=90), usegmt=True)
    assert 85 < _retry_after(later) <= 90
    assert _retry_after(format_datetime(now - timedelta(days=1), usegmt=True)) == 0.0


def test_the_wait_doubles_and_is_drawn_from_its_upper_half(server):
    reward = HTTPReward(server.url, backoff=0.04, max_wait=0.1, retries=3)
    client = reward._asker.client
    for draw, waits in ((0.0, [0.02, 0.04, 0.05, 0.05]), (1.0, [0.04, 0.08, 0.1, 0.1])):
        client.jitter = lambda draw=draw: draw
        run = _Run(client, None)
        assert [run._backoff(attempt) for attempt in range(4)] == pytest.approx(waits)
    server.script = [status(500)] * 3
    assert ask(reward, ["a"])[1] == counts(retries=3)
    waited = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert all(w >= wait for w, wait in zip(waited, [0.04, 0.08, 0.1], strict=True))


def test_the_deadline_ends_all(server):
    server.script = [hang] * 20
    reward = HTTPReward(
        server.url, timeout=5.0, deadline=0.3, retries=9, batch_size=1, concurrency=2
    )
    start = time.monotonic()
    rewards, metrics, _ = ask(reward, ["a", "bb", "ccc", "dddd"])
    assert rewards == [None] * 4 and metrics == counts(failures=4)
    assert time.monotonic() - start < 4 and len(server.requests) == 2


def test_requests_overlap_but_no_more_than_allowed(server):
    barrier = threading.Barrier(3, timeout=10.0)
    # None of three is answered before all three are there.
    server.answer = lambda body: barrier.wait() >= 0 and lengths(body)
    reward = HTTPReward(server.url, batch_size=1, concurrency=3, timeout=20.0, retries=0)
    completions = ["x" * i for i in range(12)]
    assert ask(reward, completions)[0] == [float(i) for i in range(12)]
    assert server.most_active == 3 and len(server.requests) == 12


def test_what_is_known_or_the_same_is_asked_once(server, tmp_path):
    file = tmp_path / "answers" / "cache.jsonl"
    reward = HTTPReward(server.url, cache_file=file, **QUICK)
    assert ask(reward, ["a", "bb", "a"])[:2] == ([1.0, 2.0, 1.0], counts(cached=1))
    assert [body["completions"] for _, _, body in server.requests] == [["a", "bb"]]
    assert ask(reward, ["bb", "ccc"])[:2] == ([2.0, 3.0], counts(cached=1))
    assert server.requests[-1][2]["completions"] == ["ccc"]
    # Another process; the last line was cut short when the one before was killed.
    with open(file, "ab") as lines:
        lines.write(b'{"key": "12')
    again = HTTPReward(server.url, cache_file=file, **QUICK)
    assert ask(again, ["a", "ccc", "dddd"])[:2] == ([1.0, 3.0, 4.0], counts(cached=2))
    third = HTTPReward(server.url, cache_file=file, **QUICK)
    assert ask(third, ["a", "dddd"])[:2] == ([1.0, 4.0], counts(cached=2))
    assert len(server.requests) == 3
    assert set(json.loads(file.read_text().splitlines()[0])) == {"key", "answer"}
    # Columns and prompts that are sent are part of the question.
    assert third(["q"], ["a"], [[1]]) == [1.0] and len(server.requests) == 4


def test_the_cache_is_bounded_and_can_be_left_out(server, tmp_path):
    small = HTTPReward(server.url, cache_size=2, **QUICK)
    ask(small, ["a", "bb", "ccc"])
    assert ask(small, ["bb"])[1] == counts(cached=1)  # now the one that was used last
    assert ask(small, ["dddd"])[1] == counts()
    assert ask(small, ["bb"])[1] == counts(cached=1) and ask(small, ["ccc"])[1] == counts()
    none = HTTPReward(server.url, cache_size=0, **QUICK)
    before = len(server.requests)
    assert ask(none, ["a", "a"])[:2] == ([1.0, 1.0], counts())
    assert server.requests[before][2]["completions"] == ["a", "a"]
    other = tmp_path / "notes.txt"
    other.write_text('{"key": "a", "an')  # of a run that was killed
    HTTPReward(server.url, cache_file=other, **QUICK)
    other.write_text("my notes\nand more\n")
    with pytest.raises(ValueError, match="expected cache_file with lines of key and answer"):
        HTTPReward(server.url, cache_file=other)


def test_answers_before_an_error_are_kept(server):
    reward = HTTPReward(server.url, errors="raise", concurrency=1, **QUICK | {"batch_size": 1})
    server.script = [text('{"rewards": [9.0]}'), status(400)]
    with pytest.raises(BadStatus):
        ask(reward, ["a", "bb", "ccc"])
    assert len(server.requests) <= 3
    assert ask(reward, ["a"])[:2] == ([9.0], counts(cached=1))


@contextmanager
def refused(message):
    with pytest.raises(ValueError, match="HTTPReward: expected " + message):
        yield


def test_bad_arguments_are_refused():
    for url in (
        "ftp://a/b",
        "localhost:80",
        "http://",
        "http://a b/",
        "http://a:99999/",
        "http://a..b/",
    ):
        with refused("an address"):
            HTTPReward(url)
    for name, value in (
        ("concurrency", 0),
        ("retries", -1),
        ("timeout", 0),
        ("deadline", float("inf")),
        ("backoff", -1.0),
        ("batch_size", 0),
        ("cache_size", -1),
        ("errors", "mask"),
    ):
        with refused(name):
            HTTPReward("http://a/", **{name: value})
    with pytest.raises(TypeError, match="that JSON knows"):
        HTTPReward("http://a/", columns=["x"])(["p"], ["c"], [[1]], x=[object()])


def test_addresses_without_a_port_and_of_ipv6():
    places = {
        "http://[::1]/rewards": ("::1", 80),
        "https://[::1]/rewards": ("::1", 443),
        "http://[::1]:8000/": ("::1", 8000),
        "https://judge.example/x": ("judge.example", 443),
    }
    for url, place in places.items():
        connection = JSONClient("HTTPReward", url, Transport()).connection(1.0)
        assert (connection.host, connection.port) == place


def test_headers_that_cannot_be_sent_or_may_hold_a_key_are_refused():
    for name, value in (("X\n", "a"), ("X", "a\r\nY: b"), ("X", "é"), ("", "a"), ("X", 3)):
        with refused("headers of names and texts"):
            HTTPReward("http://a/", headers={name: value})
    for name in ("Authorization", "X-Auth-Token", "Ocp-Apim-Subscription-Key", "Host"):
        with refused("headers without keys"):
            HTTPReward("http://a/", headers={name: "s3cret"})
