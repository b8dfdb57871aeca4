"""Figures in words, for people who wait."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def size_in_words(size: float) -> str:
    """Bytes: 640 MB, 6.1 GB."""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def rate(seconds: float) -> str:
    """Of something that takes so many seconds: 2.5 steps/s, or 4.0 s/step."""
    return f"{1 / seconds:.1f} steps/s" if 0 < seconds < 1 else f"{seconds:.1f} s/step"
