"""Feature Pyramid Transformer (Zhang et al., ECCV 2020): the block of injected parts, its builder.

Letters: B batch, C pyramid width, C_l channels of backbone level l, H_l W_l map, L levels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ctxops.checks import check_choice, check_odd, check_positive
from ctxops.drop import DropBlock
from ctxops.grounding import GroundingTransformer, LocalGroundingTransformer, SelfTransformer
from ctxops.lateral import PyramidLateral, level_names
from ctxops.levels import PointwiseLateral, check_levels, level_pairs, pair_name
from ctxops.norm import ConvNorm
from ctxops.rendering import RenderingTransformer
from ctxops.resize import subsample

TRANSFORMERS = ("st", "gt", "rt")
# Most levels between the two maps of a pair.
PAIRS = {"all": None, "adjacent": 1}
LATERALS = ("conv", "none")
_Parts = dict[str, nn.Module]


class FeaturePyramidTransformer(nn.Module):
    """Pyramid in, pyramid of the same sizes out, every level enriched by all others (FPT, Fig. 2).

    out_l = drop(fuse([ST(X_l), RT(X_l, finer)..., GT(X_l, coarser)..., X_l])). The maps are put
    together in this order, RT and GT from the nearest level outwards; it is part of the format of
    the weights. Every transformer reads raw maps, never the output of another. Level p2 is the
    finest one whatever its stride.

    Args:
        channels: C.
        num_levels: L.
        st: Self-Transformers x -> x by level, as `p3`. Levels and pairs may be left out.
        gt: Grounding Transformers (fine, coarse) -> fine by pair, as `p2_from_p4`.
        rt: Rendering Transformers (coarse, fine) -> coarse by pair, as `p4_from_p2`.
        fuse: Modules from the concatenated maps to C by level, for all levels; or none, then the
            maps pass unchanged and there must be no transformers either.
        drop: Modules on the outputs by level; levels may be left out.
        lateral: L backbone maps to L maps of width C; None: the maps come in this width.
        extra_level: Append a level, the coarsest output subsampled by 2.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a part stands for no level or pair, or levels lack a `fuse`.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_levels: int,
        st: Mapping[str, nn.Module],
        gt: Mapping[str, nn.Module],
        rt: Mapping[str, nn.Module],
        fuse: Mapping[str, nn.Module],
        drop: Mapping[str, nn.Module],
        lateral: PyramidLateral | None = None,
        extra_level: bool = False,
    ) -> None:
        super().__init__()
        check_positive(channels, "channels")
        check_positive(num_levels, "num_levels")
        self.channels = channels
        self.names = level_names(num_levels)
        self.extra_level = extra_level
        pairs = level_pairs(num_levels)
        upwards = [pair_name(self.names[coarse], self.names[fine]) for fine, coarse in pairs]
        downwards = [pair_name(self.names[fine], self.names[coarse]) for fine, coarse in pairs]
        _check_keys(st, "st", self.names)
        _check_keys(gt, "gt", downwards)
        _check_keys(rt, "rt", upwards)
        _check_keys(drop, "drop", self.names)
        _check_keys(fuse, "fuse", self.names)
        if len(fuse) != num_levels and (fuse or st or gt or rt):
            raise ValueError(
                f"fuse: expected one module per level, {self.names}, got {list(fuse)}; "
                "every level has a fusion as soon as there is a transformer"
            )
        self.lateral = lateral
        self.st = nn.ModuleDict(st)
        self.gt = nn.ModuleDict(gt)
        self.rt = nn.ModuleDict(rt)
        self.fuse = nn.ModuleDict(fuse)
        self.drop = nn.ModuleDict(drop)

    @property
    def size_ratio(self) -> int:
        """Pixels of the finest map that must divide its height and width for whole levels.

        Other sizes work too; then coarser levels are rounded up.
        """
        return 2 ** (len(self.names) - 1)

    def aux_losses(self) -> dict[str, Tensor]:
        """Losses on weights, to be added to the task's in training.

        Returns:
            Those of the laterals; the block has none.
        """
        return {} if self.lateral is None else self.lateral.aux_losses()

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Transform the pyramid.

        Args:
            features: L maps [B, C_l, H_l, W_l], fine to coarse, of any sizes that do not grow; C_l
                is C where there are no laterals.

        Returns:
            L maps [B, C, H_l, W_l], and with `extra_level` one more of half the size, rounded up.

        Raises:
            TypeError: If a level is not a floating point map.
            ValueError: If levels, channels or the order of sizes do not fit.
        """
        levels = features if self.lateral is None else self.lateral(features)
        check_levels(levels, [self.channels] * len(self.names))
        outputs = list(levels)
        if self.fuse:
            outputs = [self._level(index, levels) for index in range(len(levels))]
        if self.extra_level:
            outputs.append(subsample(outputs[-1], stride=2))
        return outputs

    def _level(self, index: int, levels: Sequence[Tensor]) -> Tensor:
        """Output map [B, C, H_l, W_l] of one level."""
        x, name = levels[index], self.names[index]
        maps = [self.st[name](x)] if name in self.st else []
        for finer in range(index - 1, -1, -1):
            pair = pair_name(name, self.names[finer])
            maps += [self.rt[pair](x, levels[finer])] if pair in self.rt else []
        for coarser in range(index + 1, len(levels)):
            pair = pair_name(name, self.names[coarser])
            maps += [self.gt[pair](x, levels[coarser])] if pair in self.gt else []
        out = self.fuse[name](torch.cat([*maps, x], 1))
        return self.drop[name](out) if name in self.drop else out


def _check_keys(parts: Mapping[str, nn.Module], name: str, allowed: Sequence[str]) -> None:
    for key in parts:
        check_choice(key, f"keys of {name}", allowed)


@dataclass(frozen=True, kw_only=True)
class _Attention:
    """The options that all attention transformers share; every call makes a module of its own."""

    channels: int
    inner_channels: int | None
    scale: str | float
    pi_from: str
    attn_dropout: float
    norm: str

    def st(
        self, *, parts: int, similarity: str, share_qk: bool, kv_pool: int, impl: str
    ) -> nn.Module:
        return SelfTransformer(
            channels=self.channels,
            inner_channels=self.inner_channels,
            parts=parts,
            similarity=similarity,
            scale=self.scale,
            pi_from=self.pi_from,
            share_qk=share_qk,
            kv_pool=kv_pool,
            attn_dropout=self.attn_dropout,
            norm=self.norm,
            impl=impl,
        )

    def gt(self, *, parts: int, similarity: str, zero_gamma: bool, impl: str) -> nn.Module:
        return GroundingTransformer(
            channels=self.channels,
            inner_channels=self.inner_channels,
            parts=parts,
            similarity=similarity,
            scale=self.scale,
            pi_from=self.pi_from,
            zero_gamma=zero_gamma,
            attn_dropout=self.attn_dropout,
            norm=self.norm,
            impl=impl,
        )

    def lgt(
        self, *, window: int, parts: int, similarity: str, zero_gamma: bool, impl: str
    ) -> nn.Module:
        return LocalGroundingTransformer(
            channels=self.channels,
            window=window,
            inner_channels=self.inner_channels,
            parts=parts,
            similarity=similarity,
            scale=self.scale,
            pi_from=self.pi_from,
            zero_gamma=zero_gamma,
            attn_dropout=self.attn_dropout,
            norm=self.norm,
            impl=impl,
        )


def build_fpt(
    *,
    in_channels: Sequence[int],
    channels: int = 256,
    lateral: str = "conv",
    lateral_norm: str = "",
    transformers: Sequence[str] = TRANSFORMERS,
    pairs: str = "all",
    same_size: bool = False,
    st_parts: int = 2,
    gt_parts: int = 4,
    inner_channels: int | None = None,
    st_similarity: str = "dot",
    gt_similarity: str = "euclidean",
    scale: str | float = "sqrt",
    pi_from: str = "key",
    share_qk: bool = False,
    kv_pool: int | Sequence[int] = 1,
    attn_dropout: float = 0.0,
    local_size: int = 0,
    rt_gate: str = "none",
    norm: str = "GN",
    gt_zero_gamma: bool = False,
    dropblock_size: int = 5,
    dropblock_prob: float = 0.1,
    dropblock_ramp: int = 0,
    extra_level: bool = False,
    impl: str = "auto",
    local_impl: str = "auto",
) -> FeaturePyramidTransformer:
    """FPT on backbone maps (detection), or on maps of width C that are a pyramid already.

    Detection: `in_channels` of the backbone and `extra_level=True` for p6. Semantic segmentation,
    on levels of one size: `in_channels=[C] * L, lateral="none", same_size=True, local_size=5,
    dropblock_size=3`. Options of a part that is not chosen have no effect.

    Args:
        in_channels: C_l per level, fine to coarse, at least two.
        channels: C.
        lateral: `conv` (1x1 convolutions) or `none` (the maps come in width C).
        lateral_norm: Norm of the laterals, as in `make_norm`.
        transformers: Any of `st`, `gt`, `rt`; with none of them the levels pass unchanged.
        pairs: Level pairs that get GT and RT, `all` or `adjacent`.
        same_size: The levels have one size: RT convolves with stride 1.
        st_parts: N of ST.
        gt_parts: N of GT.
        inner_channels: Width of queries, keys and values; None: C.
        st_similarity: `dot` or `euclidean`.
        gt_similarity: `euclidean` or `dot`.
        scale: Factor of the logits: `sqrt` (1 / sqrt(width)), `none`, or a number.
        pi_from: The vectors whose mean gives the weights of the parts, `key` or `query`.
        share_qk: One convolution for queries and keys in ST.
        kv_pool: Stride of the average pooling in front of ST's keys and values, 1 for none; one
            number, or one per level.
        attn_dropout: Dropout of attention weights in training.
        local_size: Side of LGT's window, odd, needs `same_size`; 0: the global GT.
        rt_gate: Activation of RT's pooled vector, `none` or `sigmoid`.
        norm: Every norm of the block, as in `make_norm`; convolutions have biases where it is `""`.
        gt_zero_gamma: GT's output starts at zero.
        dropblock_size: Block of DropBlock on each output, odd.
        dropblock_prob: Its probability; 0 for none.
        dropblock_ramp: Training steps over which the probability grows; 0 for none.
        extra_level: Append the coarsest output, subsampled by 2.
        impl: How `mixture_attention` computes.
        local_impl: How `local_mixture_attention` computes.

    Returns:
        The block; for a ResNet-50 27 428 352 parameters, and 984 064 more in the laterals.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a name is unknown, a size impossible, or options exclude each other.
    """
    _check_options(in_channels, channels, lateral, same_size=same_size, local_size=local_size)
    check_choice(pairs, "pairs", PAIRS)
    for kind in transformers:
        check_choice(kind, "transformers", TRANSFORMERS)
    names = level_names(len(in_channels))
    linked = level_pairs(len(names), max_gap=PAIRS[pairs])
    attention = _Attention(
        channels=channels,
        inner_channels=inner_channels,
        scale=scale,
        pi_from=pi_from,
        attn_dropout=attn_dropout,
        norm=norm,
    )
    st, gt, rt = _Parts(), _Parts(), _Parts()
    if "st" in transformers:
        make_st = partial(attention.st, parts=st_parts, similarity=st_similarity, impl=impl)
        for name, stride in zip(names, _per_level(kv_pool, len(names)), strict=True):
            st[name] = make_st(share_qk=share_qk, kv_pool=stride)
    if "gt" in transformers:
        make_gt = partial(attention.gt, impl=impl)
        if local_size:
            make_gt = partial(attention.lgt, impl=local_impl, window=local_size)
        for f, c in linked:
            gt[pair_name(names[f], names[c])] = make_gt(
                parts=gt_parts, similarity=gt_similarity, zero_gamma=gt_zero_gamma
            )
    for f, c in linked if "rt" in transformers else []:
        rt[pair_name(names[c], names[f])] = RenderingTransformer(
            channels=channels, gap=0 if same_size else c - f, gate=rt_gate, norm=norm
        )
    make_drop = partial(DropBlock, block_size=dropblock_size, ramp=dropblock_ramp)
    fused = names if transformers else []
    return FeaturePyramidTransformer(
        channels=channels,
        num_levels=len(names),
        st=st,
        gt=gt,
        rt=rt,
        fuse={name: _fusion(name, (*st, *gt, *rt), channels, norm) for name in fused},
        drop={name: make_drop(drop_prob=dropblock_prob) for name in fused},
        lateral=_lateral(lateral, in_channels, channels, lateral_norm),
        extra_level=extra_level,
    )


def _check_options(
    in_channels: Sequence[int], channels: int, lateral: str, *, same_size: bool, local_size: int
) -> None:
    """Refuse options that exclude each other."""
    check_choice(lateral, "lateral", LATERALS)
    if lateral == "none" and set(in_channels) != {channels}:
        raise ValueError(
            f"in_channels: expected {channels} for every level with lateral='none', got "
            f"{list(in_channels)}; use lateral='conv' to project them"
        )
    if local_size:
        check_odd(local_size, "local_size")
    if local_size and not same_size:
        raise ValueError(
            f"local_size: expected 0 for levels of different sizes, got {local_size}; a window "
            "needs maps of one size: pass same_size=True for such a pyramid, or use the global GT"
        )


def _per_level(value: int | Sequence[int], num_levels: int) -> list[int]:
    values = [value] * num_levels if isinstance(value, int) else list(value)
    if len(values) != num_levels:
        raise ValueError(
            f"kv_pool: expected one number or {num_levels}, one per level, got {values}; "
            "use 1 for levels without pooling"
        )
    return values


def _lateral(
    kind: str, in_channels: Sequence[int], channels: int, norm: str
) -> PyramidLateral | None:
    if kind == "none":
        return None
    return PointwiseLateral(in_channels=in_channels, out_channels=channels, norm=norm)


def _fusion(level: str, transformers: Sequence[str], channels: int, norm: str) -> nn.Module:
    """3x3 convolution from the maps of a level to one; `transformers` by level or pair."""
    num_maps = 1 + sum(name.split("_")[0] == level for name in transformers)
    return ConvNorm(
        in_channels=num_maps * channels, out_channels=channels, kernel_size=3, norm=norm, act=False
    )
