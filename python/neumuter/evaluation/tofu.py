"""TOFU (Maini et al. 2024, *TOFU: A Task of Fictitious Unlearning for LLMs*) from local copies of its files.

A file has rows, in a format that ``read_texts`` reads: ``question`` and ``answer``, and for the truth ratio
``paraphrased_answer`` (left out: the answer itself) and ``perturbed_answer``, a list of wrong ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from neumuter.evaluation.language import losses_by_sample
from neumuter.files import PathLike
from neumuter.generation import cut_at_end, find_end_tokens, generate
from neumuter.texts.encoding import encode_forms, tokenize
from neumuter.texts.files import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 512
# An answer that is generated for ROUGE ends here.
MAX_NEW_TOKENS = 200
QUESTIONS_PER_PASS = 16
UTILITY_SETS = ("retain", "real_authors", "world_facts")
TEMPLATE = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Question:
    """A question of TOFU. ``wrong``: perturbed answers, none in files without them."""

    question: str
    answer: str
    paraphrased: str
    wrong: tuple[str, ...]


def read_questions(path: PathLike, limit: int | None = None) -> list[Question]:
    """Read the questions of a file, at most ``limit``.

    Raises:
        ValueError: a line is not a question; the message names it. Or there is no question.
    """
    found = []
    for place, row in read_rows(path):
        try:
            wrong = row.get("perturbed_answer", [])
            texts = (row["question"], row["answer"], row.get("paraphrased_answer", row["answer"]), *wrong)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, {place}: an object with question and answer is needed: {error}"
            ) from None
        if not isinstance(wrong, list) or not all(isinstance(t, str) and t for t in texts):
            raise ValueError(f"{path}, {place}: questions and answers must be texts")
        question, answer, paraphrased = texts[:3]
        found.append(Question(question, answer, paraphrased, tuple(wrong)))
        if len(found) == limit:
            break
    if not found:
        raise ValueError(f"{path} holds no question")
    return found


def _losses(model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Iterable[tuple[str, str]]) -> Tensor:
    """Compute the mean loss in nats of the answer of each (question, answer): float64 [N]."""
    texts = [(TEMPLATE.format(question=question), f" {answer}") for question, answer in pairs]
    form = encode_forms(texts, tokenizer, MAX_LENGTH, chat=False)[0]
    windows = iter(losses_by_sample(model, form))
    counts = form["texts"].bincount().tolist()
    return torch.stack([torch.cat([next(windows) for _ in range(count)]).mean() for count in counts])


def probabilities(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> Tensor:
    """Compute P = exp(−mean token loss of the answer) of each question: float64 [N] in [0, 1]."""
    return (-_losses(model, tokenizer, [(q.question, q.answer) for q in questions])).exp()


def option_probabilities(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> Tensor:
    """Compute P of the answer over the sum of P of it and all wrong answers: float64 [N]."""
    right = probabilities(model, tokenizer, questions)
    wrong = (-_wrong_losses(model, tokenizer, questions, mean=False)).exp()
    return right / (right + wrong.sum(1))


def _wrong_losses(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], mean: bool = True
) -> Tensor:
    """Compute the losses of the K wrong answers, float64 [N, K], or their mean, [N]."""
    counts = {len(q.wrong) for q in questions}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            "all questions need the same number of wrong answers (perturbed_answer), at least one"
        )
    pairs = [(q.question, answer) for q in questions for answer in q.wrong]
    losses = _losses(model, tokenizer, pairs).view(len(questions), -1)
    return losses.mean(1) if mean else losses


def truth_ratios(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> Tensor:
    """Compute TR = exp(−mean loss of the wrong answers) / exp(−loss of the paraphrased answer): float64 [N].

    As open-unlearning computes it: the wrong answers' mean is geometric. Near 1 or above, the model no
    longer prefers the truth.
    """
    wrong = _wrong_losses(model, tokenizer, questions)
    return (_losses(model, tokenizer, [(q.question, q.paraphrased) for q in questions]) - wrong).exp()


def rouge_recalls(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> Tensor:
    """Compute the ROUGE-L recall, with stemming, of the greedy answer to each question: float64 [N].

    Raises:
        ImportError: the package rouge-score is not installed.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    ends = find_end_tokens(model, tokenizer)
    found = []
    for start in range(0, len(questions), QUESTIONS_PER_PASS):
        part = questions[start : start + QUESTIONS_PER_PASS]
        prompts = [tokenize(TEMPLATE.format(question=q.question), tokenizer)[0] for q in part]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        shown = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        output = generate(
            model,
            ids,
            shown,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
        said = [cut_at_end(line, ends) for line in output[:, longest:].tolist()]
        answers = tokenizer.batch_decode(said, skip_special_tokens=True)
        found += [
            scorer.score(q.answer, a.strip())["rougeL"].recall for q, a in zip(part, answers, strict=True)
        ]
    return torch.tensor(found, dtype=torch.float64)


def forget_quality(ratios: Tensor, retrained_ratios: Tensor) -> float:
    """Compute the p-value of a Kolmogorov–Smirnov test on the truth ratios of two models on the forget set.

    The hypothesis is that both come from one distribution; near 1 is good.

    Args:
        ratios: of the unlearned model, float [N].
        retrained_ratios: of a model that never saw the forget set, float [N].

    Raises:
        ImportError: the package scipy is not installed.
    """
    from scipy.stats import ks_2samp

    probability: float = ks_2samp(ratios.numpy(), retrained_ratios.numpy()).pvalue.item()
    return probability


def model_utility(numbers: Iterable[float]) -> float:
    """Compute the harmonic mean of numbers in [0, 1], 0 if one is 0: ``utility_numbers`` of three sets."""
    values = list(numbers)
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def utility_numbers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], normalised: bool
) -> list[float]:
    """Compute [probability, ROUGE-L recall, truth] of one set of questions, each a mean in [0, 1].

    Truth is the mean of max(0, 1 − TR), so that more is better. ``normalised``: the probability is that of
    the answer among the answer and the wrong ones.
    """
    probability = option_probabilities if normalised else probabilities
    return [
        probability(model, tokenizer, questions).mean().item(),
        rouge_recalls(model, tokenizer, questions).mean().item(),
        (1 - truth_ratios(model, tokenizer, questions)).clamp(min=0).mean().item(),
    ]
