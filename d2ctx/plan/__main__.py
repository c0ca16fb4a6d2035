"""`python -m d2ctx.plan`: see `d2ctx.plan.cli`."""

import sys

from d2ctx.plan.cli import main

if __name__ == "__main__":
    sys.exit(main())
