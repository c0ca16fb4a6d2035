"""Ask a question in a fresh interpreter, so that a crashing library cannot take us with it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def ask(
    script: Path, *arguments: str, python: str = sys.executable, timeout: float = 300.0
) -> dict[str, Any]:
    """Run a script and return the JSON object on the last line that it prints.

    Args:
        script: A file that needs nothing of this package.
        *arguments: Its command-line arguments.
        python: The interpreter of the environment in question.
        timeout: Seconds after which the script is stopped.

    Returns:
        The script's answer, or `{"error": reason}` when it gave none.
    """
    # -P: a checkout of a library in the current folder is not an installation of it.
    command = [python, "-P", str(script), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=timeout
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        answer = None
    if isinstance(answer, dict):
        return answer
    reason = last_line(done.stderr)
    return {"error": f"the interpreter ended with code {done.returncode}: {reason}"}


def last_line(text: str) -> str:
    """Return the last line of a program's output that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
