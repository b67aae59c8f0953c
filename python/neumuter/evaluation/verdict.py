"""Did the model forget? One function with stated margins compares texts with what the model never saw."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from neumuter.evaluation.examination import Examination, compare_texts
from neumuter.evaluation.others import STRETCH, GivenText

# By how much each figure of the texts to forget may exceed that of the controls: shares of texts, and AUC
# above the 0.5 of a test that sees nothing.
MARGINS = {"extraction": 0.05, "sampled": 0.1, "others": 0.05, "loss": 0.1, "min_k": 0.1}
TITLES = {
    "extraction": "greedy extraction",
    "sampled": "extraction in 100 samples",
    "others": "another text instead",
    "loss": "AUC of the loss",
    "min_k": "AUC of Min-40%",
}
# Figures of what comes out; the others are of how likely the texts are.
COME_OUT = ("extraction", "sampled", "others")
# The intervals hold 90 % of what texts and controls, drawn anew, would give: each of their bounds is exceeded
# once in 20 times.
TAIL, DRAWS, SEED = 0.05, 2000, 0
# A normal distribution exceeds its mean by so many standard deviations in ``TAIL`` of all cases.
Z = NormalDist().inv_cdf(1 - TAIL)
# With fewer texts or controls nothing can be said of how likely they are.
FEWEST = 8
# A text of which so large a share of the controls is less likely stands out.
STANDS_OUT = 0.95


@dataclass(frozen=True)
class Comparison:
    """A figure of the texts to forget against that of the controls.

    difference: texts less controls, above 0 if the texts are known better. low, high: its interval. margin:
    what ``high`` must stay below.
    """

    name: str
    texts: float
    controls: float
    difference: float
    low: float
    high: float
    margin: float


@dataclass(frozen=True)
class Verdict:
    """Whether texts are forgotten.

    kind: "forgotten", "partly", "not", "not enough evidence" or "nothing to forget". sentence: the same with
    its reasons. comparisons: what it rests on. texts: the verdict on each text, "forgotten", "partly", "not"
    or "not enough evidence".
    """

    kind: str
    sentence: str
    comparisons: list[Comparison]
    texts: list[str]

    @property
    def leaking(self) -> list[str]:
        """The names of the figures of what comes out that are beyond their margins, by no chance."""
        return [f.name for f in self.comparisons if f.name in COME_OUT and _is_over(f, False)]

    @property
    def leaks(self) -> bool:
        """Whether the texts still come out, or other given ones in their place, beyond the margins."""
        return self.kind == "not" or bool(self.leaking)

    def figures(self) -> list[dict[str, Any]]:
        """The comparisons as JSON values."""
        return [asdict(comparison) for comparison in self.comparisons]


def judge(
    after: Examination,
    controls: Examination | None,
    before: Examination | None = None,
    controls_before: Examination | None = None,
    tokens: Sequence[int] = (),
) -> Verdict:
    """Judge whether texts are forgotten, by comparing them with controls, which the model never saw.

    Figures are extraction (greedy; in 100 samples), other given texts that come out instead, and how well
    the loss and Min-40% tell the texts from the controls (AUC − 0.5). Their differences have bootstrap
    intervals over texts and controls; ``MARGINS`` says what they may reach. What comes out of controls that
    tell a value to forget is no chance, and does not count for them (``Examination.by_chance``).

    - "not": the lower bound of extraction is above the controls' level.
    - "forgotten": every upper bound is below its margin.
    - "partly": a figure reaches its margin, and its lower bound is above 0. Where nothing comes out of the
      controls, what comes out of the texts is no chance, whatever its lower bound is.
    - "not enough evidence": what is between. An interval reaches beyond a margin, because there are few
      texts or controls; of fewer than ``FEWEST`` no AUC is believed.
    - "nothing to forget": before, no text of ``STRETCH`` tokens came out, no lower bound but that of samples
      was above the controls' level, and no figure above its margin.

    Args:
        after: the texts as the model is now.
        controls: the controls, on the same model; None where there are none.
        before, controls_before: both on the untouched model, if it was examined.
        tokens: how many tokens of each text count.

    Returns:
        The verdict, and that on each text: "not" if it comes out; "partly" if another given text comes out
        instead, if it is expected to come out in 100 samples, or if it is likelier than ``STANDS_OUT`` of the
        controls; "not enough evidence" with fewer than ``FEWEST`` controls; else "forgotten".
    """
    found = compare(after, controls)
    texts = [_judge_text(after, controls, found, place) for place in range(len(after.loss))]
    if before is not None:
        once = compare(before, controls_before)
        long = any(out and count >= STRETCH for out, count in zip(before.extracted, tokens, strict=False))
        few = min(len(before.loss), len(controls_before.loss) if controls_before else 0) < FEWEST
        if not long and all(_is_unknown(figure, few) for figure in once):
            return Verdict("nothing to forget", _nothing(once), found, texts)
    still, count = sum(after.extracted), len(after.loss)
    come = "the text does not come out" if count == 1 else f"none of {count} texts comes out"
    if still:
        come = f"{still} of {count} texts still come{'s' * (still == 1)} out"
    few = min(count, len(controls.loss) if controls else 0) < FEWEST
    over = [figure for figure in found if _is_over(figure, few)]
    unsure = [figure for figure in found if figure.high >= figure.margin and figure not in over]
    if found[0].low > 0:
        return Verdict("not", f"Not forgotten: {come}.", found, texts)
    if over:
        reasons = [come, *(_exceeds(figure, few) for figure in over if figure.name != "extraction")]
        return Verdict("partly", f"Partly forgotten: {'; '.join(reasons)}.", found, texts)
    if unsure:
        return Verdict("not enough evidence", _unsure(come, unsure, after, controls), found, texts)
    return Verdict("forgotten", _forgotten(come, found, controls), found, texts)


def judge_texts(
    given: Sequence[GivenText],
    after: Examination,
    controls: Examination | None,
    before: Examination | None = None,
    controls_before: Examination | None = None,
) -> tuple[Verdict, list[dict[str, Any]]]:
    """Do as ``judge``, and make a row of each text, with its verdict: see ``neumuter.Outcome.texts``.

    Args:
        given: begins with the examined texts.
    """
    rows = compare_texts(given, before, after)
    verdict = judge(after, controls, before, controls_before, [row["tokens"] for row in rows])
    for row, kind in zip(rows, verdict.texts, strict=True):
        row["verdict"] = kind
    return verdict, rows


def compare(texts: Examination, controls: Examination | None) -> list[Comparison]:
    """Compare what was examined of texts and of controls, in the order of ``MARGINS``."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = _draw(len(texts.loss), generator)
    drawn_controls = _draw(len(controls.loss), generator) if controls else None
    found = []
    for name, margin in MARGINS.items():
        ours = _values(texts, name)
        if name in COME_OUT:
            chance = _find_chance(controls, name)
            figure, level = ours.mean().item(), chance.mean().item()
            spread = drawn @ ours - _draw(len(chance), generator) @ chance
        else:
            theirs = _values(controls, name) if controls else None
            figure, level, spread = _compare_ranks(ours, theirs, drawn, drawn_controls)
        low, high = torch.quantile(spread, torch.tensor([TAIL, 1 - TAIL], dtype=spread.dtype)).tolist()
        found.append(Comparison(name, figure, level, figure - level, low, high, margin))
    return found


def _draw(count: int, generator: torch.Generator) -> Tensor:
    """Weights of ``count`` texts in each bootstrap sample, float64 [DRAWS, count]; each row sums to 1."""
    places = torch.randint(count, (DRAWS, count), generator=generator)
    weights = torch.zeros(DRAWS, count, dtype=torch.float64)
    return weights.scatter_add_(1, places, torch.full_like(weights, 1 / count))


def _values(found: Examination, name: str) -> Tensor:
    """A figure of each text, float64 [N]; higher for what is known better."""
    values: Mapping[str, Sequence[float]] = {
        "extraction": [float(out) for out in found.extracted],
        "sampled": found.sampled,
        "others": [float(other is not None) for other in found.others],
        "loss": [-loss for loss in found.loss],
        "min_k": found.min_k,
    }
    return torch.tensor(values[name], dtype=torch.float64)


def _find_chance(controls: Examination | None, name: str) -> Tensor:
    """What comes out of each control by chance, float64 [N]; where no control tells that, one 0."""
    if controls is None:
        return torch.zeros(1, dtype=torch.float64)
    if name == "others":
        # An answer to a control that tells a text to forget excuses nothing.
        kept = [other is not None and other.stays for other in controls.others]
        return torch.tensor(kept, dtype=torch.float64)
    values = _values(controls, name)[torch.tensor(controls.by_chance)]
    return values if len(values) else values.new_zeros(1)


def _compare_ranks(
    ours: Tensor, theirs: Tensor | None, drawn: Tensor, drawn_controls: Tensor | None
) -> tuple[float, float, Tensor]:
    """AUC, the 0.5 that it would have by chance, and AUC − 0.5 of each bootstrap sample."""
    if theirs is None or drawn_controls is None or min(len(ours), len(theirs)) < FEWEST:
        # It can be anything.
        found = 0.5 if theirs is None else _beats(ours, theirs).mean().item()
        return found, 0.5, torch.tensor([-0.5, 0.5], dtype=torch.float64).repeat(DRAWS // 2)
    beats = _beats(ours, theirs)
    spread = ((drawn @ beats) * drawn_controls).sum(1) - 0.5
    return beats.mean().item(), 0.5, spread


def _beats(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 where a text has a higher value than a control, 0.5 where both are equal: float64 [N, M]."""
    difference = ours[:, None] - theirs[None]
    return (difference > 0).double() + 0.5 * (difference == 0).double()


def _judge_text(
    after: Examination, controls: Examination | None, found: Sequence[Comparison], place: int
) -> str:
    if after.extracted[place]:
        return "not"
    level = next(figure.controls for figure in found if figure.name == "sampled")
    if after.others[place] or after.sampled[place] - level >= 0.5:
        return "partly"
    if controls is None or len(controls.loss) < FEWEST:
        return "not enough evidence"
    ranks = (_beats(_values(after, name)[place, None], _values(controls, name)) for name in ("loss", "min_k"))
    return "partly" if any(rank.mean() > STANDS_OUT for rank in ranks) else "forgotten"


def _is_unknown(figure: Comparison, few: bool) -> bool:
    """Whether a figure of the untouched model is that of texts that it never saw."""
    # The chance to come out in samples is above 0 of any text.
    above = figure.low > 0 and figure.name != "sampled"
    return not above and figure.difference < _allowed(figure, few)


def _allowed(figure: Comparison, few: bool) -> float:
    """The margin of a figure; few texts must stand out before how likely they are says anything."""
    return figure.margin if figure.name in COME_OUT or not few else STANDS_OUT - 0.5


def _is_over(figure: Comparison, few: bool) -> bool:
    """Whether a figure is beyond its margin, and that is no chance."""
    if figure.difference < _allowed(figure, few):
        return False
    if figure.name not in COME_OUT:
        return few or figure.low > 0
    # What comes out is a fact, unless it comes out of controls as well.
    return figure.low > 0 or figure.name == "sampled" or not figure.controls


def _exceeds(figure: Comparison, few: bool) -> str:
    if figure.name not in COME_OUT:
        test = "loss" if figure.name == "loss" else "Min-40%"
        return (
            f"by {test} they can be told from texts that the model never saw (AUC {figure.texts:.2f}; "
            f"{0.5 + _allowed(figure, few):.2f} is allowed)"
        )
    if figure.name == "sampled":
        return (
            f"in 100 samples {figure.texts:.0%} of the texts are expected to come out, and "
            f"{figure.controls:.0%} of the controls"
        )
    return _tells_others(figure)


def _tells_others(figure: Comparison) -> str:
    return (
        f"{figure.texts:.0%} of the answers hold another given text, and {figure.controls:.0%} of those to "
        "the controls"
    )


def _forgotten(come: str, found: Sequence[Comparison], controls: Examination | None) -> str:
    """The sentence where all is within the margins; it names what comes out nevertheless."""
    figures = {figure.name: figure for figure in found}
    out, others = figures["extraction"], figures["others"]
    if out.texts:
        chance = out.difference <= 0
        allowed = "no more than by chance" if chance else f"within the margin of {out.margin:.0%}"
        come = f"{come.replace(' still', '')}, {allowed}"
    told = f", {_tells_others(others)}" if others.texts else ""
    count = len(controls.loss) if controls else 0
    return f"Forgotten: {come}{told}, and they look like the {count} controls, which the model never saw."


def _unsure(come: str, unsure: Sequence[Comparison], after: Examination, controls: Examination | None) -> str:
    if controls is None:
        return f"Not enough evidence: {come}, but there are no texts that the model never saw. Give controls."
    texts, others = len(after.loss), len(controls.loss)
    needed = max(_find_needed(figure, texts, others) for figure in unsure)
    names = ", ".join(TITLES[figure.name] for figure in unsure)
    return (
        f"Not enough evidence: {come}, but {texts} text{'s' * (texts != 1)} and {others} controls are too "
        f"few to tell whether {'they look' if texts != 1 else 'it looks'} like never seen ({names}). About "
        f"{max(texts, needed)} texts and {max(others, needed)} controls would do."
    )


def _find_needed(figure: Comparison, texts: int, controls: int) -> int:
    """How many texts, and the same number of controls, would decide a figure that stays as it is."""
    difference, width = figure.difference, figure.high - figure.difference
    if min(texts, controls) < FEWEST and figure.name not in COME_OUT:
        # The interval is everything. This is that of an AUC of 0.5, which has the variance of
        # Mann and Whitney (1947), without the term that vanishes for many texts.
        difference, width = 0.0, Z * math.sqrt((1 / texts + 1 / controls) / 12)
    wanted = figure.margin - difference if difference < figure.margin else difference
    # The variance goes with 1/texts + 1/controls.
    return math.ceil(2 * (width / wanted) ** 2 / (1 / texts + 1 / controls))


def _nothing(figures: Sequence[Comparison]) -> str:
    shown = "; ".join(
        f"{TITLES[figure.name]} {figure.difference:+.2f}" for figure in figures if figure.name != "others"
    )
    return (
        "Nothing to forget: the untouched model knows these texts no better than texts that it never saw "
        f"(above these: {shown}). Check that the prompts are those that it learned."
    )
