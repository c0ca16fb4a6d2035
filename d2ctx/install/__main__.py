"""`python -m d2ctx.install`: see `d2ctx.install.cli`."""

from d2ctx.install.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
