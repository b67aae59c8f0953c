"""The backends of each op behind one signature, so that every test runs on all of them.

"cpp" is what the public functions use on CPU tensors. "triton" is what they use on a GPU; without
one, the same kernels run in Triton's interpreter on CPU tensors.
"""

import importlib.util

import torch

import neumuter_kernels as nk
from neumuter_kernels import reference

HAVE_GPU = torch.cuda.is_available()


class Cpp:
    device = "cpu"
    masked_glu = staticmethod(nk.masked_glu)
    masked_act = staticmethod(nk.masked_act)
    hard_concrete = staticmethod(nk.hard_concrete)


class _InterpretedFfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, mask, row_ids, activation, packed, interleaved):
        from neumuter_kernels.triton import masked_ffn

        ctx.save_for_backward(gate, up, mask, row_ids)
        ctx.options = activation, packed, interleaved
        return masked_ffn.forward(gate, up, mask, row_ids, activation, packed, interleaved)

    @staticmethod
    def backward(ctx, grad):
        from neumuter_kernels.triton import masked_ffn

        need_gate, need_up, need_mask = ctx.needs_input_grad[:3]
        activation, *layout = ctx.options
        grads = masked_ffn.backward(
            grad, *ctx.saved_tensors, activation, need_gate or need_up, need_mask, *layout
        )
        wanted = (need_gate, need_up, need_mask)
        return (*(g if want else None for g, want in zip(grads, wanted, strict=True)), None, None, None, None)


class _InterpretedGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, ids, step, *options):
        from neumuter_kernels.triton import hard_concrete

        ctx.save_for_backward(scores, ids, step)
        ctx.options = options
        return hard_concrete.forward(scores, ids, step, *options)

    @staticmethod
    def backward(ctx, grad):
        from neumuter_kernels.triton import hard_concrete

        return hard_concrete.backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 8


class InterpretedTriton:
    device = "cpu"

    @staticmethod
    def masked_glu(
        gate=None, up=None, mask=None, row_ids=None, activation="silu", *, gate_up=None, interleaved=False
    ):
        number = reference.ACTIVATIONS.index(activation)
        packed = gate_up is not None
        x = gate_up if packed else gate
        return _InterpretedFfn.apply(x, up, mask, row_ids, number, packed, interleaved)

    @staticmethod
    def masked_act(hidden, mask, row_ids=None, activation="gelu_tanh"):
        number = reference.ACTIVATIONS.index(activation)
        return _InterpretedFfn.apply(hidden, None, mask, row_ids, number, False, False)

    @staticmethod
    def hard_concrete(
        scores,
        rows,
        seed,
        step,
        layer,
        sample_ids=None,
        temperature=1 / 3,
        stretch=(-0.1, 1.1),
        training=True,
    ):
        ids = torch.arange(rows) if sample_ids is None else sample_ids
        return _InterpretedGates.apply(
            scores, ids, torch.tensor(step), seed, layer, temperature, *stretch, training
        )


class Gpu(Cpp):
    device = "cuda"


BACKENDS = {"cpp": Cpp}
if importlib.util.find_spec("triton"):
    BACKENDS["triton"] = Gpu if HAVE_GPU else InterpretedTriton


def relative_error(actual, exact):
    """‖actual − exact‖ / ‖exact‖ in float64."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    return ((actual - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def assert_as_accurate(actual, plain, exact, name=""):
    """``actual`` is as close to the float64 result as plain PyTorch in the same dtype, or nearly."""
    assert actual.shape == exact.shape, name
    assert actual.dtype == plain.dtype, name
    if exact.numel():
        assert not actual.isnan().any(), name
        ours, theirs = relative_error(actual, exact), relative_error(plain, exact)
        assert ours <= 1.5 * theirs + 3e-7 * (plain.dtype != torch.float64) + 1e-15, (name, ours, theirs)
