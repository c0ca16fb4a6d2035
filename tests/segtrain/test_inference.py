"""Inference: windows, views and stripes against plain formulas, the golden case, memory."""

import json
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctxops.segmenter import MaskTransformer, Segmenter
from ctxops.vit import VisionTransformer
from segtrain import inference
from segtrain.errors import UserError
from segtrain.inference import Inferencer, at_least, resized_rows, window_starts
from tests.shared_data import SHARED, needs_shared

GOLDENS = SHARED / "goldens" / "dev"
CLASSES = 5


class PixelModel(nn.Module):
    """Scores from colour and place in the window; any wrong crop or mirror changes them."""

    def __init__(self, num_classes: int = CLASSES):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(5, num_classes, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.batches: list[int] = []

    def forward(self, images):
        self.batches.append(len(images))
        height, width = images.shape[2:]
        y = torch.linspace(-1, 1, height, device=images.device)[:, None].expand(height, width)
        x = torch.linspace(-1, 1, width, device=images.device).expand(height, width)
        places = torch.stack([y, x]).expand(len(images), 2, height, width)
        return {"logits": self.drop(self.conv(torch.cat([images, places], dim=1))).mul(4)}


def image_of(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def inferencer(model=None, **changes) -> Inferencer:
    settings = {"num_classes": CLASSES, "normalisation": "vit", "window": 16, "stride": 12}
    return Inferencer(model or PixelModel(), **{**settings, **changes})


# ---- windows ---------------------------------------------------------------------------------
def test_windows_of_the_specification():
    assert window_starts(600, window=512, stride=480) == [0, 88]
    assert window_starts(900, window=512, stride=480) == [0, 388]
    assert window_starts(512, window=512, stride=480) == [0]
    assert window_starts(1472, window=512, stride=480) == [0, 480, 960]


@pytest.mark.parametrize(
    ("window", "stride"), [(512, 480), (480, 160), (512, 512), (480, 320), (768, 512)]
)
def test_windows_equal_the_clamped_grid(window, stride):
    for size in range(window, 3 * window, 7):
        count = max(size - window + stride - 1, 0) // stride + 1
        clamped = [min(i * stride, size - window) for i in range(count)]
        assert window_starts(size, window=window, stride=stride) == clamped


@pytest.mark.parametrize(("size", "window", "stride"), [(10, 16, 8), (32, 16, 17), (32, 16, 0)])
def test_windows_that_leave_pixels_out_are_refused(size, window, stride):
    with pytest.raises(ValueError, match=r"expected 1 <= stride <= window <= size.*; lower"):
        window_starts(size, window=window, stride=stride)


@pytest.mark.parametrize("size", [(16, 16), (29, 41), (41, 16), (17, 60), (64, 33)])
def test_sum_over_windows_is_their_mean_at_each_pixel(size):
    model = PixelModel().eval()
    view = torch.randn(3, *size)
    total, count = torch.zeros(CLASSES, *size), torch.zeros(size)
    for y in window_starts(size[0], window=16, stride=12):
        for x in window_starts(size[1], window=16, stride=12):
            cut = view[None, :, y : y + 16, x : x + 16]
            total[:, y : y + 16, x : x + 16] += model(cut)["logits"][0].detach()
            count[y : y + 16, x : x + 16] += 1
    with torch.no_grad():
        for batch in (1, 3, 100):
            model.batches.clear()
            found = inferencer(model, window_batch=batch).view_logits(view)
            torch.testing.assert_close(found, total / count, rtol=1e-5, atol=1e-5)
            assert max(model.batches) <= batch


def test_a_view_below_the_window_is_enlarged():
    assert at_least((54, 75), 64) == (64, 88)
    assert at_least((75, 54), 64) == (88, 64)
    assert at_least((30, 30), 64) == (64, 64)
    assert at_least((64, 500), 64) == (64, 500)
    with torch.no_grad():
        found = inferencer(PixelModel().eval()).view_logits(torch.randn(3, 5, 20))
    assert found.shape == (CLASSES, 16, 64)


@pytest.mark.parametrize("size", [(5, 20), (20, 5), (7, 9), (16, 16), (17, 30)])
def test_a_view_below_the_window_is_filled_up(size):
    """UN-EPT, 5.2: zeros at the right and at the bottom, cut off afterwards; nothing is resized."""
    model, view = PixelModel().eval(), torch.randn(3, *size)
    tool = inferencer(model, pad="zero")
    filled = torch.zeros(3, max(size[0], 16), max(size[1], 16))
    filled[:, : size[0], : size[1]] = view
    with torch.no_grad():
        found = tool.view_logits(view)
        expected = inferencer(model).view_logits(filled)[:, : size[0], : size[1]]
    assert found.shape == (CLASSES, *size)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert tool.settings()["pad"] == "zero"
    image = image_of(*size)
    assert inferencer(model, pad="zero", flip=True).labels(image).shape == size


# ---- stripes ------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", [(9, 14), (40, 33), (1, 1), (20, 27)])
@pytest.mark.parametrize("size", [(20, 27), (9, 14), (1, 5)])
def test_stripes_equal_the_whole_resize(source, size):
    logits = torch.randn(4, *source)
    whole = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
    for step in (1, 3, 100):
        starts = range(0, size[0], step)
        parts = [resized_rows(logits, size, s, min(s + step, size[0])) for s in starts]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


# ---- views -----------------------------------------------------------------------------------
def mean_probabilities(model, image, *, sizes, flip=True, order=None) -> torch.Tensor:
    """Section 4.3 written out: resize, mirror back, softmax, mean."""
    pixels = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    total = []
    for size in sizes:
        view = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
        for mirrored in (False, True)[: 1 + flip]:
            logits = model(view.flip(3) if mirrored else view)["logits"]
            full = F.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)
            if mirrored:
                full = full.flip(3)[:, order] if order else full.flip(3)
            total.append(full.softmax(dim=1)[0])
    return torch.stack(total).mean(dim=0)


@pytest.mark.parametrize("stripe_bytes", [1, 4000, 2**25])
def test_views_are_averaged_as_probabilities(stripe_bytes, monkeypatch):
    monkeypatch.setattr(inference, "STRIPE_BYTES", stripe_bytes)
    model, image = PixelModel().eval(), image_of(22, 31)
    tool = inferencer(model, mode="whole", ratios=(0.5, 1.0, 1.5), flip=True)
    with torch.no_grad():
        expected = mean_probabilities(model, image, sizes=[(11, 15), (22, 31), (33, 46)])
    found = tool.probabilities(image)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (tool.labels(image) == expected.argmax(0).numpy()).all()
    torch.testing.assert_close(found.sum(0), torch.ones(22, 31))


class TwoViews(nn.Module):
    """Unsure of class 0 in a narrow view, very sure of class 1 in a wide one."""

    def forward(self, images):
        values = [3.0, 0.0, 2.0] if images.shape[3] < 8 else [0.0, 3.9, 2.0]
        return {"logits": torch.tensor(values)[:, None, None].expand(1, 3, *images.shape[2:])}


def test_averaging_logits_instead_would_give_another_class():
    tool = inferencer(TwoViews(), num_classes=3, mode="whole", ratios=(0.5, 1.0))
    logits = torch.tensor([[3.0, 0.0, 2.0], [0.0, 3.9, 2.0]])
    best = logits.softmax(1).mean(0).argmax(), logits.mean(0).argmax()
    assert best[0] != best[1]
    assert (tool.labels(image_of(8, 8)) == best[0].item()).all()


def test_pairs_change_places_in_the_mirror():
    model, image = PixelModel().eval(), image_of(20, 20)
    tool = inferencer(model, mode="whole", flip=True, flip_pairs=[(1, 3)])
    with torch.no_grad():
        order = [0, 3, 2, 1, 4]
        expected = mean_probabilities(model, image, sizes=[(20, 20)], order=order)
        plain = mean_probabilities(model, image, sizes=[(20, 20)])
    torch.testing.assert_close(tool.probabilities(image), expected, rtol=1e-5, atol=1e-5)
    assert (expected - plain).abs().max() > 0.01


def test_one_view_needs_no_probabilities_and_gives_the_same_labels():
    tool, image = inferencer(), image_of(30, 45)
    assert (tool.labels(image) == tool.probabilities(image).argmax(0).numpy()).all()


def test_base_size_makes_the_scale_independent_of_the_file():
    model, image = PixelModel().eval(), image_of(30, 60)
    tool = inferencer(model, mode="whole", base_size=(80, 20))
    with torch.no_grad():
        expected = mean_probabilities(model, image, sizes=[(20, 40)], flip=False)
    torch.testing.assert_close(tool.probabilities(image), expected, rtol=1e-5, atol=1e-5)


def test_modes_of_parts_are_restored():
    model = PixelModel().train()
    model.conv.eval()
    tool = inferencer(model)
    assert (tool.labels(image_of(20, 20)) == tool.labels(image_of(20, 20))).all()
    assert (model.training, model.conv.training, model.drop.training) == (True, False, True)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (37, 1)])
def test_tiny_images(size):
    labels = inferencer(ratios=(1.0, 1.5), flip=True).labels(image_of(*size))
    assert (labels.shape, labels.dtype) == (size, np.uint8)


def test_bf16_is_finite_and_close():
    image = image_of(30, 40)
    exact, rough = (inferencer(precision=p).probabilities(image) for p in ("fp32", "bf16"))
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).abs().max() < 0.1


@pytest.mark.gpu
def test_a_gpu_gives_the_same_probabilities():
    settings = {"ratios": (0.5, 1.5), "flip": True, "flip_pairs": [(1, 3)]}
    image = image_of(30, 40)
    expected = inferencer(PixelModel(), **settings).probabilities(image)
    tool = inferencer(PixelModel().cuda(), device="cuda", **settings)
    # Convolutions may run in TF32.
    torch.testing.assert_close(tool.probabilities(image).cpu(), expected, rtol=0, atol=5e-3)
    assert (tool.labels(image) == tool.probabilities(image).argmax(0).cpu().numpy()).all()


# ---- golden ----------------------------------------------------------------------------------
class Dict(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return {"logits": self.model(images)}


def golden_segmenter() -> nn.Module:
    """The model of the case `segmenter_mask`."""
    case = json.loads((GOLDENS / "segmenter_mask.json").read_text())["constructor"]
    width, heads = case["d_model"], case["n_heads"]
    encoder = VisionTransformer(
        image_size=tuple(case["image_size"]),
        patch_size=case["patch_size"],
        embed_dim=width,
        num_layers=case["n_layers"],
        num_heads=heads,
    )
    decoder = MaskTransformer(
        in_channels=width, num_classes=case["n_cls"], embed_dim=width, num_heads=heads, num_layers=2
    )
    model = Segmenter(encoder=encoder, decoder=decoder).eval()
    weights = load_file(GOLDENS / "segmenter_mask.weights.safetensors")
    model.load_state_dict({k: v.float() for k, v in weights.items() if "encoder.head" not in k})
    return Dict(model)


@needs_shared
@pytest.mark.parametrize("stripe_bytes", [10_000, 2**25])
def test_golden_views_and_their_mean(stripe_bytes, monkeypatch):
    monkeypatch.setattr(inference, "STRIPE_BYTES", stripe_bytes)
    case = json.loads((GOLDENS / "segmenter_inference.json").read_text())
    tensors = load_file(GOLDENS / "segmenter_inference.safetensors")
    atol = {k: v["suggested_atol_float32"] for k, v in case["tolerance"].items()}
    size = case["constructor"]["ori_shape"]
    tool = inferencer(golden_segmenter(), num_classes=7, window=64, stride=48, window_batch=2)
    with torch.no_grad():
        views = [(tool.view_logits(tensors[f"input.view{n}"][0]), n % 2 == 1) for n in range(4)]
        for number, view in enumerate(views):
            key = f"output.probabilities_view{number}"
            found = tool.mean_probabilities([view], size)
            torch.testing.assert_close(found, tensors[key], rtol=0, atol=atol[key])
        found = tool.mean_probabilities(views, size)
    key = "output.probabilities"
    torch.testing.assert_close(found, tensors[key], rtol=0, atol=atol[key])
    assert (found.argmax(0) == tensors["output.argmax"]).all()


# ---- memory ----------------------------------------------------------------------------------
class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that were made and are still alive, and their maximum."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        if storage._cdata in self.seen:
            return
        self.seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key, size):
        self.seen.discard(key)
        self.now -= size


class Cheap(nn.Module):
    """Logits that cost next to nothing beyond their own memory."""

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes

    def forward(self, images):
        scores = torch.arange(self.num_classes, dtype=torch.float32)[:, None, None]
        return {"logits": images[:, :1] * scores}


@pytest.mark.parametrize(("ratios", "buffers"), [((1.0,), 1), ((0.5, 1.0), 2)])
def test_memory_is_one_buffer_and_with_several_views_two(ratios, buffers, monkeypatch):
    classes, (height, width) = 150, (128, 256)
    buffer = classes * height * width * 4
    monkeypatch.setattr(inference, "STRIPE_BYTES", buffer // 32)
    tool = inferencer(
        Cheap(classes), num_classes=classes, window=32, stride=24, window_batch=2, ratios=ratios
    )
    with LiveBytes() as live:
        tool.labels(image_of(height, width))
    assert live.peak >= buffers * buffer
    assert live.peak < (buffers + 0.35) * buffer


@pytest.mark.slow
def test_memory_of_a_cityscapes_image_with_150_classes():
    classes, (height, width) = 150, (1024, 2048)
    buffer = classes * height * width * 4  # 1.26 GB
    tool = inferencer(Cheap(classes), num_classes=classes, window=512, stride=480, window_batch=1)
    with LiveBytes() as live:
        labels = tool.labels(image_of(height, width))
    assert labels.shape == (height, width)
    assert live.peak / buffer < 1.25


# ---- errors ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)]
)
def test_other_arrays_are_refused(image):
    with pytest.raises(UserError, match=r"expected an RGB image \[H, W, 3\] of bytes, got"):
        inferencer().labels(image)


def test_a_model_of_other_classes_is_refused():
    with pytest.raises(UserError, match="the model scores 5 classes, the data set has 7; use"):
        inferencer(num_classes=7).labels(image_of(20, 20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "tile"}, "mode must be slide or whole, got 'tile'"),
        ({"normalisation": "auto"}, "normalisation must be imagenet or vit"),
        ({"precision": "fp16"}, "precision must be fp32 or bf16"),
        ({"stride": 20}, "lower the stride"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        inferencer(**change)
