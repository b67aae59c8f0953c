"""The masked FFN: as a function, as a stand-in for a model's own module, and as drop-in modules."""

import torch
from torch import nn
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from neumuter.families import GATED, PLAIN, activation_name
from neumuter_kernels import masked_act, masked_glu


def masked_ffn(module, layout, activation, hidden_states, mask, row_ids=None):
    """The FFN ``module`` with its neurons multiplied by ``mask``; the projections are called as modules.

    ``hidden_states``: [B, S, d] or [T, d]. ``mask``: [F] or [G, F], float32. ``row_ids``: integers, one
    mask row per token, −1 = unmasked; None: the T = B·S tokens are split into G equal runs, so G = B gives
    one row per sample. Returns a tensor shaped like ``hidden_states``.
    """
    if mask.dim() == 1:
        mask = mask[None]
    if hidden_states.dtype == torch.float64:
        mask = mask.double()
    hidden = getattr(module, layout.up)(hidden_states)
    if layout.gate:
        gate = getattr(module, layout.gate)(hidden_states)
        hidden = masked_glu(gate, hidden, mask, row_ids, activation, reuse_inputs=True)
    else:
        hidden = masked_act(hidden, mask, row_ids, activation, reuse_inputs=True)
    output = getattr(module, layout.down)(hidden)
    return getattr(module, layout.dropout)(output) if layout.dropout else output


@torch.no_grad()
def verify(ffn):
    """Raise ValueError, naming the FFN, unless ``masked_ffn`` with a mask of ones computes what it computes.

    A module may have the children of an FFN and do something else with them.
    """
    weight = ffn.down_weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, weight.shape[0], generator=generator).to(weight.device, weight.dtype)
    training = {module: module.training for module in ffn.module.modules()}
    ffn.module.eval()
    try:
        expected = ffn.module(x)
        ones = torch.ones(weight.shape[1], device=weight.device)
        actual = masked_ffn(ffn.module, ffn.layout, ffn.activation, x, ones)
    finally:
        for module, mode in training.items():
            module.training = mode
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 0.05
    if (actual - expected).abs().max() > tolerance * expected.abs().max():
        raise ValueError(
            f"{ffn.path}, a {type(ffn.module).__name__}, has the children of an FFN but computes something "
            "else than down(activation(gate) · up) or down(activation(up)); it cannot be masked"
        )


class FFNWrapper(nn.Module):
    """Stands in for an FFN module and shares its children under their own names.

    So the state_dict keys of the weights stay what they were. The original module is kept out of
    registration (its weights would appear twice) and is what runs when there is no mask: the same bits as
    the untouched model. Subclasses say which mask applies, and keep tensors of their own in float32
    whatever dtype the model is moved to.
    """

    def __init__(self, ffn):
        super().__init__()
        verify(ffn)
        for name, child in ffn.module.named_children():
            self.add_module(name, child)
        self.path, self.layer, self.width = ffn.path, ffn.layer, ffn.width
        self.layout, self.activation = ffn.layout, ffn.activation
        object.__setattr__(self, "hidden_original", (ffn.module,))
        self.training = ffn.module.training

    @property
    def original(self):
        return self.hidden_original[0]

    def mask(self, hidden_states):
        """The mask for this forward, [G, F] or [F], or None to run the original module."""
        raise NotImplementedError

    def forward(self, hidden_states):
        mask = self.mask(hidden_states)
        if mask is None:
            return self.hidden_original[0](hidden_states)
        return masked_ffn(self, self.layout, self.activation, hidden_states, mask)

    def train(self, mode=True):
        self.original.training = mode
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        kept = {name: tensor.detach() for name, tensor in (self._parameters | self._buffers).items()}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:  # model.half() and the like: move, but do not round
                moved.data = tensor.to(moved.device)
                if moved.grad is not None:
                    moved.grad = moved.grad.to(tensor.dtype)
        return self


class FFNSwap:
    """Wrappers in the place of the FFNs of one model instance, until ``restore``."""

    def __init__(self, model, wrappers):
        self.model, self.wrappers = model, wrappers
        for wrapper in wrappers:
            model.set_submodule(wrapper.path, wrapper)

    def restore(self):
        """Put the very original modules back. Harmless when called again."""
        for wrapper in self.wrappers:
            if self.model.get_submodule(wrapper.path) is wrapper:
                self.model.set_submodule(wrapper.path, wrapper.original)


def refuse_wrapped(model):
    """Raise RuntimeError if some FFN of ``model`` is already attached or muted."""
    for path, module in model.named_modules():
        if isinstance(module, FFNWrapper):
            raise RuntimeError(
                f"{path} is already a {type(module).__name__}: this model is attached or muted; "
                "call detach() or undo() on its handle first"
            )


class MaskedGatedMLP(LlamaMLP):
    """transformers' ``LlamaMLP`` with a mask on its neurons; constructor and state_dict are the same."""

    def __init__(self, config):
        super().__init__(config)
        self.activation = activation_name(self.act_fn, "act_fn")

    def forward(self, hidden_states, mask=None, row_ids=None):
        """[B, S, d] or [T, d] in and out. ``mask`` and ``row_ids`` as in ``masked_ffn``; without ``mask``
        this is exactly ``LlamaMLP.forward``."""
        if mask is None:
            return super().forward(hidden_states)
        return masked_ffn(self, GATED, self.activation, hidden_states, mask, row_ids)


class MaskedMLP(GPTNeoMLP):
    """transformers' ``GPTNeoMLP`` with a mask on its neurons; constructor and state_dict are the same.

    ``MaskedMLP(config)`` takes the intermediate size from ``config`` (by default 4 · hidden size).
    """

    def __init__(self, intermediate_size, config=None):
        if config is None:
            config = intermediate_size
            intermediate_size = config.intermediate_size or 4 * config.hidden_size
        super().__init__(intermediate_size, config)
        self.activation = activation_name(self.act, "act")

    def forward(self, hidden_states, mask=None, row_ids=None):
        """[B, S, d] or [T, d] in and out. ``mask`` and ``row_ids`` as in ``masked_ffn``; without ``mask``
        this is exactly ``GPTNeoMLP.forward``."""
        if mask is None:
            return super().forward(hidden_states)
        return masked_ffn(self, PLAIN, self.activation, hidden_states, mask, row_ids)
