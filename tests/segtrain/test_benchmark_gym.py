"""The gym: twins are twins, and blind; intervals are what they say; the page is its file."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gym
from benchmarks.gym_parts import report
from benchmarks.gym_parts.images import Images, batch_of, images_of, training_batches
from benchmarks.gym_parts.pairs import PAIRS
from benchmarks.gym_parts.parts import Residual, count_parameters, task_loss
from benchmarks.gym_parts.statistics import MARGIN, paired, verdict
from benchmarks.gym_parts.training import (
    SIDES,
    Budget,
    Run,
    build,
    count,
    counts_of,
    train_and_count,
)
from segtrain.data.synthetic import TASKS, draw_task

ROOT = Path(__file__).resolve().parents[2]
TINY = Budget(steps=2, batch=2, images=4, held_out=2)
MECHANISM = [e for e in gym.EXPECTATIONS if e.winner == "method" and TASKS[e.task].reach]
NAMES = {"ids": lambda e: e.name if isinstance(e, gym.Expectation) else None}


def both_answers(task):
    """The same four images with either answer."""
    made = []
    for answer in (0, 1):
        drawn = [draw_task(task=task, seed=9, index=k, answer=answer) for k in range(4)]
        parts = (np.stack([getattr(d, n) for d in drawn]) for n in ("image", "semantic", "needs"))
        pictures, labels, needs = parts
        made.append(Images(pictures=pictures, labels=labels, needs=needs))
    return [batch_of(images, np.arange(4)) for images in made]


def settled(task, pair, side):
    """A network with statistics of these images in its batch norms, and no longer a blank one."""
    network = build(task, pair, side, seed=1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for batch in both_answers(task):
        own = getattr(network, "loss", None)
        loss = own(batch) if own else task_loss(network(batch.image), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval()


@pytest.mark.parametrize("pair", PAIRS)
def test_twins_have_as_many_weights_and_the_same_stem(pair):
    task = next(e.task for e in gym.EXPECTATIONS if e.pair == pair)
    method, twin = (build(task, pair, side, seed=4) for side in SIDES)
    assert count_parameters(twin) == pytest.approx(count_parameters(method), rel=0.1)
    stems = [m.encoder.patch_embed if pair == "Segmenter" else m.stem for m in (method, twin)]
    weights = [dict(stem.named_parameters()) for stem in stems]
    assert weights[1]
    assert all(torch.equal(value, weights[0][name]) for name, value in weights[1].items())


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("side", SIDES)
def test_a_step_reaches_every_weight(pair, side):
    task = next(e.task for e in gym.EXPECTATIONS if e.pair == pair)
    network = build(task, pair, side, seed=0)
    (batch, _) = both_answers(task)
    own = getattr(network, "loss", None)
    (own(batch) if own else task_loss(network(batch.image), batch)).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert not [n for n in without if not re.search(r"output_td\.p3", n)], without


@pytest.mark.parametrize("e", MECHANISM, **NAMES)
def test_a_twin_cannot_know_the_answer_and_a_method_can(e):
    """Either answer, the same logits where it matters: the twin is right half of the time."""
    batches = both_answers(e.task)
    needs = batches[0].needs[:, None].expand(-1, len(TASKS[e.task].classes), -1, -1)
    apart = {}
    for side in SIDES:
        network = settled(e.task, e.pair, side)
        zero, one = (network(batch.image)[needs] for batch in batches)
        apart[side] = (zero - one).abs().max()
    assert apart["twin"] < 1e-5
    assert apart["method"] > 1e-3


def test_the_twin_of_the_whole_neck_is_not_blind():
    """FPN hands the coarse level down: no gain is expected there."""
    batches = both_answers("whole")
    network = settled("whole", "A²-FPN", "twin")
    needs = batches[0].needs[:, None].expand(-1, 4, -1, -1)
    zero, one = (network(batch.image)[needs] for batch in batches)
    assert (zero - one).abs().max() > 1e-3


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("parameters", [2000, 4000, 50_000])
def test_fillers_have_the_weights_that_are_asked_for(window, parameters):
    made = count_parameters(Residual(channels=24, parameters=parameters, window=window))
    assert made == pytest.approx(parameters, rel=0.07)


def test_expectations_cover_every_pair_once():
    names = [e.name for e in gym.EXPECTATIONS]
    assert len(names) == len(set(names))
    assert {e.pair for e in gym.EXPECTATIONS} <= set(PAIRS)
    assert set(gym.BUDGETS) <= set(PAIRS)
    assert {e.task for e in gym.EXPECTATIONS} == set(TASKS)
    assert all(e.winner == "equal" for e in gym.EXPECTATIONS if e.task == "local")


def test_counts_are_of_the_needed_pixels_and_the_answers_alone():
    truth = np.array([[0, 2, 2, 3]], np.uint8)
    needs = np.array([[False, True, True, True]])
    predicted = np.array([[3, 2, 0, 2]], np.uint8)
    right, union = counts_of(predicted, truth, needs, "far")
    np.testing.assert_array_equal(right, [1, 0])
    np.testing.assert_array_equal(union, [3, 1])


def test_outlines_count_their_bands():
    d = draw_task(task="boundary", seed=0, index=0)
    right, union = counts_of(d.semantic, d.semantic, d.needs, "boundary")
    np.testing.assert_array_equal(right, union)
    shifted = np.roll(d.semantic, 2, axis=1)
    right, union = counts_of(shifted, d.semantic, d.needs, "boundary")
    assert 0 < right[0] < 0.8 * union[0]
    inside = d.semantic.copy()
    inside[30:34, 30:34] = 0  # a hole is an outline, too
    assert counts_of(inside, d.semantic, d.needs, "boundary")[1][0] > union[0] / 4


def counts(shares, num=40):
    """Every image of every seed has 10 pixels of each of two classes, this share of them right."""
    right = np.array(shares, float)[:, None, None] * np.full((len(shares), num, 2), 10.0)
    return right, np.full_like(right, 10.0)


def test_a_difference_that_is_the_same_everywhere_has_no_width():
    found = paired(counts([0.8, 0.8]), counts([0.5, 0.5]), samples=200)
    assert (found.method, found.twin) == pytest.approx((0.8, 0.5))
    assert (found.low, found.high) == pytest.approx((0.3, 0.3))
    assert found.by_seed == pytest.approx((0.3, 0.3))
    assert found.difference == pytest.approx(0.3)


def test_seeds_that_disagree_widen_the_interval():
    found = paired(counts([0.9, 0.5, 0.5]), counts([0.5, 0.5, 0.5]), samples=2000)
    assert found.difference == pytest.approx(0.4 / 3)
    assert found.low == pytest.approx(0.0)
    assert found.high == pytest.approx(0.4)
    assert found.by_seed == pytest.approx((0.4, 0.0, 0.0))


def test_images_are_drawn_for_both_sides_and_all_seeds_together():
    """Sides that differ by a constant, on images of very different difficulty."""
    generator = np.random.default_rng(0)
    ease = generator.uniform(0.1, 0.8, (1, 50, 1)) * np.ones((2, 1, 2))
    union = np.full(ease.shape, 10.0)
    found = paired((10 * (ease + 0.1), union), (10 * ease, union), samples=500)
    assert found.high - found.low < 1e-9
    alone = paired((10 * ease, union), (np.zeros_like(ease), union), samples=500)
    assert alone.high - alone.low > 0.05


def test_classes_count_alike_however_rare():
    right = np.array([[[90.0, 0.0]]])
    union = np.array([[[90.0, 10.0]]])
    assert paired((right, union), (right, union), samples=10).method == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("expected", "low", "high", "told"),
    [
        ("method", 0.01, 0.4, "as expected"),
        ("method", -0.01, 0.4, "not shown"),
        ("method", -0.4, -0.01, "surprise"),
        ("equal", -0.01, 0.01, "as expected"),
        ("equal", 0.01, 0.02, "as expected"),
        ("equal", -0.01, MARGIN, "not shown"),
        ("equal", 0.01, 0.2, "surprise"),
        ("equal", -0.2, -0.01, "surprise"),
    ],
)
def test_verdicts(expected, low, high, told):
    assert verdict(expected, low, high) == told


def test_unknown_expectation():
    with pytest.raises(ValueError, match="one of method, equal, got 'twin'"):
        verdict("twin", 0.0, 0.1)


def test_batches_repeat_and_flips_keep_labels_on_their_pixels():
    labels = np.arange(6 * 64, dtype=np.uint8).reshape(6, 8, 8)
    images = Images(
        pictures=np.repeat(labels[..., None], 3, axis=3), labels=labels, needs=labels > 9
    )
    first, second = (list(training_batches(images, size=4, steps=6, seed=2)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.image, b.image)
        value = (a.image[:, 0] * 63.75 + 127.5).round().long()
        assert torch.equal(value, a.label)
        assert torch.equal(value > 9, a.needs)
    corners = {int(batch.label[0, 0, 0]) % 64 for batch in first}
    assert len(corners) > 1, "some are flipped"
    seen = torch.cat([batch.label.flatten(1).min(1).values for batch in first[:3]])
    assert sorted(seen.tolist()) == sorted(2 * labels.reshape(6, -1).min(1).tolist())


def test_images_are_kept(tmp_path):
    drawn = images_of("far", 5, 3, tmp_path)
    (path,) = tmp_path.iterdir()
    before = path.stat().st_mtime_ns
    again = images_of("far", 5, 3, tmp_path)
    assert path.stat().st_mtime_ns == before
    np.testing.assert_array_equal(drawn.pictures, again.pictures)
    np.testing.assert_array_equal(drawn.labels[2], draw_task(task="far", seed=5, index=2).semantic)


def test_a_finished_training_is_known_again_and_another_is_not(tmp_path):
    run = Run(task="far", pair="FPT ST", side="twin", seed=1, budget=TINY)
    assert gym.finished(run, tmp_path) is None
    found = gym.train(run, tmp_path)
    assert gym.finished(run, tmp_path) == found
    assert np.shape(found["right"]) == (2, 2)
    longer = Run(task="far", pair="FPT ST", side="twin", seed=1, budget=Budget(steps=3))
    assert gym.finished(longer, tmp_path) is None


def test_a_training_repeats(tmp_path):
    run = Run(task="boundary", pair="UN-EPT refinement", side="method", seed=1, budget=TINY)
    first, second = (train_and_count(run, tmp_path) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_counting_leaves_the_network_as_it_is(tmp_path):
    network = build("far", "SR", "method", seed=0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    right, union = count(network, images_of("far", 1, 3, tmp_path), "far")
    assert right.shape == union.shape == (3, 2)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_half_an_experiment_does_not_count(tmp_path):
    found = {("method", 1): 0, ("twin", 1): 0, ("method", 2): 0, ("twin", 3): 0}
    assert gym.whole_seeds(found) == [1]


def test_collecting_trains_nothing(tmp_path):
    with pytest.raises(SystemExit, match="no experiment has finished; leave --collect out"):
        gym.main(["--collect", "--only", "far", "--output", str(tmp_path)])
    assert not any(tmp_path.iterdir())


def test_runs_are_planned_seed_by_seed():
    runs = gym.planned(gym.EXPECTATIONS, 2, 0)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert len(runs) == 4 * len(gym.EXPECTATIONS)
    assert {run.seed for run in runs} == {1, 2}
    assert {run.budget.steps for run in runs if run.pair == "Segmenter"} == {400}
    assert {run.budget.steps for run in gym.planned(gym.EXPECTATIONS, 1, 7)} == {7}


def experiment(**changed):
    base = {
        "name": "far: SR",
        "task": "far",
        "expected": "method",
        "verdict": "surprise",
        "method": 0.9,
        "twin": 0.304,
        "difference": 0.596,
        "low": 0.5,
        "high": 0.7,
        "by_seed": [0.5, 0.6],
        "seeds": [1, 2],
        "seconds": [30.0, 30.0],
    }
    return base | changed


def test_table_and_plot(tmp_path):
    _, _, row = report.table_of([experiment()], level=0.95)
    told = "| far: SR | 90.0 | 30.4 | +59.6 [+50.0, +70.0] | 2 | method | **surprise** |"
    assert row == told
    report.draw_plot([experiment(), experiment(low=-0.1)], tmp_path / "x.png", margin=0.05)
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_the_page_is_what_its_result_file_says():
    page = (ROOT / report.PAGE).read_text()
    (source,) = set(re.findall(r"benchmarks/results/[\w-]+\.json", page))
    content = json.loads((ROOT / source).read_text())
    (plot,) = re.findall(r"\((\S+\.png)\)", page)
    assert (ROOT / "docs" / plot).exists()
    assert page == report.page_of(content, source, plot, (ROOT / report.NOTES).read_text())
    known = {e.name: e for e in gym.EXPECTATIONS}
    named = {e["name"] for e in content["experiments"]} | set(content.get("unfinished", []))
    assert named == set(known), "nothing that was expected is left out"
    for e in content["experiments"]:
        assert e["expected"] == known[e["name"]].winner
        assert e["verdict"] == verdict(e["expected"], e["low"], e["high"])
        assert e["parameters"][1] == pytest.approx(e["parameters"][0], rel=0.1)
