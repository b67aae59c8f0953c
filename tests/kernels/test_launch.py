"""Launches by the extension: the same as Triton's own, on GPUs that are not there (bench/stub_gpu).

Without such GPUs, this file has one test, which runs the others in a process that has them.
"""

import ctypes
import gc
import importlib.metadata
import logging
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import neumuter_kernels as nk
from bench import ROOT, stub_gpu
from neumuter_kernels import _C, info, recording
from neumuter_kernels.masked_ffn import _HALVES, _INTERLEAVED, _PLAIN, _SEPARATE
from neumuter_kernels.registration import OPS

STUBBED = os.environ.get("NEUMUTER_STUB_GPU") == "1"
on_stubs = pytest.mark.skipif(not STUBBED, reason="runs in the process of test_on_gpus_that_are_not_there")
WHY_NOT = stub_gpu.why_not()

forward = torch.ops.neumuter.masked_ffn.default
backward = torch.ops.neumuter.masked_ffn_backward.default
T, F = 12, 64


@pytest.mark.skipif(STUBBED or WHY_NOT is not None, reason=WHY_NOT or "runs them already")
def test_on_gpus_that_are_not_there(tmp_path):
    environment = stub_gpu.environment() | {"NEUMUTER_STUB_GPU": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def driver():
    from bench.stub_gpu.noted import Driver

    return Driver()


@pytest.fixture(autouse=True)
def no_plans():
    _C.forget_plans()
    yield
    if STUBBED:
        recording._refused.clear()
        recording.say_once.cache_clear()


@pytest.fixture
def without_python(monkeypatch):
    """A function after whose call Python computes no op any more."""

    def forbid():
        def computed_in_python(*arguments):
            raise AssertionError("computed in Python")

        for op in OPS.values():
            if hasattr(op.gpu, "launch"):
                monkeypatch.setitem(vars(op.gpu), "launch", computed_in_python)

    return forbid


def empty(*shape, dtype=torch.bfloat16, device="cuda"):
    return torch.empty(*shape, dtype=dtype, device=device)


def inputs(layout, dtype=torch.bfloat16, rows=1, tokens=T, device="cuda"):
    """grad, gate, up and mask."""
    width = 2 * F if layout in (_HALVES, _INTERLEAVED) else F
    up = empty(tokens, F, dtype=dtype, device=device) if layout == _SEPARATE else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mask = empty(rows, F, dtype=wide, device=device)
    grad, gate = (empty(tokens, columns, dtype=dtype, device=device) for columns in (F, width))
    return grad, gate, up, mask


def traced(driver, tensors, call):
    """The launches of call(), whose results are rows of tensors too: addresses as (tensor, distance)."""
    driver.since()
    made = call()
    made = made if isinstance(made, tuple) else (made,)
    places = [x for x in (*tensors, *made) if x is not None and x.numel()]
    unknown = {}

    def meaning(value):
        for n, x in enumerate(places):
            if 0 <= value - x.data_ptr() < x.untyped_storage().nbytes():
                return n, value - x.data_ptr()
        return ("unknown", unknown.setdefault(value, len(unknown))) if value > 2**32 else value

    return [(x.kernel, x.stream, x.device, x.grid, x.block, x.shared, tuple(map(meaning, x.values)))
            for x in driver.since()]  # fmt: skip


KINDS = [  # layout, dtype, mask rows, tokens, which gradients
    (_SEPARATE, torch.bfloat16, 1, T, True, True),
    (_SEPARATE, torch.bfloat16, 1, 2100, True, True),
    (_SEPARATE, torch.float16, 3, T, True, True),
    (_SEPARATE, torch.bfloat16, 1, T, True, False),
    (_PLAIN, torch.float32, 1, T, True, True),
    (_HALVES, torch.bfloat16, 1, T, True, True),
    (_INTERLEAVED, torch.float64, 1, T, False, True),
]


@on_stubs
@pytest.mark.parametrize(("layout", "dtype", "rows", "tokens", "input_grad", "mask_grad"), KINDS)
def test_what_is_repeated_is_what_triton_launched(
    driver, without_python, layout, dtype, rows, tokens, input_grad, mask_grad
):
    first, second = inputs(layout, dtype, rows, tokens), inputs(layout, dtype, rows, tokens)

    def calls(grad, gate, up, mask):
        yield (grad, gate, up, mask), lambda: forward(gate, up, mask, None, 0, layout)
        flags = input_grad, mask_grad
        yield (grad, gate, up, mask), lambda: backward(grad, gate, up, mask, None, 0, layout, *flags)

    by_triton = [traced(driver, *call) for call in calls(*first)]
    assert all(by_triton)
    assert _C.known_plans() == 2
    without_python()
    assert [traced(driver, *call) for call in calls(*second)] == by_triton


@on_stubs
def test_row_ids_forward(driver, without_python):
    _, gate, up, mask = inputs(_SEPARATE, rows=3)
    for ids in (torch.zeros(T, dtype=dtype, device="cuda") for dtype in (torch.int32, torch.int64)):
        by_triton = traced(driver, (gate, up, mask, ids), lambda ids=ids: forward(gate, up, mask, ids, 0, 1))
        again = traced(driver, (gate, up, mask, ids), lambda ids=ids: forward(gate, up, mask, ids, 0, 1))
        assert again == by_triton
    assert _C.known_plans() == 2


@on_stubs
def test_a_tensor_given_twice_may_be_two_in_the_next_call(driver, without_python):
    _, gate, up, mask = inputs(_SEPARATE)
    forward(gate, gate, mask, None, 0, _SEPARATE)
    without_python()
    driver.since()
    forward(gate, up, mask, None, 0, _SEPARATE)
    (launch,) = driver.since()
    assert launch.values[:3] == (gate.data_ptr(), up.data_ptr(), mask.data_ptr())


@on_stubs
def test_views_keep_their_distance_to_nothing(driver, without_python):
    """gate and up as parts of one tensor, then of another one in another order."""
    *_, mask = inputs(_SEPARATE)
    both, other = empty(T, 2 * F), empty(T, 2 * F)
    forward(both[:, :F], both[:, F:], mask, None, 0, _SEPARATE)
    without_python()
    driver.since()
    forward(other[:, F:], other[:, :F], mask, None, 0, _SEPARATE)
    (launch,) = driver.since()
    assert launch.values[:2] == (other[:, F:].data_ptr(), other.data_ptr())


@on_stubs
@pytest.mark.parametrize("change", ["shape", "stride", "alignment", "dtype", "number", "device"])
def test_another_kind_of_call_has_another_plan(driver, change):
    def call(T=T, F=F, dtype=torch.bfloat16, device="cuda", offset=0, stride=F, activation=0):
        gate, up = (empty(T * stride + 8, dtype=dtype, device=device)[offset:] for _ in range(2))
        gate, up = (x.as_strided((T, F), (stride, 1)) for x in (gate, up))
        forward(gate, up, empty(1, F, dtype=torch.float32, device=device), None, activation, _SEPARATE)

    changed = {
        "shape": {"T": 5}, "stride": {"stride": 80}, "alignment": {"offset": 1},
        "dtype": {"dtype": torch.float16}, "number": {"activation": 3}, "device": {"device": "cuda:1"},
    }  # fmt: skip
    call()
    call(**changed[change])
    assert _C.known_plans() == 2
    driver.since()
    call()
    call(**changed[change])
    assert _C.known_plans() == 2
    one, two = driver.since()
    assert one != two
    assert (one.kernel != two.kernel) == (change not in ("shape", "stride"))


@on_stubs
def test_on_the_device_and_the_stream_of_the_tensors(driver, without_python):
    def launched(device):
        _, gate, up, mask = inputs(_SEPARATE, device=device)
        driver.since()
        out = forward(gate, up, mask, None, 0, _SEPARATE)
        assert out.device == gate.device
        (launch,) = driver.since()
        return launch

    plain = [launched(device) for device in ("cuda:0", "cuda:1")]
    assert [x.stream for x in plain] == [0, 0]
    without_python()
    stream = torch.cuda.Stream("cuda:1")
    with torch.cuda.stream(stream):
        assert launched("cuda:1").stream == stream.cuda_stream != 0
        assert launched("cuda:0").stream == 0
    again = [launched(device) for device in ("cuda:0", "cuda:1")]
    assert [x.kernel for x in again] == [x.kernel for x in plain]
    assert [x.stream for x in again] == [0, 0]
    assert torch.cuda.current_device() == 0


@on_stubs
def test_in_a_cuda_graph(driver, without_python):
    grad, gate, up, mask = inputs(_SEPARATE)
    leaves = [x.requires_grad_() for x in (gate, up, mask)]

    def step():
        return torch.autograd.grad(nk.masked_glu(gate, up, mask), leaves, grad)

    step()
    without_python()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    driver.since()
    with torch.cuda.graph(graph, stream=stream):
        found = step()
    launches = driver.since()
    assert {x.stream for x in launches} == {stream.cuda_stream}
    assert found[0].data_ptr() in launches[1].values


@on_stubs
def test_in_a_thread_that_has_used_no_gpu(driver, without_python):
    _, gate, up, mask = inputs(_SEPARATE)
    forward(gate, up, mask, None, 0, _SEPARATE)
    without_python()
    driver.since()
    thread = threading.Thread(target=lambda: forward(gate, up, mask, None, 0, _SEPARATE))
    thread.start()
    thread.join()
    (launch,) = driver.since()
    assert launch.device == 0


@on_stubs
def test_threads_that_learn_and_repeat_at_once(driver):
    driver.set("stub_note", 0)
    _, gate, up, mask = inputs(_SEPARATE)
    wrong = []

    def work(seed):
        for n in range(200):
            tokens = 1 + (seed + n) % T
            if forward(gate[:tokens], up[:tokens], mask, None, 0, _SEPARATE).shape != (tokens, F):
                wrong.append(tokens)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    driver.set("stub_note", 1)
    driver.since.__self__._seen = driver._count.value
    assert not wrong
    assert _C.known_plans() == T


@on_stubs
def test_autograd(driver, without_python):
    grad, gate, up, mask = inputs(_SEPARATE)
    leaves = [x.requires_grad_() for x in (gate, up, mask)]

    def call():
        return torch.autograd.grad(nk.masked_glu(gate, up, mask), leaves, grad)

    driver.since()
    call()
    by_triton = driver.since()
    without_python()
    assert [x.shape for x in call()] == [x.shape for x in leaves]
    assert [x.kernel for x in driver.since()] == [x.kernel for x in by_triton]


@on_stubs
def test_a_child_process_leaves_it_to_python(driver):
    """Which says that CUDA does not work there."""
    _, gate, up, mask = inputs(_SEPARATE)
    forward(gate, up, mask, None, 0, _SEPARATE)
    child = os.fork()
    if child == 0:
        try:
            forward(gate, up, mask, None, 0, _SEPARATE)
        except RuntimeError as error:
            os._exit(0 if "re-initialize CUDA in forked subprocess" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@on_stubs
def test_a_call_without_a_plan_keeps_nothing_alive(driver):
    """Not even until Python looks for circles, which no shortage of the GPU's memory makes it do."""

    class Mark:
        pass

    def call():
        mark = Mark()
        _, gate, up, mask = inputs(_SEPARATE)
        backward(empty(1, 1).expand(T, F), gate, up, mask, None, 0, _SEPARATE, True, True)
        return weakref.ref(mark), *(StorageWeakRef(x.untyped_storage()) for x in (gate, up, mask))

    gc.disable()
    try:
        mark, *storages = call()
        assert recording._refused
        assert mark() is None
        assert all(storage.expired() for storage in storages)
    finally:
        gc.enable()


@on_stubs
def test_other_ops_of_torchs_are_left_to_python(driver, caplog):
    _, gate, up, mask = inputs(_SEPARATE)
    grad = empty(1, 1).expand(T, F)  # is copied
    driver.since()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            backward(grad, gate, up, mask, None, 0, _SEPARATE, True, True)
    assert _C.known_plans() == 0
    assert len({x.kernel for x in driver.since()}) in (1, 2)  # every time the same
    (line,) = caplog.messages
    assert line.startswith("some calls of masked_ffn_backward are launched from Python: it runs aten.")


@on_stubs
def test_a_launch_that_nobody_noted_is_left_to_python(monkeypatch):
    from neumuter_kernels.triton import masked_ffn

    def launch(kernel, grid, *arguments, **options):
        kernel[grid](*arguments, **options)

    monkeypatch.setattr(masked_ffn, "launch", launch)
    _, gate, up, mask = inputs(_SEPARATE)
    forward(gate, up, mask, None, 0, _SEPARATE)
    assert _C.known_plans() == 0


@on_stubs
def test_other_parameters_than_expected_are_left_to_python(driver, caplog):
    _, gate, up, mask = inputs(_SEPARATE)
    driver.set("stub_more_parameters", 1)
    driver.since()
    try:
        with caplog.at_level(logging.INFO):
            for _ in range(2):  # an activation that no other test uses, since loaded kernels stay
                forward(gate, up, mask, None, 4, _SEPARATE)
    finally:
        driver.set("stub_more_parameters", 0)
    assert len(driver.since()) == 2
    assert _C.known_plans() == 0
    (line,) = caplog.messages
    assert "have [8, 8, 8, 8" in line
    assert "expected" in line


@on_stubs
def test_what_python_raises_is_raised(monkeypatch):
    _, gate, up, mask = inputs(_SEPARATE)

    def fails(*arguments):
        raise NotImplementedError("the text")

    monkeypatch.setitem(vars(OPS["masked_ffn"].gpu), "launch", fails)
    with pytest.raises(NotImplementedError, match="the text"):
        forward(gate, up, mask, None, 0, _SEPARATE)
    with pytest.raises(NotImplementedError, match="the text"), torch.no_grad():
        nk.masked_glu(gate, up, mask)


@on_stubs
def test_memory_that_is_not_there_is_torchs_error():
    memory = ctypes.c_size_t.in_dll(ctypes.CDLL(None), "stub_memory")
    gate, mask = empty(1, 2**24), empty(1, 2**24, dtype=torch.float32)
    forward(gate, None, mask, None, 5, _PLAIN)
    assert _C.known_plans() == 1
    torch.cuda.empty_cache()
    enough, memory.value = memory.value, 2**20
    try:
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                forward(gate, None, mask, None, 5, _PLAIN)
    finally:
        memory.value = enough
    assert forward(gate, None, mask, None, 5, _PLAIN).shape == gate.shape


@on_stubs
def test_an_error_of_the_driver(driver):
    _, gate, up, mask = inputs(_SEPARATE)
    forward(gate, up, mask, None, 0, _SEPARATE)
    driver.set("stub_error", 1)
    with pytest.raises(RuntimeError, match=r"cuLaunchKernel: .* says CUDA_ERROR_INVALID_VALUE \(1\)"):
        forward(gate, up, mask, None, 0, _SEPARATE)


@on_stubs
def test_plans_are_few():
    for n in range(5000):
        _C.learn_plan([n], [], [], [])
    assert _C.known_plans() <= 4096


@pytest.mark.skipif(STUBBED or not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tokens", [T, 2100])
def test_repeated_on_a_gpu(without_python, tokens):
    """Values of a call that Python computes, then of two that the extension repeats."""
    if recording.why_not() is not None:
        pytest.skip(recording.why_not())
    for n in range(3):
        leaves = [torch.randn(tokens, F, requires_grad=True) for _ in range(2)] + [torch.rand(1, F)]
        grad, leaves[2].requires_grad = torch.randn(tokens, F), True
        here = [x.detach().cuda().requires_grad_() for x in leaves]
        found = torch.autograd.grad(nk.masked_glu(*here), here, grad.cuda())
        wanted = torch.autograd.grad(nk.masked_glu(*leaves), leaves, grad)
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=1e-4)
        if n == 0:
            assert _C.known_plans() == 2
            without_python()


def test_where_python_launches_alone(monkeypatch):
    monkeypatch.setattr(_C, "why_no_driver", lambda: "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for version, known in (("3.6.0", True), ("3.8.0", True), ("3.5.1", False), ("3.60.0", False)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        assert (recording.why_not() is None) == known, version
    assert "Triton 3.60.0" in recording.why_not()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.8.0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interprets" in recording.why_not()
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(_C, "why_no_driver", lambda: "libcuda.so.1 does not load")
    assert recording.why_not() == "libcuda.so.1 does not load"
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "HIP" in recording.why_not()
    assert dict(info.report())["launches by C++"] == "no: this torch is for HIP"
