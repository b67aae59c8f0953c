"""Eight threads that serve one model at once: each gets what it would get alone."""

import threading

import pytest
import torch

import neumuter
from neumuter.recipes import mute_random
from tests import models
from tests.kernels.test_threads import THREADS, at_once

REQUESTS = 6


@pytest.fixture(scope="module")
def served():
    """A model, and a mute set for each thread that changes what it says."""
    model = models.build("llama")
    with neumuter.attach(model, start_layer=0) as masked:
        sets = [mute_random(masked, 0.3, seed) for seed in range(THREADS)]
    for number, mutes in enumerate(sets):
        for layer in mutes.layers.values():
            layer.gains.fill_(-0.25 * number)
    return model, sets


def requests(number):
    """(token ids, the mute set of each row) of the requests of one thread: alone, mixed, without a set."""
    own, other = f"own {number}", f"own {(number + 1) % THREADS}"
    for i in range(REQUESTS):
        names = ([own], [own, None], [own, other, own], [None])[i % 4]
        yield models.batch(len(names), 5 + i % 3, seed=10 * number + i), names


def answer(model, ids, names):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        mute_sets=names,
    )


def test_each_request_is_as_if_it_were_alone(served):
    """While other sets are added and removed all the time, so that those in force move."""
    model, sets = served
    with neumuter.MuteBank(model) as bank:
        for number, mutes in enumerate(sets):
            bank.add(f"own {number}", mutes)
        expected = [[answer(model, *request) for request in requests(n)] for n in range(THREADS)]
        distinct = {tuple(answer(model, models.batch(1, 6), [name])[0].tolist()) for name in bank.names}
        assert len(distinct) > THREADS // 2
        served_all, churned = threading.Event(), 0

        def churn():
            nonlocal churned
            while not served_all.is_set():
                bank.add(f"passing {churned}", sets[churned % THREADS])
                if churned > 3:
                    bank.remove(f"passing {churned - 3}")
                churned += 1

        churning = threading.Thread(target=churn)
        churning.start()
        try:
            found = at_once(lambda n: [answer(model, *request) for request in requests(n)])
        finally:
            served_all.set()
            churning.join()
    assert churned > 10
    for ours, alone in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))


def test_each_thread_adds_uses_and_removes_sets(served):
    """A set of the same name, in one thread after another, is always the one that was added last."""
    model, sets = served
    ids = models.batch(2, 6)
    with neumuter.MuteBank(model, required=False) as bank:
        expected = []
        for mutes in sets:
            bank.add("x", mutes)
            expected.append(answer(model, ids, "x"))
            bank.remove("x")

        def work(number):
            right = True
            for turn in range(4):
                mutes = (number + turn) % THREADS
                bank.add(f"of {number}", sets[mutes])
                right &= torch.equal(answer(model, ids, f"of {number}"), expected[mutes])
                bank.remove(f"of {number}")
            return right

        assert all(at_once(work))
        assert bank.names == ()
