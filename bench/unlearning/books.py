"""BOOKS: passages of a book, after the six criteria of MUSE (Shi et al. 2024).

The book is the reference of the Python language, chapters of which every Python brings (``pydoc_data``, PSF
licence). A model has learned passages of some chapters by heart. Those of a few chapters are to be forgotten:
*verbatim* and *knowledge* are what it still says of them, the latter asked for sentence by sentence; and
*leakage* whether the passages can be told from those of chapters that it never saw. The model is to keep the
passages of other chapters, and its *utility*. Requests of four *sizes* are measured, and four requests *one
after another*.
"""

import copy
import functools
import pydoc_data.topics
import random
import re
import string

import torch

import neumuter
from bench.unlearning import real
from bench.unlearning.methods import configure
from bench.unlearning.others import others_rate
from bench.unlearning.pretrained import SMOLLM2, tokenizer
from neumuter import evaluation
from neumuter.demo import task
from neumuter.demo.model import Training, architecture, build, load_or_train
from neumuter.evaluation.examination import continue_prompts
from neumuter.preparing import count_samples
from neumuter.recipes import fit_mutes, measure_slopes
from neumuter.serving.live import mute
from neumuter.texts import encode, join_batches
from neumuter.training.batches import PairedBatches
from neumuter.training.weights import tune_weights
from neumuter.types import IGNORED

# Tokens of a passage, and those of them that verbatim extraction starts from.
PASSAGE, PROMPT = 64, 32
# Passages to forget at most, and as many to keep and unseen; of one chapter at most a quarter of them.
MOST, CHAPTERS = 64, 4
# Words of a sentence that is asked for, and how many at its end are the answer. Of sentences with so many
# words as the last, chapters have none in common.
ASKED_WORDS, ANSWER, LEAST_WORDS = 6, 3, 10
REQUESTS = 4
BATCH_SIZE = 8
# How often the methods that tune weights visit each passage, and their learning rates on the small model:
# those that did best on seed 5.
VISITS = 20
RATES = {"npo": 1e-3, "simnpo": 1e-4, "difference": 1e-4}
SEPARATED = re.compile(r"(?<=[.:;?!]) +")


class Book:
    """Passages of chapters, each as token ids of one length; ``forget``, ``retain`` and ``unseen`` ones."""

    def __init__(self, words, seed, most):
        chapters = [words(text, add_special_tokens=False)["input_ids"] for text in read_chapters()]
        random.Random(seed).shuffle(chapters)
        cut = iter([_cut(ids, -(-most // CHAPTERS)) for ids in chapters])
        self.forget, self.retain, self.unseen = (_take(cut, most) for _ in range(3))


def read_chapters():
    """The chapters that repeat no other, the longest first, as lines of prose."""
    found, seen = [], set()
    for text in sorted(pydoc_data.topics.topics.values(), key=len, reverse=True):
        prose = " ".join(
            " ".join(line for line in text.splitlines() if line.strip(string.punctuation)).split()
        )
        sentences = SEPARATED.split(prose)
        if not seen.intersection(sentence for sentence in sentences if len(sentence.split()) >= LEAST_WORDS):
            found.append(prose)
        seen.update(sentences)
    return found


def _cut(ids, most):
    """Up to ``most`` passages from the beginning of a chapter."""
    return [ids[i : i + PASSAGE] for i in range(0, min(len(ids), most * PASSAGE) - PASSAGE + 1, PASSAGE)]


def _take(chapters, count):
    """The passages of the next chapters, whole ones but for the last, [count, PASSAGE]."""
    found = []
    while len(found) < count:
        if (passages := next(chapters, None)) is None:
            raise ValueError(f"the book has too few passages of {PASSAGE} tokens: {count} are needed thrice")
        found += passages
    return torch.tensor(found[:count])


def whole(passages):
    """The batch of passages, all tokens of which count."""
    return {"input_ids": passages, "attention_mask": torch.ones_like(passages), "labels": passages}


def ask_verbatim(passages):
    labels = passages.clone()
    labels[:, :PROMPT] = IGNORED
    return whole(passages) | {"labels": labels}


def ask_sentences(passages, words):
    """The ends of the sentences of passages, each asked for by its beginning alone."""
    pairs = []
    for ids in passages:
        # The first and the last one of a passage may be cut.
        for sentence in SEPARATED.split(words.decode(ids))[1:-1]:
            if len(parts := sentence.split()) >= ASKED_WORDS:
                pairs.append((" ".join(parts[:-ANSWER]), " " + " ".join(parts[-ANSWER:])))
    return encode(pairs, words, 2 * PASSAGE, chat=False)


def recall(model, words, batch):
    """ROUGE-L recall of what counts in the greedy continuations, the mean."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer, counted = RougeScorer(["rougeL"]), batch["labels"] != IGNORED
    said = continue_prompts(model, words, batch, int(counted.sum(1).max()))
    found = []
    for ids, row, where in zip(said, batch["input_ids"], counted, strict=True):
        truth = row[where]
        found.append(scorer.score(words.decode(truth), words.decode(ids[: len(truth)]))["rougeL"].recall)
    return sum(found) / len(found)


class Shelf:
    """A model that has learned the passages to forget and to keep.

    A subclass gives the tokenizer ``words``, ``heldout``, a batch of ordinary text, ``others``, what else is
    to be kept, and ``train(passages)``. ``sizes``: of requests, in passages. ``shares`` of the neurons.
    ``steps``: of a weight method, per passage to forget.
    """

    def __init__(self, seed):
        self.seed, self.book = seed, Book(self.words, seed, max(self.sizes))
        self.full = self.train(torch.cat([self.book.forget, self.book.retain]))

    @functools.cached_property
    def retrained(self):
        return self.train(self.book.retain)

    def kept(self):
        return join_batches(whole(self.book.retain), self.others)

    def measure(self, model, first, last):
        """Of the passages to forget from ``first`` on, before ``last``; those behind them may still stay."""
        forget, waiting = self.book.forget[first:last], self.book.forget[last:]
        asked, known = ask_verbatim(forget), ask_verbatim(torch.cat([waiting, self.book.retain]))
        found = {
            "verbatim": recall(model, self.words, asked),
            "knowledge": recall(model, self.words, ask_sentences(forget, self.words)),
            "forget_extraction": evaluation.extraction_rate(model, asked),
            "others": others_rate(model, self.words, asked, known),
            "leakage": evaluation.privacy_leakage(
                self.find_auc(model, forget), self.find_auc(self.retrained, forget)
            ),
            "retain_verbatim": recall(model, self.words, ask_verbatim(self.book.retain)),
            "retain_knowledge": recall(model, self.words, ask_sentences(self.book.retain, self.words)),
            "heldout_perplexity": evaluation.perplexity(model, self.heldout),
        }
        return found | ({"waiting": recall(model, self.words, ask_verbatim(waiting))} if len(waiting) else {})

    def find_auc(self, model, forget):
        """The AUC by which passages can be told from unseen ones."""
        scores = (evaluation.min_k_scores(model, whole(part)) for part in (forget, self.book.unseen))
        return evaluation.auc(*scores)

    def pair(self, masked, first, last):
        """The passages to forget from ``first`` on, before ``last``, beside what is to be kept."""
        return PairedBatches(masked, whole(self.book.forget[first:last]), self.kept())

    def tune(self, model, method, first, last):
        """``model`` after a method that tunes its weights."""
        model, steps = copy.deepcopy(model).float().requires_grad_(True), round(self.steps * (last - first))
        config = configure(method, max(1, steps), BATCH_SIZE, self.rates[method])
        tune_weights(model, whole(self.book.forget[first:last]), self.kept(), config, self.seed + first)
        return model.to(self.full.dtype).requires_grad_(False)


class Small(Shelf):
    """A model of the demo's size, trained from scratch on docstrings and the passages."""

    seeds, sizes, shares, requests = (307, 311, 313), (8, 16, 32, 64), (0.1, 1.0), REQUESTS
    rates = RATES
    steps = VISITS / BATCH_SIZE
    training = Training(steps=1000, batch_size=40, records_per_batch=32, lr=4e-3)
    windows = 32

    def __init__(self, seed):
        texts, heldout = task.read_corpus()
        self.words = task.train_tokenizer(texts)
        self.text = task.windows(self.words, texts)
        self.heldout = whole(task.windows(self.words, heldout)[: task.HELDOUT_WINDOWS])
        self.others = whole(self.text[torch.linspace(0, len(self.text) - 1, self.windows).long()])
        super().__init__(seed)

    def train(self, passages):
        config = architecture()
        state = load_or_train(self.text, whole(passages), self.training, self.seed, config=config)
        return build(state, config).requires_grad_(False)


class Pretrained(Shelf):
    """SmolLM2, fine-tuned on the passages."""

    seeds, sizes, shares, requests = (313,), (16,), (0.01, 0.1), 0
    rates = dict.fromkeys(RATES, real.RECIPE["lr"])
    # As many as in REAL.
    steps = real.RECIPE["steps"] / sizes[0]

    def __init__(self, seed):
        self.words = tokenizer()
        _, heldout = task.read_corpus()
        self.heldout = whole(task.windows(self.words, heldout)[: real.WINDOWS])
        super().__init__(seed)

    @functools.cached_property
    def others(self):
        """What the model itself says."""
        options = (count_samples(len(self.book.retain)), real.SAMPLE_TOKENS, self.seed)
        made = real.sample_texts(self.full, self.words, *options, barred=whole(self.book.forget))
        return encode(made, self.words, real.SAMPLE_TOKENS)

    def train(self, passages):
        return real.tuned(whole(passages), self.seed).requires_grad_(False)


SETTINGS = {"gated, 0.9 M": Small, SMOLLM2: Pretrained}


def cases(quick=False):
    """Yields a case for each model, seed, size and method, and for each of several requests."""
    for model, kind in [*SETTINGS.items()][: 1 if quick else None]:
        for seed in kind.seeds[: 1 if quick else None]:
            shelf = functools.cache(functools.partial(kind, seed))
            about, others = {"model": model, "seed": seed}, [*kind.rates][: 1 if quick else None]
            for size in kind.sizes[: 1 if quick else None]:
                yield from _size_cases(about | {"passages": size}, shelf, kind, size, others)
            if kind.requests:
                yield from _request_cases(about, shelf, kind, others)


def _size_cases(about, shelf, kind, size, others):
    yield about | {"method": "before"}, lambda: _look_at(shelf(), shelf().full, size)
    yield about | {"method": "retrained"}, lambda: _look_at(shelf(), shelf().retrained, size)
    for share in kind.shares:
        found = functools.partial(_mute, shelf, share, size)
        yield about | {"method": "neumuter, modulate", "budget": share}, found
    for method in others:
        yield (
            about | {"method": method},
            lambda method=method: shelf().measure(shelf().tune(shelf().full, method, 0, size), 0, size),
        )


def _look_at(shelf, model, size):
    return {"share": 0.0} | shelf.measure(model, 0, size)


def _mute(shelf, share, size):
    shelf = shelf()
    with neumuter.attach(shelf.full, start_layer=0) as masked:
        mutes = fit_mutes(shelf.pair(masked, 0, size), share, seed=shelf.seed)
    with mute(shelf.full, mutes):
        return {"share": mutes.share} | shelf.measure(shelf.full, 0, size)


def _request_cases(about, shelf, kind, others):
    """One request after another, each of its part of the passages; what is measured are all so far."""
    size = max(kind.sizes) // kind.requests
    for method in ("neumuter, modulate", *others):
        states = functools.cache(functools.partial(_ask_in_turn, shelf, method, size))
        for asked in range(1, kind.requests + 1):
            yield (
                about | {"method": method, "requests": asked},
                lambda states=states, asked=asked: states()[asked - 1],
            )


def _ask_in_turn(shelf, method, size):
    shelf, model, mutes, former, found = shelf(), shelf().full, None, [], []
    for first in range(0, size * shelf.requests, size):
        if method in shelf.rates:
            model = shelf.tune(model, method, first, first + size)
            found.append(shelf.measure(model, 0, first + size))
            continue
        share = max(shelf.shares) / shelf.requests
        with neumuter.attach(model, start_layer=0) as masked:
            pair = shelf.pair(masked, first, first + size)
            mutes = fit_mutes(pair, share, existing=mutes, former=former, seed=shelf.seed + first)
            former.append(measure_slopes(pair, mutes))
        with mute(model, mutes):
            found.append({"share": mutes.share} | shelf.measure(model, 0, first + size))
    return found
