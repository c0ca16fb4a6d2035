"""A program that is started many times: one process imports it once, every run is a fork of that.

A run is its own group of processes, so that a kill takes its data workers along, as the end of a
job does. What goes wrong in a run is put in place by a function of `faults`, called before the
program.
"""

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, Self

ROOT = Path(__file__).resolve().parents[2]
_POLL = 0.002
Fault = tuple[str, Mapping[str, Any]]


@dataclass
class Run:
    """A started program.

    Args:
        forks: What started it.
        pid: Its process, and its group of processes.
        log: What it says, on stdout and stderr.
    """

    forks: "Forks"
    pid: int
    log: Path
    code: int | None = None

    def ended(self) -> bool:
        """Whether it has ended; then `code` is there, below zero for a signal."""
        if self.code is None:
            self.code = self.forks.ask({"poll": self.pid})
        return self.code is not None

    def wait(self, timeout: float = 600) -> int:
        """Exit code of a program that ends by itself."""
        end = time.monotonic() + timeout
        while not self.ended():
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"did not end in {timeout:.0f} s:\n{self.said()}")
            time.sleep(_POLL)
        assert self.code is not None
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> int:
        """End it and all that it started."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass  # it ended by itself
        return self.wait()

    def said(self) -> str:
        return self.log.read_text(errors="replace")


class Forks:
    """The process that forks.

    Args:
        command: "module:function" of the arguments, which returns an exit code.
        modules: What else to import once.
    """

    def __init__(self, command: str, *modules: str) -> None:
        self._arguments = [command, *modules]

    def __enter__(self) -> Self:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.stress.forks", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert self.ask({"ready": True})
        return self

    def __exit__(self, *error: object) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def start(self, *arguments: object, log: Path, faults: Sequence[Fault] = ()) -> Run:
        """Start the program.

        Args:
            *arguments: Of its command line.
            log: File for what it says.
            faults: Functions of `tests.stress.faults` with their keywords.
        """
        request = {
            "run": list(map(str, arguments)),
            "log": str(log),
            "faults": [[name, dict(keywords)] for name, keywords in faults],
        }
        return Run(self, self.ask(request), log)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def serve(command: str, *modules: str) -> None:
    """Fork until nobody asks any more.

    Args:
        command: As in `Forks`.
        *modules: As in `Forks`.
    """
    from tests.stress import faults

    for name in modules:
        import_module(name)
    module, _, function = command.partition(":")
    program = getattr(import_module(module), function)
    answers = os.fdopen(os.dup(1), "w")
    gc.freeze()  # what is here stays, and is shared by all runs
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            answer: Any = os.fork()
            if answer == 0:
                answers.close()
                _become(Path(request["log"]))
                for name, keywords in request["faults"]:
                    getattr(faults, name)(**keywords)
                _end(lambda arguments=request["run"]: program(arguments))
        else:
            answer = True if "ready" in request else _code(request["poll"])
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # without taking down all modules


def _become(log: Path) -> None:
    """A process of its own; nothing is left of the server's pipes."""
    os.setsid()
    sys.stdin.close()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, handle in ((null, 0), (file, 1), (file, 2)):
        os.dup2(source, handle)
    os.close(file)
    os.close(null)


def _end(program: Callable[[], int]) -> NoReturn:
    """Run and end as a process does, but for taking down all modules, which takes a second."""
    try:
        code = program()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        traceback.print_exc()
        sys.last_value = error  # as the interpreter: what was in use then is in use to the end
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _code(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


if __name__ == "__main__":
    serve(*sys.argv[1:])
