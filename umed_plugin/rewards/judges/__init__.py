"""Judges: who says how relevant an answer is to the reference diagnosis (``r_llm`` of the paper), chosen by ``--umed_judge``.

- ``lexical`` and ``classes``: :mod:`umed_plugin.rewards.judges.lexical`, names and words of the two texts, or names alone; local.
- ``openai:MODEL``: :mod:`umed_plugin.rewards.judges.relevance`, a language model behind any OpenAI-compatible server. What
  leaves the
  machine is text: question, reference diagnosis and answer, boxes blotted out; never pixels, never a header.
- ``replay:FILE``: the same from the ledger of an earlier run alone, without a network.

In the order in which things happen: :mod:`~umed_plugin.rewards.judges.question` writes what is asked and reads the reply,
:mod:`umed_plugin.remote` asks the server and keeps every reply that was paid for,
:mod:`~umed_plugin.rewards.judges.relevance` is the reward.
"""
