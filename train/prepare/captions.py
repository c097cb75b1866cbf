"""Captions of unknown quality to text that may be trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from train.prepare.rejects import Rejected


@dataclass(frozen=True)
class CaptionOptions:
    """Which captions are taken.

    Args:
        shortest: characters a caption must have, spaces around it not counted.
        longest: characters it may have.
        long: what is done with longer ones: cut (after the last word that fits) or drop (the sample).
    """

    shortest: int = 1
    longest: int = 4000
    long: str = "cut"


def check(value: Any, field: str, options: CaptionOptions) -> tuple[str, bool]:
    """A caption as a source has it (str, UTF-8 bytes, None, anything) to (text, whether it was cut).

    Raises: Rejected naming the field.
    """
    if value is None:
        raise Rejected("caption_missing", field)
    try:
        if isinstance(value, bytes):
            value = value.decode("utf-8")
        elif isinstance(value, str):
            value.encode("utf-8")
    except UnicodeError as error:
        raise Rejected("caption_not_utf8", f"{field}: {error}") from None
    if not isinstance(value, str):
        raise Rejected("caption_not_text", f"{field}: wanted text, got {type(value).__name__}")
    text = value.strip()
    if not text:
        raise Rejected("caption_empty", field)
    if len(text) < options.shortest:
        raise Rejected("caption_short", f"{field}: {len(text)} characters, wanted at least {options.shortest}")
    if len(text) <= options.longest:
        return text, False
    if options.long == "drop":
        raise Rejected("caption_long", f"{field}: {len(text)} characters, wanted at most {options.longest}")
    head = text[: options.longest + 1]
    if not head[-1].isspace():  # inside a word
        head = head.rsplit(None, 1)[0] if len(head.split(None, 1)) > 1 else head
    return head[: options.longest].rstrip(), True
