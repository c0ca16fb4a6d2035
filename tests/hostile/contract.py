"""What every hostile input must end in: success, or one clear error of the user."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from hypothesis import HealthCheck, settings

# Tried inputs by what they were given to; `conftest` prints the sum.
CASES: Counter[str] = Counter()
# Ten times as many: HOSTILE_SCALE=10 pytest tests/hostile
SCALE = int(os.environ.get("HOSTILE_SCALE", "1"))
_LONGEST = 4000  # characters of a message that can still be read


def generated(examples: int) -> Callable[[Callable], Callable]:
    """A test of so many generated inputs, the same ones every time."""
    return settings(
        max_examples=examples * SCALE,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def outcome(
    action: Callable[[], Any], *, error: type[Exception], names: Iterable[object], what: str
) -> tuple[Any, str]:
    """Run one case.

    Args:
        action: What is given the input; anything but `error` that it raises is a defect.
        error: The user error of its front end.
        names: File, key or line: a refusal must name one of them.
        what: Under which head the case is counted.

    Returns:
        (what it returned, "") or (None, the refusal).
    """
    CASES[what] += 1
    try:
        return action(), ""
    except error as problem:
        text = str(problem)
        check_text(text, names)
        return None, text


def check_text(text: str, names: Iterable[object]) -> None:
    """A message that can be read, and that names what is wrong."""
    assert text.strip(), "a refusal without a word"
    assert len(text) < _LONGEST, f"{len(text)} characters: {text[:200]}"
    assert "Traceback" not in text
    wanted = [str(name) for name in names]
    assert any(name in text for name in wanted), f"names none of {wanted}: {text}"
