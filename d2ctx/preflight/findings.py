"""Where the checks write what they find, and how a list of names is cut short."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from d2ctx.errors import UserError

EXAMPLES = 3


@dataclass
class Findings:
    """What the checks found.

    Attributes:
        errors: Each stops the run: what was expected, what came, the fix.
        notes: Worth a line, but Detectron2 deals with it.
    """

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def raise_errors(self) -> None:
        """Raise if there is any error.

        Raises:
            UserError: With all errors, one per line.
        """
        if len(self.errors) > 1:
            lines = "\n".join(f"  {error}" for error in self.errors)
            raise UserError(f"{len(self.errors)} things to mend before this can run:\n{lines}")
        if self.errors:
            raise UserError(self.errors[0])


def first_of(items: Sequence[object]) -> str:
    """The first few items, and how many more there are."""
    shown = ", ".join(str(item) for item in items[:EXAMPLES])
    return f"{shown} and {len(items) - EXAMPLES} more" if len(items) > EXAMPLES else shown


def plural(count: int, thing: str) -> str:
    """`1 image`, `2 images`, `3 classes`."""
    ending = "" if count == 1 else "es" if thing.endswith("s") else "s"
    return f"{count} {thing}{ending}"
