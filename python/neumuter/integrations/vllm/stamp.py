"""How a request carries its mute set through vLLM: the bytes of the file, so that all read the same one.

The engine needs no folder, a file may change or go while its requests run, and a set is known by its digest.
"""

from typing import Any, TypeVar

from neumuter.integrations.vllm.folder import ServedSet

# What clients write into vllm_xargs, and what the engine gets: no bytes stand for no set.
ARGUMENT, STAMP = "mute_set", "neumuter.mute_file"
NO_SET = b""
Params = TypeVar("Params")


def stamped(params: Params, mutes: ServedSet | None) -> Params:
    """Copy a request's vLLM SamplingParams with the bytes of its set."""
    copy: Any = params.clone()  # type: ignore[attr-defined]  # vLLM's
    copy.extra_args = (copy.extra_args or {}) | {STAMP: mutes.data if mutes else NO_SET}
    result: Params = copy
    return result


def salted(mutes: ServedSet | None, salt: str | None) -> str:
    """The salt of a request's cached prefix: no request with another set has it, whatever salt it sends."""
    return f"{mutes.digest if mutes else ''}:{salt or ''}"


def data_of(params: Any) -> bytes:
    """The bytes of a request's mute file, ``NO_SET`` if it has none.

    Raises:
        RuntimeError: the request has not been through the plug-in's ``Admission``.
    """
    data = (getattr(params, "extra_args", None) or {}).get(STAMP)
    if not isinstance(data, bytes):
        raise RuntimeError(
            "a request has come to the engine without a word about its mute set: NeuMuter's plug-in did not "
            "admit it, which must be loaded in every process (NEUMUTER_VLLM_SETS, VLLM_PLUGINS)"
        )
    return data
