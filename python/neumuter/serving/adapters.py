"""Mute sets as PEFT adapters: the weights stay as they are, and whatever loads adapters mutes the model.

Two forms. IA³ (Liu et al. 2022, *Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning*) multiplies the input of a projection by a vector, which is what muting does. LoRA (Hu
et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*) adds B·A to a weight W [d, F]. Gains g on
k neurons add W·diag(g − 1), of rank k at most: row i of A [k, F] is 1 at the i-th muted neuron f and 0
elsewhere, column i of B [d, k] is (g_f − 1)·W[:, f].
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from neumuter.files import PathLike, new_folder
from neumuter.models.families import input_device, unwrapped
from neumuter.models.ffn import FFN
from neumuter.models.modes import without_dropout
from neumuter.models.sharing import Sharing
from neumuter.mutes.matching import matching_ffns
from neumuter.mutes.mute_set import MutedLayer, MuteSet, MuteSource, load_mutes
from neumuter.serving.fold import FOLDABLE
from neumuter.serving.live import mute

# The largest error of a projection with its adapter, as a share of what the projection gives: rounding.
MAX_ERROR = 0.05
# The ranks of vLLM's LoRAConfig; its newer versions have 1 as well.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
IA3_NOTE = "load it with peft.PeftModel.from_pretrained"
LORA_NOTE = (
    f"{IA3_NOTE}. Not for llama.cpp, whose converter reads it wrongly without a word: use --to gguf-lora. "
    "For vLLM use --to vllm-lora"
)
# With all slots taken, vLLM on a CPU answers requests without an adapter by somebody's adapter. With other
# target modules than those of the adapter, it serves the untouched model. It says neither.
VLLM_NOTE = (
    "vllm serve MODEL --enable-lora --max-lora-rank {rank} --lora-target-modules {targets} --max-loras 2 "
    "--lora-modules NAME={out}\n"
    "--max-loras: one more than adapters, or vLLM may answer requests without an adapter by an adapter. "
    "Other target modules would serve MODEL untouched, in silence: before you go live, ask NAME for a text "
    "that it must not know (neumuter evaluate --server)"
)


@dataclass(frozen=True)
class Exported:
    """An adapter that was written.

    Attributes:
        path: its folder.
        kind: "ia3" or "lora".
        note: what to load it with.
    """

    path: Path
    kind: str
    note: str


def export_ia3(model: nn.Module, mutes: MuteSource, out: PathLike) -> Exported:
    """Write a mute set as an IA³ adapter.

    Each down projection with muted neurons gets a vector of float32 [1, F]: the gains, and 1 elsewhere. With
    bitsandbytes, the IA³ layers of PEFT 0.21 need torch.autocast in bfloat16 and float16.

    Before ``out`` appears, PEFT loads the adapter on a copy of the model, which shares its weights. There
    each projection must compute what it computes with muted neurons.

    Args:
        model: the model that the set was made for, neither attached nor muted; it stays as it is.
        mutes: a ``MuteSet``, or the path of a mute file.
        out: a folder that does not exist or is empty; it is written whole or not at all.

    Raises:
        ValueError: the model has experts with muted neurons, or adapters; it is sharded or offloaded; or PEFT
            cannot take the adapter: it puts it elsewhere, or the model does not call a down projection.
        MuteMismatchError: the set was made for another model.
        RuntimeError: the model is attached or muted.
        FileExistsError: something is in ``out``.
        BlockingIOError: another process is writing ``out``.
        ImportError: the package peft is not installed.
    """
    peft = _import_peft()
    mutes = load_mutes(mutes)
    ffns = _find_down_projections(model, mutes)
    tensors = {}
    for path, ffn in ffns.items():
        layer = mutes.layers[ffn.path]
        gains = torch.ones(1, ffn.width)
        gains[0, layer.indices.long()] = layer.gains
        tensors[f"{path}.ia3_l"] = gains
    config = peft.IA3Config(**_common_options(model, ffns))
    # PEFT would make sets of lists that its constructor gets.
    config.target_modules = config.feedforward_modules = list(ffns)
    return _write(model, mutes, ffns, out, config, tensors, IA3_NOTE)


def export_lora(model: nn.Module, mutes: MuteSource, out: PathLike, one_rank: bool = False) -> Exported:
    """Write a mute set as a LoRA adapter.

    Merging the adapter is folding the mute set; unmerged, it takes off again what a muted neuron adds, up to
    rounding. Each down projection with k muted neurons gets A [k, F] and B [d, k], computed in float32 and
    rounded to the dtype of its weight. It is verified as that of ``export_ia3`` is. In many models with
    experts, PEFT 0.21 puts LoRA for any projection named down_proj on the experts: this is refused.

    Args:
        model: the model that the set was made for, neither attached nor muted; it stays as it is.
        mutes: a ``MuteSet``, or the path of a mute file.
        out: a folder that does not exist or is empty; it is written whole or not at all.
        one_rank: write the form that vLLM loads, which knows one rank for all layers: the lowest of
            ``VLLM_RANKS`` that is enough. The rest of A and B is zero, and ``note`` has the flags of ``vllm
            serve``.

    Raises:
        ValueError: the weights of a down projection are quantised or offloaded; with ``one_rank``, one of
            them has more muted neurons than the highest rank; or what ``export_ia3`` raises, as all else.
    """
    peft = _import_peft()
    mutes = load_mutes(mutes)
    ffns = _find_down_projections(model, mutes)
    counts = {path: len(mutes.layers[ffn.path].indices) for path, ffn in ffns.items()}
    highest = max(counts, key=counts.__getitem__)
    rank = _find_rank(highest, counts[highest]) if one_rank else counts[highest]
    own = {} if one_rank else counts
    tensors = {}
    for path, ffn in ffns.items():
        factors = _factorise(path, ffn, mutes.layers[ffn.path], own.get(path, rank))
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = factors
    # PEFT and vLLM multiply B·A by alpha / r.
    ranks = {"r": rank, "lora_alpha": rank, "rank_pattern": own, "alpha_pattern": own}
    config = peft.LoraConfig(**ranks, **_common_options(model, ffns))
    config.target_modules = list(ffns)
    targets = " ".join(sorted({path.rpartition(".")[2] for path in ffns}))
    note = VLLM_NOTE.format(rank=rank, targets=targets, out=out) if one_rank else LORA_NOTE
    return _write(model, mutes, ffns, out, config, tensors, note)


@torch.no_grad()
def largest_difference(model: nn.Module, mutes: MuteSource, folder: PathLike) -> float:
    """Measure how far an export is from the model that is muted live.

    Both read two sequences of 16 random tokens, always the same, and compute in the dtype of ``model``. In
    bfloat16, rounding alone can make a tenth of what muting does: load the model in float32.

    Args:
        model: the model that the set was made for, neither attached nor muted.
        mutes: a ``MuteSet``, or the path of a mute file.
        folder: the export: an adapter, which PEFT loads on a deep copy of the model, or a checkpoint.

    Returns:
        The largest absolute difference between the logits; NaN if one of them is.

    Raises:
        ValueError: the model is offloaded, where PEFT loads nothing, or what ``neumuter.mute`` and PEFT
            raise.
        ImportError: the export is an adapter, and the package peft is not installed.
    """
    model = unwrapped(model)
    ids = random_tokens(model)
    if (Path(folder) / "adapter_config.json").exists():
        with _adapted(model, folder) as adapted:
            actual = cast(Any, adapted)(input_ids=ids).logits
    else:
        dtype = cast(Any, model).dtype
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        with without_dropout(exported := cast(Any, loaded).to(ids.device)):
            actual = exported(input_ids=ids).logits
    with mute(model, mutes), without_dropout(model):
        expected = model(input_ids=ids).logits
    difference: float = (actual.double() - expected.double()).abs().max().item()
    return difference


@torch.no_grad()
def effect(model: nn.Module, mutes: MuteSource) -> float:
    """Measure the largest absolute difference that muting makes to the logits, on the same random tokens."""
    model = unwrapped(model)
    ids = random_tokens(model)
    with without_dropout(model):
        plain = model(input_ids=ids).logits
        with mute(model, mutes):
            muted = model(input_ids=ids).logits
    difference: float = (muted.double() - plain.double()).abs().max().item()
    return difference


def random_tokens(model: nn.Module) -> Tensor:
    """Draw two sequences of 16 tokens of the model's vocabulary, int64 [2, 16], always the same."""
    vocabulary: int = cast(Any, model).get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    return ids.to(input_device(model))


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("exporting adapters needs the package peft: pip install peft") from error
    return peft


def _find_down_projections(model: nn.Module, mutes: MuteSet) -> dict[str, FFN]:
    """Find the FFNs with muted neurons, {path of the down projection: FFN}, in model order."""
    for path, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise ValueError(f"{path} has an adapter already; merge it into the model first")
        if _is_sharded(module):
            name = path or type(module).__name__
            raise ValueError(f"{name} is sharded; load the whole model in one process, and export there")
    ffns = {path: ffn for path, ffn in matching_ffns(model, mutes).items() if path in mutes.layers}
    found, sharing = {}, Sharing(model)
    for path, ffn in ffns.items():
        if not ffn.is_dense:
            raise ValueError(
                f"{path} holds experts, whose neurons no IA³ or LoRA adapter of PEFT can scale; fold the "
                "mute set, or use neumuter.mute on the live model"
            )
        if others := sharing.others(ffn.module, ffn.down_name):
            raise ValueError(
                f"{path} shares the weights of its down projection with {others[0]}, which would change "
                "with it when the adapter is merged; use neumuter.mute on the live model"
            )
        found[f"{path}.{ffn.layout.down}"] = ffn
    return found


def _is_sharded(module: nn.Module) -> bool:
    """Whether FSDP, tensor parallelism or DeepSpeed's ZeRO-3 has split it: each process would write."""
    parameters = module.parameters(recurse=False)
    split = any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in parameters)
    # The parameters of an FSDP module are whole after a forward pass.
    return split or isinstance(module, FSDPModule)


def _find_rank(path: str, count: int) -> int:
    """Find the lowest of ``VLLM_RANKS`` that is enough for the ``count`` muted neurons of ``path``."""
    if count > VLLM_RANKS[-1]:
        raise ValueError(
            f"one_rank: {path} has {count} muted neurons, and vLLM's highest rank is {VLLM_RANKS[-1]}; mute "
            "fewer neurons of that layer, or fold the mute set"
        )
    return next(rank for rank in VLLM_RANKS if rank >= count)


def _factorise(path: str, ffn: FFN, layer: MutedLayer, rank: int) -> tuple[Tensor, Tensor]:
    """Compute A [rank, F] and B [d, rank] of one down projection, on the CPU in its dtype."""
    weight = ffn.down_weight
    if weight is None or weight.dtype not in FOLDABLE:
        raise ValueError(
            f"{path} is quantised or offloaded: its weights, which a LoRA adapter is made of, cannot be "
            "read; dequantise the model and load it into memory, or use export_ia3 on the quantised one"
        )
    neurons = layer.indices.long()
    wide = torch.promote_types(weight.dtype, torch.float32)
    columns = weight[:, 0, neurons.to(weight.device)].cpu().to(wide) * (layer.gains.to(wide) - 1)
    down, up = weight.new_zeros(rank, ffn.width, device="cpu"), columns.new_zeros(len(columns), rank)
    down[torch.arange(len(neurons)), neurons] = 1
    up[:, : len(neurons)] = columns
    return down, up.to(weight.dtype)


def _common_options(model: nn.Module, ffns: Mapping[str, FFN]) -> dict[str, Any]:
    """Build the options that PEFT's configs of both kinds have."""
    return {
        "fan_in_fan_out": any(isinstance(ffn.down, Conv1D) for ffn in ffns.values()),
        "base_model_name_or_path": unwrapped(model).name_or_path,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }


def _write(
    model: nn.Module,
    mutes: MuteSet,
    ffns: Mapping[str, FFN],
    out: PathLike,
    config: Any,
    tensors: Mapping[str, Tensor],
    note: str,
) -> Exported:
    named = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    with new_folder(out) as temporary:
        config.save_pretrained(temporary)
        save_file(named, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        with _adapted(model, temporary) as adapted:
            _refuse_other_places(adapted, ffns)
            for path, ffn in ffns.items():
                _refuse_other_values(adapted.get_submodule(path), path, ffn, mutes.layers[ffn.path])
    return Exported(Path(out), config.peft_type.value.lower(), note)


# --- Verification: what PEFT makes of the files ------------------------------------------------


@contextmanager
def _adapted(model: nn.Module, folder: PathLike) -> Iterator[nn.Module]:
    """Context: a copy of the model with the adapter in ``folder``. They share their weights."""
    model = unwrapped(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "PEFT loads no adapter on an offloaded model, so none can be verified; load it into memory"
        )
    tensors = [*model.parameters(), *model.buffers()]
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    try:
        # PEFT freezes what it adapts, and draws first values that it then overwrites.
        with torch.random.fork_rng(devices=[]):
            peft_model = _import_peft().PeftModel.from_pretrained(twin, folder)
        with without_dropout(peft_model), torch.no_grad():
            yield peft_model.get_base_model()
    finally:
        for tensor in trained:
            tensor.requires_grad_(True)


def _refuse_other_places(adapted: nn.Module, ffns: Mapping[str, FFN]) -> None:
    """Raise ValueError unless the projections of ``ffns`` have the adapter, no others have, and all run."""
    found = {path for path, module in adapted.named_modules() if hasattr(module, "base_layer")}
    for path in sorted(found ^ ffns.keys()):
        raise _refusal(f"it adapts {path}" if path in found else f"it does not adapt {path}")
    called: set[str] = set()
    for path in {path for down, ffn in ffns.items() for path in (down, ffn.path)}:
        adapted.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: called.add(path))
    cast(Any, adapted)(input_ids=random_tokens(adapted), use_cache=False)
    for down, ffn in ffns.items():
        if ffn.path in called and down not in called:
            raise _refusal(f"{ffn.path} reads the weights of its down projection and does not call it")


def _refuse_other_values(module: nn.Module, path: str, ffn: FFN, layer: MutedLayer) -> None:
    """Raise ValueError unless an adapted projection gives what it gives for muted neurons, up to rounding."""
    gains, muted = torch.ones(ffn.width), torch.zeros(ffn.width)
    gains[layer.indices.long()], muted[layer.indices.long()] = layer.gains, 1
    noise = torch.randn(4, ffn.width, generator=torch.Generator().manual_seed(0))
    low = ffn.dtype in (torch.bfloat16, torch.float16)
    # Among all other neurons, few muted ones would be lost in rounding.
    for inputs in (noise * muted, noise * (1 - muted)):
        plain, scaled = (x.to(ffn.device, ffn.dtype) for x in (inputs, inputs * gains))
        with torch.autocast(ffn.device.type, ffn.dtype if low else None, enabled=low):
            actual, expected, size = (
                f(x).float() for f, x in ((module, plain), (ffn.down, scaled), (ffn.down, plain))
            )
        if not (actual - expected).norm() <= MAX_ERROR * (size.norm() + expected.norm()):
            raise _refusal(f"with it, {path} gives other values than with muted neurons")


def _refusal(reason: str) -> ValueError:
    return ValueError(
        f"PEFT {_import_peft().__version__} cannot take this adapter: {reason}; use another form of export, "
        "or fold the mute set"
    )
