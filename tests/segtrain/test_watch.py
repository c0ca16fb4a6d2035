"""The watch over several processes: here they are threads with a store in memory."""

import threading
import time
from itertools import count

import pytest
from torch.distributed import HashStore

from segtrain import dist, watch
from segtrain.watch import EXIT_CODE, Sign, Watch, absent, verdict

PATIENCE = 0.6


class Ended:
    """Takes the place of the end of a process."""

    def __init__(self):
        self.code, self.happened = None, threading.Event()

    def __call__(self, code):
        self.code = code
        self.happened.set()


@pytest.fixture
def watched():
    """A function that starts watches of one store."""
    made = []

    def start(world, *, store=None, patience=PATIENCE):
        store = store or HashStore()
        for rank in range(world):
            end = Ended()
            one = Watch(store, rank=rank, world=world, patience=patience, end=end)
            one.start()
            made.append((one, end))
        return made

    yield start
    for one, _ in made:
        one._over.set()


def test_who_stays_away_is_named_and_all_end(watched, capfd):
    pairs = watched(3)
    for rank, (one, _) in enumerate(pairs):
        one.came_to("update 7")
        if rank != 1:
            one.meets()
    for _, end in pairs:
        assert end.happened.wait(60)
        assert end.code == EXIT_CODE == 2
    said = capfd.readouterr().err
    text = "process 1 (last seen at update 7) did not arrive, 2 processes waited for it at update 7"
    assert said.count("segtrain: error: ") == said.count(text) == 1
    assert "nothing has happened for 0.6 seconds; " in said
    # What the missing one does, and only that one.
    assert said.count(" is here:") == said.count("process 1 is here:") == 1
    assert "test_who_stays_away" in said


def test_process_0_is_named_by_another(watched, capfd):
    pairs = watched(2)
    pairs[1][0].meets()
    assert pairs[1][1].happened.wait(60)
    said = capfd.readouterr().err
    assert "error: process 0 (last seen at the start) did not arrive, 1 process waited" in said


def test_who_goes_on_keeps_the_others_waiting(watched):
    """An evaluation may take longer for one of them, as long as it comes to further images."""
    pairs = watched(2)
    pairs[0][0].meets()
    for number in range(20):
        pairs[1][0].came_to(f"image {number}")
        time.sleep(PATIENCE / 10)
    assert not any(end.happened.is_set() for _, end in pairs)
    assert all(end.happened.wait(60) for _, end in pairs)


def test_a_verdict_of_one_is_that_of_all(watched, monkeypatch):
    monkeypatch.setattr(watch, "_LONGEST", 0.1)
    store = HashStore()
    ((_, end),) = watched(1, store=store, patience=3600)
    store.set("verdict", "")
    assert end.happened.wait(60)


def test_a_suspended_process_has_not_waited(watched, monkeypatch):
    """Ten hours pass between any two looks, as on a laptop whose lid is shut."""
    clock = count(0, 36_000)
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(clock))
    ((_, end),) = watched(1)
    assert end.happened.wait(60)
    # The time-out has eight looks; each counts as two at most. One more is the start.
    assert next(clock) // 36_000 >= 1 + 8 / 2


def test_a_store_that_is_gone_ends_the_wait_too(watched, capfd):
    class Gone:
        def set(self, *_):
            raise RuntimeError("Connection reset by peer")

        check = get = set

    ((one, end), _) = watched(2, store=Gone())
    one.meets()
    assert end.happened.wait(60)
    assert "process 0 or its machine does not answer, and nothing" in capfd.readouterr().err


def test_a_store_that_fails_for_a_moment_is_asked_again(watched, capfd):
    class Shaky:
        def __init__(self):
            self.store, self.failures = HashStore(), 2

        def set(self, *item):
            if self.failures:
                self.failures -= 1
                raise RuntimeError("Connection reset by peer")
            self.store.set(*item)

        def __getattr__(self, name):
            return getattr(self.store, name)

    ((one, end), _) = watched(2, store=Shaky())
    one.meets()
    assert end.happened.wait(60)
    assert "process 1 (last seen at the start) did not arrive" in capfd.readouterr().err


def test_a_store_that_is_frozen_ends_the_wait_too(watched, capfd):
    thawed = threading.Event()

    class Frozen:
        def set(self, *_):
            thawed.wait()
            raise RuntimeError("Connection reset by peer")

    ((_, end),) = watched(1, store=Frozen())
    assert end.happened.wait(60)
    thawed.set()
    assert "process 0 or its machine does not answer, and nothing" in capfd.readouterr().err


def test_stopped_it_never_ends_the_process(watched):
    ((one, end),) = watched(1)
    one.stop()
    assert not end.happened.wait(2 * PATIENCE)


def test_nobody_is_blamed_where_all_are_equally_far():
    signs = [Sign(4, 9, "update 2"), Sign(4, 8, "update 3")]
    assert absent(signs) == []
    text = verdict(signs, 90)
    assert "no process comes further than update 2 and update 3: nothing has happened" in text
    assert "for 1.5 minutes; what it does is printed as well" in text


def test_the_last_ones_are_named():
    signs = [Sign(5), Sign(3, 7, "update 1"), Sign(4), Sign(3, 8, "update 2")]
    assert absent(signs) == [1, 3]
    text = verdict(signs, 60)
    assert "process 1 (last seen at update 1) and process 3 (last seen at update 2) did not" in text


def test_looks_are_seconds_apart():
    assert Watch(HashStore(), rank=0, world=1, patience=1800).interval == 5
    assert Watch(HashStore(), rank=0, world=1, patience=4).interval == 0.5


def test_alone_nobody_watches():
    dist.came_to("update 1")
    dist.meets()
    dist.set_patience(1)
    with dist.process_group():
        assert dist._watch is None
