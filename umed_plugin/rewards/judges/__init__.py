"""Judges score how relevant an answer is to the reference diagnosis (``r_llm`` of the paper); ``--umed_judge`` chooses one.

- ``lexical`` and ``classes``: :mod:`umed_plugin.rewards.judges.lexical`, local. They compare names and words, or names only.
- ``openai:MODEL``: :mod:`umed_plugin.rewards.judges.relevance`, a language model behind any OpenAI-compatible server. Only text
  leaves the machine: question, reference diagnosis and answer, with boxes blanked out. Pixels and headers never do.
- ``replay:FILE``: the same from the ledger of an earlier run, without a network.

In order of use: :mod:`~umed_plugin.rewards.judges.question` writes the judge's prompt and reads its reply,
:mod:`umed_plugin.remote` sends it and keeps every reply that was paid for, :mod:`~umed_plugin.rewards.judges.relevance` is the
reward.
"""
