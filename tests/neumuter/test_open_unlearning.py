"""The plug-in for open-unlearning, in a stand-in with the signatures of that framework's commit d3d7cf9."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from neumuter import MuteSet, attach, fold
from neumuter.evaluation import extraction_likelihood, mean_token_loss, memorization_accuracy
from neumuter.integrations.open_unlearning import register
from neumuter.integrations.open_unlearning.batches import batch_of
from neumuter.training.selection import NothingSelectedError
from tests import models

ROOT = Path(__file__).parents[2]
END = 2  # the end token of a text, and at once the pad token

# --- The stand-in ---------------------------------------------------------------------------


class FinetuneTrainer(Trainer):
    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", trial=None):
        found = {}
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}", "evals")
        folder.mkdir(parents=True, exist_ok=True)
        for evaluator in self.evaluators.values():
            found |= evaluator.evaluate(
                output_dir=str(folder), template_args=self.template_args, model=self.model,
                tokenizer=self.tokenizer,
            )  # fmt: skip
        self.log(found)
        return found


class UnlearningMetric:
    """Theirs: configurations of datasets and collators come in; data and a collator reach the function."""

    def __init__(self, name, metric_fn):
        self.name, self.metric_fn = name, metric_fn

    def evaluate(self, model, metric_name, cache, **kwargs):
        kwargs |= {"data": Questions(3)} if kwargs.pop("datasets", None) else {}
        kwargs |= {"collators": Collator()} if kwargs.get("collators") else {}
        kwargs.pop("pre_compute", None)
        cache[metric_name] = self.metric_fn(model, **kwargs)
        return cache[metric_name]

    def __call__(self, model, **kwargs):
        return self.evaluate(model, **kwargs)


class unlearning_metric:
    def __init__(self, name):
        self.name = name

    def __call__(self, function):
        return UnlearningMetric(name=self.name, metric_fn=function)


class Collator:
    """Theirs, with the side that the experiment of WMDP names; it takes every pad token for padding."""

    def __call__(self, samples):
        how = {"batch_first": True, "padding_side": "left"}
        ids = pad_sequence([s["input_ids"] for s in samples], padding_value=END, **how)
        labels = pad_sequence([s["labels"] for s in samples], padding_value=-100, **how)
        index = torch.tensor([s["index"] for s in samples])
        return {"input_ids": ids, "attention_mask": ids.ne(END), "labels": labels, "index": index}


def build():
    """A model that is sure of what it says."""
    model = models.build("llama")
    with torch.no_grad():
        model.lm_head.weight *= 8
    return model


class Questions(torch.utils.data.Dataset):
    """Texts of 7 to 10 tokens that the model knows, with an end token; the first three are a prompt, and the
    last text has no answer."""

    def __init__(self, seed, number=5):
        prompts = models.batch(number, 3, seed)
        self.ids = build().generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, i):
        ids = torch.cat([self.ids[i, : 6 + i % 4], torch.tensor([END])])
        labels = ids.clone()
        labels[: 3 if i < self.number - 1 else None] = -100
        return {"input_ids": ids, "labels": labels, "attention_mask": ids.ne(-1), "index": 10 + i}


class ForgetRetainDataset(torch.utils.data.Dataset):
    def __init__(self, forget, retain, anchor="forget"):
        self.forget, self.retain, self.anchor = forget, retain, anchor

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, i):
        other = torch.randint(len(self.retain), (1,)).item()
        return {"forget": self.forget[i], "retain": self.retain[other]}


def load_trainer(registry, handler, model, evaluators, args, method_args):
    """Theirs: the tokenizer comes under a name that transformers 5 no longer has."""
    return registry[handler](
        model=model, train_dataset=ForgetRetainDataset(Questions(1), Questions(2, 7)), eval_dataset=None,
        tokenizer=models.tokenizer(), data_collator=Collator(), args=TrainingArguments(**args),
        evaluators=evaluators, template_args=None, **method_args,
    )  # fmt: skip


# --- The tests ------------------------------------------------------------------------------

METHOD = {
    "paper": {
        "num_train_epochs": 40, "sparsity": 2.0, "stop_loss": 50.0, "budget": 20,
        "per_device_train_batch_size": 4,
    },
    "fitted": {
        "budget": 20, "steps": 30, "batch_size": 4, "kl_target": 1.0, "gain_range": [-1.0, 1.5],
        # The model knows none of the texts, so that there would be nothing to forget.
        "margin": 60.0,
    },
}  # fmt: skip


@pytest.fixture
def registries():
    trainers, metrics = {"FinetuneTrainer": FinetuneTrainer}, {}
    register(trainers, metrics, unlearning_metric)
    return trainers, metrics


class Evaluator:
    def evaluate(self, output_dir, template_args, model, tokenizer):
        assert tokenizer.pad_token_id == 0
        return {"forget_loss": mean_token_loss(model.eval(), counted(Questions(1)))}


def counted(data):
    """The samples that count a token, as a batch of ours."""
    return batch_of([data[i] for i in range(len(data) - 1)])


def make(registries, folder, recipe, method=METHOD):
    model = build()
    args = dict(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=2, seed=5,
        eval_strategy="no", learning_rate=1e-5, num_train_epochs=10,
    )  # fmt: skip
    method_args = ({"recipe": recipe} if recipe else {}) | {"start_layer": 0} | method
    return load_trainer(registries[0], "NeuMuter", model, {"suite": Evaluator()}, args, method_args)


@pytest.mark.parametrize("recipe", ["paper", "fitted"])
def test_it_is_found_by_name_and_only_the_muted_columns_change(recipe, registries, tmp_path):
    trainer = make(registries, tmp_path, recipe)
    before = trainer.evaluate()["forget_loss"]
    trainer.train()
    trainer.save_state()
    trainer.save_model(str(tmp_path))
    assert trainer.evaluate()["forget_loss"] > before + 0.1

    mutes = MuteSet.load(tmp_path / "mutes.safetensors")
    assert (mutes.count, mutes.seed) == (20, 5)
    assert mutes.method["recipe"] == {"paper": "paper", "fitted": "fisher"}[recipe]
    original, saved = build(), AutoModelForCausalLM.from_pretrained(tmp_path)
    changed = 0
    for (key, old), new in zip(original.state_dict().items(), saved.state_dict().values(), strict=True):
        if not torch.equal(old, new):
            layer = mutes.layers[key.removesuffix(".down_proj.weight")]
            columns = (old != new).any(0).nonzero().flatten()
            assert set(columns.tolist()) <= set(layer.indices.tolist())
            changed += len(columns)
    assert changed == 20
    fold(original, mutes)
    ids = models.batch()
    assert torch.equal(original(ids).logits, trainer.model(ids).logits)
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())

    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == {"paper": 40, "fitted": 30}[recipe]
    assert sum("kl" in entry for entry in state["log_history"]) == {"paper": 20, "fitted": 15}[recipe]


@pytest.mark.parametrize(
    ("recipe", "size", "steps"),
    [(None, 4, 10), (None, 8, 10), ("fitted", 3, 14), ("fitted", None, 10), ("paper", 3, 20)],
)
def test_epochs_are_theirs_unless_the_method_says_otherwise(recipe, size, steps, registries, tmp_path):
    """Ten passes over the four samples that count a token; fitted is the default."""
    method = {
        "fitted": {"budget": 20, "batch_size": size, "steps": None},
        "paper": METHOD["paper"] | {"per_device_train_batch_size": size, "num_train_epochs": None},
    }
    trainer = make(registries, tmp_path, recipe, method)
    trainer.train()
    assert trainer.state.global_step == steps
    found = MuteSet.load(tmp_path / "mutes.safetensors").method["recipe"]
    assert found == {"paper": "paper"}.get(recipe, "fisher")


@pytest.mark.parametrize(("every", "entries"), [(0.1, 10), (4, 7), (1, 30)])
def test_logging_steps_may_be_a_share(every, entries, registries, tmp_path):
    trainer = make(registries, tmp_path, "fitted")
    trainer.args.logging_steps = every
    trainer.train()
    assert sum("kl" in entry for entry in trainer.state.log_history) == entries


def test_a_run_that_closes_no_gate_keeps_its_scores(registries, tmp_path):
    method = {"paper": {"num_train_epochs": 1, "per_device_train_batch_size": 4, "threshold": 1e-9}}
    trainer = make(registries, tmp_path, "paper", method)
    with pytest.raises(NothingSelectedError, match=r"method_args.paper.budget .*scores.safetensors: docs/"):
        trainer.train()
    assert not (tmp_path / "mutes.safetensors").exists()
    assert torch.equal(trainer.model(models.batch()).logits, build()(models.batch()).logits)
    # As the documentation says.
    scores = load_file(tmp_path / "scores.safetensors")
    with attach(build(), start_layer=0) as masked, torch.no_grad():
        for path, score in masked.scores.items():
            score.copy_(scores[path])
        assert masked.select(budget=20).count == 20


def test_batches_are_of_whole_texts_that_count_a_token(registries, tmp_path):
    trainer = make(registries, tmp_path, "paper")
    batch = trainer._batch("forget")
    data = Questions(1)
    assert len(batch["labels"]) == len(data) - 1
    for i, (ids, shown, labels) in enumerate(zip(*batch.values(), strict=True)):
        length = int(shown.sum())
        assert torch.equal(ids[:length], data[i]["input_ids"])
        assert torch.equal(labels[:length], data[i]["labels"])
        assert ids[length - 1] == END
        assert (labels[length:] == -100).all()
        assert (labels[:3] == -100).all()
    some, again = trainer._batch("retain", 3), trainer._batch("retain", 3)
    assert len(some["labels"]) in (2, 3)  # one of the seven counts no token
    assert torch.equal(some["input_ids"], again["input_ids"])


def test_bad_arguments_and_datasets_are_refused(registries, tmp_path):
    with pytest.raises(ValueError, match='recipe must be "fitted" or "paper", got \'papre\''):
        make(registries, tmp_path, "papre")
    with pytest.raises(
        ValueError, match=r"does not take alpha, gamma, which .*: ~trainer.method_args.alpha ~tr"
    ):
        make(registries, tmp_path, "fitted", METHOD | {"gamma": 1.0, "alpha": 2.0})
    with pytest.raises(ValueError, match=r"method_args.retain_limit must be null or at least 1, got 0"):
        make(registries, tmp_path, "fitted", METHOD | {"retain_limit": 0})
    trainer = make(registries, tmp_path, "paper")
    trainer.train_dataset.retain = None
    with pytest.raises(ValueError, match="there is no retain data"):
        trainer.train()


@pytest.mark.parametrize("batch_size", [2, 8])
def test_metrics(batch_size, registries):
    model, data = build(), Questions(3)
    model.generation_config.eos_token_id = END
    common = dict(
        metric_name="m", cache={}, tokenizer=None, template_args=None, handler="m", datasets={"d": {}},
        collators={"c": {}}, batch_size=batch_size,
    )  # fmt: skip
    found = registries[1]["memorization_accuracy"](model, **common)
    scores = [found["value_by_index"][10 + i]["score"] for i in range(5)]
    assert scores[4] is None  # has no answer
    assert found["agg_value"] == pytest.approx(sum(scores[:4]) / 4)
    assert found["agg_value"] == pytest.approx(memorization_accuracy(model, counted(data)))

    found = registries[1]["extraction_likelihood"](model, n=5, **common)
    scores = [found["value_by_index"][10 + i]["score"] for i in range(5)]
    assert [score is None for score in scores] == [True, False, False, False, True]  # answers of 4 and 0
    longer = batch_of([data[i] for i in (1, 2, 3)])
    assert found["agg_value"] == pytest.approx(extraction_likelihood(model, longer, n=5, answers=True))
    json.dumps(found)


CHECKOUT = {
    "src/trainer/__init__.py": """
        from tests.neumuter.test_open_unlearning import FinetuneTrainer
        TRAINER_REGISTRY = {"FinetuneTrainer": FinetuneTrainer}
    """,
    "src/evals/__init__.py": "",
    "src/evals/metrics/__init__.py": "METRICS_REGISTRY = {}",
    "src/evals/metrics/base.py": "from tests.neumuter.test_open_unlearning import unlearning_metric",
    "src/train.py": """
        import hydra, json, pathlib
        from omegaconf import OmegaConf
        from trainer import TRAINER_REGISTRY
        from evals.metrics import METRICS_REGISTRY
        from tests.neumuter.test_open_unlearning import Evaluator, build, load_trainer

        @hydra.main(version_base=None, config_path="../configs", config_name="train.yaml")
        def main(cfg):
            trainer = load_trainer(
                TRAINER_REGISTRY, cfg.trainer.handler, build(),
                {"suite": Evaluator()}, dict(cfg.trainer.args), cfg.trainer.method_args,
            )
            trainer.train()
            trainer.save_model(trainer.args.output_dir)
            found = {}
            for name, metric in cfg.eval.tofu.metrics.items():
                if metric.handler in METRICS_REGISTRY:
                    handler = METRICS_REGISTRY[metric.handler]
                    found[name] = handler(trainer.model, metric_name=name, cache={}, **metric)
            output = {"config": OmegaConf.to_container(cfg, resolve=True), "found": found}
            pathlib.Path(cfg.paths.output_dir, "report.json").write_text(json.dumps(output))

        if __name__ == "__main__":
            main()
    """,
    "configs/unlearn.yaml": """
        defaults:
          - trainer: GradAscent
          - eval: tofu
          - experiment: null
          - _self_
        paths:
          output_dir: out
        trainer:
          args:
            remove_unused_columns: False
    """,
    "configs/trainer/GradAscent.yaml": "handler: GradAscent",
    "configs/experiment/unlearn/tofu/default.yaml": """
        # @package _global_
        defaults:
          - override /trainer: GradAscent
          - override /eval: tofu
        eval:
          tofu:
            forget_split: forget05
        trainer:
          args:
            learning_rate: 1e-5
            num_train_epochs: 10
    """,
    "configs/eval/tofu.yaml": """
        # @package eval.tofu
        defaults:
          - tofu_metrics:
            - exact_memorization
        handler: TOFUEvaluator
        metrics: {}
        forget_split: forget10
    """,
    "configs/eval/tofu_metrics/exact_memorization.yaml": """
        # @package eval.tofu.metrics.exact_memorization
        handler: exact_memorization
    """,
    "configs/data/datasets/TOFU_QA_forget.yaml": """
        TOFU_QA_forget:
          handler: QADataset
          args:
            hf_args:
              name: forget10
    """,
    "configs/collator/DataCollatorForSupervisedDatasetwithIndex.yaml": """
        DataCollatorForSupervisedDatasetwithIndex:
          handler: DataCollatorForSupervisedDatasetwithIndex
    """,
}


def launch(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(
        [sys.executable, "-m", "neumuter.integrations.open_unlearning", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_the_launcher_runs_a_checkout_with_the_plug_in(tmp_path):
    pytest.importorskip("hydra")
    for name, content in CHECKOUT.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content).lstrip())
    done = launch(
        tmp_path, "src/train.py", "--config-name=unlearn.yaml", "experiment=unlearn/tofu/default",
        "trainer=NeuMuter", "eval=tofu_neumuter",
        "trainer.method_args.fitted.budget=20", "trainer.method_args.fitted.steps=12",
        "+trainer.method_args.fitted.gain_range=[-1.0,1.5]", "+trainer.args.use_cpu=True",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    config = report["config"]
    assert config["trainer"]["args"]["learning_rate"] == 1e-5  # of the experiment, and not read
    assert config["trainer"]["method_args"]["recipe"] == "fitted"
    metrics = config["eval"]["tofu"]["metrics"]
    assert set(metrics) == {"exact_memorization", "extraction_likelihood", "memorization_accuracy"}
    assert metrics["extraction_likelihood"]["n"] == 10
    assert metrics["extraction_likelihood"]["datasets"]["TOFU_QA_forget"]["args"]["hf_args"] == {
        "name": "forget05"
    }
    assert 0 <= report["found"]["memorization_accuracy"]["agg_value"] <= 1
    mutes = MuteSet.load(tmp_path / "out/mutes.safetensors")
    assert mutes.count == 20
    expected, ids = build(), models.batch()
    fold(expected, mutes)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(saved(ids).logits, expected(ids).logits)


def test_the_launcher_says_what_it_needs(tmp_path):
    done = launch(tmp_path, "experiment=unlearn/tofu/default")
    assert done.returncode == 1
    assert "usage: python -m neumuter.integrations.open_unlearning src/train.py" in done.stderr
