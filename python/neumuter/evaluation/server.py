"""Which texts a running server says: asked as any client would ask it, greedily."""

import http.client
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from neumuter.texts.chat import as_messages
from neumuter.types import Messages, Text

# The variable of the environment that holds the key, if the server wants one.
KEY = "OPENAI_API_KEY"
# Tokens that are asked for at a time, and seconds that they may take.
TOKENS, SECONDS = 64, 300.0
# What a server answers to a request that it cannot take, such as a prompt longer than its context. With the
# last one it often tells what is wrong by quoting the request.
OF_ONE_TEXT = (400, 413, 422)
QUOTING = 422
# A whole text is asked for from its first third on.
PROMPT_SHARE = 1 / 3

logger = logging.getLogger("neumuter")


@dataclass(frozen=True)
class Said:
    """What a server said instead of one text.

    Attributes:
        expected: what follows the prompt in the text.
        said: what the server made of the prompt.
        forms: in how many forms it was asked; this is the answer that has more of the text.
        refused: why the server gave no answer, for example to a prompt longer than it takes; else None.
    """

    expected: str
    said: str
    forms: int = 1
    refused: str | None = None

    @property
    def comes_out(self) -> bool:
        """Whether all of it was said, in any spacing."""
        return _words(self.said).startswith(_words(self.expected))

    @property
    def share(self) -> float:
        """The share of its characters that were said before the first difference, in [0, 1]."""
        expected, said = _words(self.expected), _words(self.said)
        same = 0
        while same < min(len(expected), len(said)) and expected[same] == said[same]:
            same += 1
        return same / max(1, len(expected))


class AllRefusedError(ValueError):
    """A server refuses all texts, for the first one's reason; ``said``: the answers."""

    def __init__(self, said: list[Said]) -> None:
        super().__init__(said[0].refused)
        self.said = said


def ask_server(
    url: str, model: str, texts: Sequence[Text], mute_set: str | None = None, chat: bool = True
) -> list[Said]:
    """Ask a server with OpenAI's API for each text, at temperature 0.

    A prompt with a completion is asked for by the prompt, and a whole text by its first third, cut between
    words, through ``/v1/completions``. Such a completion goes on in steps as long as the server says what is
    expected. A conversation is asked for by its messages but the last, through ``/v1/chat/completions``, and
    so, once more, are prompts with completions: the worse answer counts. The key is in the environment, as
    OPENAI_API_KEY.

    Args:
        url: such as http://127.0.0.1:8000, with /v1 or without.
        model: the name that the server gives to the model or the adapter.
        texts: the texts.
        mute_set: the name of a mute set to ask for, of a vLLM server with NeuMuter's plug-in.
        chat: whether prompts with completions are asked through the chat as well. What the server refuses
            there is asked without, and this is logged.

    Raises:
        ConnectionError: nobody answers at ``url``, or not in time, or not in HTTP.
        PermissionError: the server wants a key, or another one.
        ValueError: ``url`` is no address; the server has no such model or no such API, it refuses all texts,
            or it answers in another form; or nothing but spaces follows the prompt of a text.
    """
    address = url.rstrip("/").removesuffix("/v1")
    if not _is_address(address):
        raise ValueError(f"the address of a server must be like http://127.0.0.1:8000, got {url!r:.80}")
    options: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": TOKENS}
    if mute_set is not None:
        options["vllm_xargs"] = {"mute_set": mute_set}
    parts = [_cut(text) if isinstance(text, str) else text for text in texts]
    for number, text in enumerate(parts, 1):
        if isinstance(text, tuple) and not text[1].strip():
            raise ValueError(f"text {number} has nothing behind its prompt to ask for: {text!r:.60}")
    said = [_ask_if_it_answers(f"{address}/v1", options, text) for text in parts]
    # What is wrong with all of them is no matter of a text, such as a mute set that is not there.
    if said and all(one.refused for one in said):
        raise AllRefusedError(said)
    pairs = {number: text for number, text in enumerate(texts) if isinstance(text, tuple)} if chat else {}
    chats = {number: _ask_in_chat(f"{address}/v1", options, pair) for number, pair in pairs.items()}
    if refused := [one.refused for one in chats.values() if one.refused]:
        logger.warning("%d of %d prompts are asked without a chat: %s", len(refused), len(chats), refused[0])
    for number, answer in chats.items():
        said[number] = _worse(said[number], answer)
    return said


def _is_address(address: str) -> bool:
    try:
        parts = urlsplit(address)
        _ = parts.port  # raises where it is no number
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not set(address) & set(" \t\r\n")


def _worse(first: Said, second: Said) -> Said:
    """Of the answers in two forms the one that has more of the text."""
    answers = [said for said in (first, second) if not said.refused]
    if len(answers) < 2:
        return answers[0] if answers else first
    found = max(answers, key=lambda said: (said.comes_out, said.share))
    return replace(found, forms=2)


def _ask_if_it_answers(address: str, options: dict[str, Any], text: tuple[str, str] | Messages) -> Said:
    try:
        return _chat(address, options, text) if isinstance(text, list) else _ask(address, options, *text)
    except _Refused as error:
        # A server may have no chat, but a prompt shows that it has the model.
        if error.absent and isinstance(text, tuple):
            raise
        return Said(text[-1]["content"] if isinstance(text, list) else text[1], "", refused=str(error))


def _ask_in_chat(address: str, options: dict[str, Any], pair: tuple[str, str]) -> Said:
    try:
        return _chat(address, options, as_messages(pair))
    # A server need not have a chat, and says so in many ways.
    except ValueError as error:
        return Said(pair[1], "", refused=str(error))


def _chat(address: str, options: dict[str, Any], messages: Messages) -> Said:
    """What a server answers to a conversation, which cannot go on in steps."""
    expected, asked = messages[-1]["content"], options | {"messages": messages[:-1]}
    try:
        # No token is shorter than a character.
        choice = _post(f"{address}/chat/completions", asked | {"max_tokens": max(TOKENS, len(expected))})
    except _Refused as error:
        if error.absent:
            raise
        # That may be more than its context has; without a limit it takes what it has.
        del asked["max_tokens"]
        choice = _post(f"{address}/chat/completions", asked)
    return Said(expected, str((choice.get("message") or {}).get("content") or ""))


def _ask(address: str, options: dict[str, Any], prompt: str, expected: str) -> Said:
    said, left = "", _words(expected)
    while True:
        choice = _post(f"{address}/completions", options | {"prompt": prompt + said})
        said += str(choice.get("text") or "")
        before, left = left, _words(expected).removeprefix(_words(said))
        # It goes on only as long as it says more of the text, and nothing else.
        if choice.get("finish_reason") != "length" or left in ("", before, _words(expected)):
            return Said(expected, said)


def _cut(text: str) -> tuple[str, str]:
    """Cut a text behind its first third, between words if there are some near."""
    third = int(len(text) * PROMPT_SHARE)
    nearly = max(1, 2 * third // 3)
    places = (text.find(" ", third, 2 * third), text.rfind(" ", nearly, third), max(1, third))
    place = next(place for place in places if place > 0)
    return text[:place], text[place:]


def _words(text: str) -> str:
    return " ".join(text.split())


class _Refused(ValueError):
    """A server that is there does not answer this; ``absent``: it has no such model, or no such API."""

    def __init__(self, message: str, absent: bool = False) -> None:
        super().__init__(message)
        self.absent = absent


def _post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    """Ask, and return the first choice of the answer."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    request = Request(address, json.dumps(body).encode(), headers)
    try:
        with urlopen(request, timeout=SECONDS) as response:
            data = response.read()
    except HTTPError as error:
        with error:
            reason = " ".join(error.read(500).decode(errors="replace").split())
        if error.code in (401, 403):
            raise PermissionError(f"{address} wants another key ({error.code}): set {KEY}") from None
        if error.code == 404:
            message = f"{address} has no model {body['model']!r}, or no such API (404): {reason}"
            raise _Refused(message, absent=True) from None
        if error.code == QUOTING:
            reason = "its answer is not shown, because it may quote the text"
        kind = _Refused if error.code in OF_ONE_TEXT else ValueError
        raise kind(f"{address} refuses to answer ({error.code}): {reason}") from None
    except (URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or repr(error)
        raise ConnectionError(f"no answer from {address}: {reason}") from None
    try:
        choice = json.loads(data)["choices"][0]
        if isinstance(choice, dict):
            return choice
    except (ValueError, KeyError, IndexError, TypeError):
        pass
    raise ValueError(f"{address} does not answer as OpenAI's API does")
