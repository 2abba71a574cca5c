"""What the replies in a ledger have cost, and whether a budget allows more requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from umed_plugin.remote import settings
from umed_plugin.remote.ledger import Ledger


@dataclass(frozen=True)
class Account:
    """A ledger with the budget and prices of its replies.

    Args:
        ledger: earlier replies; new ones are added to it.
        budget: amount and unit (``requests``, ``tokens``, ``usd``). A limit for all replies in the ledger together; in
            ``usd`` for those of the ledger's model, whose prices are known.
        prices: US dollars per million prompt tokens and per million completion tokens.
    """

    ledger: Ledger
    budget: tuple[float, str] | None = None
    prices: tuple[float, float] | None = None

    @property
    def spent_usd(self) -> float | None:
        """US dollars for the model's replies in the ledger; None if no prices are known."""
        return None if self.prices is None else settings.cost(self.ledger.counts_in("usd"), self.prices)

    @property
    def unpriced(self) -> int:
        """Number of other models' replies in the ledger, of which no price is known."""
        return self.ledger.counts["requests"] - self.ledger.counts_in("usd")["requests"]

    def over_budget(self, more: Mapping[str, int]) -> str | None:
        """A message if ``more`` requests and tokens, added to those in the ledger, would exceed the budget; else None."""
        if self.budget is None:
            return None
        limit, unit = self.budget
        used = Counter(self.ledger.counts_in(unit))
        used.update(more)
        if settings.spent(used, unit, self.prices) <= limit:
            return None
        return f"the budget of {limit:g} {unit} does not allow another request"
