"""masked_glu and masked_act on every backend against the reference, in float64-accurate terms."""

import pytest
import torch

import neumuter_kernels as nk
from neumuter_kernels import reference
from tests.kernels.backends import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = ["separate", "halves", "interleaved", "plain"]
# (leading shape, F, G): empty, single, odd, more than a block of tokens and of columns
SHAPES = [
    ((0,), 16, 1), ((5,), 0, 1), ((1,), 1, 1), ((3,), 7, 1), ((2, 3), 33, 2), ((130,), 37, 2),
    ((2, 3, 5), 65, 3), ((67,), 1100, 1), ((290,), 70, 2), ((131,), 70, 1),
]  # fmt: skip


def make_case(layout, leading, F, G, dtype, device, ids=None):
    """Leaf tensors (inputs…, mask), row ids and a gradient of the output."""
    wide = reference.compute_dtype(dtype)
    width = 2 * F if layout in ("halves", "interleaved") else F
    inputs = [2 * torch.randn(*leading, width) for _ in range(2 if layout == "separate" else 1)]
    leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
    leaves.append((torch.rand(G, F) * 2 - 0.5).to(device, wide).requires_grad_())
    grad = torch.randn(*leading, F).to(device, dtype)
    return leaves, ids, grad


def run(functions, layout, leaves, ids, activation):
    *inputs, mask = leaves
    if layout == "separate":
        return functions.masked_glu(*inputs, mask, ids, activation)
    if layout == "plain":
        return functions.masked_act(*inputs, mask, ids, activation)
    return functions.masked_glu(
        gate_up=inputs[0], mask=mask, row_ids=ids, activation=activation, interleaved=layout == "interleaved"
    )


class Reference:
    masked_act = staticmethod(reference.masked_act)

    @staticmethod
    def masked_glu(
        gate=None, up=None, mask=None, row_ids=None, activation="silu", *, gate_up=None, interleaved=False
    ):
        if gate_up is None:
            return reference.masked_glu(gate, up, mask, row_ids, activation)
        return reference.masked_glu_packed(gate_up, mask, row_ids, activation, interleaved)


def results(functions, layout, leaves, ids, activation, grad):
    h = run(functions, layout, leaves, ids, activation)
    return [h, *torch.autograd.grad(h, leaves, grad)]


def check(layout, leaves, ids, grad, activation):
    ours = results(nk, layout, leaves, ids, activation, grad)
    plain = results(Reference, layout, leaves, ids, activation, grad)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = results(Reference, layout, wide, ids, activation, grad.double())
    for i, (a, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        assert_as_accurate(a, p, e, f"result {i}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", nk.ACTIVATIONS)
def test_dtypes_and_activations(device, layout, dtype, activation, poisoned):
    leaves, ids, grad = make_case(layout, (2, 5), 70, 2, dtype, device)
    check(layout, leaves, ids, grad, activation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("leading", "F", "G"), SHAPES)
def test_shapes(device, layout, leading, F, G, poisoned):
    leaves, ids, grad = make_case(layout, leading, F, G, torch.float32, device)
    check(layout, leaves, ids, grad, "silu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "T"), [(torch.float32, 1025), (torch.bfloat16, 2049)], ids=str)
def test_gradients_too_large_for_the_caches(layout, dtype, T):
    """On the CPU these are written past the caches; a row stride that is no multiple of a line too."""
    leaves, ids, grad = make_case(layout, (T,), 4099, 1, dtype, "cpu")
    check(layout, leaves, ids, grad, "relu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("ids", ["random", "sorted", "all unmasked", "one row of many"])
def test_row_ids(device, interpreted, layout, id_dtype, ids, poisoned):
    T, G = 30 if interpreted else 150, 5  # C++ takes 64 tokens at a time
    row_ids = {
        "random": torch.randint(-1, G, (T,)),
        "sorted": torch.randint(0, G, (T,)).sort().values,
        "all unmasked": torch.full((T,), -1),
        "one row of many": torch.full((T,), 3),
    }[ids].to(device, id_dtype)
    leaves, row_ids, grad = make_case(layout, (T,), 24, G, torch.float32, device, row_ids)
    check(layout, leaves, row_ids, grad, "gelu")


def strided(x, how):
    """The values of ``x`` [a, b, F] in memory that is not contiguous."""
    a, b, F = x.shape
    if how == "row stride":
        return torch.empty(a, b, F + 13, dtype=x.dtype, device=x.device)[..., 5 : 5 + F].copy_(x)
    if how == "transposed rows":
        return torch.empty(b, a, F, dtype=x.dtype, device=x.device).transpose(0, 1).copy_(x)
    if how == "column stride":
        return torch.empty(a, b, 3 * F, dtype=x.dtype, device=x.device)[..., ::3].copy_(x)
    return x[:1].contiguous().expand(a, b, F)  # "expanded": stride 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["row stride", "transposed rows", "column stride", "expanded"])
def test_strides(device, layout, how, poisoned):
    leaves, ids, grad = make_case(layout, (3, 4), 20, 3, torch.float32, device)
    *inputs, mask = [x.detach() for x in leaves]
    leaves = [strided(x, how).requires_grad_() for x in inputs]
    leaves.append(strided(mask[None], "row stride")[0].requires_grad_())
    check(layout, leaves, ids, strided(grad, how), "silu")


def test_packed_views_of_one_tensor(device):
    """gate and up as views of a packed tensor are read in place and give the packed result."""
    packed = torch.randn(6, 40, device=device)
    mask = torch.rand(1, 20, device=device)
    gate, up = packed.chunk(2, dim=-1)
    assert torch.equal(nk.masked_glu(gate, up, mask, None, "silu"), nk.masked_glu(gate_up=packed, mask=mask))


def ulps(x, y, floor=0.0):
    """|x − y| in units of the last place of y, or of ``floor`` where that is larger."""
    info = torch.finfo(x.dtype)
    scale = torch.maximum(y.double().abs(), torch.as_tensor(floor).double()).clamp(min=info.tiny)
    return (x.double() - y.double()).abs() / (2.0 ** scale.log2().floor() * info.eps)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [*(("separate", dtype) for dtype in DTYPES[:3]), ("plain", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("activation", nk.ACTIVATIONS)
def test_rounds_where_eager_rounds(device, layout, dtype, activation):
    """With a mask of ones and standard normal inputs, beyond eager's own error: float32 at most 4 ulp
    from eager; bf16/fp16 activations at most 1 ulp (which the products that follow can widen to 2) in
    at most 1 of 1,000 elements.

    "Beyond eager's own error", since eager subtracts nearly equal numbers (1 + erf and 1 + tanh of
    negative numbers), where ours does not. An ulp of a float32 sum is that of its largest term.
    """
    T, F = 40, 1536
    leaves, _, grad = make_case(layout, (T,), F, 1, dtype, device)
    inputs = [(x / 2).detach().requires_grad_() for x in leaves[:-1]]
    ones = torch.ones_like(leaves[-1]).detach()

    def eager(inputs):
        act = reference.activate(inputs[0], activation)
        return act * inputs[1] if layout == "separate" else act

    def with_gradients(h, inputs):
        return [h, *torch.autograd.grad(h, inputs, grad.to(h.dtype))]

    ours = with_gradients(run(nk, layout, [*inputs, ones], None, activation), inputs)
    theirs = with_gradients(eager(inputs), inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = with_gradients(eager(wide), wide)
    x, other = wide[0].detach(), wide[1].detach() if layout == "separate" else 1.0
    terms = [x * other, (1 + x.abs()) * grad * other, x * grad]
    for results in zip(ours, theirs, exact, terms, strict=False):
        a, b, e, term = (x.detach().cpu() for x in results)  # where 2.0**n is exact
        if dtype == torch.float32:
            assert (ulps(a, b, term.abs()) - ulps(b, e, term.abs())).max() <= 4
        else:
            if activation not in ("gelu", "gelu_tanh"):  # which subtract as said above
                assert (a != b).double().mean() <= 1e-3
            worse = (a != b) & ((a - e).abs() > (b - e).abs())
            assert worse.double().mean() <= 1e-3
            assert (ulps(a, b) * worse).max() <= 2


def test_silu_is_within_4_ulp_of_eager_everywhere(device):
    """Also in the tails; but below -88 eager's exp overflows and its result is 0, ours denormal."""
    x = torch.linspace(-110, 110, 4001, device=device)
    edges = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38], device=device)
    x = torch.cat([x, edges])[None]
    ours = nk.masked_act(x, torch.ones_like(x), None, "silu")
    eager, exact = torch.nn.functional.silu(x), torch.nn.functional.silu(x.double())
    assert ulps(ours, eager)[x > -88].max() <= 4
    assert ((ours - exact).abs() <= (eager - exact).abs() + 2e-43)[x <= -88].all()


@pytest.mark.parametrize("activation", nk.ACTIVATIONS)
def test_nan_and_inf_follow_eager(device, activation):
    """φ(−inf) is 0, −inf or −inf · 0 = NaN, as the activation's formula has it."""
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]], device=device)
    ours = nk.masked_act(x, torch.ones_like(x), None, activation)[0]
    assert ours[0].isnan()
    assert ours[1] == float("inf")
    lowest = {"relu": 0.0, "relu2": 0.0, "identity": -float("inf")}
    assert ours[2] == lowest[activation] if activation in lowest else ours[2].isnan()
    assert ours[3] > 0


@pytest.mark.parametrize(
    ("layout", "activation"),
    [*((layout, "silu") for layout in LAYOUTS), *(("separate", name) for name in nk.ACTIVATIONS[1:])],
)
def test_gradcheck(device, interpreted, layout, activation):
    leaves, _, _ = make_case(layout, (4,), 2 if interpreted else 5, 2, torch.float64, device)
    torch.autograd.gradcheck(lambda *x: run(nk, layout, x, None, activation), leaves, eps=1e-6, atol=1e-5)


def test_gradcheck_with_row_ids(device):
    ids = torch.tensor([1, -1, 0, 1, 1], device=device)
    leaves, _, _ = make_case("separate", (5,), 3, 2, torch.float64, device)
    torch.autograd.gradcheck(lambda *x: run(nk, "separate", x, ids, "silu"), leaves)


@pytest.mark.parametrize("needs", [(True, False, False), (False, False, True), (False, True, True)])
def test_only_the_gradients_that_are_needed(device, needs):
    leaves, ids, grad = make_case("separate", (6,), 10, 2, torch.float32, device)
    all_of_them = results(nk, "separate", leaves, ids, "silu", grad)[1:]
    some = [x.detach().requires_grad_(need) for x, need in zip(leaves, needs, strict=True)]
    run(nk, "separate", some, ids, "silu").backward(grad)
    for x, need, expected in zip(some, needs, all_of_them, strict=True):
        assert torch.equal(x.grad, expected) if need else x.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_same_bits_for_any_number_of_threads(dtype, ragged):
    """Also for more than one block of tokens and columns, and on every run."""
    ids = torch.randint(-1, 4, (1000,)) if ragged else None
    leaves, _, grad = make_case("separate", (1000,), 2100, 4, dtype, "cpu")
    threads = torch.get_num_threads()
    runs = []
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            runs.append(results(nk, "separate", leaves, ids, "silu", grad))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(layout, ragged):
    ids = torch.tensor([1, -1, 0, 1], dtype=torch.int32) if ragged else None
    (*inputs, mask), _, grad = make_case(layout, (4,), 6, 2, torch.float32, "cpu")
    ops = torch.ops.neumuter
    number = int(reference.Layout[layout.upper()])
    gate, up = inputs if layout == "separate" else (*inputs, None)
    torch.library.opcheck(ops.masked_ffn.default, (gate, up, mask, ids, 0, number))
    gate, up, mask = (None if x is None else x.detach() for x in (gate, up, mask))
    for flags in ((True, True), (False, True), (True, False), (False, False)):
        arguments = (grad, gate, up, mask, ids, 0, number, *flags)
        torch.library.opcheck(ops.masked_ffn_backward.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_without_graph_breaks(layout):
    leaves, ids, grad = make_case(layout, (2, 6), 10, 2, torch.float32, "cpu")
    compiled = torch.compile(run, fullgraph=True)
    h = compiled(nk, layout, leaves, ids, "silu")
    expected = results(nk, layout, leaves, ids, "silu", grad)
    for a, b in zip([h, *torch.autograd.grad(h, leaves, grad)], expected, strict=True):
        torch.testing.assert_close(a, b)


def test_mask_of_one_dimension():
    x, mask = torch.randn(3, 4), torch.rand(4)
    assert torch.equal(nk.masked_act(x, mask), nk.masked_act(x, mask[None]))


BAD = [
    (TypeError, "gate", lambda x, m: nk.masked_glu(x.int(), x.int(), m)),
    (TypeError, "gate_up", lambda x, m: nk.masked_glu(x, mask=m)),
    (TypeError, "interleaved", lambda x, m: nk.masked_glu(x, x, m, interleaved=True)),
    (ValueError, "up", lambda x, m: nk.masked_glu(x, x[:2], m)),
    (TypeError, "up", lambda x, m: nk.masked_glu(x, [1.0], m)),
    (TypeError, "row_ids", lambda x, m: nk.masked_glu(x, x, m, [0, 0, 0, 0])),
    (ValueError, "up", lambda x, m: nk.masked_glu(x, x.bfloat16(), m)),
    (TypeError, "mask", lambda x, m: nk.masked_glu(x, x, m.bfloat16())),
    (TypeError, "mask", lambda x, m: nk.masked_glu(x, x, None)),
    (ValueError, "mask", lambda x, m: nk.masked_glu(x, x, m[:, :3])),
    (ValueError, "mask", lambda x, m: nk.masked_glu(x, x, m.expand(3, -1))),
    (ValueError, "gate_up", lambda x, m: nk.masked_glu(gate_up=x[:, :3], mask=m)),
    (ValueError, "activation", lambda x, m: nk.masked_act(x, m, activation="tanh")),
    (ValueError, "row_ids", lambda x, m: nk.masked_act(x, m, torch.zeros(3, dtype=torch.int32))),
    (TypeError, "row_ids", lambda x, m: nk.masked_act(x, m, torch.zeros(4))),
    (RuntimeError, "row_ids", lambda x, m: nk.masked_act(x, m, torch.tensor([0, 0, 0, 1]))),
    (RuntimeError, "row_ids", lambda x, m: nk.masked_act(x, m, torch.tensor([0, 0, -2, 0]))),
]


@pytest.mark.parametrize(("error", "names", "call"), BAD)
def test_bad_input_names_the_argument(error, names, call):
    with pytest.raises(error, match=names):
        call(torch.randn(4, 6), torch.rand(1, 6))


@pytest.mark.parametrize("layout", reference.Layout)
def test_the_op_takes_up_exactly_where_its_layout_has_it(layout):
    x, mask = torch.randn(4, 6), torch.rand(1, 3 if layout.packed else 6)
    up = None if layout == reference.Layout.SEPARATE else x
    with pytest.raises(RuntimeError, match="up must be given if layout is SEPARATE, and only then"):
        torch.ops.neumuter.masked_ffn(x, up, mask, None, 0, layout)


@pytest.mark.parametrize("number", [-1, 4])
def test_the_op_refuses_a_layout_that_is_not_there(number):
    with pytest.raises(RuntimeError, match=f"there is no layout number {number}"):
        torch.ops.neumuter.masked_ffn(torch.randn(4, 6), None, torch.rand(1, 6), None, 0, number)


def test_no_mask_rows_and_no_masked_tokens(device):
    leaves, _, grad = make_case("separate", (5,), 12, 0, torch.float32, device)
    h = run(nk, "separate", leaves, torch.full((5,), -1, device=device), "silu")
    gate, up, mask = torch.autograd.grad(h, leaves, grad)
    plain = [x.detach().requires_grad_() for x in leaves[:2]]
    expected = torch.nn.functional.silu(plain[0]) * plain[1]
    torch.testing.assert_close([h, gate, up], [expected, *torch.autograd.grad(expected, plain, grad)])
    assert mask.shape == (0, 12)
