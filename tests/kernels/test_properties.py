"""What the public ops promise, for inputs that hypothesis makes up: the reference's values, or a clear error.

Shapes (none, one, odd, wide), memory (sliced, strided, transposed, expanded, lazily negated), dtypes, NaN,
infinities and denormals, and which gradients are wanted. Continuous integration looks at the same few
examples every time; ``HYPOTHESIS_PROFILE=search`` looks at many and other ones each time, and
``HYPOTHESIS_MAX_EXAMPLES`` says how many per test.
"""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neumuter_kernels as nk
from neumuter_kernels import reference
from tests.kernels.made_up import (
    DTYPES,
    LAYOUTS,
    SPECIAL,
    bits,
    check_values,
    equal,
    laid_out,
    lengths,
    on_each_backend,
    row_ids,
    tensors,
    widths,
)
from tests.kernels.test_masked_ffn import Reference, run
from tests.kernels.test_mute import mute_sets

# --- Masked activations ----------------------------------------------------------------------


@st.composite
def masked_cases(draw, device):
    layout = draw(st.sampled_from(("separate", "plain", "halves", "interleaved")))
    dtype, activation = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(nk.ACTIVATIONS))
    leading, width = tuple(draw(st.lists(lengths, min_size=1, max_size=3))), draw(widths)
    tokens = math.prod(leading)
    with_ids = draw(st.booleans())
    divisors = [g for g in range(1, 9) if tokens % g == 0]
    rows = draw(st.integers(1, 5) if with_ids else st.sampled_from(divisors))
    packed = layout in ("halves", "interleaved")
    shape = (*leading, width * (2 if packed else 1))
    # Of ∞ PyTorch's own gelu sometimes makes NaN; denormals of bfloat16 are 0 to the CPU's own instructions.
    special = SPECIAL[2 * activation.startswith("gelu") : -3 if dtype == torch.bfloat16 else None]

    def drawn(shape, dtype=dtype):
        return draw(tensors(device, shape, dtype, special=special))

    inputs = [drawn(shape) for _ in range(2 if layout == "separate" else 1)]
    if layout == "separate" and draw(st.integers(0, 9)) == 0:
        inputs[1] = inputs[0]
    mask = drawn((rows, width), reference.compute_dtype(dtype))
    ids = draw(row_ids(device, leading, rows)) if with_ids else None
    grad = drawn((*leading, width))
    needed = draw(st.lists(st.booleans(), min_size=len(inputs) + 1, max_size=len(inputs) + 1))
    return layout, dtype, activation, [*inputs, mask], ids, grad, needed


def with_gradients(functions, layout, activation, leaves, ids, grad, needed):
    """h and the gradients that are needed."""
    leaves = [x.detach().requires_grad_(need) for x, need in zip(leaves, needed, strict=True)]
    h = run(functions, layout, leaves, ids, activation)
    assert h.requires_grad == any(needed)
    wanted = [x for x in leaves if x.requires_grad]
    return [h.detach(), *(torch.autograd.grad(h, wanted, grad) if wanted else ())]


@on_each_backend(masked_cases)
def test_masked_activations(case):
    layout, dtype, activation, leaves, ids, grad, needed = case
    before = [bits(x) for x in (*leaves, grad)]
    ours = with_gradients(nk, layout, activation, leaves, ids, grad, needed)
    assert all(torch.equal(bits(x), y) for x, y in zip((*leaves, grad), before, strict=True))
    plain = with_gradients(Reference, layout, activation, leaves, ids, grad, needed)
    wide = [x.double() for x in (*leaves, grad)]
    exact = with_gradients(Reference, layout, activation, wide[:-1], ids, wide[-1], needed)
    # |φ(x)| ≤ φ(|x|), and the terms of φ'(x) are less than 2 φ'(|x|).
    *large, upstream = [x.abs() for x in wide]
    sizes = with_gradients(Reference, layout, activation, large, ids, upstream, needed)
    *large, upstream = [x.abs() for x in (*leaves, grad)]
    factors = with_gradients(
        Reference, layout, "identity", large, ids, upstream, needed
    )  # ∞ where they overflow
    for i, (a, p, e, size, factor) in enumerate(zip(ours, plain, exact, sizes, factors, strict=True)):
        check_values(f"result {i}", a, p, e, size + 0 * factor, dtype)


# --- Gates and selection ---------------------------------------------------------------------


@st.composite
def gate_cases(draw, device):
    dtype, width, rows = draw(st.sampled_from((torch.float32, torch.float64))), draw(widths), draw(lengths)
    scores = draw(tensors(device, (width,), dtype))
    ids = draw(st.lists(st.integers(0, 2**32 - 1), min_size=rows, max_size=rows))
    ids = laid_out(torch.tensor(ids, dtype=torch.int64, device=device), draw(st.sampled_from(LAYOUTS[:3])))
    seed, layer = draw(st.integers(0, 2**63 - 1)), draw(st.integers(0, 2**32 - 1))
    step = draw(st.integers(0, 2**32 - 1))
    options = {
        "temperature": draw(st.floats(0.05, 5)),
        "stretch": (draw(st.floats(-1, -1e-3)), draw(st.floats(1.001, 2))),
        "training": draw(st.booleans()),
    }
    grad = draw(tensors(device, (rows, width), dtype, special=()))
    return scores, ids, (seed, step, layer), options, draw(st.booleans()), draw(st.booleans()), grad


@on_each_backend(gate_cases)
def test_hard_concrete(case):
    scores, ids, (seed, step, layer), options, as_tensor, needed, grad = case
    before = bits(scores), bits(ids)
    given_step = torch.tensor(step, device=scores.device) if as_tensor else step
    leaf = scores.detach().requires_grad_(needed)
    gates = nk.hard_concrete(leaf, len(ids), seed, given_step, layer, sample_ids=ids, **options)
    expected = reference.hard_concrete(scores, ids, seed, step, layer, **options)
    assert equal(gates.detach(), expected) or scores.dtype == torch.float64
    check_values("gates", gates.detach(), expected, expected.double(), 1 + expected, scores.dtype)
    if needed:
        (ours,) = torch.autograd.grad(gates, leaf, grad)
        arguments = (scores, ids, seed, step, layer)
        plain = reference.hard_concrete_backward(grad, *arguments, **options)
        size = grad.abs().sum(0) * 3 / (options["temperature"] if options["training"] else 1)
        check_values("gradient", ours, plain, plain.double(), size, scores.dtype)
    assert torch.equal(bits(scores), before[0])
    assert torch.equal(bits(ids), before[1])


@st.composite
def selections(draw, device):
    if draw(st.booleans()):
        shape = draw(st.lists(lengths, min_size=1, max_size=1))[0], draw(widths)
        scores = draw(tensors(device, shape, torch.float32))
    else:
        scores = [
            draw(tensors(device, (width,), torch.float32))
            for width in draw(st.lists(widths, min_size=1, max_size=5))
        ]
    if draw(st.booleans()):  # ties
        scores = scores.round() if isinstance(scores, torch.Tensor) else [x.round() for x in scores]
    count = sum(x.numel() for x in scores)
    share = st.floats(0, 1, exclude_min=True, width=32)
    budget = st.one_of(st.integers(0, count), share, st.integers(0, 2**80))
    option = draw(st.sampled_from(("budget", "threshold")))
    return scores, {option: draw(budget if option == "budget" else st.floats(1e-30, 1 - 1e-12))}


@on_each_backend(selections, interpreted=False)
def test_select_muted(case):
    scores, option = case
    layers = list(scores)
    before = [bits(x) for x in layers]
    ours = nk.select_muted(scores, **option)
    flat = torch.cat(layers).cpu() if layers else torch.zeros(0)
    if "budget" in option:
        option = {"budget": nk.neuron_budget(option["budget"], flat.numel())}
    else:
        option = {"threshold": reference.logit(option["threshold"])}
    expected = reference.select_muted(flat, [len(x) for x in layers], **option)
    assert all(equal(x.cpu(), y) for x, y in zip(ours, expected, strict=True))
    assert all(torch.equal(bits(x), y) for x, y in zip(layers, before, strict=True))


# --- In place --------------------------------------------------------------------------------


def twin(x):
    """The same view of a copy of the memory."""
    memory = x.untyped_storage().clone()
    y = torch.empty(0, dtype=x.dtype, device=x.device).set_(memory, x.storage_offset(), x.shape, x.stride())
    return y._neg_view() if x.is_neg() else y


def in_place(op, x, *others):
    """(the result of ``op`` on a twin of ``x``, that twin), of which it may change nothing but the elements.

    None after an error that says how ``x`` must be laid out, and changes nothing.
    """
    kept = [(y, bits(y)) for y in others if isinstance(y, torch.Tensor)]
    y = twin(x)
    try:
        result = op(y, *others)
    except (ValueError, RuntimeError) as error:
        if not re.search("one stride|contiguous|negated", str(error)) or not torch.equal(bits(y), bits(x)):
            raise
        return None
    assert all(torch.equal(bits(other), memory) for other, memory in kept)
    found = y.clone()
    y.copy_(x)  # so that what differs now lies outside
    assert torch.equal(bits(y), bits(x))
    return result, found


@st.composite
def mute_cases(draw, device):
    dtype, leading, width = draw(st.sampled_from(DTYPES)), draw(st.lists(lengths, max_size=3)), draw(widths)
    hidden = draw(tensors(device, (*leading, width), dtype))
    sets, layers = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    indptr, indices, gains = mute_sets(sets, layers, width, seed=draw(st.integers(0, 2**32 - 1)))
    gains = draw(tensors(device, gains.shape, torch.float32, LAYOUTS[:3]))
    alone = math.prod(leading) % sets or draw(st.booleans())
    ids = draw(row_ids(device, leading, sets)) if alone else None
    return hidden, indptr.to(device), indices.to(device), gains, ids, draw(st.integers(0, layers - 1))


@on_each_backend(mute_cases, interpreted=False)
def test_mute(case):
    hidden, *sets, ids, layer = case
    found = in_place(nk.mute_, hidden, *sets, ids, layer)
    if found is None:
        assert not hidden.is_contiguous() or hidden.is_neg()
        return
    flat = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1]).cpu()
    expected = reference.mute(flat, *(x.cpu() for x in sets), None if ids is None else ids.cpu(), layer)
    assert equal(found[1].cpu(), expected.view(hidden.shape))


@st.composite
def token_cases(draw, device):
    dtype, shape = draw(st.sampled_from(DTYPES)), (draw(lengths), draw(widths.filter(bool)))
    logits, other = (draw(tensors(device, shape, dtype)) for _ in range(2))
    targets = draw(st.lists(st.integers(0, shape[1] - 1), min_size=shape[0], max_size=shape[0]))
    targets = torch.tensor(targets, dtype=torch.int64, device=device)
    return logits, laid_out(targets, draw(st.sampled_from(LAYOUTS[:3]))), other


def spread(logits):
    """How far the logits of each row lie apart, with infinities left out: what losses add up."""
    finite = logits.double().nan_to_num(0.0, 0.0, 0.0)
    return finite.amax(-1) - finite.amin(-1) + math.log(logits.shape[1])


@on_each_backend(token_cases)
def test_token_losses(case):
    logits, targets, other = case
    ops = (
        (nk.cross_entropy_, reference.cross_entropy, targets),
        (nk.kl_divergence_, reference.kl_divergence, other),
    )
    for ours, specified, second in ops:
        found = in_place(ours, logits, second)
        if found is None:
            assert not logits.is_contiguous() or logits.is_neg()
            continue
        plain = specified(logits, second)
        exact = specified(logits.double(), second.double() if second is other else second)
        size = 1 + spread(logits) + (spread(other) if second is other else 0)
        check_values("losses", found[0], plain[0], exact[0], size, plain[0].dtype)
        check_values("gradients", found[1], plain[1], exact[1], torch.ones_like(exact[1]), logits.dtype)


@pytest.mark.parametrize("op", [nk.mute_, nk.cross_entropy_, nk.kl_divergence_])
def test_autograd_sees_a_change_in_place(op):
    """What another node has saved must not change unseen: its gradients would be wrong."""
    x, weight = torch.randn(3, 5), torch.ones(5, requires_grad=True)
    product = weight * x
    others = {
        nk.mute_: (
            torch.tensor([0, 2], dtype=torch.int32),
            torch.tensor([1, 3], dtype=torch.int32),
            torch.zeros(2),
        ),
        nk.cross_entropy_: (torch.tensor([0, 1, 2]),),
        nk.kl_divergence_: (torch.randn(3, 5),),
    }[op]
    op(x, *others)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@given(st.data())
def test_memory_that_is_shared(data):
    """In-place ops refuse arguments that they would change; neighbours in memory are fine."""
    memory, rows, width = torch.randn(64), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    size, start, other = rows * width, *(data.draw(st.integers(0, 32)) for _ in range(2))
    before, x = memory.clone(), memory[start : start + size].view(rows, width)
    y, gains = memory[other : other + size].view(rows, width), memory[other : other + width]
    indptr, indices = torch.tensor([0, width], dtype=torch.int32), torch.arange(width, dtype=torch.int32)
    for call, kept in (
        (lambda: nk.kl_divergence_(x, y), y),
        (lambda: nk.mute_(x, indptr, indices, gains), gains),
    ):
        memory.copy_(before)
        first, last = other, other + kept.numel()
        if first < start + size and start < last:
            with pytest.raises((ValueError, RuntimeError), match=r"shares? memory"):
                call()
            assert torch.equal(memory, before)
        else:
            call()
            assert torch.equal(kept.flatten(), before[first:last])


# --- What is refused -------------------------------------------------------------------------


def valid():
    """Arguments that each op takes, small ones, by name."""
    x, mask, ids = torch.randn(4, 6), torch.rand(2, 6), torch.tensor([0, 1, -1, 0])
    indptr, indices, gains = mute_sets(2, 2, 6)
    return {
        nk.masked_glu: {"gate": x, "up": x.clone(), "mask": mask, "row_ids": ids, "activation": "silu"},
        nk.masked_act: {"hidden": x, "mask": mask, "row_ids": ids, "activation": "gelu"},
        nk.hard_concrete: {"scores": torch.randn(6), "rows": 3, "seed": 1, "step": torch.tensor(2),
                           "layer": 0, "sample_ids": torch.arange(3), "temperature": 0.5,
                           "stretch": (-0.1, 1.1)},
        nk.select_muted: {"scores": torch.randn(2, 6), "budget": 3},
        nk.mute_: {"hidden": x, "indptr": indptr, "indices": indices, "gains": gains, "row_ids": ids,
                   "layer": 1},
        nk.cross_entropy_: {"logits": x, "targets": torch.tensor([0, 5, 1, 2])},
        nk.kl_divergence_: {"logits": x, "reference": x.clone()},
    }  # fmt: skip


NO_TENSORS = ("x", 3.5, [1.0], (), torch.float32, object)
NO_NUMBERS = ("x", None, -1, 2.5, True, 2**70, torch.tensor(1.5), [1])
EVERY_DTYPE = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16,
    torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip
IN_PLACE = (nk.mute_, nk.cross_entropy_, nk.kl_divergence_)


@st.composite
def spoilt(draw):
    """An op, arguments of which one does not fit, and that one's name."""
    op, arguments = draw(st.sampled_from(list(valid().items())))
    name = draw(st.sampled_from(sorted(arguments)))
    value = arguments[name]
    if name == "activation":
        value = draw(st.sampled_from(("tanh", "", None, 0, "SILU")))
    elif name == "temperature":
        value = draw(st.sampled_from((0.0, -1.0, math.nan)))
    elif name == "stretch":
        value = draw(st.sampled_from(((0.0, 1.1), (-0.1, 1.0), (math.nan, 2.0), (1.1, -0.1))))
    elif name == "budget":
        value = draw(st.sampled_from((-1, 1.5, True, "1%", math.nan, 0.0)))
    elif not isinstance(value, torch.Tensor):
        value = draw(st.sampled_from(NO_NUMBERS))
    else:
        how = draw(st.sampled_from(("device", "dtype", "shape", "type", "requires grad")))
        optional = name in ("row_ids", "sample_ids")
        if (
            how == "device"
            and op is not nk.select_muted
            and not (op is nk.hard_concrete and name == "scores")
        ):
            value = value.to("meta")
        elif how == "requires grad" and op in IN_PLACE and name in ("hidden", "gains", "logits", "reference"):
            value = value.clone().requires_grad_()
        elif how == "shape" and name not in ("scores", "indptr", "step"):
            narrower = name != "hidden" and draw(st.booleans())  # which mute_ may take
            value = value[..., :-1] if narrower else value.expand(3, *value.shape)
        elif how == "type" or optional:
            value = draw(st.sampled_from(NO_TENSORS))
        else:
            fine = {
                "hidden": DTYPES, "logits": DTYPES, "row_ids": (torch.int32, torch.int64),
                "scores": (torch.float32, torch.float64)[: 1 + (op is nk.hard_concrete)],
            }.get(name, (value.dtype,))  # fmt: skip
            value = value.to(draw(st.sampled_from([d for d in EVERY_DTYPE if d not in fine])))
    return op, arguments | {name: value}, name


@settings(max_examples=4 * settings().max_examples)
@given(spoilt())
def test_what_does_not_fit_is_refused_by_name(case):
    op, arguments, name = case
    tensors = {key: x for key, x in arguments.items() if isinstance(x, torch.Tensor) and not x.is_meta}
    before = {key: bits(x.detach()) for key, x in tensors.items()}
    with pytest.raises((TypeError, ValueError, RuntimeError)) as refused:
        op(**arguments)
    assert any(key in str(refused.value) for key in arguments), (name, refused.value)
    assert all(torch.equal(bits(x.detach()), before[key]) for key, x in tensors.items())
