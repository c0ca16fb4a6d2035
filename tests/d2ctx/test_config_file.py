"""Errors in YAML files and in KEY VALUE pairs."""

import pytest
from detectron2.config import get_cfg

from d2ctx import UserError, add_d2ctx_config
from d2ctx.config_file import check_registry_names, merge_config


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_d2ctx_config(cfg)
    return cfg


def refusal(cfg, path=None, opts=()) -> str:
    with pytest.raises(UserError) as caught:
        merge_config(cfg, config_file=path and str(path), opts=list(opts))
    return str(caught.value)


def yaml_refusal(cfg, tmp_path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    message = refusal(cfg, path)
    assert "run.yaml" in message
    return message


def test_file_and_pairs_are_merged_in_this_order(cfg, tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER: {MAX_ITER: 5, BASE_LR: 0.5}\n")
    (tmp_path / "run.yaml").write_text("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 6}\n")
    merge_config(cfg, config_file=str(tmp_path / "run.yaml"), opts=["MODEL.A2FPN.GATE", "sigmoid"])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (6, 0.5)
    assert cfg.MODEL.A2FPN.GATE == "sigmoid"
    merge_config(cfg, config_file=None, opts=["SOLVER.MAX_ITER", "7"])
    assert cfg.SOLVER.MAX_ITER == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "MODEL: {ROI_HEADS: {NUM_CLASS: 3}}",
            "unknown key MODEL.ROI_HEADS.NUM_CLASS; did you mean MODEL.ROI_HEADS.NUM_CLASSES?",
        ),
        ("MODEL: {A2FPN: {GATES: a}}", "did you mean MODEL.A2FPN.GATE?"),
        (
            "MODEL: {ROI_HEADS: {NUM_CLASSES: three}}",
            "MODEL.ROI_HEADS.NUM_CLASSES must be int, for example 80, got str three",
        ),
        ("SOLVER: {BASE_LR: 1}", "SOLVER.BASE_LR must be float, for example 0.001, got int 1; "),
        ("SOLVER: {BASE_LR: 1}", "write 1.0"),
        ('DATASETS: {TRAIN: "a"}', 'DATASETS.TRAIN must be tuple, got str a; write ("a",)'),
        ("MODEL: {BACKBONE: 3}", "MODEL.BACKBONE must be a section of KEY: VALUE lines, got int 3"),
        ("MODEL: 3", "MODEL must be a section of KEY: VALUE lines, got 3"),
        ("MODEL: {WEIGHTS: 2020-01-01}", "MODEL.WEIGHTS: a datetime.date is no configuration"),
        ("MODEL: {}\nMODEL: {}", "line 2: the key MODEL stands twice"),
        ("MODEL:\n  1: 2", "line 2: the key '1' is no text"),
        ("", "must hold KEY: VALUE lines, got nothing"),
        ("- 1", "must hold KEY: VALUE lines, got list"),
        ("MODEL: [1, 2\nSOLVER: 3", "is not valid YAML: line 2, column 7"),
        ("MODEL:\n\tWEIGHTS: a", "is not valid YAML: line 2, column 1"),
        ("_BASE_: other.yaml", "other.yaml does not exist"),
        ("_BASE_: run.yaml", "_BASE_ leads back to the file itself"),
        ("VERSION: 9", "Cannot merge a v9 config"),
    ],
)
def test_yaml_errors(cfg, tmp_path, text, message):
    assert message in yaml_refusal(cfg, tmp_path, text)


@pytest.mark.parametrize("tag", ["python/object/apply:os.system [ls]", "python/tuple [1, 2]"])
def test_tags_that_could_run_code_are_refused(cfg, tmp_path, tag):
    message = yaml_refusal(cfg, tmp_path, f"VERSION: 2\nMODEL:\n  WEIGHTS: !!{tag}\n")
    assert f"line 3: the tag !!{tag.split()[0]} is refused" in message


def test_the_message_names_the_base_file_that_holds_the_error(cfg, tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER: {MAX_ITR: 5}\n")
    (tmp_path / "run.yaml").write_text("_BASE_: base.yaml\n")
    message = refusal(cfg, tmp_path / "run.yaml")
    assert message == (
        f"{tmp_path / 'base.yaml'}: unknown key SOLVER.MAX_ITR; did you mean SOLVER.MAX_ITER?"
    )


def test_anchors_and_merge_keys_are_plain_yaml(cfg, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("SOLVER: &a {MAX_ITER: 5}\nVERSION: 2\n")
    merge_config(cfg, config_file=str(path), opts=None)
    path.write_text("SOLVER:\n  <<: {MAX_ITER: 5}\n  <<: {BASE_LR: 0.5}\nVERSION: 2\n")
    merge_config(cfg, config_file=str(path), opts=None)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (5, 0.5)


def test_our_keys_without_our_nodes_name_the_missing_call(tmp_path):
    call = r"did you call d2ctx.add_d2ctx_config\(cfg\) before merging\?"
    path = tmp_path / "run.yaml"
    path.write_text("MODEL: {A2FPN: {GATE: sigmoid}}")
    with pytest.raises(UserError, match=f"unknown key MODEL.A2FPN; {call}"):
        merge_config(get_cfg(), config_file=str(path), opts=[])
    with pytest.raises(UserError, match=f"unknown key DATASETS.CHECK; {call}"):
        merge_config(get_cfg(), config_file=None, opts=["DATASETS.CHECK", "off"])


def test_a_missing_file_is_named(cfg, tmp_path):
    assert "none.yaml does not exist; check the path" in refusal(cfg, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.DEVICE"], "expected KEY VALUE pairs, got 1 word"),
        (["MODEL.DEVCE", "cpu"], "unknown key MODEL.DEVCE; did you mean MODEL.DEVICE?"),
        (["MODEL.DEVICE=cpu"], "write KEY VALUE: MODEL.DEVICE cpu"),
        (["MODEL.DEVICE", "cpu", "--eval-only"], "the option --eval-only stands among"),
        (["DATASETS.TRAIN", "a"], 'DATASETS.TRAIN must be tuple, got str a; write ("a",)'),
        (["SOLVER.BASE_LR", "1"], "must be float, for example 0.001, got int 1; write 1.0"),
        (["SOLVER.MAX_ITER.X", "1"], "unknown key SOLVER.MAX_ITER.X; did you mean SOLVER.MAX_ITER"),
    ],
)
def test_command_line_errors(cfg, opts, message):
    assert message in refusal(cfg, opts=opts)


def test_unknown_parts_list_the_nearest_registered_names(cfg):
    check_registry_names(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbon"
    cfg.MODEL.ROI_HEADS.NAME = "x"
    with pytest.raises(UserError) as caught:
        check_registry_names(cfg)
    message = str(caught.value)
    assert (
        "MODEL.BACKBONE.NAME: nothing is registered as 'build_resnet_fpn_backbon'; "
        "did you mean build_resnet_fpn_backbone"
    ) in message
    assert "MODEL.ROI_HEADS.NAME" in message
    assert "StandardROIHeads" in message


@pytest.mark.parametrize(
    "key",
    [
        "META_ARCHITECTURE",
        "BACKBONE.NAME",
        "PROPOSAL_GENERATOR.NAME",
        "ROI_HEADS.NAME",
        "ROI_BOX_HEAD.NAME",
        "ROI_MASK_HEAD.NAME",
    ],
)
def test_every_part_is_looked_up(cfg, key):
    merge_config(cfg, config_file=None, opts=[f"MODEL.{key}", "Nonsense"])
    with pytest.raises(UserError, match=f"MODEL.{key}: nothing is registered as 'Nonsense'"):
        check_registry_names(cfg)
