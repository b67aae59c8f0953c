"""Recipes: how the neurons to mute are found. Each gives a MuteSet and works on any masked model."""

from neumuter.recipes.baselines import mute_by_activation, mute_by_attribution, mute_random
from neumuter.recipes.estimate import Work, estimate_work
from neumuter.recipes.fisher import propose_by_fisher
from neumuter.recipes.fitted import (
    FittedConfig,
    GainsConfig,
    fit_gains,
    fit_mutes,
    refit_gains,
)
from neumuter.recipes.paper import PaperConfig, train_gates
from neumuter.recipes.search import Goals, search_budget
from neumuter.recipes.slopes import measure_slopes
from neumuter.recipes.support import SupportConfig, find_support

__all__ = [
    "FittedConfig",
    "GainsConfig",
    "Goals",
    "PaperConfig",
    "SupportConfig",
    "Work",
    "estimate_work",
    "find_support",
    "fit_gains",
    "fit_mutes",
    "measure_slopes",
    "mute_by_activation",
    "mute_by_attribution",
    "mute_random",
    "propose_by_fisher",
    "refit_gains",
    "search_budget",
    "train_gates",
]
