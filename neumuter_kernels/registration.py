"""How the file of an op registers with torch what its schema and its C++ code leave open.

csrc/bindings.cpp has the schemas, csrc/cpu the code for CPU tensors, and csrc/cuda, where it was built, the
code for GPU tensors. ``register`` adds the fake kernel, the gradient, and what else computes the op on a GPU.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neumuter_kernels import _C

_ops = torch.ops.neumuter
_below_autograd = torch._C._AutoDispatchBelowAutograd
# Ops are registered for as long as these objects live.
_autograd = torch.library.Library("neumuter", "IMPL", "Autograd")
_cuda = torch.library.Library("neumuter", "IMPL", "CUDA")


@dataclass(frozen=True)
class Triton:
    """``neumuter_kernels.triton.MODULE.FUNCTION`` computes the op on GPU tensors."""

    module: str
    function: str

    @functools.cached_property
    def launch(self) -> Callable[..., Any]:
        # At the first call: importing Triton takes longer than importing this package.
        module = importlib.import_module(f"neumuter_kernels.triton.{self.module}")
        return cast(Callable[..., Any], getattr(module, self.function))

    def __call__(self, *arguments: Any) -> Any:
        return self.launch(*arguments)


@dataclass(frozen=True)
class Cuda:
    """C++ for CUDA computes the op on GPU tensors, and ``fallback`` where the build had no nvcc."""

    fallback: Callable[..., Any]
    fallback_name: str


@dataclass(frozen=True)
class Gradient:
    """The gradient of an op, whose first ``tensors`` arguments are tensors (or None).

    ``function`` gets the gradient of the output, these tensors, the other arguments, and for each tensor
    whether its gradient is needed; it returns a gradient or None for each.
    """

    tensors: int
    function: Callable[[Tensor, Sequence[Tensor], tuple[Any, ...], Sequence[bool]], tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class Op:
    """``gpu`` says what computes it on GPU tensors; ``vectorised``: its CPU code depends on the CPU."""

    gpu: Triton | Cuda
    vectorised: bool


OPS: dict[str, Op] = {}


def register(
    name: str,
    *,
    fake: Callable[..., Any],
    gpu: Triton | Cuda,
    gradient: Gradient | None = None,
    vectorised: bool = True,
) -> None:
    """Register an op of torch.ops.neumuter and list it in ``OPS``.

    Args:
        name: as in its schema.
        fake: makes empty outputs of the right shapes and dtypes, for torch.compile and meta tensors.
        gpu: what computes it on GPU tensors.
        gradient: None for an op without one.
        vectorised: whether its CPU code is compiled once per instruction set.
    """
    OPS[name] = Op(gpu, vectorised)
    torch.library.register_fake(f"neumuter::{name}", fake)
    if gradient is not None:
        _autograd.impl(name, _differentiable(getattr(_ops, name).default, gradient))
    if isinstance(gpu, Triton):
        _cuda.impl(name, _on_its_device(gpu))
    elif not _C.build_info()["cuda"]:
        _cuda.impl(name, _on_its_device(gpu.fallback))


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of GPU tensors, with the device of the first one as the current one."""

    def on_its_device(x: Tensor, *rest: Any) -> Any:
        # The context takes long, and Triton launches on the current device anyway.
        if x.get_device() == torch.cuda.current_device():
            return function(x, *rest)
        with torch.cuda.device(x.device):
            return function(x, *rest)

    return on_its_device


def _differentiable(op: Callable[..., Tensor], gradient: Gradient) -> Callable[..., Tensor]:
    """``op`` with its gradient, for torch's Autograd key. Nothing is saved but the inputs.

    torch.library.register_autograd does the same with more Python around it, and at a few hundred tokens
    the call weighs as much as the work.
    """
    tensors = gradient.tensors

    @once_differentiable
    def once(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        found = gradient.function(grad, ctx.saved_tensors, ctx.options, ctx.needs_input_grad[:tensors])
        return *found, *[None] * len(ctx.options)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Tensor:
            ctx.save_for_backward(*arguments[:tensors])
            ctx.options = arguments[tensors:]
            with _below_autograd():
                return op(*arguments)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            # With create_graph=True, once_differentiable looks only at the gradients that come in, and would
            # silently take the saved tensors for constants.
            if torch.is_grad_enabled():
                grad = grad.detach().requires_grad_()
            return once(ctx, grad)

    def kernel(*arguments: Any) -> Tensor:
        if torch.is_grad_enabled():
            for x in arguments[:tensors]:
                if x is not None and x.requires_grad:
                    output: Tensor = Differentiable.apply(*arguments)
                    return output
        with _below_autograd():
            return op(*arguments)

    return kernel
