"""Which seam each FFN of a model gets: the fused one where it computes what the model does."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from neumuter.models.devices import is_fake
from neumuter.models.families import input_device, unwrapped
from neumuter.models.ffn import FFN, Experts, Layout
from neumuter.models.hooks import run_seam
from neumuter.models.mask import Mask, masked_act_of
from neumuter.models.modes import without_dropout

# Random inputs are scaled by these, so that a clamp shows.
SCALES = (1.0, 30.0, 1000.0)


def choose_seams(model: nn.Module, ffns: Sequence[FFN], constant: bool = False) -> dict[str, str]:
    """Choose "activation", "ffn", "experts" or "down" for each ``FFN``; returns {path: seam}.

    The model runs once on two tokens, in evaluation mode. A fused seam is taken where, with a mask of ones,
    it gives what the FFN gives: on these tokens, and for random inputs up to very large ones. A dense FFN
    that computes something else, or whose activation the kernels lack, is masked at its down projection, if
    the model calls that. So are all FFNs of a model that cannot run yet because its weights are elsewhere.

    Args:
        constant: the mask needs no gradient, so a fused seam saves nothing: take "down" wherever the down
            projection is called as a module.

    Raises:
        ValueError: a split that masks cannot follow; experts that compute something else; a dense FFN
            without a fused seam that does not call its down projection.
    """
    # How it is split is looked at before the model runs.
    for ffn in ffns:
        _ = ffn.mesh
    if is_fake(next(model.parameters())):
        return {ffn.path: _by_structure(ffn) for ffn in ffns}
    if not can_run(model):
        return {f.path: "down" if isinstance(f.layout, Layout) else f.layout.seam for f in ffns}
    handles: list[RemovableHandle] = []
    watched = _Watched()
    try:
        for ffn in ffns:
            if ffn.is_dense:
                handles.append(ffn.down.register_forward_pre_hook(watched.adding(ffn.path)))
            handles += _watch(ffn, watched)
        run_eagerly(model, torch.arange(2, device=input_device(model))[None])
    finally:
        for handle in handles:
            handle.remove()
    seams = {}
    for ffn in ffns:
        called = ffn.path in watched.called
        if ffn.path in watched.fused and not (constant and called):
            seams[ffn.path] = watched.fused[ffn.path]
        elif called:
            seams[ffn.path] = "down"
        else:
            kind = type(ffn.module).__name__
            raise ValueError(
                f"{ffn.path}, a {kind}, computes something else than activation(gate)·up, and does not call "
                "its down projection as a module, so that no mask can be put before it"
                if ffn.is_dense
                else f"{ffn.path}, a {kind}, has the attributes of transformers' experts but computes "
                "something else than down(activation(gate)·up) or down(activation(up)) of the chosen "
                "experts; it cannot be masked"
            )
    return seams


class _Watched:
    """What a forward pass shows: {path: fused seam}, and which FFNs call their down projection themselves."""

    def __init__(self) -> None:
        self.fused: dict[str, str] = {}
        self.called: set[str] = set()
        # While a fused seam is tried, its calls are ours.
        self.trying = False

    def adding(self, path: str) -> Callable[..., None]:
        return lambda *_: None if self.trying else self.called.add(path)


@torch.no_grad()
def run_eagerly(model: nn.Module, ids: Tensor) -> Tensor:
    """Run ``model`` on token ids [B, S], in evaluation mode and uncompiled; returns its first output.

    Compiled code may pass by hooks.
    """
    with without_dropout(model), torch.compiler.set_stance("force_eager"):
        output = model(input_ids=ids, use_cache=False)
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def _by_structure(ffn: FFN) -> str:
    """The seam that an FFN gets if it computes what its children suggest: of models without values."""
    if isinstance(ffn.layout, Experts):
        return ffn.layout.seam
    if not ffn.activation:
        return "down"
    return "ffn" if ffn.layout.gate or ffn.layout.gate_up else "activation"


def can_run(model: nn.Module) -> bool:
    """Whether a forward pass is possible now: a model of transformers whose weights are all there."""
    embeddings = getattr(unwrapped(model), "get_input_embeddings", None)
    return embeddings is not None and all(
        parameter.numel() and not is_fake(parameter) for parameter in model.parameters()
    )


def _watch(ffn: FFN, watched: _Watched) -> list[RemovableHandle]:
    """Hooks on one FFN that note a fused seam if it gives the same; their handles."""
    ones = Mask(torch.ones(1, ffn.width, device=ffn.device))

    def whole(seam: str) -> list[RemovableHandle]:
        def hook(
            module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: object
        ) -> None:
            given = (*arguments, *options.values())
            if seam == "ffn" and len(given) != 1:
                return
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(given[0].shape, generator=generator).to(given[0])
            tried = [given[0], *(scale * noise for scale in SCALES)]
            watched.trying = True
            if all(
                _close(run_seam(seam, module, ffn, ones, x, *given[1:]), module.forward(x, *given[1:]))
                for x in tried
            ):
                watched.fused[ffn.path] = seam
            watched.trying = False

        return [ffn.module.register_forward_hook(hook, with_kwargs=True)]

    if isinstance(ffn.layout, Experts):
        return whole(ffn.layout.seam)
    if _by_structure(ffn) == "down":
        return []
    if _by_structure(ffn) == "ffn":
        return whole("ffn") if {n for n, _ in ffn.module.named_children()} == set(ffn.layout.names) else []
    name, child = ffn.activation, ffn.layout.activation
    assert name is not None
    assert child is not None
    acted: list[Tensor] = []

    def plain(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if _close(masked_act_of(arguments[0], name, ones._replace(mesh=ffn.mesh)), output):
            acted.append(output)

    def down(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if len(acted) == 1 and torch.equal(acted[0], arguments[0]):
            watched.fused[ffn.path] = "activation"

    activation = getattr(ffn.module, child)
    return [activation.register_forward_hook(plain), ffn.down.register_forward_pre_hook(down)]


def _close(actual: Tensor, expected: object) -> bool:
    if not isinstance(expected, torch.Tensor) or actual.shape != expected.shape:
        return False
    # The scale is too large for the dtype.
    if not expected.isfinite().all():
        return True
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 0.01
    return bool((actual.float() - expected.float()).norm() <= tolerance * expected.float().norm())
