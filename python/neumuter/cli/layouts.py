"""``--layout auto``: what ``neumuter plan`` finds for the GPUs that there are."""

import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from neumuter.cli.common import console
from neumuter.cli.processes import Layout, count_processes, is_first


class Chosen(NamedTuple):
    """A layout, how often the samples of a step are halved before they fit, and whether to recompute."""

    layout: Layout
    halvings: int
    recompute: bool


def choose_layout(
    layout: Layout,
    model: str,
    dtype: str,
    batch_size: int,
    tokens: int,
    recompute: bool,
    quantize: bool = False,
) -> Chosen:
    """Choose the layout where it is auto: the one whose command ``neumuter plan`` prints for these GPUs.

    Args:
        batch_size: samples of each kind in a step. If they fit in no layout, fewer go through the model at a
            time, and a line says so: what a step computes does not depend on the memory that is free.
        tokens: of a sample.
        recompute: whether activations are recomputed in any case.
        quantize: whether weights will be quantised while they load. Those that are, are never split.

    Raises:
        ValueError: none fits, or ``neumuter.training.plan`` cannot plan the model.
    """
    asked = Chosen(layout, 0, recompute)
    if layout is not Layout.auto:
        return asked
    import torch

    if count_processes() == 1 or not torch.cuda.is_available() or quantize:
        return asked._replace(layout=Layout.ddp)
    from neumuter.cli.arguments import read_config
    from neumuter.models.pieces import SMALLER
    from neumuter.models.quantised import is_quantised
    from neumuter.training.processes import agree

    config, count = read_config(model), count_processes()
    if is_quantised(config):
        return asked._replace(layout=Layout.ddp)
    wanted = (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    free = _find_free()
    machine = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    given = (config, free, count, batch_size, tokens, wanted, machine, recompute, _find_card())
    # The first process plans for all, because this takes as long as all the rest.
    found = agree(_run_apart(_find, *given) if is_first() else None)
    if found is None:
        raise ValueError(
            f"--layout auto finds no layout that fits into the {free / 1e9:.3g} GB free on each GPU: take "
            "a smaller --max-length, or more GPUs"
        )
    name, fitting, recompute = found
    halvings = math.ceil(math.log2(batch_size / fitting))
    if halvings:
        console.print(
            f"No layout fits if {batch_size} texts of each kind go through the model at once: "
            f"{SMALLER % 2**halvings}",
            soft_wrap=True,
        )
    return Chosen(Layout(name), halvings, recompute)


def _find_free() -> int:
    """The bytes that are free on every GPU."""
    import torch
    import torch.distributed as dist

    free = torch.tensor(torch.cuda.mem_get_info()[0])
    dist.all_reduce(free, dist.ReduceOp.MIN)
    return int(free)


def _find_card() -> str:
    """The card of the data sheets that the GPUs are; if they are none of these, the one that is usual."""
    import torch

    from neumuter.training.pace import CARD, CARDS

    return next((card for card in CARDS if card in torch.cuda.get_device_name()), CARD)


def _find(
    config: Any,
    memory: int,
    count: int,
    batch: int,
    tokens: int,
    dtype: Any,
    machine: int,
    recompute: bool,
    card: str,
) -> tuple[str, int, bool] | None:
    """The layout, its batch size, and whether to recompute; None if nothing fits."""
    from neumuter.training.plan import LAYOUTS, find_fitting

    found = find_fitting(config, memory, count, batch, tokens, dtype, machine, recompute, True, card)
    return None if found.layout is None else (LAYOUTS[found.layout], found.batch, found.recompute)


def _run_apart(function: Any, *given: Any) -> Any:
    """Run a function in a process of its own: a trace needs a process group of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        return apart.submit(function, *given).result()
