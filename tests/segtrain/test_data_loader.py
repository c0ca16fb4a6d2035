from itertools import islice, pairwise

import numpy as np
import pytest
import torch

from segtrain.config.data import DataConfig
from segtrain.data.dataset import (
    SegDataset,
    build_eval_transform,
    build_train_transform,
    generator_of,
)
from segtrain.data.datasets import named_layout
from segtrain.data.loader import EpochSampler, train_loader, val_loader
from segtrain.errors import UserError
from tests.segtrain.data_samples import folder_set, save


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    root = folder_set(tmp_path, [rng.integers(0, 3, (12 + k, 15)) for k in range(7)])
    for path in (root / "images/train").iterdir():
        height = 12 + int(path.stem)
        save(path, rng.integers(0, 256, (height, 15, 3)))
    return root


def config(root, **keys):
    keys = {"crop": (8, 10), "base_size": (20, 12), **keys}
    return DataConfig(dataset="folder", root=str(root), **keys)


def dataset(root, seed=0, **keywords):
    layout = named_layout("folder", root)
    transform = build_train_transform(config(root), layout)
    return SegDataset(layout, "train", transform, seed=seed, **keywords)


def first(loader, count):
    return list(islice(iter(loader), count))


def same(a, b):
    assert a["name"] == b["name"]
    assert torch.equal(a["image"], b["image"])
    assert torch.equal(a["label"], b["label"])


# --- samples -------------------------------------------------------------------------------------


def test_sample_is_what_the_interface_says(root):
    sample = dataset(root)[0, 2]
    assert (sample["image"].shape, sample["label"].shape) == ((3, 8, 10), (8, 10))
    assert (sample["image"].dtype, sample["label"].dtype) == (torch.float32, torch.int64)
    assert (sample["name"], sample["index"]) == ("2", 2)


def test_some_of_the_images(root):
    """The same ones again, the fewer among the more, others with another seed."""

    def names(count, seed=0):
        return [sample.name for sample in dataset(root, seed, images=count).samples]

    chosen = [names(count) for count in range(1, 8)]
    assert [len(some) for some in chosen] == [1, 2, 3, 4, 5, 6, 7]
    assert all(set(few) < set(more) for few, more in pairwise(chosen))
    assert all(some == sorted(some) for some in chosen)
    assert names(4) == chosen[3]
    assert len({tuple(names(4, seed)) for seed in range(6)}) > 1
    everything, some = dataset(root), dataset(root, images=3)
    assert len(some) == 3
    position = [s.name for s in everything.samples].index(some.samples[1].name)
    assert torch.equal(some[5, 1]["image"], everything[5, position]["image"])
    with pytest.raises(UserError, match="train_images 8 is more than the 7 images of train; write"):
        dataset(root, images=8)


def test_seed_epoch_and_index_each_change_the_crop(root):
    base = dataset(root)[0, 0]
    same(base, dataset(root)[0, 0])
    assert not torch.equal(base["image"], dataset(root)[1, 0]["image"])
    assert not torch.equal(base["image"], dataset(root, seed=1)[0, 0]["image"])


def test_other_random_numbers_do_not_matter(root):
    before = torch.get_rng_state()
    a = dataset(root)[3, 1]
    torch.rand(100)
    np.random.default_rng(0)
    same(a, dataset(root)[3, 1])
    torch.set_rng_state(before)


def test_generators_of_neighbours_differ():
    keys = [(s, e, i) for s in range(6) for e in range(6) for i in range(6)]
    firsts = {torch.randint(2**62, (), generator=generator_of(*key)).item() for key in keys}
    assert len(firsts) == len(keys)
    assert generator_of(0, 1).initial_seed() != generator_of(1, 0).initial_seed()


def test_without_a_transform_pixels_are_as_on_disk(root):
    data = SegDataset(named_layout("folder", root), "train", None)
    sample = data[4]
    assert (sample["image"].dtype, sample["image"].shape) == (torch.uint8, (3, 16, 15))
    assert sample["label"].dtype == torch.int64


def test_normalisation_of_the_model_unless_the_configuration_says(root):
    assert build_eval_transform(config(root), normalisation="imagenet").mean[0] == 0.485
    explicit = config(root, normalisation="vit")
    assert build_eval_transform(explicit, normalisation="imagenet").mean[0] == 0.5
    with pytest.raises(UserError, match="no normalisation 'deit'; known: imagenet, vit"):
        build_eval_transform(config(root), normalisation="deit")


# --- order ---------------------------------------------------------------------------------------


def stream(count, **keys):
    sampler = EpochSampler(**{"num_samples": 7, "global_batch": 4, "seed": 3, **keys})
    return list(islice(iter(sampler), count))


def test_every_epoch_holds_every_sample_once_in_another_order():
    keys = [key for batch in stream(14) for key in batch]
    epochs = [[i for e, i in keys if e == epoch] for epoch in range(8)]
    assert all(sorted(order) == list(range(7)) for order in epochs)
    assert len({tuple(order) for order in epochs}) > 5
    assert [e for e, _ in keys] == sorted(e for e, _ in keys)


def test_splitting_a_batch_keeps_it():
    whole = stream(6)
    small = stream(12, micro_batch=2)
    assert [a + b for a, b in zip(small[::2], small[1::2], strict=True)] == whole
    ranks = [stream(12, micro_batch=1, world=2, rank=r) for r in (0, 1)]
    for step, batch in enumerate(whole):
        parts = [ranks[r][2 * step + k] for r in (0, 1) for k in (0, 1)]
        assert [key for part in parts for key in part] == batch


def test_accumulation_is_what_is_left():
    sampler = EpochSampler(num_samples=9, global_batch=8, micro_batch=2, world=2)
    assert sampler.accumulation == 2
    assert EpochSampler(num_samples=9, global_batch=8, world=2).micro_batch == 4


def test_resuming_goes_on_where_it_stopped():
    whole = stream(10, micro_batch=2)
    assert stream(4, micro_batch=2, step=3) == whole[6:10]
    sampler = EpochSampler(num_samples=7, global_batch=4, seed=3, micro_batch=2)
    sampler.load_state_dict(sampler.state_dict(3))
    assert list(islice(iter(sampler), 4)) == whole[6:10]
    other = EpochSampler(num_samples=8, global_batch=4)
    with pytest.raises(UserError, match="saved with num_samples 7, now it is 8"):
        other.load_state_dict(sampler.state_dict(3))


def test_seeds_order_and_no_shuffling():
    assert stream(5, seed=4) != stream(5)
    assert stream(2, shuffle=False) == [
        [(0, 0), (0, 1), (0, 2), (0, 3)],
        [(0, 4), (0, 5), (0, 6), (1, 0)],
    ]


def test_a_batch_larger_than_the_split():
    assert sorted(stream(1, num_samples=2, global_batch=6)[0]) == [
        (e, i) for e in range(3) for i in range(2)
    ]


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"global_batch": 6, "micro_batch": 4}, "6 is no multiple of 1 processes x micro batch 4"),
        ({"global_batch": 3, "world": 2}, "3 is no multiple of 2 processes x micro batch 1"),
        ({"num_samples": 0}, "got 0 samples"),
        ({"rank": 1}, "process 1 of 1"),
    ],
)
def test_sampler_refuses(keys, text):
    with pytest.raises(UserError, match=text):
        EpochSampler(**{"num_samples": 7, "global_batch": 4, **keys})


# --- loaders -------------------------------------------------------------------------------------


def batches(root, workers, count=5, context=None):
    sampler = EpochSampler(num_samples=7, global_batch=4, micro_batch=2, seed=1)
    return first(train_loader(dataset(root), sampler, workers=workers, context=context), count)


def test_batches_do_not_depend_on_the_number_of_workers(root):
    alone = batches(root, 0)
    assert alone[0]["image"].shape == (2, 3, 8, 10)
    for workers in (1, 2):
        for a, b in zip(alone, batches(root, workers), strict=True):
            same(a, b)


@pytest.mark.slow
def test_batches_of_spawned_workers(root):
    for a, b in zip(batches(root, 0, 3), batches(root, 2, 3, "spawn"), strict=True):
        same(a, b)


def test_loading_leaves_the_global_generator_alone(root):
    state = torch.get_rng_state()
    batches(root, 0, 2)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_stay_one_line(root, workers):
    save(root / "masks/train/3.png", np.full((15, 15), 9))
    with pytest.raises(UserError) as caught:
        batches(root, workers, 7)
    assert "\n" not in str(caught.value)
    assert "3.png: unknown value 9; known: 0..2, 255; see: segtrain data check" in str(caught.value)


def test_sizes_that_disagree_stop_the_run(root):
    save(root / "masks/train/0.png", np.zeros((12, 14)))
    with pytest.raises(UserError, match="label of 14x12 pixels for an image of 15x12"):
        dataset(root)[0, 0]


def test_validation_sees_each_image_once(root):
    layout = named_layout("folder", root)
    data = SegDataset(layout, "val", build_eval_transform(config(root)))
    names = [[b["name"][0] for b in val_loader(data, rank=r, world=3)] for r in range(3)]
    assert names == [["0", "3", "6"], ["1", "4"], ["2", "5"]]
    shapes = [tuple(b["image"].shape) for b in val_loader(data)]
    assert shapes == [(1, 3, 12 + k, 15) for k in range(7)]


def test_lists_without_labels_cannot_be_trained_on(tmp_path):
    save(tmp_path / "images/test/x.jpg", np.zeros((4, 4, 3)))
    data = SegDataset(named_layout("ade20k", tmp_path), "test", None)
    with pytest.raises(UserError, match="x of ade20k has no labels; take another split"):
        data[0]
