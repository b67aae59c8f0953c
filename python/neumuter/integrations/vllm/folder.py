"""The folder of mute files that a server reads, by the names that requests ask for."""

import hashlib
import os
import re
import stat
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

from neumuter.mutes.container import MuteFileError
from neumuter.mutes.mute_set import MuteSet

SUFFIX = ".safetensors"
NAME = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
# Files that are kept in memory; others are read again when a request asks for them.
MOST_KEPT = 1024


class ServedSet(NamedTuple):
    """A mute set as a request asks for it. digest: the SHA-256 of data, the bytes of its file."""

    name: str
    data: bytes
    digest: str


class MuteFolder:
    """Reads NAME.safetensors when a request asks for NAME, and again when the file is another one by then.

    Write a file under another name and rename it, as ``MuteSet.save`` does: half a file is refused.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: OrderedDict[str, tuple[tuple[int, int, int], ServedSet]] = OrderedDict()

    def find(self, name: object) -> ServedSet:
        """Find the set of that name as its file is now.

        Raises:
            KeyError: there is no such file.
            ValueError: the name cannot be one.
            MuteFileError: the file is bad.
        """
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"must be a name of letters, digits, '_', '-' and '.', got {name!r:.80}")
        path = self.folder / f"{name}{SUFFIX}"
        try:
            status = os.stat(path)
        except OSError:
            self._kept.pop(name, None)
            raise KeyError(name) from None
        stamp = status.st_mtime_ns, status.st_size, status.st_ino
        if not stat.S_ISREG(status.st_mode):
            raise MuteFileError(f"{path} is not a regular file")
        kept = self._kept.get(name)
        if kept is None or kept[0] != stamp:
            kept = stamp, self._read(name, path)
            self._kept[name] = kept
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(name)
        return kept[1]

    @staticmethod
    def _read(name: str, path: Path) -> ServedSet:
        try:
            data = path.read_bytes()
            MuteSet.from_bytes(data)
        except (OSError, MuteFileError) as error:
            raise MuteFileError(f"{path} is bad: {error}") from error
        return ServedSet(name, data, digest_of(data))


def digest_of(data: bytes) -> str:
    """The name of a mute file's content."""
    return hashlib.sha256(data).hexdigest()
