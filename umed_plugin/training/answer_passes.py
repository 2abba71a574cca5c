"""The passes of policy and reference over sampled answers: steps 3 and 4 of `umed_plugin.training.experience_maker`.

Where a rollout server has sampled them, some rollouts have one more: of the policy with its adapter off. It differs from the
reference by what else has been trained, such as the projector, which no server holds. `umed_plugin.model.server_comparison`
compares both.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from umed_plugin.data.records import Record
from umed_plugin.model.attention import attention_on_lesion
from umed_plugin.model.forward import AnswerPass, Candidates, PromptBatch, answer_pass, base_llava, embed_prompts
from umed_plugin.model.output_layer import Scoring
from umed_plugin.training.candidate_sampling import Lesions, Queries
from umed_plugin.training.reference import ReferencePolicy
from umed_plugin.training.value_head import ValueHead


@dataclass(frozen=True)
class Scores:
    """What the passes over N answers give, as in `Samples`; ``attention`` has N shares of attention on the lesion."""

    attention: Sequence[float | None]
    log_probs: Tensor | None
    values: Tensor | None
    reference_log_probs: Tensor | None
    log_probs_without_adapter: Tensor | None


@dataclass(frozen=True)
class AnswerPasses:
    """Which passes a run makes, and how.

    Attributes:
        scoring: of the logits.
        packed: as in `umed_plugin.model.forward.answer_pass`.
        value_head: for PPO, or None.
        reference: for the KL, or None.
        needs_log_probs: whether the log-probabilities of the old policy are needed before the update's own pass.
        lesions: where vision relevance looks, if a pass has to measure it; or None.
    """

    scoring: Scoring
    packed: bool
    value_head: ValueHead | None
    reference: ReferencePolicy | None
    needs_log_probs: bool
    lesions: Lesions | None

    def scores(
        self, policy: Any, queries: Queries, candidates: Candidates, learning: bool, without_adapter: bool = False
    ) -> Scores:
        """The passes of policy and reference over the candidates of one batch.

        Args:
            policy: unwrapped.
            queries, candidates: of the batch.
            learning: the mode that updates run in.
            without_adapter: whether the policy makes a pass with its adapter off, too.
        """
        prompts = embed_prompts(policy, queries.prompt_ids, queries.features)
        attention, outputs = self._attend(policy, prompts, candidates, queries.records)
        outputs = self._old_policy(policy, prompts, candidates, outputs, learning)
        needs_log_probs = outputs is not None and self.needs_log_probs
        return Scores(
            attention,
            _log_probs(outputs) if needs_log_probs and outputs is not None else None,
            None if self.value_head is None or outputs is None else self.value_head(outputs.hidden),
            self._reference_log_probs(policy, queries, candidates, learning),
            self._log_probs_without_adapter(policy, prompts, candidates, learning) if without_adapter else None,
        )

    @contextmanager
    def _as_updates_run(self, policy: Any, learning: bool) -> Iterator[None]:
        """The mode of the updates, for passes whose log-probabilities are compared with theirs.

        Under gradient checkpointing the updates take another path through the model, and the rounding of the two paths differs:
        ratios would not begin at 1, and the KL of an untouched policy not at 0. ``learning``: the mode in which the step began.
        """
        policy.train(learning and base_llava(policy).is_gradient_checkpointing)
        try:
            with warnings.catch_warnings():
                # Checkpoints warn of a pass without gradient, which this one is on purpose.
                warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
                yield
        finally:
            policy.eval()

    def _attend(
        self, policy: Any, prompts: PromptBatch, candidates: Candidates, records: Sequence[Record]
    ) -> tuple[Sequence[float | None], AnswerPass | None]:
        """N shares of attention on the lesion and the outputs of the pass that has them; no pass if it is not needed."""
        if self.lesions is None:
            return [None] * len(candidates.mask), None
        shares, outputs = attention_on_lesion(
            policy,
            prompts,
            candidates,
            self.lesions.naming_tokens(candidates, records),
            self.lesions.cover(records),
            self.lesions.settings,
            packed=self.packed,
            scoring=self.scoring,
        )
        return shares.tolist(), outputs

    def _old_policy(
        self, policy: Any, prompts: PromptBatch, candidates: Candidates, outputs: AnswerPass | None, learning: bool
    ) -> AnswerPass | None:
        """The pass that gives old log-probabilities and values; None if nothing of it is needed.

        ``outputs`` of a pass in evaluation mode serve, unless their log-probabilities are compared with those of another mode.
        """
        compared = self.needs_log_probs
        if self.value_head is None and not compared:
            return None
        with self._as_updates_run(policy, learning and compared):
            if outputs is not None and not policy.training:
                return outputs
            return answer_pass(policy, prompts, candidates, packed=self.packed, scoring=self.scoring)

    def _reference_log_probs(
        self, policy: Any, queries: Queries, candidates: Candidates, learning: bool
    ) -> Tensor | None:
        """[N, T] under the reference policy, or None without a KL."""
        if self.reference is None:
            return None
        with self._as_updates_run(policy, learning), self.reference.as_reference(policy):
            # The projector is trained, so the prompts are embedded anew under the reference.
            prompts = embed_prompts(policy, queries.prompt_ids, queries.features)
            return _log_probs(answer_pass(policy, prompts, candidates, packed=self.packed, scoring=self.scoring))

    def _log_probs_without_adapter(
        self, policy: Any, prompts: PromptBatch, candidates: Candidates, learning: bool
    ) -> Tensor:
        """[N, T] under the policy with its adapter off, behind the same embedded prompts."""
        with self._as_updates_run(policy, learning), policy.disable_adapter():
            return _log_probs(answer_pass(policy, prompts, candidates, packed=self.packed, scoring=self.scoring))


def batches_of(queries: Queries, candidates: Candidates, sizes: Sequence[int]) -> Iterator[tuple[Queries, Candidates]]:
    """The queries of each batch, ``sizes`` of them, and their candidates, without columns that contain only padding."""
    each, first = len(candidates.mask) // len(queries.records), 0
    for size in sizes:
        rows = slice(first * each, (first + size) * each)
        tokens = int(candidates.mask[rows].sum(dim=1).max())
        part = Candidates(candidates.token_ids[rows, :tokens], candidates.mask[rows, :tokens])
        yield queries.part(first, size), part
        first += size


def _log_probs(outputs: AnswerPass) -> Tensor:
    assert outputs.scores is not None
    return outputs.scores.log_probs
