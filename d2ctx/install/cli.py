"""Command line of the installer: keep what is there, otherwise build a wheel and install it."""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from d2ctx.errors import UserError
from d2ctx.install.fetch import fetch_sdist, index_urls, pip_settings, without_password
from d2ctx.install.installed import Installed, probe
from d2ctx.install.source import SDIST_NAME, VERSION, unpack
from d2ctx.install.wheel import WHEEL_NAME, build_wheel


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m d2ctx.install",
        description=f"Install Detectron2 {VERSION}, unless this environment already has one.",
    )
    parser.add_argument(
        "--sdist",
        type=Path,
        metavar="PATH",
        help=f"use this copy of {SDIST_NAME} instead of downloading it",
    )
    parser.add_argument(
        "--wheel-dir",
        type=Path,
        metavar="DIR",
        help="only build the wheel into DIR; install nothing",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done and change nothing"
    )
    return parser.parse_args(argv)


def wanted(found: Installed) -> bool:
    """Decide whether an installation is needed.

    Args:
        found: What the environment has.

    Returns:
        True when there is no Detectron2, or only an older repackaging of ours.

    Raises:
        UserError: There is one that does not work; it is the user's to mend or to remove.
    """
    if not found.present or found.outdated:
        return True
    if found.works:
        return False
    raise UserError(
        f"expected a working Detectron2, got {found.describe()} which fails with "
        f"{found.error}; nothing was changed; run: {found.remedy()}"
    )


def build(*, sdist: Path | None, into: Path) -> Path:
    """Fetch (or take), verify, unpack and repackage the source archive.

    Args:
        sdist: A copy of the archive, or None to download it.
        into: Folder for the wheel.

    Returns:
        The path of the wheel.
    """
    archive = fetch_sdist() if sdist is None else sdist
    with tempfile.TemporaryDirectory(prefix="ctxseg-") as scratch:
        return build_wheel(unpack(archive, into=Path(scratch)), into=into)


def install(wheel: Path) -> Installed:
    """Install a wheel with this interpreter's pip and confirm that Detectron2 then works.

    Args:
        wheel: The wheel.

    Returns:
        What the environment has now.

    Raises:
        UserError: pip failed, or the installed package cannot be imported.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", str(wheel)], check=False
    )
    if done.returncode != 0:
        raise UserError(
            f"expected pip to install {wheel.name}, got exit code {done.returncode}; mend what pip "
            "reports above, then run again: python -m d2ctx.install"
        )
    found = probe()
    if not found.works or found.metadata_version != VERSION:
        raise UserError(
            f"expected a working Detectron2 {VERSION}, got {found.describe()} which fails with "
            f"{found.error}; run: {found.remedy()}"
        )
    return found


def plan(*, sdist: Path | None) -> str:
    """Return in one line what an installation would do."""
    if sdist is not None:
        origin = str(sdist)
    else:
        urls = index_urls(pip_settings(), default="pip's default index")
        origin = ", then ".join(without_password(url) for url in urls) or "no index at all"
    return f"would take {SDIST_NAME} from {origin}, build {WHEEL_NAME} and install it with pip"


def run(arguments: argparse.Namespace) -> str:
    """Do what the arguments ask.

    Returns:
        The line to print.

    Raises:
        UserError: Something that the user can mend.
    """
    if arguments.wheel_dir is not None and not arguments.dry_run:
        return f"built {build(sdist=arguments.sdist, into=arguments.wheel_dir)}"
    found = probe()
    if not wanted(found):
        return f"keeping {found.describe()}"
    if arguments.dry_run:
        return plan(sdist=arguments.sdist)
    with tempfile.TemporaryDirectory(prefix="ctxseg-") as scratch:
        return f"installed {install(build(sdist=arguments.sdist, into=Path(scratch))).describe()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the installer.

    Args:
        argv: Command-line arguments; the process's own by default.

    Returns:
        The exit code: 0 when Detectron2 works afterwards, 2 when the user has to act.
    """
    try:
        print(run(parse_args(argv)))
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = (
            f"expected to write the cache, a temporary folder and the wheel, got: {error}; "
            "choose folders with XDG_CACHE_HOME, TMPDIR and --wheel-dir"
        )
    else:
        return 0
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
