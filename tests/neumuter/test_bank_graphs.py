"""A MuteBank under graphs: its buffers stay where they are, and the next batch's sets are in them."""

import threading
from itertools import pairwise

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from neumuter.models.families import find_ffns
from neumuter.serving import bank as serving
from neumuter.serving.bank import MuteBank
from tests import models
from tests.neumuter.test_bank import logits, sets_of

NAMES = ("llama", "opt")  # activations [B, S, F], [B·S, F]


@pytest.fixture
def few(request, monkeypatch):
    monkeypatch.setattr(serving, "FEW", request.param)


def filled(model, required=False):
    sets = sets_of(model)
    bank = MuteBank(model, required)
    for name, mutes in zip("abc", sets, strict=True):
        bank.add(name, mutes)
    return bank


def capture(model, ids, monkeypatch):
    """The operators of a forward pass, to be run again on the tensors that they read, as a CUDA graph is."""
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(serving, "_is_capturing", lambda: True)

        def call(x):
            return model(input_ids=x, use_cache=False).logits

        # transformers asks whether the positions are packed.
        return make_fx(call, _error_on_data_dependent_ops=False)(ids)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("few", [1 << 18, 0], indirect=True)
def test_a_graph_serves_the_next_sets(name, few, monkeypatch):
    model, ids = models.build(name), models.batch(4, 6)
    plain, (more,) = logits(model, ids), sets_of(model, 1)
    bank = filled(model, required=True)
    with bank.using(["a", None, "b", "a"]):
        expected = logits(model, ids)
        graph = capture(model, ids, monkeypatch)
        assert torch.equal(graph(ids), expected)
        with bank.using(["b", "c", None, None]):
            assert torch.equal(graph(ids), logits(model, ids))
            assert not torch.equal(graph(ids)[1], plain[1])
        assert torch.equal(graph(ids), expected)
        bank.remove("a")
        for number in range(20):  # the sets move
            bank.add(f"x{number}", more)
        assert torch.equal(graph(ids), expected)
    for names in (["x3", "c"], "x7", None, ["c", None, "b", "x19"]):
        with bank.using(names):
            assert torch.equal(graph(ids), logits(model, ids))
    assert torch.equal(logits_of(bank, model, ids, None), plain)


def logits_of(bank, model, ids, names):
    with bank.using(names):
        return logits(model, ids)


@pytest.mark.parametrize("required", [True, False])
def test_a_graph_never_serves_the_sets_of_somebody_else(required, monkeypatch):
    model, ids = models.build("llama"), models.batch(4, 6)
    plain = logits(model, ids)
    bank = filled(model, required)

    def is_vacant(output):
        return bool(output.isnan().all()) if required else torch.equal(output, plain)

    with bank.using("a"):
        expected = logits(model, ids)
        graph = capture(model, ids, monkeypatch)
    assert is_vacant(graph(ids))
    with bank.using(["a", "b", "c"]):
        assert is_vacant(graph(ids))
        with bank.using("a"):
            assert torch.equal(graph(ids), expected)
            # Another thread and another batch have buffers of their own.
            thread = threading.Thread(target=logits_of, args=(bank, model, ids, "b"))
            thread.start()
            thread.join()
            logits(model, models.batch(2, 3))
            assert torch.equal(graph(ids), expected)
        assert is_vacant(graph(ids))
    with pytest.raises(ZeroDivisionError), bank.using("a"):
        raise ZeroDivisionError
    assert is_vacant(graph(ids))


def test_a_graph_is_not_captured_before_a_pass_of_the_same_rows(monkeypatch):
    model, ids = models.build("llama"), models.batch(4, 6)
    bank = filled(model)
    with bank.using("a"):
        logits(model, ids[:2])
        with pytest.raises(RuntimeError, match="a CUDA graph of 4 rows cannot be captured yet"):
            capture(model, ids, monkeypatch)
        logits(model, ids)
    with bank.using("b"), pytest.raises(RuntimeError, match="cannot be captured yet"):
        capture(model, ids, monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_buffers_stay_where_they_are(name):
    model = models.build(name)
    mutes = dict(zip("abc", sets_of(model), strict=True))
    found = []
    with filled(model) as bank:
        for names, tokens in ((["a", None], 6), ("b", 6), (["c", "a"], 1), ([None, "c"], 9)):
            with bank.using(names):
                logits(model, models.batch(2, tokens))
                buffers = bank._current.seat.by_batch[2].gains
            found.append([gains.data_ptr() for gains in buffers])
            for row, used in enumerate(names * 2 if isinstance(names, str) else names):
                for ffn, gains in zip(find_ffns(model), buffers, strict=True):
                    expected = torch.ones(ffn.width)
                    if used:
                        neurons, values = mutes[used].layers[ffn.path]
                        expected[neurons.long()] = values
                    assert torch.equal(gains[row], expected)
        assert all(addresses == found[0] for addresses in found)
        with bank.using("a"):
            logits(model, models.batch(3, 2))
        assert list(bank._current.seat.by_batch) == [3]


@pytest.mark.parametrize("few", [1 << 18, 0], indirect=True)
def test_nothing_that_somebody_else_reads_is_changed(few):
    model, ids, seen = models.build("gpt2"), models.batch(2, 6), []
    ffn = find_ffns(model)[0]
    activation = getattr(ffn.module, ffn.layout.activation)
    with activation.register_forward_hook(lambda *given: seen.append(given[2])):
        logits(model, ids)
        with filled(model) as bank, bank.using("b"):
            for _ in range(2):
                seen.append(None)
                logits(model, ids)
    # Of the passes, not of what proves that masks arrive.
    seen = [seen[0], *(output for before, output in pairwise(seen) if before is None)]
    assert len(seen) == 3
    assert all(torch.equal(output, seen[0]) for output in seen)


def test_compiled_code_serves_the_next_sets_without_compiling_again():
    model, ids = models.build("llama"), models.batch(2, 4)
    with filled(model) as bank:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        logits_of(bank, compiled, ids, ["a", None])
        with torch.compiler.set_stance("fail_on_recompile"):
            for names in (["b", "c"], "c", None, ["c", "a"], [None, "b"]):
                found = logits_of(bank, compiled, ids, names)
                torch.testing.assert_close(found, logits_of(bank, model, ids, names))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("few", [1 << 18, 0], indirect=True)
def test_a_cuda_graph_serves_the_next_sets(few):
    model, ids = models.build("llama", torch.bfloat16).cuda(), models.batch(4, 6).cuda()
    bank = filled(model, required=True)
    with torch.no_grad():

        def call():
            return model(input_ids=ids, use_cache=False).logits

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with bank.using(["a", None, "b", "a"]):
            with torch.cuda.stream(stream):
                call()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = call()
        for names in (["b", "c", None, None], "c", None):
            with bank.using(names):
                expected = call()
                graph.replay()
                assert torch.equal(captured, expected)
        graph.replay()
        assert captured.isnan().all()
