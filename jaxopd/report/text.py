"""Text that a model wrote, made fit to show: visible controls, the gaps between tokens, JSON inside a page."""

import json
from typing import Any

CONTROLS = {c: chr(0x2400 + c) for c in range(32) if c not in (9, 10)} | {0x7F: "\u2421"}
# Bidirectional controls and separators would reorder or break the text around them: they are shown by code point.
INVISIBLE = {
    c: f"\u27e8U+{c:04X}\u27e9"
    for c in (0x61C, 0x200B, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
VISIBLE = CONTROLS | INVISIBLE
# What could end the script element that holds the JSON, open a comment in it, or end a line of JavaScript.
IN_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def visible(text: Any) -> str:
    """Rewrite control and bidirectional characters as visible signs; everything else stays."""
    return str(text).translate(VISIBLE)


def shown_token(text: str) -> str:
    """Make a token visible: line breaks get a sign, and so does a token without text."""
    return visible(text).replace("\n", "\u21b5\n") or "\u2205"


def with_gaps(tokens: list[str], text: str) -> list[tuple[str, str]]:
    """Pair each token with the white space before it in `text`, which word-level tokenizers leave out."""
    pairs, position = [], 0
    for token in map(str, tokens):
        at = text.find(token, position, position + len(token) + 8)
        gap = text[position:at] if at > position and text[position:at].isspace() else ""
        position = at + len(token) if at >= 0 else position
        pairs.append((gap, token))
    return pairs


def script_json(data: Any) -> str:
    """Write JSON that may stand inside a script element, as data or as JavaScript."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.translate(IN_SCRIPT)
