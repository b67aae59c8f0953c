"""Small models as GGUF files, their FFNs in any type of llama.cpp's."""

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from gguf.constants import GGML_QUANT_SIZES
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from neumuter.models.families import find_ffns
from neumuter.serving.fold_gguf import SCALES
from tests.models import build

# {family of tests/models.py: (llama.cpp's architecture, transformers' name of it)}
ARCHITECTURES = {
    "llama": ("llama", "llama"), "mistral": ("llama", "llama"), "qwen2": ("qwen2", "qwen2"),
    "qwen3": ("qwen3", "qwen3"), "gemma2": ("gemma2", "gemma2"), "gemma3": ("gemma3", "gemma3"),
    "phi3": ("phi3", "phi3"), "qwen2_moe": ("qwen2moe", "qwen2_moe"), "qwen3_moe": ("qwen3moe", "qwen3_moe"),
    "starcoder2": ("starcoder2", "starcoder2"),
}  # fmt: skip
EXPERT_WIDTHS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
# Larger than the number of any special token in the configs' defaults.
VOCABULARY = 300_000


def encode(weights, kind):
    """``weights``, float32 [..., inputs], in a type; random blocks where gguf has no quantiser for it."""
    number = GGMLQuantizationType[kind]
    try:
        return quantize(weights, number)
    except NotImplementedError:
        pass
    block, size = GGML_QUANT_SIZES[number]
    generator = np.random.default_rng(weights.size)
    shape = (*weights.shape[:-1], weights.shape[-1] // block, size)
    data = generator.integers(0, 256, shape, dtype=np.uint8)
    if kind in SCALES:
        at, count = SCALES[kind]
        scales = generator.uniform(0.001, 0.004, (*shape[:-1], count)).astype(np.float16)
        data[..., at : at + 2 * count] = scales.view(np.uint8)
    return data.reshape(*weights.shape[:-1], -1)


def write_gguf(path, name, model, up="F32", down="F32", more=()):
    """Write a ``model`` of the family ``name``: its FFNs in the types ``up`` and ``down``.

    more: (name, array) of further tensors, or (name, integer) of metadata.
    """
    architecture, key = ARCHITECTURES[name]
    writer, config = GGUFWriter(path, architecture), model.config
    for field, attribute in (GGUF_CONFIG_MAPPING[key] | EXPERT_WIDTHS).items():
        value = getattr(config, attribute or "", None)
        if isinstance(value, int):
            writer.add_uint32(f"{architecture}.{field}", VOCABULARY if field == "vocab_size" else value)
    state = model.state_dict()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    for tensor, parameter in get_gguf_hf_weights_map(model, processor, architecture).items():
        weights = state[parameter].float().numpy()
        if "_exps" in tensor and "gate_up" in parameter:
            half = weights.shape[1] // 2
            weights = weights[:, :half] if "gate" in tensor else weights[:, half:]
        kind = up if "ffn_up" in tensor else down if "ffn_down" in tensor else "F32"
        kind = kind if weights.ndim > 1 else "F32"
        # transformers names the weights of experts without a suffix.
        tensor = tensor if tensor.endswith(("weight", "bias")) else f"{tensor}.weight"
        data = encode(np.ascontiguousarray(weights), kind)
        writer.add_tensor(tensor, data, raw_dtype=GGMLQuantizationType[kind])
    for what, value in more:
        writer.add_uint32(what, value) if isinstance(value, int) else writer.add_tensor(what, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(path):
    """{name: gguf's ReaderTensor}"""
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


@torch.no_grad()
def load_ffns(model, path):
    """Overwrite the weights of all up and down projections with those in the file, dequantised."""
    found = {n: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for n, t in tensors(path).items()}
    for layer, ffn in enumerate(find_ffns(model)):
        block = int(next(part for part in ffn.path.split(".") if part.isdigit()))
        suffix = "_exps" if not ffn.is_dense else "_shexp" if "shared" in ffn.path else ""
        assert layer >= block
        up, down = (found[f"blk.{block}.ffn_{which}{suffix}.weight"] for which in ("up", "down"))
        if not ffn.is_dense:
            ffn.module.gate_up_proj[:, up.shape[1] :] = up
            ffn.module.down_proj[:] = down
        else:
            getattr(ffn.module, ffn.layout.up or ffn.layout.gate_up).weight[:] = up
            ffn.down.weight[:] = down
    return model


def quantised(path, name, up="F32", down="F32", **changes):
    """Write the family ``name`` with random weights; returns the model of the file's own weights."""
    model = build(name, **changes)
    write_gguf(path, name, model, up, down)
    return load_ffns(model, path)
