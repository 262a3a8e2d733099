"""How commands speak to a terminal."""

from rich.console import Console


def say(console: Console, text: str) -> None:
    """A text as it is: without markup, and with lines that the terminal may cut itself."""
    console.print(text, markup=False, soft_wrap=True)
