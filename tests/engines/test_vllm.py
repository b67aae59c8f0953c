"""The plug-in in a real vLLM server, asked over HTTP: every answer is that of the model with the set folded.

Run by ``make test-vllm`` in an environment with vLLM; skipped elsewhere.
"""

import hashlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm runs this file")

from neumuter.evaluation import ask_server
from neumuter.mutes.mute_set import MuteSet
from neumuter.serving.fold import fold
from tests.engines.served import NAMES, base, expected, served, set_of, started, tuned_and_muted, write
from tests.models import tokenizer

REQUESTS, TOKENS = 72, 24
TOLERANCE = 1e-4
# So few blocks of the cache that requests must wait for others, and begin anew; prompts come in parts.
SCARCE = (
    "--enforce-eager", "--block-size", "32", "--num-gpu-blocks-override", "24",
    "--max-num-batched-tokens", "100",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def folded(folder):
    """{name: the model with that set folded, "": without one}."""
    return write(folder)


@pytest.fixture(scope="module")
def server(folder, folded):
    lora = ("--enable-lora", "--max-loras", "2", "--lora-modules", f"tuned={folder / 'tuned'}")
    with served(folder, *SCARCE, *lora) as running:
        yield running


def prompts_of(count, longest=60, seed=0):
    choice = random.Random(seed)
    return [
        [1, *(choice.randrange(3, 97) for _ in range(choice.randrange(2, longest)))] for _ in range(count)
    ]


def check(model, prompt, answer):
    tokens, scores = answer
    best, sure = expected(model, prompt, tokens)
    assert tokens == best
    assert scores == pytest.approx(sure, abs=TOLERANCE)


def test_a_mixed_batch_with_random_arrival_and_preemption(server, folded):
    choice = random.Random(1)
    prompts = prompts_of(REQUESTS)
    names = [choice.choice(NAMES) for _ in prompts]
    waits = [choice.uniform(0, 2) for _ in prompts]

    def ask(prompt, name, wait):
        time.sleep(wait)
        return server.complete(prompt, name, TOKENS)

    before = server.metric(r"neumuter_requests_total")
    with ThreadPoolExecutor(REQUESTS) as pool:
        answers = list(pool.map(ask, prompts, names, waits))
    for prompt, name, answer in zip(prompts, names, answers, strict=True):
        check(folded[name], prompt, answer)
    assert server.metric(r"vllm:num_preemptions_total") > 0
    assert server.metric(r"neumuter_requests_total") - before == REQUESTS
    assert server.metric(rf'neumuter_requests_total{{mute_set="{NAMES[0]}"}}') >= names.count(NAMES[0]) > 0


def test_prefixes_are_cached_for_a_set_alone(server, folded):
    (prompt,) = prompts_of(1, seed=3, longest=3)
    prompt = prompt * 40
    for is_cached in (False, True):
        for name in NAMES[:3]:
            hits = server.metric(r"vllm:prefix_cache_hits_total")
            check(folded[name], prompt, server.complete(prompt, name, 4))
            assert (server.metric(r"vllm:prefix_cache_hits_total") > hits) == is_cached


def test_a_salt_of_the_client_does_not_reach_the_prefixes_of_another_set(server, folded, folder):
    prompt = prompts_of(1, seed=4, longest=3)[0] * 40
    digest = hashlib.sha256((folder / "sets" / f"{NAMES[0]}.safetensors").read_bytes()).hexdigest()
    check(folded[NAMES[0]], prompt, server.complete(prompt, NAMES[0], 4))
    hits = server.metric(r"vllm:prefix_cache_hits_total")
    check(folded[NAMES[1]], prompt, server.complete(prompt, NAMES[1], 4, cache_salt=f"{digest}:"))
    assert server.metric(r"vllm:prefix_cache_hits_total") == hits


def test_sets_come_and_go_while_others_are_served(server, folded, folder):
    model, (prompt,) = base(), prompts_of(1, seed=5)
    stop = threading.Event()

    def ask(name):
        count = 0
        while not stop.is_set() or not count:
            check(folded[name], prompt, server.complete(prompt, name, 8))
            count += 1

    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(ask, name) for name in NAMES[:3]]
        for seed in (11, 12, 13):
            mutes, path = set_of(model, seed), folder / "sets" / "passing.safetensors"
            mutes.save(path)
            with_it = base()
            fold(with_it, mutes)
            check(with_it, prompt, server.complete(prompt, "passing", 8))
        path.unlink()
        status, answer = server.post(prompt=prompt, vllm_xargs={"mute_set": "passing"})
        stop.set()
        for one in busy:
            one.result()
    assert status == 400
    assert "there is no mute set 'passing'" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mute_set": "nobody"}, "there is no mute set 'nobody'"),
        ({"mute_set": "../base/model"}, "mute_set must be a name"),
        ({"mute_set": 3}, "mute_set must be a name"),
        ({"mute_set": ["set-0"]}, "mute_set must be a name"),
        ({"neumuter.mute_file": "x"}, "this server requires a mute set"),
        ({}, "this server requires a mute set"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_request_without_a_set_of_the_folder_is_refused(server, arguments, message, path):
    text = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}
    status, answer = server.post(path, max_tokens=2, vllm_xargs=arguments, **text)
    assert status == 400, answer
    assert message in answer["error"]["message"]


def test_another_model_is_not_there(server):
    assert server.post(model="other", prompt="a", vllm_xargs={"mute_set": NAMES[0]})[0] == 404


def test_a_bad_file_and_a_set_of_another_model_are_refused(server, folder):
    (folder / "sets" / "half.safetensors").write_bytes(
        (folder / "sets" / f"{NAMES[0]}.safetensors").read_bytes()[:999]
    )
    status, answer = server.post(prompt="a", vllm_xargs={"mute_set": "half"})
    assert (status, "the file of the mute set 'half' is bad" in answer["error"]["message"]) == (400, True)
    model = base()
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1.1)
    set_of(model, 0).save(folder / "sets" / "foreign.safetensors")
    status, answer = server.post(prompt="a", vllm_xargs={"mute_set": "foreign"})
    assert status == 400
    assert "does not fit the model: model.layers.1.mlp: the down projection's weights differ" in str(answer)
    set_of(base(), 0, share=0.3).save(folder / "sets" / "large.safetensors")
    status, answer = server.post(prompt="a", vllm_xargs={"mute_set": "large"})
    assert (status, "this server takes" in answer["error"]["message"]) == (400, True)


def test_beams_are_refused(server):
    status, answer = server.post(
        prompt="a", use_beam_search=True, n=2, max_tokens=2, vllm_xargs={"mute_set": NAMES[0]}
    )
    assert status == 400, answer
    assert "beam search" in answer["error"]["message"]


def test_several_answers_to_one_prompt_use_its_set(server, folded):
    (prompt,) = prompts_of(1, seed=6)
    status, answer = server.post(
        prompt=prompt, n=3, temperature=1.0, max_tokens=6, ignore_eos=True, logprobs=1,
        return_tokens_as_token_ids=True, vllm_xargs={"mute_set": NAMES[1]},
    )  # fmt: skip
    assert status == 200, answer
    for choice in answer["choices"]:
        tokens = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
        _, sure = expected(folded[NAMES[1]], prompt, tokens)
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(sure, abs=TOLERANCE)


def test_texts_asked_for_by_evaluate(server, folded):
    """What a model with another set says by heart comes out with that set alone."""
    (prompt,) = prompts_of(1, seed=9)
    status, answer = server.post(
        prompt=prompt, max_tokens=8, temperature=0, ignore_eos=True, vllm_xargs={"mute_set": NAMES[3]}
    )
    assert status == 200, answer
    text = tokenizer().decode(prompt[1:]), answer["choices"][0]["text"]
    for name in NAMES[3:]:
        (found,) = ask_server(server.address, "base", [text], mute_set=name)
        assert found.comes_out == (name == NAMES[3])
    with pytest.raises(ValueError, match="requires a mute set"):
        ask_server(server.address, "base", [text])


def test_an_adapter_beside_the_sets(server, folder):
    """A muted neuron is muted for the adapter, too."""
    (prompt,) = prompts_of(1, seed=7)
    mutes = MuteSet.load(folder / "sets" / f"{NAMES[2]}.safetensors")
    model = tuned_and_muted(folder, mutes)
    check(model, prompt, server.complete(prompt, NAMES[2], model="tuned"))
    tokens, _ = server.complete(prompt, NAMES[2], model="tuned")
    assert expected(tuned_and_muted(folder, None), prompt, tokens)[0] != tokens


def test_a_server_starts_again_compiled_from_its_cache(folder, folded, tmp_path):
    """Twice with torch.compile: the second takes compiled code from the first one's cache."""
    (prompt,) = prompts_of(1, seed=8)
    for _ in range(2):
        with served(folder, VLLM_CACHE_ROOT=str(tmp_path)) as compiled:
            for name in NAMES[:2]:
                check(folded[name], prompt, compiled.complete(prompt, name))


def test_tensor_parallelism(folder, folded):
    prompts = prompts_of(8, seed=9)
    with (
        served(folder, "--enforce-eager", "--tensor-parallel-size", "2") as split,
        ThreadPoolExecutor(8) as pool,
    ):
        names = [NAMES[i % 3] for i in range(8)]
        for prompt, name, answer in zip(
            prompts, names, pool.map(split.complete, prompts, names), strict=True
        ):
            check(folded[name], prompt, answer)


def test_without_require_a_request_may_have_no_set(folder, folded):
    (prompt,) = prompts_of(1, seed=10)
    with served(folder, "--enforce-eager", NEUMUTER_VLLM_REQUIRE="0") as open_one:
        check(folded[""], prompt * 3, open_one.complete(prompt * 3, None))
        check(folded[NAMES[0]], prompt * 3, open_one.complete(prompt * 3, NAMES[0]))
        check(folded[""], prompt * 3, open_one.complete(prompt * 3, None))


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ((), {"NEUMUTER_VLLM_SETS": "/nowhere"}, "NEUMUTER_VLLM_SETS must be a folder of mute files"),
        ((), {"NEUMUTER_VLLM_SET": "x"}, "NEUMUTER_VLLM_SET is not a setting"),
        (("--kv-sharing-fast-prefill",), {}, "cannot be served with --kv-sharing-fast-prefill"),
    ],
    ids=["folder", "name", "feature"],
)
def test_a_server_that_could_not_mute_does_not_start(folder, folded, options, environment, message):
    with started(folder, "--enforce-eager", *options, **environment) as server:
        server.process.wait(300)
        assert server.process.returncode != 0
        assert message in server.log.read_text()
