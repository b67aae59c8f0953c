"""Many mute sets on one model, another one for each row of a batch."""

import copy
import pickle
import threading

import pytest
import torch

import neumuter
from neumuter.recipes import mute_random
from neumuter.serving import bank as serving
from neumuter.serving import pool as pools
from neumuter.serving.bank import MuteBank
from neumuter.serving.pool import Pool
from tests import models

FAMILIES = ("llama", "gpt2", "gpt_neo", "phi3", "opt")


def sets_of(model, count=3, share=0.2):
    with neumuter.attach(model, start_layer=0) as masked:
        sets = [mute_random(masked, share, seed) for seed in range(count)]
    for number, mutes in enumerate(sets):
        for layer in mutes.layers.values():
            layer.gains.fill_(-0.5 * number)
    return sets


@pytest.fixture(params=FAMILIES)
def model(request):
    return models.build(request.param)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def test_each_row_is_as_if_its_set_were_alone(model):
    ids, sets = models.batch(4, 6), sets_of(model)
    plain = logits(model, ids)
    alone = []
    for mutes in sets[:2]:
        with neumuter.mute(model, mutes):
            alone.append(logits(model, ids))
    with MuteBank(model, required=False) as bank:
        for name, mutes in zip("abc", sets, strict=True):
            bank.add(name, mutes)
        assert torch.equal(logits(model, ids), plain)
        with bank.using(["a", None, "b", "a"]):
            mixed = logits(model, ids)
        for row, name in enumerate(["a", None, "b", "a"]):
            with bank.using(name):
                assert torch.equal(mixed[row], logits(model, ids)[row])
        assert torch.equal(mixed[1], plain[1])
        torch.testing.assert_close(mixed[0], alone[0][0])
        torch.testing.assert_close(mixed[2], alone[1][2])
        assert (mixed[0] - plain[0]).abs().max() > 1e-3
    assert torch.equal(logits(model, ids), plain)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "opt"])  # activations [B, S, F], [B·S, F]
def test_few_activations_and_many_have_the_same_bits(name, dtype, tokens, monkeypatch):
    model = models.build(name, dtype)
    ids, names, sets = models.batch(4, tokens), ["a", None, "c", "a"], sets_of(model)
    with MuteBank(model, required=False) as bank:
        for each, mutes in zip("abc", sets, strict=True):
            bank.add(each, mutes)
        for rows in (ids, ids.roll(1, 0), ids.repeat(2, 1)):
            with bank.using(names):
                first, second, _, fourth = (logits(model, x) for x in (rows, rows, rows[:4], rows))
                made = len(bank._current.seat.buffers.shaped)
            assert made == (models.LAYERS if name == "llama" or tokens == 1 else 0)
            with monkeypatch.context() as patch, bank.using(names):
                patch.setattr(serving, "FEW", 0)
                expected = logits(model, rows)
            assert torch.equal(first, expected)
            assert torch.equal(second, expected)
            assert torch.equal(fourth, expected)  # after another size of batch


def test_gradients_are_refused_after_any_other_pass():
    model = models.build("llama")
    ids, (mutes, *_) = models.batch(1, 3), sets_of(model)
    with MuteBank(model, required=False) as bank:
        bank.add("a", mutes)
        with bank.using("a"):
            logits(model, ids)
            with pytest.raises(ValueError, match="requires grad"):
                model(input_ids=ids)


def test_generation_takes_a_set_for_each_row():
    model = models.build("llama")
    ids, sets = models.batch(3, 5), sets_of(model, 2)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
    plain = model.generate(ids, **options)
    with MuteBank(model, required=False) as bank:
        bank.add("a", sets[0])
        bank.add("b", sets[1])
        mixed = model.generate(ids, **options, mute_sets=["b", None, "a"])
        alone = {name: model.generate(ids, **options, mute_sets=name) for name in "ab"}
        assert torch.equal(mixed, torch.stack([alone["b"][0], plain[1], alone["a"][2]]))
        assert torch.equal(model.generate(ids, **options), plain)
        with bank.using(["b", None, "a"]):  # an outer context stays in force
            assert torch.equal(model.generate(ids, **options), mixed)
        beams = model.generate(ids, **options, num_beams=2, mute_sets=["b", None, "a"])
        for row, name in enumerate(["b", None, "a"]):
            one = model.generate(ids, **options, num_beams=2, mute_sets=name)
            assert torch.equal(beams[row], one[row])
    assert not torch.equal(mixed, plain)


def test_sets_come_and_go_while_a_batch_keeps_its_own():
    model = models.build("llama")
    ids, sets = models.batch(1, 6), sets_of(model, 3)
    with MuteBank(model, required=False) as bank:
        bank.add("a", sets[0])
        with bank.using("a"):
            before = logits(model, ids)
            bank.remove("a")
            for number in range(40):
                bank.add(f"b{number}", sets[1 + number % 2])
            assert torch.equal(logits(model, ids), before)
        assert bank.names == tuple(f"b{number}" for number in range(40))
        for number in range(0, 40, 3):
            bank.remove(f"b{number}")
        bank.add("a", sets[0])
        with bank.using("a"):
            assert torch.equal(logits(model, ids), before)
        with bank.using("b38"):
            expected = logits(model, ids)
        for name in bank.names[:-1]:
            if name != "b38":
                bank.remove(name)
        bank.add("c", sets[2])
        with bank.using("b38"):
            assert torch.equal(logits(model, ids), expected)
        with pytest.raises(KeyError, match="no mute set 'b0'"), bank.using("b0"):
            pass


def test_room_is_little_more_than_what_sets_take():
    model = models.build("llama")
    mutes = sets_of(model, 1)[0]
    with MuteBank(model, required=False) as bank:
        for number in range(100):
            bank.add(str(number), mutes)
        assert bank.bytes < 1.3 * 100 * (8 * mutes.count + 8 * 4)


def test_more_neurons_than_offsets_can_tell_apart_are_refused(monkeypatch):
    model = models.build("llama")
    first, second, third = sets_of(model, 3)
    monkeypatch.setattr(pools, "MAX_SLOTS", first.count + second.count)
    ids = models.batch(1, 6)
    with MuteBank(model, required=False) as bank:
        bank.add("a", first)
        bank.add("b", second)
        with bank.using("a"):
            before = logits(model, ids)
        message = f"at most {first.count + second.count} muted neurons.*this one has {third.count} more"
        with pytest.raises(ValueError, match=message):
            bank.add("c", third)
        assert bank.names == ("a", "b")
        with bank.using("a"):
            assert torch.equal(logits(model, ids), before)
        bank.remove("b")
        bank.add("c", second)
        assert bank.names == ("a", "c")


def test_ten_thousand_sets_of_a_7b_model():
    """1 % of 32 layers of 11,008 neurons, 10,000 times, with the room for more, in less than 400 MB."""
    count = int(1.25 * 10_000)
    pool = Pool([slice(0, 11008)] * 32, {torch.device("meta")})
    pool.tensors = {
        device: pool._make_room(device, count, count * int(0.01 * 32 * 11008)) for device in pool.tensors
    }
    assert pool.bytes < 400e6


def test_a_failure_while_sets_move_changes_nothing(monkeypatch):
    model = models.build("llama")
    ids, sets = models.batch(1, 6), sets_of(model, 3)
    with MuteBank(model, required=False) as bank:
        for name, mutes in zip("abc", sets, strict=True):
            bank.add(name, mutes)
        with bank.using("c"):
            before = logits(model, ids)
        bank.remove("a")
        real, calls = pools._append, []

        def fails(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise MemoryError
            return real(*arguments)

        monkeypatch.setattr(pools, "_append", fails)
        failed = 0
        for number in range(20):  # until sets have to move
            try:
                bank.add(f"d{number}", sets[0])
            except MemoryError:
                failed += 1
        assert failed
        with bank.using("c"):
            assert torch.equal(logits(model, ids), before)


def test_threads_have_sets_of_their_own_while_others_come_and_go():
    model = models.build("llama")
    ids, sets = models.batch(2, 6), sets_of(model, 3)
    found, running = {}, threading.Event()
    with MuteBank(model, required=False) as bank:
        for name, mutes in zip("abc", sets, strict=True):
            bank.add(name, mutes)
        expected = {}
        for name in "abc":
            with bank.using(name):
                expected[name] = logits(model, ids)

        def work(name):
            found[name] = True
            for _ in range(20):
                with bank.using(name):
                    found[name] &= torch.equal(logits(model, ids), expected[name])

        def churn():
            number = 0
            while not running.is_set():
                bank.add(f"x{number}", sets[number % 3])
                if number > 2:
                    bank.remove(f"x{number - 2}")
                number += 1

        threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
        churning = threading.Thread(target=churn)
        churning.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        running.set()
        churning.join()
    assert found == dict.fromkeys("abc", True)


def test_no_request_is_served_unmuted_by_mistake():
    model = models.build("llama")
    ids, mutes = models.batch(2, 4), sets_of(model, 1)[0]
    with MuteBank(model) as bank:
        bank.add("a", mutes)
        with pytest.raises(RuntimeError, match="requires a mute set, or None"):
            logits(model, ids)
        with bank.using("a"):
            failed = []

            def elsewhere():
                try:
                    logits(model, ids)
                except RuntimeError as error:
                    failed.append(error)

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            assert failed
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, mute_sets=None)
        assert plain.shape == (2, 6)

        def open_context():
            with bank.using("a"):
                yield

        first, second = open_context(), open_context()
        next(first)
        next(second)
        for generator in (first, second):
            with pytest.raises(RuntimeError, match="in the order in which they were opened"):
                generator.close()


def test_rows_are_those_of_the_batch():
    for name in ("llama", "opt"):  # OPT's FFNs see tokens without rows
        model = models.build(name)
        mutes = sets_of(model, 1)[0]
        with MuteBank(model, required=False) as bank:
            bank.add("a", mutes)
            for rows, names in ((2, "aaa"), (8, ["a"] * 16), (1, "aa")):
                ids = models.batch(rows, 6)
                with bank.using(list(names)), pytest.raises(ValueError, match="cannot use"):
                    logits(model, ids)


def test_a_model_that_does_not_call_its_down_projection_is_refused():
    model = models.build("llama")
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: torch.nn.functional.linear(
        mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight
    )
    with pytest.raises(ValueError, match=r"model.layers.0.mlp cannot be masked: a mask at its down does not"):
        MuteBank(model)
    mlp.forward = lambda x: plain(x) + mlp.down_proj(torch.zeros(*x.shape[:-1], models.WIDTH))
    with pytest.raises(ValueError, match=r"model.layers.0.mlp was called 2 times in a forward pass"):
        MuteBank(model)
    mlp.forward = plain
    assert "generate" not in vars(model)
    MuteBank(model).undo()
    assert not {"generate", "generate_batch"} & vars(model).keys()


def test_copies_and_pickles():
    model = models.build("llama")
    ids, mutes = models.batch(2, 4), sets_of(model, 1)[0]
    with MuteBank(model, required=False) as bank:
        bank.add("a", mutes)
        with bank.using("a"):
            expected = logits(model, ids)
            assert torch.equal(logits(copy.deepcopy(model), ids), expected)
        with pytest.raises(TypeError, match="cannot be pickled: call its undo"):
            pickle.dumps(model)


def test_compiled_with_a_graph_break():
    model = models.build("llama")
    ids, mutes = models.batch(2, 4), sets_of(model, 1)[0]
    with MuteBank(model, required=False) as bank:
        bank.add("a", mutes)
        compiled = torch.compile(model, backend="eager")
        with bank.using(["a", None]):
            torch.testing.assert_close(logits(compiled, ids), logits(model, ids))


def test_bad_arguments_are_named():
    model, other = models.build("llama"), models.build("llama", seed=1)
    mutes = sets_of(model, 1)[0]
    with MuteBank(model, required=False) as bank:
        bank.add("a", mutes)
        with pytest.raises(ValueError, match="there is a mute set 'a' already"):
            bank.add("a", mutes)
        with pytest.raises(ValueError, match="name must be a str, got 3"):
            bank.add(3, mutes)
        with pytest.raises(neumuter.MuteMismatchError):
            bank.add("b", sets_of(other, 1)[0])
        with pytest.raises(KeyError, match="there are: a"):
            bank.remove("b")
        with (
            bank.using(["a", "a", None]),
            pytest.raises(ValueError, match="a batch of 2 rows cannot use 3"),
        ):
            logits(model, models.batch(2, 4))
        with bank.using("a"), pytest.raises(ValueError, match="hidden requires grad"):
            model(input_ids=models.batch(2, 4))
        with pytest.raises(RuntimeError, match="already has"):
            neumuter.mute(model, mutes)
        assert bank.names == ("a",)
    with pytest.raises(ValueError, match="of experts"):
        MuteBank(models.build("mixtral"))
    with neumuter.mute(model, mutes), pytest.raises(RuntimeError, match="already has"):
        MuteBank(model, required=False)
