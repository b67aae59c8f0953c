"""A small model, mute sets for it, and a vLLM server of them that tests ask over HTTP."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import neumuter
from neumuter.recipes import mute_random
from neumuter.serving.fold import fold
from tests import models

# vLLM's attention on CPUs takes heads of 32 and more.
SHAPE = dict(
    hidden_size=128, intermediate_size=256, head_dim=32, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512,
)  # fmt: skip
NAMES = tuple(f"set-{i}" for i in range(6))
# All of a set's 10 % fits.
SHARE = 0.12
SECONDS_TO_START = 900


def base():
    return models.build("llama", **SHAPE)


def set_of(model, seed, share=0.1):
    """A set of random neurons with gains from −2 to 2."""
    with neumuter.attach(model, start_layer=0) as masked:
        mutes = mute_random(masked, share, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in mutes.layers.values():
        layer.gains.copy_(4 * torch.rand(layer.gains.shape, generator=generator) - 2)
    return dataclasses.replace(mutes, mode="modulate", gain_range=(-2.0, 2.0))


def write(folder):
    """Write the checkpoint, an adapter for it, and the sets; returns {name: a folded model, "": the base}."""
    model = base()
    model.save_pretrained(folder / "base")
    tokenizer = models.tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder / "base")
    (folder / "sets").mkdir()
    folded = {"": base()}
    for seed, name in enumerate(NAMES):
        set_of(model, seed).save(folder / "sets" / f"{name}.safetensors")
        folded[name] = base()
        fold(folded[name], folder / "sets" / f"{name}.safetensors")
    write_lora(model, folder / "tuned")
    return folded


def write_lora(model, folder, rank=8):
    """Write an adapter of random weights for the down and the query projections."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(("down_proj", "q_proj")):
            for part, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                key = f"base_model.model.{name}.lora_{part}.weight"
                tensors[key] = 0.1 * torch.randn(shape, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = dict(
        peft_type="LORA",
        r=rank,
        lora_alpha=rank,
        target_modules=["down_proj", "q_proj"],
        task_type="CAUSAL_LM",
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


@torch.no_grad()
def tuned_and_muted(folder, mutes):
    """The base with the adapter merged and, after that, the mutes folded."""
    model = base()
    tensors = load_file(folder / "tuned" / "adapter_model.safetensors")
    for name, module in model.named_modules():
        if (key := f"base_model.model.{name}.lora_A.weight") in tensors:
            module.weight += tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        if name.endswith("down_proj") and mutes and (layer := mutes.layers.get(name.rpartition(".")[0])):
            module.weight[:, layer.indices.long()] *= layer.gains
    return model


class Server:
    """A running server. ``log``: the file of what it prints."""

    def __init__(self, address, process, log):
        self.address, self.process, self.log = address, process, log

    def post(self, path="/v1/completions", **body):
        """The status and the answer."""
        data = json.dumps({"model": "base"} | body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")

    def complete(self, prompt, name, tokens=12, **body):
        """The token ids that come after a prompt of ids, and their log-probabilities."""
        arguments = {"mute_set": name} if name else {}
        status, answer = self.post(
            prompt=prompt, max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=1,
            return_tokens_as_token_ids=True, vllm_xargs=arguments, **body,
        )  # fmt: skip
        assert status == 200, answer
        found = answer["choices"][0]["logprobs"]
        return [int(token.removeprefix("token_id:")) for token in found["tokens"]], found["token_logprobs"]

    def metric(self, pattern):
        """The sum of the metrics that match a pattern."""
        with urllib.request.urlopen(self.address + "/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(pattern, line))


@contextmanager
def served(folder, *options, **environment):
    """Context with a ``Server`` of the checkpoint; fails the test if it does not start."""
    with started(folder, *options, **environment) as server:
        while server.process.poll() is None:
            try:
                urllib.request.urlopen(server.address + "/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f"the server ended:\n{server.log.read_text()[-6000:]}")
        yield server


@contextmanager
def started(folder, *options, **environment):
    """Context with a server that may still be starting."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {
        "NEUMUTER_VLLM_SETS": str(folder / "sets"), "NEUMUTER_VLLM_SHARE": str(SHARE), "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    } | environment  # fmt: skip
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder / "base",
        "--served-model-name", "base", "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16",
        "--host", "127.0.0.1", "--port", port, *options,
    ]  # fmt: skip
    log = Path(folder) / f"server-{port}.log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=output, stderr=subprocess.STDOUT,
            env={name: value for name, value in (os.environ | given).items() if value is not None},
        )  # fmt: skip
        try:
            yield Server(f"http://127.0.0.1:{port}", process, log)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@torch.no_grad()
def expected(model, prompt, tokens):
    """What a model says greedily, token by token of what was said, and the log-probabilities of that."""
    scores = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return scores.argmax(-1).tolist(), scores.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
