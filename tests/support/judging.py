"""A judge of relevance, and the record that it is asked about."""

from __future__ import annotations

from typing import Any

from umed_plugin.flags.definition import UmedFlags
from umed_plugin.rewards.judges.relevance import JudgedRelevance

KEY = "sk-test-0123456789"


RECORD = {
    "conversations": [
        {"from": "human", "value": "<image>\nIs there anything abnormal?"},
        {"from": "gpt", "value": "One abnormal area at [0.10, 0.20, 0.30, 0.40]. It is a nodule."},
    ]
}


def flags(server: Any = None, **changes: Any) -> UmedFlags:
    """Flags of stage 2 with a judge at ``server``, or with the default judge."""
    judge = {"umed_judge": "openai:the-model", "umed_judge_base_url": server.url} if server else {}
    return UmedFlags(**{"umed_stage": "rewarding", "umed_judge_retries": 0, **judge, **changes})


def call(judge: JudgedRelevance, *answers: str) -> list[float | None]:
    """The scores of answers to `RECORD`."""
    return judge(["q"] * len(answers), list(answers), record=[RECORD] * len(answers))
