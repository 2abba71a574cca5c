"""Asking models behind an OpenAI-compatible server for money, for the judge and the writer of diagnoses alike.

:mod:`~umed_plugin.remote.client` asks, :mod:`~umed_plugin.remote.ledger` keeps every reply that was paid for,
:mod:`~umed_plugin.remote.replies` says what can come back.
"""
