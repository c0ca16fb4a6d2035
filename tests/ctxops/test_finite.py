import math

import pytest
import torch
from torch import nn

from ctxops.finite import ROOT, FiniteWatch, NonFinite, nonfinite_parameters


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def watched(model, *args, backward=True, **kwargs):
    """Forward, sum of all there is, backward."""
    with FiniteWatch(model) as watch:
        output = model(*args, **kwargs)
        if backward:
            output.sum().backward()
    return watch


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    left = [len(getattr(m, kind)) for m in model.modules() for kind in kinds]
    return sum(left) + sum(len(p._backward_hooks or ()) for p in model.parameters())


def test_names_come_in_order_of_execution_with_their_largest_values():
    model = nn.Sequential(nn.Sequential(Apply(lambda x: 2 * x)), Apply(lambda x: x - 9))
    x = torch.tensor([1.0, -3.0], requires_grad=True)
    watch = watched(model, x)
    assert watch.largest == {"0.0": 6.0, "0": 6.0, "1": 15.0, ROOT: 15.0}
    assert list(watch.largest) == ["0.0", "0", "1", ROOT]
    assert watch.inputs == {ROOT: 3.0, "0": 3.0, "0.0": 3.0, "1": 6.0}
    assert watch.gradients == {"1": 1.0, ROOT: 1.0, "0.0": 1.0, "0": 1.0}
    assert watch.first is None


def test_a_module_called_twice_keeps_its_largest_and_its_last_place():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Apply(lambda x: 2 * x), Apply(lambda x: -x / 8)

        def forward(self, x):
            return self.a(self.b(self.a(x)))

    watch = watched(Twice(), torch.tensor([4.0]), backward=False)
    assert watch.largest == {"b": 1.0, "a": 8.0, ROOT: 2.0}
    assert list(watch.largest) == ["b", "a", ROOT]


def test_containers_of_tensors_are_looked_into():
    def split(x, *, more):
        return {"a": [x, (x * more["scale"], None, "text")], "b": torch.tensor([1_000_000])}

    model = Apply(split)
    with FiniteWatch(model) as watch:
        model(torch.tensor([1.0, 2.0]), more={"scale": torch.tensor(-7.0)})
    assert watch.inputs == {ROOT: 7.0}
    assert watch.largest == {ROOT: 14.0}  # integers do not count


def test_first_output_that_is_not_finite_is_named():
    model = nn.Sequential(
        Apply(lambda x: x - 1), nn.Sequential(nn.Identity(), Apply(torch.log)), nn.ReLU()
    )
    watch = watched(model, torch.tensor([0.5, 3.0]), backward=False)
    assert watch.first == NonFinite("1.1", "output", "largest |output| nan, largest |input| 2")
    assert math.isnan(watch.largest["1.1"])
    assert math.isnan(watch.largest["2"])
    assert watch.largest["0"] == 2.0


def test_what_a_module_does_between_its_parts_is_its_own():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            return self.inner(x / (x - x))

    watch = watched(nn.Sequential(nn.Identity(), Block()), torch.ones(2), backward=False)
    assert (watch.first.module, watch.first.kind) == ("1", "output")


def test_an_input_in_place_is_looked_at_before_it_is_changed():
    model = nn.Sequential(nn.Identity(), Apply(lambda x: x.log_()), nn.ReLU(inplace=True))
    watch = watched(model, torch.tensor([-1.0]), backward=False)
    assert watch.first.module == "1"


def test_an_input_that_is_not_finite_is_told_from_what_the_model_does():
    watch = watched(nn.Linear(2, 1), torch.tensor([1.0, math.inf]), backward=False)
    assert (watch.first.module, watch.first.kind) == (ROOT, "input")
    assert watch.first.detail == "largest |input| inf"


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_weight_that_is_not_finite_is_told_from_its_arithmetic(value):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert nonfinite_parameters(model) == []
    with torch.no_grad():
        model[1].bias[0] = value
    assert nonfinite_parameters(model) == ["1.bias"]
    first = watched(model, torch.ones(1, 2), backward=False).first
    assert (first.module, first.kind) == ("1", "weight")
    assert first.detail.startswith("bias not finite; largest |output|")


def test_a_statistic_that_is_not_finite_counts_as_a_weight():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).eval()
    model[1].running_mean.fill_(math.nan)
    first = watched(model, torch.ones(1, 1, 2, 2), backward=False).first
    assert (first.module, first.kind) == ("1", "weight")
    assert first.detail.startswith("running_mean not finite")
    assert nonfinite_parameters(model) == []


def test_a_gradient_alone_names_the_module_that_makes_it():
    root = nn.Sequential(nn.ReLU(), Apply(torch.sqrt))
    model = nn.Sequential(nn.Linear(2, 2), root, Apply(lambda x: 3 * x))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([-1.0, 4.0]))  # the gradient of sqrt(0) is infinite
    watch = watched(model, torch.ones(1, 2))
    assert watch.first.module == "1.1"
    assert watch.first.kind == "gradient"
    assert watch.first.detail == (
        "largest |gradient| of its output inf; finite at its outputs, not at its inputs"
    )
    assert watch.gradients["1.1"] == 3.0
    assert watch.gradients["1.0"] == math.inf
    assert all(math.isfinite(value) for value in watch.largest.values())


def test_a_module_beside_the_one_that_makes_it_is_not_hidden():
    """One tensor goes into two modules: their gradients are only seen together."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(1, 1), Apply(torch.sqrt), nn.Tanh()

        def forward(self, x):
            x = self.stem(x)
            return self.a(x) + self.b(x)

    model = Branches()
    nn.init.zeros_(model.stem.weight)
    nn.init.zeros_(model.stem.bias)
    first = watched(model, torch.ones(1, 1)).first
    assert first.module == "a"
    assert first.detail.endswith("not at its inputs, or in b")


def test_what_goes_wrong_later_is_not_named():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Sequential(nn.Linear(1, 1), Apply(torch.sqrt)) for _ in "ab")

        def forward(self, x):
            return self.a(x) + self.b(x)

    model = Branches()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    watch = watched(model, torch.ones(1, 1))
    first = watch.first
    assert first.module in ("a.1", "b.1")
    assert " or in " not in first.detail
    assert watch.gradients["a.0"] == watch.gradients["b.0"] == math.inf


def test_a_gradient_that_the_loss_makes_is_that_of_the_output():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    with FiniteWatch(model) as watch:
        (model(torch.ones(1, 1)).sum() * 0).sqrt().backward()
    assert watch.first.module == "1"
    assert watch.first.detail == "largest |gradient| of its output nan"


def test_a_gradient_of_a_parameter_alone():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x + self.scale.sqrt()

    first = watched(nn.Sequential(nn.Linear(1, 1), Scale()), torch.ones(1, 1)).first
    assert first == NonFinite("1", "gradient", "largest |gradient| of its scale inf")


def test_nothing_is_left_behind():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    with FiniteWatch(model) as watch:
        assert hooks_of(model)
        loss = model(torch.ones(1, 2)).sum()
    assert hooks_of(model) == 0
    loss.backward()
    assert watch.gradients == {}  # neither are the hooks of the outputs

    def fails(x):
        raise RuntimeError("no")

    broken = nn.Sequential(nn.Linear(2, 2), Apply(fails))
    with pytest.raises(RuntimeError, match="no"), FiniteWatch(broken) as watch:
        broken(torch.ones(1, 2))
    assert hooks_of(broken) == 0
    assert list(watch.largest) == ["0"]


def test_an_exception_that_a_module_catches_is_not_a_call():
    def fails(x):
        raise RuntimeError("no")

    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.bad, self.good = Apply(fails), Apply(torch.log)

        def forward(self, x):
            try:
                return self.bad(x)
            except RuntimeError:
                return self.good(x)

    watch = watched(Tries(), torch.tensor([-1.0]), backward=False)
    assert watch.first.module == "good"
    assert list(watch.largest) == ["good", ROOT]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_stay_as_they_are(dtype):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5)
    ).to(dtype)
    x = torch.randn(2, 3, 6, 6, dtype=dtype)

    def passed():
        torch.manual_seed(1)
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        return [output.detach(), *(p.grad.clone() for p in model.parameters())]

    plain = passed()
    with FiniteWatch(model) as watch:
        seen = passed()
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert watch.first is None
    assert set(watch.gradients) == {"0", "1", "2", "3", ROOT}


def test_empty_and_complex_tensors():
    model = Apply(lambda x: [x[:0], torch.complex(x, 2 * x) * math.inf])
    watch = watched(model, torch.tensor([1.0]), backward=False)
    assert not math.isfinite(watch.largest[ROOT])
    assert watch.first.kind == "output"
