"""Where NaN and infinity come from: a watch over the modules of a model, forward and backward.

It is made for a second look at an update that went wrong, not for every update: it waits for the
device at each module. Outputs and gradients stay as they are; only modules that have a faster way
where nobody looks on take the plain one, which is the same to rounding.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

ROOT = "(model)"  # the name of the watched module itself


@dataclass(frozen=True)
class NonFinite:
    """The first place where a number is NaN or infinite.

    Args:
        module: Name as in `named_modules`; `ROOT` for the watched module itself.
        kind: "input" of the whole model; "weight" of a module; "output" that is not finite though
            the inputs are; "gradient", in the backward pass.
        detail: What was found there, with the largest numbers around it.
    """

    module: str
    kind: Literal["output", "gradient", "input", "weight"]
    detail: str


@dataclass
class _Call:
    """One call of a module: largest |input|, and largest |gradient| of its outputs so far."""

    module: nn.Module
    name: str
    inputs: float
    gradient: float | None = None


class FiniteWatch:
    """While entered, looks at all that goes into and comes out of every module of a model.

    Floating point tensors are found in tensors, mappings, lists and tuples. Run forward and
    backward inside. A module that is called several times keeps its largest numbers. Everything is
    removed at the end, also after an exception; what was seen stays.

    - `largest`: module -> largest |output|, in order of execution (a module comes after the ones
      inside it); NaN and infinity are kept. `inputs` and `gradients` (of outputs, in order of the
      backward pass) are the same for these.
    - `first`: the first `NonFinite` or None. In the forward pass, what makes a number that is not
      finite out of finite ones; the innermost module is named. If that pass is clean, the first
      such gradient: of the module whose outputs have finite gradients and whose inputs have not,
      of a parameter, or of an output where no module is between (the loss).

    Args:
        model: The plain module; compiled code and wrappers have no modules to look at.
    """

    def __init__(self, model: nn.Module) -> None:
        self.largest: dict[str, float] = {}
        self.inputs: dict[str, float] = {}
        self.gradients: dict[str, float] = {}
        self._model = model
        self._names = {module: name or ROOT for name, module in model.named_modules()}
        self._handles: list[RemovableHandle] = []
        self._calls: list[_Call] = []
        self._forward: NonFinite | None = None
        self._backward: NonFinite | None = None
        self._bad: Tensor | None = None  # the first gradient that is not finite
        self._makers: list[str] = []  # modules that may have made it

    def __enter__(self) -> Self:
        for module, name in self._names.items():
            before = module.register_forward_pre_hook(self._entered, with_kwargs=True)
            self._handles += [before, module.register_forward_hook(self._left)]
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    self._hook(parameter, self._parameter_gradient(name, key))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._calls, self._bad = [], [], None

    @property
    def first(self) -> NonFinite | None:
        """The first place that is not finite, None where everything was."""
        if self._forward is not None or self._backward is None or not self._makers:
            return self._forward or self._backward
        name, others = self._makers[0], self._makers[1:]
        text = f"{self._backward.detail}; finite at its outputs, not at its inputs"
        return NonFinite(name, "gradient", text + "".join(f", or in {other}" for other in others))

    def _entered(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name, given = self._names[module], list(_tensors((args, kwargs)))
        largest = _largest(given)
        call = _Call(module, name, largest)
        self._calls.append(call)
        self.inputs[name] = _larger(self.inputs.get(name, 0.0), largest)
        if module is self._model and not math.isfinite(largest) and self._forward is None:
            self._forward = NonFinite(name, "input", f"largest |input| {largest:.4g}")
        for tensor in given:
            self._hook(tensor, self._input_gradient(call))

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self._calls.pop()
        while call.module is not module:  # one that ended with an exception which was caught
            call = self._calls.pop()
        made = list(_tensors(output))
        largest = _largest(made)
        # Taken out first, so that a later call moves it behind the others.
        before = self.largest.pop(call.name, 0.0)
        self.largest[call.name] = _larger(before, largest)
        if math.isfinite(call.inputs) and not math.isfinite(largest) and self._forward is None:
            self._forward = _offender(call, largest)
        for tensor in made:
            self._hook(tensor, self._output_gradient(call))

    def _hook(self, tensor: Tensor, seen: Callable[[Tensor], None]) -> None:
        if tensor.requires_grad:
            self._handles.append(tensor.register_hook(seen))

    def _output_gradient(self, call: _Call) -> Callable[[Tensor], None]:
        def seen(gradient: Tensor) -> None:
            largest = _largest([gradient])
            call.gradient = _larger(call.gradient or 0.0, largest)
            self.gradients[call.name] = _larger(self.gradients.get(call.name, 0.0), largest)
            if not math.isfinite(largest):
                self._note(gradient, call.name, f"largest |gradient| of its output {largest:.4g}")

        return seen

    def _input_gradient(self, call: _Call) -> Callable[[Tensor], None]:
        def seen(gradient: Tensor) -> None:
            largest = _largest([gradient])
            if math.isfinite(largest):
                return
            self._note(gradient, call.name, f"largest |gradient| of its input {largest:.4g}")
            # The hooks of a tensor get the same gradient one after the other, outer modules first.
            if gradient is self._bad and call.gradient is not None:
                inner = [m for m in self._makers if m != ROOT and not call.name.startswith(f"{m}.")]
                self._makers = [*inner, call.name]

        return seen

    def _parameter_gradient(self, name: str, key: str) -> Callable[[Tensor], None]:
        def seen(gradient: Tensor) -> None:
            largest = _largest([gradient])
            if not math.isfinite(largest):
                self._note(gradient, name, f"largest |gradient| of its {key} {largest:.4g}")

        return seen

    def _note(self, gradient: Tensor, name: str, detail: str) -> None:
        if self._backward is None:
            self._bad = gradient
            self._backward = NonFinite(name, "gradient", detail)


def nonfinite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that hold NaN or infinity.

    Args:
        model: Any module.

    Returns:
        Names as in `named_parameters`, in its order.
    """
    return [n for n, p in model.named_parameters() if not math.isfinite(_largest([p]))]


def _offender(call: _Call, largest: float) -> NonFinite:
    """A module that makes what is not finite: by its own weights, or out of finite numbers."""
    text = f"largest |output| {largest:.4g}, largest |input| {call.inputs:.4g}"
    own = [*call.module.named_parameters(recurse=False), *call.module.named_buffers(recurse=False)]
    broken = [key for key, value in own if not math.isfinite(_largest(_tensors(value)))]
    if broken:
        return NonFinite(call.name, "weight", f"{', '.join(broken)} not finite; {text}")
    return NonFinite(call.name, "output", text)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating point and complex tensors in a nest of mappings, lists and tuples."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


@torch.no_grad()
def _largest(tensors: Any) -> float:
    """Largest absolute value; 0 of nothing, NaN where there is one."""
    largest = 0.0
    for tensor in tensors:
        if tensor.numel():
            largest = _larger(largest, float(tensor.detach().abs().max()))
    return largest


def _larger(a: float, b: float) -> float:
    """The larger number; NaN is larger than all."""
    return a if math.isnan(a) or a >= b else b
