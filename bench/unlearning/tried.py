"""TRIED: other ways to fit gains to many texts.

CAPACITY's model, of whose customers 96 are to be forgotten with a tenth of the neurons: our default leaves
some of them. Two ways start from its gains and lower the loss over all texts at once, to see whether a better
optimum is near: a line search; and a series of quadratic programmes, of which each takes the log-odds of the
secrets as linear in the gains, and harm as quadratic, as the Fisher information of sampled tokens has it.
Constants were chosen on seed 5.
"""

import functools
import time

import torch
import torch.nn.functional as F

import neumuter
from bench.unlearning.capacity import SEEDS, Crowd, make_pair
from bench.unlearning.fitting import find_left
from neumuter.recipes import FittedConfig, GainsConfig, fit_gains, fit_mutes, measure_slopes
from neumuter.recipes.fisher import rank_by_fisher
from neumuter.recipes.slopes import find_slopes
from neumuter.serving.live import mute
from neumuter.training.losses import begin_runs, find_ends, predicting, sum_runs, weigh_harm
from neumuter.training.neurons import Neurons

COUNT, SHARE = 96, 0.1
GROUPS = 4
# The weight of harm where all texts count at once: its highest in our default, near which that ends; and a
# lower one.
ETA, LOWER_ETA = 100.0, 60.0
# Of the line search, and of the series of quadratic programmes.
SEARCH_STEPS, PROGRAMMES = 20, 15
# How far a gain may move in a programme at first, and what a good and a bad one make of that.
RADIUS, GROW, SHRINK = 0.1, 1.5, 0.5
SOLVER_STEPS, SOLVER_LR, DRAWS = 500, 0.01, 512
PART = 32  # samples per pass


def cases(quick=False):
    """Yields a case for each seed and method."""
    for seed in SEEDS[:1] if quick else SEEDS:
        setting = functools.cache(lambda seed=seed: Crowd(seed, COUNT))
        yield {"seed": seed, "method": "before"}, functools.partial(_look_at, setting)
        for method in METHODS:
            yield {"seed": seed, "method": method}, functools.partial(_find, setting, method)


def _look_at(setting):
    return {"share": 0.0} | setting().measure(setting().full)


def _find(setting, method):
    setting, start = setting(), time.perf_counter()
    with neumuter.attach(setting.full, start_layer=0) as masked:
        pair = make_pair(setting, masked, setting.forget)
        mutes = METHODS[method](setting, pair)
        seconds = time.perf_counter() - start
        loss = Whole(pair, mutes).loss().item()
    with mute(setting.full, mutes):
        found = setting.measure(setting.full)
    return {"share": mutes.share, "loss": loss, "seconds": seconds} | found


class Whole:
    """The loss that ``fit_gains`` has in a step, over all samples.

    ``gains``: of the neurons of ``mutes``. ``eta``: the weight of harm.
    """

    def __init__(self, pair, mutes, eta=ETA):
        self.eta = eta
        self.pair, self.config, self.neurons = pair, GainsConfig(), Neurons(pair.masked, mutes)
        self.support = self.neurons.ids(mutes)
        self.gains = self.neurons.start[self.support]
        self.kept = range(pair.forget_count, pair.forget_count + pair.retain_count)

    def mask(self, gains):
        """The gates of all neurons, [n]."""
        return self.neurons.start.index_put((self.support,), gains)

    def applying(self, gains):
        return self.pair.masked.applying(self.neurons.by_layer(self.mask(gains)))

    def loss(self, gains=None):
        with torch.no_grad():
            return sum(self.parts(self.gains if gains is None else gains))

    def find_slope(self, gains):
        """The loss and its gradient."""
        return _add_up(self.parts(gains), gains)

    def find_harm_slope(self, gains):
        return _add_up(self.harm(gains), gains)[1]

    def parts(self, gains):
        """Yields what adds up to the loss."""
        yield from self.left(gains)
        yield from (self.eta * part for part in self.harm(gains))

    def left(self, gains):
        tokens = self.pair.count_tokens(range(self.pair.forget_count))[0]
        for ids in _parts(range(self.pair.forget_count)):
            with self.applying(gains):
                losses = self.pair.sample_losses(ids)
            left = (
                find_left(self.pair, part, i, self.config.margin).sum()
                for part, i in zip(losses, ids, strict=True)
            )
            yield sum(left) / tokens

    def harm(self, gains):
        tokens = self.pair.count_tokens(self.kept)[1]
        for ids in _parts(self.kept):
            with self.applying(gains):
                yield weigh_harm(self.pair.token_losses(ids)[1]).sum() / tokens

    def mutes(self, gains, recipe, seed):
        low_high = self.config.gain_range
        return self.neurons.mute_set(self.support, gains, "modulate", low_high, {"recipe": recipe}, seed)


def _parts(ids):
    return [list(ids[start : start + PART]) for start in range(0, len(ids), PART)]


def _add_up(parts, gains):
    """The sum of what ``parts`` yields, and its gradient with respect to ``gains``."""
    total, slope = torch.zeros(()), torch.zeros_like(gains)
    for part in parts:
        total += part.detach()
        slope += torch.autograd.grad(part, gains)[0]
    return total, slope


def _fit(setting, pair, **constants):
    return fit_mutes(pair, SHARE, config=FittedConfig(GainsConfig(**constants)), seed=setting.seed)


def _fit_in_groups(setting, pair):
    """One group of texts after the other, each with its part of the neurons; slopes hold the earlier ones."""
    mutes, former = None, []
    size = COUNT // GROUPS
    for first in range(0, COUNT, size):
        group = make_pair(setting, pair.masked, setting.forget[first : first + size])
        mutes = fit_mutes(group, SHARE / GROUPS, existing=mutes, former=former, seed=setting.seed)
        former.append(measure_slopes(group, mutes))
    return mutes


def _fit_by_text(setting, pair):
    """Candidates are the best neurons of each text, in turn, instead of the best on the average."""
    neurons = Neurons(pair.masked)
    ratios = rank_by_fisher(pair)
    gates = torch.ones(neurons.count)
    squares = torch.stack([
        (runs.weights @ runs.slopes).square()
        for runs in (_Runs(pair, neurons, gates, sample) for sample in range(pair.forget_count))
    ])  # fmt: skip
    # A neuron without a slope is nobody's candidate.
    information = (squares.mean(0) / ratios).nan_to_num(torch.inf)
    places = (squares / information).argsort(1, descending=True).argsort(1).amin(0)
    config, count = GainsConfig(), neurons.count_of(SHARE)
    best = places.topk(round(config.candidates * count), largest=False).indices
    about = {"recipe": "by text"}
    proposed = neurons.mute_set(best, torch.zeros(len(best)), "mute", (0.0, 1.0), about, setting.seed)
    return fit_gains(pair, proposed, config, setting.seed, keep=count)


class _Runs:
    """The runs of a text: log-odds, those at which they are forgotten, weights, and slopes of all neurons."""

    def __init__(self, pair, neurons, gates, sample):
        ceilings, runs = pair.ceilings_of(sample), pair.runs_of(sample)
        places = begin_runs(runs).nonzero().flatten()
        self.weights = sum_runs(torch.ones_like(ceilings), runs)[places] / len(runs)
        self.ends = find_ends(ceilings, runs)[places]
        found = [*find_slopes(pair, neurons, gates, sample, places.tolist())]
        self.odds, self.slopes = (torch.cat(parts) for parts in zip(*found, strict=True))


def _search(setting, pair, eta=ETA):
    """Full-batch steps of L-BFGS with a line search, from the gains of the default on."""
    whole = Whole(pair, _fit(setting, pair), eta)
    gains, limits = whole.gains.clone().requires_grad_(), whole.config.gain_range
    sizes = {"max_iter": SEARCH_STEPS, "max_eval": 10 * SEARCH_STEPS}
    search = torch.optim.LBFGS([gains], **sizes, line_search_fn="strong_wolfe")

    def evaluate():
        # Beyond the limits the loss is flat.
        inside = gains.detach().clamp(*limits).requires_grad_()
        loss, slope = whole.find_slope(inside)
        gains.grad = slope.masked_fill(inside != gains, 0)
        return loss

    search.step(evaluate)
    return whole.mutes(gains.detach().clamp(*limits), "search", setting.seed)


def _solve(setting, pair):
    """A series of quadratic programmes within a trust region, from the gains of the default on."""
    whole = Whole(pair, _fit(setting, pair))
    gains, radius, loss = whole.gains, RADIUS, whole.loss()
    draws = torch.Generator().manual_seed(setting.seed)
    moved = None
    for _ in range(PROGRAMMES):
        if moved is None:
            programme = _Programme(setting, whole, gains, draws)
        moved = programme.solve(radius)
        after = whole.loss(moved)
        if after < loss:
            gains, loss, radius, moved = moved, after, GROW * radius, None
        else:
            radius *= SHRINK
    return whole.mutes(gains, "programmes", setting.seed)


class _Programme:
    """The loss near ``gains``: the log-odds of runs by their slopes, and harm by its slope and its curvature.

    That the least likely token of a run has to be unlikely, too, is left out.
    """

    def __init__(self, setting, whole, gains, draws):
        pair, self.gains, self.eta = whole.pair, gains, whole.eta
        self.limits = whole.config.gain_range
        gates = whole.mask(gains)
        runs = [_Runs(pair, whole.neurons, gates, sample) for sample in range(pair.forget_count)]
        self.over = torch.cat([part.odds - part.ends for part in runs])
        self.slopes = torch.cat([part.slopes for part in runs])[:, whole.support]
        counts = [pair.count_tokens([sample])[0] for sample in range(pair.forget_count)]
        self.weights = torch.cat([n * part.weights for n, part in zip(counts, runs, strict=True)])
        self.weights /= sum(counts)
        self.harm = whole.find_harm_slope(gains.clone().requires_grad_())
        self.information = _draw_information(setting, whole, gates, draws)

    def solve(self, radius):
        """The gains at which it is least, each at most ``radius`` from where it was."""
        step = torch.zeros_like(self.gains).requires_grad_()
        low, high = (limit - self.gains for limit in self.limits)
        low, high = low.clamp(min=-radius), high.clamp(max=radius)
        adam = torch.optim.Adam([step], SOLVER_LR)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, SOLVER_STEPS)
        for _ in range(SOLVER_STEPS):
            left = (self.weights * F.relu(self.over + self.slopes @ step)).sum()
            harm = self.harm @ step + step @ self.information @ step / 2
            adam.zero_grad()
            (left + self.eta * harm).backward()
            adam.step()
            decay.step()
            with torch.no_grad():
                step.clamp_(low, high)
        return self.gains + step.detach()


def _draw_information(setting, whole, gates, draws):
    """The Fisher information of the gains, from tokens that the model says in texts to keep, [k, k]."""
    batch, total = setting.neighbours("retain"), torch.zeros(len(whole.support), len(whole.support))
    rows = torch.randint(len(batch["labels"]), [DRAWS], generator=draws)
    for part in rows.split(PART):
        mask = gates.repeat(len(part), 1).requires_grad_()
        by_layer = mask.split(list(whole.neurons.widths.values()), 1)
        with whole.pair.masked.applying(dict(zip(whole.neurons.widths, by_layer, strict=True))):
            logits = setting.full(
                input_ids=batch["input_ids"][part], attention_mask=batch["attention_mask"][part]
            ).logits
        places = torch.multinomial(predicting(batch["labels"][part]).float(), 1, generator=draws)[:, 0]
        chances = logits[torch.arange(len(part)), places].log_softmax(-1)
        said = torch.multinomial(chances.detach().exp(), 1, generator=draws)
        (slopes,) = torch.autograd.grad(chances.gather(1, said).sum(), mask)
        slopes = slopes[:, whole.support]
        total += slopes.T @ slopes
    return total / DRAWS


METHODS = {
    "neumuter, modulate": _fit,
    "fewer": functools.partial(_fit, steps=60, lr=0.3),
    "faster": functools.partial(_fit, lr=0.3),
    "shorter": functools.partial(_fit, steps=240),
    "longer": functools.partial(_fit, steps=960),
    "by text": _fit_by_text,
    "groups": _fit_in_groups,
    "search": _search,
    "search, lower": functools.partial(_search, eta=LOWER_ETA),
    "programmes": _solve,
}
