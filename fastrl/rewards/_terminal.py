"""Asking a person in a terminal: keys as they are pressed, and texts that may hold anything."""

import codecs
import errno
import math
import os
import select
import sys
import time
import unicodedata
from collections.abc import Mapping
from typing import Any, TextIO

SIDE_BY_SIDE = 80  # columns of a terminal that has room for two texts
SIGNAL_SECONDS = 0.5  # the longest wait for a key in one go
_END, _ESCAPE = b"\x04", b"\x1b"
_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # the direction of writing


class Keys:
    """Answers from standard input: single keys of a terminal, lines of a pipe or a file.

    The terminal is as before after `with keys:`; Ctrl-C stays KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self._descriptor = sys.stdin.fileno()
        self.is_terminal = os.isatty(self._descriptor)
        self._read = b""
        self._has_ended = False
        self._before: list[Any] | None = None  # settings of the terminal

    def answer(self, *, single: bool = True, timeout: float | None = None) -> str | None:
        """The next key, or the next line without blanks around it.

        Args:
            single: a key is an answer; False: in a terminal a line is, too.
            timeout: seconds to wait; None: any time.
        Returns:
            None after the timeout.
        Raises:
            EOFError: there is nothing more.
        """
        is_key = single and self.is_terminal
        self._take_keys(is_key)
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            found = self._key() if is_key else self._line()
            if found is not None:
                return found
            if self._has_ended:
                raise EOFError("the end of standard input")
            left = math.inf if end is None else max(0.0, end - time.monotonic())
            # Not for long: a Ctrl-C just before the wait is noticed after it.
            if select.select([self._descriptor], [], [], min(left, SIGNAL_SECONDS))[0]:
                self._fill()
            elif left <= SIGNAL_SECONDS:
                return None

    def listen(self, *, single: bool) -> None:
        """Take keys one by one from now on, before a question invites any: Ctrl-D is one too."""
        self._take_keys(single and self.is_terminal)

    def put_back(self, line: str) -> None:
        """Let a line be the next answer again."""
        self._read = line.encode() + b"\n" + self._read

    def __enter__(self) -> "Keys":
        return self

    def __exit__(self, *_: object) -> None:
        self._take_keys(False)

    def _take_keys(self, one_by_one: bool) -> None:
        if one_by_one == (self._before is not None):
            return
        import termios
        import tty

        if one_by_one:
            self._before = termios.tcgetattr(self._descriptor)
            tty.setcbreak(self._descriptor, termios.TCSANOW)  # keys typed before stay
        else:
            assert self._before is not None
            try:
                termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)
            except termios.error as error:
                if error.args[0] != errno.EIO:  # the terminal is gone
                    raise
            self._before = None

    def _fill(self) -> None:
        try:
            data = os.read(self._descriptor, 4096)
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal that was closed
                raise
            data = b""
        self._read += data
        self._has_ended = not data

    def _key(self) -> str | None:
        if self._read.startswith(_ESCAPE):  # an arrow, or another key that is none of ours
            self._read = b""
        if self._read.startswith(_END):
            raise EOFError("Ctrl-D")
        for length in range(1, min(4, len(self._read)) + 1):  # bytes of a character in UTF-8
            try:
                key = self._read[:length].decode()
            except UnicodeDecodeError:
                continue
            self._read = self._read[length:]
            return key
        if len(self._read) >= 4:
            self._read = b""
        return None

    def _line(self) -> str | None:
        line, newline, rest = self._read.partition(b"\n")
        if not newline and not (self._has_ended and line):
            return None
        self._read = rest
        return line.decode(errors="replace").strip()


class Screen:
    """Shows texts to a person: with rich in a terminal with UTF-8, plain elsewhere.

    Args:
        file: None: standard output.
    Raises:
        ImportError: it is a terminal, and rich is not installed.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = sys.stdout if file is None else file
        # What rich draws with needs more than ASCII and the old encodings have.
        has_all = codecs.lookup(self._file.encoding or "utf-8").name == "utf-8"
        self._console: Any = _console(self._file) if has_all and self._file.isatty() else None

    def say(self, line: str) -> None:
        """A line about what goes on."""
        self._print(visible(line) + "\n")

    def ask(self, question: str) -> None:
        """A question whose answer follows on its line."""
        self._print(visible(question) + " ")

    def show(self, head: str, prompt: str, texts: Mapping[str, str]) -> None:
        """A prompt, and under their titles texts that continue it."""
        if self._console is not None:
            self._show_panels(head, prompt, texts)
            return
        blocks = {"prompt": prompt, **texts}
        lines = [f"\n[{head}]"]
        for title, text in blocks.items():
            lines += [f"{title}:", *(f"  {line}" for line in visible(text).split("\n"))]
        self._print("\n".join(lines) + "\n")

    def _show_panels(self, head: str, prompt: str, texts: Mapping[str, str]) -> None:
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        def panel(title: str, text: str) -> Any:
            return Panel(Text(self._printable(visible(text))), title=title, title_align="left")

        self._console.print(f"\n[{head}]", markup=False, style="dim")
        self._console.print(panel("prompt", prompt))
        panels = [panel(title, text) for title, text in texts.items()]
        if len(panels) > 1 and self._console.width >= SIDE_BY_SIDE:
            grid = Table.grid(expand=True)
            for _ in panels:
                grid.add_column(ratio=1)
            grid.add_row(*panels)
            panels = [grid]
        for each in panels:
            self._console.print(each)

    def _print(self, text: str) -> None:
        self._file.write(self._printable(text))
        self._file.flush()

    def _printable(self, text: str) -> str:
        encoding = self._file.encoding or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)


def visible(text: str) -> str:
    """Text that cannot steer a terminal: control characters become pictures or escapes."""
    return "".join(c if c in "\n\t" or not _steers(c) else _picture(c) for c in text)


def _steers(character: str) -> bool:
    return unicodedata.category(character) == "Cc" or character in _TURNS


def _picture(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}"


def _console(file: TextIO) -> Any:
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError(
            'label: expected the package rich, got none. Install it: pip install "fastrl[train]"'
        ) from error
    return Console(file=file, highlight=False)
