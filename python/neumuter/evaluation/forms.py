"""The form in which a model knows a text best: asked through its chat template, or without."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from neumuter.evaluation.language import sample_losses
from neumuter.evaluation.memory import extracted
from neumuter.texts.encoding import join_batches
from neumuter.types import Batch


def most_known(model: nn.Module, forms: Sequence[Batch]) -> Batch:
    """Take of each text the form that the model gives back, or else that in which it is the likelier.

    A text that comes out in one form is not forgotten, whatever the other form shows. Metrics of the batch
    that is returned are therefore the worse of all forms.

    Args:
        model: the model as it is, mutes included.
        forms: the same texts in several forms, as ``neumuter.texts.encode_forms`` gives them.

    Returns:
        One batch of all texts.
    """
    if len(forms) == 1:
        return forms[0]
    best = torch.stack([_measure_texts(model, form) for form in forms]).argmax(0)
    numbers = torch.cat([form["texts"] for form in forms])
    _, ranks = numbers.unique(return_inverse=True)
    places = torch.cat([torch.full_like(form["texts"], place) for place, form in enumerate(forms)])
    rows = (best[ranks] == places).nonzero().flatten()
    rows = rows[numbers[rows].argsort(stable=True)]
    joined = join_batches(*forms) | {"texts": numbers}
    return {name: value[rows] for name, value in joined.items()}


def _measure_texts(model: nn.Module, form: Batch) -> Tensor:
    """How well the model knows each text, in order of number: float64 [texts].

    One of which a window comes out is known better than one of which none does; then the mean over windows
    counts, of what comes out and of probabilities.
    """
    out = extracted(model, form).double()
    known = out + (-sample_losses(model, form)).exp()
    _, ranks, counts = form["texts"].unique(return_inverse=True, return_counts=True)
    nothing = torch.zeros(len(counts), dtype=known.dtype)
    some_out = (nothing.index_add(0, ranks, out) > 0).to(known.dtype)
    # The mean is at most 2.
    found: Tensor = 2 * some_out + nothing.index_add(0, ranks, known) / counts
    return found
