"""Asking models behind an OpenAI-compatible server for money, for the judge and the writer of diagnoses alike.

:mod:`~umed_plugin.asking.client` asks, :mod:`~umed_plugin.asking.ledger` keeps every reply that was paid for,
:mod:`~umed_plugin.asking.replies` says what can come back.
"""
