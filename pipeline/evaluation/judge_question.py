"""The question to a language-model judge, and the verdict that is read out of its answer."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pipeline.errors import UserError
from pipeline.recipe_judges import CRITERION, LlmJudge

VERDICTS = ("A", "B", "TIE")
SLOTS = re.compile(r"\{(prompt|a|b|criterion)\}")
NOTE = "That ends without a verdict. Answer with nothing but your verdict: A, B or TIE."
_ORNAMENT = re.compile(r"\\boxed|\\text|[\[\]{}()<>*_`#$\"']")
_VERDICT = re.compile(
    r"(?:(?:(?:the|my|final|better) )*(?:answer|response|verdict|decision|winner|choice|judge?ment|result)"
    r"(?: is)? ?[:=]? ?)?(?:(?:answer|response|option|assistant) )?(a|b|tie)",
    re.IGNORECASE,
)


def verdict(text: str) -> str | None:
    """ "A", "B" or "TIE", as the last line that is not empty says; None for everything else.

    The line has to be the verdict alone. "Verdict: A", "**A**", "[[A]]", "Answer B." and a full stop are read, in
    either case; "A is better" is not, nor is anything above the last line.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    plain = " ".join(_ORNAMENT.sub(" ", lines[-1]).split()).rstrip(" .!")
    found = _VERDICT.fullmatch(plain.replace(" :", ":"))
    return found[1].upper() if found else None


def read_template(name: str, settings: LlmJudge) -> str:
    """The text of `template`, or of the file that it names.

    Errors:
        UserError: a slot is missing, or the file is.
    """
    key, text = f"eval.judges.{name}.llm.template", settings.template
    if "\n" not in text and len(text) < 1024 and os.path.isfile(text):
        key, text = f"{key} ({text})", Path(text).read_text(encoding="utf-8")
    slots = {found[1] for found in SLOTS.finditer(text)}
    missing = [f"{{{slot}}}" for slot in ("prompt", "a", "b") if slot not in slots]
    if missing:
        file = " and no file of this name is there" if "\n" not in text and len(slots) == 0 else ""
        raise UserError(
            f"{key}: the question has no {' and no '.join(missing)}{file}.",
            mend="Write the text with {prompt}, {a} and {b} in it, or the path of a file that holds it.",
        )
    if settings.criterion != CRITERION and "criterion" not in slots:
        raise UserError(
            f"{key}: the question has no {{criterion}}, so eval.judges.{name}.llm.criterion would not count.",
            mend="Put {criterion} into the template, or take the criterion out.",
        )
    return text


def question(template: str, criterion: str, prompt: str, first: str, second: str) -> str:
    """The template with its slots filled; what looks like a slot inside a text stays as it is."""
    texts = {"criterion": criterion, "prompt": prompt, "a": first, "b": second}
    return SLOTS.sub(lambda slot: texts[slot[1]], template)
