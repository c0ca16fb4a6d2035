"""Weight files given to every loader of Detectron2's side: none runs code, none a traceback."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from d2ctx.convert import convert
from d2ctx.convert import main as weights_main
from d2ctx.errors import UserError
from d2ctx.safe_read import read_checkpoint
from d2ctx.weights import SafeCheckpointer, load_initial_weights, load_weights_file

from . import weights
from .contract import CASES, generated, outcome

SUFFIXES = (".pth", ".pt", ".pyth", ".pkl", ".safetensors")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def resume(path: Path) -> None:
    """`--resume`: the file that `last_checkpoint` names."""
    (path.parent / "last_checkpoint").write_text(path.name)
    SafeCheckpointer(net(), str(path.parent)).resume_or_load("", resume=True)


LOADERS = {
    "read": lambda path: read_checkpoint(str(path)),
    "file": lambda path: load_weights_file(str(path)),
    "train, evaluate": lambda path: load_initial_weights(net(), str(path)),
    "resume": resume,
    "convert": lambda path: convert(str(path), path.with_name("out.safetensors")),
}


def given_to_all(path: Path, content: bytes, *, what: str) -> list[str]:
    """Every loader's refusal."""
    path.write_bytes(content)
    return [
        outcome(lambda load=load: load(path), error=UserError, names=[path], what=what)[1]
        for load in LOADERS.values()
    ]


# ---- code ------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", list(weights.calls(Path("x"))))
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_code_is_refused_and_not_run(tmp_path, way, suffix):
    sentinel = tmp_path / "sentinel"
    call = weights.calls(sentinel)[way]
    for number, content in enumerate(weights.nested(call).values()):
        for kind, written in weights.pickles(content).items():
            if (number + len(kind) + len(way)) % 7:  # every seventh of the combinations
                continue
            problems = given_to_all(tmp_path / f"a{suffix}", written, what="code in weights")
            assert all(problems), (kind, problems)
            assert not sentinel.exists()


@pytest.mark.parametrize("command", ["inspect", "convert"])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_commands_name_the_code(fence, capsys, command, suffix):
    path, sentinel = fence / f"a{suffix}", fence / "sentinel"
    content = {"weight": weights.calls(sentinel)["eval"]}
    path.write_bytes(weights.pickles(content)["protocol 2" if suffix == ".pkl" else "zip"])
    more = [str(fence / "out.safetensors")] if command == "convert" else []
    CASES["commands"] += 1
    assert weights_main([command, str(path), *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path} names ")
    assert "eval, which could run code" in said
    assert said.count("\n") == 1
    assert [p.name for p in fence.iterdir()] == [path.name]


# ---- broken files ----------------------------------------------------------------------------
BROKEN = {
    **{f"torch: {name}": name for name in weights.broken_torch(Path("x"))},
    **{f"pickle: {name}": name for name in weights.broken_pickles()},
    **{f"safetensors: {name}": name for name in weights.BROKEN_SAFETENSORS},
}


def broken(kind: str, sentinel: Path) -> bytes:
    files = {
        "torch": weights.broken_torch(sentinel),
        "pickle": weights.broken_pickles(),
        "safetensors": weights.BROKEN_SAFETENSORS,
    }
    return files[kind.partition(":")[0]][BROKEN[kind]]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused(fence, kind):
    for suffix in SUFFIXES:
        path = fence / f"a{suffix}"
        assert all(given_to_all(path, broken(kind, fence.parent / "x"), what="broken weights"))
        path.unlink()
    assert {p.name for p in fence.iterdir()} <= {"last_checkpoint"}


WHOLE = net().state_dict()


@given(
    suffix=st.sampled_from([".pth", ".safetensors", ".pkl"]),
    hits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=5),
    cut=st.floats(0.2, 1),
)
@generated(60)
def test_damaged_files_load_or_are_refused(place, suffix, hits, cut):
    contents = {
        ".pth": lambda: weights.saved({"model": WHOLE, "iteration": 5}),
        ".safetensors": lambda: save(WHOLE),
        ".pkl": lambda: weights.pickles({n: v.numpy() for n, v in WHOLE.items()})["protocol 2"],
    }
    content = bytearray(contents[suffix]())
    content = content[: int(cut * len(content))]
    for where, value in hits:
        position = int(where * (len(content) - 1))
        content[position if value % 2 else position % 200] = value
    given_to_all(place / f"damaged{suffix}", bytes(content), what="damaged weights")


# ---- tensors that do not fit -----------------------------------------------------------------
@given(
    changes=st.dictionaries(
        st.sampled_from(sorted(WHOLE)),
        st.none() | st.lists(st.sampled_from([0, 1, 2, 3, 6]), max_size=4),
        min_size=1,
        max_size=3,
    ),
    extra=st.lists(st.text(max_size=8), max_size=3),
)
@generated(60)
def test_wrong_tensors_are_reported(place, changes, extra):
    tensors = dict(WHOLE)
    for name, shape in changes.items():
        del tensors[name]
        if shape is not None:
            tensors[name] = torch.zeros(shape)
    tensors |= {name: torch.zeros(1) for name in extra}
    path = place / "wrong.pth"
    path.write_bytes(weights.saved({"model": tensors}))
    for name in ("train, evaluate", "resume", "convert"):
        outcome(
            lambda load=LOADERS[name]: load(path), error=UserError, names=[path], what="tensors"
        )


@pytest.mark.parametrize("named", ["../../etc/passwd", "/etc/passwd", "", ".", "\0", "gone.pth"])
def test_last_checkpoint_names_a_checkpoint_or_nothing(tmp_path, named):
    (tmp_path / "last_checkpoint").write_text(named)
    _, problem = outcome(
        lambda: SafeCheckpointer(net(), str(tmp_path)).resume_or_load("", resume=True),
        error=UserError,
        names=[tmp_path, "weights", "/etc/passwd"],
        what="broken weights",
    )
    assert problem
