"""Sizes as people write them: 16GiB, 800MB, 1.5 GiB, 1048576, 1,048,576 bytes."""

from __future__ import annotations

import re
from decimal import Decimal

MOST = 2**60
_PREFIXES = "KMGTPE"
_UNITS = {"": 1, "b": 1, "byte": 1, "bytes": 1}
for _power, _letter in enumerate(_PREFIXES.lower(), start=1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}
_PATTERN = re.compile(r"\s*(\d{1,3}(?:,\d{3})+|\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str | int, least: int = 1) -> int:
    """Bytes in a size such as "16GiB", at least `least`; ValueError says what is expected."""
    if isinstance(text, int) and not isinstance(text, bool):
        if text < least:
            raise ValueError(f"a size must be at least {exact_size(least)}, not {text}")
        if text > MOST:
            raise ValueError(f"{text} bytes is more memory than there is; write it like 16GiB")
        return text
    if isinstance(text, float):
        raise ValueError(f"a size is {text}; give bytes as a whole number, or text such as 8GiB")
    match = _PATTERN.fullmatch(str(text))
    unit = _UNITS.get(match[2].lower()) if match else None
    # A float has no room for each byte of petabytes.
    number = Decimal(match[1].replace(",", "")) * unit if match and unit else Decimal(0)
    if number > MOST:
        raise ValueError(f"{str(text)[:40]!r} is more memory than there is; write it like 16GiB")
    size = int(number)
    if not match or not unit or size < least:
        raise ValueError(f"{text!r} is not a size; write it like 16GiB, 800MB or 1048576")
    return size


def format_size(size: float) -> str:
    """A size for people, in binary units, as `parse_size` reads it: 1.5 GiB."""
    sign, size = ("-", -size) if size < 0 else ("", size)
    if size < 1024:
        return f"{sign}{size:.0f} B"
    for prefix in _PREFIXES:
        size /= 1024
        shown = f"{size:.4g}"
        if float(shown) < 1024 or prefix == _PREFIXES[-1]:
            return f"{sign}{shown} {prefix}iB"
    raise AssertionError


def exact_size(size: int) -> str:
    """The same with the exact figure, as `parse_size` reads it: 1.5 GiB (1,610,612,736 bytes)."""
    figure = f"{size:,} byte{'s' * (abs(size) != 1)}"
    return figure if abs(size) < 1024 else f"{format_size(size)} ({figure})"


def format_rate(per_second: float, unit: str = "FLOP/s") -> str:
    """A rate for people, in decimal units: 12.3 GFLOP/s."""
    return f"{in_thousands(per_second)[0]:.4g} {in_thousands(per_second)[1]}{unit}"


def in_thousands(value: float) -> tuple[float, str]:
    """A figure between 1 and 1,000 and the prefix of its unit: (12.3, "G") of 12.3e9."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 1000 or prefix == "E":
            return value, prefix
        value /= 1000
    raise AssertionError


def format_seconds(seconds: float) -> str:
    """A duration for people."""
    if seconds >= 1000:
        return f"{seconds:,.0f} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
