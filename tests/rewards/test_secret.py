"""What hides a key in what others wrote."""

import base64
import json
import urllib.parse

import pytest

from fastrl.rewards._secret import without_key

KEY = 'ab"c/+d-efGHIJKLmnop'


@pytest.mark.parametrize(
    "written",
    [
        KEY,
        KEY.lower(),
        KEY[:8],
        KEY[5:14],
        urllib.parse.quote(KEY, safe=""),
        json.dumps(KEY)[1:-1],
        base64.b64encode(KEY.encode()).decode().rstrip("="),
    ],
)
def test_a_key_is_found_however_it_is_written(written):
    assert without_key(f"({written}) ({written})!", KEY) == "([key]) ([key])!"


def test_what_is_no_key_stays():
    said = "No such model: abc-def, aBcDeF and İstanbul"
    assert without_key(said, KEY) == said == without_key(said, None)
    assert without_key("short: k1, k2", "k1") == "short: [key], k2"
    assert without_key("İ " + KEY, KEY) == "İ [key]"
