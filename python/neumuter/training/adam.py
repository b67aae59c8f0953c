"""torch's Adam with a learning rate for each step, which a CUDA graph can hold."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neumuter.training.step import Measured


class Adam:
    """An ``Update``: torch's Adam.

    Args:
        parameters: what it changes.
        lrs: the learning rate of each step; the last one stays.
        betas: as torch's.
    """

    def __init__(
        self, parameters: Sequence[Tensor], lrs: Sequence[float], betas: tuple[float, float] = (0.9, 0.999)
    ) -> None:
        self.lrs, device = lrs, parameters[0].device
        if device.type == "cuda":
            self.lr: Tensor | None = torch.tensor(lrs[0], device=device)
            self._table = torch.tensor(lrs, device=device)
            self.optimizer = torch.optim.Adam(
                parameters, lr=self.lr, betas=betas, fused=True, capturable=True
            )
        else:
            self.lr = None
            self.optimizer = torch.optim.Adam(parameters, lr=lrs[0], betas=betas)

    def apply(self, measured: Measured, counter: Tensor) -> None:
        if self.lr is None:
            self.optimizer.param_groups[0]["lr"] = self.lrs[min(int(counter), len(self.lrs) - 1)]
        else:
            step = counter.clamp(max=len(self.lrs) - 1).reshape(1)
            self.lr.copy_(self._table.index_select(0, step).reshape(()))
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.optimizer.state_dict()
        return {"state": {k: {n: v.clone() for n, v in s.items()} for k, s in state["state"].items()}}

    def load(self, state: dict[str, Any]) -> None:
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**state, "param_groups": groups})


def cosine(lr: float, steps: int) -> list[float]:
    """The learning rates of a cosine decay from ``lr`` to zero after ``steps`` steps."""
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    lrs = []
    for _ in range(steps):
        lrs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return [float(value) for value in lrs]
