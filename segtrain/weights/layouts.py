"""Names of Segmenter's tensors in our files, in MMSegmentation's and in timm's, both ways.

Our names are those of the authors' `checkpoint.pth`, whose encoder has the names of timm. The
ImageNet classifiers that both carry (`head`, `head_dist`) have no place here.

MMSegmentation's matrices: `patch_proj.weight` and `classes_proj.weight` are ours transposed, its
linear decoder is a 1x1 convolution.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache

from torch import Tensor

from segtrain.errors import UserError
from segtrain.wording import first_of

SEGMENTER, MMSEGMENTATION, TIMM = "segmenter", "mmsegmentation", "timm"
LAYOUTS = (SEGMENTER, MMSEGMENTATION, TIMM)
# A tensor that tells the layout.
_MARKS = {
    "encoder.patch_embed.proj.weight": SEGMENTER,
    "backbone.patch_embed.projection.weight": MMSEGMENTATION,
    "patch_embed.proj.weight": TIMM,
}
# Names without which nothing is missing: ImageNet classifiers.
_CLASSIFIERS = re.compile(r"^(encoder\.)?(head|head_dist|pre_logits\.\w+|fc_norm)\.(weight|bias)$")

_BLOCK = {
    "ln1.{p}": "norm1.{p}",
    "attn.attn.in_proj_{p}": "attn.qkv.{p}",
    "attn.attn.out_proj.{p}": "attn.proj.{p}",
    "ln2.{p}": "norm2.{p}",
    "ffn.layers.0.0.{p}": "mlp.fc1.{p}",
    "ffn.layers.1.{p}": "mlp.fc2.{p}",
}
# MMSegmentation -> ours; {n} is the number of a layer, {p} weight or bias.
_MMSEGMENTATION = {
    "backbone.cls_token": "encoder.cls_token",
    "backbone.pos_embed": "encoder.pos_embed",
    "backbone.patch_embed.projection.{p}": "encoder.patch_embed.proj.{p}",
    "backbone.ln1.{p}": "encoder.norm.{p}",
    "decode_head.conv_seg.{p}": "decoder.head.{p}",
    "decode_head.cls_emb": "decoder.cls_emb",
    "decode_head.dec_proj.{p}": "decoder.proj_dec.{p}",
    "decode_head.patch_proj.weight": "decoder.proj_patch",
    "decode_head.classes_proj.weight": "decoder.proj_classes",
    "decode_head.decoder_norm.{p}": "decoder.decoder_norm.{p}",
    "decode_head.mask_norm.{p}": "decoder.mask_norm.{p}",
    **{f"backbone.layers.{{n}}.{a}": f"encoder.blocks.{{n}}.{b}" for a, b in _BLOCK.items()},
    **{f"decode_head.layers.{{n}}.{a}": f"decoder.blocks.{{n}}.{b}" for a, b in _BLOCK.items()},
}
_TRANSPOSED = ("decoder.proj_patch", "decoder.proj_classes")
_CONVOLUTION = "decoder.head.weight"


def layout_of(names: Iterable[str]) -> str:
    """Tell the layout of a file by one of its names.

    Args:
        names: Names of the tensors.

    Returns:
        One of `LAYOUTS`.

    Raises:
        UserError: If none fits.
    """
    known = set(names)
    for mark, layout in _MARKS.items():
        if mark in known:
            return layout
    raise UserError(
        "expected the weights of a Segmenter or of a vision transformer (one of "
        f"{', '.join(_MARKS)}), got {first_of(sorted(known))}; take another file"
    )


def classifiers(names: Iterable[str]) -> tuple[str, ...]:
    """Names of ImageNet classifiers, which no output of a Segmenter depends on.

    Args:
        names: In the layout of the authors or of timm.

    Returns:
        Those that are left out.
    """
    return tuple(name for name in names if _CLASSIFIERS.match(name))


def to_segmenter(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate any layout into ours.

    Args:
        tensors: Weights of a Segmenter (the authors', MMSegmentation's, ours) or an encoder of
            timm.

    Returns:
        Ours; of timm's encoder, the part `encoder.`.

    Raises:
        UserError: If the layout is unknown, or MMSegmentation's holds a name that is not.
    """
    layout = layout_of(tensors)
    if layout == MMSEGMENTATION:
        renamed = _renamed(tensors, _pairs(reverse=False), target="Segmenter")
        return {name: _turned(name, value, into_ours=True) for name, value in renamed.items()}
    kept = {name: value for name, value in tensors.items() if not _CLASSIFIERS.match(name)}
    if layout == TIMM:
        return {f"encoder.{name}": value for name, value in kept.items()}
    return kept


def from_segmenter(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Translate our layout into another: the exact reverse of `to_segmenter`.

    Args:
        tensors: In our layout.
        layout: One of `LAYOUTS`; `timm` takes the encoder alone.

    Returns:
        The tensors under the names of `layout`.

    Raises:
        UserError: If MMSegmentation has no such tensor (the distillation token).
    """
    if layout == TIMM:
        start = "encoder."
        return {n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)}
    if layout == SEGMENTER:
        return dict(tensors)
    turned = {name: _turned(name, value, into_ours=False) for name, value in tensors.items()}
    return _renamed(turned, _pairs(reverse=True), target="MMSegmentation")


def _turned(name: str, value: Tensor, *, into_ours: bool) -> Tensor:
    if name in _TRANSPOSED:
        return value.T.contiguous()
    if name == _CONVOLUTION:
        return value.flatten(1) if into_ours else value[:, :, None, None]
    return value


@cache
def _pairs(*, reverse: bool) -> list[tuple[re.Pattern[str], str]]:
    pairs = [(b, a) if reverse else (a, b) for a, b in _MMSEGMENTATION.items()]
    return [
        (_pattern(old), new.replace("{n}", r"\g<n>").replace("{p}", r"\g<p>")) for old, new in pairs
    ]


def _pattern(name: str) -> re.Pattern[str]:
    escaped = re.escape(name)
    escaped = escaped.replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{p\}", r"(?P<p>weight|bias)")
    return re.compile(f"^{escaped}$")


def _replacement(name: str) -> str:
    return name.replace("{n}", r"\g<n>").replace("{p}", r"\g<p>")


def _renamed(
    tensors: Mapping[str, Tensor],
    pairs: list[tuple[re.Pattern[str], str]],
    *,
    target: str,
) -> dict[str, Tensor]:
    renamed, unknown = {}, []
    for name, value in tensors.items():
        new = next((p.sub(to, name) for p, to in pairs if p.match(name)), None)
        if new is None:
            unknown.append(name)
        else:
            renamed[new] = value
    if unknown:
        raise UserError(
            f"{target} has no counterpart of {first_of(unknown)}; only a Segmenter with a linear "
            "or a mask-transformer decoder, without distillation token, can be translated"
        )
    return renamed
