"""Paid requests to models behind an OpenAI-compatible server: the judge and the diagnosis writer share this package.

:mod:`~umed_plugin.remote.client` sends requests one by one, :mod:`~umed_plugin.remote.batch_api` sends them in batches,
:mod:`~umed_plugin.remote.ledger` keeps every reply that was paid for, :mod:`~umed_plugin.remote.replies` lists what a request
can return, and :mod:`~umed_plugin.remote.settings` reads the flags. :mod:`~umed_plugin.remote.rollout_server` stands apart:
it asks the user's own vLLM server for sampled answers, and nothing is paid.
"""
