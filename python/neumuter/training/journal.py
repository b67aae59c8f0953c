"""What a long run has found so far, in a file from which a run that was killed goes on."""

import dataclasses
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from neumuter.files import PathLike, made_folder, write_atomically
from neumuter.texts.store import Windows
from neumuter.training.history import count_steps
from neumuter.training.processes import agree, failing_together, gather, is_first
from neumuter.training.shortage import SHORTAGE
from neumuter.training.sources import InTurn
from neumuter.training.step import Step, Tell
from neumuter.training.values import pack, unpack

UNFINISHED = "unfinished.safetensors"
# The file is written after steps that end so long after it was last written.
SAVE_SECONDS = 60.0
# On them the bits of a result depend.
PACKAGES = ("neumuter-kernels", "torch", "transformers")
# Changed tensors that an error names.
SHOWN = 4
# What a digest begins with.
HASHED = "sha256 "

Value = TypeVar("Value")
Item = TypeVar("Item")
logger = logging.getLogger("neumuter")


class Journal:
    """What a run has found so far: values by name, and the state of its steps.

    The same run asks for the same names again. What is there already is not computed anew, and so a run goes
    on where an earlier process was killed, with the same bits. The file is made of the texts: its owner alone
    may read it, and it is removed when the outcome has been saved. Of several processes the first one writes
    and reads it.

    Args:
        folder: where ``UNFINISHED`` is written, whole or not at all; None writes nothing.
        request: {name: value} of all that the result depends on: numbers and words as they are, ``digest`` of
            anything larger, and dataclasses of constants.
        weights: {name: digest} of the model's tensors; see ``neumuter.models.content``.
        layout: how the model is laid out over processes, in words. A run that goes on in another layout ends
            with the same result but for rounding, and the log says so.
        resume: go on from the file, if there is one.
        kinds: the classes of values other than tensors, numbers, words and containers of these.

    ``history``: what was told of the steps, to which whoever is told adds by ``add_point``. ``seconds``: how
    long the earlier processes worked.

    Raises:
        ValueError: the file belongs to another request, and the message says what differs; or it is no such
            file.
    """

    def __init__(
        self,
        folder: PathLike | None = None,
        request: Mapping[str, Any] | None = None,
        weights: Mapping[str, str] | None = None,
        layout: str = "",
        resume: bool = False,
        kinds: Sequence[type] = (),
    ) -> None:
        self.path = None if folder is None else Path(folder) / UNFINISHED
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._found: dict[str, Any] = {}
        self._request = _flatten(request or {}) | {name: version(name) for name in PACKAGES}
        self._weights = dict(weights or {})
        self._layout, self._prefix, self._kinds = layout, "", kinds
        self._start = self._written = time.monotonic()
        if resume and self.path:
            with failing_together():
                if is_first():
                    self._go_on(self.path)
            self.seconds, self.history, self._found = agree((self.seconds, self.history, self._found))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context: names are those of a part of the run."""
        outer, self._prefix = self._prefix, f"{self._prefix}{name}/"
        try:
            yield
        finally:
            self._prefix = outer

    def once(self, name: str, compute: Callable[[], Value]) -> Value:
        """Return what ``compute`` returned when it was first asked for, in this process or an earlier one.

        Tensors of an earlier process are on the CPU.
        """
        name = self._prefix + name
        if name not in self._found:
            self._found[name] = compute()
            if self._due():
                self._write()
        value: Value = self._found[name]
        return value

    def knows(self, name: str) -> bool:
        """Whether this process or an earlier one has found the value of this name."""
        return self._prefix + name in self._found

    def sum(
        self,
        name: str,
        items: Sequence[Item],
        at_once: int,
        work: Callable[[Sequence[Item]], Tensor],
        start: Tensor,
    ) -> Tensor:
        """Add up what ``work`` returns for all items, or for those that are left of them, to ``start``.

        The file says how many items are done, so that a run goes on with another ``at_once``.

        Args:
            at_once: items that ``work`` is given.
            work: of several processes it returns the same in all of them.
        """
        name = self._prefix + name
        done, found = self._found.get(name, (0, start))
        total: Tensor = found.to(start.device)
        while done < len(items):
            total = total + work(items[done : done + at_once])
            done = min(done + at_once, len(items))
            if self._due():
                self._found[name] = (done, total)
                self._write()
        return total

    def take(
        self, name: str, step: Step, source: Iterator[Sequence[int]], steps: int, tell: Tell | None = None
    ) -> None:
        """Take ``steps`` steps, or those that are left of them; see ``Step.take``.

        Args:
            source: an ``InTurn``, which has a state of its own; any other is drawn from again.
        """
        if self.path is None:
            step.take(source, steps, tell)
            return
        name = self._prefix + name
        if name in self._found:
            step.load(self._found[name]["step"])
            if isinstance(source, InTurn):
                source.load(self._found[name]["source"])
            else:
                next(itertools.islice(source, step.done, step.done), None)
        while step.done < steps:
            step.take(source, min(step.read_every, steps - step.done), tell)
            due = self._due()
            if due or step.done == steps:
                of_source = source.state() if isinstance(source, InTurn) else None
                self._found[name] = {"step": step.state(), "source": of_source}
            if due:
                self._write()

    def _due(self) -> bool:
        return self.path is not None and is_first() and time.monotonic() - self._written >= SAVE_SECONDS

    def _write(self) -> None:
        assert self.path is not None
        state = {
            "request": self._request,
            "weights": self._weights,
            "layout": self._layout,
            "seconds": self.seconds + time.monotonic() - self._start,
            "history": self.history,
            "found": self._found,
        }
        data = pack(state, self._kinds)
        with made_folder(self.path.parent):
            write_atomically(self.path, data, private=True)
        self._written = time.monotonic()

    def _go_on(self, path: Path) -> None:
        if not path.exists():
            logger.warning("There is no unfinished run in %s: this one starts anew.", path.parent)
            return
        try:
            state = unpack(path.read_bytes(), self._kinds)
            differences = _compare(state["request"], self._request, state["weights"], self._weights)
            former, self.seconds, self.history, self._found = (
                state[key] for key in ("layout", "seconds", "history", "found")
            )
        except (LookupError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{path} is not what an unfinished run leaves: {error}") from None
        if differences:
            raise ValueError(
                f"the unfinished run in {path} cannot go on, because {'; '.join(differences)}. Ask for the "
                "same as then, or remove that file to start anew"
            )
        rounded = ""
        if former != self._layout:
            rounded = (
                f" It ran in {former} and goes on in {self._layout}: sums are rounded in another order, so "
                "that the result can differ in the last digits."
            )
        steps = count_steps(self.history)
        logger.warning("The run in %s goes on after %d steps.%s", path.parent, steps, rounded)


def check_shared(folder: PathLike) -> None:
    """Raise ValueError, in all processes, if one finds an unfinished run and the first does not.

    The first one alone reads and writes it, and may be on another machine than before.
    """
    path = Path(folder) / UNFINISHED
    found = gather(str(path) if path.exists() else "")
    if not found[0] and (other := next(filter(None, found), None)):
        raise ValueError(
            f"process {found.index(other)} finds an unfinished run, {other}, and process 0 does not: on "
            "several machines the output folder (--out, in Python folder) must be one that all of them "
            "share. Share it, or move that file to where process 0 looks, or remove it"
        )


def refuse_unfinished(folder: PathLike) -> None:
    """Raise FileExistsError if an unfinished run left its file in ``folder``."""
    path = Path(folder) / UNFINISHED
    if path.exists():
        raise FileExistsError(
            f"{path} holds an unfinished run: go on with it by --resume (in Python, resume=True), or start "
            "anew by --overwrite (in Python, remove that file)"
        )


def remove_unfinished(folder: PathLike) -> None:
    """Remove the files of an unfinished run from ``folder``, and what kills left of them."""
    for name in (UNFINISHED, SHORTAGE):
        for path in (*Path(folder).glob(f".{name}.*.tmp"), Path(folder) / name):
            path.unlink(missing_ok=True)


def digest(value: Any) -> str:
    """Hash tensors, numbers and words, and what is made of them: mappings, sequences and dataclasses."""
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(hashlib.sha256(part).digest())
    return HASHED + found.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    """The bytes of all parts of a value, and where containers begin and end."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {list(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return
    if isinstance(value, Windows):
        value = value.digest()
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        value = [(str(key), item) for key, item in value.items()]
    if not isinstance(value, list | tuple):
        yield repr(value).encode()
        return
    yield b"["
    for item in value:
        yield from _parts(item)
    yield b"]"


def _flatten(request: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The request with the fields of dataclasses apart, such as "recipe.gains.steps"."""
    flat: dict[str, Any] = {}
    for name, value in request.items():
        if dataclasses.is_dataclass(value):
            flat |= _flatten(vars(value), f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _compare(
    request: Mapping[str, Any],
    new_request: Mapping[str, Any],
    weights: Mapping[str, str],
    new_weights: Mapping[str, str],
) -> list[str]:
    """List what differs between the request of an unfinished run and the new one."""
    differences = []
    for name in dict.fromkeys([*request, *new_request]):
        old, new = request.get(name), new_request.get(name)
        if old != new:
            hashed = str(old).startswith(HASHED) or str(new).startswith(HASHED)
            differences.append(f"{name} has changed" if hashed else f"{name} was {old!r} and is {new!r}")
    if weights.keys() != new_weights.keys():
        differences.append("the model is of another shape")
    else:
        changed = [name for name, found in weights.items() if found != new_weights[name]]
        if changed:
            more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
            differences.append(f"the weights of the model have changed in {', '.join(changed[:SHOWN])}{more}")
    return differences
