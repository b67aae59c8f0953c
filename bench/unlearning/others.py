"""Whose text comes out instead: the share of answers in which another person's text stands."""

from neumuter.evaluation import list_given
from neumuter.evaluation.examination import continue_prompts
from neumuter.evaluation.others import find_others

LENGTH = 64  # tokens of an answer


def others_rate(model, tokenizer, forget, retain):
    """The share of prompts of ``forget`` whose greedy continuation has another text of the two batches."""
    given = list_given({"forget": forget, "retain": retain}, tokenizer)
    said = continue_prompts(model, tokenizer, forget, LENGTH)
    found = find_others(given[: len(said)], said, given, tokenizer)
    return sum(other is not None for other in found) / len(found)
