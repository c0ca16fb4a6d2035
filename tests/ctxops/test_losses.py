"""Losses of label maps against loops, PyTorch, stored numbers, and their rules on empty sets."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ctxops.boundary import bin_of_angle, boundary_mask, refine_logits
from ctxops.losses import (
    balance_weights,
    boundary_cross_entropy,
    count_classes,
    count_valid,
    cross_entropy,
    direction_cross_entropy,
    hard_labels,
    keep_labels,
    mean_over_processes,
    ohem_cross_entropy,
    weighted_sum,
)
from ctxops.resize import resize_bilinear
from tests.oracles import losses as oracle
from tests.shared_data import SHARED, needs_shared

SIZES = [(5, 7), (1, 1), (1, 6), (4, 1)]


def make(height, width, *, batch=2, classes=4, void=0.3, dtype=torch.float64):
    """Logits, and labels of which some are void."""
    logits = torch.randn(batch, classes, height, width, dtype=dtype)
    labels = torch.randint(0, classes, (batch, height, width))
    return logits, labels.masked_fill(torch.rand(batch, height, width) < void, 255)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 0.0, 1.0]])
def test_cross_entropy_equals_the_loop(size, weights):
    logits, labels = make(*size)
    given = None if weights is None else torch.tensor(weights)
    actual = cross_entropy(logits, labels, class_weights=given)
    assert actual.item() == pytest.approx(oracle.cross_entropy(logits, labels, weights=weights))


@pytest.mark.parametrize("ignore_index", [255, 0, -1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_equals_torchs_with_its_gradient(weighted, ignore_index):
    logits, labels = make(5, 7)
    labels[labels == 255] = ignore_index
    weights = torch.rand(4, dtype=torch.float64) if weighted else None
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    actual = cross_entropy(ours, labels, class_weights=weights, ignore_index=ignore_index)
    expected = F.cross_entropy(theirs, labels, weight=weights, ignore_index=ignore_index)
    torch.testing.assert_close(actual, expected)
    actual.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradcheck():
    logits, labels = make(3, 4)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels), (logits,))
    assert torch.autograd.gradcheck(
        lambda x: boundary_cross_entropy(x[:, :1], labels.clamp(max=1), balance=True), (logits,)
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_dtype(dtype):
    logits, labels = make(5, 7)
    assert cross_entropy(logits, labels.to(dtype)) == cross_entropy(logits, labels)


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, 5), void=st.floats(0, 1), ohem=st.booleans())
def test_parts_with_a_common_count_sum_to_the_whole(cut, void, ohem):
    """Two processes, or two accumulated batches, with different numbers of valid pixels."""
    logits, labels = make(3, 4, batch=6, void=void)
    labels[0, 0, 0] = 1
    if ohem:
        labels = hard_labels(logits, labels, min_kept=9)
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = cross_entropy(whole, labels)
    expected.backward()
    count = count_valid(labels[:cut]) + count_valid(labels[cut:])
    halves = (slice(0, cut), slice(cut, 6))
    actual = sum(cross_entropy(parts[h], labels[h], num_valid=count) for h in halves)
    actual.backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(parts.grad, whole.grad)


def test_a_count_below_one_is_taken_as_it_is():
    """One valid pixel on four processes is a quarter for each."""
    logits, labels = make(3, 4)
    once = cross_entropy(logits, labels, num_valid=torch.tensor(1.0))
    quarter = cross_entropy(logits, labels, num_valid=torch.tensor(0.25))
    torch.testing.assert_close(quarter, 4 * once)


def test_a_mean_of_means_would_be_wrong():
    """What the common count is for."""
    logits, labels = make(3, 4)
    labels[0, 1:] = 255
    halves = [cross_entropy(logits[i : i + 1], labels[i : i + 1]) for i in range(2)]
    assert (sum(halves) / 2 - cross_entropy(logits, labels)).abs() > 1e-3


def test_counts():
    labels = torch.tensor([[[0, 2, 2], [255, 2, 255]]], dtype=torch.uint8)
    assert count_valid(labels) == 4
    assert count_classes(labels, 4).tolist() == [1, 0, 3, 0]
    assert count_classes(labels.long(), 3, ignore_index=2).tolist() == [1, 0, 0]
    torch.testing.assert_close(
        balance_weights(count_classes(labels, 3)), torch.tensor([0.75, 1.0, 0.25])
    )
    assert balance_weights(torch.zeros(3)).tolist() == [1, 1, 1]
    assert balance_weights(torch.tensor([0.0, 5.0])).tolist() == [1, 0]


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.7, 5), (0.1, 20), (0.3, 1), (1.0, 3)])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 6)])
@pytest.mark.parametrize("void", [0.0, 0.5, 1.0])
def test_ohem_equals_the_rules(threshold, min_kept, size, void):
    logits, labels = make(*size, void=void)
    expected, kept = oracle.ohem(2 * logits, labels, threshold=threshold, min_kept=min_kept)
    options = {"threshold": threshold, "min_kept": min_kept}
    assert ohem_cross_entropy(2 * logits, labels, **options).item() == pytest.approx(expected)
    assert count_valid(hard_labels(2 * logits, labels, **options)) == kept


def test_ohem_is_the_cross_entropy_of_the_hard_labels_with_its_gradient():
    logits, labels = make(5, 7)
    ours, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    options = {"threshold": 0.2, "min_kept": 9}
    actual = ohem_cross_entropy(ours, labels, **options)
    expected = cross_entropy(parts, hard_labels(logits, labels, **options))
    torch.testing.assert_close(actual, expected)
    actual.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, parts.grad)
    given = ohem_cross_entropy(logits, labels, **options, num_valid=torch.tensor(4.0))
    kept = count_valid(hard_labels(logits, labels, **options))
    torch.testing.assert_close(given, actual.detach() * kept / 4)


def two_classes(probabilities):
    """Logits [1, 2, 1, N] that give label 0 these probabilities."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()])[None, :, None]


@pytest.mark.parametrize(
    ("threshold", "min_kept", "kept"),
    [
        (0.7, 1, [1, 1, 1, 0, 0]),  # the threshold decides
        (0.7, 4, [1, 1, 1, 1, 0]),  # more than pass the threshold
        (0.1, 2, [1, 1, 0, 0, 0]),
        (0.7, 5, [1, 1, 1, 1, 1]),
        (0.7, 9, [1, 1, 1, 1, 1]),  # fewer than are wanted
    ],
)
def test_hard_pixels_of_five(threshold, min_kept, kept):
    logits = two_classes([0.2, 0.4, 0.6, 0.8, 0.9])
    labels = torch.zeros(1, 1, 5, dtype=torch.int64)
    hard = hard_labels(logits, labels, threshold=threshold, min_kept=min_kept)
    assert (hard == 0).long().flatten().tolist() == kept


def test_ties_are_all_kept():
    logits, labels = two_classes([0.9] * 4), torch.zeros(1, 1, 4, dtype=torch.int64)
    assert count_valid(hard_labels(logits, labels, min_kept=2)) == 4


def test_void_is_not_counted_among_the_hard_pixels():
    logits = two_classes([0.8, 0.85, 0.9, 0.95])
    labels = torch.tensor([[[255, 255, 0, 0]]])
    hard = hard_labels(logits, labels, min_kept=1)
    assert hard.flatten().tolist() == [255, 255, 0, 255]
    assert hard_labels(logits, labels, min_kept=2).flatten().tolist() == [255, 255, 0, 0]


@pytest.mark.parametrize("size", SIZES)
def test_boundary_loss_of_one_channel_is_binary_cross_entropy(size):
    logits, labels = make(*size, classes=2)
    ours, theirs = logits[:, :1].clone().requires_grad_(), logits[:, :1].clone().requires_grad_()
    actual = boundary_cross_entropy(ours, labels)
    assert actual.item() == pytest.approx(oracle.binary_cross_entropy(logits, labels))
    actual.backward()
    valid = labels != 255
    F.binary_cross_entropy_with_logits(
        theirs[:, 0][valid], labels[valid].double(), reduction="sum"
    ).div(valid.sum().clamp(min=1)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_boundary_loss_of_extreme_logits_is_finite():
    logits = torch.tensor([1e4, -1e4]).view(1, 1, 1, 2).requires_grad_()
    loss = boundary_cross_entropy(logits, torch.tensor([[[0, 1]]]))
    loss.backward()
    assert loss == 1e4
    assert logits.grad.flatten().tolist() == [0.5, -0.5]


@pytest.mark.parametrize("channels", [1, 2])
def test_balanced_boundary_loss(channels):
    logits, labels = make(5, 7, classes=2)
    weights = [1 - share for share in oracle.frequencies(labels, 2)]
    pair = logits if channels == 2 else torch.stack([0 * logits[:, 1], logits[:, 1]], 1)
    expected = oracle.cross_entropy(pair, labels, weights=weights)
    actual = boundary_cross_entropy(logits[:, -channels:], labels, balance=True)
    assert actual.item() == pytest.approx(expected)


@pytest.mark.parametrize("balance", [False, True])
def test_direction_loss_sees_the_mask_only(balance):
    logits, bins = make(5, 7, classes=8)
    mask = torch.rand(2, 5, 7) < 0.5
    masked = bins.masked_fill(~mask, 255)
    weights = [1 - share for share in oracle.frequencies(masked, 8)] if balance else None
    expected = oracle.cross_entropy(logits, masked, weights=weights)
    logits.requires_grad_()
    loss = direction_cross_entropy(logits, bins, mask=mask, balance=balance)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert logits.grad.transpose(0, 1)[:, ~mask].abs().max() == 0


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_parts_with_common_counts_of_classes_sum_to_the_whole(balance, cut):
    """Of unequal frequencies, so that counts of a part would give other weights."""
    edges = torch.rand(4, 5, 7) < torch.linspace(0.1, 0.9, 4)[:, None, None]
    edge_logits, bins = torch.randn(4, 2, 5, 7), torch.randint(0, 8, (4, 5, 7))
    bins[:2].clamp_(max=2)
    bin_logits, mask = torch.randn(4, 8, 5, 7), torch.rand(4, 5, 7) < 0.6
    edges = edges.long()

    def boundary(part, counts=None):
        return boundary_cross_entropy(
            edge_logits[part], edges[part], class_counts=counts, balance=balance
        )

    def direction(part, counts=None):
        return direction_cross_entropy(
            *(bin_logits[part], bins[part]),
            **{"mask": mask[part], "class_counts": counts, "balance": balance},
        )

    counts = count_classes(edges, 2), count_classes(bins.masked_fill(~mask, 255), 8)
    for loss, found in zip((boundary, direction), counts, strict=True):
        whole = loss(slice(None))
        parts = [loss(part, found) for part in (slice(0, cut), slice(cut, 4))]
        torch.testing.assert_close(sum(parts), whole)


NOTHING = {
    "cross entropy": lambda x, y, _: cross_entropy(x, y),
    "weighted": lambda x, y, _: cross_entropy(x, y, class_weights=torch.ones(8)),
    "given count": lambda x, y, _: cross_entropy(x, y, num_valid=torch.zeros(())),
    "ohem": lambda x, y, _: ohem_cross_entropy(x, y),
    "boundary": lambda x, y, _: boundary_cross_entropy(x[:, :1], y),
    "balanced boundary": lambda x, y, _: boundary_cross_entropy(x[:, :2], y, balance=True),
    "direction": lambda x, y, m: direction_cross_entropy(x, y, mask=m),
    "balanced direction": lambda x, y, m: direction_cross_entropy(x, y, mask=m, balance=True),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", NOTHING)
def test_nothing_valid_is_zero_with_zero_gradient(name, batch):
    logits, labels = make(3, 4, batch=batch, classes=8, void=1.0)
    logits.requires_grad_()
    loss = NOTHING[name](logits, labels, torch.ones(batch, 3, 4, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("balance", [False, True])
def test_no_boundary_predicted(balance):
    logits, bins = make(3, 4, classes=8, void=0.0)
    logits.requires_grad_()
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    loss = direction_cross_entropy(logits, bins, mask=mask, balance=balance)
    loss.backward()
    assert loss == 0
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_fills_the_crop(label):
    """Its balanced weight is zero, and so is the sum of the weights."""
    logits = torch.randn(1, 2, 3, 4, requires_grad=True)
    labels = torch.full((1, 3, 4), label)
    plain = boundary_cross_entropy(logits, labels)
    assert plain > 0
    balanced = boundary_cross_entropy(logits, labels, balance=True)
    balanced.backward()
    assert balanced == 0
    assert logits.grad.abs().max() == 0


@needs_shared
def test_stored_losses():
    """The released variant: two boundary channels, balanced, refined by the raw logit."""
    folder = SHARED / "goldens" / "dev"
    tensors = load_file(folder / "unept_losses.safetensors")
    tolerance = json.loads((folder / "unept_losses.json").read_text())["tolerance"]
    names = ("logits", "boundary", "direction")
    leaves = {name: tensors[f"input.{name}"].requires_grad_() for name in names}
    logits, labels = leaves["logits"], tensors["input.label"][:, 0]
    size = labels.shape[-2:]
    boundary, direction = (resize_bilinear(leaves[n], size, align_corners=True) for n in names[1:])
    target = (tensors["input.distance"][:, 0] <= 5).long()
    bins = bin_of_angle(tensors["input.angle"][:, 0].float())
    assert torch.equal(target, tensors["output.boundary_label"][:, 0].long())
    assert torch.equal(bins, tensors["output.direction_bin"][:, 0].long())
    refined = refine_logits(logits, boundary, direction, mask_rule="logit")
    atol = tolerance["output.refined_logits"]["suggested_atol_float32"]
    torch.testing.assert_close(refined, tensors["output.refined_logits"], rtol=0, atol=atol)
    losses = {
        "seg_ce": cross_entropy(logits, labels),
        "refined_ce": cross_entropy(refined, labels),
        "boundary": boundary_cross_entropy(boundary, target, balance=True),
        "direction": direction_cross_entropy(
            direction, bins, mask=boundary_mask(boundary), balance=True
        ),
    }
    for name, loss in losses.items():
        torch.testing.assert_close(loss, tensors[f"output.loss_{name}"], rtol=1e-4, atol=0)
    weights = {"seg_ce": 0.8, "refined_ce": 1.0, "boundary": 5.0, "direction": 0.6}
    total = weighted_sum(losses, weights)
    torch.testing.assert_close(total, tensors["output.loss_total"], rtol=1e-4, atol=0)
    total.backward()
    for name in names:
        expected = tensors[f"output.grad_{name}"]
        torch.testing.assert_close(leaves[name].grad, expected, rtol=0, atol=1e-6)


def test_images_of_a_batch_do_not_mix():
    logits, labels = make(3, 4, batch=3, void=0.0)
    alone = [cross_entropy(logits[i : i + 1], labels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(cross_entropy(logits, labels), sum(alone) / 3)


@pytest.mark.parametrize("name", sorted(set(NOTHING) - {"given count"}))
def test_memory_layout_does_not_matter(name):
    logits, labels = make(3, 4, classes=8)
    labels[labels != 255] %= 2
    mask = torch.rand(2, 3, 4) < 0.7
    expected = NOTHING[name](logits, labels, mask)
    channels_last = logits.to(memory_format=torch.channels_last)
    strided = labels.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(NOTHING[name](channels_last, strided, mask), expected)


@pytest.mark.parametrize("name", sorted(set(NOTHING) - {"given count"}))
def test_half_precision_is_summed_in_float32(name):
    logits, labels = make(30, 40, classes=8, dtype=torch.float32)
    labels[labels != 255] %= 2
    mask = torch.rand(2, 30, 40) < 0.7
    low = logits.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = NOTHING[name](low, labels, mask)
        loss.backward()
    assert loss.dtype == torch.float32
    assert low.grad.dtype == torch.bfloat16
    assert low.grad.isfinite().all()
    expected = NOTHING[name](low.detach().double(), labels, mask)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_weighted_sum():
    losses = {"a": torch.tensor(2.0, requires_grad=True), "b": torch.tensor(3.0)}
    total = weighted_sum(losses, {"b": 0.5, "a": 2.0})
    total.backward()
    assert total == 5.5
    assert losses["a"].grad == 2


def test_without_processes_the_count_is_the_count():
    count = torch.tensor(7.0)
    assert mean_over_processes(count) is count


def test_one_process_divides_by_its_own_count():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        count = torch.tensor(7.0)
        assert mean_over_processes(count) == 7
        assert mean_over_processes(count) is not count
    finally:
        dist.destroy_process_group()


def _train_on_a_share(rank, folder, results):
    """One DDP step of one of two processes; the second image has far fewer valid pixels."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(_fresh_model())
    image, labels = (t[rank : rank + 1] for t in _uneven_batch())
    own = count_valid(labels)
    count = mean_over_processes(own)
    assert own == count_valid(labels)
    cross_entropy(model(image), labels, num_valid=count).backward()
    torch.save(model.module.weight.grad, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def _fresh_model():
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 4, 1)


def _uneven_batch():
    torch.manual_seed(1)
    labels = torch.randint(0, 4, (2, 5, 5))
    labels[1, 1:] = 255
    return torch.randn(2, 3, 5, 5), labels


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_train_on_a_share, args=(rank, str(tmp_path), str(tmp_path)))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    model = _fresh_model()
    image, labels = _uneven_batch()
    cross_entropy(model(image), labels).backward()
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), model.weight.grad)


LOGITS, LABELS = torch.zeros(1, 3, 4, 5), torch.zeros(1, 4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: cross_entropy(LOGITS.long(), LABELS), TypeError, "logits: expected a floating"),
        (lambda: cross_entropy(LOGITS, LABELS.float()), TypeError, "labels: expected integer"),
        (
            lambda: cross_entropy(LOGITS, LABELS[:, :2]),
            ValueError,
            r"labels: expected shape \(1, 4, 5\)",
        ),
        (
            lambda: cross_entropy(LOGITS, LABELS, class_weights=torch.ones(4)),
            ValueError,
            r"class_weights: expected one per class, \[3\], got \(4,\)",
        ),
        (
            lambda: boundary_cross_entropy(LOGITS, LABELS),
            ValueError,
            "expected 1 or 2 channels of boundary logits, got 3",
        ),
        (
            lambda: direction_cross_entropy(LOGITS, LABELS, mask=LABELS),
            TypeError,
            "mask: expected bool, got torch.int64",
        ),
        (
            lambda: keep_labels(LABELS, LABELS[:, None] > 0),
            ValueError,
            r"labels \(1, 4, 5\), got \(1, 1, 4, 5\); drop a channel axis",
        ),
        (
            lambda: hard_labels(LOGITS, LABELS, min_kept=0),
            ValueError,
            "min_kept: expected at least",
        ),
        (lambda: hard_labels(LOGITS, LABELS, threshold=0), ValueError, r"probability in \(0, 1\]"),
        (lambda: count_classes(LABELS, 0), ValueError, "num_classes: expected at least 1"),
        (
            lambda: weighted_sum({"a": LOGITS}, {"b": 1.0}),
            ValueError,
            r"weights: expected one for each of \['a'\], got \['b'\]; use weight 0",
        ),
        (lambda: weighted_sum({}, {}), ValueError, "weights: expected one for each"),
    ],
)
def test_says_what_is_wrong(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.slow
def test_compiled_and_exported_equal_eager():
    class Losses(torch.nn.Module):
        def forward(self, logits, labels, mask):
            return [loss(logits, labels, mask) for loss in NOTHING.values()]

    logits, labels = make(3, 4, classes=8, dtype=torch.float32)
    labels[labels != 255] %= 2
    inputs = logits, labels, torch.rand(2, 3, 4) < 0.7
    expected = Losses()(*inputs)
    torch.testing.assert_close(torch.compile(Losses(), fullgraph=True)(*inputs), expected)
    torch.testing.assert_close(torch.export.export(Losses(), inputs).module()(*inputs), expected)
