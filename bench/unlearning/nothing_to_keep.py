"""NOTHING TO KEEP: what stands in for the texts to keep where there are none, on SYNTH's first model.

The model's own samples; or its answers to the prompts to forget with made-up names, and half of those
samples. The second way and its budgets were chosen on seeds 5 to 7.
"""

import functools

import neumuter
from bench.unlearning.synth import Setting
from neumuter.demo import task
from neumuter.recipes import FittedConfig, GainsConfig
from neumuter.serving.live import mute

SEEDS = (307, 311, 313)
MADE_UP = 48
STEPS = {"steps": 60, "batch_size": 12}
# What stands in, the share of the neurons, and the target of KL in nats.
RUNS = (
    *(("own samples", budget, 0.02) for budget in (0.05, 0.15, 0.5)),
    *(("made up", budget, 0.02) for budget in (0.05, 0.15, 0.5)),
    ("made up", 0.3, 0.04), ("made up", 0.5, 0.04), ("retain", 0.05, 0.02),
)  # fmt: skip
# Texts of the model itself.
SAMPLES = {"own samples": 32, "made up": 16, "retain": 0}


def cases(quick=False):
    """Yields a case for the untouched model and for each of ``RUNS``; ``quick``: one seed, two runs."""
    for seed in SEEDS[:1] if quick else SEEDS:
        yield from _cases(seed, [RUNS[0], RUNS[-2]] if quick else RUNS)


def _cases(seed, runs):
    setting = functools.cache(lambda: Setting("gated, 0.9 M", seed))
    yield (
        {"seed": seed, "method": "before", "forget": task.FORGET},
        lambda: {"share": 0.0} | setting().measure(setting().full),
    )
    for neighbours, budget, kl_target in runs:
        about = {"neighbours": neighbours, "budget": budget, "kl_target": kl_target}
        yield (
            {"seed": seed, "method": "neumuter, modulate", "forget": task.FORGET} | about,
            functools.partial(_find, setting, **about),
        )


def _find(setting, neighbours, budget, kl_target):
    made = setting()
    outcome = neumuter.unlearn(
        made.full,
        made.tokenizer,
        made.encode(made.forget, "secret"),
        made.neighbours("retain") if neighbours == "retain" else None,
        budget=budget,
        recipe=FittedConfig(GainsConfig(**STEPS, kl_target=kl_target)),
        samples=SAMPLES[neighbours],
        made_up=MADE_UP if neighbours == "made up" else 0,
        start_layer=0,
        seed=made.seed,
        callback=lambda *_: None,
    )
    with mute(made.full, outcome.mutes):
        return {"share": outcome.mutes.share} | made.measure(made.full)
