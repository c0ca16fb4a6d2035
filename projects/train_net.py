"""Train or evaluate any configuration under configs/d2: a door to d2ctx.train_net."""

import sys

from d2ctx.train_net import main

if __name__ == "__main__":
    sys.exit(main())
