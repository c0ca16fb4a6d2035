"""The order and the augmentation of training images, from any batch on, with any workers."""

import logging
import random
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm

from d2ctx import UserError
from d2ctx.recovery.rng import generator_state
from d2ctx.recovery.stream import ExactLoader, build_exact_loader
from d2ctx.trainer import Trainer
from tests.d2ctx.toy_coco import toy_config, write_toy

IMAGES = [
    {"image_id": i, "width": 2 if i % 3 else 1, "height": 1 if i % 3 else 2} for i in range(7)
]
SEED = 11


def draw(sample: dict) -> dict:
    """A mapper that draws from each generator an augmentation may use."""
    numbers = (random.random(), float(np.random.rand()), torch.rand(()).item())
    return {**sample, "numbers": numbers}


def unusable_at_first(sample: dict) -> dict | None:
    return draw(sample) if random.random() < 0.5 else None


def loader(mapper=draw, *, images=IMAGES, workers=0, batch=2, group=True, seed=SEED) -> ExactLoader:
    return ExactLoader(
        images,
        mapper,
        make_sampler=lambda seed: TrainingSampler(len(images), seed=seed),
        total_batch=batch,
        group=group,
        workers=workers,
        seed=seed,
    )


def batches(source, count: int = 12) -> list:
    return list(islice(iter(source), count))


def ids(found: list) -> list[list[int]]:
    return [[sample["image_id"] for sample in batch] for batch in found]


@pytest.fixture
def process(monkeypatch):
    """Pretend to be one of several processes."""

    def pretend(rank: int, of: int) -> None:
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: of)

    return pretend


# ---- what a batch is -------------------------------------------------------------------------
@pytest.mark.parametrize("group", [True, False])
def test_the_images_of_a_batch_are_those_of_detectron2(group):
    theirs = build_detection_train_loader(
        IMAGES,
        mapper=draw,
        sampler=TrainingSampler(len(IMAGES), seed=SEED),
        total_batch_size=2,
        aspect_ratio_grouping=group,
    )
    assert ids(batches(loader(group=group))) == ids(batches(theirs))


def test_a_batch_has_one_orientation():
    for batch in batches(loader()):
        assert len({sample["width"] > sample["height"] for sample in batch}) == 1


def test_workers_change_nothing():
    assert batches(loader(workers=2)) == batches(loader())


def test_a_seed_decides_on_order_and_augmentation():
    assert batches(loader()) == batches(loader())
    assert ids(batches(loader(seed=12))) != ids(batches(loader()))


def test_an_image_looks_different_each_time():
    seen = [s["numbers"] for batch in batches(loader()) for s in batch if s["image_id"] == 1]
    assert len(seen) > 2
    assert len({number for numbers in seen for number in numbers}) == 3 * len(seen)


def test_processes_share_the_images_of_one(process):
    whole = [s for batch in batches(loader(batch=4, group=False), 6) for s in batch]
    parts = []
    for rank in (0, 1):
        process(rank, 2)
        parts.append([s for batch in batches(loader(batch=4, group=False), 6) for s in batch])
    assert [s for pair in zip(*parts, strict=True) for s in pair] == whole


def test_a_batch_that_cannot_be_shared_is_refused(process):
    process(0, 2)
    with pytest.raises(UserError, match="IMS_PER_BATCH must be a multiple of .* 2, got 3"):
        loader(batch=3)


def test_loading_leaves_the_generators_of_this_process_alone():
    for workers in (0, 1):
        before = generator_state()
        batches(loader(workers=workers), 2)
        after = generator_state()
        assert torch.equal(after["torch"], before["torch"])
        assert after["python"] == before["python"]
        assert torch.equal(after["numpy"][1], before["numpy"][1])
        assert after["numpy"][2] == before["numpy"][2]


# ---- going on --------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 5])
def test_going_on_from_a_batch_gives_the_ones_behind_it(done, workers):
    first = loader(workers=workers)
    running = iter(first)
    for _ in range(done):
        next(running)
    second = loader(seed=99, workers=workers)
    second.load_state_dict(first.state_dict())
    assert batches(second, 6) == batches(loader(), done + 6)[done:]


def test_the_state_is_plain_and_counts_batches_taken_not_loaded():
    source = loader(workers=2)
    running = iter(source)
    assert source.state_dict()["batches"] == 0
    next(running)
    assert source.state_dict() == {
        **{"seed": SEED, "detours": 0, "batches": 1},
        **{"images": 7, "total_batch": 2, "processes": 1},
    }


def test_a_detour_is_another_order_that_can_be_gone_on_with():
    first = loader()
    first.detours = 1
    whole = batches(first)
    assert ids(whole) != ids(batches(loader()))
    second = loader()
    second.load_state_dict({**first.state_dict(), "batches": 4})
    assert batches(second, 8) == whole[4:]


def test_another_data_set_or_batch_is_told(caplog):
    state = {**loader(batch=4).state_dict(), "batches": 3}
    changed = loader(batch=2, images=IMAGES[:6])
    with caplog.at_level(logging.WARNING):
        changed.load_state_dict(state)
    assert "images was 7, is 6, total_batch was 4, is 2" in caplog.text
    assert changed.done == 6


def test_an_unchanged_loader_says_nothing(caplog):
    loader().load_state_dict(loader().state_dict())
    assert not caplog.records


# ---- mappers that refuse images --------------------------------------------------------------
def test_an_unusable_image_is_replaced_by_the_same_one_each_time():
    whole = batches(loader(unusable_at_first))
    assert batches(loader(unusable_at_first, workers=2)) == whole
    assert ids(whole) != ids(batches(loader()))


def test_a_mapper_that_can_use_nothing_is_told():
    with pytest.raises(UserError, match="could use none of 20 images"):
        batches(loader(lambda sample: None), 1)


# ---- from a configuration --------------------------------------------------------------------
@pytest.fixture
def cfg(tmp_path, isolated):
    toy = write_toy(tmp_path, images=4)
    cfg = toy_config(train=[toy], test=[], output=tmp_path / "run")
    cfg.INPUT.MIN_SIZE_TRAIN = (32, 40, 48)
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def pixels(source) -> list:
    return [[(s["image_id"], s["image"].tolist()) for s in b] for b in batches(source, 4)]


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_a_configuration_gives_the_same_pixels_again(cfg, sampler):
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.9  # the classes of the toy set are rarer
    first, second = build_exact_loader(cfg), build_exact_loader(cfg)
    second.load_state_dict({**first.state_dict(), "batches": 2})
    assert pixels(second)[:2] == pixels(first)[2:]
    made = first.make_sampler(0)
    assert isinstance(made, RepeatFactorTrainingSampler) == (sampler != "TrainingSampler")


@pytest.mark.parametrize("plain", [[{"file_name": "a.png", "image_id": 0}], iter(IMAGES)])
def test_images_of_unknown_size_are_left_to_detectron2(cfg, monkeypatch, plain):
    monkeypatch.setattr("d2ctx.recovery.stream.get_detection_dataset_dicts", lambda *_, **__: plain)
    assert build_exact_loader(cfg) is None


def test_another_sampler_is_left_to_detectron2(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "SamplerOfTheUser"
    assert build_exact_loader(cfg) is None
    with pytest.raises(ValueError, match="Unknown training sampler: SamplerOfTheUser"):
        Trainer.build_train_loader(cfg)
