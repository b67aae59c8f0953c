"""How a model is laid out over the processes of a group: a copy in each, or split by transformers."""

from typing import Any

import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from neumuter.models.families import find_ffns
from neumuter.models.quantised import refuse_quantised


def check_layout(layout: str, network: nn.Module, processes: int) -> None:
    """Raise ValueError, before anything is loaded, if a model cannot be laid out so.

    Args:
        layout: "ddp", a copy in each process; "fsdp", FSDP2: layers are gathered when they run; "tp", tensor
            parallelism: each process computes its part of each layer.
        network: the model on the meta device.
        processes: how many there are.

    Raises:
        ImportError: the installed transformers cannot split models so.
    """
    model: Any = network
    if processes > 1:
        refuse_quantised(model.config, split=layout != "ddp")
    if layout == "ddp":
        return
    make_distributed_config(layout, processes)
    if not getattr(model, f"{layout}_plan"):
        raise ValueError(f"transformers has no plan for the layout {layout!r} of {type(model).__name__}")
    if layout == "fsdp":
        return
    config = model.config.get_text_config()
    sizes = {"heads": config.num_attention_heads}
    sizes["key-value heads"] = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for ffn in find_ffns(model):
        if not ffn.can_be_split:
            raise ValueError(
                f"the layout 'tp' would split the experts of {ffn.path}, and masks cannot follow: use 'fsdp'"
            )
        sizes[f"neurons of {ffn.path}"] = ffn.width // ffn.experts
    for what, size in sizes.items():
        if size % processes:
            raise ValueError(
                f"the layout 'tp' splits evenly, but {size} {what} cannot be divided by {processes} processes"
            )


def make_distributed_config(layout: str, processes: int) -> Any:
    """Make what transformers' from_pretrained takes to split a model over processes."""
    size: Any = {f"{layout}_size": processes}
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        return DistributedConfig(**size)
    except (ImportError, TypeError):
        raise ImportError(
            f"the layout {layout!r} needs transformers.distributed.DistributedConfig({layout}_size=...), "
            f"which transformers {transformers.__version__} does not have; install a newer one"
        ) from None


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
