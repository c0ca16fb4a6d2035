"""The real commands on a tiny network: train, evaluate in every way, predict, submit."""

import json
from pathlib import Path

import pytest
import yaml

from segtrain.cli import main
from tests.segtrain.toy_runs import write_cityscapes

VIEWS = {
    "windows": ["eval.mode=slide", "eval.window=32", "eval.stride=20"],
    "whole": ["eval.mode=whole"],
    "scales": ["eval.mode=whole", "eval.ratios=[0.75,1.5]", "eval.flip=true"],
}


def write_config(folder: Path, model: dict, **sections: dict) -> Path:
    """Two small images in the layout of Cityscapes, two updates.

    Args:
        folder: Where data, file and run go.
        model: The section `model`.
        **sections: Other sections.

    Returns:
        The file; its run is `folder / "run"`.
    """
    root = folder / "cityscapes"
    for split in ("train", "val"):
        write_cityscapes(root, split=split)
    content = {
        "data": {
            **{"dataset": "cityscapes", "root": str(root), "workers": 0},
            **{"crop": [32, 48], "base_size": [64, 32]},
        },
        "model": model,
        "optim": {"lr": 0.01},
        "train": {"iters": 2, "global_batch": 2},
        "eval": {"window": 32, "stride": 20},
        "output": str(folder / "run"),
    } | sections
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def check_commands(folder: Path, model: dict, capsys: pytest.CaptureFixture, **sections) -> Path:
    """Train, evaluate, predict, submit; every command must end well and write what it should.

    Args:
        folder: An empty one.
        model: The section `model`.
        capsys: Of the test.
        **sections: Other sections of the configuration.

    Returns:
        The run folder.
    """
    config = write_config(folder, model, **sections)
    run, images = folder / "run", folder / "cityscapes/leftImg8bit/val/toy"
    assert main(["train", "--config", str(config)]) == 0
    capsys.readouterr()
    for name, keys in VIEWS.items():
        assert main(["eval", str(run), "--json", *keys]) == 0, name
        found = json.loads(capsys.readouterr().out)
        assert 0 <= found["miou"] <= 1, name
    assert main(["predict", str(run), str(images), "--out", str(folder / "seen")]) == 0
    assert len(list((folder / "seen/labels").glob("*.png"))) == 2
    out = folder / "results"
    assert main(["submit", "cityscapes", str(run), "--split", "val", "--out", str(out)]) == 0
    capsys.readouterr()
    assert len(list(out.rglob("*.png"))) == 2
    return run
