"""Everything that can be known to be wrong before training starts, told in one go."""

from d2ctx.preflight.run import check_run

__all__ = ["check_run"]
