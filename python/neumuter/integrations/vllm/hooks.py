"""Where the plug-in is put into vLLM: all that changes vLLM's classes, in one place.

The front end admits each request. The engine refuses requests that were not admitted, puts mute sets into its
workers before they compile, and checks them. Either end notices where the other is missing.
"""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import vllm
from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine

from neumuter.integrations.vllm.admission import Admission, UnprovenSet
from neumuter.integrations.vllm.check import check_engine
from neumuter.integrations.vllm.settings import Settings, read_settings
from neumuter.integrations.vllm.stamp import data_of, salted, stamped
from neumuter.integrations.vllm.support import refuse_version
from neumuter.integrations.vllm.worker import COMPARE, admit, attach, check

# The attribute of an InputProcessor that holds its ``Admission``, and the mark of a class that is changed.
ADMISSION, INSTALLED = "neumuter_admission", "_neumuter_installed"


def install() -> None:
    """Change vLLM's classes; once, however often it is called.

    Raises:
        RuntimeError: a version of vLLM that was not tested.
        ValueError: a setting is not as described.
    """
    refuse_version(vllm.__version__)
    settings = read_settings()
    if hasattr(InputProcessor, INSTALLED):
        return
    setattr(InputProcessor, INSTALLED, True)
    _replace(InputProcessor, "__init__", functools.partial(_init, settings))
    _replace(InputProcessor, "process_inputs", _process_inputs)
    _replace(AsyncLLM, "add_request", _add_request_async)
    _replace(LLMEngine, "add_request", _add_request)
    _replace(EngineCore, "__init__", _init_engine)
    _replace(EngineCore, "preprocess_add_request", _preprocess_add_request)
    _replace(EngineCore, "_initialize_kv_caches", functools.partial(_initialize_kv_caches, settings))
    for mixin in (BeamSearchOnlineMixin, BeamSearchOfflineMixin):
        _replace(mixin, "beam_search", _refuse_beams)


def _replace(owner: type, name: str, ours: Callable[..., Any]) -> None:
    """Put ``ours`` in place of a method, which it gets as its first argument."""
    former = getattr(owner, name)

    @functools.wraps(former)
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        return ours(former, self, *arguments, **named)

    setattr(owner, name, method)


def _init(settings: Settings, former: Callable[..., Any], self: Any, *arguments: Any, **named: Any) -> None:
    # It makes an asynchronous form of process_inputs.
    former(self, *arguments, **named)
    setattr(self, ADMISSION, Admission(settings))


def _process_inputs(
    former: Callable[..., Any],
    self: Any,
    request_id: str,
    prompt: Any,
    params: Any,
    *arguments: Any,
    **named: Any,
) -> Any:
    admission: Admission = getattr(self, ADMISSION)
    mutes = admission.find(params)
    request = former(self, request_id, prompt, stamped(params, mutes), *arguments, **named)
    request.cache_salt = salted(mutes, request.cache_salt)
    admission.count(mutes)
    return request


async def _add_request_async(former: Callable[..., Any], self: Any, *arguments: Any, **named: Any) -> Any:
    admission: Admission = getattr(self.input_processor, ADMISSION)
    while True:
        try:
            return await former(self, *arguments, **named)
        except UnprovenSet as missing:
            found = await self.collective_rpc(COMPARE, args=(missing.mutes.data,))
            admission.record(missing.mutes, found)


def _add_request(former: Callable[..., Any], self: Any, *arguments: Any, **named: Any) -> Any:
    admission: Admission = getattr(self.input_processor, ADMISSION)
    while True:
        try:
            return former(self, *arguments, **named)
        except UnprovenSet as missing:
            admission.record(missing.mutes, self.collective_rpc(COMPARE, args=(missing.mutes.data,)))


def _preprocess_add_request(former: Callable[..., Any], self: Any, request: Any) -> Any:
    data_of(request.sampling_params)
    return former(self, request)


def _initialize_kv_caches(settings: Settings, former: Callable[..., Any], self: Any, *arguments: Any) -> Any:
    self.collective_rpc(attach, args=(settings.share,))
    result = former(self, *arguments)
    self.collective_rpc(check)
    return result


def _init_engine(former: Callable[..., Any], self: Any, *arguments: Any, **named: Any) -> None:
    former(self, *arguments, **named)
    check_engine(self)
    self.collective_rpc(admit)


def _refuse_beams(*arguments: Any, **named: Any) -> NoReturn:
    raise VLLMValidationError(
        "beam search makes requests of its own, which forget the mute set: this server refuses it",
        parameter="use_beam_search",
    )
