"""Windows of more texts than fit into memory: their tokens are in a file that is mapped into it.

The file is our own, and not one of ``datasets``, because that would leave the texts to forget in a cache
folder, needs pyarrow and pandas, and takes half a second and 100 MB to import.
"""

import hashlib
import mmap
import os
import tempfile
from array import array
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from neumuter.types import IGNORED, Batch

# Of a token in the file, int32.
TOKEN_BYTES = 4


class Windows:
    """Windows of texts, such as ``encode`` makes rows of a batch from, each padded when it is asked for.

    Memory holds 16 bytes of each. The tokens are in a temporary file without a name, which nobody else can
    open and which goes with the process; the environment variable TMPDIR says in which folder.

    Args:
        padding: the token id that fills up rows.

    ``width``: tokens of the longest window. ``tokens``: of all.
    """

    def __init__(self, padding: int = 0) -> None:
        self.padding, self.width = padding, 0
        self._file = tempfile.TemporaryFile(buffering=1 << 20)  # noqa: SIM115 (closed with its owner)
        self._ends, self._firsts = array("q", [0]), array("q")
        self._ids: Tensor | None = None

    def add(self, ids: Sequence[int], first: int) -> None:
        """Add a window, whose tokens count from position ``first`` on.

        Raises:
            OSError: the temporary folder is full.
        """
        try:
            self._file.write(array("i", ids).tobytes())
        except OSError as error:
            raise self._explain(error) from None
        self._ends.append(self._ends[-1] + len(ids))
        self._firsts.append(first)
        self.width = max(self.width, len(ids))
        self._ids = None

    def add_rows(self, batch: Batch) -> None:
        """Add the rows of a batch that ``encode`` made."""
        for ids, shown, labels in zip(
            *(batch[key] for key in ("input_ids", "attention_mask", "labels")), strict=True
        ):
            first = int((labels != IGNORED).nonzero()[0])
            self.add(ids[: int(shown.sum())].tolist(), first)

    def __len__(self) -> int:
        return len(self._firsts)

    @property
    def tokens(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        """The token ids of a window, int64 [T], and the position of the first that counts."""
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        return self._map()[self._ends[number] : self._ends[number + 1]].long(), self._firsts[number]

    def count(self, number: int) -> int:
        """Count the tokens of a window that are predicted and count."""
        return self.size(number) - max(1, self._firsts[number])

    def size(self, number: int) -> int:
        """Count the tokens of a window."""
        return self._ends[number + 1] - self._ends[number]

    def rows(self, numbers: Sequence[int]) -> Batch:
        """The windows of these numbers as a batch, padded on the right to the longest of all."""
        found = []
        for number in numbers:
            ids, first = self[number]
            more = (0, self.width - len(ids))
            labels = torch.where(torch.arange(len(ids)) < first, IGNORED, ids)
            shown = torch.ones_like(ids)
            parts = ((ids, self.padding), (shown, 0), (labels, IGNORED))
            found.append([F.pad(part, more, value=value) for part, value in parts])
        columns = [torch.stack(column) for column in zip(*found, strict=True)]
        return dict(zip(("input_ids", "attention_mask", "labels"), columns, strict=True))

    def digest(self) -> str:
        """Hash all windows."""
        found = hashlib.sha256(self._ends.tobytes() + self._firsts.tobytes())
        for part in self._map().split(1 << 20):
            found.update(part.numpy().tobytes())
        return found.hexdigest()

    def _explain(self, error: OSError) -> OSError:
        """The error, with the folder of the file and how much of it was written."""
        written = os.fstat(self._file.fileno()).st_size / 2**20
        return OSError(
            error.errno,
            f"{error.strerror}: the tokens of the texts go into a temporary file, of which {written:.1f} MiB "
            "could be written. The environment variable TMPDIR chooses another folder",
            tempfile.gettempdir(),
        )

    def _map(self) -> Tensor:
        if self._ids is None:
            try:
                self._file.flush()
            except OSError as error:
                raise self._explain(error) from None
            # A mapping that may be written to, which never reaches the file, because torch wants one.
            mapped = mmap.mmap(self._file.fileno(), self.tokens * TOKEN_BYTES, access=mmap.ACCESS_COPY)
            self._ids = torch.frombuffer(mapped, dtype=torch.int32)
        return self._ids
