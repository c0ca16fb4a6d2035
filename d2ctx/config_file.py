"""Reading YAML and KEY VALUE pairs into a configuration, with errors that name the fix."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

from detectron2 import modeling
from detectron2.config import CfgNode, get_cfg

from d2ctx.errors import UserError
from d2ctx.wording import did_you_mean, plural
from d2ctx.yaml_tree import read_yaml_tree

# Configuration key -> registry that must know its value.
REGISTRIES = {
    "MODEL.META_ARCHITECTURE": modeling.META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": modeling.BACKBONE_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": modeling.ANCHOR_GENERATOR_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": modeling.PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": modeling.RPN_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": modeling.ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": modeling.ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": modeling.ROI_MASK_HEAD_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": modeling.ROI_KEYPOINT_HEAD_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": modeling.SEM_SEG_HEADS_REGISTRY,
}
# Values that Detectron2 treats specially instead of looking them up.
NOT_LOOKED_UP = {"", "PrecomputedProposals"}
# What yacs says; the groups are what we say better.
_UNKNOWN = re.compile(r"Non-existent (?:config )?key: (?P<key>[^'\"\s]+)")
_MISMATCH = re.compile(
    r"Type mismatch \(<class '(?P<want>[^']+)'> vs\. <class '(?P<got>[^']+)'>\) "
    r"with values \(.*\) for config key: (?P<key>\S+)",
    re.DOTALL,
)
_NO_VALUE = re.compile(r"Key (?P<key>\S+) with value <class '(?P<got>[^']+)'> is not a valid type")
_MERGE_ERRORS = (AssertionError, KeyError, ValueError)
_ABSENT = object()


def merge_config(cfg: CfgNode, *, config_file: str | None, opts: Sequence[str] | None) -> None:
    """Merge a YAML file and then KEY VALUE pairs into `cfg`.

    After an error `cfg` may hold a part of what was merged.

    Args:
        cfg: A configuration with our nodes, see `d2ctx.add_d2ctx_config`.
        config_file: YAML file, which may name others as `_BASE_`; None merges none.
        opts: Flat list of keys and values, as they stand on a command line.

    Raises:
        UserError: On a missing or invalid file, an unknown key, a value of the wrong type, or a
            YAML tag that would run code.
    """
    if config_file:
        _merge_file(cfg, config_file)
    for key, value in _pairs(list(opts or [])):
        try:
            cfg.merge_from_list([key, value])
        except TypeError as error:  # a part of the key names a value, not a section
            raise UserError(f"command line: {_unknown_key(cfg, key)}") from error
        except _MERGE_ERRORS as error:
            raise UserError(f"command line: {_explain(cfg, error, value=value)}") from error


def _merge_file(cfg: CfgNode, config_file: str) -> None:
    tree = read_yaml_tree(config_file)
    for path, content in tree.items():
        for key, value in content.items():
            if isinstance(cfg.get(key), CfgNode) and not isinstance(value, dict):
                raise UserError(
                    f"{path}: {key} must be a section of KEY: VALUE lines, got {value!s:.80}"
                )
    try:
        cfg.merge_from_file(config_file, allow_unsafe=False)
    except (*_MERGE_ERRORS, AttributeError, RecursionError, TypeError) as error:
        text = _explain(cfg, error, tree=tree)
        raise UserError(f"{_origin(tree, error) or config_file}: {text}") from error


def _pairs(opts: list[str]) -> list[tuple[str, str]]:
    for key in opts[0::2]:
        if str(key).startswith("-"):
            raise UserError(
                f"command line: the option {key} stands among the KEY VALUE pairs; "
                "write options before the first key"
            )
        if "=" in str(key):
            name, _, value = str(key).partition("=")
            raise UserError(f"command line: got {key}; write KEY VALUE: {name} {value or '...'}")
    if len(opts) % 2:
        raise UserError(
            f"command line: expected KEY VALUE pairs, got {plural(len(opts), 'word')}; "
            f"the last one, {opts[-1]}, has no value"
        )
    return list(zip(opts[0::2], opts[1::2], strict=True))


def _explain(
    cfg: CfgNode,
    error: Exception,
    *,
    value: Any = None,
    tree: Mapping[str, dict[str, Any]] | None = None,
) -> str:
    text = _text(error)
    if found := _UNKNOWN.search(text):
        return _unknown_key(cfg, found["key"])
    if found := _MISMATCH.search(text):
        holders = _holders(tree or {}, found["key"])
        value = holders[0][1] if holders else value
        return _wrong_type(cfg, **found.groupdict(), value=value)
    if found := _NO_VALUE.search(text):
        return f"{found['key']}: a {found['got']} is no configuration value; write it in quotes"
    return text


def _text(error: Exception) -> str:
    return str(error.args[0]) if error.args else str(error)


def _origin(tree: Mapping[str, dict[str, Any]], error: Exception) -> str | None:
    """The file, innermost last, in which the key that `error` names stands."""
    for pattern in (_UNKNOWN, _MISMATCH, _NO_VALUE):
        if found := pattern.search(_text(error)):
            return next((path for path, _ in _holders(tree, found["key"])), None)
    return None


def _holders(tree: Mapping[str, dict[str, Any]], key: str) -> list[tuple[str, Any]]:
    """The files that set `key`, each with the value there."""
    found = []
    for path, content in tree.items():
        node: Any = content
        for part in key.split("."):
            node = node.get(part, _ABSENT) if isinstance(node, dict) else _ABSENT
        if node is not _ABSENT:
            found.append((path, node))
    return found


def _unknown_key(cfg: CfgNode, key: str) -> str:
    known = set(all_keys(cfg))
    if _is_ours(key) and key not in known:
        return f"unknown key {key}; did you call d2ctx.add_d2ctx_config(cfg) before merging?"
    return f"unknown key {key}; {did_you_mean(key, known) or 'see detectron2/config/defaults.py'}"


def _is_ours(key: str) -> bool:
    """Whether `key` is one that `add_d2ctx_config` adds, or lies in a section that it adds."""
    from d2ctx.config import add_d2ctx_config  # it imports the models, which few callers need

    extended = get_cfg()
    plain = set(all_keys(extended))
    add_d2ctx_config(extended)
    ours = set(all_keys(extended)) - plain
    return key in ours


def _wrong_type(cfg: CfgNode, *, want: str, got: str, key: str, value: Any) -> str:
    want, got = _type_name(want), _type_name(got)
    came = got if value is None else f"{got} {value!s:.80}"
    return f"{key} must be {want}{_default(cfg, key)}, got {came}{_fix(want, got, value)}"


def _default(cfg: CfgNode, key: str) -> str:
    default = get_value(cfg, key)
    if isinstance(default, CfgNode):
        return " of KEY: VALUE lines"
    return "" if default in ((), [], "") else f", for example {default!r}"


def _type_name(text: str) -> str:
    name = text.rpartition(".")[2]
    return "a section" if name in {"CfgNode", "dict"} else name


def _fix(want: str, got: str, value: Any) -> str:
    if (want, got) == ("float", "int"):
        return (
            f"; write {value!s:.80}.0" if value is not None else "; write it with a decimal point"
        )
    if want in {"list", "tuple"} and got != "a section":
        return f'; write ("{value!s:.80}",)' if value is not None else '; write ("...",)'
    return ""


def all_keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """All keys of `cfg` with dots, sections included."""
    for key, value in cfg.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from all_keys(value, f"{prefix}{key}.")


def get_value(cfg: CfgNode, key: str) -> Any:
    """The value, or the section, at a key with dots."""
    return reduce(lambda node, part: node[part], key.split("."), cfg)


def check_registry_names(cfg: CfgNode) -> None:
    """Check that every part that `cfg` names is registered.

    Args:
        cfg: A merged configuration.

    Raises:
        UserError: Naming every unknown part and the nearest known names.
    """
    problems = []
    for key, registry in REGISTRIES.items():
        value = get_value(cfg, key)
        if value in NOT_LOOKED_UP or value in registry:
            continue
        names = [name for name, _ in registry]
        hint = did_you_mean(value, names) or f"known: {', '.join(sorted(names))}"
        problems.append(f"{key}: nothing is registered as {value!r}; {hint}")
    if problems:
        raise UserError("; ".join(problems))
