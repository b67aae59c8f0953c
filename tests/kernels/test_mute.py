"""mute_ against its reference: many mute sets in one batch, in place, nothing else touched."""

import pytest
import torch

import neumuter_kernels as nk
from neumuter_kernels import reference
from neumuter_kernels.mute import mute_in_pytorch
from tests.kernels.backends import DEVICES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def mute_sets(sets, layers, width, share=0.3, seed=0):
    """(indptr int32 [S, L + 1], indices int32 [N], gains float32 [N]) of random sets."""
    generator = torch.Generator().manual_seed(seed)
    indptr, indices = torch.zeros(sets, layers + 1, dtype=torch.int32), []
    end = 0
    for s in range(sets):
        indptr[s, 0] = end
        for layer in range(layers):
            chosen = (torch.rand(width, generator=generator) < share).nonzero().flatten()
            indices.append(chosen)
            end += len(chosen)
            indptr[s, layer + 1] = end
    indices = torch.cat(indices).int()
    gains = 4 * torch.rand(len(indices), generator=generator) - 2
    gains[::5] = 0.0
    return indptr, indices, gains


def run(hidden, sets, row_ids=None, layer=0, device="cpu"):
    sets = [x.to(device) for x in sets]
    given = hidden.to(device, copy=True)
    found = nk.mute_(given, *sets, None if row_ids is None else row_ids.to(device), layer)
    assert found is given
    return found.cpu()


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (7, 33), (64, 1000), (0, 5)])
def test_every_token_has_its_own_set(dtype, tokens, width, device):
    hidden = torch.randn(tokens, width).to(dtype)
    sets = mute_sets(4, 3, width)
    for layer in range(3):
        for ids in (torch.int32, torch.int64):
            rows = torch.randint(-1, 4, (tokens,), dtype=ids)
            found = run(hidden, sets, rows, layer, device)
            assert torch.equal(found, reference.mute(hidden, *sets, rows, layer))


def test_products_are_rounded_once(device):
    """In float64 by hand, for bfloat16: gains are float32, and h·g is rounded to nearest even."""
    hidden = torch.randn(5, 400).bfloat16()
    sets = mute_sets(1, 1, 400)
    found = run(hidden, sets, device=device)
    expected = hidden.clone()
    neurons = sets[1].long()
    expected[:, neurons] = (hidden[:, neurons].float() * sets[2]).bfloat16()
    assert torch.equal(found, expected)
    untouched = torch.ones(400, dtype=torch.bool).index_fill(0, neurons, False)
    assert torch.equal(found[:, untouched], hidden[:, untouched])


def test_one_row_of_offsets_is_one_set_for_all(device):
    hidden = torch.randn(2, 3, 20)
    indptr, indices, gains = mute_sets(1, 2, 20)
    both = [run(hidden, (x, indices, gains), layer=1, device=device) for x in (indptr, indptr[0])]
    assert torch.equal(*both)
    assert torch.equal(
        both[0].view(6, 20), reference.mute(hidden.view(6, 20), indptr, indices, gains, None, 1)
    )


def test_without_row_ids_the_tokens_are_equal_runs(device):
    hidden = torch.randn(3, 4, 30)
    sets = mute_sets(3, 1, 30)
    rows = torch.arange(3).repeat_interleave(4)
    assert torch.equal(run(hidden, sets, device=device), run(hidden, sets, rows, device=device))


def test_a_view_of_a_wider_tensor(device):
    wide = torch.randn(6, 50)
    sets = mute_sets(2, 1, 20)
    rows = torch.tensor([0, 1, -1, 1, 0, 0])
    expected = wide.clone()
    expected[:, 10:30] = reference.mute(wide[:, 10:30].contiguous(), *sets, rows)
    given = wide.to(device, copy=True)
    nk.mute_(given[:, 10:30], *(x.to(device) for x in sets), rows.to(device))
    assert torch.equal(given.cpu(), expected)


def test_selected_neurons_are_a_set():
    scores = torch.randn(2, 40)
    selected = nk.select_muted(scores, budget=9)
    hidden = torch.ones(3, 40)
    nk.mute_(hidden, *selected, layer=1)
    muted = selected.indices[selected.indptr[1] : selected.indptr[2]].long()
    assert torch.equal((hidden != 1).any(0).nonzero().flatten(), muted.sort().values)


def test_what_plain_pytorch_does_where_there_is_no_nvcc():
    hidden, rows = torch.randn(2, 3, 20), torch.tensor([0, 1, -1, 1, 0, 0])
    sets = mute_sets(2, 2, 20)
    expected = run(hidden, sets, rows, 1)
    mute_in_pytorch(hidden, *sets, rows, 1)
    assert torch.equal(hidden, expected)


def test_plain_pytorch_takes_and_skips_what_the_kernels_do():
    sets = mute_sets(2, 2, 20)
    ids = torch.tensor([0, 1, -1])
    for rows in (ids[:, None].expand(3, 2), ids.expand(2, 3).T):
        hidden = torch.randn(3, 2, 20)
        expected = run(hidden, sets, rows, 1)
        mute_in_pytorch(hidden, *sets, rows, 1)
        assert torch.equal(hidden, expected)
    mute_in_pytorch(torch.empty(3, 0), *sets, ids, 1)
    # As on a GPU, neurons that are not there are skipped: no check may wait for the device.
    indptr, indices = torch.tensor([[0, 3]], dtype=torch.int32), torch.tensor([-1, 2, 20], dtype=torch.int32)
    hidden = torch.ones(4, 20)
    mute_in_pytorch(hidden, indptr, indices, torch.zeros(3), None, 0)
    assert torch.equal(hidden, torch.ones(4, 20).index_fill(1, torch.tensor([2]), 0))
    with pytest.raises(RuntimeError, match="do not overlap"):
        mute_in_pytorch(torch.randn(80).as_strided((4, 20), (3, 1)), *sets, torch.zeros(4).long(), 1)


def test_the_schema_and_the_fake_kernel():
    sets = mute_sets(2, 2, 20)
    arguments = (torch.randn(4, 20), *sets, torch.tensor([0, 1, -1, 1]), 1)
    torch.library.opcheck(torch.ops.neumuter.mute_.default, arguments)


def test_compiled_without_a_graph_break():
    sets = mute_sets(2, 1, 20)
    rows = torch.tensor([0, 1, -1, 1])

    def work(x):
        return nk.mute_(torch.relu(x), *sets, rows) + 1

    x = torch.randn(4, 20)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(work, fullgraph=True)(x), work(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_captured_in_a_cuda_graph():
    sets = [x.cuda() for x in mute_sets(3, 1, 64)]
    hidden, rows = torch.randn(5, 64, device="cuda"), torch.tensor([0, 1, 2, -1, 0], device="cuda")
    buffer = hidden.clone()
    nk.mute_(hidden.clone(), *sets, rows)  # loaded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nk.mute_(buffer, *sets, rows)
    buffer.copy_(hidden)
    rows.copy_(torch.tensor([2, 2, -1, 0, 1]))
    graph.replay()
    assert torch.equal(buffer.cpu(), reference.mute(hidden.cpu(), *(x.cpu() for x in sets), rows.cpu()))


SETS = mute_sets(2, 2, 8)
HIDDEN = torch.randn(4, 8)
ROWS = torch.tensor([0, 1, -1, 0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": HIDDEN.long()}, TypeError, "hidden must be a float32"),
        ({"hidden": HIDDEN.clone().requires_grad_()}, ValueError, "hidden requires grad"),
        ({"indptr": SETS[0].long()}, TypeError, "indptr must be a torch.int32"),
        ({"indptr": SETS[0][None]}, ValueError, r"indptr must have shape \[S, L \+ 1\]"),
        ({"indices": SETS[1].long()}, TypeError, "indices must be a torch.int32"),
        ({"gains": SETS[2].double()}, TypeError, "gains must be a torch.float32"),
        ({"gains": SETS[2][:-1]}, ValueError, "indices and gains must both be"),
        ({"row_ids": ROWS.float()}, TypeError, "row_ids must be an int32 or int64"),
        ({"row_ids": ROWS[:3]}, ValueError, "one entry for each of 4 tokens"),
        ({"row_ids": None, "hidden": HIDDEN[:3]}, ValueError, "3 tokens must split into 2 equal runs"),
        ({"layer": 2}, ValueError, r"layer must lie in \[0, 2\), got 2"),
        ({"row_ids": torch.tensor([0, 1, 2, 0])}, RuntimeError, r"row_ids must lie in \[-1, 2\), got 2"),
        ({"row_ids": torch.tensor([0, 1, -2, 0])}, RuntimeError, "got -2"),
        ({"indices": SETS[1] + 8}, RuntimeError, r"indices must lie in \[0, 8\)"),
        ({"indptr": SETS[0] + 1000}, RuntimeError, "must ascend within"),
        ({"hidden": HIDDEN.expand(2, 4, 8).transpose(0, 1)}, ValueError, "one entry for each of 8"),
        ({"hidden": HIDDEN[:1].expand(4, 8)}, RuntimeError, "do not overlap"),
        ({"hidden": torch.randn(40).as_strided((4, 8), (3, 1))}, RuntimeError, "do not overlap"),
        ({"hidden": torch.randn(4, 16)[:, ::2]}, RuntimeError, "rows of one stride"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_and_nothing_is_changed(change, error, message):
    arguments = {"hidden": HIDDEN.clone(), "indptr": SETS[0], "indices": SETS[1], "gains": SETS[2],
                 "row_ids": ROWS, "layer": 1} | change  # fmt: skip
    before = arguments["hidden"].detach().clone()
    with pytest.raises(error, match=message):
        nk.mute_(**arguments)
    assert torch.equal(arguments["hidden"].detach(), before)
