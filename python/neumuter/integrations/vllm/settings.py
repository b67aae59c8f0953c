"""What the operator of a vLLM server asks for: environment variables, which all processes of vLLM inherit.

The switch is an environment variable and no entry of vLLM's additional config, because the plug-in is called
before there is a config: it can refuse a version of vLLM, and without the variable it leaves vLLM as it is.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PREFIX = "NEUMUTER_VLLM_"
SETS, REQUIRE, SHARE = f"{PREFIX}SETS", f"{PREFIX}REQUIRE", f"{PREFIX}SHARE"
MAX_SHARE = 0.02


@dataclass(frozen=True)
class Settings:
    """folder: of the mute files. required: a request without a set is refused.

    share: the largest part of a model's neurons that one set may mute: room for it is set aside.
    """

    folder: Path
    required: bool = True
    share: float = MAX_SHARE


def is_asked() -> bool:
    """Whether the environment asks for mute sets."""
    return any(name.startswith(PREFIX) for name in os.environ)


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings from the environment.

    Raises:
        ValueError: a variable has another name or value than described.
    """
    given = {name: value for name, value in environment.items() if name.startswith(PREFIX)}
    if unknown := sorted(given.keys() - {SETS, REQUIRE, SHARE}):
        raise ValueError(f"{unknown[0]} is not a setting: there are {SETS}, {REQUIRE} and {SHARE}")
    folder = Path(given.get(SETS, ""))
    if not given.get(SETS) or not folder.is_dir():
        raise ValueError(f"{SETS} must be a folder of mute files, got {given.get(SETS)!r}")
    required = given.get(REQUIRE, "1")
    if required not in ("0", "1"):
        raise ValueError(f"{REQUIRE} must be 0 or 1, got {required!r}")
    text = given.get(SHARE, str(MAX_SHARE))
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"{SHARE} must be a number above 0, up to 1, got {text!r}")
    return Settings(folder.resolve(), required == "1", share)
