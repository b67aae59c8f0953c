"""Losses from a frozen model's last hidden states: logits exist for one chunk of counted tokens at a time.

A step that makes all logits pays for those of prompts and padding, and holds several float32 tensors
[B·T, V]. Here each chunk's logits become losses and, in the same pass, the gradients of these losses
with respect to the hidden states, [N, d]; the backward pass only scales them, token by token. So the
head costs one product with its weight forward and one backward, whatever function of the token losses
is trained, and a reference distribution is kept as hidden states, V/d times smaller than its logits.
"""

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import neumuter_kernels as nk
from neumuter.models.devices import is_fake
from neumuter.models.families import decoder_of, unwrapped
from neumuter.models.packing import one_sequence_a_row
from neumuter_kernels.registration import final

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The size of one chunk's logits in float32.
CHUNK_BYTES = 1 << 25


class Head:
    """What a frozen causal language model does before and after its last hidden states.

    Most models multiply them by the output embedding. Some do more, such as soft-capping or scaling; there
    the model's own forward pass runs on given hidden states.

    Args:
        input_ids: int64 [B, T], a few real tokens on which logits are compared to see which kind this is.
            Fake ones have none: there the model is taken to do no more than multiply.

    Raises:
        ValueError: neither way reproduces the model's logits.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, input_ids: Tensor) -> None:
        self.model = cast("PreTrainedModel", unwrapped(model))
        # Some models name a base that they do not have.
        base = self.model.base_model
        self.base = decoder_of(self.model) if base is self.model else base
        self.projection = self.model.get_output_embeddings()
        if is_fake(input_ids):
            self.is_projection, self.vocabulary = True, self.projection.out_features
            self.state_bytes = self.projection.in_features * self.model.dtype.itemsize
            return
        called = list[nn.Module]()
        handle = self.base.register_forward_hook(lambda module, *_: called.append(module))
        try:
            expected = self.model(input_ids=input_ids, use_cache=False).logits
        finally:
            handle.remove()
        # OPT's forward pass goes around its base, to the decoder in it.
        if not called:
            self.base = decoder_of(self.model)
        output = self._run(input_ids)
        hidden = getattr(output, "last_hidden_state", None)
        self.output_type, self.vocabulary = type(output), expected.shape[-1]
        # Of one token's last hidden state.
        self.state_bytes = 0 if hidden is None else hidden[0, 0].nbytes
        if hidden is not None:
            self.is_projection = self.projection is not None and torch.equal(
                _without_gathering(self.projection)(hidden), expected
            )
            tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 0.05
            error = (self.logits(hidden.flatten(0, 1)) - expected.flatten(0, 1)).abs().max()
            if not self.is_projection and isinstance(self.projection, FSDPModule):
                raise ValueError(
                    f"FSDP2 shards the head of {type(self.model).__name__} on its own, but the model does "
                    "more than multiply by it: shard it with the rest of the model"
                )
        if hidden is None or not error <= tolerance * expected.abs().max():
            raise ValueError(
                f"the logits of {type(self.model).__name__} are not a function of the last hidden states of "
                f"its {type(self.base).__name__}; only such causal language models can be trained"
            )

    def hidden(self, input_ids: Tensor, through: nn.Module | None = None) -> Tensor:
        """Compute the last hidden states [B, T, d] of ``input_ids``, int64 [B, T], padded on the right.

        Causal attention never looks right, so no attention mask is needed; without one, attention takes its
        fastest path.

        Args:
            through: the model as wrapped by something that must see its forward pass, such as DDP. A model
                that FSDP2 shards is its own wrapper.
        """
        with one_sequence_a_row():
            hidden: Tensor = self._run(input_ids, through).last_hidden_state
        return hidden

    def _run(self, input_ids: Tensor, through: nn.Module | None = None) -> Any:
        """The output of ``base``."""
        sharded = isinstance(self.model, FSDPModule)
        through = self.model if through is None else through
        if through is self.model and not sharded:
            return self.base(input_ids=input_ids, use_cache=False)
        found: list[Any] = []
        handle = self.base.register_forward_hook(lambda _, args, output: found.append(output))
        few = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        try:
            through(input_ids=input_ids, use_cache=False, **({"logits_to_keep": 1} if few else {}))
        finally:
            handle.remove()
        # The head's weight is gathered here, where all processes are: one may have no tokens.
        tied = getattr(self.model.config.get_text_config(), "tie_word_embeddings", False)
        holders = [self.model, self.projection, *([self.model.get_input_embeddings()] if tied else [])]
        for module in holders:
            if isinstance(module, FSDPModule):
                module.unshard()
        return found[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits [N, V] for last hidden states [N, d]."""
        logits: Tensor
        if self.is_projection:
            logits = _without_gathering(self.projection)(hidden)
            return logits
        former = vars(self.base).get("forward")
        self.base.forward = GivenStates(self.output_type(last_hidden_state=hidden[None]))
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
            logits = _without_gathering(self.model)(input_ids=ids, use_cache=False).logits[0]
            return logits
        finally:
            del self.base.forward
            if former is not None:
                self.base.forward = former

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of ``targets``, int64 [N], as predicted at ``hidden`` [N, d]: float32 [N]."""
        losses: Tensor = _TokenLosses.apply(hidden, targets, self, nk.cross_entropy_)
        return losses

    def kl_divergences(self, hidden: Tensor, reference: Tensor) -> Tensor:
        """KL(reference ‖ hidden) = Σ_v p·(ln p − ln q) in nats of each token, float32 [N].

        p and q are the distributions at ``reference`` and ``hidden``, [N, d]; only the latter gets a
        gradient.
        """

        def loss(logits: Tensor, reference: Tensor) -> Tensor:
            return nk.kl_divergence_(logits, self.logits(reference))

        losses: Tensor = _TokenLosses.apply(hidden, reference.detach(), self, loss)
        return losses


class GivenStates:
    """Stands in for a base's forward pass: it returns an output with given hidden states."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.output


def _without_gathering(module: nn.Module) -> Callable[..., Any]:
    """A module without FSDP2's hooks: they would gather for each chunk, and processes have their own."""
    return module.forward if isinstance(module, FSDPModule) else module


class _TokenLosses(torch.autograd.Function):
    """Saves each token's gradient with respect to its hidden state; what arrives scales it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, others: Tensor, head: Head, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradients = torch.empty_like(hidden) if wanted else None
        most = max(1, CHUNK_BYTES // (4 * head.vocabulary))
        chunks = max(1, math.ceil(len(hidden) / most))
        # Equal chunks leave no short last one.
        rows = max(1, math.ceil(len(hidden) / chunks))
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            part = hidden[chunk].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head.logits(part)
            # A product needs nothing of its output; what a model does after it (soft-capping) may, and what
            # tensor parallelism gathers is a view.
            own = head.is_projection and not logits._is_view()
            slopes = logits.detach() if own else logits.detach().clone()
            losses[chunk] = loss(slopes, others[chunk])
            if gradients is not None:
                (gradients[chunk],) = torch.autograd.grad(logits, part, slopes)
        ctx.save_for_backward(hidden, gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, None, None, None]:
        hidden, gradients = ctx.saved_tensors
        with torch.no_grad():
            scaled = (gradients * weights[:, None]).to(gradients.dtype)
        return final("the head's token losses", scaled, (weights, hidden)), None, None, None
