"""How a model is laid out over the processes of a group: a copy in each, or split by transformers."""

import os
import re
from typing import Any

import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from neumuter.models.families import find_ffns
from neumuter.models.quantised import refuse_quantised
from neumuter.models.recomputation import decoder_layers


def check_layout(layout: str, network: nn.Module, processes: int, local: int | None = None) -> None:
    """Raise ValueError, before anything is loaded, if a model cannot be laid out so.

    Args:
        layout: "ddp", a copy in each process; "fsdp", FSDP2: layers are gathered when they run; "tp", tensor
            parallelism: each process computes its part of each layer; "fsdp+tp", both: see ``divide``.
        network: the model on the meta device.
        processes: how many there are.
        local: see ``divide``.

    Raises:
        ImportError: the installed transformers cannot split models so.
    """
    model: Any = network
    if processes > 1:
        refuse_quantised(model.config, split=layout != "ddp")
    if layout == "ddp":
        return
    make_distributed_config(layout, processes, model, local)
    sizes_of = divide(layout, processes, local)
    for part in sizes_of:
        if not getattr(model, f"{part}_plan"):
            raise ValueError(f"transformers has no plan for the layout {part!r} of {type(model).__name__}")
    if "tp" not in sizes_of:
        return
    together = sizes_of["tp"]
    config = model.config.get_text_config()
    if any(getattr(config, "activation_sparsity_pattern", None) or ()):
        raise ValueError(
            f"the layout {layout!r} would split the neurons of {type(model).__name__}, but which of them are "
            "active depends on all (activation_sparsity_pattern): use 'fsdp'"
        )
    sizes = {"heads": config.num_attention_heads}
    sizes["key-value heads"] = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for ffn in find_ffns(model):
        if not ffn.can_be_split:
            raise ValueError(
                f"the layout {layout!r} would split the experts of {ffn.path}, and masks cannot follow: use "
                "'fsdp'"
            )
        sizes[f"neurons of {ffn.path}"] = ffn.width // ffn.experts
    for what, size in sizes.items():
        if size % together:
            raise ValueError(
                f"the layout {layout!r} splits evenly, but {size} {what} cannot be divided by {together} "
                "processes"
            )


def divide(layout: str, processes: int, local: int | None = None) -> dict[str, int]:
    """Divide processes among what a layout splits the model by: {"fsdp" or "tp": number}.

    Of both together, tensor parallelism goes over those of a machine, or over half of them if there is one
    machine; FSDP2 goes over the rest.

    Args:
        local: the processes of each machine. Default: as a launcher says in LOCAL_WORLD_SIZE, else all.

    Raises:
        ValueError: there are too few processes, or they do not divide.
    """
    if layout != "fsdp+tp":
        return {layout: processes}
    local = local or int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    together = local if local < processes else processes // 2
    if together < 2 or processes % together:
        raise ValueError(
            f"the layout 'fsdp+tp' takes 4 processes or more, equally many on each machine; got {processes}, "
            f"of which a machine has {local}"
        )
    return {"fsdp": processes // together, "tp": together}


def make_distributed_config(layout: str, processes: int, network: nn.Module, local: int | None = None) -> Any:
    """Make what transformers' from_pretrained takes to split a model over processes; see ``divide``.

    Args:
        network: the model, which may be on the meta device. transformers' plan for FSDP2 may name layers that
            it does not have, and would gather the whole model at once; then its own are added.
    """
    sizes: Any = {f"{part}_size": number for part, number in divide(layout, processes, local).items()}
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        plan = _find_unplanned_layers(network) if "fsdp_size" in sizes else {}
        return DistributedConfig(**sizes | ({"fsdp_plan": plan} if plan else {}))
    except (ImportError, TypeError):
        raise ImportError(
            f"the layout {layout!r} needs transformers.distributed.DistributedConfig({'=..., '.join(sizes)}"
            f"=...), which transformers {transformers.__version__} does not have; install a newer one"
        ) from None


def _find_unplanned_layers(network: Any) -> dict[str, str]:
    """A plan for FSDP2 of the decoder's layers, if transformers' own one names none of them."""
    layers = {*decoder_layers(network)} - {network}
    names = {
        re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        for name, module in network.named_modules()
        if module in layers
    }
    known = getattr(network, "fsdp_plan", None) or {}
    return {} if names & known.keys() else dict.fromkeys(sorted(names), "free_full_weight")


def split(model: Any, config: Any) -> None:
    """Split a model on the meta device over the process group, on CPUs, as transformers does when it loads.

    Args:
        config: what ``make_distributed_config`` returns.
    """
    from transformers.distributed.utils import TransformersDeviceMesh

    sizes = (
        {"fsdp": config.fsdp_size, "tp": config.tp_size},
        {"efsdp": config.efsdp_size, "ep": config.ep_size},
    )
    meshes = [
        init_device_mesh("cpu", (1, 1, *found.values()), mesh_dim_names=("pp", "dp_replicate", *found))
        for found in sizes
    ]
    model.maybe_distribute_model(model, config, TransformersDeviceMesh(*meshes))
