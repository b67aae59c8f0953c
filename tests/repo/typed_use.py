"""What a type checker knows of the public API. ``make check`` runs mypy on this file; nobody runs it.

A call that mypy must refuse has the error's code behind it: an error that does not come is one, too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput
from typing_extensions import assert_type

import neumuter
import neumuter_kernels as nk
from neumuter import evaluation
from neumuter.recipes import FittedConfig, GainsConfig, fit_mutes, search_budget
from neumuter.serving.adapters import Exported
from neumuter.serving.live import Muted
from neumuter.serving.shrink import Shrunk
from neumuter.texts import encode, read_texts
from neumuter.training.batches import PairedBatches
from neumuter.types import Batch


def forgetting(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    batch = encode(read_texts("alice.jsonl"), tokenizer, max_length=256)
    assert_type(batch, Batch)
    with neumuter.attach(model, start_layer=1) as masked:
        assert_type(masked, neumuter.Masked)
        assert_type(masked.scores, dict[str, nn.Parameter])
        pair = PairedBatches(masked, batch, batch)
        mutes = fit_mutes(pair, 0.01, config=FittedConfig(GainsConfig(steps=3)), callback=lambda *_: None)
        assert_type(mutes, neumuter.MuteSet)
        found, points = search_budget(pair)
        assert_type(found, neumuter.MuteSet)
        assert_type(points, list[dict[str, Any]])
        with masked.sampling(seed=0, step=0, sample_ids=[0, 1]), masked.off() as off:
            assert_type(off, neumuter.Masked)
        masked.applying({"a.path": [1.0, 0.0]})  # type: ignore[dict-item]
        fit_mutes(pair, budget="1 %")  # type: ignore[arg-type]
    mutes.save("alice.safetensors")
    assert_type(neumuter.MuteSet.load("alice.safetensors").layers, dict[str, neumuter.MutedLayer])
    assert_type(evaluation.text_metrics(model, batch), dict[str, float])


def unlearning(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    outcome = neumuter.unlearn(model, tokenizer, "alice.jsonl", ["a text"], budget=300)
    assert_type(outcome, neumuter.Outcome)
    assert_type(outcome.mutes, neumuter.MuteSet)
    assert_type(outcome.before, dict[str, float])
    neumuter.unlearn(model, tokenizer, "alice.jsonl", mode=1)  # type: ignore[arg-type]


def serving(model: nn.Module, mutes: neumuter.MuteSet) -> None:
    with neumuter.mute(model, "alice.safetensors") as handle:
        assert_type(handle, Muted)
    neumuter.mute(model, mutes, how="fold").undo()
    with neumuter.MuteBank(model) as bank, bank.using(["alice", None]):
        assert_type(bank.names, tuple[str, ...])
    assert_type(neumuter.combine(model, [mutes, "bob.safetensors"]), neumuter.MuteSet)
    assert_type(neumuter.export_lora(model, mutes, "lora"), Exported)
    assert_type(neumuter.shrink(model, mutes), Shrunk)
    neumuter.fold(model, [mutes])  # type: ignore[arg-type]
    neumuter.unmute(model)  # type: ignore[attr-defined]


def training(model: nn.Module, batch: Batch) -> None:
    config = neumuter.NeuMuterConfig(output_dir="run", budget=0.01, goal_forget_loss=4.0)
    trainer = neumuter.NeuMuterTrainer(model, config, batch, batch)
    assert_type(trainer.train(resume_from_checkpoint=True), TrainOutput)
    assert_type(trainer.mute_set(), neumuter.MuteSet)


def kernels(gate: Tensor, up: Tensor, scores: Tensor) -> None:
    gates = nk.hard_concrete(scores, rows=2, seed=0, step=0, layer=3)
    hidden = nk.masked_glu(gate, up, gates, activation="silu")
    assert_type(hidden, Tensor)
    selected = nk.select_muted([scores], budget=0.01)
    assert_type(selected.indices, Tensor)
    with torch.no_grad():
        assert_type(nk.mute_(hidden, *selected), Tensor)
    nk.masked_glu(gate, up, gates, activation=3)  # type: ignore[arg-type]
    nk.select_muted(scores, budget="all")  # type: ignore[arg-type]
