"""Checks the constants of a recipe where they are given: a bad one must not show after hours of training."""

import math
from collections.abc import Collection
from dataclasses import fields
from typing import Any


def check_constants(config: Any, positive: Collection[str]) -> None:
    """Raise ValueError unless the fields of a dataclass hold what a recipe and a file's header can take.

    These are finite numbers of Python, and tuples or lists of them; strings where the default is one; and
    None where the field's type allows it. An integer field is at least 1.

    Args:
        positive: names of fields, each of whose numbers is above 0.
    """
    for field in fields(config):
        value, kind = getattr(config, field.name), str(field.type)
        if isinstance(field.default, str) or (value is None and "None" in kind):
            continue
        parts = value if isinstance(value, tuple | list) else (value,)
        if "int" in kind and not (type(value) is int and value >= 1):
            wanted = "an int of at least 1"
        elif not all(isinstance(part, int | float) and math.isfinite(part) for part in parts):
            wanted = "a finite float of Python" if len(parts) == 1 else "finite floats of Python"
        elif field.name in positive and min(parts) <= 0:
            wanted = "above 0"
        else:
            continue
        wanted += " or None" if "None" in kind else ""
        raise ValueError(f"{field.name} must be {wanted}, got {value!r}")
