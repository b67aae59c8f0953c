"""Prompts and answers as a model is asked: through its chat template, or plainly one behind the other."""

from collections.abc import Iterable

import jinja2
from transformers import PreTrainedTokenizerBase

from neumuter.types import Messages, Text

TEMPLATE_USED = (
    "This tokenizer has a chat template: prompts and completions go through it, as in a chat; chat=False "
    "(--no-chat) leaves them as they are. Both forms are measured, and the worse counts."
)


# Stands where the answer does, so that it shows where a template puts it. No text has it: it means nothing.
MARK = "\ue000"


def uses_template(text: Text, tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> bool:
    """Decide whether a text goes through the chat template.

    Args:
        chat: None takes the template where there is one, for pairs and conversations. True and False say so.

    Raises:
        ValueError: it must, and there is no template.
    """
    if isinstance(text, str) or chat is False:
        return False
    if tokenizer.chat_template is not None:
        return True
    if chat or not isinstance(text, tuple):
        raise ValueError("the tokenizer has no chat template; chat=False (--no-chat) asks without one")
    return False


def has_two_forms(texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether some of ``texts`` can be asked both through a chat template and without."""
    return tokenizer.chat_template is not None and any(not isinstance(text, str) for text in texts)


def render(text: tuple[str, str] | Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Render a pair or a conversation by the chat template, special tokens included.

    Returns:
        (all up to the last answer, that answer as the template shows it).

    Raises:
        ValueError: the template refuses the conversation, or does not show the answer.
    """
    messages = as_messages(text) if isinstance(text, tuple) else text
    marked = [*messages[:-1], messages[-1] | {"content": MARK}]
    try:
        prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
        whole, shown = (str(tokenizer.apply_chat_template(m, tokenize=False)) for m in (messages, marked))
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from None
    answer = messages[-1]["content"]
    # Some templates cut spaces off.
    for wanted in filter(None, (answer, answer.strip())):
        # An empty thought before the answer may hold the same letters.
        start = shown.find(MARK)
        if start < 0 or whole[:start] != shown[:start] or not whole.startswith(wanted, start):
            # What a template shows before the answer depends on it, for example on a thought in it.
            start = whole.find(wanted, len(prompt)) if whole.startswith(prompt) else whole.rfind(wanted)
        if start >= 0:
            return whole[:start], wanted
    raise ValueError(f"the chat template does not show the answer {answer!r:.60}")


def as_messages(pair: tuple[str, str]) -> Messages:
    """Make a conversation of a prompt and its completion, without the spaces that joined the two."""
    parts = zip(("user", "assistant"), pair, strict=True)
    return [{"role": role, "content": content.strip()} for role, content in parts]


def plain(text: tuple[str, str] | Messages) -> tuple[str, str]:
    """Put a pair or a conversation into a prompt and a completion without a template, a line a message."""
    if isinstance(text, tuple):
        return text
    *before, answer = (message["content"] for message in text)
    return "".join(f"{content}\n" for content in before), answer
