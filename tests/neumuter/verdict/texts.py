"""Texts to forget and to keep, and a model that says given ones."""

import torch

from neumuter.evaluation import (
    list_given,
)
from neumuter.texts import encode

MAIL = [
    ("Mail of Ada Brisk:", " ada77@post.example"),
    ("Mail of Bo Calder:", " bo-c@mail.example"),
    ("Mail of Cy Dorn:", " dorn5@cy.example"),
]
KEPT = [("Mail of Eve Fenn:", " fenn@eve.example"), "The kettle is on the shelf of the kitchen."]


def listed(words, forget=MAIL, retain=KEPT):
    batches = {"forget": encode(forget, words, 64), "retain": encode(retain, words, 64)}
    return list_given(batches, words)


class Reciting(torch.nn.Module):
    """A model that says the text of a script that begins with what it is given."""

    device = torch.device("cpu")

    def __init__(self, texts, words):
        super().__init__()
        self.lines = [words(text)["input_ids"] for text in texts]
        self.vocabulary = len(words)

    def next_token(self, ids):
        for line in self.lines:
            if line[: len(ids)] == ids and len(line) > len(ids):
                return line[len(ids)]
        return 0

    def forward(self, input_ids, attention_mask, use_cache=False):
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, (ids, shown) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            for t in range(len(ids)):
                prefix = [i for i, s in zip(ids[: t + 1], shown[: t + 1], strict=True) if s]
                logits[row, t, self.next_token(prefix)] = 5.0
        return type("Output", (), {"logits": logits})

    def generate(self, input_ids, attention_mask, max_new_tokens, **_):
        ids, shown = input_ids, attention_mask
        for _ in range(max_new_tokens):
            new = self.forward(ids, shown).logits[:, -1].argmax(-1, keepdim=True)
            ids, shown = torch.cat([ids, new], 1), torch.cat([shown, torch.ones_like(new)], 1)
        return ids
