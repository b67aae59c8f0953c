"""Which seam each FFN of a model gets: the fused one where it computes what the model does."""

import torch
from torch._subclasses.fake_tensor import FakeTensor

from neumuter.families import unwrapped
from neumuter.ffn import Mask, local, masked_act_of, run_seam


def choose_seams(model, ffns):
    """{path: "activation", "ffn", "experts" or "down"} for each ``FFN``.

    The model runs once on two tokens, in evaluation mode. Where a fused seam with a mask of ones gives what
    the FFN gave, it is taken; a dense FFN that computes something else, or that the kernels have no
    activation for, is masked at its down projection. A model that cannot run yet (its weights are elsewhere)
    is masked there, too.

    Raises ValueError for experts that compute something else.
    """
    seams = {ffn.path: "down" if ffn.layout else None for ffn in ffns}
    if isinstance(next(model.parameters()), FakeTensor):
        return {ffn.path: _by_structure(ffn) for ffn in ffns}
    if not _can_run(model):
        return seams | {ffn.path: "experts" for ffn in ffns if not ffn.layout}
    handles = []
    for ffn in ffns:
        handles += _watch(ffn, seams)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        place = unwrapped(model).get_input_embeddings().weight.device
        ids = torch.arange(2, device=place if place.type != "meta" else "cpu")[None]
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    for ffn in ffns:
        if seams[ffn.path] is None:
            raise ValueError(
                f"{ffn.path}, a {type(ffn.module).__name__}, has the attributes of transformers' experts but "
                "computes something else than down(activation(gate)·up) or down(activation(up)) of the "
                "chosen experts; it cannot be masked"
            )
    return seams


def _by_structure(ffn):
    """The seam that an FFN gets if it computes what its children suggest: of models without values."""
    if not ffn.layout:
        return "experts"
    if not ffn.activation:
        return "down"
    return "ffn" if ffn.layout.gate or ffn.layout.gate_up else "activation"


def _can_run(model):
    """Whether a forward pass is possible now: a model of transformers whose weights are all there."""
    embeddings = getattr(unwrapped(model), "get_input_embeddings", None)
    return embeddings is not None and all(parameter.numel() for parameter in model.parameters())


def _watch(ffn, seams):
    """Hooks on one FFN that write into ``seams`` if a fused seam gives the same; their handles."""
    ones = Mask(torch.ones(1, ffn.width, device=ffn.device))

    def whole(seam):
        def hook(module, arguments, options, output):
            if _close(run_seam(seam, module, ffn, ones, *arguments, **options), output):
                seams[ffn.path] = seam

        return [ffn.module.register_forward_hook(hook, with_kwargs=True)]

    if not ffn.layout:
        return whole("experts")
    if _by_structure(ffn) == "down":
        return []
    if _by_structure(ffn) == "ffn":
        return whole("ffn")
    acted = []

    def plain(module, arguments, output):
        if _close(masked_act_of(arguments[0], ffn.activation, local(ones, ffn.mesh)), output):
            acted.append(output)

    def down(module, arguments):
        if len(acted) == 1 and torch.equal(acted[0], arguments[0]):
            seams[ffn.path] = "activation"

    activation = getattr(ffn.module, ffn.layout.activation)
    return [activation.register_forward_hook(plain), ffn.down.register_forward_pre_hook(down)]


def _close(actual, expected):
    if not isinstance(expected, torch.Tensor) or actual.shape != expected.shape:
        return False
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 0.05
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())
