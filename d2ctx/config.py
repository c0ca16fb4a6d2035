"""The configuration keys that this plug-in adds to Detectron2's, one node per method."""

from collections.abc import Sequence

from detectron2.config import CfgNode, get_cfg

from d2ctx.config_file import check_registry_names, merge_config
from d2ctx.registration import register, register_datasets


def load_config(config_file: str | None, opts: Sequence[str] = ()) -> CfgNode:
    """Read a configuration and register the data sets that it defines.

    Args:
        config_file: YAML file, or None for Detectron2's defaults.
        opts: KEY VALUE pairs that override the file.

    Returns:
        The frozen configuration.

    Raises:
        UserError: On unknown keys, wrong types, unreadable files or data-set definitions.
    """
    cfg = get_cfg()
    add_d2ctx_config(cfg)
    merge_config(cfg, config_file=config_file, opts=list(opts))
    check_registry_names(cfg)
    cfg.freeze()
    register_datasets(cfg)
    return cfg


def add_d2ctx_config(cfg: CfgNode) -> None:
    """Add our nodes to `cfg` and register our builders; call it before merging any file.

    Calling it twice is harmless: values already present are kept.

    Args:
        cfg: A Detectron2 configuration, as `detectron2.config.get_cfg()` returns it.
    """
    register()
    _add_missing(cfg.MODEL, "A2FPN", _a2fpn())
    _add_missing(cfg.MODEL, "FPT", _fpt())
    _add_missing(cfg.MODEL, "CONTEXT_BLOCK", _context_block())
    _add_missing(cfg.MODEL, "SR", _sr())
    _add_missing(cfg.MODEL, "CASCADE", _cascade())
    _add_missing(cfg.MODEL, "HTC", _htc())
    # Share of a weight file's tensors that must find a place in the model; below it, training
    # does not start. 0 switches the check off.
    _add_missing(cfg.MODEL, "WEIGHTS_MIN_MATCH", 0.5)
    # "SGD" (Detectron2's) or "AdamW"
    _add_missing(cfg.SOLVER, "OPTIMIZER", "SGD")
    # After an update with a loss or gradient that is NaN or infinite: "stop"; "skip" it, at most 10
    # in a row; "rewind" to the last checkpoint and go on with other data, at most 3 times
    _add_missing(cfg.SOLVER, "ON_NONFINITE", "stop")
    # COCO-format data sets by name: {JSON: file, IMAGES: folder}, absolute or relative to
    # $DETECTRON2_DATASETS.
    _add_missing(cfg.DATASETS, "COCO_FORMAT", CfgNode(new_allowed=True))
    # The same in COCO's panoptic format: {JSON: file, PNGS: folder, IMAGES: folder}, and where
    # instances come from another file, INSTANCES_JSON.
    _add_missing(cfg.DATASETS, "COCO_PANOPTIC", CfgNode(new_allowed=True))
    # Cityscapes in its own layout: {ROOT: folder of leftImg8bit and gtFine, SPLIT: "train"}
    _add_missing(cfg.DATASETS, "CITYSCAPES", CfgNode(new_allowed=True))
    # What is checked before training: "full" decodes every image, "headers" opens it, "off".
    _add_missing(cfg.DATASETS, "CHECK", "full")


def _add_missing(node: CfgNode, key: str, value: object) -> None:
    if key not in node:
        node[key] = value


def _a2fpn() -> CfgNode:
    """A²-FPN; the defaults are the paper's full model."""
    node = CfgNode()
    node.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    node.OUT_CHANNELS = 256
    # "mgc" (multi-level global context) or "conv" (1x1 convolutions, as in FPN)
    node.LATERAL = "mgc"
    # "gacarafe", "carafe" or "nearest"
    node.TOP_DOWN = "gacarafe"
    # "gacap", "cap", "conv" (as in PAFPN) or "none" (as in FPN)
    node.BOTTOM_UP = "gacap"
    # Graph reasoning over the context vectors
    node.GCN = True
    # Context vectors per level of IN_FEATURES; empty: 64 (6 - i) for level i
    node.NUM_CONTEXTS = []
    node.CONTEXT_CHANNELS = 256
    # Channel-attention gate: "2sigmoid" or "sigmoid"
    node.GATE = "2sigmoid"
    # How the coarsest level is made: "conv" (stride-2 convolution of res5) or "maxpool"
    node.EXTRA_LEVEL = "conv"
    # Whether the finest level gets an output convolution after the bottom-up path
    node.OUT_CONV_P2 = True
    # Cosine similarity normalises queries too; False: the literal Eq. 3
    node.NORMALIZE_QUERY = True
    # Weight of the orthogonal regularisation (Eq. 2); 0 switches it off
    node.ORTHO_WEIGHT = 1e-4
    # Kernel prediction: width, encoder kernel, and reassembly kernels up and down
    node.REDUCTION_CHANNELS = 64
    node.KERNEL_ENCODER = 3
    node.KERNEL_UP = 5
    node.KERNEL_DOWN = 5
    # Implementation of the reassembly; all give the same numbers
    node.REASSEMBLY = "auto"
    return node


def _fpt() -> CfgNode:
    """FPT; the defaults are the paper's full model, with norms for one or two images per GPU."""
    node = CfgNode()
    node.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    # The pyramid below: "bfp" (1x1 convolutions) or "fpn" (complete); and the norm of the former
    node.BASE = "bfp"
    node.LATERAL_NORM = ""
    # Width of every level
    node.CHANNELS = 256
    # Any of "st", "gt", "rt"; [] leaves the levels as they are
    node.TRANSFORMERS = ["st", "gt", "rt"]
    # Level pairs that get GT and RT: "all" or "adjacent"
    node.PAIRS = "all"
    # Parts of the mixture of softmaxes
    node.ST_PARTS = 2
    node.GT_PARTS = 4
    # Width of queries, keys and values; 0: CHANNELS
    node.INNER_CHANNELS = 0
    # "dot" or "euclidean"
    node.ST_SIMILARITY = "dot"
    node.GT_SIMILARITY = "euclidean"
    # Factor of the logits: "sqrt" (1 / sqrt(width)), "none", or a number in quotes
    node.SCALE = "sqrt"
    # Whose mean gives the weights of the parts: "key" or "query"
    node.PI_FROM = "key"
    # One convolution for queries and keys in ST
    node.SHARE_QK = False
    # Stride of the pooling in front of ST's keys and values, one for all levels or one per level;
    # [2, 2, 1, 1] saves most of the time on large images
    node.KV_POOL = [1]
    # Dropout of attention weights
    node.ATTN_DROPOUT = 0.0
    # Window of the local GT, 0: global. It needs levels of one size, which no detector has.
    node.LOCAL_SIZE = 0
    # Activation of RT's pooled vector: "none" or "sigmoid"
    node.RT_GATE = "none"
    # "GN", "SyncBN", "BN" or ""
    node.NORM = "GN"
    # GT starts with zero output
    node.GT_ZERO_GAMMA = False
    # DropBlock on each output: side, probability (0: none), iterations until it is reached
    node.DROPBLOCK_SIZE = 5
    node.DROPBLOCK_PROB = 0.1
    node.DROPBLOCK_RAMP = 0
    # Implementation of the attention; all give the same numbers
    node.IMPL = "auto"
    return node


def _context_block() -> CfgNode:
    """Context in the ResNet, under every neck of ours; the defaults are GCNet's."""
    node = CfgNode()
    # "none"; "nl" (non-local), "gc" (global context) and "sr" (squeeze reasoning, see SR) behind
    # blocks; "aa" (attention augmented) in the place of their 3x3 convolutions
    node.KIND = "none"
    node.STAGES = ["res3", "res4", "res5"]
    # "all", "last" or "before_last" block of each stage
    node.BLOCKS = "all"
    # Factor by which "nl" and "gc" narrow the channels
    node.REDUCTION = 16
    # Norm of "nl": "SyncBN" (BN in one process), "BN", "GN" or ""
    node.NORM = "SyncBN"
    return node


def _sr() -> CfgNode:
    """Squeeze Reasoning in the ResNet, where MODEL.CONTEXT_BLOCK.KIND is "sr"."""
    node = CfgNode()
    # Where: stages, and "all", "last" or "before_last" block of each
    node.STAGES = ["res5"]
    node.BLOCKS = "all"
    # Factor by which the channels are narrowed; 64 is the light form
    node.REDUCTION = 2
    # Nodes that the vector is cut into
    node.NODES = 16
    # "ghp" (Hadamard) or "gap" (average) pooling, and "mean" or the literal "sum" of the former
    node.SQUEEZE = "ghp"
    node.POOL = "mean"
    # "gcn", "sa", "fc" or "none"
    node.REASON = "gcn"
    # Adjacency of "gcn": "paper" or "released"
    node.ADJ = "paper"
    # Expansion: "grouped" (scales channels) or "full"
    node.WR = "grouped"
    # Norm of the result: "SyncBN" (BN in one process), "BN", "GN" or ""
    node.NORM = "SyncBN"
    # Norm of the nodes: "LN", "BN" or ""; BN sees few values with one or two images per GPU
    node.NODE_NORM = "LN"
    # Softmax in "sa"; False: the literal Eq. 6
    node.SA_SOFTMAX = True
    # Start as the plain ResNet
    node.ZERO_INIT = True
    return node


def _cascade() -> CfgNode:
    """`ContextCascadeROIHeads`; IoUs and box weights are in Detectron2's ROI_BOX_CASCADE_HEAD."""
    node = CfgNode()
    # Factor of the losses of each stage
    node.LOSS_WEIGHTS = [1.0, 0.5, 0.25]
    # What is averaged over the stages at test: "logits" (mmdetection) or "probabilities"
    node.SCORE_MEAN = "logits"
    return node


def _htc() -> CfgNode:
    """Hybrid Task Cascade; the defaults are the paper's on COCO."""
    node = CfgNode({"SEMANTIC": CfgNode()})
    semantic = node.SEMANTIC
    # Off: no semantic parameters, and no stuff-thing maps are needed
    semantic.ENABLED = True
    semantic.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    # The map whose size all take
    semantic.COMMON_FEATURE = "p3"
    # Labels of the maps: 0 ... NUM_CLASSES - 1, and IGNORE_VALUE
    semantic.NUM_CLASSES = 183
    semantic.IGNORE_VALUE = 255
    semantic.NUM_CONV = 4
    semantic.CONV_DIM = 256
    semantic.POOLER_RESOLUTION = 14
    semantic.LOSS_WEIGHT = 0.2
    return node
