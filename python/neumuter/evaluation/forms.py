"""The form in which a model knows a text best: asked through its chat template, or without."""

from collections.abc import Sequence

import torch
from torch import nn

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
    # A probability is at most 1, so a text that is given back comes before all that are not.
    known = torch.stack(
        [extracted(model, form).double() + (-sample_losses(model, form)).exp() for form in forms]
    )
    rows = known.argmax(0) * known.shape[1] + torch.arange(known.shape[1])
    return {name: value[rows] for name, value in join_batches(*forms).items()}
