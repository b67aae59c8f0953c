"""The ops called by eight threads at once, in pairs on the same inputs: the same bits as alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

import neumuter_kernels as nk
from tests.kernels.test_mute import mute_sets

THREADS = 8


def at_once(work, count=THREADS):
    """[work(0), work(1), …], each by a thread of its own; the threads start together."""
    barrier = threading.Barrier(count)

    def started(number):
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(started, range(count)))


def inputs(number):
    """Enough for several blocks of work."""
    generator = torch.Generator().manual_seed(number)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    leaves = [random(96, 1500), random(96, 1500), random(3, 1500), random(9000)]
    others = [random(96, 1500), random(4, 9000), random(4, 30_000), random(12, 9000), random(12, 9000)]
    return [x.requires_grad_() for x in leaves], others, mute_sets(3, 2, 1500, seed=number)


def results(leaves, others, sets, number):
    """What every op makes of these inputs, none of which it changes."""
    (gate, up, mask, scores), (grad, gate_grad, many, logits, reference) = leaves, others
    ids = torch.arange(96) % 4 - 1
    hidden, plain = nk.masked_glu(gate, up, mask), nk.masked_act(gate, mask, ids.clamp(max=2))
    gates = nk.hard_concrete(scores, 4, seed=number, step=1, layer=2)
    found = [hidden, plain, gates]
    found += torch.autograd.grad((hidden, plain, gates), leaves, (grad, grad, gate_grad))
    found += [*nk.select_muted(many, budget=0.1), nk.mute_(hidden.detach().clone(), *sets, ids, 1)]
    for loss, other in ((nk.kl_divergence_, reference), (nk.cross_entropy_, torch.arange(12))):
        gradient = logits.clone()
        found += [loss(gradient, other), gradient]
    return [x.detach() for x in found]


def test_ops_give_the_same_bits_in_eight_threads():
    given = [(*inputs(number), number) for number in range(THREADS // 2)]
    alone = [results(*one) for one in given]
    for _ in range(3):
        for thread, found in enumerate(at_once(lambda n: results(*given[n // 2]))):
            assert all(torch.equal(a, b) for a, b in zip(found, alone[thread // 2], strict=True))
