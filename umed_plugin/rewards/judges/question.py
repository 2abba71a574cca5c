"""What a judge is asked, and what its reply is worth.

The question is a text file that a person can edit (``--umed_judge_prompt``): ``{question}``, ``{reference}`` and ``{answer}`` are
replaced, all else, other braces too, stays as it is. Boxes are blotted out of both texts: the localization reward scores them,
and candidates that differ in nothing else are asked about once.
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

_PLACE = re.compile(r"\{(question|reference|answer)\}")
_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
_SHOWN = 200  # characters of a reply in a message


class NotAScoreError(ValueError):
    """A reply that holds no score, with what it holds."""


@dataclass(frozen=True)
class Question:
    """One answer to judge.

    Attributes:
        key: hex digest of all that decides the reply but the model: prompt file, request options and the three texts.
        text: what the judge reads.
        texts: ``question``, ``reference`` and ``answer`` as they stand in ``text``.
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
        max_score: what a perfect answer gets; replies go from 0 to this.
    """

    template: str
    options: Mapping[str, Any]
    max_score: float

    @classmethod
    def read(cls, prompt_file: str | Path, options: Mapping[str, Any], max_score: float) -> Questionnaire:
        """A questionnaire from a prompt file, which `umed_plugin.flags.rewards` has checked."""
        return cls(Path(prompt_file).read_text(encoding="utf-8"), options, max_score)

    def ask(self, record: Mapping[str, Any], answer: str) -> Question:
        """The question about ``answer`` to the first turn of ``record``."""
        asked, reference = (turn["value"] for turn in record["conversations"][:2])
        texts = {
            "question": asked.replace("<image>", "").strip(),
            "reference": blot_boxes(reference).strip(),
            "answer": blot_boxes(answer).strip(),
        }
        what_decides = json.dumps([self.template, self.options, texts], sort_keys=True)
        key = hashlib.sha256(what_decides.encode()).hexdigest()[:32]
        return Question(key, _PLACE.sub(lambda place: texts[place.group(1)], self.template), texts)

    def score(self, reply: str) -> float:
        """The score of a reply in 0..1.

        The reply must be one JSON object with a number under ``score``, alone or as one fenced block; it may hold other fields.

        Raises:
            NotAScoreError: it is anything else, or the number is outside 0..``max_score``.
        """
        fenced = _FENCE.fullmatch(reply.strip())
        try:
            found = json.loads(
                fenced.group(1) if fenced else reply,
                object_pairs_hook=_once_each,
                parse_constant=_refuse_constant,
            )
        except (ValueError, RecursionError) as error:
            raise NotAScoreError(f"the reply is not JSON: {reply[:_SHOWN]!r}") from error
        score = found.get("score") if isinstance(found, dict) else None
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            raise NotAScoreError(f'the reply has no number under "score": {reply[:_SHOWN]!r}')
        if not math.isfinite(score) or not 0 <= score <= self.max_score:
            raise NotAScoreError(f"the score {str(score)[:_SHOWN]} is outside 0 to {self.max_score:g}")
        return score / self.max_score


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are all different: of two scores, neither is meant more than the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
