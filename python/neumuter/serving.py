"""Many mute sets on one live model: another one for each request of a batch."""

import contextlib
import contextvars
import functools
import threading

import torch

from neumuter.families import find_ffns
from neumuter.ffn import CHILD, Gates, Installed, refuse_wrapped
from neumuter.muting import fitting_ffns, loaded
from neumuter_kernels import mute_

GROWTH = 1.25  # of the room for sets, where it is used up
CACHED = 8  # numbers of tokens whose row ids a batch keeps


class MuteBank:
    """Mute sets by name on a live model, any number of them, and which one each row of a batch uses.

    ``model``: a causal language model without experts, neither attached nor muted. Without a set it stays
    untouched, bit for bit; with one, only the muted neurons are touched, at the down projections' inputs, so
    whatever computes these may be quantised or foreign. Sets come and go while it serves; a batch keeps to
    those that were there when it began. Each device of the model holds 8 bytes per muted neuron and 8 per
    layer of a set. ``sets``, ``neurons``: how many to make room for at once, lest tensors move later (a
    captured CUDA graph reads them where they were).

        bank = MuteBank(model)
        bank.add("alice", "alice.safetensors")
        model.generate(**batch, mute_sets=["alice", None, "alice"])  # a name or None for each row
        with bank.using(["alice", None]):
            model(**batch)

    A row's output does not depend, bit for bit, on the sets of the other rows. For inference: without
    gradients, and a graph break in torch.compile. As a context manager it undoes itself at the end.

    Raises ValueError for a model with experts or with sharded neurons, and RuntimeError for one that is
    attached or muted.
    """

    def __init__(self, model, sets=0, neurons=0):
        refuse_wrapped(model)
        ffns = find_ffns(model)
        for ffn in ffns:
            if not ffn.layout or ffn.mesh is not None:
                kind = "sharded" if ffn.layout else "of experts"
                raise ValueError(f"{ffn.path} is {kind}: a MuteBank needs whole, dense FFNs")
        self.model, self._lock = model, threading.Lock()
        self._paths = [ffn.path for ffn in ffns]
        self._pool = _Pool(len(ffns), {ffn.device for ffn in ffns}, sets, neurons)
        self._rows = contextvars.ContextVar("rows", default=None)
        self._installed = Installed(
            [_BankGates(ffn, number, self._rows) for number, ffn in enumerate(ffns)],
            [ffn.down for ffn in ffns],
        )
        self._former = vars(model).get("generate")
        model.generate = functools.partial(_generate, self, model.generate)

    @property
    def names(self):
        """The names of the sets, in the order in which they were added."""
        return tuple(self._pool.sets)

    @property
    def bytes(self):
        """What the sets take on each device, with the room for more."""
        return self._pool.bytes

    def add(self, name, mutes):
        """Add a ``MuteSet``, or the mute file at that path, as ``name``, a str.

        Raises MuteMismatchError if it was made for another model, MuteFileError for a bad file, ValueError if
        there is a set of that name.
        """
        if not isinstance(name, str):
            raise ValueError(f"name must be a str, got {name!r}")
        mutes = loaded(mutes)
        with self.using(None):
            fitting_ffns(self.model, mutes)
        with self._lock:
            if name in self._pool.sets:
                raise ValueError(f"there is a mute set {name!r} already: remove it first")
            self._pool.add(name, [mutes.layers.get(path) for path in self._paths])

    def remove(self, name):
        """Forget a set. Raises KeyError if there is none of that name."""
        with self._lock:
            self._known([name])
            del self._pool.sets[name]

    @contextlib.contextmanager
    def using(self, names):
        """Context: row i of a batch uses the set ``names[i]``, None: none; one str or None: for all rows.

        Rows that generation makes of one (beams, several sequences) use its set. Contexts nest, and every
        thread has its own. Raises KeyError for an unknown name; a forward pass raises ValueError if its rows
        are no multiple of the names.
        """
        names = [names] if names is None or isinstance(names, str) else list(names)
        with self._lock:
            rows = self._known(names)
            tensors = self._pool.tensors
        chosen = _Rows(rows, tensors) if any(row >= 0 for row in rows) else None
        token = self._rows.set(chosen)
        try:
            yield self
        finally:
            self._rows.reset(token)

    def _known(self, names):
        """The pool's rows of ``names``, −1 for None."""
        for name in names:
            if name is not None and name not in self._pool.sets:
                listed = ", ".join(list(self._pool.sets)[:8]) or "none"
                raise KeyError(f"there is no mute set {name!r}; there are: {listed}")
        return [-1 if name is None else self._pool.sets[name][0] for name in names]

    def undo(self):
        """Put the very original modules and ``generate`` back. Harmless when called again."""
        self._installed.remove()
        if self._former is not None:
            self.model.generate = self._former
        else:
            vars(self.model).pop("generate", None)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.undo()


def _generate(bank, generate, *arguments, **options):
    if "mute_sets" not in options:
        return generate(*arguments, **options)
    with bank.using(options.pop("mute_sets")):
        return generate(*arguments, **options)


class _BankGates(Gates):
    """At a down projection: mutes its input by the rows that are in force."""

    def __init__(self, ffn, number, rows):
        super().__init__(ffn, "down")
        self.number, self.rows = number, rows

    def install(self, module):
        super().install(module)
        module.forward = functools.partial(_muted, module)


def _muted(down, hidden, *arguments, **options):
    gates = getattr(down, CHILD)
    if (rows := gates.rows.get()) is not None:
        rows.mute_(hidden, gates.number)
    return gates.unmasked(down, hidden, *arguments, **options)


class _Rows:
    """The sets of the rows of one batch, in the pool's tensors as they were when it began."""

    def __init__(self, rows, tensors):
        self.rows, self.tensors = torch.tensor(rows), tensors
        self._ids = {}

    def mute_(self, hidden, layer):
        ids = self._of_tokens(hidden.shape[:-1].numel(), hidden.device)
        mute_(hidden, *self.tensors[hidden.device], ids, layer)

    def _of_tokens(self, tokens, device):
        """The set of each token, int64 [tokens]: made in the first layer, for all."""
        ids = self._ids.get((tokens, device))
        if ids is None:
            each, rest = divmod(tokens, len(self.rows))
            if rest:
                raise ValueError(
                    f"{tokens} tokens cannot belong to {len(self.rows)} rows: one mute set each?"
                )
            if len(self._ids) >= CACHED:
                self._ids.clear()
            ids = self._ids[tokens, device] = self.rows.repeat_interleave(each).to(device)
        return ids


class _Pool:
    """Sets one after another, on each device: (indptr int64 [S, L + 1], indices int32 [N], gains [N]).

    What a batch may be reading is never written: new sets are appended, and where the room ends, those that
    are left move to new tensors.
    """

    def __init__(self, layers, devices, sets, neurons):
        self.layers, self.devices = layers, devices
        self.sets = {}  # name: (row, first slot, behind the last one)
        self.tensors = {device: self._room(device, sets, neurons) for device in devices}
        self.row, self.end = 0, 0  # behind the last set

    @property
    def bytes(self):
        return sum(x.numel() * x.element_size() for x in next(iter(self.tensors.values())))

    def _room(self, device, sets, neurons):
        indptr = torch.zeros(sets, self.layers + 1, dtype=torch.int64, device=device)
        indices = torch.zeros(neurons, dtype=torch.int32, device=device)
        return indptr, indices, torch.zeros(neurons, device=device)

    def add(self, name, layers):
        """``layers``: a ``MutedLayer`` or None for each."""
        muted = [layer for layer in layers if layer is not None]
        counts = torch.tensor([0, *(0 if layer is None else len(layer.indices) for layer in layers)])
        indices = torch.cat([layer.indices for layer in muted])
        gains = torch.cat([layer.gains for layer in muted])
        sets, neurons = (len(x) for x in next(iter(self.tensors.values()))[:2])
        if self.row == sets or self.end + len(indices) > neurons:
            self._move(len(indices))
        self._append(name, counts.cumsum(0), indices, gains, self.tensors)

    def _append(self, name, indptr, indices, gains, tensors):
        stop = self.end + len(indices)
        for room in tensors.values():
            room[0][self.row] = (indptr + self.end).to(room[0].device)
            room[1][self.end : stop] = indices.to(room[1].device)
            room[2][self.end : stop] = gains.to(room[2].device)
        self.sets[name] = self.row, self.end, stop
        self.row, self.end = self.row + 1, stop

    def _move(self, more):
        """Move to new tensors, without sets that are gone, with room for ``more`` neurons and then some."""
        live = sum(stop - start for _, start, stop in self.sets.values())
        sets, neurons = int(GROWTH * (len(self.sets) + 1)) + 1, int(GROWTH * (live + more))
        indptr, indices, gains = next(iter(self.tensors.values()))
        tensors = {device: self._room(device, sets, neurons) for device in self.devices}
        self.row, self.end = 0, 0
        for name, (row, start, stop) in list(self.sets.items()):
            self._append(name, indptr[row] - start, indices[start:stop], gains[start:stop], tensors)
        self.tensors = tensors
