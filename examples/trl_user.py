"""For you if you train with TRL: gates are a second group of parameters in its SFT and DPO trainers.

    python -m neumuter.demo small            # once: writes a small model and its texts
    python examples/trl_user.py small

Here a LoRA and the gates learn together. With SFT, the model learns another answer to the prompts to forget;
with DPO, it learns to prefer that answer. Texts to keep stay as they are. It needs `pip install trl peft`.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import neumuter
from neumuter.evaluation import extraction_rate
from neumuter.texts import encode, read_texts

INSTEAD, GATE_LR, SHARE, SEED = " no longer known.", 0.5, 0.15, 0

folder = Path(sys.argv[1])
disable_progress_bar()
disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(folder / "small-model")
forget, retain = (read_texts(folder / f"{name}.jsonl") for name in ("forget", "retain"))
batches = [encode(texts, tokenizer, max_length=64) for texts in (forget, retain)]


class Gated:
    """What makes a trainer of TRL sample gates around each of its steps, put before the trainer's class."""

    def __init__(self, masked, *arguments, **options):
        self.masked = masked
        super().__init__(*arguments, **options)

    def training_step(self, model, inputs, *arguments):
        with self.sampling(**inputs):
            return super().training_step(model, inputs, *arguments)

    def sampling(self, input_ids, position_ids=None, **_):
        step = self.state.global_step
        if position_ids is None:
            # The first half of DPO's batch is preferred to the second: both halves get the same gates.
            pairs = torch.arange(len(input_ids) // 2)
            return self.masked.sampling(SEED, step, torch.cat([pairs, pairs]))
        # Packed by SFT: a sequence begins at each position 0, and has gates of its own.
        rows = position_ids.eq(0).cumsum(-1).flatten() - 1
        return self.masked.sampling(SEED, step, torch.arange(int(rows[-1]) + 1), row_ids=rows)


class GatedSFT(Gated, SFTTrainer):
    pass


class GatedDPO(Gated, DPOTrainer):
    pass


def show(state, model):
    forgotten, kept = (extraction_rate(model, batch) for batch in batches)
    print(f"{state}: says {forgotten:.0%} of what to forget word for word, {kept:.0%} of what to keep")


def train(name, trainer, config, rows):
    model = AutoModelForCausalLM.from_pretrained(folder / "small-model")
    show(f"before {name}", model)
    # Adapters first, then gates: attach() freezes what is there.
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    masked = neumuter.attach(adapted, start_layer=0)
    lora = [parameter for key, parameter in adapted.named_parameters() if "lora_" in key]
    for parameter in lora:
        parameter.requires_grad_(True)
    groups = [
        {"params": lora, "lr": config.learning_rate},
        {"params": list(masked.scores.values()), "lr": GATE_LR, "weight_decay": 0.0},
    ]
    trainer(
        masked, adapted, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        optimizers=(torch.optim.AdamW(groups), None),
    ).train()  # fmt: skip
    mutes = masked.select(budget=SHARE, method={"recipe": name})
    masked.detach()
    mutes.save(folder / f"{name}.safetensors")
    adapted.save_pretrained(folder / f"{name}-lora")
    with neumuter.mute(adapted, mutes):
        show(f"after {name}, by {mutes.count} neurons and a LoRA", adapted)


shared = dict(
    max_length=64, learning_rate=2e-3, lr_scheduler_type="constant", per_device_train_batch_size=4,
    logging_steps=20, save_strategy="no", report_to=[], disable_tqdm=True, bf16=False,
    gradient_checkpointing=False, seed=SEED,
)  # fmt: skip
answers = [{"prompt": prompt, "completion": INSTEAD} for prompt, _ in forget]
answers += [{"prompt": prompt, "completion": completion} for prompt, completion in retain]
sft = SFTConfig(output_dir=folder / "sft", packing=True, num_train_epochs=30, **shared)
train("sft", GatedSFT, sft, answers)

choices = [{"prompt": prompt, "chosen": INSTEAD, "rejected": completion} for prompt, completion in forget]
choices += [{"prompt": prompt, "chosen": completion, "rejected": INSTEAD} for prompt, completion in retain]
# The reference is computed before training, with all gates open.
dpo = DPOConfig(
    output_dir=folder / "dpo", precompute_ref_log_probs=True, loss_type=["sigmoid", "sft"],
    loss_weights=[1.0, 1.0], num_train_epochs=16, **shared,
)  # fmt: skip
train("dpo", GatedDPO, dpo, choices)
