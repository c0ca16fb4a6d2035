"""Training data as one stream that can go on from any batch, with any number of workers.

Detectron2's samplers are endless streams that follow from a seed. Here everything else about a
batch follows from it too: the images are put into batches of one orientation by the sampler, which
knows their sizes, instead of behind the workers; and augmentation is seeded for each place in the
stream. So nothing has to be stored but the seed and how many batches were used, and going on means
to let the sampler, which costs nothing, run ahead.
"""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper, get_detection_dataset_dicts, samplers
from detectron2.utils import comm
from torch import Generator
from torch.utils.data import DataLoader, Dataset, Sampler

from d2ctx.errors import UserError
from d2ctx.recovery.rng import seeded

logger = logging.getLogger(__name__)
Sample = dict[str, Any]
Mapper = Callable[[Sample], Sample | None]
# From a seed to an endless stream of indices, each process having its share.
MakeSampler = Callable[[int], Sampler[int]]
_TRIES = 20  # images in the place of one that the mapper cannot use
_AUGMENTATION = 0x5EED  # sets its seeds apart from those of the order


class ExactLoader:
    """Batches of one process, endless; `iter` starts behind the batches that `state` counts.

    Each process has `total_batch / processes` of the images of a global batch.

    Args:
        images: Detectron2's data-set dicts.
        mapper: From one of them to what the model takes; None means that it cannot be used.
        make_sampler: From a seed to indices of `images`.
        total_batch: Images of a global batch.
        group: Whether a batch holds wide images only or tall ones only.
        workers: Processes that load; 0 loads in this one.
        seed: Of order and augmentation, the same in all processes.

    Attributes:
        done: Batches taken so far.
        detours: Each number of them is another order and augmentation: how often training went
            back and should not meet the same batches again.

    Raises:
        UserError: If a global batch cannot be shared out.
    """

    def __init__(
        self,
        images: Sequence[Sample],
        mapper: Mapper,
        *,
        make_sampler: MakeSampler,
        total_batch: int,
        group: bool,
        workers: int,
        seed: int,
    ) -> None:
        processes = comm.get_world_size()
        if total_batch < 1 or total_batch % processes:
            raise UserError(
                f"SOLVER.IMS_PER_BATCH must be a multiple of the number of processes, {processes}, "
                f"got {total_batch}"
            )
        self.total_batch, self.batch = total_batch, total_batch // processes
        self.dataset = SeededDataset(DatasetFromList(list(images), copy=False), mapper)
        self.wide = np.array([d["width"] > d["height"] for d in images]) if group else None
        self.make_sampler, self.workers = make_sampler, workers
        self.seed, self.detours, self.done = seed, 0, 0

    def __iter__(self) -> Iterator[list[Sample]]:
        """Load from here on; `done` grows with each batch that is taken."""
        loader = DataLoader(
            self.dataset,
            sampler=islice(self._places(), self.done * self.batch, None),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.workers,
            generator=Generator(),  # else it would draw from the one that the model uses
        )
        samples = iter(loader)
        while True:
            batch = self._next(samples)
            self.done += 1
            yield batch

    def _next(self, samples: Iterator[Sample]) -> list[Sample]:
        try:
            return list(islice(samples, self.batch))
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a process that loads data died ({str(error).splitlines()[0]}), most often for "
                "want of memory: lower DATALOADER.NUM_WORKERS, then go on with the same command "
                "and --resume"
            ) from error

    def _places(self) -> Iterator[tuple[int, int, int]]:
        """Seed, place in the stream of all processes, and index, batch after batch."""
        seed = _mixed(self.seed, self.detours)
        processes, rank = comm.get_world_size(), comm.get_rank()
        buckets: dict[bool, list[tuple[int, int, int]]] = {False: [], True: []}
        for count, index in enumerate(self.make_sampler(seed)):
            wide = self.wide is not None and bool(self.wide[index])
            buckets[wide].append((seed, count * processes + rank, index))
            if len(buckets[wide]) == self.batch:
                yield from buckets[wide]
                buckets[wide].clear()

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to go on."""
        return {
            "seed": self.seed,
            "detours": self.detours,
            "batches": self.done,
            **self._shape(),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on, from the next `iter` on, where another loader was.

        Args:
            state: Of `state_dict`.
        """
        self.seed, self.detours = state["seed"], state["detours"]
        self.done = state["batches"] * state["total_batch"] // self.total_batch
        changed = [key for key, value in self._shape().items() if state.get(key) != value]
        if changed:
            logger.warning(
                "the order of the data goes on about where it was, with other batches than without "
                "the stop: %s",
                ", ".join(
                    f"{key} was {state.get(key)}, is {self._shape()[key]}" for key in changed
                ),
            )

    def _shape(self) -> dict[str, int]:
        return {
            "images": len(self.dataset),
            "total_batch": self.total_batch,
            "processes": comm.get_world_size(),
        }


class SeededDataset(Dataset[Sample]):
    """Samples by (seed, place in the stream, index of the image).

    Args:
        images: Data-set dicts by index.
        mapper: See `ExactLoader`.
    """

    def __init__(self, images: Dataset[Sample], mapper: Mapper) -> None:
        self.images, self.mapper = images, mapper

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: tuple[int, int, int]) -> Sample:
        seed, position, index = place
        with seeded(_AUGMENTATION, seed, position):
            for _ in range(_TRIES):
                sample = self.mapper(self.images[index])
                if sample is not None:
                    return sample
                index = random.randrange(len(self))
        raise UserError(
            f"the mapper of the training data could use none of {_TRIES} images; correct the "
            "data or the mapper"
        )


def build_exact_loader(cfg: CfgNode, mapper: Mapper | None = None) -> ExactLoader | None:
    """The loader of a configuration.

    Args:
        cfg: With our keys.
        mapper: In the place of Detectron2's own.

    Returns:
        The loader, or None where the order cannot be known in advance: another sampler than
        Detectron2's first two, images without a size, or a data set that is no list.
    """
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN
    images = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
        proposal_files=proposals if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    if not isinstance(images, list):
        return None
    make_sampler = _sampler(cfg, images)
    group = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    if make_sampler is None or (group and not all("width" in d and "height" in d for d in images)):
        return None
    return ExactLoader(
        images,
        DatasetMapper(cfg, is_train=True) if mapper is None else mapper,
        make_sampler=make_sampler,
        total_batch=cfg.SOLVER.IMS_PER_BATCH,
        group=group,
        workers=cfg.DATALOADER.NUM_WORKERS,
        seed=comm.shared_random_seed(),
    )


def _sampler(cfg: CfgNode, images: Sequence[Sample]) -> MakeSampler | None:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return lambda seed: samplers.TrainingSampler(len(images), seed=seed)
    if name != "RepeatFactorTrainingSampler":
        return None
    repeat = samplers.RepeatFactorTrainingSampler
    factors = repeat.repeat_factors_from_category_frequency(images, cfg.DATALOADER.REPEAT_THRESHOLD)
    return lambda seed: repeat(factors, seed=seed)


def _mixed(seed: int, detours: int) -> int:
    """The seed itself, and after detours other ones."""
    return (
        seed if not detours else int(np.random.SeedSequence((seed, detours)).generate_state(1)[0])
    )


def _as_it_is(sample: Sample) -> Sample:
    return sample
