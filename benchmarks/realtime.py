"""Squeeze reasoning in whole networks: latency of SRNet(DFv2), and what the head adds to a ResNet.

`python -m benchmarks.realtime [--only TEXT] [--repeats N] [--device cuda]`

Latency of one image, random weights, 19 classes, logits at the size of the image. The forms of a
case take turns, each time in a process of its own; of every form the fastest median counts, since
other work on the machine only ever adds to it.

Two processes of one and the same network differ by several percent all the same: how often the
allocator gives memory back is luck. What a context module adds to a network is therefore read off
within each pass: its time against that of everything else.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import command
from benchmarks.cases.case import Case
from benchmarks.common import synchronize, time_phases
from benchmarks.measure import Setting, in_own_process
from benchmarks.ops import rows_of
from benchmarks.rows import Row, Target, compare, print_table
from segtrain.config.schema import NetworkConfig
from segtrain.models import build_model

MODULE = "benchmarks.realtime"
CLASSES = 19
FULL = (1024, 2048)
# What squeeze reasoning may make of the time of a pass.
SR_LIMIT = Target(of="ratio", limit=1.02)
MODULE_NAME = "model.head.context"


class Logits(nn.Module):
    """A model whose output is one tensor.

    Args:
        model: Images to a dict.
        key: Of the logits.
    """

    def __init__(self, model: nn.Module, *, key: str = "logits") -> None:
        super().__init__()
        self.model, self.key = model, key

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, K, H, W]."""
        return self.model(image)[self.key]


def network(backbone: dict[str, Any], head: dict[str, Any]) -> nn.Module:
    """A network of the paper, ready for inference."""
    content = {"name": "network", "backbone": backbone, "head": head, "align_corners": True}
    config = NetworkConfig.model_validate(content)
    return Logits(build_model(config, CLASSES, image_size=FULL)).eval()


def df(version: int, **head: Any) -> nn.Module:
    """DF-Seg, or with `context="sr"` SRNet."""
    return network({"name": "df", "version": version}, {"name": "df", **head})


def dilated(module: str, **sr: Any) -> nn.Module:
    """ResNet-50 at 1/8 with a module between two convolutions."""
    return network({"name": "resnet"}, {"name": "context", "module": module, "sr": sr})


def lraspp() -> nn.Module:
    """LR-ASPP on MobileNetV3-Large of torchvision."""
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    return Logits(model, key="out").eval()


def image(height: int, width: int) -> Sequence[Tensor]:
    """One image."""
    return [torch.randn(1, 3, height, width)]


def dilated_case(side: int, only_on: str) -> Case:
    """The dilated FCN, bare and with context."""
    forms: dict[str, Callable[[], nn.Module]] = {
        "bare": partial(dilated, "none"),
        "SR, GHP": partial(dilated, "sr"),
        "SR, GAP": partial(dilated, "sr", squeeze="gap"),
        "non-local": partial(dilated, "nl"),
    }
    return Case(
        name=f"dilated ResNet-50, {side}x{side}",
        make=partial(image, side, side),
        forms=forms,
        baseline="bare",
        backward=False,
        only_on=only_on,
    )


CASES = {
    case.name: case
    for case in [
        Case(
            name=f"real time, {FULL[0]}x{FULL[1]}",
            make=partial(image, *FULL),
            forms={
                "DF-Seg-v2": partial(df, 2),
                "SRNet(DFv2)": partial(df, 2, context="sr"),
                "DF-Seg-v1": partial(df, 1),
                "LR-ASPP, MobileNetV3-L": lraspp,
            },
            baseline="DF-Seg-v2",
            backward=False,
        ),
        dilated_case(385, "cpu"),
        dilated_case(769, "cuda"),
    ]
}


def fastest(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The result with the smallest median; a failure where there is one."""
    for result in results:
        if "failed" in result:
            return result
    return min(results, key=lambda result: result["time"]["median_ms"])


def rates(case: Case, results: dict[str, dict[str, Any]]) -> list[Row]:
    """Images per second of every form."""
    return [
        compare(f"{case.name}: {form}", "rate", "img/s", 1e3 / result["time"]["median_ms"])
        for form, result in results.items()
        if "failed" not in result
    ]


class Stopwatch:
    """The seconds that a part of a model takes, a number per pass.

    Args:
        part: The part.
        device: It runs on.
    """

    def __init__(self, part: nn.Module, device: str) -> None:
        self.seconds: list[float] = []
        self._device, self._begin = device, 0.0
        part.register_forward_pre_hook(self._start)
        part.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        synchronize(self._device)
        self._begin = time.perf_counter()

    def _stop(self, *_: object) -> None:
        synchronize(self._device)
        self.seconds.append(time.perf_counter() - self._begin)


def added_by_module(case: Case, form: str, setting: Setting) -> Row | None:
    """The time of passes against the same passes less that of the context module.

    Args:
        case: Networks with a head of one context module, or without one.
        form: Which of them.
        setting: How to measure.

    Returns:
        A row; None for a network that has no such module.
    """
    model = case.forms[form]().to(setting.device)
    names = dict(model.named_modules())
    if isinstance(names.get(MODULE_NAME, nn.Identity()), nn.Identity):
        return None
    inputs = [x.to(setting.device) for x in case.make()]
    whole, part = (Stopwatch(x, setting.device) for x in (model, names[MODULE_NAME]))
    with torch.no_grad():
        time_phases(
            [lambda: model(*inputs)], device=setting.device, warmup=2, seconds=setting.seconds
        )
    pairs = list(zip(whole.seconds, part.seconds, strict=True))[2:]
    return compare(
        f"{case.name}: {form}",
        "time, pass with its module",
        "ms",
        1e3 * median(total for total, _ in pairs),
        baseline="the rest of the pass",
        baseline_value=1e3 * median(total - inner for total, inner in pairs),
        target=SR_LIMIT if form.startswith("SR") else None,
    )


def measured(case: Case, setting: Setting, repeats: int) -> dict[str, dict[str, Any]]:
    """Measure the forms of a case in turns."""
    found: dict[str, list[dict[str, Any]]] = {form: [] for form in case.forms}
    for _ in range(repeats):
        for form in case.forms:
            found[form].append(in_own_process(MODULE, case.name, form, setting))
    return {form: fastest(results) for form, results in found.items()}


def main() -> None:
    """Measure every case, print the table, write the results."""
    parser = command.parser(__doc__, seconds=6.0)
    parser.add_argument("--repeats", type=int, default=3, help="processes per form (default: 3)")
    options = parser.parse_args()
    setting = command.start(options, CASES)
    if setting is None:
        return
    rows: list[Row] = []
    details: dict[str, dict[str, Any]] = {}
    for case in CASES.values():
        if options.only in case.name and case.only_on in ("", options.device):
            details[case.name] = measured(case, setting, options.repeats)
            new = rows_of(case, details[case.name]) + rates(case, details[case.name])
            added = [added_by_module(case, form, setting) for form in case.forms]
            rows += (new := new + [row for row in added if row is not None])
            print_table(new)
    command.finish("realtime", rows, details, options, known=CASES)


if __name__ == "__main__":
    main()
