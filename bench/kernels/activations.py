"""masked_glu and masked_act against what else computes a masked FFN activation and its gradients."""

import functools
import importlib.util
import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import neumuter_kernels as nk
from bench.timing import BACKENDS, Contender, compare, compiled, copying, measure
from neumuter_kernels import reference
from neumuter_kernels.selftest import TOLERANCE

PASSES = ("forward", "backward", "forward+backward")
CHECKED_AT_ONCE = 2**24  # elements whose exact results are held at a time


def eager(inputs, mask, activation):
    """The plain formula; the mask in the activations' dtype, else 16-bit products become float32."""
    h = reference.activate(inputs[0], activation)
    if len(inputs) == 2:
        h = h * inputs[1]
    return h * mask.to(h.dtype).unsqueeze(1)


class PreHook(nn.Module):
    """The mask as a pre-hook of the down projection (here of nothing), as one adds it to a finished model."""

    def __init__(self):
        super().__init__()
        self.down = nn.Identity()
        self.down.register_forward_pre_hook(lambda _, args: args[0] * self.mask)

    def forward(self, inputs, mask, activation):
        self.mask = mask.to(inputs[0].dtype).unsqueeze(1)
        h = reference.activate(inputs[0], activation)
        return self.down(h * inputs[1] if len(inputs) == 2 else h)


def ours(inputs, mask, activation):
    op = nk.masked_glu if len(inputs) == 2 else nk.masked_act
    return op(*inputs, mask, activation=activation)


def weight_masking(inputs, mask, weight):
    """The official NeuMuter's way, in our words: the mask multiplies the down projection's weight.

    So a copy of the weight is made in every forward, and every backward computes the gradient of the
    whole copy to reduce it to one number per neuron.
    """
    return F.linear(F.silu(inputs[0]) * inputs[1], weight * mask[0].to(weight.dtype))


def peft_ia3(weight, mask):
    """PEFT's IA3 layer around a frozen down projection, with ``mask`` as its vector."""
    from peft import IA3Config
    from peft.tuners.ia3.layer import Linear

    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    base.weight = nn.Parameter(weight, requires_grad=False)
    layer = Linear(base, "default", IA3Config(), is_feedforward=True)
    layer.ia3_l["default"] = nn.Parameter(mask.detach().clone())
    return layer


@dataclass
class Case:
    """One problem: [G, T/G, F] activations, G mask rows; with a down projection to H features if H."""

    op: str
    tokens: int
    width: int
    rows: int
    dtype: torch.dtype
    device: str
    activation: str
    hidden: int = 0
    backend: str | None = None  # torch.compile's, if that contends

    def __post_init__(self):
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, device=self.device).to(self.dtype)

        shape = (self.rows, self.tokens // self.rows)
        inputs = [normal(*shape, self.width) for _ in range(2 if self.op == "masked_glu" else 1)]
        self.inputs = [x.requires_grad_() for x in inputs]
        self.mask = torch.rand(self.rows, self.width, generator=generator, device=self.device)
        self.mask.requires_grad_()
        self.grad = normal(*shape, self.hidden or self.width)
        self.weight = normal(self.hidden, self.width) / self.width**0.5 if self.hidden else None

    def bytes(self, which):
        """What must move: forward 3·T·F·e, backward 5·T·F·e (plain FFN: 2 and 3), and the mask's part."""
        forward, backward = len(self.inputs) + 1, 2 * len(self.inputs) + 1
        tensors = forward * (which != "backward") + backward * (which != "forward")
        of_mask = 4 * self.rows * self.width
        passes = (which != "backward") + 2 * (which != "forward")  # read; read and its gradient written
        return tensors * self.tokens * self.width * self.grad.element_size() + passes * of_mask

    # --- Contenders -------------------------------------------------------------------------

    def contenders(self, which):
        """Ours first. ``which`` is one of PASSES."""
        return [self._contender(which, *way) for way in self._ways]

    @functools.cached_property
    def _ways(self):
        """Of each contender: name, forward, the leaves whose gradients it gives, its check."""
        ways = self._with_projection() if self.hidden else self._activations()
        return [(*way, functools.cache(functools.partial(self._check, *way[1:]))) for way in ways]

    def _activations(self):
        leaves = [*self.inputs, self.mask]

        def way(name, function):
            return name, lambda: function(self.inputs, self.mask, self.activation), leaves

        yield way("ours", ours)
        yield way("eager", eager)
        if self.backend:
            yield way("torch.compile", compiled(eager, self.backend))
        yield way("down-projection pre-hook", PreHook())
        swiglu = self.op == "masked_glu" and self.activation == "silu"
        if swiglu and self.device == "cuda" and importlib.util.find_spec("liger_kernel"):
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction

            own = [x.detach().clone().requires_grad_() for x in self.inputs]  # its backward overwrites them
            yield "Liger SwiGLU (no mask)", lambda: LigerSiLUMulFunction.apply(*own), own

    def _with_projection(self):
        leaves = [*self.inputs, self.mask]
        yield (
            "ours + down projection",
            lambda: F.linear(ours(self.inputs, self.mask, self.activation), self.weight),
            leaves,
        )
        yield "weight masking", lambda: weight_masking(self.inputs, self.mask, self.weight), leaves
        if importlib.util.find_spec("peft"):
            layer = peft_ia3(self.weight, self.mask)
            own = [*self.inputs, layer.ia3_l["default"]]
            yield "PEFT IA3", lambda: layer(F.silu(self.inputs[0]) * self.inputs[1]), own

    def _contender(self, which, name, forward, leaves, check):
        def gradients(output):
            return torch.autograd.grad(output, leaves, self.grad)

        def without_gradients(_):
            with torch.no_grad():
                forward()

        counts = len(leaves) > len(self.inputs)  # it masks
        if which == "forward":
            return Contender(name, without_gradients, check=check, counts=counts)
        if which == "backward":
            return Contender(name, gradients, prepare=forward, check=check, counts=counts)
        return Contender(name, lambda _: gradients(forward()), check=check, counts=counts)

    # --- Correctness ------------------------------------------------------------------------

    def _check(self, forward, leaves):
        """None, or which of the results is too far from the reference in float64."""
        if self.dtype not in TOLERANCE:
            return f"no tolerance is set for {self.dtype}"
        with torch.no_grad():
            alone = forward()
        output = forward()
        results = [x.detach() for x in (alone, output, *torch.autograd.grad(output, leaves, self.grad))]
        names = ["output", "output with gradients", "gate gradient", "up gradient"][: 2 + len(self.inputs)]
        masked = len(leaves) > len(self.inputs)
        errors = self._errors(results, self.mask if masked else torch.ones_like(self.mask), masked)
        for name, error in zip([*names, "mask gradient"], errors, strict=False):
            if not error <= TOLERANCE[self.dtype]:
                return f"{name}: relative error {error:.1e}, allowed {TOLERANCE[self.dtype]:.0e}"
        return None

    def _errors(self, results, mask, masked):
        """Relative errors of outputs, input gradients and mask gradient, a block of tokens at a time."""
        wide_mask = mask.detach().double().requires_grad_()
        weight = None if self.weight is None else self.weight.double()
        of_tokens = 2 + len(self.inputs)
        off, norm = [0.0] * of_tokens, [0.0] * of_tokens
        mask_gradient = torch.zeros_like(wide_mask)
        ids = torch.arange(self.rows, device=self.device).repeat_interleave(self.tokens // self.rows)
        flat = [x.detach().flatten(0, 1) for x in (*self.inputs, self.grad, *results[:of_tokens])]
        for block in range(0, self.tokens, step := max(CHECKED_AT_ONCE // self.width, 1)):
            *wide, ids_here = [x[block : block + step].double() for x in flat] + [ids[block : block + step]]
            inputs = [x.requires_grad_() for x in wide[: len(self.inputs)]]
            op = reference.masked_glu if len(inputs) == 2 else reference.masked_act
            exact = op(*inputs, wide_mask, ids_here, self.activation)
            exact = exact if weight is None else F.linear(exact, weight)
            *gradients, here = torch.autograd.grad(exact, [*inputs, wide_mask], wide[len(self.inputs)])
            mask_gradient += here
            actual = wide[len(self.inputs) + 1 :]
            for i, (a, e) in enumerate(zip(actual, [exact, exact, *gradients], strict=True)):
                off[i] += (a - e).square().sum().item()
                norm[i] += e.square().sum().item()
        if masked:
            off.append((results[-1].double() - mask_gradient).square().sum().item())
            norm.append(mask_gradient.square().sum().item())
        return [(a / b) ** 0.5 for a, b in zip(off, norm, strict=True)]


# --- What is measured ------------------------------------------------------------------------

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SMALL = [("masked_glu", 16, 64, 2, FLOAT32, "silu"), ("masked_act", 16, 64, 1, BFLOAT16, "gelu_tanh")]
ON_CPU = [
    (op, *shape, rows, dtype, activation)
    for op, activation in (("masked_glu", "silu"), ("masked_act", "gelu_tanh"))
    for *shape, dtype in (
        (200, 1536, FLOAT32), (1024, 1536, FLOAT32), (512, 8192, FLOAT32), (512, 14336, BFLOAT16),
    )
    for rows in (1, 4)
]  # fmt: skip
# In the order of their worth: a run may be cut anywhere.
ON_GPU = [("masked_glu", tokens, 8192, 1, BFLOAT16, "silu") for tokens in (512, 2048, 128, 8192)]
ON_GPU += [("masked_act", tokens, 8192, 1, BFLOAT16, "gelu_tanh") for tokens in (512, 2048, 128, 8192)]
ON_GPU += [("masked_glu", tokens, 8192, 1, BFLOAT16, "gelu") for tokens in (512, 8192)]
ON_GPU += [("masked_glu", 8192, 8192, 8, BFLOAT16, "silu"), ("masked_glu", 32768, 8192, 1, BFLOAT16, "silu")]
ON_GPU += [("masked_glu", tokens, 8192, 1, FLOAT32, "silu") for tokens in (128, 2048, 32768)]
ON_GPU += [("masked_act", 8192, 8192, 1, FLOAT32, "gelu_tanh")]
BOTH_FROM = 8192  # tokens: with fewer, a GPU waits for the processor between forward and backward
# T, F, H: the FFNs of SmolLM2-135M, Llama 3.2 1B and Llama 3 8B.
PROJECTIONS = {
    "cpu": [(200, 1536, 576, FLOAT32), (512, 8192, 2048, FLOAT32), (512, 14336, 4096, BFLOAT16)],
    "cuda": [(4096, 8192, 2048, BFLOAT16), (4096, 14336, 4096, BFLOAT16)],
}


def cases(device, effort, small=False):
    """Yields (what a row is about, how it is measured)."""
    for which in SMALL if small else ON_GPU if device == "cuda" else ON_CPU:
        yield from _passes(which, device, effort, small)
    for tokens, width, hidden, dtype in [(16, 64, 32, FLOAT32)] if small else PROJECTIONS[device]:
        about = {
            "op": "masked_glu + down projection", "pass": "forward+backward",
            "shape": [tokens, width, hidden], "dtype": str(dtype).removeprefix("torch."), "mask_rows": 1,
            "activation": "silu",
        }  # fmt: skip

        def find(tokens=tokens, width=width, hidden=hidden, dtype=dtype):
            case = Case("masked_glu", tokens, width, 1, dtype, device, "silu", hidden)
            return compare(case.contenders("forward+backward"), None, device, effort)

        yield about, find


def _passes(about_case, device, effort, small):
    op, tokens, width, rows, dtype, activation = about_case
    case = functools.cache(
        lambda: Case(op, tokens, width, rows, dtype, device, activation, backend=BACKENDS[small])
    )

    def find(which):
        moved = case().bytes(which)
        row = compare(case().contenders(which), copying(moved, device), device, effort, moved)
        return row | ({"relu_us": relu_us(case(), effort)} if which == "forward+backward" else {})

    for which in PASSES if device == "cpu" or tokens >= BOTH_FROM else PASSES[:2]:
        about = {
            "op": op, "pass": which, "shape": [tokens, width],
            "dtype": str(dtype).removeprefix("torch."), "mask_rows": rows, "activation": activation,
        }  # fmt: skip
        yield about, functools.partial(find, which)


def relu_us(case, effort):
    """The time of ours with relu, which moves the same bytes without an exponential or a division."""
    plain = Case(case.op, case.tokens, case.width, case.rows, case.dtype, case.device, "relu")
    (samples,) = measure(plain.contenders("forward+backward")[:1], case.device, effort).values()
    return 1e6 * statistics.median(samples)
