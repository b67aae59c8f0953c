"""The ops called by several Python threads at once, on the same inputs: the same bits as alone."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

import neumuter_kernels as nk
from tests.test_mute import mute_sets

THREADS = 4


def test_calls_at_once():
    gate, up, grad = torch.randn(3, 130, 1100)
    mask, scores, ids = torch.rand(2, 1100), torch.randn(9, 2200), torch.randint(0, 1100, (130,))
    sets = mute_sets(2, 1, 1100)
    barrier = Barrier(THREADS + 1)

    def call_all(together=True):
        leaves = [x.clone().requires_grad_() for x in (gate, up, mask, scores[:3].flatten())]
        if together:
            barrier.wait()
        h = nk.masked_glu(*leaves[:3])
        gates = nk.hard_concrete(leaves[3], rows=2, seed=0, step=1, layer=2)
        found = [h, gates, *torch.autograd.grad((h, gates), leaves, (grad, torch.ones_like(gates)))]
        logits, others = h.detach().clone(), h.detach().clone()
        found += [nk.mute_(h.detach().clone(), *sets), *nk.select_muted(scores, budget=5000)]
        found += [nk.cross_entropy_(logits, ids), logits, nk.kl_divergence_(others, up), others]
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        runs = [pool.submit(call_all) for _ in range(THREADS)]
        barrier.wait()
    for run in runs:
        for a, b in zip(run.result(), call_all(together=False), strict=True):
            assert torch.equal(a, b)
