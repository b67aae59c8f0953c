"""For you if you have your own training loop and objective: NeuMuter provides the masks, you write the rest.

    python -m neumuter.demo small            # once: writes a small model and its texts
    python examples/custom_loop_user.py small

Here one backward pass chooses the neurons, and Adam fits a signed gain to each. The loss has two terms: a
hinge on the log-odds of the texts to forget, and the usual loss on the texts to keep. Any differentiable loss
will do.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import neumuter
from neumuter.evaluation import extraction_rate
from neumuter.texts import encode, read_texts
from neumuter.training.losses import odds_hinge, token_losses

SHARE, STEPS, KEEP_WEIGHT = 0.1, 40, 6.0

folder = Path(sys.argv[1])
disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(folder / "small-model")
tokenizer = AutoTokenizer.from_pretrained(folder / "small-model")
forget = encode(read_texts(folder / "forget.jsonl"), tokenizer, max_length=64)
retain = encode(read_texts(folder / "retain.jsonl"), tokenizer, max_length=64)


def losses(batch):
    """Cross-entropy, in nats, of each token of the completions."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return token_losses(logits, batch["labels"])


def forgetting():
    """Zero once the log-odds of every token to forget are below −1."""
    return odds_hinge(losses(forget), margin=1.0).mean()


def keeping():
    return losses(retain).mean()


def show(state):
    forgotten, kept = extraction_rate(model, forget), extraction_rate(model, retain)
    print(f"{state}: says {forgotten:.0%} of what to forget word for word, {kept:.0%} of what to keep")


show("before")
# attach() freezes the weights of the model: only the gains are trained.
with neumuter.attach(model, start_layer=0) as masked:
    gains = {path: torch.ones_like(scores, requires_grad=True) for path, scores in masked.scores.items()}

    def slopes(loss_of):
        # One mask [F] for each FFN, applied to all samples. A mask [B, F] gives each sample its own.
        with masked.applying(gains):
            return torch.cat(torch.autograd.grad(loss_of(), list(gains.values()))).abs()

    needed = slopes(keeping)
    worth = slopes(forgetting) / (needed + 10 * needed.mean())
    least = worth.topk(int(SHARE * len(worth))).values[-1]
    worths = worth.split([len(gain) for gain in gains.values()])
    chosen = {path: part >= least for path, part in zip(gains, worths, strict=True)}

    optimizer = torch.optim.Adam(gains.values(), lr=0.1)
    for step in range(1, STEPS + 1):
        with masked.applying({path: torch.where(chosen[path], gain, 1.0) for path, gain in gains.items()}):
            loss = forgetting() + KEEP_WEIGHT * keeping()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for gain in gains.values():
            gain.data.clamp_(-2.0, 2.0)
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.2f}")
    neurons = {path: (mask.nonzero()[:, 0], gains[path][mask]) for path, mask in chosen.items()}
    mutes = masked.mute_set(neurons, "modulate", gain_range=(-2.0, 2.0), method={"recipe": "my own"})

with neumuter.mute(model, mutes):
    show(f"after, by {mutes.count} neurons")
