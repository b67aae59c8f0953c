"""The benchmarks themselves: they measure what they say, and print no speed for wrong results."""

import itertools

import pytest
import torch

from bench import stub_gpu, text, timing
from bench.devices import DEVICES
from bench.kernels import activations, launch, select
from bench.static import assembly
from bench.timing import QUICK, Contender, Effort, compare, measure


def entries(row):
    return {c["name"]: c for c in row["contenders"]}


# --- Timing ----------------------------------------------------------------------------------


def test_contenders_take_turns():
    order = []
    contenders = [Contender(name, lambda _, name=name: order.append(name)) for name in "ab"]
    samples = measure(contenders, "cpu", Effort(0, 5))
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert {name: len(s) for name, s in samples.items()} == {"a": 5, "b": 5}
    assert turns == ["a", "b"] * 6  # the first of each is the warm-up


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless ``clock.pass_(seconds)`` moves it."""

    class Clock:
        now = 0.0

        def pass_(self, seconds):
            self.now += seconds

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_preparing_is_not_timed(clock):
    slow = Contender("slow", lambda _: clock.pass_(0.001), prepare=lambda: clock.pass_(0.02))
    (samples,) = measure([slow], "cpu", QUICK).values()
    assert samples == pytest.approx([0.001, 0.001])


def test_quartiles_ratio_and_speed(clock):
    def contender(name, *seconds):
        turns = itertools.cycle(seconds)
        return Contender(name, lambda _: clock.pass_(next(turns)))

    # Each is called three times to warm up, which shows that 2 ms are enough for a sample.
    ours, other = contender("ours", 0.002, 0.004, 0.003), contender("other", 0.008)
    row = compare([ours, other], ours, "cpu", Effort(0, 3), moved_bytes=2_000_000)
    entry = entries(row)["ours"]
    assert [entry[k] for k in ("q1_us", "median_us", "q3_us")] == pytest.approx([2500, 3000, 3500])
    assert row["ratio"] == pytest.approx(8 / 3)
    assert row["best_baseline"] == "other"
    assert entry["gb_per_s"] == pytest.approx(2000 / entry["median_us"])
    assert entry["share_of_limit"] == pytest.approx(1)


def test_short_calls_are_repeated_within_a_sample(clock):
    calls = []
    short = Contender("short", lambda _: calls.append(clock.pass_(0.0005)))
    (samples,) = measure([short], "cpu", Effort(0, 2)).values()
    assert samples == pytest.approx([0.0005, 0.0005])
    assert len(calls) == timing.WARM_UP + 2 * 4


@pytest.mark.parametrize("wrong", ["ours", "theirs"])
def test_wrong_results_get_no_speed(wrong):
    ran = []
    contenders = [
        Contender(n, lambda _, n=n: ran.append(n), check=lambda n=n: "off by 1" if n == wrong else None)
        for n in ("ours", "theirs")
    ]
    row = compare(contenders, None, "cpu", QUICK, moved_bytes=8)
    assert entries(row)[wrong] == {"name": wrong, "failed": "off by 1"}
    assert wrong not in ran
    assert "ratio" not in row
    assert "WRONG: off by 1" in text.row_text(row | {"op": "x", "pass": "y", "shape": [1]})


def test_a_contender_that_raises_is_wrong():
    def fail():
        raise RuntimeError("no kernel")

    row = compare([Contender("ours", lambda _: None), Contender("b", fail, check=fail)], None, "cpu", QUICK)
    assert entries(row)["b"] == {"name": "b", "failed": "RuntimeError: no kernel"}
    assert "median_us" in entries(row)["ours"]


def test_what_does_less_is_no_baseline():
    less = Contender("no mask", lambda _: None, counts=False)
    row = compare([Contender("ours", lambda _: None), less], None, "cpu", QUICK)
    assert "median_us" in entries(row)["no mask"]
    assert "ratio" not in row


# --- Contenders ------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["masked_glu", "masked_act"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_rows", [1, 3])
def test_all_contenders_are_right(op, dtype, mask_rows):
    case = activations.Case(op, 12, 40, mask_rows, dtype, "cpu", "silu")
    assert [c.check() for c in case.contenders("forward")] == [None] * 3


def test_contenders_with_a_down_projection_are_right():
    case = activations.Case("masked_glu", 12, 40, 1, torch.float32, "cpu", "silu", hidden=16)
    contenders = case.contenders("forward+backward")
    assert {"ours + down projection", "weight masking"} <= {c.name for c in contenders}
    assert [c.check() for c in contenders] == [None] * len(contenders)


class Scaled(torch.autograd.Function):
    """Identity whose gradient is 0.1 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def test_small_errors_are_found():
    case = activations.Case("masked_glu", 12, 40, 1, torch.float32, "cpu", "silu")
    gate, up = case.inputs
    leaves = [gate, up, case.mask]
    for place, (g, u, m) in {
        "output": (gate, up * 1.001, case.mask),
        "gate gradient": (Scaled.apply(gate), up, case.mask),
        "up gradient": (gate, Scaled.apply(up), case.mask),
        "mask gradient": (gate, up, Scaled.apply(case.mask)),
    }.items():
        message = case._check(lambda g=g, u=u, m=m: activations.ours([g, u], m, "silu"), leaves)
        assert message is not None, place
        assert message.startswith(f"{place}: relative error"), message


def test_checking_in_blocks_changes_nothing(monkeypatch):
    monkeypatch.setattr(activations, "CHECKED_AT_ONCE", 100)  # 2 tokens of 40 at a time, over 3 mask rows
    case = activations.Case("masked_glu", 15, 40, 3, torch.float32, "cpu", "silu")
    assert [c.check() for c in case.contenders("forward")] == [None] * 3


def test_bytes_that_must_move():
    glu = activations.Case("masked_glu", 10, 8, 2, torch.bfloat16, "cpu", "silu")
    assert glu.bytes("forward") == 3 * 10 * 8 * 2 + 2 * 8 * 4
    assert glu.bytes("backward") == 5 * 10 * 8 * 2 + 2 * (2 * 8 * 4)
    assert glu.bytes("forward+backward") == glu.bytes("forward") + glu.bytes("backward")
    act = activations.Case("masked_act", 10, 8, 1, torch.float32, "cpu", "gelu_tanh")
    assert act.bytes("forward") == 2 * 10 * 8 * 4 + 8 * 4


@pytest.mark.parametrize("mode", select.MODES)
def test_selection_is_checked(mode):
    contenders, _, scores = select.problem(3, 1000, "cpu", mode)
    assert [c.check() for c in contenders] == [None, None]
    options = {"budget": 30} if mode == "budget" else {"threshold": 0.15}

    def off_by_one(scores, **options):
        indptr, indices, gains = select.composition(scores, **options)
        return indptr, indices + 1, gains

    assert select._check(off_by_one, scores, options) == "indices differ from the reference"


@pytest.mark.parametrize("which", ["forward", "forward+backward"])
def test_launching_runs_what_it_says(which):
    """On the CPU, where its times mean something else."""
    row = launch.measured(which, "cpu", QUICK, "aot_eager")
    assert list(entries(row)) == ["ours", "eager", "torch.compile"]
    assert all("median_us" in entry for entry in row["contenders"])


@pytest.mark.skipif(stub_gpu.why_not() is not None, reason=str(stub_gpu.why_not()))
def test_launching_on_a_stub_makes_rows():
    found = {about["pass"]: find() for about, find in launch.cases("cpu", QUICK) if about["stub"]}
    assert list(found) == ["forward", "forward+backward"]
    assert all(list(entries(row)) == ["ours", "eager"] for row in found.values())


# --- Compiled kernels ------------------------------------------------------------------------

PTX = """
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mad.wide.s32 	%rd2, %r1, 4, %rd1;
	mad.wide.s32 	%rd3, %r2, 8, %rd1;
	@%p1 ld.global.b64 { %rd9 }, [ %rd3 + 0 ];
	@%p1 ld.global.v4.b32 { %r4, %r5, %r6, %r7 }, [ %rd2 + 0 ];
$L__BB0_2:                              // %.lr.ph
                                        // =>This Inner Loop Header: Depth=1
	mov.b64 	%rd4, %rd2;
	ld.global.b32 	%r8, [%rd4];
	@%p2 bra 	$L__BB0_2;
$L__BB0_3:
	st.global.v2.b32 [ %rd4 + 0 ], { %r4, %r5 };
"""


def test_accesses_in_ptx():
    found = [(a.kind, a.width, a.loop is not None, a.uniform) for a in assembly.ptx_accesses(PTX)]
    assert found == [
        ("load", 8, False, True), ("load", 16, False, False), ("load", 4, True, False),
        ("store", 8, False, False),
    ]  # fmt: skip
    assert assembly.bytes_in_loops(assembly.ptx_accesses(PTX)) == (4, 24)


AMD = """
	v_mov_b32_e32 v9, 0
	global_load_dwordx4 v[0:3], v[4:5], off
.LBB0_4:                                ; %.critedge
                                        ;   in Loop: Header=BB0_5 Depth=1
	global_store_short v[6:7], v2, off
.LBB0_5:                                ; =>This Inner Loop Header: Depth=1
	global_load_dwordx2 v[20:21], v9, s[0:1]
	global_load_dwordx2 v[22:23], v8, s[0:1]
; %bb.6:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	global_store_dword v[6:7], v2, off
"""


def test_accesses_in_amd_assembly():
    assert assembly.amd_accesses(AMD) == [
        assembly.Access("load", 16, None, False), assembly.Access("store", 2, "BB0_5", False),
        assembly.Access("load", 8, "BB0_5", True), assembly.Access("load", 8, "BB0_5", False),
        assembly.Access("store", 4, None, False),
    ]  # fmt: skip


def test_of_an_unrolled_loop_one_turn_counts():
    turns = [assembly.Access("load", 16, loop, False) for loop in ["BB0_1"] * 4 + ["BB0_7"]]
    assert assembly.bytes_in_loops(turns) == (16, 0)
    two_loops = [
        assembly.Access("load", width, loop, False) for width, loop in ((16, "a"), (8, "b"), (16, "b"))
    ]
    assert assembly.bytes_in_loops(two_loops, 2) == (40, 0)
    assert assembly.bytes_in_loops([*turns, turns[-1]], 2) == (96, 0)


def test_occupancy():
    assert DEVICES["90"].occupancy(128, 32, 0) == (1.0, "threads")
    assert DEVICES["90"].occupancy(128, 64, 0) == (0.5, "registers")
    assert DEVICES["80"].occupancy(256, 32, 81 * 1024) == (0.25, "shared memory")
    assert DEVICES["gfx942"].occupancy(256, 128, 0) == (0.5, "registers")


def test_rules_are_enforced():
    static = pytest.importorskip("bench.static.table", reason="triton is not installed")
    good = {"kernel": "backward silu split, chunks", "dtype": "bf16", "target": "90", "spilled": 0,
            "bytes": [10, 8], "budget": [10, 8], "instructions": 26, "xu": 2}  # fmt: skip
    assert static.violations(good) == []
    assert "spills 16 bytes" in static.violations(good | {"spilled": 16})[0]
    for moved in (8, 12):  # less: not all of it in accesses of 16 bytes
        assert (
            f"moves {moved} bytes per element in the loop"
            in static.violations(good | {"bytes": [moved, 8]})[0]
        )
    assert "26.5 instructions per element" in static.violations(good | {"instructions": 26.5})[0]
    assert "4 xu per element" in static.violations(good | {"xu": 4})[0]
    elsewhere = {"kernel": "backward silu split, row ids, chunks"}, {"target": "100"}, {"dtype": "fp16"}
    assert not any(static.violations(good | {"instructions": 30} | other) for other in elsewhere)
    assert static.violations(good | {"bytes": [10, 80], "budget": [10, None]}) == []
