"""Texts: read from files, encoded as batches, and neighbours for those who have none to give."""

from neumuter.texts.encoding import encode, encode_forms, join_batches, store_windows
from neumuter.texts.files import read_texts
from neumuter.texts.sources import collect_texts
from neumuter.texts.store import Windows

__all__ = [
    "Windows",
    "collect_texts",
    "encode",
    "encode_forms",
    "join_batches",
    "read_texts",
    "store_windows",
]
