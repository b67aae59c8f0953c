"""NeuMuter: make a trained language model forget given texts by muting the few FFN neurons that hold them."""

import importlib
from typing import TYPE_CHECKING

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


if TYPE_CHECKING:  # the same, told to type checkers
    from neumuter.exports import export_ia3 as export_ia3
    from neumuter.exports import export_lora as export_lora
    from neumuter.families import register_family as register_family
    from neumuter.ffn import MaskedGatedMLP as MaskedGatedMLP
    from neumuter.ffn import MaskedMLP as MaskedMLP
    from neumuter.folding import fold_checkpoint as fold_checkpoint
    from neumuter.masking import Masked as Masked
    from neumuter.masking import attach as attach
    from neumuter.mutes import MutedLayer as MutedLayer
    from neumuter.mutes import MuteFileError as MuteFileError
    from neumuter.mutes import MuteSet as MuteSet
    from neumuter.muting import MuteMismatchError as MuteMismatchError
    from neumuter.muting import combine as combine
    from neumuter.muting import fold as fold
    from neumuter.muting import mute as mute
    from neumuter.muting import without as without
    from neumuter.serving import MuteBank as MuteBank
    from neumuter.shrinking import shrink as shrink
    from neumuter.trainer import NeuMuterConfig as NeuMuterConfig
    from neumuter.trainer import NeuMuterTrainer as NeuMuterTrainer
else:

    def __getattr__(name: str) -> object:
        # On first use: torch and transformers take seconds to import, and `neumuter --help` needs neither.
        if name not in _HOMES:
            raise AttributeError(f"module 'neumuter' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"neumuter.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
