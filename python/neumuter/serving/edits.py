"""Files copied with some of their bytes changed, and read back: no file is ever in memory as a whole."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

BYTES_PER_COPY = 1 << 22


@dataclass(frozen=True)
class Edit:
    """Bytes ``begin`` to ``end`` of a file, and what becomes of them.

    ``change`` changes them in place. ``is_right`` says of the bytes before and after whether the change is
    the right one, as independently of ``change`` as can be.
    """

    begin: int
    end: int
    change: Callable[[bytearray], object]
    is_right: Callable[[bytearray, bytearray], bool]


def copy_edited(source: Path, target: Path, edits: Iterable[Edit], advance: Callable[[int], object]) -> None:
    """Copy the file ``source`` to ``target`` and to the disk, with ``edits``, which do not overlap.

    Then it is read back: all other bytes must be those of ``source``.

    Args:
        advance: called with the number of bytes as they are written.

    Raises:
        OSError: a file cannot be read or written, or what is read back is not right.
    """
    ordered = sorted(edits, key=lambda edit: edit.begin)
    with open(target, "wb") as file:
        for edit, piece in _pieces(source, ordered):
            if edit:
                edit.change(piece)
            file.write(piece)
            advance(len(piece))
        file.flush()
        os.fsync(file.fileno())
        # What is read back must come from the disk, not from memory.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with open(target, "rb") as copy:
        for edit, before in _pieces(source, ordered):
            after = _read(copy, len(before))
            if not (edit.is_right(before, after) if edit else before == after):
                raise OSError(f"{target} reads back other than it was written; is the disk in order?")


def count_bytes(total: int, callback: Callable[[int, int], object] | None) -> Callable[[int], None]:
    """Make what ``copy_edited`` takes as ``advance``: it calls ``callback(done, total)``, if there is one."""
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if callback:
            callback(done, total)

    return advance


def read(path: Path, begin: int, end: int) -> bytearray:
    """Read bytes ``begin`` to ``end`` of a file."""
    with open(path, "rb") as file:
        file.seek(begin)
        return _read(file, end - begin)


def _pieces(source: Path, edits: Sequence[Edit]) -> Iterator[tuple[Edit | None, bytearray]]:
    """Yield the bytes of a file in order: those of each edit, which is yielded with them, and the others."""
    with open(source, "rb") as file:
        for edit in edits:
            yield from _read_pieces(file, edit.begin - file.tell())
            yield edit, _read(file, edit.end - edit.begin)
        yield from _read_pieces(file, os.fstat(file.fileno()).st_size - file.tell())


def _read_pieces(file: BufferedReader, size: int) -> Iterator[tuple[None, bytearray]]:
    while size:
        piece = _read(file, min(size, BYTES_PER_COPY))
        size -= len(piece)
        yield None, piece


def _read(file: BufferedReader, size: int) -> bytearray:
    data = bytearray(size)
    if file.readinto(data) != size:
        raise OSError(f"{file.name} ends before its header says")
    return data
