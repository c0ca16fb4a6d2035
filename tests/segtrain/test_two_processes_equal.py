"""Two processes with two images each are one process with four: networks, norms, evaluation.

Everything is in float64, so that what differs is no rounding. Torch has synchronised batch norms
for GPUs only: networks are converted as on GPUs, and then compute what `synced_norm` says.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from segtrain import dist
from segtrain.config.schema import LossConfig
from segtrain.criterion import LABELS, build_criterion, count_pixels
from segtrain.evaluation.evaluate import evaluate
from segtrain.evaluation.trained import load_trained
from segtrain.train import state as train_state
from segtrain.train.state import batch_norm_notice, build_state
from tests.segtrain.toy_network import network
from tests.segtrain.toy_runs import config_of, write_folder, write_run
from tests.segtrain.toy_segmenter import tiny
from tests.segtrain.toy_sr import toy
from tests.segtrain.toy_unept import patches, unept, with_boundaries
from tests.segtrain.train_toys import ToyModel, assert_close, config
from tests.segtrain.two_processes import launched
from tests.synced_norm import synced_forward

pytestmark = pytest.mark.timeout(900)  # the machine may be busy
SIZE, CLASSES, IMAGES = (32, 48), 5, 4
SCRIPT = """
import sys
from pathlib import Path
import torch
from tests.segtrain import test_two_processes_equal
torch.cuda.is_available = lambda: False
test_two_processes_equal.both(Path(sys.argv[1]))
"""
CPU = torch.device("cpu")
NETWORKS = {
    "segmenter": lambda: tiny(image_size=SIZE, drop_path_rate=0.0, decoder_dropout=0.0),
    "sr": lambda: toy("context sr"),
    "sr, gates": lambda: toy("sr gate"),
    "srnet": lambda: toy("srnet"),
    "unept": lambda: unept(),
    "fpt": lambda: network(head={"name": "fpt", "channels": 16, "width": 16}, aux=None),
    "psp": lambda: toy("psp"),  # its grid of one cell has a value per image
    "encoding": lambda: toy("context encoding"),  # it normalises tokens
    "deeplab, wide": lambda: toy("wide after_aspp"),
}
SPLITS = (1, 2, 5)  # images to evaluate: none in one process, as many in both, one more in one


def model_of(name: str) -> nn.Module:
    """The same everywhere, without dropout, every parameter away from its start."""
    torch.manual_seed(3)
    model = NETWORKS[name]().double()
    for module in model.modules():
        for chance in ("p", "prob", "drop_prob"):
            if "drop" in type(module).__name__.lower() and hasattr(module, chance):
                setattr(module, chance, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch(ranks: slice) -> dict[str, torch.Tensor]:
    """Images and labels; every one has another number of pixels that count."""
    torch.manual_seed(5)
    labels = patches(IMAGES, *SIZE)
    for number in range(IMAGES):
        labels[number, : 6 * number] = 255
    images = torch.randn(IMAGES, 3, *SIZE, dtype=torch.float64)
    return {name: x[ranks] for name, x in {"image": images, **with_boundaries(labels)}.items()}


def update(name: str, part: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Losses, gradients and statistics of one pass through what the loop is made of."""
    # Directions are learnt where the ground truth has boundaries: predictions are of one pass.
    boundary = {"direction_mask": "ground_truth"} if name == "unept" else None
    run = config("none", global_batch=IMAGES, sync_bn=True)
    loss = LossConfig.model_validate({"boundary": boundary})
    state = build_state(model_of(name), run, CPU)
    labels = {key: part[key] for key in LABELS if boundary or key == "label"}
    losses = build_criterion(loss)(state.forward(part["image"]), labels, count_pixels([labels]))
    torch.stack(list(losses.values())).sum().backward()
    return {
        "losses": {
            k: dist.sum_over_processes(v.detach()) / dist.world_size() for k, v in losses.items()
        },
        "gradients": {n: p.grad for n, p in state.model.named_parameters() if p.requires_grad},
        "statistics": dict(state.model.named_buffers()),
    }


def statistics_are_shared() -> dict[str, torch.Tensor]:
    """What each process would evaluate after a pass with norms that see its own images only."""
    run = config("none", sync_bn=False)
    torch.manual_seed(3)
    state = build_state(ToyModel(norm=True), run, CPU)
    torch.manual_seed(dist.rank())
    state.forward(torch.randn(2, 3, 8, 8))["logits"].sum().backward()
    before = state.model.norm.running_mean.clone()
    evaluated = state.evaluated_model()
    return {"before": before, "after": evaluated.norm.running_mean.clone()}


def scores(folder: Path, images: int, *, out: Path) -> str:
    """An evaluation with everything it can count; files go to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    t = load_trained(folder / f"run{images}")
    files = {"json_path": out / f"{images}.json", "counts_path": out / f"{images}.npz"}
    return repr(evaluate(t.model, t.layout, "val", t.config, CPU, **files))


def both(folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    train_state._wants_synced_norms = lambda options, _: options.sync_bn is True
    nn.SyncBatchNorm.forward = synced_forward
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None  # refuses CPUs
    with dist.process_group():
        dist.set_patience(1)  # where they hang, they say why before the test is ended
        own = slice(2 * dist.rank(), 2 * dist.rank() + 2)
        found = {name: update(name, batch(own)) for name in NETWORKS}
        found["shared"] = statistics_are_shared()
        # Rank 1 names another folder, so that what it wrote would be seen.
        out = folder / f"out{dist.rank()}"
        found["scores"] = {n: scores(folder, n, out=out) for n in SPLITS}
    torch.save(found, folder / f"{dist.rank()}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each process found; one launch for all."""
    folder = tmp_path_factory.mktemp("two")
    for images in SPLITS:
        root = write_folder(folder / f"data{images}", count=images)
        write_run(folder / f"run{images}", config_of(root))
    said, errors = launched(SCRIPT, folder, timeout=400)
    assert all((folder / f"{rank}.pt").is_file() for rank in (0, 1)), errors[0] + errors[1]
    assert said == ["", ""]
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_losses_gradients_and_statistics_of_one_process(name, two):
    expected = update(name, batch(slice(None)))
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model_of(name).modules())
    scale = max(float(g.abs().max()) for g in expected["gradients"].values())
    for found in two[1]:
        ours = found[name]
        assert_close(ours["losses"], expected["losses"], rtol=1e-12, atol=0)
        assert_close(ours["gradients"], expected["gradients"], rtol=1e-8, atol=1e-11 * scale)
        assert_close(ours["statistics"], expected["statistics"], rtol=1e-10, atol=1e-12)
    assert all(float(loss) for loss in expected["losses"].values())


def test_what_is_evaluated_is_the_same_everywhere(two):
    """Batch norms that are not synchronised have other statistics in every process."""
    first, second = (found["shared"] for found in two[1])
    assert not torch.equal(first["before"], second["before"])
    assert torch.equal(first["after"], second["after"])
    assert torch.equal(first["after"], first["before"])


@pytest.mark.parametrize("images", SPLITS)
def test_evaluation_is_that_of_one_process(images, two, tmp_path):
    """mIoU, IoU of classes, boundary IoU and size groups, bit for bit, by every process."""
    folder, found = two
    expected = scores(folder, images, out=tmp_path)
    assert found[0]["scores"][images] == found[1]["scores"][images] == expected
    assert f"images={images}," in expected
    assert (folder / f"out0/{images}.json").read_bytes() == (
        tmp_path / f"{images}.json"
    ).read_bytes()
    one, both_ = (np.load(path / f"{images}.npz") for path in (tmp_path, folder / "out0"))
    assert set(one) == set(both_)
    for key in one:
        assert np.array_equal(one[key], both_[key]), key
    assert sorted(one["images"]) == sorted({str(n) for n in range(images)})  # each once


def test_only_the_main_process_writes(two):
    folder, _ = two
    assert len(list((folder / "out0").iterdir())) == 2 * len(SPLITS)
    assert not list((folder / "out1").iterdir())


def test_norms_that_cannot_be_synchronised_are_told_of(monkeypatch):
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    told = [
        batch_norm_notice(ToyModel(norm=True), config("none", sync_bn=choice), CPU)
        for choice in (True, "auto", False)
    ]
    assert all(text.startswith("batch norms see 2 of the 4 images of an update: ") for text in told)
    assert [text.endswith("sync_bn: true needs a GPU for each process") for text in told] == [
        True,
        False,
        False,
    ]
