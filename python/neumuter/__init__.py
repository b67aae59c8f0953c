"""NeuMuter: make a trained language model forget given texts by muting the few FFN neurons that hold them."""

import importlib
from typing import TYPE_CHECKING

_HOMES = {
    "Ledger": "ledger",
    "LedgerError": "ledger",
    "Masked": "training.masked",
    "MaskedGatedMLP": "models.modules",
    "MaskedMLP": "models.modules",
    "MuteBank": "serving.bank",
    "MuteFileError": "mutes.container",
    "MuteMismatchError": "mutes.matching",
    "MuteSet": "mutes.mute_set",
    "MutedLayer": "mutes.mute_set",
    "NeuMuterConfig": "recipes.trainer",
    "NeuMuterTrainer": "recipes.trainer",
    "Outcome": "outcome",
    "Slopes": "mutes.slopes",
    "attach": "training.masked",
    "audit": "evaluation.auditing",
    "combine": "mutes.algebra",
    "export_gguf_lora": "serving.gguf_lora",
    "export_ia3": "serving.adapters",
    "export_lora": "serving.adapters",
    "fold": "serving.fold",
    "fold_checkpoint": "serving.fold_checkpoint",
    "fold_gguf": "serving.fold_gguf",
    "mute": "serving.live",
    "refit": "refitting",
    "refit_request": "moving",
    "register_family": "models.families",
    "shrink": "serving.shrink",
    "subtract": "mutes.algebra",
    "unlearn": "unlearning",
    "verify": "verifying",
}
__all__ = list(_HOMES)
# The packages of tools, which are imported on access as well.
_TOOLS = ("evaluation", "recipes", "texts", "training")


if TYPE_CHECKING:  # the same, told to type checkers
    from neumuter import evaluation as evaluation
    from neumuter import recipes as recipes
    from neumuter import texts as texts
    from neumuter import training as training
    from neumuter.evaluation.auditing import audit as audit
    from neumuter.ledger import Ledger as Ledger
    from neumuter.ledger import LedgerError as LedgerError
    from neumuter.models.families import register_family as register_family
    from neumuter.models.modules import MaskedGatedMLP as MaskedGatedMLP
    from neumuter.models.modules import MaskedMLP as MaskedMLP
    from neumuter.moving import refit_request as refit_request
    from neumuter.mutes.algebra import combine as combine
    from neumuter.mutes.algebra import subtract as subtract
    from neumuter.mutes.container import MuteFileError as MuteFileError
    from neumuter.mutes.matching import MuteMismatchError as MuteMismatchError
    from neumuter.mutes.mute_set import MutedLayer as MutedLayer
    from neumuter.mutes.mute_set import MuteSet as MuteSet
    from neumuter.mutes.slopes import Slopes as Slopes
    from neumuter.outcome import Outcome as Outcome
    from neumuter.recipes.trainer import NeuMuterConfig as NeuMuterConfig
    from neumuter.recipes.trainer import NeuMuterTrainer as NeuMuterTrainer
    from neumuter.refitting import refit as refit
    from neumuter.serving.adapters import export_ia3 as export_ia3
    from neumuter.serving.adapters import export_lora as export_lora
    from neumuter.serving.bank import MuteBank as MuteBank
    from neumuter.serving.fold import fold as fold
    from neumuter.serving.fold_checkpoint import fold_checkpoint as fold_checkpoint
    from neumuter.serving.fold_gguf import fold_gguf as fold_gguf
    from neumuter.serving.gguf_lora import export_gguf_lora as export_gguf_lora
    from neumuter.serving.live import mute as mute
    from neumuter.serving.shrink import shrink as shrink
    from neumuter.training.masked import Masked as Masked
    from neumuter.training.masked import attach as attach
    from neumuter.unlearning import unlearn as unlearn
    from neumuter.verifying import verify as verify

    __version__: str
else:

    def __getattr__(name: str) -> object:
        # On first use: torch and transformers take seconds to import, and `neumuter --help` needs neither.
        value: object
        if name == "__version__":
            from importlib.metadata import version

            value = version("neumuter-kernels")
        elif name in _TOOLS:
            value = importlib.import_module(f"neumuter.{name}")
        elif name in _HOMES:
            value = getattr(importlib.import_module(f"neumuter.{_HOMES[name]}"), name)
        else:
            raise AttributeError(f"module 'neumuter' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_TOOLS, *(name for name in globals() if name.startswith("__"))})
