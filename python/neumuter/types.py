"""Types that many modules share."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

# The label of a token that does not count: padding, a prompt.
IGNORED = -100

# A conversation: {"role", "content"} of each message, of which the last, an answer, counts.
Messages = list[dict[str, str]]

# A whole text; or a prompt and its completion, of which only the completion counts; or a conversation.
Text = str | tuple[str, str] | Messages

# "input_ids", "attention_mask" and "labels", int64 [B, T] each, padded on the right. The mask is 1 on real
# tokens; a label is the token's id, or IGNORED. The logits at position t predict the label at t + 1.
Batch = dict[str, Tensor]

# Called as (step, total, info) after every step.
Callback = Callable[[int, int, dict[str, Any]], object]
