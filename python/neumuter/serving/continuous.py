"""A mute set for each request of transformers' continuous batching, which packs many requests into one row.

It computes in a thread of its own. There, before each step, its requests tell whose each token is.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from neumuter.models.devices import move
from neumuter.serving.pool import Tensors
from neumuter_kernels import mute_

# The methods of transformers' models that start it.
STARTS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def has_hooks() -> bool:
    """Whether the installed transformers has what a set for each request needs."""
    try:
        from transformers.generation.continuous_batching import ContinuousBatchingManager
        from transformers.generation.continuous_batching.requests import FutureRequestState
    except ImportError:
        return False
    methods = all(
        hasattr(ContinuousBatchingManager, name)
        for name in ("_generation_step", "add_request", "add_requests")
    )
    return methods and all(hasattr(FutureRequestState, name) for name in ("state", "query_length"))


class Row(Protocol):
    """The set of one request: its row, [1], in the pool's tensors as they were when the request came."""

    rows: Tensor
    tensors: Tensors


class TokenRows:
    """The sets of the tokens of a packed row.

    Args:
        sets: of each request.
        counts: how many tokens each request has.

    Attributes:
        touched: whether any request has a set.
        tokens: the number of all tokens.
    """

    def __init__(self, sets: Sequence[Row], counts: Sequence[int]) -> None:
        each = torch.cat([one.rows for one in sets]).repeat_interleave(torch.tensor(counts))
        self.tokens, self.touched = len(each), bool((each >= 0).any())
        # Requests that came before the pool moved read its former tensors.
        pools = {id(one.tensors): one.tensors for one in sets}
        which = torch.tensor([list(pools).index(id(one.tensors)) for one in sets])
        which = which.repeat_interleave(torch.tensor(counts))
        self._parts = [
            (tensors[device], device, move(each.where(which == number, -1), device))
            for number, tensors in enumerate(pools.values())
            for device in tensors
        ]

    def mute(self, hidden: Tensor, number: int) -> Tensor:
        """Mute the activations [1, T, F] of one layer, out of place."""
        hidden = hidden.clone()
        for tensors, device, ids in self._parts:
            if device == hidden.device:
                mute_(hidden, *tensors, ids, number)
        return hidden


class Serving:
    """What ``MuteBank`` lends its managers: how to find sets, and how to put rows in force."""

    def __init__(
        self,
        required: bool,
        find: Callable[[str | None], Row],
        activate: Callable[[TokenRows], contextlib.AbstractContextManager[None]],
        is_using: Callable[[], bool],
    ) -> None:
        self.required, self.find, self.activate, self.is_using = required, find, activate, is_using
        self.is_over = False
        self.batch: ContextVar[list[Row] | None] = ContextVar("batch", default=None)

    def find_all(self, count: int, options: dict[str, Any]) -> list[Row]:
        """Take ``mute_sets`` from ``options``: a name or None for each of ``count`` requests, or for all."""
        names = self.given("mute_sets", options)
        names = [names] * count if names is None or isinstance(names, str) else list(names)
        if len(names) != count:
            raise ValueError(
                f"mute_sets must be a name or None for each of {count} requests, got {len(names)}"
            )
        return [self.find(name) for name in names]

    def given(self, option: str, options: dict[str, Any]) -> Any:
        if option in options:
            return options.pop(option)
        if self.required or self.is_using():
            raise RuntimeError(
                "continuous batching computes in a thread of its own, where using() does not hold: give "
                f"{option}=, a name or None for each request"
            )
        return None


def generate_batch(
    serving: Serving, generate: Callable[..., Any], inputs: Any, *arguments: Any, **options: Any
) -> Any:
    """Run transformers' ``generate_batch`` with ``mute_sets``."""
    # It only logs what fails inside.
    token = serving.batch.set(serving.find_all(len(inputs), options))
    try:
        return generate(inputs, *arguments, **options)
    finally:
        serving.batch.reset(token)


def init_batching(serving: Serving, init: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run transformers' ``init_continuous_batching``, and let the manager take a set for each request.

    Raises:
        RuntimeError: the manager is older than the bank, or would compile or capture its steps.
    """
    manager = init(*arguments, **options)
    own = getattr(vars(manager).get("_generation_step"), "__self__", None)
    if isinstance(own, _Requests) and own.serving is serving:
        return manager
    if manager.batch_processor is not None or manager.is_running() or own is not None:
        raise RuntimeError(
            "this continuous batching manager was made before the MuteBank, and its cache holds prefixes of "
            "other sets: call model.destroy_cached_continuous_batching_manager() first"
        )
    config = copy.copy(manager.continuous_batching_config)
    compiled = config.varlen_compile_config is not None or config.decode_compile_config is not None
    if config.use_async_batching or any(config.cuda_graph_booleans) or compiled:
        raise RuntimeError(
            "a MuteBank cannot serve steps that are captured, compiled or overlapped: give ContinuousBatching"
            "Config(use_cuda_graph=False, use_async_batching=False, default_compile_level=0)"
        )
    # Two requests with the same prefix and other sets have other keys and values.
    config.allow_block_sharing = manager._use_prefix_sharing = False
    manager.continuous_batching_config = config
    requests = _Requests(serving, manager)
    manager.add_request, manager.add_requests = requests.add, requests.add_all
    manager._generation_step = requests.step
    return manager


class _Requests:
    """The sets of the requests of one manager, by request id."""

    def __init__(self, serving: Serving, manager: Any) -> None:
        self.serving, self.manager = serving, manager
        self.add_request, self.generate = manager.add_request, manager._generation_step
        self.rows: dict[str, Row] = {}
        # Those that were in a batch: once the scheduler has them no more, they are over.
        self.begun: set[str] = set()
        self.numbers = itertools.count()

    def add(self, input_ids: Any, request_id: str | None = None, *rest: Any, **options: Any) -> Any:
        """Do as transformers' ``add_request``, with ``mute_set``: a name or None."""
        return self._add(
            self.serving.find(self.serving.given("mute_set", options)),
            input_ids,
            request_id,
            *rest,
            **options,
        )

    def add_all(
        self, inputs: Any, max_new_tokens: int | None = None, *rest: Any, **options: Any
    ) -> list[Any]:
        """Do as transformers' ``add_requests``, with ``mute_sets``: a name or None for each, or for all."""
        rows = self.serving.batch.get() or self.serving.find_all(len(inputs), options)
        return [
            self._add(row, one, None, max_new_tokens, *rest, **options)
            for row, one in zip(rows, inputs, strict=True)
        ]

    def _add(self, row: Row, input_ids: Any, request_id: str | None, *rest: Any, **options: Any) -> Any:
        name = f"req_{next(self.numbers)}" if request_id is None else request_id
        if name in self.rows and not self._is_over(name):
            raise ValueError(f"there is a request {name!r} already")
        # Transformers makes the further sequences of a request into requests of their own.
        names = [name, *(f"{name}__child#{i}" for i in range(self.manager.num_return_sequences - 1))]
        self.begun.difference_update(names)
        # The thread that computes may take the request at once.
        self.rows.update(dict.fromkeys(names, row))
        added = None
        try:
            added = self.add_request(input_ids, name, *rest, **options)
        finally:
            if added is None:
                for each in names:
                    self.rows.pop(each, None)
        return added

    def _is_over(self, name: str) -> bool:
        scheduler = self.manager.batch_processor.scheduler
        return (
            name in self.begun
            and name not in scheduler.active_requests
            and name not in scheduler.waiting_requests
        )

    def step(self) -> None:
        """Compute a step, in the thread that does so, with the sets of its requests in force."""
        if self.serving.is_over:
            raise RuntimeError(
                "the MuteBank of this continuous batching manager was undone: make a new manager"
            )
        for name in [name for name in self.begun if self._is_over(name)]:
            self.begun.discard(name)
            self.rows.pop(name, None)
        batch = self.manager.batch_processor.inputs_and_outputs.requests_in_batch
        names = [future.state.request_id for future in batch]
        self.begun.update(names)
        counts = [future.query_length for future in batch]
        with self.serving.activate(TokenRows([self.rows[name] for name in names], counts)):
            self.generate()
