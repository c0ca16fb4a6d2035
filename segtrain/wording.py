"""Pieces of messages: the name that was meant, the first few of many, counted nouns."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_FEW = 3  # how many of many a message names
_LISTED = 12  # so many names are listed when none is close


def close_to(name: str, known: Iterable[str]) -> list[str]:
    """Known names that resemble `name`, nearest first.

    Args:
        name: What the user wrote.
        known: The names that would have been right.

    Returns:
        At most two names.
    """
    lower = {choice.lower(): choice for choice in sorted(set(known))}
    if name.lower() in lower:
        return [lower[name.lower()]]
    return [lower[found] for found in get_close_matches(name.lower(), lower, n=2, cutoff=0.65)]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Say which known names resemble `name`, or list them where they are few.

    Args:
        name: What the user wrote.
        known: The names that would have been right.

    Returns:
        The end of a message: "did you mean A or B?", "known: A, B" or "".
    """
    known = list(known)
    if close := close_to(name, known):
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(known)}" if 0 < len(known) <= _LISTED else ""


def first_of(items: Sequence[object]) -> str:
    """The first few items, and how many more there are."""
    shown = ", ".join(str(item) for item in items[:_FEW])
    return f"{shown} and {len(items) - _FEW} more" if len(items) > _FEW else shown


def plural(count: int, thing: str) -> str:
    """`1 image`, `2 images`, `3 classes`."""
    ending = "" if count == 1 else "es" if thing.endswith("s") else "s"
    return f"{count} {thing}{ending}"
