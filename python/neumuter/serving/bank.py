"""Many mute sets on one live model: another one for each request of a batch."""

import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from neumuter.models.devices import move
from neumuter.models.families import decoder_of, find_ffns, unwrapped
from neumuter.models.ffn import FFN
from neumuter.models.hooks import Gates, forward_with_gates
from neumuter.models.installed import Installed, refuse_wrapped
from neumuter.models.mask import Mask, masked_act_of
from neumuter.mutes.matching import fitting_ffns
from neumuter.mutes.mute_set import MuteSource, load_mutes
from neumuter.serving.continuous import STARTS, Serving, TokenRows, generate_batch, has_hooks, init_batching
from neumuter.serving.live import FEW, scale_neurons
from neumuter.serving.pool import Pool, Tensors
from neumuter_kernels import mute_


class MuteBank:
    """Mute sets by name on a live model, any number of them, and which one each row of a batch uses.

    A row without a set is computed as by the untouched model, bit for bit. With one, only the muted neurons
    change, at the down projections' inputs, so whatever computes these may be quantised or foreign. Sets
    come and go while the model serves; a batch keeps to those that were there when it began. Each device of
    the model holds 8 bytes per muted neuron and 4 per layer of a set, and a quarter more as room, and for
    each thread that serves 4 bytes per neuron and row of its batch::

        bank = MuteBank(model)
        bank.add("alice", "alice.safetensors")
        model.generate(**batch, mute_sets=["alice", None, "alice"])  # a name or None for each row
        with torch.no_grad(), bank.using(["alice", None]):
            model(**batch)

    A row's output does not depend, bit for bit, on the sets of the other rows. Rows are those of the batch:
    packed sequences are refused. Continuous batching, which packs requests and computes in a thread of its
    own, takes a set for each request; prefixes are then not shared. Where the installed transformers lacks
    what this needs, it is refused::

        model.generate_batch(prompts, mute_sets=["alice", None, "bob"])  # a name or None for each prompt
        manager = model.init_continuous_batching()
        manager.add_request(ids, mute_set="alice")

    A CUDA graph of the model serves the sets of the next batch as well: capture it in ``using``, after a
    forward pass of the same number of rows there, and replay it in ``using`` of the thread that captured it.
    Where the rows do not fit, or outside of ``using``, a replay gives NaN (unmuted, without ``required``).
    Keep the bank as long as the graph.

    For inference: without gradients, and a graph break in torch.compile. A model with a bank cannot be
    pickled; copies of it share its contexts. As a context manager it undoes itself at the end. Under tensor
    parallelism each process holds the neurons that it computes, and all must add the same sets.

    Args:
        model: a causal language model without experts, neither attached nor muted. It runs once, to prove
            that masks reach its output.
        required: a forward pass outside of ``using`` (and of ``generate`` with mute_sets) raises
            RuntimeError, so that no request is served unmuted by mistake; ``using(None)`` says that none is
            wanted. Contexts hold in the thread that opened them; a server that computes in a thread of its
            own must open them there. False: such passes run unmuted.

    Raises:
        ValueError: the model has experts, or its down projections are not called as modules, once each.
        RuntimeError: the model is attached or muted.
    """

    def __init__(self, model: nn.Module, required: bool = True) -> None:
        refuse_wrapped(model)
        ffns = find_ffns(model)
        if experts := [ffn.path for ffn in ffns if not ffn.is_dense]:
            raise ValueError(f"{experts[0]} is of experts: a MuteBank needs dense FFNs")
        self.model, self._lock = model, threading.Lock()
        self._inner = unwrapped(model)
        self._paths = [ffn.path for ffn in ffns]
        devices = [_indexed(ffn.device) for ffn in ffns]
        self._current = _Current(required)
        gates = [_BankGates(ffn, number, self._current) for number, ffn in enumerate(ffns)]
        self._installed = Installed(model, gates, ffns)
        self._pool = Pool([f.own_neurons(g.probed) for f, g in zip(ffns, gates, strict=True)], set(devices))
        self._current.layers = list(zip(devices, self._pool.widths, strict=True))
        for one in gates:
            if one.calls > 1:
                self._installed.remove()
                raise ValueError(
                    f"the down projection of {one.path} was called {one.calls} times in a forward pass: a "
                    "MuteBank needs models that call it once; use neumuter.mute or fold"
                )
        self._hook = decoder_of(model).register_forward_pre_hook(self._current.begin, with_kwargs=True)
        self._former: dict[str, Any] = {}
        self._continuous = Serving(
            required, lambda name: self._rows([name]), self._current.activate, self._current.is_open
        )
        ours: dict[str, Callable[..., Any]] = {"generate": _generate} | dict.fromkeys(STARTS, _refuse_packing)
        if has_hooks():
            ours |= {"generate_batch": _generate_batch, "init_continuous_batching": _init_batching}
            # It makes its manager by the other one.
            del ours["continuous_batching_context_manager"]
        for name, function in ours.items():
            if (method := getattr(self._inner, name, None)) is not None:
                self._former[name] = vars(self._inner).get(name)
                setattr(self._inner, name, functools.partial(function, self, method))

    def __repr__(self) -> str:
        return f"MuteBank({type(self._inner).__name__}, {len(self.names)} mute sets, {self.bytes} bytes)"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sets, in the order in which they were added."""
        return tuple(self._pool.sets)

    @property
    def bytes(self) -> int:
        """The bytes that the sets take on each device, with the room for more."""
        return self._pool.bytes

    def add(self, name: str, mutes: MuteSource) -> None:
        """Add a ``MuteSet``, or the mute file at that path, as ``name``.

        Raises:
            MuteMismatchError: it was made for another model.
            MuteFileError: the file is bad.
            ValueError: ``name`` is not a str; there is a set of that name; or the sets would have 2^31 muted
                neurons or more.
        """
        if not isinstance(name, str):
            raise ValueError(f"name must be a str, got {name!r}")
        self._refuse_taken(name)
        mutes = load_mutes(mutes)
        with self.using(None):
            fitting_ffns(self.model, mutes)
        with self._lock:
            self._refuse_taken(name)
            self._pool.add(name, [mutes.layers.get(path) for path in self._paths])

    def _refuse_taken(self, name: str) -> None:
        if name in self._pool.sets:
            raise ValueError(f"there is a mute set {name!r} already: remove it first")

    def remove(self, name: str) -> None:
        """Remove a set.

        Raises:
            KeyError: there is none of that name.
        """
        with self._lock:
            self._find_rows([name])
            del self._pool.sets[name]

    @contextlib.contextmanager
    def using(self, names: str | Sequence[str | None] | None) -> "Iterator[MuteBank]":
        """Context in which the rows of a batch use these sets.

        Rows that generation makes of one (beams, several sequences) use its set. Contexts nest, and hold in
        the thread that opened them alone.

        Args:
            names: the name of a set, or None for none, for each row; one str or None is for all rows.

        Raises:
            KeyError: there is no set of that name.
            ValueError: the list is empty; or in a forward pass, its rows are no multiple of the names.
            RuntimeError: contexts do not end in the order, or not in the thread, in which they were opened.
        """
        names = [names] if names is None or isinstance(names, str) else list(names)
        if not names:
            raise ValueError("names must be a name or None for each row of the batch, got an empty list")
        with self._current.activate(self._rows(names)):
            yield self

    def _rows(self, names: Sequence[str | None]) -> "_Rows":
        """Find the sets of these names as they are now."""
        with self._lock:
            return _Rows(self._find_rows(names), self._pool.tensors)

    def _find_rows(self, names: Iterable[str | None]) -> list[int]:
        """Find the pool's rows of ``names``, −1 for None."""
        for name in names:
            if name is not None and name not in self._pool.sets:
                listed = ", ".join(list(self._pool.sets)[:8]) or "none"
                raise KeyError(f"there is no mute set {name!r}; there are: {listed}")
        return [-1 if name is None else self._pool.sets[name][0] for name in names]

    def undo(self) -> None:
        """Put the very original modules and ``generate`` back. Harmless when called again.

        Raises:
            RuntimeError: something was put around an FFN since; nothing is changed.
        """
        self._installed.remove()
        self._hook.remove()
        for name, former in self._former.items():
            vars(self._inner).pop(name, None)
            if former is not None:
                setattr(self._inner, name, former)
        self._former = {}
        self._continuous.is_over = True

    def __enter__(self) -> "MuteBank":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __deepcopy__(self, memo: dict[int, Any]) -> "MuteBank":
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model with a MuteBank cannot be pickled: call its undo() first")


def _generate(bank: MuteBank, generate: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    if "mute_sets" not in options:
        return generate(*arguments, **options)
    with bank.using(options.pop("mute_sets")):
        return generate(*arguments, **options)


def _generate_batch(bank: MuteBank, generate: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return generate_batch(bank._continuous, generate, *arguments, **options)


def _init_batching(bank: MuteBank, init: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return init_batching(bank._continuous, init, *arguments, **options)


def _refuse_packing(*arguments: Any, **options: Any) -> NoReturn:
    raise RuntimeError(
        "continuous batching puts many requests into one row, and a MuteBank does not know how the installed "
        "transformers does it: use generate(mute_sets=...), or undo() the bank and serve one mute set with "
        "neumuter.mute or fold"
    )


def _indexed(device: torch.device) -> torch.device:
    """Name a device as its tensors do: "cuda:0" for "cuda"."""
    return torch.empty(0, device=device).device


class _Current:
    """Which rows are in force, in this thread, and the buffers of their gains."""

    def __init__(self, required: bool) -> None:
        self.required = required
        self.layers: Sequence[tuple[torch.device, int]] = []
        self.variable: contextvars.ContextVar[_Rows | TokenRows | None] = contextvars.ContextVar(
            "rows", default=None
        )
        self.seat = _Seat()

    def is_open(self) -> bool:
        """Whether this thread is in ``using``."""
        return self.variable.get() is not None

    @contextlib.contextmanager
    def activate(self, rows: "_Rows | TokenRows") -> Iterator[None]:
        token = self.variable.set(rows)
        try:
            self._rewrite(rows)
            yield
        finally:
            ended = self.variable.get()
            self.variable.reset(token)
            self._rewrite(self.variable.get())
            if ended is not rows:
                raise RuntimeError("contexts of a MuteBank must end in the order in which they were opened")

    def _rewrite(self, rows: "_Rows | TokenRows | None") -> None:
        """Write the gains of ``rows`` where this thread's graphs read them: a replay runs no Python."""
        for batch, buffers in self.seat.by_batch.items():
            if buffers.is_captured and isinstance(rows, _Rows) and batch % len(rows.rows) == 0:
                buffers.write(rows)
            elif buffers.is_captured:
                buffers.clear(torch.nan if self.required else 1.0)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def begin(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Take the number of rows of a forward pass, before it begins, and prepare their gains."""
        rows = self.variable.get()
        given = (options.get("input_ids"), options.get("inputs_embeds"), *arguments)
        batch, tokens = next(x.shape[:2] for x in given if isinstance(x, torch.Tensor))
        if (options.get("cu_seq_lens_q") is not None) != isinstance(rows, TokenRows):
            raise RuntimeError(
                "packed sequences, or continuous batching by a manager that this MuteBank does not know: a "
                "row holds the tokens of several requests, which cannot be told apart"
            )
        if isinstance(rows, TokenRows):
            if (batch, tokens) != (1, rows.tokens):
                raise RuntimeError(
                    f"{rows.tokens} tokens in a row were announced, got {batch} rows of {tokens}"
                )
            return
        if rows is None:
            if self.required:
                raise RuntimeError(
                    "this MuteBank requires a mute set, or None, for every request: use "
                    "generate(mute_sets=...) or bank.using(...) in the thread that computes"
                )
            return
        if batch % len(rows.rows):
            raise ValueError(
                f"a batch of {batch} rows cannot use {len(rows.rows)} mute sets, one for each row"
            )
        by_batch = self.seat.by_batch
        if _is_capturing():
            if batch not in by_batch or by_batch[batch].rows is not rows:
                raise RuntimeError(
                    f"a CUDA graph of {batch} rows cannot be captured yet: first run the model on this "
                    "number of rows, in the same context and thread, where at least one row has a mute set"
                )
            by_batch[batch].is_captured = True
        elif rows.touched:
            if batch not in by_batch:
                for other in [size for size, buffers in by_batch.items() if not buffers.is_captured]:
                    del by_batch[other]
                by_batch[batch] = _Buffers(batch, self.layers)
            by_batch[batch].write(rows)
        self.seat.buffers = by_batch.get(batch)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def scale(self, hidden: Tensor, rows: "_Rows | TokenRows", number: int) -> Tensor:
        """Mute the activations [..., F] of one layer, out of place."""
        if not rows.touched and not _is_capturing():
            return hidden
        if isinstance(rows, TokenRows):
            return rows.mute(hidden, number)
        buffers = self.seat.buffers
        if buffers is None or buffers.rows is not rows:
            raise RuntimeError("a MuteBank mutes whole forward passes of its model, not parts of it")
        return buffers.scale(hidden, number)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Current":
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model with a MuteBank cannot be pickled: call its undo() first")


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class _BankGates(Gates):
    """Mutes the input of a down projection by the rows that are in force."""

    def __init__(self, ffn: FFN, number: int, current: _Current) -> None:
        super().__init__(ffn, "down")
        self.number, self.current = number, current

    def make_forward(self, module: nn.Module) -> Callable[..., Any]:
        return functools.partial(_muted, module, self)


def _muted(down: nn.Module, gates: _BankGates, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
    """Run a muted down projection, with little Python: between layers the caches are cold."""
    if gates.probe is not None:
        return forward_with_gates(down, hidden, *arguments, **options)
    gates.count_call()
    current = gates.current
    if (rows := current.variable.get()) is not None:
        buffers = None if torch.compiler.is_compiling() else current.seat.buffers
        gains = buffers.shaped.get(gates.number) if buffers and buffers.rows is rows else None
        if (
            gains is not None
            and gains.dim() == hidden.dim()
            and gains.size(0) == hidden.size(0)
            and gains.get_device() == hidden.get_device()
            and hidden.numel() <= FEW
            and not hidden.requires_grad
        ):
            hidden = scale_neurons(hidden, gains)
        else:
            hidden = current.scale(hidden, rows, gates.number)
    return gates.unmasked(down, hidden, *arguments, **options)


class _Rows:
    """The sets of the rows of one batch, in the pool's tensors as they were when it began."""

    def __init__(self, rows: list[int], tensors: Tensors) -> None:
        self.rows, self.tensors = torch.tensor(rows), tensors
        self.touched = any(row >= 0 for row in rows)


class _Seat(threading.local):
    """The buffers of one thread: {rows of a batch: theirs}, and those of the forward pass that it is in."""

    def __init__(self) -> None:
        self.by_batch: dict[int, _Buffers] = {}
        self.buffers: _Buffers | None = None


class _Buffers:
    """The gains of all neurons for the rows of a batch, float32 [B, F] for each layer.

    They stay where they are, so that a captured graph computes with whatever rows were written last.

    Attributes:
        rows: whose gains these are.
        shaped: {number of a layer: its gains, shaped as few activations there need them}. For few, a product
            takes less time than calling a kernel.
    """

    def __init__(self, batch: int, layers: Sequence[tuple[torch.device, int]]) -> None:
        self.gains = [torch.empty(batch, width, device=device) for device, width in layers]
        self.shaped: dict[int, Tensor] = {}
        self.rows: _Rows | None = None
        self.is_captured = False

    def clear(self, value: float) -> None:
        """Overwrite all gains."""
        self.rows = None
        for gains in self.gains:
            gains.fill_(value)

    def write(self, rows: _Rows) -> None:
        """Overwrite the gains with those of ``rows``."""
        if self.rows is rows:
            return
        self.clear(1.0)
        own = rows.rows.repeat_interleave(len(self.gains[0]) // len(rows.rows))
        for device, tensors in rows.tensors.items():
            ids = move(own, device)
            for number, gains in enumerate(self.gains):
                if gains.device == device:
                    mute_(gains, *tensors, ids, number)
            # They may be given back while another stream still reads them.
            if device.type == "cuda":
                for tensor in (*tensors, *self.gains):
                    tensor.record_stream(torch.cuda.current_stream(device))
        self.rows = rows

    def scale(self, hidden: Tensor, number: int) -> Tensor:
        """Multiply activations [..., F] by the gains of their rows, out of place; rounded once."""
        gains = self.gains[number]
        if hidden.requires_grad:
            raise ValueError("hidden requires grad, and a MuteBank has no gradient: use torch.no_grad()")
        if gains.device != hidden.device:
            raise RuntimeError(
                f"the model computes on {hidden.device}, where it was not when its MuteBank was made"
            )
        batch, tokens = len(gains), hidden.shape[:-1].numel()
        if tokens % batch:
            raise ValueError(f"{tokens} tokens cannot be split evenly among the {batch} rows of the batch")
        if hidden.numel() > FEW or hidden.shape[0] != batch:
            return masked_act_of(hidden, "identity", Mask(gains))
        self.shaped[number] = gains.view(batch, *[1] * (hidden.dim() - 2), -1)
        return scale_neurons(hidden, self.shaped[number])
