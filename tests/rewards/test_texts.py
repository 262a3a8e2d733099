import pytest

from fastrl.rewards._lowercase import LowercaseReading
from fastrl.rewards._texts import prompt_text, text_of


def test_text_is_taken_as_it_is_and_out_of_messages():
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert text_of("a b") == prompt_text("a b") == "a b"
    assert text_of(chat[1:]) == "b"
    assert prompt_text(chat) == "a\nb"


def test_messages_of_tools_and_text_in_parts():
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    chat = [call, {"role": "tool", "content": "a"}, {"role": "assistant", "content": parts}]
    assert text_of(chat) == "abc" and prompt_text(chat) == "\na\nbc"


@pytest.mark.parametrize(
    "given",
    [[1, 2], 3, None, [{"role": "user"}], [{"content": None}], [{"content": [1]}]]
    + [[{"content": [*text, {"type": "image"}]}] for text in ([], [{"type": "text", "text": "a"}])],
)
def test_what_has_no_text_is_refused(given):
    with pytest.raises(TypeError, match="expected completions of text"):
        text_of(given)


class Kept:
    """A reading that keeps its text, as its score."""

    def __init__(self):
        self.text = ""

    def read(self, piece):
        self.text += piece

    def score(self):
        return self.text


@pytest.mark.parametrize("text", ["The Cat.", "\u039f\u03a3\u0391 \u039f\u03a3. X"])
def test_a_text_that_grows_has_the_lower_case_of_the_whole(text):
    """A capital sigma at the end of what has been read may not be at the end of its word."""
    reading = LowercaseReading(Kept)
    for end, piece in enumerate(text, 1):
        reading.read(piece)
        assert reading.score() == text[:end].lower()
