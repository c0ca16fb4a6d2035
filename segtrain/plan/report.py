"""What a rehearsal found: its steps, the numbers, and the reasons not to start."""

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import torch

from segtrain.errors import Interrupted, UserError
from segtrain.wording import plural

Result = TypeVar("Result")

_INDENT = 18
# What torch says about settings, and the fix.
_KNOWN = {
    "out of memory": "lower train.micro_batch or data.crop",
    "No space left": "make room, or write output=FOLDER_ON_ANOTHER_DISK",
    "does not have a deterministic implementation": "write train.deterministic: false",
}


@dataclass
class Step:
    """One thing that was tried.

    Attributes:
        name: What.
        state: Whether it went well; `skipped` could not be tried.
        lines: What there is to know.
        problems: What would stop the run, each with its fix.
        seconds: How long it took.
    """

    name: str
    state: Literal["ok", "failed", "skipped"] = "ok"
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def text(self) -> str:
        """Some lines for a terminal."""
        marks = {"ok": self.lines, "skipped": self.lines, "failed": [*self.problems, *self.lines]}
        said = [line for text in marks[self.state] for line in text.splitlines()]
        first = f"{self.name:15} {'' if self.state == 'ok' else self.state.upper()}".rstrip()
        if self.state == "ok" and said:
            first = f"{self.name:15}   {said.pop(0)}"
        return "\n".join([first, *(" " * _INDENT + line for line in said)])


@dataclass
class Report:
    """Everything that was tried, in order.

    Attributes:
        steps: So far.
        facts: Numbers by name, for programs.
        show: Called with every step that ends.
        tracebacks: Whether to print where a step failed.
    """

    steps: list[Step] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    show: Callable[[Step], None] | None = None
    tracebacks: bool = False

    def run(self, name: str, action: Callable[[Step], Result]) -> Result | None:
        """Try something; what it raises becomes a problem, so that the next step gets its turn.

        Args:
            name: Of the step.
            action: Gets the step, to say something there.

        Returns:
            What the action returned; None where it raised.

        Raises:
            Interrupted: What the action raised.
        """
        step, result, begin = Step(name), None, time.perf_counter()
        try:
            result = action(step)
        except Interrupted:
            raise
        except Exception as error:  # whatever it is, a run would end by it
            if self.tracebacks:
                traceback.print_exc()
            step.problems.append(explained(error))
        step.seconds = time.perf_counter() - begin
        step.state = "failed" if step.problems else "ok"
        self._add(step)
        return result

    def skip(self, name: str, why: str) -> None:
        """Say that something could not be tried.

        Args:
            name: Of the step.
            why: The reason.
        """
        self._add(Step(name, "skipped", [why]))

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        if self.show is not None:
            self.show(step)

    def reasons(self) -> list[tuple[str, str]]:
        """Why not to start: (step, problem with its fix), each problem once."""
        found: dict[str, str] = {}
        for step in self.steps:
            for problem in step.problems:
                found.setdefault(problem, step.name)
        return [(name, problem) for problem, name in found.items()]

    @property
    def go(self) -> bool:
        """Whether nothing speaks against the run."""
        return not self.reasons()

    def verdict(self) -> Iterator[str]:
        """GO, or NO-GO with its reasons, as lines."""
        reasons = self.reasons()
        yield "GO" if not reasons else f"NO-GO, {plural(len(reasons), 'reason')}:"
        for name, problem in reasons:
            first, *more = problem.splitlines()
            yield f"  {name}: {first}"
            yield from (f"    {line}" for line in more)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "go": self.go,
            "reasons": [{"step": name, "text": text} for name, text in self.reasons()],
            "facts": self.facts,
            "steps": [asdict(step) for step in self.steps],
        }


def explained(error: Exception) -> str:
    """An error as a problem with its fix.

    Args:
        error: Anything.

    Returns:
        A message with a fix as it is; others get a fix where one is known, else the way to
        the place where they arose.
    """
    said = str(error)
    # Messages of ctxops name their fix after a semicolon.
    if isinstance(error, UserError) or (type(error) is ValueError and "; " in said):
        return said
    first = said.splitlines()[0][:300] if said else "no message"
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"{kind}{first}; {_KNOWN['out of memory']}"
    fix = next((fix for text, fix in _KNOWN.items() if text in said), None)
    return f"{kind}{first}; " + (fix or "see where it arose: segtrain --traceback plan ...")
