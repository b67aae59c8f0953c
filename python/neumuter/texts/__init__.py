"""Texts: read from files, encoded as batches, and neighbours for those who have none to give."""

from neumuter.texts.encoding import encode, encode_forms, join_batches
from neumuter.texts.files import read_texts
from neumuter.texts.sources import collect_texts

__all__ = ["collect_texts", "encode", "encode_forms", "join_batches", "read_texts"]
