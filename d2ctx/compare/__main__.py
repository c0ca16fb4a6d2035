"""`python -m d2ctx.compare`: see `d2ctx.compare.cli`."""

import sys

from d2ctx.compare.cli import main

if __name__ == "__main__":
    sys.exit(main())
