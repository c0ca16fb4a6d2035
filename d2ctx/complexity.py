"""Parameters and multiply-accumulates (MACs) of a two-stage detector, part by part.

Instance and panoptic systems: Faster and Mask R-CNN, both cascades, Hybrid Task Cascade, Panoptic
FPN, with every backbone and every head of this package.

Two conventions, because published figures mix them:

* **module-only**: what counters that hook modules report, in the form of mmdetection 1.x, which
  A²-FPN's Table 6 uses. Convolutions (plus one per output for a bias), linear layers, two per
  element of a batch norm, one per element of a ReLU (not RPN's, which is a function there) and
  per input element of the stem's pooling. Deconvolutions are counted at the output resolution
  (four times too much), products inside attention not at all. Parameters are the trainable
  ones with batch-norm weights, and class-specific box and mask outputs have one for background.
* **all**: every MAC of convolutions, linear layers, matrix products, attention and content-aware
  reassembly, and every parameter of the model as it is. Attention counts by its definition: one
  product of query and key and one with the value for each pair of positions, however many parts
  a mixture has.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ctxops import ContentAwarePool, ContentAwareUp
from d2ctx.panet_heads import AllLevelPooler

BOX_ROIS, MASK_ROIS = 1000, 100
_CONVS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
_NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)
_RELU = {torch.ops.aten.relu.default, torch.ops.aten.relu_.default}
_POOL = {torch.ops.aten.max_pool2d_with_indices.default, torch.ops.aten.max_pool2d.default}


@dataclass(frozen=True)
class Cost:
    """Parameters, and MACs for one image, in both conventions."""

    module_params: int = 0
    module_macs: int = 0
    all_params: int = 0
    all_macs: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


def detector_costs(model: nn.Module, *, height: int, width: int) -> dict[str, Cost]:
    """Count a detector by shapes alone, on the meta device.

    Content-aware reassembly and mixture attention are counted by their definitions, so they must
    run in their plain forms here (`loop` and `naive`).

    Args:
        model: A GeneralizedRCNN or PanopticFPN; it is moved to the meta device and has no weights
            afterwards.
        height: Image height in pixels, a multiple of the backbone's divisibility.
        width: Image width, likewise.

    Returns:
        Part -> cost, in the order of execution; parts that the model lacks are left out.
    """
    model = model.to("meta").eval()
    _mark_outputs(model)
    backbone, heads = model.backbone, model.roi_heads
    rpn = model.proposal_generator
    image = torch.zeros(1, len(model.pixel_mean), height, width, device="meta")
    maps = {
        name: torch.zeros(
            1, s.channels, -(-height // s.stride), -(-width // s.stride), device="meta"
        )
        for name, s in backbone.output_shape().items()
    }
    costs = _backbone_costs(backbone, image)
    costs["rpn"] = _cost(
        [rpn.rpn_head], lambda: rpn.rpn_head([maps[n] for n in rpn.in_features]), relu=False
    )
    if semantic := getattr(model, "sem_seg_head", None) or getattr(heads, "semantic", None):
        layers = getattr(semantic, "layers", semantic)
        costs["semantic"] = _cost([semantic], lambda: layers(maps))
    return costs | _region_costs(heads, maps[heads.box_in_features[0]].shape[1])


def _backbone_costs(backbone: nn.Module, image: Tensor) -> dict[str, Cost]:
    """Bottom-up network, and the neck where there is one."""
    bottom_up = getattr(backbone, "bottom_up", backbone)
    features: dict[str, Tensor] = {}
    costs = {
        "backbone": _cost([bottom_up], lambda: features.update(bottom_up(image)), pooling=True)
    }
    if bottom_up is not backbone:
        neck = [part for part in backbone.children() if part is not bottom_up]
        bottom_up.forward = lambda _: features  # what it gave just now, at no cost
        costs["neck"] = _cost(neck, lambda: backbone(image))
        del bottom_up.forward
    return costs


def _region_costs(heads: nn.Module, channels: int) -> dict[str, Cost]:
    """Box and mask heads of all stages."""
    boxes, predictors = _as_list(heads.box_head), _as_list(heads.box_predictor)
    rois = _rois(BOX_ROIS, channels, heads.box_pooler)

    def detect() -> None:
        for box, predict in zip(boxes, predictors, strict=True):
            predict(box(rois))

    costs = {"box head": _cost([*boxes, *predictors], detect)}
    if heads.mask_on:
        crops = _rois(MASK_ROIS, channels, heads.mask_pooler)
        masks, flow = _as_list(heads.mask_head), list(getattr(heads, "mask_flow", ()))

        def segment() -> None:
            if flow:  # each head takes what the one before found
                heads._mask_logits(crops, range(len(masks)))
            else:
                for mask in masks:
                    mask.layers(crops)

        costs["mask head"] = _cost([*masks, *flow], segment)
    return costs


def _as_list(part: nn.Module) -> list[nn.Module]:
    return list(part) if isinstance(part, nn.ModuleList) else [part]


def _rois(count: int, channels: int, pooler: nn.Module) -> Tensor:
    levels = (len(pooler.levels),) if isinstance(pooler, AllLevelPooler) else ()
    return torch.zeros(count, *levels, channels, *pooler.output_size, device="meta")


def _cost(
    modules: Sequence[nn.Module],
    call: Callable[[], object],
    *,
    relu: bool = True,
    pooling: bool = False,
) -> Cost:
    counted = (_RELU if relu else set()) | (_POOL if pooling else set())
    elementwise, hooked = _Elementwise(counted), _Hooked()
    layers = [layer for part in modules for layer in part.modules()]
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(hooked).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(elementwise)
        flops = stack.enter_context(FlopCounterMode(display=False))
        call()
    return Cost(
        module_params=sum(_trainable(layer) for layer in layers),
        module_macs=hooked.macs + elementwise.macs,
        all_params=sum(p.numel() for part in modules for p in part.parameters())
        + sum(2 * layer.num_features for layer in layers if isinstance(layer, FrozenBatchNorm2d)),
        all_macs=flops.get_total_flops() // 2 + hooked.reassembly,
    )


class _Elementwise(TorchDispatchMode):
    """Counts the input elements of the given operators."""

    def __init__(self, counted: set) -> None:
        super().__init__()
        self.counted, self.macs = counted, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: D102
        if func in self.counted:
            self.macs += args[0].numel()
        return func(*args, **(kwargs or {}))


class _Hooked:
    """A forward hook that counts as module hooks of mmdetection 1.x do."""

    def __init__(self) -> None:
        self.macs = self.reassembly = 0

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, _CONVS):
            per_output = layer.weight[0].numel()
            if isinstance(layer, nn.ConvTranspose2d):
                per_output = layer.weight[:, 0].numel()
            per_output += layer.bias is not None
            self.macs += _with_background(layer, output.numel() * per_output)
        elif isinstance(layer, nn.Linear):
            self.macs += _with_background(layer, output.numel() * layer.in_features)
        elif isinstance(layer, _NORMS):
            self.macs += 2 * output.numel()
        elif isinstance(layer, ContentAwareUp | ContentAwarePool):
            self.reassembly += output.numel() * layer.predictor.kernel_size**2


def _with_background(layer: nn.Module, count: int) -> int:
    """`count` as if a class-specific output had one more class, marked by `_mark_outputs`."""
    classes = getattr(layer, "_ctx_classes", 0)
    return count * (classes + 1) // classes if classes else count


def _mark_outputs(model: nn.Module) -> None:
    heads = model.roi_heads
    for predictor in _as_list(heads.box_predictor):
        if predictor.bbox_pred.out_features == 4 * heads.num_classes:
            predictor.bbox_pred._ctx_classes = heads.num_classes
    for mask in _as_list(heads.mask_head) if heads.mask_on else []:
        if mask.predictor.out_channels == heads.num_classes:
            mask.predictor._ctx_classes = heads.num_classes


def _trainable(layer: nn.Module) -> int:
    """Own trainable parameters of one layer, batch-norm weights of a trained convolution too."""
    count = sum(p.numel() for p in layer.parameters(recurse=False) if p.requires_grad)
    norm = getattr(layer, "norm", None)
    if isinstance(norm, FrozenBatchNorm2d) and any(p.requires_grad for p in layer.parameters()):
        count += 2 * norm.num_features
    return _with_background(layer, count)
