"""UN-EPT learns: its losses, its labels from the data workers, four images by heart, commands."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from ctxops.boundary import VECTORS, boundary_mask, flip_bins, refine_logits
from ctxops.resize import resize_bilinear
from segtrain.config.load import load_config
from segtrain.config.schema import LossConfig, RunConfig
from segtrain.config.unept import BoundaryLossConfig
from segtrain.criterion import count_pixels
from segtrain.data.boundary import BoundaryLabels, boundary_targets
from segtrain.data.dataset import SegDataset, build_train_transform
from segtrain.data.datasets import build_layout
from segtrain.data.loader import EpochSampler, train_loader
from segtrain.evaluation.boundary_iou import BoundaryCounts
from segtrain.train.checkpoint import save_best, weight_text
from segtrain.train.parts import further_labels
from segtrain.train.start import Parts, train
from segtrain.weights.load import load_weights
from tests.segtrain.network_runs import check_commands
from tests.segtrain.overfit import NUM_CLASSES, camvid_images, learned, synthetic_images
from tests.segtrain.test_models_unept import GOLDENS, RELEASED
from tests.segtrain.toy_network import CONTEXT, RESNET
from tests.segtrain.toy_runs import config_of, write_folder
from tests.segtrain.toy_unept import (
    VIT,
    losses_of,
    patches,
    section,
    stirred,
    unept,
    with_boundaries,
)
from tests.segtrain.train_toys import IMAGES, ToyImages, assert_close, config, feed, weights
from tests.shared_data import needs_shared

WEIGHTS = {"seg_weight": 2.0, "refined_weight": 3.0, "boundary_weight": 5.0}
PLAIN = {"seg_weight": 1.0, "refined_weight": 1.0, "boundary_weight": 1.0, "direction_weight": 1.0}


def outputs(batch=2, size=(39, 52), *, classes=1, seed=0):
    """Logits of a network that knows nothing, about half of all pixels boundary."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    channels = {"logits": 5, "refined": 5, "boundary": classes, "direction": 8}
    return {name: draw(batch, width, *size).requires_grad_() for name, width in channels.items()}


def cut(mapping, part):
    return {name: x[part] for name, x in mapping.items()}


# ---- losses ----------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", ["predicted", "ground_truth"])
def test_losses_by_the_definition(mask):
    found, labels = outputs(), with_boundaries(patches(2, 39, 52))
    terms = losses_of(found, labels, **WEIGHTS, direction_weight=7.0, direction_mask=mask)
    entropy = partial(F.cross_entropy, ignore_index=255)
    edges = labels["boundary"].long()
    known = edges != 255
    binary = F.binary_cross_entropy_with_logits(
        found["boundary"][:, 0][known], edges[known].double()
    )
    on = edges == 1 if mask == "ground_truth" else found["boundary"][:, 0].sigmoid() > 0.5
    bins = torch.where(on, labels["direction"].long(), 255)
    assert 0 < (bins != 255).sum() < known.sum()
    expected = {
        "loss_seg": 2 * entropy(found["logits"], labels["label"]),
        "loss_refined": 3 * entropy(found["refined"], labels["label"]),
        "loss_boundary": 5 * binary,
        "loss_direction": 7 * entropy(found["direction"], bins),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-6, atol=0, check_dtype=False)


def test_the_papers_weights_are_the_default():
    fields = BoundaryLossConfig()
    weights = fields.seg_weight, fields.refined_weight
    assert weights + (fields.boundary_weight, fields.direction_weight) == (1, 1.5, 3, 0.7)
    assert (fields.max_distance, fields.min_area) == (5, 100)


@needs_shared
def test_stored_losses_with_their_gradients():
    stored = load_file(GOLDENS / "unept_losses.safetensors")
    leaves = {n: stored[f"input.{n}"].requires_grad_() for n in ("logits", "boundary", "direction")}
    full = {
        name: resize_bilinear(leaves[name], (48, 64), align_corners=True)
        for name in ("boundary", "direction")
    }
    refined = refine_logits(leaves["logits"], **full, mask_rule="logit")
    terms = losses_of(
        {"logits": leaves["logits"], "refined": refined, **full},
        {
            "label": stored["input.label"][:, 0],
            "boundary": stored["output.boundary_label"][:, 0],
            "direction": stored["output.direction_bin"][:, 0],
        },
        **{"seg_weight": 0.8, "refined_weight": 1.0, "boundary_weight": 5.0},
        **{"direction_weight": 0.6, "balance": True},
    )
    scale = {"boundary": 5.0, "direction": 0.6}
    for name, weight in scale.items():
        expected = weight * stored[f"output.loss_{name}"]
        torch.testing.assert_close(terms[f"loss_{name}"], expected, rtol=1e-4, atol=0)
    total = sum(terms.values())
    torch.testing.assert_close(total, stored["output.loss_total"], rtol=1e-4, atol=0)
    total.backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, stored[f"output.grad_{name}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("classes", [1, 2])
def test_parts_add_up_to_the_whole(balance, classes):
    found, labels = outputs(4, classes=classes), with_boundaries(patches(4, 39, 52))
    labels["label"][0, :30] = 255  # parts of very different size
    options = {"balance": balance, "direction_mask": "ground_truth", **WEIGHTS}
    counts = count_pixels([labels])
    whole = losses_of(found, labels, **options)
    halves = [slice(0, 1), slice(1, 4)]
    parts = [losses_of(cut(found, h), cut(labels, h), counts, **options) for h in halves]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-12, atol=0)
    split = count_pixels([cut(labels, h) for h in halves])
    assert all(torch.equal(split[name], counts[name]) for name in counts)


def test_directions_on_predicted_boundaries_weigh_as_their_image():
    """How many there are is known after the forward pass: a mean of means by valid pixels."""
    found, labels = outputs(), with_boundaries(patches(2, 39, 52))
    labels["label"][0, :20] = 255
    counts = count_pixels([labels])
    parts = [slice(0, 1), slice(1, 2)]
    options = {"direction_weight": 1.0}
    together = [losses_of(cut(found, p), cut(labels, p), counts, **options) for p in parts]
    alone = [losses_of(cut(found, p), cut(labels, p), **options) for p in parts]
    shares = [(labels["label"][p] != 255).sum() / counts["label"] for p in parts]
    for part, own, share in zip(together, alone, shares, strict=True):
        expected = own["loss_direction"] * share
        # Counts are float32.
        torch.testing.assert_close(part["loss_direction"], expected, rtol=1e-6, atol=0)
    assert shares[0] < 0.7 * shares[1]


def hopeless(kind):
    found, labels = outputs(1), patches(1, 39, 52)
    if kind == "void":
        labels[:] = 255
    if kind == "one class":
        labels[:] = 3
    if kind == "no boundary predicted":
        found["boundary"] = (found["boundary"].detach() - 100).requires_grad_()
    return found, with_boundaries(labels)


@pytest.mark.parametrize("kind", ["void", "one class", "no boundary predicted"])
@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("mask", ["predicted", "ground_truth"])
def test_losses_are_finite_where_nothing_is_to_learn(kind, balance, mask):
    found, labels = hopeless(kind)
    terms = losses_of(found, labels, balance=balance, direction_mask=mask)
    assert all(torch.isfinite(term) for term in terms.values())
    sum(terms.values()).backward()
    assert all(torch.isfinite(x.grad).all() for x in found.values())
    if kind == "void":
        assert all(term == 0 for term in terms.values())
    if kind == "no boundary predicted" and mask == "predicted":
        assert terms["loss_direction"] == 0


def test_the_refined_loss_does_not_reach_the_boundary_heads():
    found = {name: x.float() for name, x in outputs().items()}
    leaves = {n: found[n].detach().requires_grad_() for n in ("logits", "boundary", "direction")}
    refined = refine_logits(leaves["logits"], leaves["boundary"], leaves["direction"])
    losses_of({**leaves, "refined": refined}, with_boundaries(patches(2, 39, 52)))[
        "loss_refined"
    ].backward()
    assert leaves["logits"].grad.any()
    assert leaves["boundary"].grad is None
    assert leaves["direction"].grad is None


# ---- configuration ---------------------------------------------------------------------------
def run_section(model: dict, **loss) -> RunConfig:
    content = {
        **{"data": {"dataset": "camvid", "root": "r", "crop": [32, 32], "base_size": [32, 32]}},
        **{"model": model, "loss": loss, "optim": {"lr": 0.1}},
        "train": {"iters": 1, "global_batch": 1},
    }
    return RunConfig.model_validate(content)


HEADS = {
    "unept": section().model_dump(),
    "none": section(spatial_branch=False, query_embedding="learned").model_dump(),
    "context": {"name": "network", "backbone": RESNET, "head": CONTEXT},
    "segmenter": {"name": "segmenter", "variant": "Ti"},
}


@pytest.mark.parametrize("name", HEADS)
def test_boundary_losses_belong_to_heads_that_predict_boundaries(name):
    wants = name == "unept"
    run = run_section(HEADS[name], **({"boundary": {}} if wants else {}))
    assert (further_labels(run) is not None) == wants
    message = r"write loss\.boundary: \{\}" if wants else r"write loss\.boundary: null"
    with pytest.raises(ValueError, match=message):
        run_section(HEADS[name], **({} if wants else {"boundary": {}}))


# ---- labels of the data workers --------------------------------------------------------------
def folder_data(tmp_path, **fields):
    run = config_of(write_folder(tmp_path / "data", count=3, split="train"))
    data = run.data.model_copy(
        update={
            **{"crop": (40, 40), "base_size": (60, 60), "scale": (1.5, 2.0)},  # nothing is padded
            **{"photometric": False, **fields},
        }
    )
    layout = build_layout(data)
    return layout, build_train_transform(data, layout)


def test_labels_are_made_behind_the_augmentation(tmp_path):
    layout, transform = folder_data(tmp_path)
    plain = SegDataset(layout, "train", transform, seed=3)
    asked = SegDataset(
        layout, "train", transform, seed=3, targets=BoundaryLabels(max_distance=3, min_area=20)
    )
    seen = set()
    for index in range(len(plain)):
        before, after = plain[2, index], asked[2, index]
        assert set(after) - set(before) == {"boundary", "direction"}
        assert torch.equal(before["label"], after["label"])
        expected = boundary_targets(before["label"].numpy(), max_distance=3, min_area=20)
        assert after["boundary"].dtype == torch.uint8
        np.testing.assert_array_equal(after["boundary"], expected.boundary)
        np.testing.assert_array_equal(after["direction"], expected.direction)
        seen |= set(after["boundary"].unique().tolist())
    assert seen >= {0, 1}


def test_directions_of_a_mirrored_crop_are_mirrored(tmp_path):
    found = []
    for flip in (0.0, 1.0):
        layout, transform = folder_data(tmp_path / str(flip), flip=flip)
        asked = BoundaryLabels(max_distance=3, min_area=20)
        found.append(
            [SegDataset(layout, "train", transform, targets=asked)[0, k] for k in range(3)]
        )
    for plain, mirrored in zip(*found, strict=True):
        assert torch.equal(plain["label"].flip(1), mirrored["label"])
        assert torch.equal(plain["boundary"].flip(1), mirrored["boundary"])
        # A pixel on the edge of a bin may fall to the other side.
        same = flip_bins(plain["direction"], "horizontal").flip(1) == mirrored["direction"]
        assert same.float().mean() > 0.97


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_them(workers, tmp_path):
    layout, transform = folder_data(tmp_path)
    asked = BoundaryLabels(max_distance=5, min_area=100)
    dataset = SegDataset(layout, "train", transform, targets=asked)
    sampler = EpochSampler(num_samples=3, global_batch=2)
    batch = next(iter(train_loader(dataset, sampler, workers=workers)))
    assert batch["boundary"].shape == batch["direction"].shape == batch["label"].shape


# ---- the loop --------------------------------------------------------------------------------
class EdgyModel(nn.Module):
    """Convolutions with all outputs of UN-EPT, and no norm that would mix the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        widths = {"logits": 3, "boundary": 1, "direction": 8}
        self.heads = nn.ModuleDict({name: nn.Conv2d(6, n, 1) for name, n in widths.items()})

    def forward(self, image):
        x = self.stem(image).relu()
        found = {name: head(x) for name, head in self.heads.items()}
        return found | {"refined": refine_logits(**found)}


class EdgyImages(ToyImages):
    """With the labels that a data set makes; the counts of boundary pixels differ."""

    def __getitem__(self, key):
        sample = super().__getitem__(key)
        return sample | BoundaryLabels(max_distance=1, min_area=4)(sample["label"])


def edgy_run(folder, **options):
    run = config(folder, loss={}, iters=3, **options)
    loss = LossConfig(boundary=BoundaryLossConfig(direction_mask="ground_truth", balance=True))
    run = run.model_copy(update={"loss": loss})
    torch.manual_seed(0)
    model = EdgyModel()
    train(run, build=lambda *_: Parts(model=model, feed=feed(run, images=EdgyImages()), images=12))
    return weights(folder)


def test_accumulation_does_not_change_the_update(tmp_path):
    assert IMAGES == 12
    once = edgy_run(tmp_path / "once")
    assert_close(edgy_run(tmp_path / "twice", micro_batch=2), once, rtol=1e-5, atol=1e-6)
    assert_close(edgy_run(tmp_path / "singly", micro_batch=1), once, rtol=1e-5, atol=1e-6)


# ---- learning by heart -----------------------------------------------------------------------
LEARNERS = {
    "resnet": {"backbone": RESNET | {"widths": [16, 16, 32, 32]}},
    "vit": {"backbone": VIT | {"embed_dim": 48, "patch_size": 8}},
}
WIDER = {"channels": 32, "points": 4, "ffn_dim": 64, "spatial_widths": [16, 32]}


def by_heart(name, images, labels, **options):
    model = unept(num_classes=NUM_CLASSES, image_size=images.shape[2:], **LEARNERS[name] | WIDER)
    loss = LossConfig(boundary=BoundaryLossConfig(max_distance=3, min_area=10))
    more = with_boundaries(labels, max_distance=3, min_area=10)
    del more["label"]
    return model, learned(model, images, labels, loss=loss, **options, **more)


@pytest.mark.parametrize("name", LEARNERS)
def test_four_scenes_are_learned_by_heart(name):
    torch.manual_seed(0)
    _, right = by_heart(name, *synthetic_images(64, 64), steps=60, lr=1e-2)
    assert right > 0.9


@needs_shared
@pytest.mark.parametrize("name", LEARNERS)
def test_four_streets_are_learned_by_heart(name):
    torch.manual_seed(0)
    images, labels = camvid_images(64, 96)
    model, right = by_heart(name, images, labels, steps=60, lr=1e-2)
    assert right > 0.9
    # What the heads say of the images they know.
    truth = with_boundaries(labels, max_distance=3, min_area=10)
    with torch.no_grad():
        found = model.train()(images)
    says, counted = boundary_mask(found["boundary"]), truth["boundary"] != 255
    assert (says == (truth["boundary"] == 1))[counted].float().mean() > 0.75
    aimed = (truth["boundary"] == 1) & (truth["direction"] != 255)
    assert (found["direction"].argmax(1) == truth["direction"])[
        aimed
    ].float().mean() > 0.25  # 1/8 by chance


def test_refining_with_true_boundaries_raises_the_boundary_iou():
    """Logits at an eighth miss borders; the neighbour towards the interior is right more often."""
    _, labels = synthetic_images(96, 96)
    coarse = F.one_hot(labels.clamp(max=11), 12).permute(0, 3, 1, 2).float()
    coarse = resize_bilinear(F.avg_pool2d(coarse, 4), (96, 96), align_corners=False)
    truth = with_boundaries(labels, max_distance=2, min_area=4)
    boundary = torch.where(truth["boundary"] == 1, 1.0, -1.0)[:, None]
    bins = truth["direction"].long()
    direction = F.one_hot(torch.where(bins == 255, 0, bins), len(VECTORS)).permute(0, 3, 1, 2)
    boundary = torch.where((bins == 255)[:, None], -1.0, boundary)
    refined = refine_logits(coarse, boundary, direction.float())
    scores = []
    for logits in (coarse, refined):
        counts = BoundaryCounts(12)
        for image, label in zip(logits.argmax(1), labels, strict=True):
            counts.update(image.numpy().astype(np.uint8), label.numpy().astype(np.uint8))
        scores.append(np.nanmean(counts.iou()))
    assert scores[1] > scores[0] + 0.02


# ---- the real commands -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("backbone", "head"),
    [(RESNET, {}), (VIT | {"distilled": True}, RELEASED)],
    ids=["paper", "released"],
)
def test_commands(backbone, head, tmp_path, capsys):
    model = section(backbone=backbone, **head).model_dump(mode="json", exclude_none=True)
    boundary = {"min_area": 4, "balance": bool(head)}
    run = check_commands(tmp_path, model, capsys, loss={"boundary": boundary})
    kept = load_config(run / "config.yaml")
    assert kept.loss.boundary.balance == bool(head)


def test_another_crop_resizes_the_tables_and_says_so(tmp_path):
    """Neither grid is a square: the file of a run tells them."""
    keys = {"backbone": VIT | {"distilled": True}, "query_embedding": "learned"}
    old = stirred(unept(image_size=(32, 48), **keys))
    new = unept(image_size=(48, 64), num_classes=3, **keys)
    run = config(tmp_path).model_copy(update={"model": section(**keys)})
    save_best(tmp_path, old.state_dict(), weight_text(old, run, 1))
    fit = load_weights(new, tmp_path / "checkpoints/best.safetensors", new_classes=True)
    assert fit.notes() == [
        "position table resized from 2x3 to 3x4",
        "query table resized from 4x6 to 6x8",
        "other classes, so these start anew: head.classifier.weight, head.classifier.bias",
    ]
    expected = old.head.query_embed((6, 8))[0]
    assert torch.equal(new.head.query_embed.weight, expected)
    assert torch.equal(new.backbone.pos_embed, old.backbone.position((3, 4)))
