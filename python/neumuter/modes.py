"""Training and evaluation mode of modules."""

from contextlib import contextmanager


@contextmanager
def without_dropout(module):
    """The module in evaluation mode, and each of its modules back in its own afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
