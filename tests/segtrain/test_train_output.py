"""What a run writes and says: journal, progress, weight files."""

import io
import json
import sys
import time

import pytest
import torch
from torch import nn

from segtrain import dist
from segtrain.errors import UserError
from segtrain.train.checkpoint import save_weights
from segtrain.train.ema import build_average
from segtrain.train.journal import Journal, read_journal
from segtrain.train.meter import Meter
from segtrain.train.progress import Progress, counter, duration, memory_mb, numbers
from segtrain.train.rng import generator_state, generators_kept, seed_generators

RECORD = {"loss": 1.5, "loss_seg": 1.25, "loss_aux": 0.25, "lr": 1e-3, "images_per_second": 20.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_journal_is_json_lines_even_for_what_is_no_number(tmp_path):
    journal = Journal(tmp_path)
    journal.write("train", 1, {"loss": float("nan"), "tensor": torch.tensor(2.0)})
    journal.write("evaluate", 1, {"iou": {"a": float("inf")}})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(abs(line.pop("time") - time.time()) < 60 for line in lines)
    assert lines == [
        {"event": "train", "step": 1, "loss": None, "tensor": 2.0},
        {"event": "evaluate", "step": 1, "iou": {"a": None}},
    ]


def test_a_line_cut_off_by_a_crash_is_skipped(tmp_path):
    journal = Journal(tmp_path)
    journal.write("train", 1, {})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "tra')
    assert [r["step"] for r in read_journal(tmp_path / "log.jsonl")] == [1]
    journal.forget_after(1, evaluated=0)
    journal.write("train", 2, {})
    assert [r["step"] for r in read_journal(tmp_path / "log.jsonl")] == [1, 2]


def test_journal_forgets_what_comes_again(tmp_path):
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.write("train", step, {})
    journal.forget_after(2, evaluated=0)
    assert [r["step"] for r in read_journal(tmp_path / "log.jsonl")] == [1, 2]


def test_tensorboard_that_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="run: pip install tensorboard, or write train.tensorboard"):
        Journal(tmp_path, tensorboard=True)


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    seen = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def close(self):
            seen.append("closed")

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    journal = Journal(tmp_path, tensorboard=True)
    journal.write("train", 7, {"loss": 0.5, "note": "text", "nothing": None})
    journal.close()
    assert seen == [("train/loss", 0.5, 7), "closed"]


def test_numbers_of_a_record_in_one_line():
    assert numbers({**RECORD, "memory_mb": 812.4}) == (
        "loss 1.5  seg 1.25  aux 0.25  lr 1.00e-03  20.0 img/s  812 MB"
    )
    single = {k: v for k, v in RECORD.items() if k != "loss_aux"}
    assert numbers({**single, "memory_mb": None}) == "loss 1.5  lr 1.00e-03  20.0 img/s"


def test_plain_lines_are_few_and_the_last_is_among_them():
    stream = io.StringIO()
    with Progress(total=100, stream=stream) as progress:
        for step in range(1, 101):
            progress.step(step)
            progress.show(step, RECORD)
        progress.note("done")
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/100", "step 100/100", "done"]
    assert lines[1].endswith("0:00:00 left")


def test_a_terminal_gets_a_bar_with_the_numbers():
    stream = Terminal()
    with Progress(total=10, done=4, stream=stream) as progress:
        progress.show(5, RECORD)
        progress.note("a line [that] stays")
    shown = stream.getvalue()
    assert "a line [that] stays" in shown
    assert "5/10" in shown


def test_other_processes_are_silent(monkeypatch):
    monkeypatch.setattr(dist, "is_main", lambda: False)
    stream = Terminal()
    with Progress(total=10, stream=stream) as progress:
        progress.show(10, RECORD)
        progress.note("nothing")
    assert stream.getvalue() == ""


def test_counter_counts_on_one_line_of_a_terminal():
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        count = counter("looking", stream=stream)
        count(1, 2)
        count(2, 2)
    assert terminal.getvalue() == "\rlooking 1/2\rlooking 2/2\n"
    assert pipe.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (61.4, "0:01:01"), (7325, "2:02:05")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_memory_is_that_of_this_process():
    assert 50 < memory_mb(torch.device("cpu")) < 100_000


def test_meter_means_over_updates_and_starts_anew():
    meter = Meter(torch.device("cpu"), images=4)
    for step, value in ((1, 1.0), (2, 3.0)):
        meter.add(step, {"loss_seg": torch.tensor(value), "loss_aux": torch.tensor(0.5)})
    record = meter.read()
    assert (record["loss"], record["loss_seg"], record["loss_aux"]) == (2.5, 2.0, 0.5)
    assert record["images_per_second"] > 0
    meter.add(3, {"loss_seg": torch.tensor(5.0)})
    assert meter.read()["loss"] == 5.0


def test_meter_has_the_numbers_of_every_update_once():
    meter = Meter(torch.device("cpu"), images=4)
    assert meter.take_updates() == {}
    for step, value in ((7, 1.0), (8, 3.0)):
        meter.add(step, {"loss_seg": torch.tensor(value), "grad_norm": torch.tensor(0.1)})
    tenth = torch.tensor(0.1).item()
    assert meter.take_updates() == {
        "updates": {"first": 7, "count": 2, "loss_seg": [1.0, 3.0], "grad_norm": [tenth, tenth]}
    }
    meter.add(9, {"loss_seg": torch.tensor(5.0), "grad_norm": torch.tensor(0.1)})
    assert meter.read()["loss"] == 3.0  # of all three: taking is not reading
    assert meter.take_updates()["updates"]["first"] == 9
    assert meter.take_updates() == {}


def test_meter_leaves_skipped_updates_out_of_the_means():
    meter = Meter(torch.device("cpu"), images=4)
    meter.add(1, {})
    meter.add(2, {"loss_seg": torch.tensor(2.0)})
    meter.add(3, {})
    assert meter.read()["loss"] == 2.0
    updates = meter.take_updates()["updates"]
    assert (updates["first"], updates["count"]) == (1, 3)
    assert str(updates["loss_seg"]) == "[nan, 2.0, nan]"
    meter.add(4, {})
    assert str(meter.read()["loss"]) == "nan"
    assert meter.take_updates() == {"updates": {"first": 4, "count": 1}}


def test_pauses_do_not_count_as_training(monkeypatch):
    clock = iter([0.0, 1.0, 101.0, 102.0, 102.0])
    monkeypatch.setattr("segtrain.train.meter.time.perf_counter", lambda: next(clock))
    meter = Meter(torch.device("cpu"), images=4)  # at 0
    meter.add(1, {"loss_seg": torch.tensor(1.0)})
    with meter.paused():  # from 1 to 101
        pass
    assert meter.read()["images_per_second"] == pytest.approx(2.0)  # at 102


def test_generators_are_kept():
    import random

    import numpy as np

    def draw():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    seed_generators(3)
    expected = draw()
    seed_generators(3)
    with generators_kept():
        draw()
    assert draw() == expected
    state = generator_state()
    assert torch.equal(state["torch"], torch.get_rng_state())


def test_weight_files_hold_views_and_any_layout(tmp_path):
    from safetensors.torch import load_file

    base = torch.arange(48.0).reshape(1, 3, 4, 4)
    weights = {
        "last": base.contiguous(memory_format=torch.channels_last),
        "view": base[:, 1:],
        "tied": base[:, 1:],
    }
    save_weights(tmp_path / "w.safetensors", weights, {"step": "3"})
    loaded = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_average_follows_its_equation():
    model = nn.Linear(1, 1, bias=False)
    average = build_average(model, 0.75)
    values = []
    for value in (1.0, 2.0, 4.0):
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        values.append(average.module.weight.item())
    assert values == [1.0, 0.75 * 1 + 0.25 * 2, 0.75 * 1.25 + 0.25 * 4]
    assert not average.training
    assert build_average(model, 0.0) is None
