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
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from neumuter_kernels import _C
from neumuter_kernels.checks import is_dual
from neumuter_kernels.recording import recorder, say_once, why_not

_ops = torch.ops.neumuter
_below_autograd = torch._C._AutoDispatchBelowAutograd
# Ops are registered for as long as these objects live.
_autograd = torch.library.Library("neumuter", "IMPL", "Autograd")
_cuda = torch.library.Library("neumuter", "IMPL", "CUDA")


@dataclass(frozen=True)
class Triton:
    """``neumuter_kernels.triton.MODULE.FUNCTION`` computes the op on GPU tensors.

    recorded: the extension repeats its launches (see recording.py).
    """

    module: str
    function: str
    recorded: bool = False

    @functools.cached_property
    def launch(self) -> Callable[..., Any]:
        if self.recorded and (reason := why_not()):
            say_once(f"{self.module} is launched from Python: {reason}")
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
) -> Callable[..., Any]:
    """Register an op of torch.ops.neumuter and list it in ``OPS``; return what calls it fastest.

    Args:
        name: as in its schema.
        fake: makes empty outputs of the right shapes and dtypes, for torch.compile and meta tensors.
        gpu: what computes it on GPU tensors.
        gradient: None for an op without one.
        vectorised: whether its CPU code is compiled once per instruction set.
    """
    OPS[name] = Op(gpu, vectorised)
    op: Callable[..., Any] = getattr(_ops, name).default
    torch.library.register_fake(f"neumuter::{name}", fake)
    call = op
    if gradient is not None:
        differentiable = _differentiable(name, op, gradient)
        _autograd.impl(name, differentiable)
        call = _past_the_dispatcher(op, differentiable)
    if isinstance(gpu, Triton) and gpu.recorded and why_not() is None:
        outputs = len(getattr(_ops, name).default._schema.returns)
        _cuda.impl(f"_record_{name}", recorder(name, outputs, _on_its_device(gpu)))
        _C.serve_recorded_op(name)
    elif isinstance(gpu, Triton):
        _cuda.impl(name, _on_its_device(gpu))
    elif not _C.build_info()["cuda"]:
        _cuda.impl(name, _on_its_device(gpu.fallback))
    return call


def _past_the_dispatcher(op: Callable[..., Any], differentiable: Callable[..., Any]) -> Callable[..., Any]:
    """``op``, whose kernel for the Autograd key is called here if the dispatcher would do nothing else.

    From Python to the dispatcher and back to Python takes as long as the rest of a launch.
    """

    def call(*arguments: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._get_tracing_state() is not None
            or has_torch_function(arguments)  # also under a mode that wants to see all calls
        ):
            return op(*arguments)
        return differentiable(*arguments)

    return call


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of GPU tensors, with the device of the first one as the current one."""

    def on_its_device(x: Tensor, *rest: Any) -> Any:
        # The context takes long, and Triton launches on the current device anyway.
        if x.get_device() == torch.cuda.current_device():
            return function(x, *rest)
        with torch.cuda.device(x.device):
            return function(x, *rest)

    return on_its_device


class _Final(torch.autograd.Function):
    """A gradient that itself has no gradient with respect to the ``inputs`` that it depends on."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError(f"{ctx.name} has first derivatives only: its gradient has no gradient")


def final(name: str, gradient: Tensor, inputs: Sequence[Tensor | None]) -> Tensor:
    """``gradient``, as the backward pass of ``name`` returns it; with create_graph=True it remembers that it
    depends on ``inputs``, and a second derivative raises NotImplementedError.

    torch's once_differentiable does not: it takes saved tensors for constants, which gives wrong values.
    Under vmap nothing can remember it: it would be forgotten when the batch becomes one tensor.
    """
    if not torch.is_grad_enabled():
        return gradient
    transforms = torch._C._functorch
    if transforms.is_batchedtensor(gradient) or transforms.is_legacy_batchedtensor(gradient):
        raise NotImplementedError(
            f"{name} has first derivatives only: under vmap (is_grads_batched, vectorize) use "
            "create_graph=False"
        )
    result: Tensor = _Final.apply(name, gradient, *inputs)
    return result


def _refuse_forward_mode(name: str, tensors: Sequence[Tensor | None]) -> None:
    # The level is looked at first because that is all that most calls do.
    if forward_ad._current_level >= 0 and any(map(is_dual, tensors)):
        raise NotImplementedError(f"{name} has no forward-mode derivative: use torch.autograd.grad")


def _refuse_functions_of_gradients(name: str) -> None:
    """torch.func.grad and the like want to transform what computes a gradient, which is a kernel."""
    level = torch._C._functorch.peek_interpreter_stack()
    if level is not None and level.key() == torch._C._functorch.TransformType.Grad:
        raise NotImplementedError(
            f"{name} has no derivative by functorch transforms: use torch.autograd.grad"
        )


def _differentiable(name: str, op: Callable[..., Tensor], gradient: Gradient) -> Callable[..., Tensor]:
    """``op`` with its gradient, for torch's Autograd key. Nothing is saved but the inputs.

    torch.library.register_autograd does the same with more Python around it, and at a few hundred tokens
    the call weighs as much as the work.
    """
    tensors = gradient.tensors

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Tensor:
            ctx.save_for_backward(*arguments[:tensors])
            ctx.options = arguments[tensors:]
            with _below_autograd():
                return op(*arguments)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            saved, options = ctx.saved_tensors, ctx.options
            _refuse_forward_mode(name, (grad,))
            needed = ctx.needs_input_grad[:tensors]
            if torch.is_grad_enabled():  # create_graph=True
                with torch.no_grad():
                    found = gradient.function(grad, saved, options, needed)
                found = tuple(None if x is None else final(name, x, (grad, *saved)) for x in found)
            else:
                found = gradient.function(grad, saved, options, needed)
            return found + (None,) * len(options)

    def kernel(*arguments: Any) -> Tensor:
        _refuse_forward_mode(name, arguments[:tensors])
        if torch.is_grad_enabled():
            for x in arguments[:tensors]:
                if x is not None and x.requires_grad:
                    _refuse_functions_of_gradients(name)
                    output: Tensor = Differentiable.apply(*arguments)
                    return output
        with _below_autograd():
            return op(*arguments)

    return kernel
