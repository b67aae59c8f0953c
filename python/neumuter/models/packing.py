"""transformers' search for packed sequences, which we do without: it waits for the device.

Where a model is given no attention mask, transformers looks at the positions to see whether several sequences
share a row, and reads the answer from the device. While a CUDA graph is captured it cannot, takes the answer
to be yes, and builds a mask that keeps attention from its fastest path.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor
from transformers import masking_utils

_Search = Callable[[Tensor], Tensor | None]

_one_sequence_a_row: ContextVar[bool] = ContextVar("one_sequence_a_row", default=False)
_lock = threading.Lock()
# What replaced the function and what it was, and how many contexts are open in all threads.
_original: list[_Search] = []
_open = 0


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Context: this thread's models hold one sequence in each row, so nothing has to be looked up.

    Other threads see what transformers does by itself.
    """
    global _open
    with _lock:
        # Older versions of transformers may not have it.
        if _open == 0 and (found := getattr(masking_utils, "find_packed_sequence_indices", None)):
            _original[:] = [found]
            _replace(_find)
        _open += 1
    token = _one_sequence_a_row.set(True)
    try:
        yield
    finally:
        _one_sequence_a_row.reset(token)
        with _lock:
            _open -= 1
            if _open == 0 and _original:
                _replace(_original[0])


def _replace(search: _Search) -> None:
    vars(masking_utils)["find_packed_sequence_indices"] = search


def _find(position_ids: Tensor) -> Tensor | None:
    return None if _one_sequence_a_row.get() else _original[0](position_ids)
