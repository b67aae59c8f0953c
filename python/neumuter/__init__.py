"""NeuMuter: make a trained language model forget given texts by muting the few FFN neurons that hold them."""

import importlib

_HOMES = {
    "Masked": "masking",
    "MaskedGatedMLP": "ffn",
    "MaskedMLP": "ffn",
    "MuteBank": "serving",
    "MuteFileError": "mutes",
    "MuteMismatchError": "muting",
    "MuteSet": "mutes",
    "MutedLayer": "mutes",
    "NeuMuterConfig": "trainer",
    "NeuMuterTrainer": "trainer",
    "attach": "masking",
    "combine": "muting",
    "export_ia3": "exports",
    "export_lora": "exports",
    "fold": "muting",
    "fold_checkpoint": "folding",
    "mute": "muting",
    "register_family": "families",
    "shrink": "shrinking",
    "without": "muting",
}
__all__ = list(_HOMES)


def __getattr__(name):
    # On first use: torch and transformers take seconds to import, and `neumuter --help` needs neither.
    if name not in _HOMES:
        raise AttributeError(f"module 'neumuter' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"neumuter.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *__all__])
