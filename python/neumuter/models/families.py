"""Where the FFNs of a model are, found by structure: no code per model.

A module is an FFN if its children are an activation and the projections of an FFN: up and down; gate, up and
down; or one that makes gate and up together, and down. Sizes tell which is which. Experts are found by the
attributes of transformers' experts interface. ``register_family`` describes what this misses.
"""

import re
from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neumuter.models.ffn import ACTIVATION_NAMES, FFN, Experts, Layout, activation_name, features
from neumuter.types import check_model

REGISTERED: list[Layout] = []
# FFNs that call a function instead of an activation module, by class name, with what they call.
FUNCTIONAL = {
    name: (Layout(down="w2", up="w3", gate="w1"), "silu") for name in ("Lfm2MLP", "Lfm2MoeMLP", "Lfm3MLP")
}
# Experts outside of transformers' interface, by class name, with the name of their activation module.
MIXTURES = {
    "Llama4TextExperts": (Experts(transposed=True, seam="repeated_experts"), "act_fn"),
    "JetMoeMoE": (Experts("output_linear.weight", False, "routing_experts"), "activation"),
}
# Modules with these words in the names of their classes expand and contract as FFNs do, but are none.
OTHERS = ("Attention", "Mamba", "Mixer", "OutputProjection")
# What torch.compile and PEFT add to paths. A mute set is for the model with them and without.
ADDED_TO_PATHS = re.compile(r"\._orig_mod|\.base_layer|\.original_module|\.modules_to_save\.[^.]+")


def register_family(
    down: str,
    up: str | None = None,
    gate: str | None = None,
    gate_up: str | None = None,
    activation: str | None = None,
) -> None:
    """Describe an FFN that is not found by its structure: every module with children of these names is one.

    Args:
        down, up, gate: the names of the projections.
        gate_up: the name of one projection that makes both, the gate in the first half of its output.
        activation: the name of the activation module; leave it out if the model calls a function instead.

    Raises:
        ValueError: neither or both of up and gate_up are given, or gate is given with gate_up.
    """
    if (up is None) == (gate_up is None) or (gate and gate_up):
        raise ValueError("down needs up, or gate and up, or gate_up alone")
    REGISTERED.append(Layout(down, up, gate, gate_up, activation))


def _is_activation(module: nn.Module) -> bool:
    places = ("transformers.activations", "torch.nn.modules.activation")
    known = type(module) in ACTIVATION_NAMES or type(module).__module__ in places
    return known and not isinstance(module, nn.MultiheadAttention)


def infer_layout(module: nn.Module) -> Layout | None:
    """Find the Layout of a module that is an FFN by its children, else None."""
    children = dict(module.named_children())
    for layout in REGISTERED:
        if all(name in children for name in layout.names):
            return layout
    if type(module).__name__ in FUNCTIONAL:
        return FUNCTIONAL[type(module).__name__][0]
    # A mixer of tokens, as Mamba's.
    if any(isinstance(child, nn.modules.conv._ConvNd) for child in children.values()):
        return None
    linear = {name: size for name, child in children.items() if (size := features(child))}
    acting = [name for name, child in children.items() if _is_activation(child)]
    if len(acting) != 1:
        return None
    # The down projection comes last where sizes do not tell.
    for down in reversed(linear):
        width, hidden = linear[down]
        others = [name for name in linear if name != down]
        sizes = {linear[name] for name in others}
        if len(others) == 1 and sizes == {(hidden, width)}:
            return Layout(down, up=others[0], activation=acting[0])
        if len(others) == 1 and sizes == {(hidden, 2 * width)}:
            return Layout(down, gate_up=others[0], activation=acting[0])
        gates = [name for name in others if "gate" in name]
        if len(others) == 2 and sizes == {(hidden, width)} and len(gates) == 1 and "down" not in gates[0]:
            up = next(name for name in others if name != gates[0])
            return Layout(down, up=up, gate=gates[0], activation=acting[0])
    return None


EXPERTS = ("num_experts", "down_proj", "has_gate", "has_bias", "is_transposed", "is_concatenated")


def _is_experts(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in EXPERTS) and isinstance(module.down_proj, torch.Tensor)


def unwrapped(model: nn.Module) -> nn.Module:
    """Find the transformers model inside what PEFT, torch.compile and data parallelism put around it."""
    while True:
        outer: Any = model
        inner: nn.Module | None = getattr(outer, "_orig_mod", None)
        if inner is None and type(outer).__name__ in ("DistributedDataParallel", "DeepSpeedEngine"):
            inner = outer.module
        if inner is None and hasattr(outer, "get_base_model") and hasattr(outer, "peft_config"):
            inner = outer.get_base_model()
        if inner is None and type(outer).__name__ == "PeftMixedModel":
            inner = outer.base_model.model
        if inner is None:
            return model
        model = inner


def decoder_of(model: nn.Module) -> nn.Module:
    """Find the part of ``model`` that the text goes through: the decoder, or the model itself without one."""
    model = unwrapped(model)
    decoder = cast(Any, model).get_decoder() if hasattr(model, "get_decoder") else model
    # Some models call their head so.
    if isinstance(decoder, nn.Module) and features(decoder):
        decoder = getattr(model, "base_model", model)
    # Others name a decoder that they do not have.
    if decoder is model:
        decoder = next((child for child in model.children() if _takes_text(child)), model)
    return decoder if isinstance(decoder, nn.Module) else model


def _takes_text(module: nn.Module) -> bool:
    named = isinstance(module, PreTrainedModel) and module.main_input_name == "input_ids"
    return named and "text" in getattr(module, "input_modalities", "text")


def _outside(decoder: nn.Module) -> set[nn.Module]:
    """The modules in a decoder that texts do not go through: those of towers, and what PEFT replaces."""
    outside: set[nn.Module] = set()
    for module in decoder.modules():
        if isinstance(module, PreTrainedModel) and module is not decoder and not _takes_text(module):
            outside.update(module.modules())
        if type(module).__name__ == "ModulesToSaveWrapper":
            wrapper: Any = module
            parts = {None: wrapper.original_module, **wrapper.modules_to_save}
            used = None if wrapper.disable_adapters else wrapper.active_adapters[0]
            outside.update(m for name, part in parts.items() if name != used for m in part.modules())
    return outside


def find_ffns(model: nn.Module) -> list[FFN]:
    """Find all FFNs of ``model``, in model order, but those of a vision or audio tower.

    Raises:
        ValueError: there is none; or a module, which the message names, looks like an FFN or like experts
            but is not understood.
    """
    check_model(model)
    model = unwrapped(model)
    decoder = decoder_of(model)
    inside = set(decoder.modules()) - _outside(decoder)
    dtype = getattr(model, "dtype", torch.float32)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model; only causal ones can be masked"
        )
    parents: Counter[nn.Module | None] = Counter(
        child for module in model.modules() for child in set(module.children())
    )
    found: dict[str, tuple[nn.Module, Layout | Experts, str | None]] = {}
    # Experts in these are no FFNs, or those that were found.
    understood: set[nn.Module] = set()
    unknown: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if module not in inside:
            continue
        kind = type(module).__name__
        if kind in MIXTURES or any(word in kind for word in OTHERS):
            understood.update(module.modules())
        if kind in MIXTURES:
            experts, activation = MIXTURES[kind]
            found[path] = module, experts, activation_name(getattr(module, activation))
        elif _is_experts(module):
            plain = _gates_plainly(module) and activation_name(getattr(module, "act_fn", None))
            found[path] = module, Experts(), plain or None
        elif layout := infer_layout(module):
            acting = getattr(module, layout.activation) if layout.activation else None
            named = FUNCTIONAL.get(kind, (None, None))[1]
            # A mask at an activation that several FFNs share would mask them all.
            if layout.up and not layout.gate and parents[acting] > 1:
                acting = None
            found[path] = module, layout, named or activation_name(acting)
        elif not isinstance(module, nn.modules.conv._ConvNd):
            if module not in understood:
                _refuse_unknown_experts(path, module)
            if _looks_like_ffn(module):
                unknown[path] = module
    # A module that contains an FFN is none, even if it has a gate of its own, as some decoder layers do.
    outer = {path for path in found for other in found if other.startswith(f"{path}.")}
    kept = {path: parts for path, parts in found.items() if path not in outer}
    for path, (module, form, _) in kept.items():
        if isinstance(form, Layout) and parents[getattr(module, form.down)] > 1:
            raise ValueError(
                f"{path}.{form.down} is a part of another module, too, so a mask there would reach both; "
                "give each a module of its own (they may share the weight)"
            )
    for path, module in unknown.items():
        if not any(other.startswith(f"{path}.") for other in kept):
            raise ValueError(
                f"{path}, a {type(module).__name__}, looks like an FFN but has no activation among its "
                "children; describe it with neumuter.register_family(down=..., up=..., gate=...). Its "
                "projections are: "
                + ", ".join(name for name, child in module.named_children() if features(child))
            )
    if not kept:
        raise ValueError(
            f"no FFN found in {type(model).__name__}: no module has both an activation and the projections "
            "of an FFN among its children; describe its FFNs with neumuter.register_family(down=..., "
            "up=..., gate=..., activation=...). Modules with projections are: " + _classes(model)
        )
    return [
        FFN(ADDED_TO_PATHS.sub("", path), layer, *parts, dtype, ".base_layer" in path)
        for layer, (path, parts) in enumerate(kept.items())
    ]


def input_device(model: nn.Module) -> torch.device:
    """Find the device that token ids go to."""
    embeddings = cast(Any, unwrapped(model)).get_input_embeddings()
    weight: Tensor = embeddings.weight
    if not weight.is_meta:
        return weight.device
    # The weight is offloaded by Accelerate, whose hook knows where it is loaded to.
    hook = getattr(embeddings, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


def _looks_like_ffn(module: nn.Module) -> bool:
    """Whether its projections expand and then contract again, as an FFN's do."""
    sizes = [size for child in module.children() if (size := features(child))]
    if len(sizes) not in (2, 3) or any(word in type(module).__name__ for word in OTHERS):
        return False
    for width, hidden in sizes[1:]:
        others = {size for size in sizes if size != (width, hidden)}
        if width > hidden and others in ({(hidden, width)}, {(hidden, 2 * width)}):
            return True
    return False


def _gates_plainly(experts: nn.Module) -> bool:
    """Whether act_fn(gate)·up is all that happens between the projections."""
    apply = getattr(type(experts), "_apply_gate", None)
    return not experts.has_gate or getattr(apply, "__name__", "") == "_default_apply_gate"


def _refuse_unknown_experts(path: str, module: nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        # Square ones are the blocks of a block-diagonal matrix.
        if parameter.dim() == 3 and 1 < min(parameter.shape[1:]) < max(parameter.shape[1:]):
            raise ValueError(
                f"{path}, a {type(module).__name__}, holds the 3-dimensional weight {name}, "
                f"{tuple(parameter.shape)}, as experts do, but not through transformers' experts interface "
                "(use_experts_implementation) as version 5.10 and newer have it; its neurons cannot be masked"
            )


def _classes(model: nn.Module) -> str:
    names = {type(m).__name__ for m in model.modules() if any(features(c) for c in m.children())}
    return ", ".join(sorted(names)[:12]) or "(it has no linear projections)"
