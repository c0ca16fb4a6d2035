"""Turning a name that is not known into a hint about the one that was meant."""

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches


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
