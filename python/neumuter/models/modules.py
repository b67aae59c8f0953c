"""Drop-in MLPs: transformers' own, whose forward takes a mask.

The model around them has to pass the mask on. Models of transformers do not: they drop a keyword ``mask``
without an error.
"""

from typing import cast

from torch import Tensor
from transformers import GPTNeoConfig, PreTrainedConfig
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from neumuter.models.ffn import activation_name
from neumuter.models.mask import Mask, masked_act_of, masked_glu_of


def _as_mask(mask: Tensor, row_ids: Tensor | None) -> Mask:
    return Mask(mask[None] if mask.dim() == 1 else mask, row_ids)


class MaskedGatedMLP(LlamaMLP):
    """transformers' ``LlamaMLP`` with a mask on its neurons; constructor and state_dict are the same."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # type: ignore[no-untyped-call]  # transformers'
        self.activation = _known(self.act_fn, "act_fn")

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, row_ids: Tensor | None = None
    ) -> Tensor:
        """The FFN of ``hidden_states``, [B, S, d] or [T, d], with its neurons multiplied by ``mask``.

        ``mask``: [F] or [G, F], float32. ``row_ids``: integers, one mask row per token, −1 = unmasked;
        None: the T = B·S tokens are split into G equal runs, so G = B gives one row per sample. Without
        ``mask`` this is exactly ``LlamaMLP.forward``.
        """
        if mask is None:
            plain: Tensor = super().forward(hidden_states)  # type: ignore[no-untyped-call]
            return plain
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        masked: Tensor = self.down_proj(masked_glu_of(gate, up, self.activation, _as_mask(mask, row_ids)))
        return masked


class MaskedMLP(GPTNeoMLP):
    """transformers' ``GPTNeoMLP`` with a mask on its neurons; constructor and state_dict are the same.

    ``MaskedMLP(config)`` takes the intermediate size from ``config`` (by default 4 · hidden size).
    """

    def __init__(self, intermediate_size: int | GPTNeoConfig, config: GPTNeoConfig | None = None) -> None:
        if config is None:
            config = cast(GPTNeoConfig, intermediate_size)
            intermediate_size = config.intermediate_size or 4 * config.hidden_size
        super().__init__(intermediate_size, config)  # type: ignore[no-untyped-call]  # transformers'
        self.activation = _known(self.act, "act")

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, row_ids: Tensor | None = None
    ) -> Tensor:
        """As ``MaskedGatedMLP.forward``; without ``mask`` this is exactly ``GPTNeoMLP.forward``."""
        if mask is None:
            plain: Tensor = super().forward(hidden_states)  # type: ignore[no-untyped-call]
            return plain
        hidden = masked_act_of(self.c_fc(hidden_states), self.activation, _as_mask(mask, row_ids))
        masked: Tensor = self.dropout(self.c_proj(hidden))
        return masked


def _known(activation: object, name: str) -> str:
    found = activation_name(activation)
    if found is None:
        raise ValueError(
            f"{name} is the activation {type(activation).__name__}; the kernels have silu, gelu, gelu_tanh, "
            "relu and relu2"
        )
    return found
