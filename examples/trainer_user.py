"""For you if you train with the Trainer of transformers: it runs NeuMuter's recipe.

    python -m neumuter.demo small            # once: writes a small model and its texts
    python examples/trainer_user.py small

You keep what you know from the Trainer: arguments, logging, evaluations and checkpoints. If a run is killed,
start the script again: it resumes from the last checkpoint. It needs `pip install accelerate`.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import neumuter
from neumuter import NeuMuterConfig, NeuMuterTrainer
from neumuter.evaluation import extraction_rate
from neumuter.texts import encode, read_texts

folder = Path(sys.argv[1])
disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(folder / "small-model")
tokenizer = AutoTokenizer.from_pretrained(folder / "small-model")
forget = encode(read_texts(folder / "forget.jsonl"), tokenizer, max_length=64)
retain = encode(read_texts(folder / "retain.jsonl"), tokenizer, max_length=64)


def show(state):
    forgotten, kept = extraction_rate(model, forget), extraction_rate(model, retain)
    print(f"{state}: says {forgotten:.0%} of what to forget word for word, {kept:.0%} of what to keep")


show("before")
config = NeuMuterConfig(
    output_dir=folder / "trainer",
    # An epoch is one pass over the texts to forget.
    num_train_epochs=30,
    # Six texts to forget and six to retain in each step.
    per_device_train_batch_size=6,
    # Each text draws a mask of its own; the authors draw one for all.
    refined=True,
    learning_rate=0.5,
    kl_weight=2.0,
    # The budget alone sets the number of neurons: on a model this small the paper's λ finds none.
    sparsity=0.0,
    budget=0.15,
    start_layer=0,
    eval_strategy="steps",
    eval_steps=20,
    save_strategy="steps",
    save_steps=20,
    save_total_limit=1,
    # Training ends early once the loss on the texts to forget is this high.
    goal_forget_loss=3.0,
    disable_tqdm=True,
)
trainer = NeuMuterTrainer(model, config, forget, retain)
trainer.train(resume_from_checkpoint=True)
mutes = trainer.mute_set()
mutes.save(folder / "trainer.safetensors")
trainer.masked.detach()

with neumuter.mute(model, mutes):
    show(f"after, by {mutes.count} neurons")
