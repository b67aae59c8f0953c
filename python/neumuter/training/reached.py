"""Which experts the tokens of given texts are routed to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from neumuter.models.experts import find_reached
from neumuter.models.families import decoder_of, input_device
from neumuter.models.ffn import FFN
from neumuter.models.modes import without_dropout
from neumuter.models.pieces import Pieces


def find_reached_experts(
    model: nn.Module, ffns: Iterable[FFN], seams: Mapping[str, str], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Find the experts that get a token of the texts: {path: bool [E]}. Without experts nothing is run.

    Args:
        ffns: those of the model; only those with experts count.
        seams: see ``Masked.seams``.
        batches: "input_ids" and "attention_mask", int64 [B, T], padded on the right. Where padding is routed
            to does not matter.
    """
    experts = [ffn for ffn in ffns if not ffn.is_dense]
    if not experts:
        return {}
    reached = {f.path: torch.zeros(f.experts, dtype=torch.bool, device=f.device) for f in experts}
    real = torch.empty(0, dtype=torch.bool)

    def record(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            chosen = find_reached(seams[path], module, real, *arguments, **options)
            reached[path][chosen[chosen < len(reached[path])]] = True

        return hook

    # FSDP2 gathers weights where its root is called.
    whole = model if isinstance(model, FSDPModule) else decoder_of(model)
    device = input_device(model)

    def run(rows: Sequence[Tensor]) -> None:
        nonlocal real
        ids, shown = torch.stack(list(rows)).unbind(1)
        real = shown.flatten() > 0
        whole(input_ids=ids.to(device), use_cache=False)

    handles = [f.module.register_forward_pre_hook(record(f.path), with_kwargs=True) for f in experts]
    pieces: Pieces | None = None
    try:
        with torch.no_grad(), without_dropout(model):
            for batch in batches:
                rows = torch.stack([batch["input_ids"], batch["attention_mask"]], 1).unbind()
                pieces = pieces or Pieces(model, len(rows))
                for _ in pieces.run(run, rows):
                    pass
    finally:
        for handle in handles:
            handle.remove()
    return reached
