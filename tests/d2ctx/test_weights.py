"""Weight files: what is loaded, what is refused, and how the report reads."""

import os
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from d2ctx import UserError
from d2ctx.weights import (
    SafeCheckpointer,
    compare_state,
    load_initial_weights,
    load_weights_file,
)


class Net(nn.Module):
    """A backbone under a prefix, a head, and a batch norm with its step counter."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {"bottom_up": nn.ModuleDict({"stem": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4)})}
        )
        self.head = nn.Linear(4, classes)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def dump(path: Path, content: object, protocol: int = 2) -> str:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return str(path)


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


class Runs:
    """Unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


# ---- reading ---------------------------------------------------------------------------------
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}])
def test_torch_files_are_unwrapped(net, tmp_path, wrap):
    path = tmp_path / "a.pth"
    torch.save(wrap(net.state_dict()), path)
    loaded = load_weights_file(str(path))
    assert loaded.keys() == net.state_dict().keys()
    assert torch.equal(loaded["head.weight"], net.head.weight)


def test_torch_files_may_hold_numpy(tmp_path):
    path = tmp_path / "a.pth"
    model = {"a": np.arange(3, dtype=np.int64), "b": torch.ones(2)}
    torch.save({"model": model, "score": np.float64(0.5), "when": np.float32(2)}, path)
    assert load_weights_file(str(path))["a"].tolist() == [0, 1, 2]


def test_safetensors(net, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(net.state_dict(), path)
    assert torch.equal(load_weights_file(str(path))["head.bias"], net.head.bias)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_zoo_pickles(net, tmp_path, protocol):
    content = {"model": arrays(net), "__author__": "zoo", "score": np.float32(1), "of": {1, 2}}
    loaded = load_weights_file(dump(tmp_path / "a.pkl", content, protocol))
    np.testing.assert_array_equal(loaded["head.weight"], net.head.weight.detach().numpy())


def test_detectron1_pickles_lose_their_momentum(tmp_path):
    blobs = {"conv1_w": np.ones((2, 2)), "conv1_w_momentum": np.ones((2, 2))}
    assert list(load_weights_file(dump(tmp_path / "a.pkl", {"blobs": blobs}))) == ["conv1_w"]


def test_pycls_files(tmp_path):
    path = tmp_path / "a.pyth"
    torch.save({"model_state": {"w": torch.ones(1), "n.num_batches_tracked": torch.ones(1)}}, path)
    assert list(load_weights_file(str(path))) == ["w"]


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, suffix):
    trace = tmp_path / "trace"
    path, content = tmp_path / f"a{suffix}", {"model": Runs(f"touch {trace}")}
    if suffix == ".pkl":
        dump(path, content)
    else:
        torch.save(content, path)
    message = refusal(load_weights_file, str(path))
    assert "names posix.system, which could run code" in message
    assert "convert it to .safetensors" in message
    assert not trace.exists()


@pytest.mark.parametrize(
    "named", [b"cbuiltins\neval\n.", b"cnumpy\nload\n.", b"ctorch.storage\n_load_from_bytes\n."]
)
def test_other_globals_are_named(tmp_path, named):
    path = tmp_path / "a.pkl"
    path.write_bytes(named)
    module, name = named.decode()[1:].split("\n")[:2]
    assert f"names {module}.{name}, which" in refusal(load_weights_file, str(path))


def test_codecs_other_than_latin1_are_refused(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(b"c_codecs\nencode\n(Va\nVrot13\ntR.")
    assert "is no readable weight file (codec rot13)" in refusal(load_weights_file, str(path))


def test_a_whole_pickled_model_is_refused(net, tmp_path):
    torch.save(net, tmp_path / "a.pth")
    assert "test_weights.Net, which could run code" in refusal(
        load_weights_file, str(tmp_path / "a.pth")
    )


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors", ""])
@pytest.mark.parametrize("content", [b"", b"hello world, these are no weights"])
def test_broken_files(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    message = refusal(load_weights_file, str(path))
    assert "is no readable weight file (" in message
    assert "Weights only load failed" not in message
    assert "download or copy it again" in message


def test_truncated_file(net, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(net.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    assert "is no readable weight file (PytorchStreamReader failed" in refusal(
        load_weights_file, str(path)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "must hold tensors by name, got list"),
        ({}, "must hold tensors by name, got dict {}"),
        ({"model": {"a": 1}}, "a must be a tensor, got int; save the model's state_dict() alone"),
    ],
)
def test_files_without_tensors(tmp_path, content, message):
    path = tmp_path / "a.pth"
    torch.save(content, path)
    assert message in refusal(load_weights_file, str(path))


def test_missing_and_unreachable_files(tmp_path):
    assert "do not exist; set MODEL.WEIGHTS" in refusal(load_weights_file, str(tmp_path / "a.pth"))
    assert "could not be fetched" in refusal(load_weights_file, "https://127.0.0.1:9/a.pth")


# ---- comparing -------------------------------------------------------------------------------
def test_compare_state_counts_tensors_and_elements(net):
    weights = net.state_dict()
    weights["head.weight"] = torch.zeros(5, 4)
    del weights["backbone.bottom_up.norm.num_batches_tracked"]
    del weights["backbone.bottom_up.norm.running_mean"]
    weights["extra.weight"] = torch.zeros(1)
    report = compare_state(net, weights)
    assert report.missing == ("backbone.bottom_up.norm.running_mean",)
    assert report.unexpected == ("extra.weight",)
    assert report.wrong_shape == {"head.weight": ((5, 4), (2, 4))}
    assert report.file_fraction == 6 / 8
    assert report.model_fraction == 1 - 8 / 34
    assert not report.complete
    assert report.table() == (
        "part         loaded  missing  wrong shape  unexpected  parameters\n"
        "(elsewhere)       0        0            0           1           -\n"
        "backbone          5        1            0           0  100% of 24\n"
        "head              1        0            1           0   20% of 10\n"
        "wrong shape: head.weight is (5, 4) in the file, (2, 4) in the model\n"
        "missing: backbone.bottom_up.norm.running_mean\n"
        "unexpected: extra.weight"
    )


def test_a_prefix_from_data_parallel_is_ignored(net):
    weights = {f"module.{name}": value for name, value in net.state_dict().items()}
    assert compare_state(net, weights).complete


# ---- initial weights -------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_backbone_alone_finds_its_place(net, tmp_path, suffix):
    path = str(tmp_path / f"a{suffix}")
    state = net.backbone["bottom_up"].state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    fresh = Net()
    report = load_initial_weights(fresh, path)
    assert report.file_fraction == 1
    assert report.model_fraction == 24 / 34
    assert torch.equal(fresh.backbone.bottom_up.stem.weight, net.backbone.bottom_up.stem.weight)


def test_caffe2_names_are_converted(net, tmp_path):
    blobs = {"stem_w": np.full((4, 3), 2.0, np.float32), "stem_b": np.ones(4, np.float32)}
    load_initial_weights(net, dump(tmp_path / "a.pkl", blobs))
    assert net.backbone.bottom_up.stem.weight.unique().item() == 2


def test_a_head_for_other_classes_is_left_out(net, tmp_path):
    torch.save(Net(classes=7).state_dict(), tmp_path / "a.pth")
    report = load_initial_weights(net, str(tmp_path / "a.pth"))
    assert list(report.wrong_shape) == ["head.weight", "head.bias"]


def test_weights_of_another_architecture_are_refused_unchanged(net, tmp_path):
    foreign = {f"layer{i}.weight": torch.zeros(2) for i in range(9)}
    foreign["head.bias"] = torch.full((2,), 9.0)
    torch.save(foreign, tmp_path / "a.pth")
    message = refusal(load_initial_weights, net, str(tmp_path / "a.pth"))
    assert "10% of its tensors have a place there" in message
    assert "expected at least 50%" in message
    assert "lower MODEL.WEIGHTS_MIN_MATCH" in message
    assert "unexpected: layer0.weight, layer1.weight, layer2.weight and 6 more" in message
    assert net.head.bias.max() < 9
    load_initial_weights(net, str(tmp_path / "a.pth"), threshold=0.1)
    assert net.head.bias.max() == 9


def test_ambiguous_names_are_explained(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "a.pth")
    assert "in more than one way" in refusal(load_initial_weights, model, str(tmp_path / "a.pth"))


def test_matching_can_be_asked_for_in_the_path(net, tmp_path):
    state = {"stem.weight": torch.full((4, 3), 5.0), "head.bias": torch.zeros(2)}
    path = str(tmp_path / "a.pth")
    torch.save(state, path)
    assert len(load_initial_weights(net, path).matched) == 1
    assert len(load_initial_weights(net, path + "?matching_heuristics=True").matched) == 2


def test_no_path_loads_nothing(net, tmp_path):
    assert SafeCheckpointer(net, str(tmp_path)).resume_or_load("", resume=True) == {}


# ---- resuming --------------------------------------------------------------------------------
def trained(folder: Path) -> tuple[Net, torch.optim.SGD]:
    """A model and its optimizer after a step, saved with iteration 7."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    checkpointer = SafeCheckpointer(model, str(folder), optimizer=weakref.proxy(optimizer))
    checkpointer.save("model_0000007", iteration=7)
    return model, optimizer


def test_resuming_restores_model_and_optimizer(tmp_path):
    model, optimizer = trained(tmp_path)
    fresh = Net()
    other = torch.optim.SGD(fresh.parameters(), lr=0.5, momentum=0.9)
    extra = SafeCheckpointer(fresh, str(tmp_path), optimizer=other).resume_or_load("none.pth")
    assert extra == {"iteration": 7}
    assert torch.equal(fresh.head.weight, model.head.weight)
    assert other.param_groups[0]["lr"] == 0.1
    for mine, theirs in zip(other.state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])


def test_without_resume_the_last_checkpoint_is_ignored(tmp_path):
    trained(tmp_path)
    fresh = Net()
    before = fresh.head.weight.clone()
    SafeCheckpointer(fresh, str(tmp_path)).resume_or_load("", resume=False)
    assert torch.equal(fresh.head.weight, before)


def test_a_checkpoint_of_another_model_is_not_resumed(tmp_path):
    trained(tmp_path)
    model = Net()
    model.extra = nn.Linear(1, 1)
    message = refusal(SafeCheckpointer(model, str(tmp_path)).resume_or_load, "")
    assert "2 of the model's are missing; resume with the configuration that wrote it" in message
    assert "missing: extra.weight, extra.bias" in message


def test_a_checkpoint_without_training_state_is_not_resumed(tmp_path):
    model, optimizer = trained(tmp_path)
    loader = SafeCheckpointer(model, str(tmp_path), trainer=optimizer)
    message = refusal(loader.resume_or_load, "")
    assert "holds no state of trainer: training cannot continue" in message
    assert "start without --resume" in message


def test_an_optimizer_that_does_not_fit_is_explained(tmp_path):
    model, _ = trained(tmp_path)
    other = torch.optim.SGD([model.head.weight], lr=0.5)
    message = refusal(SafeCheckpointer(model, str(tmp_path), optimizer=other).resume_or_load, "")
    assert "does not fit this run (loaded state dict contains a parameter group" in message


def test_a_vanished_last_checkpoint_is_named(tmp_path):
    model, _ = trained(tmp_path)
    (tmp_path / "model_0000007.pth").unlink()
    message = refusal(SafeCheckpointer(model, str(tmp_path)).resume_or_load, "")
    assert "model_0000007.pth do not exist; delete the file last_checkpoint" in message
