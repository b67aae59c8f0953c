"""Fused kernels for FFN masks: tensors in, tensors out. The package knows no model and no file.

``masked_glu`` and ``masked_act`` multiply FFN activations by a neuron mask and give all gradients
in one backward pass; ``hard_concrete`` makes the gates; ``select_muted`` picks the neurons to mute;
``mute_`` applies the muted ones of many mute sets; ``cross_entropy_`` and ``kl_divergence_`` turn a chunk of
logits into losses and their gradients.
``python -m neumuter_kernels`` prints what is installed and which backend each op uses.
"""

import importlib.metadata

import torch  # noqa: F401 (loads the libraries of the compiled part)

try:
    from neumuter_kernels import _C  # noqa: F401 (defines the ops)
except ImportError as error:
    from neumuter_kernels.missing import reason

    raise ImportError(reason(error)) from error

from neumuter_kernels.hard_concrete import hard_concrete
from neumuter_kernels.masked_ffn import masked_act, masked_glu
from neumuter_kernels.mute import mute_
from neumuter_kernels.reference import ACTIVATIONS
from neumuter_kernels.select_muted import MutedNeurons, neuron_budget, select_muted
from neumuter_kernels.token_losses import cross_entropy_, kl_divergence_

try:
    __version__ = importlib.metadata.version("neumuter-kernels")
except importlib.metadata.PackageNotFoundError:
    # The files of a checkout that is not installed do not say which version they are.
    __version__ = "0+unknown"

__all__ = [
    "ACTIVATIONS",
    "MutedNeurons",
    "cross_entropy_",
    "hard_concrete",
    "kl_divergence_",
    "masked_act",
    "masked_glu",
    "mute_",
    "neuron_budget",
    "select_muted",
]
