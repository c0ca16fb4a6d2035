"""The names of a ResNet's tensors in torchvision, timm and Caffe2, and in Detectron2."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from d2ctx import compat
from d2ctx.errors import UserError
from d2ctx.wording import first_of

TORCHVISION, DETECTRON2, CAFFE2 = "torchvision", "Detectron2", "Caffe2"
# A tensor that every ResNet has, by the naming it shows; timm uses torchvision's.
_ANCHORS = {
    TORCHVISION: "layer1.0.conv1.weight",
    DETECTRON2: "res2.0.conv1.weight",
    CAFFE2: "res2_0_branch2a_w",
}
_STAGE = re.compile(r"^layer(\d)\.")
_RENAMES = [
    (re.compile(r"^conv1\.weight$"), "stem.conv1.weight"),
    (re.compile(r"^bn1\."), "stem.conv1.norm."),
    (re.compile(r"\.bn(\d)\."), r".conv\1.norm."),
    (re.compile(r"\.downsample\.0\."), ".shortcut."),
    (re.compile(r"\.downsample\.1\."), ".shortcut.norm."),
]


@dataclass(frozen=True)
class Naming:
    """How a file names a ResNet's tensors.

    Attributes:
        kind: TORCHVISION (timm's too), DETECTRON2 or CAFFE2.
        prefix: What stands before each of them, as `backbone.bottom_up.` in a whole detector.
    """

    kind: str
    prefix: str = ""

    def rename(self, names: Iterable[str]) -> dict[str, str]:
        """Detectron2's names of the ResNet's tensors; others keep theirs, below "(elsewhere)".

        Args:
            names: All names of the file.

        Returns:
            The file's name -> the new one.
        """
        listed = list(names)
        inside = [name for name in listed if name.startswith(self.prefix)]
        bare = [name.removeprefix(self.prefix) for name in inside]
        if self.kind == CAFFE2:
            bare = compat.caffe2_names(bare)
        elif self.kind == TORCHVISION:
            bare = [_from_torchvision(name) for name in bare]
        ours = dict(zip(inside, bare, strict=True))
        # A detector's own "stem" must not be taken for the ResNet's.
        return {name: ours.get(name, f"(elsewhere).{name}") for name in listed}


def find_naming(names: Iterable[str]) -> Naming:
    """Recognise a file that holds a ResNet or ResNeXt.

    Args:
        names: All names of the file.

    Returns:
        How it names the tensors.

    Raises:
        UserError: If it holds no ResNet, or more than one.
    """
    listed = list(names)
    found = [
        Naming(kind, name.removesuffix(anchor))
        for kind, anchor in _ANCHORS.items()
        for name in listed
        if name == anchor or name.endswith(f".{anchor}")
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(
            f"expected a ResNet or ResNeXt, with a tensor {' or '.join(_ANCHORS.values())}; got "
            f"{first_of(listed)}; take weights of torchvision, timm or Detectron2's model zoo"
        )
    raise UserError(
        f"expected one ResNet, got {len(found)}, below {first_of([f.prefix for f in found])}; save "
        "the tensors of one of them alone"
    )


def _from_torchvision(name: str) -> str:
    name = _STAGE.sub(lambda match: f"res{int(match[1]) + 1}.", name)
    for pattern, ours in _RENAMES:
        name = pattern.sub(ours, name)
    return name
