"""What a request asks for, in the front end of vLLM: its set is found, or the request is refused."""

import functools
import logging
from typing import Any

from prometheus_client import Counter
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from neumuter.integrations.vllm.folder import MuteFolder, ServedSet
from neumuter.integrations.vllm.settings import Settings
from neumuter.integrations.vllm.stamp import ARGUMENT
from neumuter.mutes.container import MuteFileError

logger = logging.getLogger(__name__)


class UnprovenSet(Exception):
    """The engine has not yet compared this set with its model."""

    def __init__(self, mutes: ServedSet) -> None:
        super().__init__(f"the mute set {mutes.name!r} was not compared with the model")
        self.mutes = mutes


class Admission:
    """Finds the set of each request, and has it compared with the model when it is new."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.folder = settings, MuteFolder(settings.folder)
        # {digest of a file: how it differs from the model; "" if it fits}
        self._verdicts: dict[str, str] = {}

    def find(self, params: Any) -> ServedSet | None:
        """Find the set that a request's parameters ask for; None if they ask for none.

        Raises:
            VLLMValidationError: there is no such set, it does not fit the model, or one is required.
            UnprovenSet: it must be compared with the model first.
        """
        if not isinstance(params, SamplingParams):
            raise _refusal("this server mutes generation alone: there are no mute sets for pooling")
        name = (params.extra_args or {}).get(ARGUMENT)
        if name is None:
            if self.settings.required:
                raise _refusal(f'this server requires a mute set: give vllm_xargs={{"{ARGUMENT}": NAME}}')
            return None
        try:
            mutes = self.folder.find(name)
        except KeyError:
            raise _refusal(f"there is no mute set {name!r}") from None
        except MuteFileError as error:
            logger.error("%s", error)
            raise _refusal(f"the file of the mute set {name!r} is bad") from None
        except ValueError as error:
            raise _refusal(f"{ARGUMENT} {error}") from None
        verdict = self._verdicts.get(mutes.digest)
        if verdict is None:
            raise UnprovenSet(mutes)
        if verdict:
            raise _refusal(f"the mute set {name!r} does not fit the model: {verdict}")
        return mutes

    def record(self, mutes: ServedSet, differences: list[list[str]]) -> None:
        """Take down how a set differs from the model, by the word of each worker."""
        if not differences:
            raise RuntimeError(f"no worker has compared the mute set {mutes.name!r} with its model")
        texts = sorted({text for found in differences for text in found})
        if texts:
            logger.error("The mute set %r does not fit the model: %s", mutes.name, "; ".join(texts))
        self._verdicts[mutes.digest] = "; ".join(texts[:2])

    def count(self, mutes: ServedSet | None) -> None:
        """Count an admitted request."""
        _counter().labels(mutes.name if mutes else "").inc()


@functools.cache
def _counter() -> Counter:
    """One for all engines of a process: a registry takes no second metric of that name."""
    return Counter("neumuter_requests", "Requests admitted, by mute set", ["mute_set"])


def _refusal(message: str) -> VLLMValidationError:
    return VLLMValidationError(message, parameter=ARGUMENT)
