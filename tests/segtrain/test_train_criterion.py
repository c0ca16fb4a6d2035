import pytest
import torch
import torch.nn.functional as F

from segtrain.config.schema import LossConfig
from segtrain.criterion import build_criterion, mined_cross_entropy


def batch(size=4, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, 3, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (size, 5, 7), generator=generator)
    for index in range(size):
        labels[index, : index + 1] = 255
    return logits, labels


def valid(labels):
    return (labels != 255).sum().double()


def counts(labels):
    return {"label": valid(labels)}


def losses_of(config, outputs, labels, whole=None, *, share=1.0):
    """What the criterion says of a part of the labels `whole`."""
    criterion = build_criterion(config, share=share)
    return criterion(outputs, {"label": labels}, counts(labels if whole is None else whole))


def test_main_and_auxiliary_losses_by_the_definition():
    logits, labels = batch()
    others = [torch.randn(4, 3, 5, 7), torch.randn(4, 3, 5, 7)]
    outputs = {"logits": logits, "aux": others}
    found = losses_of(LossConfig(aux_weight=0.3), outputs, labels)
    assert list(found) == ["loss_seg", "loss_aux", "loss_aux1"]
    expected = [F.cross_entropy(logits, labels, ignore_index=255)]
    for aux in others:
        expected.append(0.3 * F.cross_entropy(aux, labels, ignore_index=255))
    for value, wanted in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(value, wanted, check_dtype=False)


def test_auxiliary_weight_zero_leaves_them_out():
    logits, labels = batch()
    found = losses_of(LossConfig(aux_weight=0.0), {"logits": logits, "aux": [logits]}, labels)
    assert list(found) == ["loss_seg"]


@pytest.mark.parametrize("kind", ["ce", "ohem"])
def test_parts_add_up_to_the_mean_over_the_whole(kind):
    logits, labels = batch()
    config = LossConfig(kind=kind, ohem_threshold=1.0)  # 1.0 keeps every pixel
    whole = losses_of(config, {"logits": logits}, labels)["loss_seg"]
    cuts = [slice(k, k + 1) for k in range(4)]
    parts = [
        losses_of(config, {"logits": logits[k]}, labels[k], labels, share=0.25)["loss_seg"]
        for k in cuts
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(whole, F.cross_entropy(logits, labels, ignore_index=255))


def test_mining_is_the_mean_over_hard_pixels():
    logits, labels = batch()
    losses = F.cross_entropy(logits, labels, ignore_index=255, reduction="none")
    hard = (labels != 255) & ((-losses).exp() <= 0.3)
    found = mined_cross_entropy(logits, labels, num_valid=valid(labels), threshold=0.3, min_kept=1)
    torch.testing.assert_close(found, losses[hard].mean())


def test_auxiliary_losses_are_mined_as_well():
    logits, labels = batch()
    other = torch.randn(4, 3, 5, 7)
    config = LossConfig(kind="ohem", ohem_threshold=0.3, ohem_min_kept=1, aux_weight=0.5)
    found = losses_of(config, {"logits": logits, "aux": [other]}, labels)
    losses = F.cross_entropy(other, labels, ignore_index=255, reduction="none")
    hard = (labels != 255) & ((-losses).exp() <= 0.3)
    assert 0 < hard.sum() < valid(labels)
    expected = 0.5 * losses[hard].mean()
    torch.testing.assert_close(found["loss_aux"], expected, check_dtype=False)


def test_fewest_hard_pixels_are_a_number_of_the_global_batch():
    logits, labels = batch(1)
    config = LossConfig(kind="ohem", ohem_threshold=1e-9, ohem_min_kept=40)
    found = losses_of(config, {"logits": logits}, labels, share=0.25)
    losses = F.cross_entropy(logits, labels, ignore_index=255, reduction="none")
    torch.testing.assert_close(found["loss_seg"], losses.flatten().topk(10).values.mean())


@pytest.mark.parametrize("kind", ["ce", "ohem"])
def test_a_part_without_valid_pixels_is_zero_with_zero_gradient(kind):
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    labels = torch.full((1, 4, 4), 255)
    loss = losses_of(LossConfig(kind=kind), {"logits": logits}, labels)["loss_seg"]
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
