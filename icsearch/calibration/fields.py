"""What of a row of a dataset is its document: a string, a list of them, or a chat, by the tokenizer's own template."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from icsearch.core.errors import CalibrationError
from icsearch.core.jsonfile import shown
from icsearch.core.text import first_line

TEXT_FIELD = "text"
CHAT_FIELDS = ("messages", "conversations")  # that are taken where there is no text
# Who speaks, in the words that chat templates know; the others are ShareGPT's.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "function_call": "assistant",
}
_KEYS = (("role", "content"), ("from", "value"))

Chat = list[dict[str, str]]  # role and content of each message
Render = Callable[[Chat], str]


def field_of(names: Collection[str], where: str, asked: str | None) -> str:
    """The field of a row with these names that holds its document. Raises CalibrationError where none does."""
    wanted = (asked,) if asked else (TEXT_FIELD, *CHAT_FIELDS)
    if found := next((name for name in wanted if name in names), None):
        return found
    there = ", ".join(names) or "none"
    raise CalibrationError(
        f"{where} has no field {' or '.join(wanted)} (found: {there}): give --field with the one to read"
    )


def document_of(value: Any, where: str, render: Render | None) -> str:
    """The document that a field's value is; nothing (null) counts as blank. Raises CalibrationError for what is none.

    Strings of a list are paragraphs, each on a line of its own. A list of messages goes through `render`.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return "\n".join(value)
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise CalibrationError(
            f"{where} holds a {type(value).__name__}: expected a string, a list of strings, or chat messages with role "
            "and content; give --field with another one"
        )
    if render is None:
        raise CalibrationError(f"{where} holds a chat, which takes the model's tokenizer: give ready text")
    return render([_message(each, where) for each in value])


def template_of(tokenizer: Any, prefix: Sequence[int] = ()) -> Render:
    """Renders a chat as the checkpoint's own template does, without the `prefix` that every document gets anyway.

    What it returns raises CalibrationError.
    """
    in_front = tokenizer.decode(prefix) if prefix else ""

    def render(chat: Chat) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise CalibrationError(
                "the text is chat messages, and the model's tokenizer has no chat template: put its "
                "chat_template.jinja beside the model, or give a field of ready text (--field NAME)"
            )
        try:
            return str(tokenizer.apply_chat_template(chat, tokenize=False)).removeprefix(in_front)
        except Exception as error:  # a template raises what it likes, such as for roles that do not alternate
            raise CalibrationError(
                f"the model's chat template refuses a chat of {', '.join(each['role'] for each in chat)[:80]} "
                f"({first_line(error)}): leave such chats out"
            ) from error

    return render


def _message(row: Mapping[str, Any], where: str) -> dict[str, str]:
    role_key, content_key = next((keys for keys in _KEYS if keys[0] in row), _KEYS[0])
    role, content = row.get(role_key), row.get(content_key)
    if isinstance(content, list):  # parts, of which those of text are said
        content = "".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    if not isinstance(role, str) or not isinstance(content, str | None):
        raise CalibrationError(
            f"{where} has a message {shown(dict(row))}: expected role and content (or from and value), both text"
        )
    return {"role": _ROLES.get(role, role), "content": content or ""}
