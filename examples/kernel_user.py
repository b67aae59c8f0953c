"""For you if you want only the kernels, in your own training code: no transformers, no files.

    python examples/kernel_user.py

A gated MLP learns to tell two spirals apart. Then L0 gates (Louizos et al. 2018) find three quarters of its
neurons that it does not need. `neumuter_kernels` provides the gates, the masked activation with the gradient
of its mask, the selection and the muting. Everything else is plain PyTorch.
"""

import math

import torch
from torch import nn

import neumuter_kernels as nk

WIDTH, ROWS, STRETCH = 256, 4, (-0.1, 1.1)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x) · mask): the FFN of a Llama, with a mask on its neurons."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, WIDTH), nn.Linear(8, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x, mask):
        return self.down(nk.masked_glu(self.gate(x), self.up(x), mask, activation="silu"))[:, 0]


def spirals(points):
    """Features of noisy points, at four frequencies, and which of the two spirals each point is on."""
    angle, arm = 1.0 + 3.5 * math.pi * torch.rand(points), torch.randint(2, (points,))
    place = torch.stack([angle.cos(), angle.sin()], -1) * (angle * (1.0 - 2.0 * arm))[:, None] / 12
    place = place + 0.01 * torch.randn_like(place)
    return torch.cat([torch.sin(2.0**k * place) for k in range(4)], -1), arm.float()


def train(parameters, lr, steps, loss_of):
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for step in range(steps):
        rows = torch.randint(len(points), (512,))
        optimizer.zero_grad()
        loss_of(step, points[rows], arms[rows]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(mask):
    return ((model(test_points, mask) > 0) == test_arms.bool()).float().mean().item()


torch.manual_seed(0)
(points, arms), (test_points, test_arms) = spirals(4096), spirals(4096)
model, every_neuron, cross_entropy = GatedMLP(), torch.ones(1, WIDTH), nn.BCEWithLogitsLoss()
train(model.parameters(), 5e-3, 400, lambda _, x, arm: cross_entropy(model(x, every_neuron), arm))
model.requires_grad_(False)
print(f"all {WIDTH} neurons: accuracy {accuracy(every_neuron):.3f}")
# From here on, only the scores of the gates are trained.
scores = torch.full((WIDTH,), 2.0, requires_grad=True)


def gated_loss(step, x, arm):
    # One row of gates for each quarter of the batch. The noise depends only on (seed, step, layer, row).
    gates = nk.hard_concrete(scores, rows=ROWS, seed=0, step=step, layer=0, stretch=STRETCH)
    expected_open = (scores - math.log(-STRETCH[0] / STRETCH[1]) / 3).sigmoid().mean()
    return cross_entropy(model(x, gates), arm) + 0.3 * expected_open


train([scores], 0.1, 300, gated_loss)
# Exactly three quarters of the neurons: those with the lowest scores.
indptr, indices, gains = nk.select_muted(scores[None], budget=0.75)
found = every_neuron.index_fill(1, indices.long(), 0.0)
random = every_neuron.index_fill(1, torch.randperm(WIDTH)[: len(indices)], 0.0)
print(f"without the {len(indices)} found: accuracy {accuracy(found):.3f}")
print(f"without {len(indices)} at random: accuracy {accuracy(random):.3f}")

# To serve, mute_ works in place, after any activation, and touches only the selected neurons.
with torch.no_grad():
    hidden = nn.functional.silu(model.gate(test_points)) * model.up(test_points)
    nk.mute_(hidden, indptr, indices, torch.zeros_like(gains))
    difference = (model.down(hidden)[:, 0] - model(test_points, found)).abs().max().item()
print(f"mute_ and masked_glu differ by {difference:.1e}")
