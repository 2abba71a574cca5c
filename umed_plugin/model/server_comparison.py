"""Whether a rollout server holds the model of this process: both give log-probabilities of the server's own answers.

Two questions are asked of the mean distance between them, in nats a token:

- **Is it small?** In float32 rounding makes it less than 1e-5, and in 16 bits about 0.01. Another model is farther away, but how
  far depends on the models. So the user may set the largest distance.
- **Is the server nearer to the model without its adapter?** Then it accepts adapters and does not apply them. A young adapter
  changes little, and the first question alone would not notice. Rounding blurs both distances alike. So the answer is yes only
  over `LEAST_TOKENS` tokens, with one distance less than half of the other and `ROUNDING` between them.

What is not noticed: an adapter that changes less than rounding does, and an adapter of an earlier step that is nearer to today's
than to none. The importance weights of stage 2 correct for both, and it logs both distances.
"""

from __future__ import annotations

COMPARED_EVERY = 5  # rollouts of stage 2: the pass without the adapter costs as much as the reference policy's
LEAST_TOKENS = 256  # fewer may lie nearer to the wrong model by chance
ROUNDING = 0.01  # nats a token, in 16 bits


class ServerComparison:
    """Compares a server's model with this process's, over batches of answers as they come.

    Args:
        url: of the server.
        most: largest mean distance of the log-probabilities, in nats a token.
        flag: of the command that sets ``most``, for messages.
    """

    def __init__(self, url: str, most: float, flag: str) -> None:
        self._url, self._most, self._flag = url, most, flag
        self._tokens, self._sum, self._sum_without_adapter = 0, 0.0, 0.0

    def fault(self, tokens: int, difference: float, without_adapter: float | None = None) -> str | None:
        """Take in a batch of answers, and say why the server's model cannot be this one; None if it can.

        Args:
            tokens: number of tokens in the answers.
            difference: mean distance of the server's log-probabilities from this process's, in nats a token.
            without_adapter: the same from the model with its adapter off; None if it has none, or it was not measured.
        """
        if not difference <= self._most:  # NaN too
            if _is_nearer(without_adapter, difference):
                return self._adapter_fault(difference, without_adapter)
            return self._model_fault(difference)
        if without_adapter is None:
            return None
        self._tokens += tokens
        self._sum += tokens * difference
        self._sum_without_adapter += tokens * without_adapter
        if self._tokens < LEAST_TOKENS:
            return None
        difference, without_adapter = self._sum / self._tokens, self._sum_without_adapter / self._tokens
        self._tokens, self._sum, self._sum_without_adapter = 0, 0.0, 0.0
        return self._adapter_fault(difference, without_adapter) if _is_nearer(without_adapter, difference) else None

    def _model_fault(self, difference: float) -> str:
        return (
            f"{self._url}: its log-probabilities of its own answers differ from ours by {difference:.2g} nats a token on "
            f"average. Allowed: {self._most:g} ({self._flag}). It holds another model or adapter, or lacks --logprobs-mode "
            "processed_logprobs. Start it from the checkpoint that is in use here: umed rollout-server CKPT"
        )

    def _adapter_fault(self, difference: float, without_adapter: float | None) -> str:
        return (
            f"{self._url}: accepts the adapter, but answers without it. Its log-probabilities of its own answers differ from "
            f"those of the model with its adapter off by {without_adapter:.2g} nats a token, and with it by {difference:.2g}. "
            "Look for warnings about LoRA in what the server prints, and for a proxy that asks another server. Start it from the "
            "checkpoint below the adapter: umed rollout-server CKPT"
        )


def _is_nearer(without_adapter: float | None, difference: float) -> bool:
    """Whether the distance without the adapter is the smaller one, by more than rounding."""
    return without_adapter is not None and without_adapter < difference / 2 and difference - without_adapter > ROUNDING
