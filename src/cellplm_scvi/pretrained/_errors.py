"""What is raised when a file cannot be used, and how values of unknown origin are quoted in messages."""

from __future__ import annotations

from collections.abc import Iterable


class PretrainedFileError(ValueError):
    """A file of a pre-trained model is truncated, corrupt, of another kind, or does not fit the other."""


def quoted(value: object, most: int = 60) -> str:
    """A value from a file, shortened for a message."""
    if isinstance(value, str | int | float | bool | None):
        text = f'"{value[:most]}"' if isinstance(value, str) else str(value)[:most]
        return text + ("..." if isinstance(value, str) and len(value) > most else "")
    return f"of type {type(value).__name__}"


def listed(names: Iterable[object], most: int = 3) -> str:
    """The first names in quotes."""
    names = list(names)
    return ", ".join(quoted(name) for name in names[:most]) + (", ..." if len(names) > most else "")
