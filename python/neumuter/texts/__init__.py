"""Texts: read from files, encoded as batches, and neighbours for those who have none to give."""

from neumuter.texts.encoding import encode
from neumuter.texts.files import read_texts

__all__ = ["encode", "read_texts"]
