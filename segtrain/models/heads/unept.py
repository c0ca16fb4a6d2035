"""UN-EPT's head: context branch, spatial branch, boundary and direction, refinement (Fig. 2).

Letters: B batch, K classes, d width, L levels, H W image, h w cells of 8 x 8 pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ctxops.boundary import NUM_DIRECTIONS, refine_logits
from ctxops.norm import ConvNorm
from ctxops.position import GridEmbedding
from ctxops.resize import resize_bilinear
from ctxops.unept import SpatialBranch, build_context_branch
from segtrain.config.unept import UneptConfig
from segtrain.models.maps import Features, Maps, deepest

STRIDE = 8  # pixels per query


class UneptHead(nn.Module):
    """Queries of the image read context from the maps of the backbone (UN-EPT, Sec. 3).

    Args:
        features: Names of the L maps that it reads.
        in_channels: Channels of each.
        channels: d.
        num_classes: K.
        context: From (L maps [B, d, ., .], queries [B, d, h, w]) to [B, d, h, w].
        spatial: Image to queries [B, d, h, w]; None: the queries are the table alone.
        query_embed: Table that is added to the queries, or None.
        boundary_classes: Channels of the boundary head, 1 or 2.
        mask_rule: As in `ctxops.boundary.boundary_mask`.
        refine_at_test: Whether "logits" are refined in evaluation.
        offset_scale: Pixels per step and axis of the refinement.
    """

    def __init__(
        self,
        *,
        features: Sequence[str],
        in_channels: Sequence[int],
        channels: int,
        num_classes: int,
        context: nn.Module,
        spatial: nn.Module | None,
        query_embed: GridEmbedding | None,
        boundary_classes: int = 1,
        mask_rule: str = "probability",
        refine_at_test: bool = True,
        offset_scale: int = 1,
    ) -> None:
        super().__init__()
        assert spatial is not None or query_embed is not None, "checked by the configuration"
        self.features = tuple(features)
        self.refine_at_test = refine_at_test
        self.refinement = {"mask_rule": mask_rule, "offset_scale": offset_scale}
        self.projections = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.context = context
        self.spatial = spatial
        self.query_embed = query_embed
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        if spatial is not None:
            self.boundary = _pixel_head(channels, boundary_classes)
            self.direction = _pixel_head(channels, NUM_DIRECTIONS)

    def forward(self, features: Features, image: Tensor) -> dict[str, Tensor]:
        """Segment.

        Args:
            features: Maps of the backbone.
            image: [B, 3, H, W].

        Returns:
            In training "logits" (not refined) and, with a spatial branch, "refined" [B, K, H, W],
            "boundary" [B, 1 or 2, H, W] and "direction" [B, 8, H, W]; in evaluation "logits",
            refined or not.
        """
        size = image.shape[2:]
        detail = None if self.spatial is None else self.spatial(image)  # [B, d, h, w]
        levels = [
            project(features[name])
            for name, project in zip(self.features, self.projections, strict=True)
        ]
        decoded = self.context(levels, self._queries(detail, image))
        logits = resize_bilinear(self.classifier(decoded), size, align_corners=False)
        if detail is None or not (self.training or self.refine_at_test):
            return {"logits": logits}
        # The corners meet, as in the released code.
        boundary = resize_bilinear(self.boundary(detail), size, align_corners=True)
        direction = resize_bilinear(self.direction(detail), size, align_corners=True)
        refined = refine_logits(logits, boundary, direction, **self.refinement)
        if not self.training:
            return {"logits": refined}
        return {
            "logits": logits,
            "refined": refined,
            "boundary": boundary,
            "direction": direction,
        }

    def no_weight_decay(self) -> set[str]:
        """Names of learnt tables."""
        own = {"context.level_embed"}
        return own if self.query_embed is None else own | {"query_embed.weight"}

    def _queries(self, detail: Tensor | None, image: Tensor) -> Tensor:
        """[B, d, h, w]."""
        if self.query_embed is None:
            assert detail is not None, "one of both is there"
            return detail
        grid = _grid(image.shape[2:])
        table = self.query_embed(grid).transpose(1, 2).unflatten(2, grid)  # [1, d, h, w]
        return table.expand(image.shape[0], -1, -1, -1) if detail is None else detail + table


def build_unept_head(
    config: UneptConfig, maps: Maps, *, num_classes: int, image_size: tuple[int, int]
) -> UneptHead:
    """Build the head on the deepest maps.

    Args:
        config: The section.
        maps: What the backbone offers.
        num_classes: K.
        image_size: (H, W) of a training crop: a learnt table of queries is made for its grid.

    Returns:
        The head.

    Raises:
        UserError: If the backbone has too few maps.
    """
    names = deepest(maps, config.levels, head="head unept")
    spatial, table = None, None
    if config.spatial_branch:
        spatial = SpatialBranch(
            channels=(*config.spatial_widths, config.channels), last_relu=config.last_relu
        )
    if config.query_embedding == "learned":
        table = GridEmbedding(grid=_grid(image_size), channels=config.channels)
    return UneptHead(
        features=names,
        in_channels=[maps[name].channels for name in names],
        channels=config.channels,
        num_classes=num_classes,
        context=build_context_branch(**_context_sizes(config)),
        spatial=spatial,
        query_embed=table,
        boundary_classes=config.boundary_classes,
        mask_rule=config.mask_rule,
        refine_at_test=config.refine_at_test,
        offset_scale=config.offset_scale,
    )


def _context_sizes(config: UneptConfig) -> Mapping[str, Any]:
    return {
        "embed_dim": config.channels,
        "num_heads": config.num_heads,
        "num_levels": config.levels,
        "num_points": config.points,
        "num_encoder_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers,
        "ffn_dim": config.ffn_dim,
        "dropout": config.dropout,
        "self_attention": config.self_attention,
    }


def _pixel_head(channels: int, classes: int) -> nn.Sequential:
    """Two 1x1 convolutions without bias, as PyTorch draws them; the first with norm and ReLU."""
    hidden = ConvNorm(
        in_channels=channels, out_channels=channels, kernel_size=1, init=lambda conv: conv
    )
    return nn.Sequential(hidden, nn.Conv2d(channels, classes, 1, bias=False))


def _grid(size: Sequence[int]) -> tuple[int, int]:
    """Cells of an image, sizes rounded up."""
    return (size[0] + STRIDE - 1) // STRIDE, (size[1] + STRIDE - 1) // STRIDE
