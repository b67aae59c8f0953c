"""Types that many modules share."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

IGNORED = -100  # the label of a token that does not count: padding, a prompt
Text = str | tuple[str, str]  # or (prompt, completion), of which only the completion counts
Batch = dict[str, Tensor]  # "input_ids", "attention_mask" and "labels", int64 [B, T]: see training.losses
Callback = Callable[[int, int, dict[str, Any]], object]  # called as (step, total, info) after every step
