"""The judge's prompt, and the score in its reply.

The prompt is a text file that the user can edit (``--umed_judge_prompt``). ``{question}``, ``{reference}`` and ``{answer}`` are
replaced; everything else, other braces included, stays as it is. Boxes are blanked out of reference and answer: the localization
reward scores them, and candidates that differ only in boxes are judged once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from umed_plugin.grounding.boxes import blot_boxes

_PLACEHOLDER = re.compile(r"\{(question|reference|answer)\}")
_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
_MAX_SHOWN = 200  # characters of a reply in a message


class NotAScoreError(ValueError):
    """A reply without a score; the message shows the reply."""


@dataclass(frozen=True)
class JudgeQuestion:
    """One answer to judge.

    Attributes:
        key: hex digest of everything but the model that decides the reply: prompt file, request options and the three texts.
        text: the prompt that the judge reads.
        texts: ``question``, ``reference`` and ``answer`` as they appear in ``text``.
    """

    key: str
    text: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Questionnaire:
    """Turns records and answers into questions, and replies into scores.

    Attributes:
        template: contents of the prompt file.
        options: further fields of the request, such as ``temperature``.
        max_score: score of a perfect answer; replies range from 0 to this.
    """

    template: str
    options: Mapping[str, Any]
    max_score: float

    @classmethod
    def read(cls, prompt_file: str | Path, options: Mapping[str, Any], max_score: float) -> Questionnaire:
        """Read a prompt file that `umed_plugin.flags.rewards` has checked."""
        return cls(Path(prompt_file).read_text(encoding="utf-8"), options, max_score)

    def ask(self, record: Mapping[str, Any], answer: str) -> JudgeQuestion:
        """The question about ``answer`` to the first turn of ``record``."""
        question, reference = (turn["value"] for turn in record["conversations"][:2])
        texts = {
            "question": question.replace("<image>", "").strip(),
            "reference": blot_boxes(reference).strip(),
            "answer": blot_boxes(answer).strip(),
        }
        decisive = json.dumps([self.template, self.options, texts], sort_keys=True)
        key = hashlib.sha256(decisive.encode()).hexdigest()[:32]
        text = _PLACEHOLDER.sub(lambda placeholder: texts[placeholder.group(1)], self.template)
        return JudgeQuestion(key, text, texts)

    def score(self, reply: str) -> float:
        """The score of a reply in 0..1.

        The reply must be one JSON object with a number under ``score``, bare or in one fenced block. Other fields are allowed.

        Raises:
            NotAScoreError: it is anything else, or the number is outside 0..``max_score``.
        """
        fenced = _FENCE.fullmatch(reply.strip())
        try:
            fields = json.loads(
                fenced.group(1) if fenced else reply,
                object_pairs_hook=_unique_names,
                parse_constant=_refuse_constant,
            )
        except (ValueError, RecursionError) as error:
            raise NotAScoreError(f"the reply is not JSON: {reply[:_MAX_SHOWN]!r}") from error
        score = fields.get("score") if isinstance(fields, dict) else None
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            raise NotAScoreError(f'the reply has no number under "score": {reply[:_MAX_SHOWN]!r}')
        if not math.isfinite(score) or not 0 <= score <= self.max_score:
            raise NotAScoreError(f"the score {str(score)[:_MAX_SHOWN]} is outside 0 to {self.max_score:g}")
        return score / self.max_score


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are unique: of two scores, neither can be trusted."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
