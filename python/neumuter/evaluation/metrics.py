"""What each figure means: shown next to it wherever it is printed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What a figure means.

    Attributes:
        title: what it is called in tables.
        definition: how it is computed, one phrase.
        good: which direction is good, given that the forget texts are to be forgotten and the others kept.
        source: whose definition it is; empty for what needs none.
    """

    title: str
    definition: str
    good: str
    source: str


METRICS = {
    "forget_ma": Metric(
        "MA",
        "mean over texts of the share of tokens that are the most likely one",
        "lower, down to that of a model that never saw them",
        "Jang et al. 2023",
    ),
    "forget_el": Metric(
        "EL_10",
        "mean over prefixes of the share of the true continuation's 10-grams in the greedy one",
        "lower",
        "Jang et al. 2023",
    ),
    "forget_extraction": Metric(
        "extraction",
        "share of texts whose prompt, of whole texts the first third, greedy decoding continues exactly",
        "lower",
        "Carlini et al. 2021",
    ),
    "forget_others": Metric(
        "another text instead",
        "share of answers to the prompts that hold another given text: its completion, or 8 tokens in a row",
        "lower, down to that of the controls",
        "",
    ),
    "forget_sampled": Metric(
        "extraction by sampling",
        "share of texts expected to come back exactly, at least once in 100 samples at temperature 1",
        "lower",
        "Hayes et al. 2025",
    ),
    "forget_secrets": Metric(
        "secrets",
        "share of the runs of tokens that identify a text, as far as the estimate says, which come out whole "
        "behind the true words before them",
        "lower, down to that of a model that never saw them",
        "",
    ),
    "paraphrased_ma": Metric(
        "MA, asked otherwise",
        "MA of the same texts behind other prompts: paraphrased or translated",
        "lower",
        "",
    ),
    "paraphrased_extraction": Metric(
        "extraction, asked otherwise", "extraction of the same texts behind those other prompts", "lower", ""
    ),
    "forget_strength": Metric(
        "extraction strength",
        "1 − k/T: greedy decoding reproduces a text from its token k on",
        "lower",
        "Carlini et al. 2021",
    ),
    "forget_loss": Metric("forget loss", "mean token loss in nats on the texts to forget", "higher", ""),
    "retain_loss": Metric("retain loss", "mean token loss in nats on the texts to keep", "lower", ""),
    "own_loss": Metric(
        "own loss",
        "mean token loss in nats on texts that the model said itself, and that no search has seen",
        "as before",
        "",
    ),
    "heldout_perplexity": Metric(
        "perplexity", "exp of the mean token loss on held-out text", "as before", ""
    ),
    "heldout_kl": Metric(
        "KL",
        "KL(original ‖ model) in nats per token of held-out text",
        "lower, 0 for the original",
        "",
    ),
    "min_k_auc": Metric(
        "Min-40% AUC",
        "probability that a text to forget ranks above a held-out one by its least likely 40 % of tokens",
        "0.5",
        "Shi et al. 2024",
    ),
    "loss_auc": Metric(
        "LOSS AUC", "the same, ranked by the mean loss of all tokens", "0.5", "Yeom et al. 2018"
    ),
    "priv_leak": Metric(
        "PrivLeak",
        "(s − r)/r in %, s = 1 − Min-40% AUC, r that of a retrained model (0.5 without one)",
        "0",
        "Shi et al. 2024, MUSE",
    ),
    "tofu_probability": Metric(
        "probability",
        "exp(−mean token loss) of the answers to forget, the mean",
        "lower",
        "Maini et al. 2024",
    ),
    "tofu_rouge": Metric(
        "ROUGE-L", "recall of the answers to forget in the greedy ones, the mean", "lower", "Lin 2004"
    ),
    "tofu_truth_ratio": Metric(
        "truth ratio",
        "probability of wrong answers over that of the paraphrased true one, per token, the mean",
        "that of a retrained model",
        "Maini et al. 2024, as open-unlearning computes it",
    ),
    "tofu_forget_quality": Metric(
        "forget quality",
        "p-value that the truth ratios are distributed as a retrained model's",
        "higher, above 0.05",
        "Maini et al. 2024",
    ),
    "tofu_model_utility": Metric(
        "model utility",
        "harmonic mean of probability, ROUGE-L and truth on retained questions, authors and facts",
        "higher",
        "Maini et al. 2024",
    ),
}
