"""A run that is asked to stop finishes its iteration, saves, and says how to go on."""

import multiprocessing
import os
import signal
import threading

import pytest

from d2ctx.errors import INTERRUPTED, Interrupted, exit_code
from d2ctx.recovery.journal import read_journal
from d2ctx.recovery.signals import StopRequest, passed_on
from d2ctx.trainer import Trainer
from tests.d2ctx.launch import MAX_ITER
from tests.d2ctx.test_train_net import final_state

BOTH = [signal.SIGTERM, signal.SIGINT]


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers():
    """Handlers are as before after each test; Ctrl-C is Python's own even where tests run behind
    a shell's `&`, which lets them ignore it."""
    caught = [*BOTH, signal.SIGUSR1]
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in caught]
    yield
    assert [signal.getsignal(number) for number in caught] == before
    signal.signal(signal.SIGINT, ctrl_c)


# ---- the request -----------------------------------------------------------------------------
@pytest.mark.parametrize("number", BOTH)
def test_a_signal_is_noted_and_the_next_one_acts_as_usual(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop
        assert signal.getsignal(number) != before
        send(number)
        assert stop
        assert stop.name == number.name
        assert signal.getsignal(number) == before


def test_a_second_ctrl_c_ends_at_once():
    with StopRequest():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_what_a_parent_passes_on_is_never_a_second_signal():
    with StopRequest() as stop:
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        send(signal.SIGUSR1)
        assert stop.name == "SIGTERM"


def test_what_needs_no_end_is_given_up():
    with StopRequest() as stop, stop.at_once("why"), pytest.raises(Interrupted, match="why"):
        send(signal.SIGTERM)


def test_a_signal_before_is_enough_to_give_up():
    with StopRequest() as stop:
        send(signal.SIGTERM)
        with pytest.raises(Interrupted, match="why"), stop.at_once("why"):
            pytest.fail("the body began")


def test_outside_the_main_thread_nothing_is_caught():
    seen = []

    def body() -> None:
        with StopRequest() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [False]


def test_it_is_exit_code_75_and_one_line(capsys):
    def program() -> None:
        raise Interrupted("saved; go on like this")

    assert exit_code(program) == INTERRUPTED == 75
    assert capsys.readouterr().err == "saved; go on like this\n"


def wait_for_a_stop(ready, result) -> None:
    with StopRequest() as stop:
        ready.set()
        while not stop:
            signal.pause()
        result.put(stop.name)


def test_a_parent_passes_the_signal_on():
    context = multiprocessing.get_context("fork")
    ready, result = context.Event(), context.Queue()
    with passed_on():
        child = context.Process(target=wait_for_a_stop, args=(ready, result))
        child.start()
        assert ready.wait(60)
        send(signal.SIGTERM)
        assert result.get(timeout=60) == "SIGUSR1"
        child.join()
    assert child.exitcode == 0


# ---- a run -----------------------------------------------------------------------------------
@pytest.fixture
def signal_at(monkeypatch):
    """Send the signal in the middle of an iteration."""

    def at(iteration: int, number: signal.Signals = signal.SIGTERM) -> None:
        run_step = Trainer.run_step

        def step(trainer: Trainer) -> None:
            if trainer.iter == iteration:
                send(number)
            run_step(trainer)

        monkeypatch.setattr(Trainer, "run_step", step)

    return at


def saved(launch) -> list[str]:
    return sorted(path.name for path in launch.output.glob("*.pth"))


@pytest.mark.parametrize("number", BOTH)
def test_a_run_saves_and_goes_on(launch, monkeypatch, signal_at, capsys, number):
    signal_at(2, number)
    assert launch.main() == INTERRUPTED
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == (
        "stopped by a signal, saved after iteration 2; go on with the same command and --resume"
    )
    assert "Traceback" not in out + err + (launch.output / "log.txt").read_text()
    assert saved(launch) == ["model_0000002.pth"]
    assert [record["iteration"] for record in read_journal(launch.output)] == [0, 1, 2]
    monkeypatch.undo()
    assert launch.main("--resume") == 0
    assert final_state(launch.output)["iteration"] == MAX_ITER - 1
    assert [record["iteration"] for record in read_journal(launch.output)] == [*range(MAX_ITER)]


def test_a_checkpoint_that_is_due_anyway_is_written_once(launch, signal_at, monkeypatch):
    written = []
    save = Trainer.state_dict
    monkeypatch.setattr(
        Trainer, "state_dict", lambda self: (written.append(self.iter), save(self))[1]
    )
    signal_at(2)
    assert launch.main("SOLVER.CHECKPOINT_PERIOD", 3) == INTERRUPTED
    assert written == [2]


@pytest.mark.parametrize(
    ("period", "files"), [(2, ["model_0000001.pth"]), (0, ["model_final.pth"])]
)
def test_an_evaluation_is_given_up(launch, monkeypatch, capsys, period, files):
    def test(cfg, model, evaluators=None):
        send(signal.SIGTERM)
        pytest.fail("the evaluation went on")

    monkeypatch.setattr(Trainer, "test", test)
    assert launch.main("TEST.EVAL_PERIOD", period) == INTERRUPTED
    assert "stopped by a signal while evaluating, saved after" in capsys.readouterr().err
    assert saved(launch) == files
    monkeypatch.undo()
    assert launch.main("--resume") == 0
    assert set(launch.results()) == {"bbox", "segm"}
