"""Recipes: how the neurons to mute are found. Each ends in a MuteSet and works on any masked model."""

from neumuter.recipes.auto import Goals, smallest_share
from neumuter.recipes.baselines import mute_by_activation, mute_by_attribution, mute_random
from neumuter.recipes.fisher import support_by_fisher
from neumuter.recipes.gates import GatesConfig, train_gates
from neumuter.recipes.pair import Pair
from neumuter.recipes.two_phase import GainsConfig, SupportConfig, find_support, fit_gains, forget
from neumuter.recipes.weights import WeightsConfig, tune_weights

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
