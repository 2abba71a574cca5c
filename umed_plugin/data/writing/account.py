"""What the replies in a ledger have taken, and whether a budget has room for more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from umed_plugin.remote import settings
from umed_plugin.remote.ledger import Ledger


@dataclass(frozen=True)
class Account:
    """A ledger and what its replies may cost.

    Args:
        ledger: replies that are there already, and where new ones go.
        budget: amount and unit (``requests``, ``tokens``, ``usd``) that all replies in the ledger together may reach.
        prices: US dollars for a million tokens read and written.
    """

    ledger: Ledger
    budget: tuple[float, str] | None = None
    prices: tuple[float, float] | None = None

    @property
    def spent_usd(self) -> float | None:
        """US dollars for all replies in the ledger, where prices are known."""
        return None if self.prices is None else settings.cost(self.ledger.counts, self.prices)

    def no_room_for(self, more: Mapping[str, int]) -> str | None:
        """That the budget has no room for ``more`` requests and tokens beside those in the ledger; None while it has."""
        if self.budget is None:
            return None
        limit, unit = self.budget
        used = Counter(self.ledger.counts)
        used.update(more)
        if settings.spent(used, unit, self.prices) <= limit:
            return None
        return f"the budget of {limit:g} {unit} has no room for another request"
