"""Numbers as text, and text as HTML."""

import html
import math
from typing import Any

# Controls, which HTML does not have, as the pictures that Unicode has of them.
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
_CONTROLS |= {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)
# Lone surrogates, which UTF-8 does not have.
_CONTROLS |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)


def escape(value: Any) -> str:
    """A value's text, safe in HTML's content and in quoted attributes."""
    return html.escape(str(value).translate(_CONTROLS))


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
    """For people: 4.4 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"
