"""Generation with mute sets: what one costs, and many in one batch against the ways that others have.

Llamas of the shapes of SmolLM2-135M, Llama 3.2 1B and Llama 3.1 8B with random weights, sets of 1 % of their
neurons. On a GPU, one set costs what it adds to single tokens, eagerly and in CUDA graphs.
"""

import copy
import dataclasses
import functools
import importlib.util
import itertools
import tempfile
from pathlib import Path

import torch

from bench.kernels.decode import captured
from bench.models import step
from bench.timing import Contender, compare
from neumuter.recipes import mute_random
from neumuter.serving.adapters import export_lora
from neumuter.serving.bank import MuteBank
from neumuter.serving.fold import fold
from neumuter.serving.live import mute
from neumuter.training.masked import attach

PROMPT, NEW, SHARE = 32, 16, 0.01
MORE = 4  # times as many rounds for the cost of one set
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SMALL = [("tiny", BFLOAT16, 1)]
OF_ONE = {
    "cpu": [("135M", FLOAT32, 1), ("135M", FLOAT32, 8), ("135M", BFLOAT16, 1), ("135M", BFLOAT16, 8),
            ("1B", BFLOAT16, 1)],
    "cuda": [],
}  # fmt: skip
# Of single tokens: models, rows of a batch, and how they are computed.
DECODED = {"cpu": ((), (), ()), "cuda": (("135M", "1B", "8B"), (1, 8, 64), ("eager", "CUDA graph"))}
DECODED_SMALL = (("tiny",), (2,), ("eager",))
ROWS = 16  # of a batch of many tenants
TENANTS = (1, 4, 16, 100, 1000)  # sets in memory, of which each row of a batch uses another
MOST_ADAPTERS = 16  # of PEFT's in memory


def cases(device, effort, small=False):
    """Yields (what a row is about, how it is measured)."""
    for shape, dtype, batch in SMALL if small else OF_ONE[device]:
        find = functools.partial(of_one, shape, dtype, batch, device, effort)
        yield _about(f"generation, {shape}, one set", batch, dtype), find
    build = functools.lru_cache(1)(lambda shape: step.build(shape, BFLOAT16, device)[0])
    shapes, rows, ways = DECODED_SMALL if small else DECODED[device]
    for shape, batch, way in itertools.product(shapes, rows, ways):
        about = _about(f"decoding, {shape}, {way}", batch, BFLOAT16, prompt=1, new=1)
        yield about, functools.partial(of_one_token, build, shape, batch, way, device, effort)
    shape = "tiny" if small else "135M"
    for tenants in TENANTS[:2] if small else TENANTS:
        about = _about(f"generation, {shape}, {tenants} tenants", ROWS, BFLOAT16)
        yield about, lambda tenants=tenants: of_many(build(shape), tenants, device, effort)


def _about(op, batch, dtype, prompt=PROMPT, new=NEW):
    name = str(dtype).removeprefix("torch.")
    return {"op": op, "pass": f"{new} tokens", "shape": [batch, prompt], "dtype": name}


def of_one_token(build, shape, batch, way, device, effort):
    """What one set, or a set for each row, costs a token of each row."""
    contenders = decoding(build(shape), batch, captured if way == "CUDA graph" else lambda work: work)
    more = dataclasses.replace(effort, least=MORE * effort.least)
    return _with_speed(compare(contenders, None, device, more, plain="untouched"), batch, 1)


def of_one(shape, dtype, batch, device, effort):
    """What one set costs."""
    model = step.build(shape, dtype, device)[0]
    more = dataclasses.replace(effort, least=MORE * effort.least)  # a percent is to be seen
    return _with_speed(compare(cost(model, batch), None, device, more, plain="untouched"), batch)


def of_many(model, tenants, device, effort):
    """What a batch of many tenants takes."""
    fewer = dataclasses.replace(effort, least=max(effort.least // 2, 2))
    with tempfile.TemporaryDirectory() as folder:
        return _with_speed(compare(many(model, tenants, Path(folder)), None, device, fewer), ROWS)


def _with_speed(row, batch, tokens=NEW):
    for entry in row["contenders"]:
        if "median_us" in entry:
            entry["tokens_per_s"] = batch * tokens / entry["median_us"] * 1e6
    return row


def cost(model, batch):
    """One set on a live model, in its weights, through a bank, and none."""
    (mutes,) = sets_of(model, 1)
    ids = prompts(model, batch)
    live, shared, plain = (step.sharing_weights(model) for _ in range(3))
    mute(live, mutes)
    folded = with_own_downs(model)
    mute(folded, mutes, how="fold")
    bank = bank_of(shared, [mutes])

    def through_bank(x):
        with bank.using("0"):
            return shared(input_ids=x).logits

    return [
        Contender("MuteBank", lambda _: generate(shared, ids, mute_sets="0"),
                  check=lambda: wrong(through_bank(ids), model, [mutes], ids)),
        Contender("untouched", lambda _: generate(plain, ids)),
        Contender("neumuter.mute", lambda _: generate(live, ids), counts=False,
                  check=lambda: wrong(live(input_ids=ids).logits, model, [mutes], ids)),
        Contender("neumuter.mute, folded", lambda _: generate(folded, ids), counts=False,
                  check=lambda: wrong(folded(input_ids=ids).logits, model, [mutes], ids)),
    ]  # fmt: skip


@torch.no_grad()
def decoding(model, batch, way):
    """A token of each row, without a cache: with a set per row, one set live and in the weights, and none.

    way: what is made of a function to time it.
    """
    sets = sets_of(model, min(batch, ROWS))
    ids = prompts(model, batch)[:, :1].contiguous()
    live, shared, plain, folded = (*(step.sharing_weights(model) for _ in range(3)), with_own_downs(model))
    mute(live, sets[0])
    mute(folded, sets[0], how="fold")
    context = bank_of(shared, sets, batch).using([str(row) for row in range(batch)])
    # For as long as the contenders are there: a batch writes its gains once, and then computes many tokens.
    context.__enter__()
    by_row = [sets[row % len(sets)] for row in range(batch)]

    def contender(name, muted, by_row, counts=True):
        found = {}
        run = way(lambda: found.update(muted(input_ids=ids, use_cache=False)))

        def check():
            run()
            return wrong(found["logits"], model, by_row, ids) if by_row else None

        return Contender(name, lambda _, context=context: run(), check=check, counts=counts)

    return [
        contender("MuteBank, a set per row", shared, by_row),
        contender("untouched", plain, None),
        contender("neumuter.mute", live, sets[:1], counts=False),
        contender("neumuter.mute, folded", folded, sets[:1], counts=False),
    ]


def many(model, tenants, folder):
    """A batch whose rows use the sets of different tenants: mixed, one batch per set, and PEFT's LoRA."""
    used = min(tenants, ROWS)
    sets = sets_of(model, used)
    ids = prompts(model, ROWS)
    names = [str(row % used) for row in range(ROWS)]
    mixed = step.sharing_weights(model)
    bank = bank_of(mixed, sets, tenants)

    def logits(x):
        with bank.using(names):
            return mixed(input_ids=x).logits

    def apart():
        for number in range(used):
            generate(mixed, ids[number::used], mute_sets=str(number))

    by_row = [sets[row % used] for row in range(ROWS)]
    hooked = with_dense_gains(step.sharing_weights(model), by_row)
    found = [
        Contender("MuteBank, mixed", lambda _: generate(mixed, ids, mute_sets=names),
                  check=lambda: wrong(logits(ids), model, by_row, ids)),
        Contender("dense gains by a hook", lambda _: generate(hooked, ids),
                  check=lambda: wrong(hooked(input_ids=ids).logits, model, by_row, ids)),
        Contender("one set per batch", lambda _: apart(), counts=False),
    ]  # fmt: skip
    if tenants <= MOST_ADAPTERS and importlib.util.find_spec("peft"):
        adapted = _adapted(model, sets, folder)

        def adapted_logits(x):
            return adapted(input_ids=x, adapter_names=names).logits

        found.append(
            Contender("PEFT LoRA, mixed", lambda _: generate(adapted, ids, adapter_names=names),
                      check=lambda: wrong(adapted_logits(ids), model, by_row, ids))
        )  # fmt: skip
    return found


def _adapted(model, sets, folder):
    import peft

    for number, mutes in enumerate(sets):
        export_lora(model, mutes, folder / str(number))
    adapted = peft.PeftModel.from_pretrained(step.sharing_weights(model), folder / "0", adapter_name="0")
    for number in range(1, len(sets)):
        adapted.load_adapter(folder / str(number), adapter_name=str(number))
    return adapted.eval()


def with_dense_gains(model, by_row):
    """The plain way: at every down projection, a row of gains for each row of the batch."""
    for path in by_row[0].widths:
        gains = torch.ones(len(by_row), by_row[0].widths[path], device=model.device, dtype=model.dtype)
        for row, mutes in enumerate(by_row):
            if layer := mutes.layers.get(path):
                gains[row, layer.indices.long()] = layer.gains.to(gains)
        down = model.get_submodule(path).down_proj
        down.register_forward_pre_hook(lambda _, given, gains=gains: (given[0] * gains[:, None],))
    return model


def with_own_downs(model):
    """A copy of the modules around the same weights, but for the down projections."""
    shared = {id(p): p for name, p in model.named_parameters() if "down_proj" not in name}
    return copy.deepcopy(model, shared)


def sets_of(model, count):
    with attach(model, start_layer=0) as masked:
        return [mute_random(masked, SHARE, seed) for seed in range(count)]


def bank_of(model, sets, count=None):
    """A bank of ``count`` tenants who have these sets in turn."""
    count = count or len(sets)
    bank = MuteBank(model, required=False)
    for number in range(count):
        bank.add(str(number), sets[number % len(sets)])
    return bank


def prompts(model, batch):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, model.config.vocab_size, (batch, PROMPT), generator=generator).to(model.device)


def generate(model, ids, **options):
    """NEW tokens for each row, greedily."""
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW,
        do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip


@torch.no_grad()
def wrong(logits, model, by_row, ids):
    """How far ``logits`` are from those of copies with the sets of the rows folded in, against what folding
    does to them; None: near enough."""
    expected, plain = logits.clone(), model(input_ids=ids).logits
    for mutes in {id(mutes): mutes for mutes in by_row}.values():
        folded = with_own_downs(model)
        fold(folded, mutes)
        chosen = [row for row in range(len(ids)) if by_row[row % len(by_row)] is mutes]
        expected[chosen] = folded(input_ids=ids[chosen]).logits
    error, effect = ((x.float() - expected.float()).norm().item() for x in (logits, plain))
    return None if error <= 0.3 * effect else f"logits: error {error:.1e}, the mutes make {effect:.1e}"
