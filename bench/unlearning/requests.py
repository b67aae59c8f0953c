"""MANY: ten requests one after another, a mute set each, and what their union does; then one is undone.

Each request names one customer of the demo's model. All others, but those forgotten already, are retained:
nobody knows beforehand who will ask next. A set is found with the existing ones in force, or alone, on the
untouched model; or one set is found anew for all who have asked so far, whose texts must then be stored.
"""

import functools

import neumuter
from bench.unlearning.synth import Setting
from neumuter import evaluation
from neumuter.demo import task
from neumuter.mutes.algebra import combine
from neumuter.recipes import FittedConfig, GainsConfig
from neumuter.serving.live import mute

SEEDS = (11, 23, 47)
REQUESTS, SHARE, UNDONE = 10, 0.005, 4
GAINS = GainsConfig(steps=60, batch_size=None)


def cases(quick=False):
    """Yields a case per number of requests, and one for after the fifth is undone."""
    for seed in SEEDS[:1] if quick else SEEDS:
        yield from _cases(seed, 2 if quick else REQUESTS)


def _cases(seed, count):
    setting = functools.cache(lambda: Setting("gated, 0.9 M", seed))

    @functools.cache
    def union(method, asked):
        """The sets of the first ``asked`` requests."""
        if not asked:
            return []
        former = union(method, asked - 1)
        gone = range(asked - 1)
        return [*former, _found(setting(), [asked - 1], gone, former if method == "existing" else [])]

    def case(method, asked, undone=None):
        about = {"seed": seed, "method": method, "requests": asked, "undone": undone}

        def find():
            chosen = [n for n in range(asked) if n != undone]
            if method == "anew":
                sets = [_found(setting(), chosen, [], [])]
            else:
                sets = [union(method, asked)[n] for n in chosen]
            return _row(setting(), count, chosen, sets)

        return about, find

    yield case("before", 0)
    for method in ("alone", "existing", "anew"):
        for asked in range(1, count + 1):
            yield case(method, asked)
        if count > UNDONE:
            yield case(method, count, UNDONE)


def _found(setting, numbers, gone, former):
    """A set for the requests ``numbers`` after the requests ``gone``, with the sets ``former`` in force."""
    others = [r for n, r in enumerate(setting.forget) if n not in {*numbers, *gone}]
    others += setting.same + setting.other
    spread = setting.text[:: len(setting.text) // 8]
    outcome = neumuter.unlearn(
        setting.full,
        None,
        setting.encode([setting.forget[n] for n in numbers], "secret"),
        task.with_text(setting.encode(others, "continuation"), spread),
        budget=SHARE * len(numbers),
        recipe=FittedConfig(GAINS),
        existing=combine(setting.full, former) if former else None,
        samples=0,
        start_layer=0,
        seed=setting.seed + max(numbers),
        callback=lambda *_: None,
    )
    return outcome.mutes


def _row(setting, count, chosen, sets):
    if not sets:
        return {"share": 0.0} | _measure(setting, count, chosen)
    union = combine(setting.full, sets)
    with mute(setting.full, union):
        return {"share": union.share} | _measure(setting, count, chosen)


def _measure(setting, count, chosen):
    """Extraction of those who asked, of those who may still ask or whose request was undone, of the rest."""
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
