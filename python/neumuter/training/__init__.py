"""How masks are trained: the masked model, batches, losses, and what weight tuning does instead."""

from neumuter.training.batches import PairedBatches
from neumuter.training.weights import WeightsConfig, tune_weights

__all__ = ["PairedBatches", "WeightsConfig", "tune_weights"]
