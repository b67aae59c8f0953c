"""select_muted against torch's composition for the same result, and against reading the scores once."""

import functools

import torch
import torch.nn.functional as F

import neumuter_kernels as nk
from bench.timing import Contender, compare
from neumuter_kernels import reference

SHARE, THRESHOLD = 0.01, 0.15
STRETCH = (-0.1, 1.1)
SIZES = {"352k": (32, 11008), "2.3M": (80, 28672), "6.6M": (126, 53248)}
MODES = ("budget", "threshold")


def distinct_scores(layers, width, device):
    """[layers, width] float32 scores without ties, which torch.topk breaks as it likes.

    Uniform in [-1.83, 8.17), so that SHARE of them are below THRESHOLD, too.
    """
    generator = torch.Generator().manual_seed(0)
    n = layers * width
    return (torch.randperm(n, generator=generator).to(device) * (10 / n) - 1.83).view(layers, width)


def composition(scores, budget=None, threshold=None):
    """The same indptr, indices and gains, padded to the same capacity, out of torch's own ops."""
    flat, (layers, width) = scores.flatten(), scores.shape
    if budget is not None:
        chosen = flat.topk(budget, largest=False, sorted=False).indices.sort().values
    else:
        chosen = (flat < reference.logit(threshold)).nonzero().flatten()
    starts = torch.arange(layers + 1, device=flat.device) * width
    indptr = torch.searchsorted(chosen, starts, out_int32=True)
    gains = torch.sigmoid(flat[chosen]) * (STRETCH[1] - STRETCH[0]) + STRETCH[0]
    padding = 0, (flat.numel() if budget is None else budget) - chosen.numel()
    indices = F.pad((chosen % width).int(), padding, value=-1)
    return indptr, indices, F.pad(gains.clamp(0.0, 1.0), padding, value=1.0)


def problem(layers, width, device, mode):
    """The contenders, ours first, and the time that the memory allows: one reading of the scores."""
    scores = distinct_scores(layers, width, device)
    if scores.unique().numel() != scores.numel():
        raise AssertionError("the scores have ties, so torch.topk may choose differently")
    options = {"budget": int(SHARE * scores.numel())} if mode == "budget" else {"threshold": THRESHOLD}

    def contender(name, function):
        return Contender(
            name, lambda _: function(scores, **options), check=lambda: _check(function, scores, options)
        )

    contenders = [contender("ours", nk.select_muted), contender("torch composition", composition)]
    return contenders, Contender("reading the scores once", lambda _: scores.sum()), scores


def _check(function, scores, options):
    """None, or what differs from the reference: the selection exactly, the gains in float64 terms."""
    indptr, indices, gains = (x.cpu() for x in function(scores, **options))
    flat = scores.flatten().cpu()
    options = {k: reference.logit(v) if k == "threshold" else v for k, v in options.items()}
    exact_indptr, exact_indices, _ = reference.select_muted(flat, [scores.shape[1]] * len(scores), **options)
    if not torch.equal(indptr, exact_indptr):
        return "indptr differs from the reference"
    if not torch.equal(indices, exact_indices):
        return "indices differ from the reference"
    count = int(indptr[-1])
    layer = torch.repeat_interleave(torch.arange(len(scores)), indptr.diff().long())
    chosen = flat[layer * scores.shape[1] + indices[:count]].double()
    exact = torch.ones(len(gains), dtype=torch.float64)  # past the selected ones, too
    exact[:count] = (torch.sigmoid(chosen) * (STRETCH[1] - STRETCH[0]) + STRETCH[0]).clamp(0, 1)
    error = (gains.double() - exact).abs().max().item() if len(gains) else 0.0
    return None if error <= 1e-6 else f"gains are off by up to {error:.1e}, allowed 1e-06"


def cases(device, effort, small=False):
    """Yields (what a row is about, how it is measured)."""

    def find(layers, width, mode):
        contenders, reading, scores = problem(layers, width, device, mode)
        return compare(contenders, reading, device, effort, 4 * scores.numel())

    for name, (layers, width) in ({"256": (4, 64)} if small else SIZES).items():
        for mode in MODES:
            about = {"op": "select_muted", "pass": mode, "shape": [layers, width], "scores": name}
            yield about, functools.partial(find, layers, width, mode)
