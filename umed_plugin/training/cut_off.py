"""Answers that ``--umed_max_new_tokens`` cuts off before they end, and what ``--umed_cut_off`` does with them.

- ``keep``: nothing. A cut-off answer is rewarded like any other, so nothing teaches the policy to end.
- ``mask``: it is left out of the loss, also of its KL, entropy and value terms, and out of all statistics of the advantages: the
  maximum that normalises a reward, mean and standard deviation of its question (grpo), whitening (ppo). A question with fewer
  than two answers left teaches grpo nothing.
- ``penalise``: its reward becomes ``r - sum of --umed_reward_weights`` (of this step). Every shipped reward lies in 0..1, so with
  ``max`` and ``none`` no cut-off answer gets more than an ended one. If all answers to a question are cut off, grpo's advantages
  are those of ``keep``.

TRL has both as options (``mask_truncated_completions``, which keeps the statistics, and ``missing_eos_penalty``). The paper has
neither.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from umed_plugin.model.forward import Candidates

POLICIES = ("keep", "mask", "penalise")


def ended(candidates: Candidates, eos_token_id: int) -> Tensor:
    """bool [N]: whether an answer ends with EOS; one that is cut off does not."""
    return (candidates.token_ids.eq(eos_token_id) & candidates.mask.bool()).any(dim=1)


@dataclass(frozen=True)
class CutOff:
    """What happens to the rewards of a rollout.

    Attributes:
        policy: one of `POLICIES`.
        penalty: what ``penalise`` subtracts, in units of the reward, above 0.
    """

    policy: str
    penalty: float

    def counted(self, ended: Tensor) -> Tensor | None:
        """bool [N] answers that are learnt from; None for all of them."""
        return ended if self.policy == "mask" else None

    def rewards(self, rewards: Tensor, ended: Tensor) -> Tensor:
        """[Q, K] rewards after the penalty; ``ended`` is bool [N]."""
        if self.policy != "penalise":
            return rewards
        return rewards - self.penalty * (~ended).view_as(rewards).to(rewards)
