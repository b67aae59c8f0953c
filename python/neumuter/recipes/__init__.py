"""Recipes: how the neurons to mute are found. Each ends in a MuteSet and works on any masked model."""

from neumuter.recipes.baselines import mute_by_activation, mute_by_attribution, mute_random
from neumuter.recipes.fisher import support_by_fisher
from neumuter.recipes.fitted import GainsConfig, SupportConfig, find_support, fit_gains, forget
from neumuter.recipes.paper import GatesConfig, train_gates
from neumuter.recipes.search import Goals, smallest_share
from neumuter.training.batches import Pair
from neumuter.training.weights import WeightsConfig, tune_weights

__all__ = [
    "GainsConfig",
    "GatesConfig",
    "Goals",
    "Pair",
    "SupportConfig",
    "WeightsConfig",
    "find_support",
    "fit_gains",
    "forget",
    "mute_by_activation",
    "mute_by_attribution",
    "mute_random",
    "smallest_share",
    "support_by_fisher",
    "train_gates",
    "tune_weights",
]
