"""Greedy answers written by a rollout server, for `umed evaluate --server`: the client of stage 2, with one answer a question.

The checkpoint is loaded here too. It embeds the prompts, scores the options of closed questions, and reads attention. Its
log-probabilities of the first batches' answers are compared with the server's (`umed_plugin.model.server_comparison`), so that no
other model answers unnoticed.
"""

from __future__ import annotations

import atexit
import secrets
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from umed_plugin.errors import note
from umed_plugin.model.forward import Candidates, PromptBatch, answer_pass
from umed_plugin.model.output_layer import Scoring
from umed_plugin.model.sampling import SamplingSettings
from umed_plugin.model.server_comparison import LEAST_TOKENS, ServerComparison
from umed_plugin.model.server_sampling import (
    ServerAnswers,
    mean_difference,
    sample_on_server,
    vocabulary_of,
    write_adapter,
)
from umed_plugin.remote.rollout_server import RolloutServer, RolloutServerError
from umed_plugin.remote.settings import ROLLOUT_MAX_DIFFERENCE


class ServerWriter:
    """Writes answers on a server.

    Args:
        server: where the checkpoint's language model is served.
        model: the checkpoint here; its adapter, if it has one, is loaded there until this process ends.
        adapters: folder for the adapter, which the server must see too; None: a temporary one that this user alone can read.
        max_difference: largest mean distance of the log-probabilities, in nats a token.

    Raises:
        RolloutServerError: the server cannot be used.
        UmedError: the adapter cannot be written.
    """

    def __init__(
        self,
        server: RolloutServer,
        model: Any,
        adapters: Path | None = None,
        max_difference: float = ROLLOUT_MAX_DIFFERENCE,
    ) -> None:
        self._server, self._model = server, model
        self._comparison = ServerComparison(server.url, max_difference, "--server-max-difference")
        self._compared = 0  # tokens
        self._name = server.base_model()
        self._has_adapter = hasattr(model, "peft_config")
        if self._has_adapter:
            self._name = f"umed-evaluate-{secrets.token_hex(4)}"
            place = adapters or Path(tempfile.mkdtemp(prefix="umed-evaluate-"))
            folder = place / self._name
            atexit.register(self._forget, folder if adapters else place)
            server.load_adapter(self._name, write_adapter(model, folder, server.adapters_flag))

    @torch.no_grad()
    def write(self, prompts: PromptBatch, max_new_tokens: int, eos_token_id: int) -> Candidates:
        """The greedy answer to each of Q prompts.

        Raises:
            RolloutServerError: the server fails, or holds another model.
        """
        settings = SamplingSettings(max_new_tokens=max_new_tokens, temperature=0.0, eos_token_id=eos_token_id)
        answers = sample_on_server(self._server, self._name, prompts, settings, vocabulary_of(self._model))
        if self._compared < LEAST_TOKENS:
            self._compare(prompts, answers)
        return answers.candidates

    def _compare(self, prompts: PromptBatch, answers: ServerAnswers) -> None:
        """Refuse another model, and say once how far the server's log-probabilities are from those here."""
        tokens, without_adapter = int(answers.candidates.mask.sum()), None
        difference = self._difference(prompts, answers)
        if self._has_adapter:
            with self._model.disable_adapter():
                without_adapter = self._difference(prompts, answers)
        fault = self._comparison.fault(tokens, difference, without_adapter)
        if fault is not None:
            raise RolloutServerError(fault)
        if not self._compared:
            of_base = (
                "" if without_adapter is None else f", and by {without_adapter:.2g} from those without the adapter"
            )
            note(
                f"{self._server.url}: over its first {tokens} tokens, its log-probabilities differ by {difference:.2g} nats a "
                f"token on average from those here{of_base}."
            )
        self._compared += tokens

    def _difference(self, prompts: PromptBatch, answers: ServerAnswers) -> float:
        """The mean distance of the server's log-probabilities from the model's as it is now."""
        scores = answer_pass(self._model, prompts, answers.candidates, scoring=Scoring()).scores
        assert scores is not None
        return mean_difference(scores.log_probs, answers.log_probs, answers.candidates.mask)

    def _forget(self, folder: Path) -> None:
        if 0 < self._compared < LEAST_TOKENS:
            note(
                f"{self._server.url}: its answers had {self._compared} tokens. Fewer than {LEAST_TOKENS} cannot show whether it "
                "applies the adapter."
            )
        with suppress(RolloutServerError):
            self._server.unload_adapter(self._name)
        shutil.rmtree(folder, ignore_errors=True)
