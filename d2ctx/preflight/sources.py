"""Which data sets a run reads, and where their files lie."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ctx.datasets import dataset_root
from d2ctx.evaluation.build import missing_evaluator
from d2ctx.preflight.cache import cache_folder
from d2ctx.preflight.findings import Findings
from d2ctx.wording import did_you_mean

# Metadata of Detectron2's data sets that name files or folders.
PATH_KEYS = (
    "json_file",
    "image_root",
    "image_dir",
    "gt_dir",
    "sem_seg_root",
    "panoptic_root",
    "panoptic_json",
    "dirname",
)


# Which key of a definition in YAML gives a path, by section; all others come from the last one.
_YAML_KEYS = {
    "COCO_FORMAT": {"json_file": "JSON", "sem_seg_root": "SEM_SEG", "": "IMAGES"},
    "COCO_PANOPTIC": {
        "panoptic_json": "JSON",
        "panoptic_root": "PNGS",
        "json_file": "INSTANCES_JSON",
        "": "IMAGES",
    },
    "CITYSCAPES": {"": "ROOT"},
}


@dataclass(frozen=True)
class Source:
    """One data set of the run.

    Attributes:
        name: Its registered name.
        train: Whether the run trains on it.
        test: Whether the run evaluates on it.
        section: The key below DATASETS that defines it; "" where none does.
    """

    name: str
    train: bool
    test: bool
    section: str

    @property
    def from_yaml(self) -> bool:
        """Whether `DATASETS.COCO_FORMAT` defines it."""
        return self.section == "COCO_FORMAT"

    @property
    def is_panoptic(self) -> bool:
        """Whether its stuff maps and instances are made from panoptic PNGs."""
        return self.section in ("COCO_PANOPTIC", "CITYSCAPES")

    @property
    def json_file(self) -> str:
        """Annotation file."""
        return str(MetadataCatalog.get(self.name).get("json_file", ""))

    @property
    def image_root(self) -> str:
        """Folder of the images."""
        return str(MetadataCatalog.get(self.name).get("image_root", ""))

    @property
    def semantic_root(self) -> str:
        """Folder of the label maps; "" where there are none."""
        return str(MetadataCatalog.get(self.name).get("sem_seg_root", None) or "")

    @property
    def is_coco(self) -> bool:
        """Whether the instances come from a json in COCO's instance format."""
        meta = MetadataCatalog.get(self.name)
        kind = meta.get("evaluator_type")
        # The other panoptic form takes its instances from the panoptic json.
        separated = kind == "coco_panoptic_seg" and meta.get("sem_seg_root") is not None
        local = self.json_file and "://" not in self.json_file
        return bool(local) and (kind == "coco" or separated or self.is_panoptic)

    @property
    def classes(self) -> list[str] | None:
        """Class names that the registration promises, where it does."""
        return MetadataCatalog.get(self.name).get("thing_classes")

    def fix(self, key: str) -> str:
        """How the user can correct the path of `key`, as JSON, IMAGES or SEM_SEG."""
        if self.section:
            known = _YAML_KEYS[self.section]
            key = key if key in known.values() else known[""]
            return f"correct DATASETS.{self.section}.{self.name}.{key}, or {_ROOT_FIX}"
        return _ROOT_FIX

    def fix_path(self, metadata_key: str) -> str:
        """How the user can correct the path that the metadata hold under a key."""
        known = _YAML_KEYS.get(self.section, {"": ""})
        return self.fix(known.get(metadata_key, known[""]))


_ROOT_FIX = "set the environment variable DETECTRON2_DATASETS to the folder of your data sets"


def find_sources(cfg: CfgNode, *, eval_only: bool, findings: Findings) -> list[Source]:
    """List the registered data sets of a run, each once; unknown names become errors."""
    names = {"TRAIN": () if eval_only else cfg.DATASETS.TRAIN, "TEST": cfg.DATASETS.TEST}
    needed = "TEST" if eval_only else "TRAIN"
    if not names[needed]:
        findings.errors.append(
            f'DATASETS.{needed} is empty; name a data set, for example DATASETS.{needed} ("a",)'
        )
    for key, listed in names.items():
        for name in listed:
            if name not in DatasetCatalog:
                known = DatasetCatalog.list()
                hint = did_you_mean(name, known) or "define it under DATASETS.COCO_FORMAT"
                findings.errors.append(f"DATASETS.{key}: no data set is called {name}; {hint}")
    unique = dict.fromkeys(name for listed in names.values() for name in listed)
    return [
        Source(
            name=name,
            train=name in names["TRAIN"],
            test=name in names["TEST"],
            section=next((s for s in _YAML_KEYS if name in cfg.DATASETS.get(s, {})), ""),
        )
        for name in unique
        if name in DatasetCatalog
    ]


def check_evaluators(sources: list[Source], findings: Findings) -> None:
    """Check that the test sets can be evaluated, which otherwise fails after the training."""
    problems = [missing_evaluator(source.name) for source in sources if source.test]
    findings.errors += filter(None, problems)


def present_sources(sources: list[Source], findings: Findings) -> list[Source]:
    """The sources whose files and folders are all there; each absent path becomes an error."""
    root = dataset_root()
    absent = {source.name: list(_absent_paths(source)) for source in sources}
    below_root = [p for paths in absent.values() for _, p in paths if _is_below(p, root)]
    if below_root and not os.path.isdir(root):
        state = "set to that" if "DETECTRON2_DATASETS" in os.environ else "not set"
        findings.errors.append(
            f"the data-set root {root} does not exist (DETECTRON2_DATASETS is {state}), "
            f"expected {below_root[0]}; {_ROOT_FIX}"
        )
    for source in sources:
        for key, path in absent[source.name]:
            if os.path.isdir(root) or not _is_below(path, root):
                findings.errors.append(
                    f"{source.name}: {key} {path} does not exist; {source.fix_path(key)}"
                )
    return [source for source in sources if not absent[source.name]]


def _absent_paths(source: Source) -> Iterator[tuple[str, str]]:
    meta = MetadataCatalog.get(source.name)
    for key in PATH_KEYS:
        path = meta.get(key)
        if path and source.is_panoptic and _is_below(str(path), str(cache_folder())):
            continue  # made when the set is prepared
        if path and "://" not in str(path) and not os.path.exists(path):
            yield key, str(path)


def _is_below(path: str, root: str) -> bool:
    return os.path.abspath(path).startswith(os.path.abspath(root) + os.sep)
