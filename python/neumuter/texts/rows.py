"""Texts out of what files and callers hold: strings, pairs, conversations, and rows with named columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from neumuter.types import Messages, Text

# Of these pairs of columns prompt and completion are joined as they are, the others by a line break.
AS_GIVEN = ("prompt", "completion")
PAIRS = (AS_GIVEN, ("question", "answer"), ("instruction", "output"))
CONVERSATIONS = ("messages", "conversations")
# Who speaks, in the names of other formats.
ROLES = {"human": "user", "gpt": "assistant"}
ASKING = ("system", "developer", "user", "tool")
# The column of a text, or those of prompts and completions.
Column = str | tuple[str, str] | None


def text_of(item: Any, column: Column = None) -> Text:
    """Take the text out of an item: a text, a (prompt, completion) pair, a conversation, or a row with them.

    Args:
        column: the column of a row that holds the text, or the two that hold prompt and completion. By
            default "text"; or "prompt" and "completion", "question" and "answer", "instruction" (with
            "input", if that is not empty) and "output"; or "messages" or "conversations".

    Returns:
        A str; a pair of str; or a list of {"role", "content"} whose last message is an answer. Unless their
        columns are "prompt" and "completion", a line break joins a prompt and a completion that no space
        separates.

    Raises:
        TypeError: the item is something else.
        ValueError: a row without these columns, or with something else in them; a conversation without an
            answer; half a surrogate pair.
    """
    if isinstance(item, str):
        return _checked(item)
    if isinstance(item, tuple) and len(item) == 2 and all(isinstance(part, str) for part in item):
        return (_checked(item[0]), _checked(item[1]))
    if isinstance(item, Mapping):
        return _text_of_row(item, column)
    if _are_mappings(item):
        return _conversation(item)
    raise TypeError(
        "must be a text, a (prompt, completion) pair, a list of chat messages or a row with columns, got "
        f"{type(item).__name__}"
    )


def _text_of_row(row: Mapping[str, Any], column: Column) -> Text:
    names = _find_columns(row, column)
    values = [row[name] for name in names]
    if all(map(_are_mappings, values)):
        return _conversation([message for value in values for message in value])
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str) or not value:
            raise ValueError(f"column {name!r} must hold a text, got {value!r:.80}")
        _checked(value)
    if len(names) == 1:
        return str(values[0])
    prompt, completion = values
    if names == ("instruction", "output") and (more := row.get("input")):
        if not isinstance(more, str):
            raise ValueError(f"column 'input' must hold a text, got {more!r:.80}")
        prompt = f"{prompt}\n\n{_checked(more)}"
    if names != AS_GIVEN and not prompt[-1].isspace() and not completion[0].isspace():
        prompt += "\n"
    return (prompt, completion)


def _find_columns(row: Mapping[str, Any], column: Column) -> tuple[str, ...]:
    wanted = (column,) if isinstance(column, str) else column
    known = [("text",), *PAIRS, *((name,) for name in CONVERSATIONS)] if wanted is None else [wanted]
    found = next((names for names in known if all(name in row for name in names)), None)
    if found is None:
        missing = " and ".join(map(repr, known[0]))
        others = ", and no others that are known" if column is None else ""
        raise ValueError(f"no column {missing}{others}; there are {', '.join(map(repr, row))}")
    return found


def _are_mappings(value: Any) -> bool:
    listed = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return listed and all(isinstance(message, Mapping) for message in value)


def _conversation(messages: Sequence[Mapping[str, Any]]) -> Messages:
    made = []
    for message in messages:
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f'a chat message needs "role" and "content", both texts, got {message!r:.80}')
        made.append({"role": ROLES.get(role, role), "content": _checked(content)})
    if len(made) < 2 or made[-1]["role"] in ASKING or not made[-1]["content"].strip():
        raise ValueError("a conversation must have two messages or more and end with an answer")
    return made


def _checked(text: str) -> str:
    """Raise ValueError if ``text`` holds half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start + 1}, {text[error.start]!a}, is half a surrogate pair, which stands for "
            "nothing: mend or remove it"
        ) from None
    return text
