"""Pieces of messages: the name that was meant, the first few of many, counted nouns."""

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches

EXAMPLES = 3  # how many of many a message names


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Say which known names resemble `name`, or list them where there are few.

    Args:
        name: What the user wrote.
        known: The names that would have been right.

    Returns:
        A phrase that ends an error message: "did you mean A or B?", "known: A, B" or "".
    """
    choices = sorted(set(known))
    close = get_close_matches(name, choices, n=3, cutoff=0.6)
    if close:
        best = _likeness(name, close[0])
        close = [c for c in close if _likeness(name, c) > best - 0.06]
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(choices)}" if 0 < len(choices) <= 12 else ""


def _likeness(name: str, other: str) -> float:
    return SequenceMatcher(None, other, name).ratio()


def first_of(items: Sequence[object]) -> str:
    """The first few items, and how many more there are."""
    shown = ", ".join(str(item) for item in items[:EXAMPLES])
    return f"{shown} and {len(items) - EXAMPLES} more" if len(items) > EXAMPLES else shown


def plural(count: int, thing: str) -> str:
    """`1 image`, `2 images`, `3 classes`."""
    ending = "" if count == 1 else "es" if thing.endswith("s") else "s"
    return f"{count} {thing}{ending}"
