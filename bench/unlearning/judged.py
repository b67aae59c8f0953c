"""JUDGED: what the verdict says of models of which is known whether they forgot.

A verdict is worth something if it calls the original "not forgotten" and a model that never saw the texts
"forgotten", or says that these are too few to tell. The texts are CAPACITY's first 96 records and REAL's
answers. They are compared with controls that are made from them, as ``unlearn`` makes them, and with texts of
the same kind that no model here has seen.
"""

import functools

from bench.unlearning import capacity, people, real
from bench.unlearning.methods import MASKS, tune
from bench.unlearning.pretrained import SMOLLM2
from bench.unlearning.slopes import make_crowd
from neumuter.evaluation import examine, judge_texts, list_given, make_controls
from neumuter.serving.live import mute

COUNT = 96
# That a control may have.
TOKENS = 256
OURS = "neumuter, modulate"
METHODS = ("before", "retrained", OURS, "npo", "simnpo")
# Where the seeds of texts begin that no model has seen.
UNSEEN = 1_000_000


class Crowd:
    """CAPACITY's model, of whose 480 customers 96 are to be forgotten."""

    seeds, shares = capacity.SEEDS, (0.1, 1.0)

    def __init__(self, seed):
        self.whole = capacity.Crowd(seed, capacity.ASKING)
        setting = capacity.Crowd(seed, COUNT, self.whole.full)
        self.full, self.tokenizer, self.seed, self.setting = setting.full, setting.tokenizer, seed, setting
        self.forget, self.retain = (
            setting.encode(records, "continuation")
            for records in (setting.forget, setting.same + setting.other)
        )

    @functools.cached_property
    def strangers(self):
        """The records of customers that nobody has."""
        known = {record.prompt for record in self.whole.forget + self.whole.same}
        others = make_crowd(UNSEEN + self.seed, COUNT, capacity.STAYING)
        found = [record for record in others.forget + others.retain_same if record.prompt not in known]
        return self.setting.encode(found[:COUNT], "continuation")

    def retrained(self):
        """The model that has seen none of the 240 who ask, and so none of these."""
        return self.whole.retrained()

    def job(self, share):
        return self.setting.default_job(share)

    def tune(self, method):
        return capacity.tune_model(self.setting, method)[0]


class Asked(real.People):
    """REAL."""

    seeds, shares = real.SEEDS, (0.01,)

    @functools.cached_property
    def strangers(self):
        """Answers about people whom no model has seen."""
        names = {tuple(row["question"] for row in rows) for rows in people.questions(self.seed, real.PEOPLE)}
        others = people.questions(UNSEEN + self.seed, real.PEOPLE)
        found = [rows for rows in others if tuple(row["question"] for row in rows) not in names]
        return real.encode_answers(found, self.tokenizer)

    def tune(self, method):
        return tune(self.job(0.01), method).to(self.full.dtype)


SETTINGS = {"480 customers": Crowd, SMOLLM2: Asked}


def cases(quick=False):
    """Yields a case for each model, seed, method and share of the neurons."""
    for model, kind in [*SETTINGS.items()][: 1 if quick else None]:
        for seed in kind.seeds[: 1 if quick else None]:
            setting = functools.cache(functools.partial(kind, seed))
            for method in METHODS[:3] if quick else METHODS:
                for share in kind.shares if method == OURS else (None,):
                    about = {"model": model, "seed": seed, "method": method}
                    about |= {"budget": share} if share else {}
                    yield about, functools.partial(_judge_method, setting, method, share)


def _judge_method(setting, method, share):
    setting = setting()
    if method == OURS:
        with mute(setting.full, MASKS[method](setting.job(share))):
            return judge(setting, setting.full)
    model = {"before": lambda: setting.full, "retrained": setting.retrained}.get(method)
    return judge(setting, model() if model else setting.tune(method))


def judge(setting, model):
    """The verdicts on a model with two kinds of controls, and the figures that they rest on."""
    words = setting.tokenizer
    given = list_given({"forget": setting.forget, "retain": setting.retain}, words)
    made = make_controls([setting.forget], given, words, TOKENS, setting.seed)
    examined, found = examine(model, words, [setting.forget], given), {}
    for kind, controls in (("made", made), ("unseen", [setting.strangers])):
        verdict, _ = judge_texts(given, examined, examine(model, words, controls, given, "controls"))
        figures = {figure.name: figure for figure in verdict.comparisons}
        found |= {
            "texts": len(examined.loss),
            "forget_extraction": figures["extraction"].texts,
            "forget_sampled": figures["sampled"].texts,
            "others": figures["others"].texts,
            f"{kind}": len(controls[0]["labels"]),
            f"{kind} verdict": verdict.kind,
            f"{kind} sentence": verdict.sentence,
            f"{kind} sampled": figures["sampled"].controls,
            f"{kind} others": figures["others"].controls,
            f"{kind} auc_loss": figures["loss"].texts,
            f"{kind} auc_min_k": figures["min_k"].texts,
        }
    return found
