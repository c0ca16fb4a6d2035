"""Weight files given to every loader of segtrain: none runs code, none ends in a traceback."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from segtrain.cli import main
from segtrain.config.schema import RunConfig
from segtrain.errors import UserError
from segtrain.train.checkpoint import read_checkpoint
from segtrain.weights.convert import convert
from segtrain.weights.inspect import summary
from segtrain.weights.load import initial_weights, load_weights
from segtrain.weights.official import read_variant
from segtrain.weights.read import read_weights
from tests.segtrain.config_files import small
from tests.segtrain.toy_segmenter import randomized, tiny

from . import weights
from .contract import CASES, generated, outcome
from .strategies import JSON

SIZES = {"embed_dim": 8, "depth": 2, "num_heads": 2, "patch_size": 4, "decoder_layers": 1}


def start(path: Path, key: str) -> None:
    """Train's way to its first weights."""
    model = {"name": "segmenter", **SIZES}
    changes = {"model": {**model, "pretrained": str(path)}} if key == "pretrained" else {}
    changes = changes or {"model": model, "init": str(path)}
    initial_weights(tiny(), RunConfig.model_validate({**small(), **changes}))


LOADERS = {
    "read": read_weights,
    "inspect": summary,
    "convert": lambda path: convert(path, path.with_name("out.safetensors")),
    "eval, predict": lambda path: load_weights(tiny(), path),
    "init": lambda path: start(path, "init"),
    "pretrained": lambda path: start(path, "pretrained"),
}


def given_to_all(path: Path, content: bytes, *, what: str) -> list[str]:
    """Every loader's refusal."""
    path.write_bytes(content)
    loaders = dict(LOADERS)
    if path.suffix == ".pt":
        loaders["resume"] = read_checkpoint
    return [
        outcome(lambda load=load: load(path), error=UserError, names=[path], what=what)[1]
        for load in loaders.values()
    ]


# ---- code ------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", list(weights.calls(Path("x"))))
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".tar", ".safetensors"])
def test_code_is_refused_and_not_run(tmp_path, way, suffix):
    sentinel = tmp_path / "sentinel"
    call = weights.calls(sentinel)[way]
    for number, content in enumerate(weights.nested(call).values()):
        for kind, written in weights.pickles(content).items():
            if (number + len(kind) + len(way)) % 5:  # every fifth of the combinations
                continue
            problems = given_to_all(tmp_path / f"a{suffix}", written, what="code in weights")
            assert all(problems), (kind, problems)
            assert not sentinel.exists()


def test_the_calls_would_run(tmp_path):
    """What is refused above does run where a file is read carelessly."""
    for way in ("eval", "exec", "open", "touch", "system"):
        sentinel = tmp_path / way
        pickle.loads(pickle.dumps(weights.calls(sentinel)[way]))
        assert sentinel.exists()


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_commands_name_the_code(fence, capsys, command):
    path, sentinel = fence / "a.pth", fence / "sentinel"
    path.write_bytes(weights.saved({"weight": weights.calls(sentinel)["eval"]}))
    more = [str(fence / "out.safetensors")] if command == "convert" else []
    CASES["commands"] += 1
    assert main(["weights", command, str(path), *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"segtrain: error: {path} names ")
    assert "eval, which could run code" in said
    assert said.count("\n") == 1
    assert [p.name for p in fence.iterdir()] == ["a.pth"]


# ---- broken files ----------------------------------------------------------------------------
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", list(weights.broken_torch(Path("x"))))
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".tar", ".safetensors"])
def test_broken_files_are_refused(fence, name, suffix):
    path = fence / f"a{suffix}"
    content = weights.broken_torch(fence.parent / "sentinel")[name]
    assert all(given_to_all(path, content, what="broken weights"))
    assert [p.name for p in fence.iterdir()] == [path.name]


@pytest.mark.parametrize("name", weights.BROKEN_SAFETENSORS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_broken_safetensors_are_refused(fence, name, suffix):
    path = fence / f"a{suffix}"
    assert all(given_to_all(path, weights.BROKEN_SAFETENSORS[name], what="broken weights"))
    assert [p.name for p in fence.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["folder", "link", "nowhere"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    path = tmp_path / "a.pth"
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(path)
    for load in LOADERS.values():
        _, problem = outcome(
            lambda load=load: load(path), error=UserError, names=[path], what="broken weights"
        )
        assert problem


WHOLE = {name: value.clone() for name, value in randomized(tiny()).state_dict().items()}


@given(
    suffix=st.sampled_from([".pth", ".safetensors"]),
    hits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=5),
    cut=st.floats(0.2, 1),
)
@generated(60)
def test_damaged_files_load_or_are_refused(place, suffix, hits, cut):
    content = bytearray(save(WHOLE) if suffix == ".safetensors" else weights.saved(WHOLE))
    content = content[: int(cut * len(content))]
    for where, value in hits:
        # Most of a file are numbers: half of the hits go to its first bytes.
        position = int(where * (len(content) - 1))
        content[position if value % 2 else position % 200] = value
    given_to_all(place / f"damaged{suffix}", bytes(content), what="damaged weights")


# ---- tensors that do not fit -----------------------------------------------------------------
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 16, 24]), max_size=5)
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool)


@given(
    changes=st.dictionaries(
        st.sampled_from(sorted(WHOLE)), st.none() | SHAPES, min_size=1, max_size=3
    ),
    kind=st.sampled_from((*TYPES, torch.complex64)),
    extra=st.lists(st.text(max_size=8), max_size=2),
)
@generated(60)
def test_wrong_tensors_are_refused_whole(place, changes, kind, extra):
    tensors = dict(WHOLE)
    for name, shape in changes.items():
        del tensors[name]
        if shape is not None:
            tensors[name] = torch.zeros(shape, dtype=kind)
    tensors |= {name: torch.zeros(1) for name in extra}
    path = place / "wrong.pth"
    path.write_bytes(weights.saved(tensors))
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, problem = outcome(
        lambda: load_weights(model, path), error=UserError, names=[path, *changes], what="tensors"
    )
    if problem:
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    else:
        after = model.state_dict()
        fits = {n for n, v in tensors.items() if n in after and v.shape == after[n].shape}
        assert fits == set(after), "something was left as it was"
        assert kind.is_floating_point or not any(changes.values())
    for load in (LOADERS["inspect"], LOADERS["convert"]):
        outcome(
            lambda load=load: load(path), error=UserError, names=[path, "tensor"], what="tensors"
        )


@given(
    field=st.sampled_from(["config", "grid", "grids", "names"]),
    value=JSON | st.sampled_from(["0x0", "2x3", "-2x-3", "9" * 5000 + "x1", "[" * 100_000, "{"]),
)
@generated(50)
def test_text_fields_are_not_trusted(place, field, value):
    text = value if isinstance(value, str) else json.dumps(value)
    path = place / "fields.safetensors"
    path.write_bytes(save(WHOLE, metadata={field: text.encode("utf-8", "replace").decode()}))
    for load in LOADERS.values():
        outcome(lambda load=load: load(path), error=UserError, names=[path], what="text fields")


@given(content=JSON)
@generated(30)
def test_variants_are_not_trusted(place, content):
    net = {"n_heads": 2, "n_cls": 5, "dropout": 0.0, "drop_path_rate": 0.1, "image_size": [8, 8]}
    net |= {"normalization": "vit", "decoder": {"name": "linear"}}
    whole = {"net_kwargs": net, "dataset_kwargs": {"crop_size": 8}, "inference_kwargs": {}}
    path = place / "variant.yml"
    for key in (None, *whole, *net):
        broken = {**whole, key: content} if key in whole else whole
        broken = {**whole, "net_kwargs": {**net, key: content}} if key in net else broken
        path.write_text(yaml.safe_dump(content if key is None else broken, allow_unicode=True))
        outcome(lambda: read_variant(path), error=UserError, names=[path], what="variants")
