"""Characters that HTML does not allow, such as a model or a mute file from a stranger can contain."""

import re

# Control characters, halves of surrogate pairs and non-characters.
FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010ffff]")


def replace_forbidden(text: str) -> str:
    """Return ``text`` with U+FFFD for each character that HTML forbids. It must still be escaped."""
    return FORBIDDEN.sub("\ufffd", text)
