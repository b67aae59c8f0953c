"""What a model still knows of given texts, and what it knows otherwise.

``METRICS`` says of each figure what it means, which direction is good, and where it comes from. Functions
take a model and a batch as in :mod:`neumuter.training.losses`; nothing here trains.
"""

from neumuter.evaluation.auditing import Audit, Known, audit
from neumuter.evaluation.continuations import continue_texts
from neumuter.evaluation.controls import make_controls
from neumuter.evaluation.examination import Examination, compare_texts, examine
from neumuter.evaluation.forms import most_known
from neumuter.evaluation.harness import harness_metrics
from neumuter.evaluation.language import kl_to_original, mean_token_loss, perplexity, sample_losses
from neumuter.evaluation.membership import auc, min_k_scores, privacy_leakage
from neumuter.evaluation.memory import (
    extracted,
    extraction_likelihood,
    extraction_rate,
    extraction_strength,
    memorization_accuracy,
    sampled_extraction,
    secret_extraction,
)
from neumuter.evaluation.metrics import METRICS, Metric
from neumuter.evaluation.others import find_others, find_overlap, list_given
from neumuter.evaluation.server import Said, ask_server
from neumuter.evaluation.suites import summary_metrics, text_metrics, tofu_metrics
from neumuter.evaluation.unseen import estimate_unseen, find_ceilings, only_secrets
from neumuter.evaluation.verdict import Comparison, Verdict, judge, judge_texts

__all__ = [
    "METRICS",
    "Audit",
    "Comparison",
    "Examination",
    "Known",
    "Metric",
    "Said",
    "Verdict",
    "ask_server",
    "auc",
    "audit",
    "compare_texts",
    "continue_texts",
    "estimate_unseen",
    "examine",
    "extracted",
    "extraction_likelihood",
    "extraction_rate",
    "extraction_strength",
    "find_ceilings",
    "find_others",
    "find_overlap",
    "harness_metrics",
    "judge",
    "judge_texts",
    "kl_to_original",
    "list_given",
    "make_controls",
    "mean_token_loss",
    "memorization_accuracy",
    "min_k_scores",
    "most_known",
    "only_secrets",
    "perplexity",
    "privacy_leakage",
    "sample_losses",
    "sampled_extraction",
    "secret_extraction",
    "summary_metrics",
    "text_metrics",
    "tofu_metrics",
]
