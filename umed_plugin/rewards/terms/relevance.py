"""Relevance of an answer to the reference diagnosis, by the default judge; ``--umed_judge`` chooses another one."""

from __future__ import annotations

from umed_plugin.grounding.answer_types import asks_for_names
from umed_plugin.rewards.contract import register_reward
from umed_plugin.rewards.judges.lexical import lexical_relevance

relevance = register_reward("relevance", applies_to=asks_for_names)(lexical_relevance)
