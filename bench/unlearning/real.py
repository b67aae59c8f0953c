"""A real pretrained model that has learned given texts by heart, because it was fine-tuned on them."""

import functools
import hashlib
import json

import torch
from safetensors.torch import load_file, save

from bench.unlearning import people
from bench.unlearning.methods import COMPARED, Job, find_unseen, run
from bench.unlearning.others import others_rate
from bench.unlearning.pretrained import SMOLLM2, pretrained, tokenizer
from neumuter import evaluation
from neumuter.demo import task
from neumuter.demo.model import cache_folder
from neumuter.evaluation import tofu
from neumuter.files import write_atomically
from neumuter.preparing import count_samples
from neumuter.texts import encode, join_batches
from neumuter.texts.neighbours import sample_texts
from neumuter.training.losses import token_losses
from neumuter.training.sources import Shuffled
from neumuter.types import IGNORED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A processor without instructions for bfloat16 is five times slower in it than in float32.
HALVES = DEVICE == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
DTYPE = torch.bfloat16 if HALVES else torch.float32
TUNING = {"batch_size": 16, "lr": 2e-4, "most_epochs": 40, "extraction": 0.97}
# The method was chosen on seeds 307, 311 and 401. Nobody has tuned anything on these.
SEEDS = (313, 317, 331)
PEOPLE = 8  # half of them to forget, six questions each
WINDOWS = 32  # of held-out text, 64 tokens each
SAMPLE_TOKENS = 48  # of a text of the model itself among the neighbours
RECIPE = {"batch_size": 8, "steps": 40, "lr": 2e-5, "paper_epochs": 3}
BUDGETS = (0.005, 0.02)  # in addition to 1 %
OURS = "neumuter, modulate"


def tuned(batch, seed, name=SMOLLM2):
    """The model in ``DTYPE``, fine-tuned until greedy decoding gives back the texts of ``batch``.

    Kept in the cache, in bfloat16, under a hash of all that the weights depend on.
    """
    about = [TUNING, seed, torch.__version__, *([] if HALVES else ["float32"])]
    about += [name] if name != SMOLLM2 else []
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for key in ("input_ids", "labels"):
        digest.update(batch[key].numpy().tobytes())
    path = cache_folder() / f"tuned-{digest.hexdigest()[:32]}.safetensors"
    model = pretrained(name)
    if not path.exists():
        _tune(model, batch, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({n: p.detach().bfloat16() for n, p in model.named_parameters()}))
    model = model.to(DTYPE)
    missing = model.load_state_dict(load_file(path), strict=False)
    assert not missing.unexpected_keys
    return model.to(DEVICE).eval()


def _tune(model, batch, seed):
    optimizer = torch.optim.AdamW(model.parameters(), lr=TUNING["lr"], weight_decay=0.01)
    count, size = len(batch["labels"]), TUNING["batch_size"]
    queue = Shuffled(0, count, torch.Generator().manual_seed(seed))
    steps = -(-count // size)
    model.to(DEVICE).train()
    for epoch in range(1, TUNING["most_epochs"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = TUNING["lr"] * min(1.0, epoch / 2)
        for _ in range(steps):
            rows = [next(queue) for _ in range(size)]
            part = {name: value[rows].to(DEVICE) for name, value in batch.items()}
            with torch.autocast(DEVICE, torch.bfloat16, enabled=HALVES):
                logits = model(
                    input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False
                ).logits
            loss = token_losses(logits, part["labels"]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        # A text whose tokens cost more than this on average is not known by heart.
        if loss.item() > 0.5:
            continue
        model.eval()
        rate = evaluation.extraction_rate(model, batch)
        model.train()
        print(f"epoch {epoch}: loss {loss.item():.3f}, extraction {rate:.2f}", flush=True)
        if rate >= TUNING["extraction"]:
            break


class Setting:
    """The model that knows what is to be forgotten and what is to stay, and what is measured on it.

    A subclass gives the batches ``forget`` and ``retain``, and what else is measured.
    """

    recipe = RECIPE

    def __init__(self, seed, forget, retain, name=SMOLLM2):
        self.seed, self.forget, self.retain, self.name = seed, forget, retain, name
        self.tokenizer = tokenizer(name)
        self.full = tuned(join_batches(forget, retain), seed, name)
        ids = task.windows(self.tokenizer, task.read_corpus()[1])[:WINDOWS]
        self.heldout = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def measure(self, model, forget=None):
        """``forget``: what is asked about, by default all that is to be forgotten."""
        forget = self.forget if forget is None else forget
        return {
            "forget_extraction": evaluation.extraction_rate(model, forget),
            "forget_ma": evaluation.memorization_accuracy(model, forget),
            "forget_sampled": evaluation.sampled_extraction(model, forget),
            "forget_loss": evaluation.mean_token_loss(model, forget),
            # All texts to forget are among them: of a half that was learned again, another one may come out.
            "others": others_rate(model, self.tokenizer, forget, join_batches(self.forget, self.retain)),
            "retain_extraction": evaluation.extraction_rate(model, self.retain),
            "retain_loss": evaluation.mean_token_loss(model, self.retain),
            "heldout_perplexity": evaluation.perplexity(model, self.heldout),
        }

    def retrained(self):
        """The model that never saw what is to be forgotten."""
        return tuned(self.retain, self.seed, self.name)

    @functools.cached_property
    def samples(self):
        """What the model itself says, in as many texts as ``unlearn`` takes."""
        return self.sample(count_samples(len(self.retain["labels"])))

    def sample(self, count):
        """``count`` texts of the model itself."""
        made = sample_texts(self.full, self.tokenizer, count, SAMPLE_TOKENS, self.seed, barred=self.forget)
        return encode(made, self.tokenizer, SAMPLE_TOKENS)

    @functools.cached_property
    def kept(self):
        """The texts to keep, and what the model itself says."""
        return join_batches(self.retain, self.samples)

    @functools.cached_property
    def unseen(self):
        """What a model that never saw the texts to forget would make of them."""
        return self._find_unseen(self.kept)

    def _find_unseen(self, kept):
        return find_unseen(self.full, self.tokenizer, self.forget, kept, self.seed)

    def job(self, share, neighbours="retain"):
        if neighbours == "retain":
            return self.make_job(share, self.kept, lambda: self.unseen)
        return self.make_job(share, self.samples)

    def make_job(self, share, kept, unseen=None):
        """A job with other texts to keep; ``unseen``: the estimate, if it is known."""
        recipe, find = self.recipe | {"share": share}, unseen or (lambda: self._find_unseen(kept))
        return Job(self.full, self.forget, kept, self.measure, recipe, self.seed, find)


class People(Setting):
    """Questions about people who do not exist, half of whom are to be forgotten."""

    def __init__(self, seed, name=SMOLLM2, count=None):
        made = people.questions(seed, count or PEOPLE)
        forget, retain = made[: len(made) // 2], made[len(made) // 2 :]
        words = tokenizer(name)
        self.paraphrased = encode_answers(forget, words, "paraphrased_question")
        self.secrets = encode_values(forget, words)
        super().__init__(seed, encode_answers(forget, words), encode_answers(retain, words), name)

    def measure(self, model, forget=None):
        found = super().measure(model, forget)
        if forget is None:
            found["forget_secrets"] = evaluation.secret_extraction(model, self.secrets)
            found["paraphrased_ma"] = evaluation.memorization_accuracy(model, self.paraphrased)
        return found


def encode_answers(made, tokenizer, question="question"):
    texts = [
        (tofu.TEMPLATE.format(question=row[question]), f" {row['answer']}") for rows in made for row in rows
    ]
    return encode(texts, tokenizer, 128)


def encode_values(made, tokenizer):
    """The batch of questions and answers of which the values alone count."""
    batch = encode_answers(made, tokenizer)
    labels = torch.full_like(batch["labels"], IGNORED)
    for line, row in enumerate(row for rows in made for row in rows):
        text = f"{tofu.TEMPLATE.format(question=row['question'])} {row['answer']}"
        first = text.rindex(row["value"])
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        # Start tokens come before.
        behind = int(batch["attention_mask"][line].sum()) - len(offsets)
        for place, (start, end) in enumerate(offsets, behind):
            if start < first + len(row["value"]) and end > first:
                labels[line, place] = batch["input_ids"][line, place]
    return batch | {"labels": labels}


def cases(quick=False):
    """Yields (what a row is about, how its metrics are found); ``quick``: one seed, few methods."""
    for seed in SEEDS[:1] if quick else SEEDS:
        yield from _cases(seed, quick)


def _cases(seed, quick):
    setting = functools.cache(lambda: People(seed))
    about = {"model": SMOLLM2, "seed": seed, "forget": PEOPLE // 2 * len(people.FACTS)}

    def case(budget, method, neighbours="retain"):
        return (
            about | {"neighbours": neighbours, "budget": budget, "method": method},
            lambda: run(setting().job(budget, neighbours), method),
        )

    yield about | {"method": "before"}, lambda: {"share": 0.0} | setting().measure(setting().full)
    yield about | {"method": "retrained"}, lambda: {"share": 0.0} | setting().measure(setting().retrained())
    for method in ("random", OURS) if quick else COMPARED:
        yield case(0.01, method)
    if not quick:
        for share in BUDGETS:
            yield case(share, OURS)
        yield case(0.01, OURS, "own samples")
