r"""Where a response states its answer: shared by the graders, which differ in how they read it.

An answer is stated in a ``\boxed{}``, after a phrase such as "Answer:" or "the answer is", or alone on the last
line. The last one that can be read wins. Text inside `<think>` never counts, and neither does a box that the end of
the text cuts off. Responses are untrusted: every scan is linear in their length.
"""

import re
from collections.abc import Callable

THINK_TAG = re.compile(r"(</?think>)", re.IGNORECASE)
BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)\s{0,9}\{|\\.|[{}]", re.DOTALL)
STATEMENT = re.compile(
    r"(?:\banswer(?:ed)?\b|\b(?:correct|right|best)\s(?:option|choice)\b|答案)[\s*_]{0,9}"
    r"(?::|：|=|->|→|\bis\b|\bwould\sbe\b|\bshould\sbe\b|是)(?:[\s*_:]|\bis\b){0,9}",
    re.IGNORECASE,
)
MARKUP = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mbox|operatorname)\b|\\[()\[\]]|[*_`$\"“”{}]|(?<!\w)['‘’]|['’](?!\w)"
)
STATED_WIDTH = 300  # characters of a statement that are read
TRUTH = r"(true|false|yes|no)"

Reader = Callable[[str], "str | None"]


def visible(text: str) -> str | None:
    """Return the text outside `<think>` blocks; None where a block is left open.

    A chat template may have opened the block in the prompt, so an unmatched `</think>` hides all that precedes it.
    """
    kept, inside = [], False
    for piece in THINK_TAG.split(text):
        tag = piece.lower()
        if tag == "<think>":
            inside = True
        elif tag == "</think>":
            kept, inside = (kept if inside else []), False
        elif not inside:
            kept.append(piece)
    return None if inside else "".join(kept)


def boxes(text: str) -> list[tuple[int, str]]:
    """Return (position, content) of every closed, non-empty box, inner boxes included."""
    found, open_at = [], []
    for token in BOX_TOKEN.finditer(text):
        if token[0].endswith("{") and token[0] != r"\{":
            open_at.append((token.start(), token.end(), len(token[0]) > 1))
        elif token[0] == "}" and open_at:
            start, inner, is_box = open_at.pop()
            content = text[inner : token.start()].strip()
            if is_box and content.strip("{} "):  # a blank one repeats the instruction
                found.append((start, content))
    return found


def statements(text: str) -> list[tuple[int, str]]:
    """Return (position, rest of the line) after every phrase that announces an answer."""
    found = []
    for phrase in STATEMENT.finditer(text):
        content = text[phrase.end() : phrase.end() + STATED_WIDTH].split("\n", 1)[0]
        if "boxed" not in content and "fbox" not in content:  # those are read as boxes, or cut off
            found.append((phrase.start(), content))
    return found


def last_answer(text: str, *, box: Reader, stated: Reader, line: Reader) -> str | None:
    """Return the last answer in a response that the reader for its place can read; None where there is none.

    Args:
        text: the whole response.
        box, stated, line: read the content of a box, the rest of a line after "Answer:" and the like, and the last
            non-empty line of the text; each returns the answer or None.
    """
    shown = visible(text)
    if shown is None or not shown.strip():
        return None
    last_line = shown.rstrip().rsplit("\n", 1)[-1].strip()
    places = [(start, box, content) for start, content in boxes(shown)]
    places += [(start, stated, content) for start, content in statements(shown)]
    places.append((len(shown.rstrip()) - len(last_line), line, last_line))
    for _, read, content in sorted(places, key=lambda place: place[0], reverse=True):
        if (answer := read(content)) is not None:
            return answer
    return None


def plain(content: str) -> str:
    r"""Strip markdown and LaTeX wrappers: ``**\text{(B)}**`` becomes ``(B)``."""
    return " ".join(MARKUP.sub(" ", content).split())


def read_truth(content: str) -> str | None:
    """Read "True" or "False" (yes, no, "not false") at the start of a stated answer; None for prose and hedges."""
    match = re.match(
        rf"(not\s)?{TRUTH}\b(?!\s?(?:or|and|/)\s?{TRUTH}\b)(?=$|[^\w-]*$|\s?[.,;:!)—]|\s(?:because|since|as|is)\b)",
        plain(content[:STATED_WIDTH]),
        re.IGNORECASE,
    )
    if match is None:
        return None
    return str((match[2].lower() in ("true", "yes")) != bool(match[1]))


def whole(read: Reader, longest: int = 40) -> Reader:
    """Make a reader refuse contents of more than `longest` characters or one word, as a last line must be."""
    return lambda content: read(content) if len(content) <= longest and len(plain(content).split()) <= 1 else None
