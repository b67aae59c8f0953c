"""Files and folders that are either whole or not there."""

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]


def write_atomically(path: PathLike, data: bytes, private: bool = False) -> None:
    """Write ``data`` to ``path`` through a temporary file in the same folder.

    Whatever happens, ``path`` holds either its earlier content or all of ``data``.

    Args:
        private: its owner alone may read it.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private.
        if not private:
            os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: PathLike, value: Any) -> None:
    """Write JSON values to ``path``, whole or not at all; floats that are not finite become null."""
    write_atomically(path, (json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n").encode())


def hash_file(path: PathLike) -> str:
    """The SHA-256 of a file of any size."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def without_nan(value: Any) -> Any:
    """``value`` with None in the place of floats that are not finite: JSON has none of these."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def made_folder(folder: PathLike) -> Iterator[Path]:
    """Context with a folder, which is made if missing, with its parents; an error removes those left empty.

    Raises:
        OSError: the folder cannot be made.
    """
    made: list[Path] = []
    try:
        for place in [*reversed(Path(folder).parents), Path(folder)]:
            if not place.is_dir():
                place.mkdir(exist_ok=True)
                made.append(place)
        yield Path(folder)
    except BaseException:
        _remove_empty(made)
        raise


def check_writable(folder: PathLike) -> None:
    """Raise OSError unless files can be written into ``folder``, which need not exist."""
    made = [place for place in (Path(folder), *Path(folder).parents) if not place.exists()]
    try:
        with made_folder(folder), tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        _remove_empty(made[::-1])


def _remove_empty(folders: list[Path]) -> None:
    """Remove those folders that are empty, of which each is in the one before it."""
    for folder in reversed(folders):
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def new_folder(path: PathLike) -> Iterator[Path]:
    """Fill a hidden folder next to ``path``, which is renamed to ``path`` at the end of the context.

    An exception removes the hidden folder. A kill leaves it behind, and the next call for the same ``path``
    removes it: its owner locks it, and a lock ends with its process. Where the file system has no locks, it
    stays, named ``.NAME.????????.tmp``.

    Args:
        path: the new folder: one that does not exist or is empty. Missing parents are made.

    Yields:
        The hidden folder.

    Raises:
        FileExistsError: ``path`` exists and is not an empty folder, at the start or by the end.
        ValueError: ``path`` is a link, a mount, or the current folder.
        BlockingIOError: another process is filling ``path``.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    refuse_taken(path)
    with _hidden_folder(path) as temporary:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        refuse_taken(path)
        # Should something be written to path at this very moment, the system refuses to replace it.
        os.replace(temporary, path)


@contextmanager
def new_file(path: PathLike) -> Iterator[Path]:
    """Write a file in a hidden folder next to ``path``; it is renamed to ``path`` at the end of the context.

    What becomes of the hidden folder is as of ``new_folder``.

    Args:
        path: the new file, which does not exist. Missing parents are made.

    Yields:
        The path to write to.

    Raises:
        FileExistsError: ``path`` exists, at the start or by the end.
        BlockingIOError: another process is writing ``path``.
        OSError: the file cannot be written.
    """
    path = Path(path)
    refuse_existing(path)
    with _hidden_folder(path) as temporary:
        yield temporary / path.name
        refuse_existing(path)
        os.replace(temporary / path.name, path)
        shutil.rmtree(temporary)


@contextmanager
def _hidden_folder(path: Path) -> Iterator[Path]:
    """Context with a locked folder next to ``path``; an exception removes it."""
    with made_folder(path.parent):
        _remove_abandoned(path)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        with _locked(temporary):
            try:
                yield temporary
            except BaseException:
                shutil.rmtree(temporary)
                raise


def refuse_existing(path: Path) -> None:
    """Raise FileExistsError if ``path`` exists."""
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists; name another file or remove it")


def refuse_taken(path: Path) -> None:
    """Raise FileExistsError unless ``path`` does not exist or is an empty folder; both can be renamed to.

    Raises:
        ValueError: nothing can be renamed to ``path``: it is a link, a mount, or the current folder.
    """
    if path.is_symlink() or os.path.ismount(path) or path.resolve() == Path.cwd():
        raise ValueError(
            f"{path} must be a new folder, or an empty one that can be replaced: a link, a mount and the "
            "current folder cannot be"
        )
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder; name another one or remove it")


def _remove_abandoned(path: Path) -> None:
    """Remove the hidden folders for ``path`` whose processes were killed."""
    names = re.compile(rf"\.{re.escape(path.name)}\.\w{{8}}\.tmp")
    for folder in [entry for entry in path.parent.iterdir() if names.fullmatch(entry.name)]:
        try:
            descriptor = _lock(folder)
        except BlockingIOError:
            raise BlockingIOError(f"another process is writing {path}, in {folder}") from None
        except OSError:
            continue  # It is gone by now, is not ours, or the file system has no locks.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Context in which no other process takes ``folder`` for abandoned."""
    try:
        descriptor = _lock(folder)
    except (BlockingIOError, FileNotFoundError):
        raise BlockingIOError(f"another process has just taken {folder} for its own") from None
    except OSError:
        yield  # Without locks nobody takes a folder for abandoned.
        return
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def changing_folder(folder: PathLike) -> Iterator[None]:
    """Context in which no other process is in this context for the same folder; waits until it is free.

    Raises:
        OSError: there is no such folder, or there are no locks.
    """
    descriptor = _lock(Path(folder), wait=True)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path, wait: bool = False) -> int:
    """Lock a folder for as long as the returned descriptor is open.

    Raises:
        BlockingIOError: another process has the lock, and there is no ``wait``.
        OSError: there is no such folder, or there are no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
