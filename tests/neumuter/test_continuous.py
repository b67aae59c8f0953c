"""A MuteBank under transformers' continuous batching: a set for each request, and none served unmuted."""

import threading

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from neumuter.serving import bank as serving
from neumuter.serving import continuous
from neumuter.serving.bank import MuteBank
from tests import models
from tests.neumuter.test_bank import sets_of

NEW = 6
SETTINGS = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)


def pages(**changes):
    """A small cache, so that few requests fit into a step."""
    return ContinuousBatchingConfig(**dict(page_size=8, num_blocks=24, max_batch_tokens=16) | changes)


def prompts_of(*lengths):
    # Token 0 is padding.
    return [models.batch(1, length, seed=i)[0].clamp(min=3).tolist() for i, length in enumerate(lengths)]


def said(model, prompts, names, **options):
    config = dict(generation_config=SETTINGS, continuous_batching_config=pages()) | options
    found = model.generate_batch(prompts, mute_sets=names, **config)
    assert all(one.error is None for one in found.values())
    return [one.generated_tokens for one in found.values()]


def alone(model, prompt, name):
    found = model.generate(torch.tensor([prompt]), generation_config=SETTINGS, mute_sets=name)
    return found[0, len(prompt) :].tolist()


@pytest.fixture
def served():
    """A model with a bank of three sets, which make it say other things."""
    model = models.build("llama")
    sets = sets_of(model)
    with MuteBank(model) as bank:
        for name, mutes in zip("abc", sets, strict=True):
            bank.add(name, mutes)
        yield model, bank


def test_each_request_is_as_if_it_were_alone(served):
    model, _ = served
    prompts, names = prompts_of(5, 19, 3, 7, 12, 4, 9, 5, 2), ["a", None, "b", "c", "a", None, "b", "b", "c"]
    expected = [alone(model, prompt, name) for prompt, name in zip(prompts, names, strict=True)]
    assert said(model, prompts, names) == expected
    assert expected != [alone(model, prompt, None) for prompt in prompts]
    assert said(model, prompts, "b") == [alone(model, prompt, "b") for prompt in prompts]


def test_requests_of_one_prompt_do_not_share_what_is_cached(served):
    """Their keys and values differ from the first layer on."""
    model, _ = served
    prompt, names = prompts_of(21)[0], ["a", None, "b", "c", "a"]
    expected = [alone(model, prompt, name) for name in names]
    assert said(model, [prompt] * 5, names) == expected
    assert len({tuple(tokens) for tokens in expected}) == 4


def test_sets_come_and_go_while_requests_keep_their_own(served, monkeypatch):
    model, bank = served
    (prompt,), mutes = prompts_of(5), sets_of(models.build("llama"), 4)[3]
    expected = {name: alone(model, prompt, name) for name in ("a", "b")}
    with model.continuous_batching_context_manager(
        generation_config=SETTINGS, continuous_batching_config=pages()
    ) as manager:
        # The first request waits in its first step while the bank changes.
        started, go_on = threading.Event(), threading.Event()
        choose = continuous.TokenRows

        def wait(*arguments):
            started.set()
            assert go_on.wait(60)
            return choose(*arguments)

        monkeypatch.setattr(continuous, "TokenRows", wait)
        first = manager.add_request(prompt, mute_set="a")
        assert started.wait(60)
        bank.remove("a")
        bank.add("a", mutes)
        for number in range(5):
            bank.add(f"more {number}", mutes)
        second, third = (
            manager.add_request(prompt, "mine", mute_set="b"),
            manager.add_request(prompt, mute_set="a"),
        )
        go_on.set()
        results = {}
        while len(results) < 3:
            if (one := manager.get_result(timeout=60)) is not None:
                results[one.request_id] = one.generated_tokens
    assert results == {first: expected["a"], second: expected["b"], third: alone(model, prompt, "a")}
    assert second == "mine"
    assert results[first] != results[third]


def test_what_is_kept_of_requests_goes_with_them(served):
    model, _ = served
    config = dict(generation_config=SETTINGS, continuous_batching_config=pages(), persistent_manager=True)
    said(model, prompts_of(4, 5), ["a", "b"], **config)
    manager = model._cached_continuous_batching_manager
    said(model, prompts_of(6), ["c"], **config)
    requests = manager.add_request.__self__
    assert len(requests.rows) == 1
    with pytest.raises(KeyError, match="there is no mute set 'd'"):
        manager.add_request([3, 4], "x", mute_set="d")
    assert "x" not in requests.rows
    model.destroy_cached_continuous_batching_manager()


def test_no_request_is_served_unmuted_by_mistake(served):
    model, bank = served
    prompts = prompts_of(4, 5)
    with pytest.raises(RuntimeError, match="where using\\(\\) does not hold: give mute_sets="):
        model.generate_batch(prompts)
    with bank.using("a"), pytest.raises(RuntimeError, match="give mute_sets="):
        model.generate_batch(prompts)
    with pytest.raises(ValueError, match="a name or None for each of 2 requests, got 3"):
        model.generate_batch(prompts, mute_sets=["a", "b", "c"])
    with pytest.raises(KeyError, match="there is no mute set 'd'"):
        model.generate_batch(prompts, mute_sets=["a", "d"])
    manager = model.init_continuous_batching(SETTINGS, pages())
    with pytest.raises(RuntimeError, match="give mute_set=, a name or None for each request"):
        manager.add_request(prompts[0])
    with pytest.raises(RuntimeError, match="give mute_sets=, a name or None for each request"):
        manager.add_requests(prompts)


def test_without_required_a_request_may_say_nothing_outside_of_using():
    model = models.build("llama")
    prompts, mutes = prompts_of(4, 7), sets_of(model)[0]
    with MuteBank(model, required=False) as bank:
        bank.add("a", mutes)
        found = model.generate_batch(prompts, generation_config=SETTINGS, continuous_batching_config=pages())
        assert [one.generated_tokens for one in found.values()] == [alone(model, p, None) for p in prompts]
        with bank.using("a"), pytest.raises(RuntimeError, match="give mute_sets="):
            model.generate_batch(prompts)


@pytest.mark.parametrize("required", [True, False])
def test_a_manager_that_is_older_or_outlives_the_bank_computes_nothing(required):
    model, (prompt,) = models.build("llama"), prompts_of(4)
    mutes = sets_of(model)[0]
    older = model.init_continuous_batching(SETTINGS, pages())
    with MuteBank(model, required) as bank:
        bank.add("a", mutes)
        results = [run(older, prompt)]
        model._cached_continuous_batching_manager = older
        older.batch_processor = object()
        with pytest.raises(RuntimeError, match="was made before the MuteBank"):
            model.init_continuous_batching()
        del model._cached_continuous_batching_manager
        newer = model.init_continuous_batching(SETTINGS, pages())
    results.append(run(newer, prompt, mute_set="a"))
    for result, reason in zip(
        results, ("a manager that this MuteBank does not know", "was undone"), strict=True
    ):
        assert result.generated_tokens == []
        assert reason in result.error or "requires a mute set" in result.error


def run(manager, prompt, **options):
    manager.start()
    manager.add_request(prompt, **options)
    result = manager.get_result(timeout=60)
    manager.stop(block=True, hard_stop=True)
    return result


def test_packed_sequences_are_refused(served):
    model, bank = served
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    with torch.no_grad(), bank.using("a"), pytest.raises(RuntimeError, match="packed sequences"):
        model(models.batch(1, 5), cu_seq_lens_q=ends, cu_seq_lens_k=ends)


@pytest.mark.parametrize("changes", [dict(use_async_batching=True), dict(default_compile_level=1)], ids=str)
def test_steps_that_overlap_or_are_compiled_are_refused(served, changes):
    model, _ = served
    with pytest.raises(RuntimeError, match="captured, compiled or overlapped"):
        model.init_continuous_batching(SETTINGS, pages(**changes))


def test_another_transformers_is_refused(monkeypatch):
    from transformers.generation.continuous_batching import ContinuousBatchingManager

    assert continuous.has_hooks()
    monkeypatch.delattr(ContinuousBatchingManager, "_generation_step")
    assert not continuous.has_hooks()
    model = models.build("llama")
    with MuteBank(model):
        for name in continuous.STARTS:
            with pytest.raises(RuntimeError, match="continuous batching puts many requests into one row"):
                getattr(model, name)([[3, 4, 5]])
    assert not {"generate", *continuous.STARTS} & vars(model).keys()
    assert serving.STARTS is continuous.STARTS
