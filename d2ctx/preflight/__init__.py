"""Everything that can be known to be wrong before training starts, told in one go."""

from d2ctx.preflight.levels import check_levels
from d2ctx.preflight.run import check_run, examine_run

__all__ = ["check_levels", "check_run", "examine_run"]
