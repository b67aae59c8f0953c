"""The losses that mask training is made of. Padding never enters any of them.

A batch is a dict of int64 tensors [B, T]: ``input_ids``, ``attention_mask`` (1 on real tokens) and
``labels`` (the input ids, or -100 where a token is not part of the loss). As usual for causal
models, the logits at position t predict the label at position t + 1.
"""

import torch
import torch.nn.functional as F

IGNORED = -100
CHUNK = 2048


def predicting(labels):
    """Where a counted token is predicted: bool [B, T], true at t if ``labels[:, t + 1]`` is not -100.

    Indexing logits [B, T, V] with it gives [N, V], for N counted tokens in row-major order.
    """
    counted = torch.zeros_like(labels, dtype=torch.bool)
    counted[:, :-1] = labels[:, 1:] != IGNORED
    return counted


def token_losses(logits, labels):
    """Cross-entropy in nats of each counted token, float32 [N], row by row.

    ``logits``: [B, T, V], any float dtype; ``labels``: int64 [B, T] with -100 on tokens that do not
    count. The first token of a row has no prediction and never counts.
    """
    where = predicting(labels)
    targets = labels[:, 1:][labels[:, 1:] != IGNORED]
    return F.cross_entropy(logits[where].float(), targets, reduction="none")


def hinge(losses, margin):
    """mean relu(margin − loss) over ``losses`` [N]: zero once every token costs ``margin`` nats.

    Ascending a cross-entropy has no end and wrecks the model; this stops where the token is no
    longer predicted.
    """
    return F.relu(margin - losses).mean()


class _KL(torch.autograd.Function):
    """Keeps only the two logits and works on CHUNK tokens at a time, so no float32 copy of [N, V]."""

    @staticmethod
    def forward(ctx, logits, reference):
        ctx.save_for_backward(logits, reference)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for q, p in zip(logits.split(CHUNK), reference.split(CHUNK), strict=True):
            q, p = F.log_softmax(q.float(), -1), F.log_softmax(p.float(), -1)
            total += F.kl_div(q, p, reduction="sum", log_target=True)
        return total / len(logits)

    @staticmethod
    def backward(ctx, grad):
        logits, reference = ctx.saved_tensors
        result = torch.empty_like(logits)
        scale = grad / len(logits)
        chunks = (tensor.split(CHUNK) for tensor in (result, logits, reference))
        for out, q, p in zip(*chunks, strict=True):
            out.copy_((q.float().softmax(-1) - p.float().softmax(-1)) * scale)
        return result, None


def kl_divergence(reference, logits):
    """KL(reference ‖ masked) in nats per token, a float32 scalar: mean_n Σ_v p·(ln p − ln q).

    ``reference`` and ``logits``: unnormalised logits [N, V] of the same N tokens, any float dtype.
    The gradient, (q − p)/N, reaches ``logits`` only. Raises ValueError if the shapes differ or
    there is no token.
    """
    if reference.shape != logits.shape or logits.dim() != 2 or not len(logits):
        raise ValueError(
            "reference and logits must both be [N, V] with N > 0, got "
            f"{list(reference.shape)} and {list(logits.shape)}"
        )
    return _KL.apply(logits, reference.detach())
