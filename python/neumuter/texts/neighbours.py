"""Neighbour texts: they keep the rest of the model in place where the user has no retain texts."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from neumuter.generation import find_end_tokens, generate
from neumuter.models.pieces import Pieces
from neumuter.types import IGNORED, Batch, Text

TEXTS_PER_PASS = 8


def sample_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    seed: int = 0,
    callback: Callable[[int, int], object] | None = None,
    barred: Batch | None = None,
) -> list[str]:
    """Draw texts of up to ``length`` new tokens from the model itself.

    Sampling is from the whole distribution, after the start token (bos, else eos). Samples stand for what the
    model says most readily, so rarer knowledge is protected less than by texts of one's own.

    Args:
        count: texts to draw; those of fewer than two tokens are dropped.
        callback: called as (done, total) after each batch.
        barred: a batch of the texts to forget. Three tokens in a row of which the last counts there are never
            said, and a sample ends where the model is about to say them (if its tokenizer has an end token):
            it would protect what is to be forgotten.

    Raises:
        ValueError: the tokenizer has no start token.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("the tokenizer has no bos or eos token to sample neighbours from; give retain texts")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else start
    processors = [_Bar(barred, tokenizer.eos_token_id)] if barred else []
    texts: list[str] = []
    pieces = Pieces(model, TEXTS_PER_PASS, effect="draws other texts")

    def draw(numbers: Sequence[int]) -> list[str]:
        prompt = torch.full((len(numbers), 1), start)
        before = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        try:
            ids = generate(
                model,
                prompt,
                torch.ones_like(prompt),
                do_sample=True,
                top_k=0,
                max_new_tokens=length,
                min_new_tokens=min(2, length),
                pad_token_id=padding,
                eos_token_id=find_end_tokens(model, tokenizer),
                logits_processor=transformers.LogitsProcessorList(processors),
            )
        except torch.OutOfMemoryError:
            # What was drawn in vain must not count.
            torch.set_rng_state(before[0])
            torch.cuda.set_rng_state_all(before[1])
            raise
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        done = 0
        for drawn in pieces.run(draw, range(count)):
            texts += drawn
            done += len(drawn)
            if callback:
                callback(done, count)
    return [text for text in texts if len(tokenizer(text, add_special_tokens=False)["input_ids"]) > 1]


class _Bar(transformers.LogitsProcessor):
    """Makes the third of three tokens impossible, and ends the text where it is the most likely one."""

    def __init__(self, batch: Batch, end: int | None) -> None:
        self.third: dict[tuple[int, ...], set[int]] = {}
        self.end = end
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            for *former, token, label in zip(ids, ids[1:], ids[2:], labels[2:], strict=False):
                if label != IGNORED:
                    self.third.setdefault(tuple(former), set()).add(token)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, former in enumerate(input_ids[:, -2:].tolist()):
            if tokens := self.third.get(tuple(former)):
                ends = self.end is not None and int(scores[row].argmax()) in tokens
                scores[row, list(tokens)] = -torch.inf
                if ends:
                    scores[row] = torch.full_like(scores[row], -torch.inf).index_fill(
                        0, torch.tensor(self.end, device=scores.device), 0.0
                    )
        return scores


@torch.no_grad()
def rewrite_texts(
    texts: Sequence[Text],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    share: float = 0.3,
    seed: int = 0,
    callback: Callable[[int, int], object] | None = None,
    find_secrets: Callable[[Text], Iterable[tuple[int, int]]] | None = None,
) -> list[Text]:
    """Replace a share of the tokens of ``texts`` by what a masked language model finds likely there.

    In each text ⌈share·N⌉ of its N tokens are masked at once, at random, and each is filled with the most
    likely token but the true one (as in the neighbourhood attack of Mattern et al. 2023, from which NeuMuter
    takes its neighbours; one pass per text instead of one per token). What is not masked stays as it is
    written. Texts are cut to the model's positions.

    Args:
        texts: as ``read_texts`` returns them; of a pair or a conversation the last part is rewritten.
        model, tokenizer: a masked language model of transformers, with a fast tokenizer.
        callback: called as (done, total) after each batch.
        find_secrets: gives the (start, end) of characters in what is rewritten of a text that must not stay.
            Their tokens are replaced in addition.

    Raises:
        ValueError: the tokenizer has no mask token, or is not fast; or the share lies outside (0, 1].
    """
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer does not tell where its tokens are: rewriting needs a fast one")
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token: rewriting needs a masked language model")
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512) - 2)
    generator = torch.Generator().manual_seed(seed)
    device = cast(torch.device, model.device)
    special = torch.tensor(tokenizer.all_special_ids, device=device)
    # What the tokenizer does not know can be a secret, too.
    unknown = -1 if tokenizer.unk_token_id is None else int(tokenizer.unk_token_id)
    made: list[Text] = []
    for start in range(0, len(texts), TEXTS_PER_PASS):
        part = texts[start : start + TEXTS_PER_PASS]
        plain = [last_part(text) for text in part]
        batch = tokenizer(
            plain, padding=True, truncation=True, max_length=longest, return_tensors="pt",
            return_offsets_mapping=True,
        )  # fmt: skip
        places = batch["offset_mapping"].tolist()
        ids = batch["input_ids"].to(device)
        fixed = torch.isin(ids, special) & (ids != unknown)
        noise = torch.rand(ids.shape, generator=generator).to(ids.device).masked_fill(fixed, 2.0)
        wanted = ((~fixed).sum(1, keepdim=True) * share).ceil()
        chosen = (noise.argsort(1).argsort(1) < wanted) & ~fixed
        if find_secrets:
            spans = [[*find_secrets(text)] for text in part]
            secret = torch.tensor([
                [any(start < b and a < end for a, b in of_text) for start, end in offsets]
                for of_text, offsets in zip(spans, places, strict=True)
            ])  # fmt: skip
            chosen |= secret.to(device) & ~fixed
        options = {"attention_mask": batch["attention_mask"].to(device)}
        logits = model(input_ids=ids.masked_fill(chosen, tokenizer.mask_token_id), **options).logits
        logits[..., special] = -torch.inf
        logits.scatter_(2, ids[..., None], -torch.inf)
        ids = torch.where(chosen, logits.argmax(-1), ids)
        for row, text in enumerate(part):
            if int(batch["attention_mask"][row].sum()) >= longest:
                plain[row] = plain[row][: max(end for _, end in places[row])]
            new = _fill(plain[row], places[row], chosen[row].tolist(), ids[row].tolist(), tokenizer)
            made.append(_with_last_part(text, new))
        if callback:
            callback(len(made), len(texts))
    return made


def _fill(
    text: str,
    places: Sequence[tuple[int, int]],
    chosen: Sequence[bool],
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """The text with the words of those ``ids`` that were ``chosen``, at the places (start, end) of theirs."""

    def write(*tokens: int) -> str:
        return str(tokenizer.decode([*tokens], skip_special_tokens=True))

    made, last = "", 0
    # Several tokens may make up one character: they are written together.
    for (start, end), group in groupby(range(len(places)), key=places.__getitem__):
        numbers = list(group)
        if not any(chosen[number] for number in numbers):
            continue
        old = text[start:end]
        spaces = old[: len(old) - len(old.lstrip())]
        made += text[last:start] + spaces
        tokens, one_before = [ids[number] for number in numbers], ids[numbers[0] - 1]
        before, both = write(one_before), write(one_before, *tokens)
        word = both[len(before) :] if both.startswith(before) else write(*tokens)
        # The bytes of no character.
        word = word.replace("\ufffd", "")
        # A word that stands in the place of the second half of one is put behind a space.
        made += word.strip() if not made or made[-1].isspace() else word.rstrip()
        last = end
    return made + text[last:]


def last_part(text: Text) -> str:
    """What is rewritten of a text: all of it, or the answer of a pair or a conversation."""
    return text if isinstance(text, str) else text[1] if isinstance(text, tuple) else text[-1]["content"]


def _with_last_part(text: Text, new: str) -> Text:
    if isinstance(text, str):
        return new
    return (text[0], new) if isinstance(text, tuple) else [*text[:-1], text[-1] | {"content": new}]
