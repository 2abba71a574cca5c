"""Greedy answers written by a rollout server, for `umed evaluate --server`: the client of stage 2, with one answer a question.

The checkpoint is loaded here too. It embeds the prompts, scores the options of closed questions, and reads attention. Its
log-probabilities of the first batch's answers are compared with the server's, so that no other model answers unnoticed.
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

from umed_plugin.model.forward import Candidates, PromptBatch, answer_pass
from umed_plugin.model.output_layer import Scoring
from umed_plugin.model.sampling import SamplingSettings
from umed_plugin.model.server_sampling import (
    difference_fault,
    mean_difference,
    sample_on_server,
    vocabulary_of,
    write_adapter,
)
from umed_plugin.remote.rollout_server import RolloutServer, RolloutServerError

MAX_DIFFERENCE = 0.1  # nats a token; see --umed_rollout_max_difference


class ServerWriter:
    """Writes answers on a server.

    Args:
        server: where the checkpoint's language model is served.
        model: the checkpoint here; its adapter, if it has one, is loaded there until this process ends.
        adapters: folder for the adapter, which the server must see too; None: a temporary one that this user alone can read.

    Raises:
        RolloutServerError: the server cannot be used.
        UmedError: the adapter cannot be written.
    """

    def __init__(self, server: RolloutServer, model: Any, adapters: Path | None = None) -> None:
        self._server, self._model, self._compared = server, model, False
        self._name = server.base_model()
        if hasattr(model, "peft_config"):
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
        if not self._compared:
            scores = answer_pass(self._model, prompts, answers.candidates, scoring=Scoring()).scores
            assert scores is not None
            difference = mean_difference(scores.log_probs, answers.log_probs, answers.candidates.mask)
            fault = difference_fault(difference, MAX_DIFFERENCE, self._server.url)
            if fault is not None:
                raise RolloutServerError(fault)
            self._compared = True
        return answers.candidates

    def _forget(self, folder: Path) -> None:
        with suppress(RolloutServerError):
            self._server.unload_adapter(self._name)
        shutil.rmtree(folder, ignore_errors=True)
