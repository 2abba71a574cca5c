"""Questions for a report on an image; the answer is the report itself, as its file has it."""

from __future__ import annotations

import random

WRITER = "reports-1"

QUESTIONS = (
    "Write the report of this study.",
    "Report what this image shows.",
    "What would a radiologist report here?",
    "Dictate the findings of this study.",
    "Describe all findings of this image in a report.",
)


def write_report_conversation(report: str, rng: random.Random) -> list[dict[str, str]]:
    r"""LLaVA's ``conversations``: a human turn that starts with ``<image>``, and the report as the gpt turn.

    Args:
        report: its text.
        rng: selects the question. Seed it per record, so that a build can be repeated.

    Example:
        >>> write_report_conversation("The lungs are clear.", random.Random(0))[1]
        {'from': 'gpt', 'value': 'The lungs are clear.'}
    """
    return [{"from": "human", "value": f"<image>\n{rng.choice(QUESTIONS)}"}, {"from": "gpt", "value": report}]
