"""Numbers as text, and text as HTML."""

import html
import math
from typing import Any

# Controls, which HTML does not have, and lone surrogates, which UTF-8 does not have.
_HIDDEN = (*range(9), *range(11, 32), *range(127, 160), *range(0xD800, 0xE000))
_SHOWN = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _HIDDEN}


def escape(value: Any) -> str:
    """A value's text, safe in HTML's content and in quoted attributes."""
    return html.escape(str(value).translate(_SHOWN))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, sign: str = "") -> str:
    """Three significant digits, or a dash for what is no finite number."""
    if not is_number(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        text = f"{value:{sign},.0f}" if abs(value) < 1e7 else f"{value:{sign}.2e}"
    elif abs(value) < 1e-3:
        text = f"{value:{sign}.1e}"
    else:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:{sign}.{digits}f}"
    return text.replace("-", "−") if "e" not in text else text


def fixed(value: float, sign: str = "") -> str:
    """Three decimals: rewards beside each other, and their intervals."""
    return f"{value:{sign}.3f}".replace("-", "−")


def duration(seconds: float) -> str:
    """For people: 4.4 s, 3 min 20 s, 2 h 5 min; a dash where no time was logged."""
    if seconds == 0:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"
