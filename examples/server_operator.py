"""For you if you serve one model to many tenants: each row of a batch mutes what its tenant wants muted.

    python -m neumuter.demo small            # once: writes a small model and its texts
    python examples/server_operator.py small

Two tenants each want the mailbox of one customer forgotten. The script makes a mute file for each tenant.
Then it serves them all in one batch, adds and removes mute sets meanwhile, and restores the model at the end.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import neumuter
from neumuter.recipes import FittedConfig, GainsConfig
from neumuter.texts import read_texts

# All texts in each step, because they are few, in fewer steps; and a quarter of the default KL, so that all
# others stay.
RECIPE = FittedConfig(GainsConfig(steps=80, batch_size=None, kl_target=0.005))

folder = Path(sys.argv[1])
disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(folder / "small-model").eval()
tokenizer = AutoTokenizer.from_pretrained(folder / "small-model", padding_side="left")
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
customers = read_texts(folder / "forget.jsonl", limit=2)
others = read_texts(folder / "retain.jsonl")

for number, tenant in enumerate(("north", "south")):
    prompt, answer = customers[number]
    mailbox = (prompt, answer.split("@")[0])
    kept = [customers[1 - number], *others]
    outcome = neumuter.unlearn(
        model, tokenizer, [mailbox], kept, budget=0.02, recipe=RECIPE, samples=0, start_layer=0
    )
    outcome.mutes.save(folder / f"{tenant}.safetensors")


def serve(records, **options):
    """The greedy answers to the prompts of the records, generated as one batch."""
    prompts = [(tokenizer.bos_token or "") + prompt for prompt, _ in records]
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    ids = model.generate(**batch, max_new_tokens=36, do_sample=False, **options)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


bank = neumuter.MuteBank(model)
untouched = serve(others, mute_sets=None)
bank.add("north", folder / "north.safetensors")
bank.add("south", folder / "south.safetensors")

rows = [(tenant, record) for record in (*customers, others[0]) for tenant in (None, "north", "south")]
answers = serve([record for _, record in rows], mute_sets=[tenant for tenant, _ in rows])
for (tenant, (prompt, truth)), answer in zip(rows, answers, strict=True):
    verdict = "as learnt" if answer.startswith(truth) else "forgotten"
    print(f"{tenant or 'nobody':7} {verdict:10} {prompt}{answer[: len(truth)]}")

# A batch keeps the mute sets that the bank had when the batch began.
with bank.using("north"):
    bank.remove("north")
    bank.add("east", folder / "north.safetensors")
    print("removed meanwhile, still muted:", serve(customers[:1]) == answers[1:2])
try:
    serve(customers, mute_sets="north")
except KeyError as error:
    print("refused:", error.args[0])

bank.undo()
print("without the bank it answers as before:", serve(others) == untouched)
