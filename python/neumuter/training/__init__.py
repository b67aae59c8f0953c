"""How masks are trained: the masked model, batches, losses, and what weight tuning does instead."""

from neumuter.training.adam import Adam
from neumuter.training.batches import PairedBatches
from neumuter.training.sources import HardFirst, InTurn
from neumuter.training.step import Measured, Step
from neumuter.training.weights import WeightsConfig, tune_weights

__all__ = [
    "Adam",
    "HardFirst",
    "InTurn",
    "Measured",
    "PairedBatches",
    "Step",
    "WeightsConfig",
    "tune_weights",
]
