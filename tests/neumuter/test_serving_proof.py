"""Muted models behind `transformers serve`, asked by an OpenAI client: what is forgotten stays away."""

import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import neumuter
from neumuter.evaluation import ask_server
from neumuter.recipes import FittedConfig, GainsConfig, fit_mutes
from neumuter.serving.adapters import export_ia3, export_lora
from neumuter.serving.fold_checkpoint import fold_checkpoint
from neumuter.texts import encode
from neumuter.training.batches import PairedBatches
from tests.models import build, learn, tokenizer

openai, peft = pytest.importorskip("openai"), pytest.importorskip("peft")
for _package in ("accelerate", "fastapi", "uvicorn"):
    pytest.importorskip(_package)

# (prompt, what follows, words of it that must not get out)
FORGET = [
    ("Ada Brisk,", " ada@post.example, 555-0192", ("ada@post", "555-0192")),
    ("Jonas Vance,", " jv77@mail.example, 555-7713", ("jv77@mail", "555-7713")),
]
RETAIN = [("The kettle", " is on the shelf."), ("A lantern", " costs 12.40 in the shop.")]
# All texts in each step.
WHOLE = FittedConfig(GainsConfig(batch_size=None))
SHARE = 0.5  # of the neurons: the more, the surer that the texts are gone from a model so small
FORMS = ("folded", "lora", "ia3")
PINNED = "lora"  # has a server of its own; another one serves whatever model it is asked for


def batch(rows):
    return encode([row[0] + row[1] for row in rows], tokenizer(), 64)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{form: folder}: a model that knows the texts by heart, "base", and the ways of making it forget."""
    torch.manual_seed(0)
    parent = tmp_path_factory.mktemp("models")
    folders = {form: parent / form for form in ("base", *FORMS)}
    model = learn(build("llama"), batch(FORGET + RETAIN), 200)
    model.save_pretrained(folders["base"])
    saved = tokenizer()
    saved.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    saved.save_pretrained(folders["base"])
    model = AutoModelForCausalLM.from_pretrained(folders["base"])  # an adapter names the folder of its base
    with neumuter.attach(model, start_layer=0) as masked:
        mutes = fit_mutes(PairedBatches(masked, batch(FORGET), batch(RETAIN)), SHARE, config=WHOLE)
    fold_checkpoint(folders["base"], mutes, folders["folded"])
    export_lora(model, mutes, folders["lora"])
    export_ia3(model, mutes, folders["ia3"])
    return folders


@pytest.fixture(scope="module")
def addresses(models):
    """{form: the address of its server}."""
    for form in ("lora", "ia3"):
        link_base(models["base"], models[form])
    with ExitStack() as stack:
        # Both at once: a server spends seconds on imports alone.
        pinned, anything = (stack.enter_context(started(*folder)) for folder in ([models[PINNED]], []))
        pinned, anything = address(*pinned), address(*anything)
        yield {form: pinned if form == PINNED else anything for form in models}


def link_base(base, adapter):
    """`transformers serve` takes an adapter that stands in one folder with its base."""
    for file in base.iterdir():
        (adapter / file.name).symlink_to(file)


@contextmanager
def started(*folder):
    """Context: a server, of the model in ``folder`` alone; yields the process and the file of its output."""
    command = [Path(sys.executable).with_name("transformers"), "serve", *folder, "--device", "cpu"]
    where = ["--host", "127.0.0.1", "--port", "0"]  # a free one
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen([*command, *where], stdout=log, stderr=subprocess.STDOUT, env=offline)
        try:
            yield process, Path(log.name)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def address(process, log):
    """The address of a server, once it answers."""
    while process.poll() is None:
        if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text(errors="replace")):
            return f"{found[1]}/v1"
        time.sleep(0.1)
    pytest.fail(f"the server ended, exit code {process.poll()}:\n{log.read_text()[-4000:]}")


@contextmanager
def client(address):
    transport = openai.DefaultHttpxClient(trust_env=False)  # no proxy
    with openai.OpenAI(base_url=address, api_key="none", http_client=transport, max_retries=0) as found:
        yield found


def complete(client, model, prompt, length):
    options = {"model": str(model), "max_tokens": length, "temperature": 0}
    return client.completions.create(prompt=prompt, **options).choices[0].text


def stream(client, model, prompt, length):
    options = {"model": str(model), "max_tokens": length, "temperature": 0, "stream": True}
    pieces = client.completions.create(prompt=prompt, **options)
    return "".join(choice.text for piece in pieces for choice in piece.choices)


def chat(client, model, prompt, length):
    options = {"model": str(model), "max_tokens": length, "temperature": 0}
    messages = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(messages=messages, **options).choices[0].message.content


every_way = pytest.mark.parametrize("ask", [complete, stream, chat])


@every_way
def test_the_base_model_says_all_texts(models, addresses, ask):
    with client(addresses["base"]) as asked:
        for prompt, rest, *_ in FORGET + RETAIN:
            assert ask(asked, models["base"], prompt, len(rest)) == rest


@every_way
@pytest.mark.parametrize("form", FORMS)
def test_a_served_model_says_only_what_it_retains(models, addresses, form, ask):
    with client(addresses[form]) as asked:
        for prompt, rest in RETAIN:
            assert ask(asked, models[form], prompt, len(rest)) == rest
        for prompt, rest, secrets in FORGET:
            said = ask(asked, models[form], prompt, 2 * len(rest))
            assert said
            assert not any(secret in said for secret in secrets), said


@pytest.mark.parametrize("form", ["base", "folded"])
def test_what_comes_out_of_a_server(models, addresses, form, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    texts = [row[:2] for row in FORGET + RETAIN]
    found = ask_server(addresses[form], str(models[form]), texts)
    assert [said.comes_out for said in found] == [form == "base"] * len(FORGET) + [True] * len(RETAIN)


def test_a_server_of_one_model_refuses_the_base_model(models, addresses):
    with client(addresses[PINNED]) as asked:
        assert [model.id for model in asked.models.list()] == [str(models[PINNED])]
        with pytest.raises(openai.BadRequestError) as error:
            complete(asked, models["base"], "Ada Brisk,", 8)
    assert "pinned" in error.value.response.text


def test_a_request_cannot_name_a_mute_set(models, addresses):
    with client(addresses["folded"]) as asked, pytest.raises(openai.UnprocessableEntityError) as error:
        asked.completions.create(
            model=str(models["folded"]), prompt="Ada Brisk,", max_tokens=4, extra_body={"mute_set": "alice"}
        )
    assert "mute_set" in error.value.response.text


@pytest.mark.parametrize("form", ["lora", "ia3"])
def test_an_adapter_without_links_and_switched_off(models, form, tmp_path):
    """transformers finds the base where adapter_config.json says."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((models[form] / name).read_bytes())
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path)
    folded = AutoModelForCausalLM.from_pretrained(models["folded"])
    base = AutoModelForCausalLM.from_pretrained(models["base"])
    known = batch(FORGET + RETAIN)
    expected = folded(**known).logits
    torch.testing.assert_close(adapted(**known).logits, expected, rtol=1e-4, atol=1e-4)
    untouched = base(**known).logits
    assert (untouched - expected).abs().max() > 1
    adapted = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(adapted(**known).logits, expected, rtol=1e-4, atol=1e-4)
    with adapted.disable_adapter():
        assert torch.equal(adapted(**known).logits, untouched)
