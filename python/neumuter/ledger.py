"""A ledger of requests to forget: what was asked, what was done, and what came of it.

A folder holds ``ledger.jsonl``, one JSON object a line, and the files of each request. Texts are kept as
keyed hashes alone. Every entry has the SHA-256 of the one before it, of its files and of the key, so whoever
changes, removes or inserts an entry is found out, unless they compute all hashes behind it anew or cut off
all entries behind it. Only a hash that was kept elsewhere shows that: see ``Ledger``.
"""

import hashlib
import hmac
import json
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from neumuter.files import PathLike, changing_folder, hash_file, made_folder, new_folder, write_atomically
from neumuter.mutes.mute_set import MuteSet
from neumuter.outcome import MUTE_FILE, SLOPES_FILE
from neumuter.texts.rows import text_of
from neumuter.types import Text, check_kind, check_texts
from neumuter_kernels.info import version

ENTRIES, KEY, REQUESTS = "ledger.jsonl", "key", "requests"
KEY_BYTES = 32
REPORT = "report.json"
# What a request copies from the folder that unlearn wrote; slopes only if they are there.
COPIED = (MUTE_FILE, REPORT, SLOPES_FILE)
# Of the report of ``unlearn``, what the ledger says itself.
TOLD = (
    "model", "method", "seed", "max_length", "chat", "muted_neurons", "muted_share", "verdict",
    "verdict_sentence", "leaks", "comparisons",
)  # fmt: skip
START = "0" * 64
# Format 1, which no release wrote, had no hash of the key and no windows.
FORMAT = 2


class LedgerError(ValueError):
    """A ledger that was changed, or is none; the message says where."""


@dataclass(frozen=True)
class Fit:
    """A mute set of a request. folder: where its files are. entry: the whole entry that brought it."""

    folder: Path
    entry: dict[str, Any]

    def load_mutes(self) -> MuteSet:
        return MuteSet.load(self.folder / MUTE_FILE)


@dataclass(frozen=True)
class Request:
    """A request of a ledger.

    number: from 1. name: what its owner calls it. texts: the keyed hash of each text. fits: its mute sets,
    that with which it was added first, then those that were fitted anew. undone: whether it was taken back.
    """

    number: int
    name: str
    texts: list[str]
    fits: list[Fit]
    undone: bool

    @property
    def entry(self) -> dict[str, Any]:
        """The whole entry with which the request was added."""
        return self.fits[0].entry

    @property
    def newest(self) -> Fit:
        """The newest of its mute sets."""
        return self.fits[-1]

    @property
    def holds_for_earlier(self) -> bool:
        """Whether its mute sets hold for all earlier requests, too: slopes of these were in the first fit."""
        return "former" in self.fits[0].load_mutes().method


class Ledger:
    """The ledger in a folder, which is checked whenever it is read.

    Args:
        folder: the folder; it is made, with a new key, if it does not exist or is empty, and ``create``.
        head: what ``head`` was at an earlier time, kept elsewhere. The entries up to that one must still be
            there, as they were. None compares with nothing.

    Raises:
        FileNotFoundError: there is no ledger.
        LedgerError: an entry, a file of a request or the key was changed; or no entry has the hash ``head``.
    """

    def __init__(self, folder: PathLike, create: bool = False, head: str | None = None) -> None:
        self.folder = Path(folder)
        if create and not (self.folder / ENTRIES).exists():
            self._create()
        if not (self.folder / ENTRIES).is_file():
            raise FileNotFoundError(f"{self.folder} is not a ledger: it has no {ENTRIES}")
        self._key = _read_key(self.folder / KEY)
        self.entries = self._read()
        if head is not None and head not in (START, *(entry["hash"] for entry in self.entries)):
            raise LedgerError(
                f"no entry of {self.folder / ENTRIES} has the hash {head}: since it was noted, entries were "
                "changed or cut off, and the hashes were computed anew"
            )

    @property
    def head(self) -> str:
        """The hash of the last entry. Keep it elsewhere: it shows if entries were rewritten or cut off."""
        return self.entries[-1]["hash"] if self.entries else START

    def requests(self) -> list[Request]:
        """List all requests, in order."""
        undone = {entry["request"] for entry in self.entries if entry["kind"] == "undo"}
        found: dict[int, Request] = {}
        for entry in self.entries:
            number, kind = entry["number"], entry["kind"]
            fit = Fit(self.folder / REQUESTS / str(number), entry)
            if kind == "request":
                found[number] = Request(number, entry["name"], entry["texts"], [fit], number in undone)
            elif kind == "refit":
                found[entry["request"]].fits.append(fit)
        return list(found.values())

    def request(self, number: int) -> Request:
        """Find a request by its number.

        Raises:
            ValueError: there is none.
        """
        for request in self.requests():
            if request.number == number:
                return request
        known = ", ".join(str(request.number) for request in self.requests()) or "none"
        raise ValueError(f"the ledger has no request {number}; it has: {known}")

    def hash_text(self, text: Text) -> str:
        """Compute the keyed hash of a text, or of that in a row: HMAC-SHA-256 of its JSON."""
        data = json.dumps(text_of(text), ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")
        return hmac.new(self._key, data, hashlib.sha256).hexdigest()

    def add(self, folder: PathLike, texts: Iterable[Text], name: str = "") -> Request:
        """Add a request: the folder that ``unlearn`` wrote, and the texts that it was given.

        Args:
            folder: has the mute file and report.json, which are copied.
            texts: the texts to forget; only their hashes are kept.
            name: what to call the request, such as a ticket.

        Raises:
            FileNotFoundError: ``folder`` lacks the mute file or the report.
            ValueError: the report is of another mute file; there is no text; or ``name`` holds half a
                surrogate pair.
            TypeError: ``texts`` is one text, or the name of a file; or ``name`` is no text.
        """
        check_texts("texts", texts)
        check_kind("name", name, str, "a text")
        # It refuses what could not be written.
        text_of(name)
        hashes = [self.hash_text(text) for text in texts]
        if not hashes:
            raise ValueError("texts holds no text")
        result = read_result(Path(folder))
        with self._changing():
            self._append(kind="request", name=name, texts=hashes, **self._copy(Path(folder), *result))
            return self.request(len(self.entries))

    def add_fit(self, number: int, folder: PathLike) -> Request:
        """Add a mute set that was fitted anew for a request, such as for a new version of the model.

        Args:
            number: of the request.
            folder: has the mute file and report.json, which are copied: what ``neumuter.refit_request`` found
                and ``Outcome.save`` wrote.

        Raises:
            FileNotFoundError: ``folder`` lacks the mute file or the report.
            ValueError: there is no such request, or it is undone; the report is of another mute file.
        """
        result = read_result(Path(folder))
        with self._changing():
            if self.request(number).undone:
                raise ValueError(f"request {number} is undone: it takes no mute set")
            self._append(kind="refit", request=number, **self._copy(Path(folder), *result))
        return self.request(number)

    def undo(self, number: int) -> None:
        """Note that a request was taken back; its entry and its files stay.

        Its slopes, which give away what was to be forgotten, may be deleted from then on.

        Raises:
            ValueError: there is no such request, or it is undone already.
        """
        with self._changing():
            if self.request(number).undone:
                raise ValueError(f"request {number} is undone already")
            self._append(kind="undo", request=number)

    def sort_texts(self, texts: Iterable[Text]) -> tuple[dict[str, Text], dict[str, Text]]:
        """Part the texts of requests that are not undone from all others: {hash: text} of each.

        Raises:
            TypeError: ``texts`` is one text, or the name of a file.
        """
        check_texts("texts", texts)
        wanted = {digest for request in self.requests() if not request.undone for digest in request.texts}
        found, others = dict[str, Text](), dict[str, Text]()
        for text in map(text_of, texts):
            digest = self.hash_text(text)
            (found if digest in wanted else others)[digest] = text
        return found, others

    def _create(self) -> None:
        with made_folder(self.folder) as made, changing_folder(made):
            if (made / ENTRIES).exists():
                return  # Another process has made it meanwhile.
            # A process that was killed here left at most a key, and temporary files.
            left = (f".{KEY}.", f".{ENTRIES}.")
            if any(file.name != KEY and not file.name.startswith(left) for file in made.iterdir()):
                raise FileExistsError(f"{made} is not a ledger, and is not empty; name another folder")
            if (made / KEY).exists():
                _read_key(made / KEY)
            else:
                write_atomically(made / KEY, secrets.token_hex(KEY_BYTES).encode(), private=True)
            write_atomically(made / ENTRIES, b"", private=True)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Context in which nobody else changes the ledger, read anew."""
        with changing_folder(self.folder):
            self.entries = self._read()
            yield

    def _copy(self, folder: Path, mutes: MuteSet, report: dict[str, Any]) -> dict[str, Any]:
        """Copy the files of a mute set for the next entry, and return what the entry says of them."""
        place = self.folder / REQUESTS / str(len(self.entries) + 1)
        # Without an entry it is what a killed process left.
        shutil.rmtree(place, ignore_errors=True)
        files = [file for file in COPIED if file != SLOPES_FILE or (folder / file).exists()]
        with new_folder(place) as made:
            for file in files:
                # Slopes are for their owner alone, as everything in a ledger.
                write_atomically(made / file, (folder / file).read_bytes(), private=True)
        return {
            "files": {file: hash_file(place / file) for file in files},
            "fingerprint": _hash_json(mutes.fingerprint),
            "architecture": mutes.architecture,
            "versions": {
                package: version(package) for package in ("neumuter-kernels", "transformers", "torch")
            },
            "report": {key: report[key] for key in TOLD if key in report},
        }

    def _append(self, **entry: Any) -> None:
        entry = {
            "format": FORMAT,
            "number": len(self.entries) + 1,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **entry,
            "key": _hash_key(self._key),
            "previous": self.head,
        }
        entry["hash"] = _hash_json(entry)
        # In ASCII, because some characters of a name could be taken for the end of a line.
        lines = [json.dumps(line) + "\n" for line in [*self.entries, entry]]
        write_atomically(self.folder / ENTRIES, "".join(lines).encode(), private=True)
        self.entries.append(entry)

    def _read(self) -> list[dict[str, Any]]:
        """Read and check all entries."""
        entries: list[dict[str, Any]] = []
        previous = START
        lines = (self.folder / ENTRIES).read_text("utf-8").removesuffix("\n")
        for number, line in enumerate(lines.split("\n") if lines else [], 1):
            where = f"{self.folder / ENTRIES}, entry {number}"
            try:
                entry = json.loads(line)
                told = entry.pop("hash")
            except (ValueError, KeyError, AttributeError, TypeError):
                raise LedgerError(f"{where} is damaged: it is not an entry of a ledger") from None
            if told != _hash_json(entry):
                raise LedgerError(f"{where} was changed: its hash does not match its content")
            if entry.get("format") != FORMAT:
                raise LedgerError(
                    f"{where} has format {entry.get('format')}; this version reads format {FORMAT}"
                )
            if (entry.get("previous"), entry.get("number")) != (previous, number):
                raise LedgerError(f"{where} does not follow the one before it: entries were removed or added")
            if entry.get("key") != _hash_key(self._key):
                raise LedgerError(f"{self.folder / KEY} was replaced since entry {number} was written")
            previous = told
            entries.append(entry | {"hash": told})
        self._check_files(entries)
        return entries

    def _check_files(self, entries: list[dict[str, Any]]) -> None:
        undone = {entry["request"] for entry in entries if entry["kind"] == "undo"}
        for entry in entries:
            number = entry["number"]
            for file, digest in entry.get("files", {}).items():
                path = self.folder / REQUESTS / str(number) / file
                # Slopes give texts away, so those of a request that was taken back may be deleted.
                if file == SLOPES_FILE and entry.get("request", number) in undone and not path.exists():
                    continue
                if not path.is_file() or hash_file(path) != digest:
                    raise LedgerError(f"{path} was changed or removed since entry {number} was written")


def read_result(folder: Path) -> tuple[MuteSet, dict[str, Any]]:
    """Read the mute set and the report that ``unlearn`` wrote into a folder.

    Raises:
        FileNotFoundError: the folder lacks one of them.
        ValueError: the report is damaged, of another mute set, or an earlier version wrote it.
    """
    # Mute files have None for what is no number.
    report = json.loads((folder / REPORT).read_text(), parse_constant=lambda name: None)
    if not isinstance(report, dict):
        raise ValueError(f"{folder / REPORT} is damaged: it is not a report of unlearn")
    mutes = MuteSet.load(folder / MUTE_FILE)
    # Many runs have the same number of neurons and the same seed.
    told = [report.get(name) for name in ("muted_neurons", "seed", "before", "after")]
    if told != [mutes.count, mutes.seed, *(mutes.metrics.get(state) for state in ("before", "after"))]:
        raise ValueError(
            f"{folder / REPORT} does not belong to {folder / MUTE_FILE}: seed, number of neurons or what was "
            "measured differ"
        )
    if missing := [key for key in TOLD if key not in report and key != "model"]:
        raise ValueError(f"{folder / REPORT} lacks {', '.join(missing)}: an earlier version wrote it")
    return mutes, report


def _read_key(path: Path) -> bytes:
    try:
        key = bytes.fromhex(path.read_text())
    except ValueError:
        key = b""
    # By another key no text would be found again.
    if len(key) != KEY_BYTES:
        raise LedgerError(f"{path} is damaged: it is no key of a ledger")
    return key


def _hash_key(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
