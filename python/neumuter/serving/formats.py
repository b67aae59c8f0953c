"""Quantised projections in safetensors checkpoints: how each format stores weights, in plain PyTorch.

A projection makes N outputs of K inputs. Every format that is known has scales of its own for each output:

- GPTQ: qweight int32 [K·bits/32, N], qzeros int32 [G, N·bits/32], scales [G, N], g_idx int32 [K]. The zero
  points are stored minus 1, but not in the format gptq_v2.
- AWQ (gemm): qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N], eight outputs in the order ORDER.
- compressed-tensors: weight int8 or float8 [N, K], or weight_packed int32 [N, K·bits/32] of values from
  2^(bits − 1) on; weight_scale [N, G], weight_zero_point, weight_g_idx.
- FP8: weight float8 [N, K], weight_scale or weight_scale_inv, also one scale for a block of outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neumuter.serving.shards import DTYPES, Place

STORED = DTYPES | {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
}
# Where in an int32 AWQ has outputs 0 to 7.
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
# How far weights may be from those that they were made from, as a share of their length. Of normal weights in
# groups of 128, the largest is 2.7 standard deviations large, so a step is 5.4 / (2^bits − 1) of one, and the
# error 1 / √12 of that. GPTQ errs by up to 1.3 times as much, and a sketch of 32 numbers by up to twice.
STEP = 2 * 1.3 * 5.4 / 12**0.5
# Rows have outliers; eight bits are kept for them.
OF_EIGHT_BITS, OF_FP8 = 0.05, 0.06
FP8_BLOCK = 128
# AWQ moves scales of neurons from the down projection to the up projection. Other weights are 100 % away at
# least.
OF_AWQ = 0.9


@dataclass(frozen=True)
class Stored:
    """A projection on disk.

    Attributes:
        name: of its module.
        parts: {what follows the name: where the tensor is}.
        scheme: "gptq", "awq", "packed", "scaled" (one number per weight, and scales), or "plain".
        options: the checkpoint's quantization_config.
    """

    name: str
    parts: Mapping[str, Place]
    scheme: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def factors(self) -> str | None:
        """The part that holds factors of each output's own; None if outputs share them."""
        if self.scheme in ("gptq", "awq"):
            return "scales"
        if self.scheme == "plain":
            return "weight"
        name = self.scales
        place, weight = self.parts[name], self.parts.get("weight") or self.parts["weight_packed"]
        return name if len(place.shape) == 2 and place.shape[0] == weight.shape[0] else None

    @property
    def scales(self) -> str:
        return "weight_scale" if "weight_scale" in self.parts else "weight_scale_inv"

    @property
    def bits(self) -> int:
        if self.scheme in ("gptq", "awq"):
            return int(self.options["bits"])
        if self.scheme == "packed":
            inputs = int(self.read("weight_shape")[1])
            return 32 * self.parts["weight_packed"].shape[1] // inputs
        return 8

    @property
    def tolerance(self) -> float:
        """How far its weights may be from those that they were made from."""
        if self.scheme == "plain":
            return 0.02
        if self.scheme == "awq":
            return OF_AWQ
        if self.scheme == "scaled" and self.parts["weight"].dtype == "F8_E4M3":
            return OF_FP8
        return OF_EIGHT_BITS if self.bits == 8 else min(OF_AWQ, STEP / (2**self.bits - 1))

    def read(self, part: str) -> Tensor:
        return as_tensor(self.parts[part].read(), self.parts[part])

    def weights(self, **changed: Tensor) -> Tensor:
        """Dequantise: float32 [N, K]; ``changed`` are parts to use instead of those on disk."""
        parts = {part: changed[part] if part in changed else self.read(part) for part in self.parts}
        if self.scheme == "plain":
            return parts["weight"].float()
        if self.scheme == "gptq":
            return self._gptq(parts)
        if self.scheme == "awq":
            return self._awq(parts)
        return self._scaled(parts)

    def _gptq(self, parts: Mapping[str, Tensor]) -> Tensor:
        values = _unpack(parts["qweight"], self.bits, 0)
        zeros = _unpack(parts["qzeros"], self.bits, 1)
        if self.options.get("checkpoint_format") != "gptq_v2":
            zeros = zeros + 1
        groups = parts["g_idx"].long() if "g_idx" in parts else _groups(len(values), len(zeros))
        weights: Tensor = ((values - zeros[groups]) * parts["scales"].float()[groups]).T
        return weights

    def _awq(self, parts: Mapping[str, Tensor]) -> Tensor:
        order = torch.tensor(ORDER)
        values, zeros = (
            _unpack(parts[part], self.bits, 1).unflatten(1, (-1, 8))[:, :, order].flatten(1)
            for part in ("qweight", "qzeros")
        )
        groups = _groups(len(values), len(zeros))
        weights: Tensor = ((values - zeros[groups]) * parts["scales"].float()[groups]).T
        return weights

    def _scaled(self, parts: Mapping[str, Tensor]) -> Tensor:
        scales, zero = parts[self.scales].float(), parts.get("weight_zero_point")
        if self.scheme == "packed":
            half, inputs = 2 ** (self.bits - 1), int(parts["weight_shape"][1])
            values = _unpack(parts["weight_packed"], self.bits, 1)[:, :inputs] - half
            if zero is not None and zero.dtype == torch.int32:
                zero = _unpack(zero, self.bits, 0)[: len(values)] - half
        else:
            values = parts["weight"].float()
        if scales.dim() < 2:
            scales = scales.reshape(1, 1)
        rows, columns = _groups(len(values), len(scales)), _groups(values.shape[1], scales.shape[1])
        if (own := parts.get("weight_g_idx")) is not None and bool((own >= 0).all()):
            columns = own.long()
        if zero is not None:
            values = values - zero.float()[rows][:, columns]
        weights: Tensor = values * scales[rows][:, columns]
        return weights


def find_stored(name: str, places: Mapping[str, Place], options: Mapping[str, Any]) -> Stored:
    """Find the projection of the module ``name`` among the tensors of a checkpoint.

    Raises:
        ValueError: it is stored in a form that is not known.
    """
    parts = {key[len(name) + 1 :]: place for key, place in places.items() if key.startswith(f"{name}.")}
    method, kinds = options.get("quant_method"), {part: place.dtype for part, place in parts.items()}
    scheme = None
    if kinds.get("weight") in DTYPES:
        scheme = "plain"
    elif method == "gptq" and {"qweight", "qzeros", "scales"} <= parts.keys():
        scheme = "gptq" if options.get("bits") in (2, 4, 8) else None
    elif method == "awq" and {"qweight", "qzeros", "scales"} <= parts.keys():
        known = options.get("bits") == 4 and str(options.get("version", "gemm")).lower() == "gemm"
        scheme = "awq" if known else None
    elif method == "compressed-tensors" and {"weight_packed", "weight_shape", "weight_scale"} <= parts.keys():
        scheme = "packed" if kinds["weight_packed"] == "I32" else None
    elif method in ("compressed-tensors", "fp8") and kinds.get("weight") in ("I8", "F8_E4M3"):
        scheme = "scaled" if parts.keys() & {"weight_scale", "weight_scale_inv"} else None
    if scheme is None or any(place.dtype not in STORED for place in parts.values()):
        raise ValueError(
            f"{name} is stored by {method} in a form that is not known (it has {', '.join(sorted(parts))}); "
            "fold into the checkpoint that it was made from, and quantise that"
        )
    return Stored(name, parts, scheme, options)


def as_tensor(data: bytearray, place: Place) -> Tensor:
    """View the bytes of a tensor."""
    return torch.frombuffer(data, dtype=STORED[place.dtype]).view(place.shape)


def _unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Unpack unsigned integers of int32 [A, B] along a dimension, the lowest bits first: float32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values: Tensor = (packed.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (1 - dim))) & (2**bits - 1)
    return values.flatten(dim, dim + 1).float()


def _groups(size: int, groups: int) -> Tensor:
    """The group of each of ``size`` elements, in groups of one size or in blocks of FP8."""
    length = FP8_BLOCK if -(-size // FP8_BLOCK) == groups else size // groups
    return torch.arange(size) // length
