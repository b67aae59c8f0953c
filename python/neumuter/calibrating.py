"""How far each token of a request is to be forgotten: no further than a model that never saw the texts."""

import logging
from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from neumuter.evaluation import estimate_unseen, find_ceilings
from neumuter.evaluation.others import GivenText, group_rows
from neumuter.evaluation.unseen import has_prompt
from neumuter.preparing import need_tokenizer
from neumuter.recipes import FittedConfig, PaperConfig
from neumuter.report.progress import Watch
from neumuter.texts.corpus import Corpus
from neumuter.texts.encoding import count_rows
from neumuter.training.journal import Journal
from neumuter.training.processes import agree
from neumuter.types import Batch

logger = logging.getLogger("neumuter")


def choose_calibration(
    calibrate: bool | None,
    recipe: FittedConfig | PaperConfig,
    mode: str,
    tokenizer: PreTrainedTokenizerBase | None,
    corpus: Corpus,
) -> bool:
    """Whether the texts to forget are calibrated; says why not where it would help.

    Args:
        calibrate: what the user asks for; None calibrates where it can be done.

    Raises:
        ValueError: it is asked for and cannot be done.
    """
    seen = count_rows(corpus.forms[0])
    if not isinstance(recipe, FittedConfig) or recipe.support or mode == "mute":
        if calibrate:
            raise ValueError('calibrate needs the fitted recipe, mode "modulate" and no trained support')
        return False
    if calibrate is not None:
        if calibrate and not corpus.all_seen:
            raise ValueError(
                f"calibrate looks at every text to forget, and takes at most {seen} windows of texts, not "
                f"{count_rows(corpus.windows)}"
            )
        return calibrate
    # Of a window from the middle of a text, nobody sees whether the text has a prompt.
    if not (any(has_prompt(corpus.forms[0])) if corpus.all_seen else corpus.prompted):
        return False
    if tokenizer is None or not corpus.all_seen:
        reason = "without a tokenizer" if tokenizer is None else f"for more than {seen} windows of texts"
        logger.warning("Which tokens identify a text is not estimated %s: all count alike.", reason)
        return False
    return True


def estimate_ceilings(
    journal: Journal,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    batch: Batch,
    given: Sequence[GivenText],
    seed: int,
    watch: Watch,
) -> Tensor | None:
    """The log-odds that each token may keep, [B, T]; None where nothing is known of any text.

    batch: all texts to forget.
    """
    options = (batch, given, need_tokenizer(tokenizer), seed)
    with watch("Estimating what identifies the texts") as advance:
        chances = journal.once("unseen", lambda: agree(estimate_unseen(model, *options, advance)))
    known, ceilings = (chances > 0).any(1), find_ceilings(chances)
    texts = group_rows(batch)
    _tell(
        "Which tokens identify a text cannot be estimated for %d of %d texts to forget, for example because "
        "they have no prompt: all their tokens count alike.",
        [bool(known[rows].any()) for rows in texts],
    )
    # NaN is of tokens that do not count, and those of names may stay.
    _tell(
        "%d of %d texts to forget have nothing but wording that other texts share, and names that stand in "
        "the prompt: nothing of them is forgotten. calibrate=False (--no-calibrate) forgets all of it.",
        [bool((ceilings[rows] < 0).any()) for rows in texts],
    )
    return ceilings if known.any() else None


def _tell(message: str, holds: Sequence[bool]) -> None:
    """Log of how many texts something does not hold, if of any."""
    if not all(holds):
        logger.warning(message, len(holds) - sum(holds), len(holds))
