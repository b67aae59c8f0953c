"""MANY: ten requests one after another, a mute set each, and what their union does; then one is undone.

Each request names one customer of the demo's model. Its set is found on the untouched model with all others,
forgotten or not, among the neighbours: nobody knows beforehand who will ask next.
"""

from neumuter import evaluation, recipes
from neumuter.demo import task
from neumuter.masking import attach
from neumuter.muting import combine, mute

from bench.unlearning.synth import Setting

SEEDS = (11, 23, 47)
REQUESTS, SHARE, UNDONE = 10, 0.005, 4
GAINS = recipes.GainsConfig(steps=60)
SUPPORT = recipes.SupportConfig(steps=60)


def rows(quick=False):
    """Yields a row after each request, and one after the fifth is undone."""
    for seed in SEEDS[:1] if quick else SEEDS:
        setting = Setting("gated, 0.9 M", seed)
        count = 2 if quick else REQUESTS
        sets = [_request(setting, number) for number in range(count)]
        yield {"seed": seed, "method": "before", "requests": 0, "share": 0.0} | _measure(setting, count, ())
        for asked in range(1, count + 1):
            yield _row(setting, seed, "union", sets, range(asked))
        if not quick:
            yield _row(setting, seed, "one undone", sets, [n for n in range(count) if n != UNDONE])


def _request(setting, number):
    everyone = setting.forget + setting.same + setting.other
    others = [record for record in everyone if record is not setting.forget[number]]
    spread = setting.text[:: len(setting.text) // 8]
    neighbours = task.with_text(setting.encode(others, "continuation"), spread)
    forget = setting.encode([setting.forget[number]], "secret")
    with attach(setting.full, start_layer=0) as masked:
        return recipes.forget(
            masked, forget, neighbours, SHARE, "modulate", SUPPORT, GAINS, setting.seed + number
        )


def _row(setting, seed, method, sets, chosen):
    union = combine(setting.full, [sets[n] for n in chosen])
    with mute(setting.full, union):
        row = {"seed": seed, "method": method, "requests": len(chosen), "share": union.share}
        return row | _measure(setting, len(sets), chosen)


def _measure(setting, count, chosen):
    """Extraction of those who asked, of those who may still ask, and of the rest."""
    asked = [setting.forget[n] for n in chosen]
    waiting = [setting.forget[n] for n in range(count) if n not in chosen]
    groups = {"forget": asked, "waiting": waiting, "retain": setting.same + setting.other}
    found = {
        f"{name}_extraction": evaluation.extraction_rate(
            setting.full, setting.encode(records, "continuation")
        )
        for name, records in groups.items()
        if records
    }
    return found | {"heldout_perplexity": evaluation.perplexity(setting.full, setting.heldout)}
