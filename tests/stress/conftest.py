"""What the fault tests share: the program imported once, and a few scenes."""

import pytest

from segtrain.cli import main
from tests.stress.forks import Forks
from tests.stress.kills import COMMAND, Trainer

# Imported once for all runs; what is missing here is imported by each of them.
_MODULES = (
    "segtrain.config.commands",
    "segtrain.train.parts",
    "segtrain.evaluation.evaluate",
    "torch._dynamo",
)

_SMALL = (
    *("data.crop=[32,32]", "data.base_size=[32,32]", "schedule.warmup_iters=2"),
    *("train.global_batch=2", "train.log_every=1"),
)
# Together they have all that a checkpoint holds: random paths, an average, norms with buffers, the
# files of several checkpoints, data workers.
CASES = {
    "segmenter": (
        "segmenter/seg_tiny_instant.yaml",
        *("model.drop_path_rate=0.2", "data.workers=0", "train.keep=2"),
        *("train.iters=36", "train.checkpoint_every=3", "train.eval_every=6"),
    ),
    "mlp": (
        "mlp/mlp_instant.yaml",
        *("data.workers=1", "train.ema_decay=0.9"),
        *("train.global_batch=4", "train.micro_batch=2"),
        *("train.iters=12", "train.checkpoint_every=2", "train.eval_every=3"),
    ),
    "short": (
        "segmenter/seg_tiny_instant.yaml",
        *("model.embed_dim=24", "model.depth=1", "model.drop_path_rate=0.2", "data.workers=0"),
        *("train.keep=2", "train.iters=6", "train.checkpoint_every=2", "train.eval_every=3"),
    ),
}


@pytest.fixture(scope="package")
def forks():
    with Forks(COMMAND, *_MODULES) as started:
        yield started


@pytest.fixture(scope="package")
def scenes(tmp_path_factory):
    """Twelve synthetic scenes of 32 pixels."""
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    size = ["--num", "12", "--size", "32", "--seed", "1"]
    assert main(["data", "synth", "--out", str(folder), "--format", "folder", *size]) == 0
    return folder


@pytest.fixture
def trainer(request, forks, scenes, tmp_path):
    """The case that the test names, or the short one."""
    config, *keys = CASES[getattr(request, "param", "short")]
    keys = (f"data.root={scenes}", *_SMALL, *keys)
    return Trainer(forks, config, keys, tmp_path)
