"""Where the checks write what they find."""

from dataclasses import dataclass, field

from d2ctx.errors import UserError


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
