"""Who samples the K answers of a rollout: this process, or a rollout server. Both answer `RolloutEngine.sample`.

`ServerRollouts` publishes the adapter first, whenever it has learnt since the last rollout. Each version has a new name and a new
folder, because a server keeps the KV cache of a prompt under its adapter's name. The old version is unloaded and deleted. With
several processes each sends its own prompts, and the first one publishes.

A process whose server fails must not leave the others waiting for it: `agreed` lets all processes raise the same error together.
`umed_plugin.training.trainer` then saves a checkpoint and ends.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Protocol

from torch import Tensor

from umed_plugin.errors import UmedError, note
from umed_plugin.files import text_bytes
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.model.forward import Candidates, PromptBatch
from umed_plugin.model.sampling import SamplingSettings, generate
from umed_plugin.model.server_sampling import sample_on_server, vocabulary_of, write_adapter
from umed_plugin.remote.rollout_server import RolloutServer, RolloutServerError
from umed_plugin.training.finite_weights import raised_by_all
from umed_plugin.training.stopping import raised_together

ADAPTERS = "rollout_adapters"
_PREFIX = "umed-"
_NAMES = 2**24  # a float32 holds each of them exactly


class RolloutEngine(Protocol):
    """Samples answers for a rollout.

    Attributes:
        in_process: whether this process samples, so that its KV cache can be read.
    """

    in_process: bool

    def prepare(self, policy: Any, step: int) -> None:
        """Make the policy after ``step`` optimizer steps the one that samples. All ranks call, parameters gathered."""

    def agreed(self) -> AbstractContextManager[None]:
        """A block around what may fail on one rank alone. All ranks enter it."""

    def sample(self, policy: Any, prompts: PromptBatch) -> tuple[Candidates, Optional[Tensor]]:
        """K answers to each prompt; with [N, T] log-probabilities if another program has sampled them."""

    def close(self) -> None:
        """Free what the engine holds outside this process."""


@dataclass(frozen=True)
class Ranks:
    """What an engine needs of the other processes; every rank calls each function.

    Attributes:
        is_first: whether this is the first rank.
        on_any: whether a condition is true on at least one rank.
        of_first: the first rank's number.
    """

    is_first: bool
    on_any: Callable[[bool], bool]
    of_first: Callable[[float], float]


@dataclass
class OwnRollouts:
    """This process samples, with the weights that learn.

    Attributes:
        settings: of sampling.
        ranks: the other processes.
    """

    settings: SamplingSettings
    ranks: Ranks
    in_process: bool = True

    def prepare(self, policy: Any, step: int) -> None:
        """Nothing to do."""

    def agreed(self) -> AbstractContextManager[None]:
        """Let all ranks raise if the policy of one of them computes no finite numbers.

        Raises:
            NotFiniteError: on all ranks.
        """
        return raised_by_all(self.ranks.on_any)

    def sample(self, policy: Any, prompts: PromptBatch) -> tuple[Candidates, Optional[Tensor]]:
        return generate(policy, prompts, self.settings), None

    def close(self) -> None:
        """Nothing to do."""


class ServerRollouts:
    """A rollout server samples.

    Args:
        server: where.
        settings: K, temperature and length.
        folder: where adapters are written; the server reads them there.
        ranks: the other processes.

    Raises:
        RolloutServerError: the server cannot be reached, on all ranks.
    """

    in_process = False

    def __init__(self, server: RolloutServer, settings: SamplingSettings, folder: Path, ranks: Ranks) -> None:
        self._server, self._settings, self._folder, self._ranks = server, settings, folder, ranks
        self._published: tuple[str, int] | None = None
        with self.agreed():
            model = server.base_model()
            if ranks.is_first:
                note(f"{server.url} samples the answers, with the model {model!r}.")
                self._remove_left_over()

    def agreed(self) -> AbstractContextManager[None]:
        """Let all ranks raise if the server fails one of them, or if a folder of adapters cannot be written.

        Raises:
            RolloutServerError: on all ranks.
        """
        elsewhere = "the rollout server failed another process; its message says why."
        return raised_together(self._ranks.on_any, RolloutServerError, elsewhere, (UmedError, OSError))

    def prepare(self, policy: Any, step: int) -> None:
        """Publish the adapter if it is another one than at the last call."""
        if self._published is not None and self._published[1] == step:
            return
        number = int(self._ranks.of_first(secrets.randbelow(_NAMES)))
        name = f"{_PREFIX}{number:06x}-step-{step}"
        with self.agreed():
            _refuse_untold(policy)
            if self._ranks.is_first:
                self._server.load_adapter(name, self._write(policy, name))
        before, self._published = self._published, (name, step)
        if before is not None and self._ranks.is_first:
            self._remove(before[0])

    def sample(self, policy: Any, prompts: PromptBatch) -> tuple[Candidates, Optional[Tensor]]:
        assert self._published is not None, "`prepare` comes first"
        answers = sample_on_server(self._server, self._published[0], prompts, self._settings, vocabulary_of(policy))
        return answers.candidates, answers.log_probs

    def close(self) -> None:
        """Unload and delete the adapter, also where the server is gone."""
        if self._published is not None and self._ranks.is_first:
            self._remove(self._published[0])
            with suppress(OSError):
                self._folder.rmdir()
        self._published = None

    def _write(self, policy: Any, name: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return write_adapter(policy, self._folder / name)

    def _remove(self, name: str) -> None:
        """Take an adapter from the server and the disk; a server that is gone holds it no more."""
        with suppress(RolloutServerError):
            self._server.unload_adapter(name)
        shutil.rmtree(self._folder / name, ignore_errors=True)

    def _remove_left_over(self) -> None:
        """Remove the adapters of a run that was killed."""
        for left in sorted(self._folder.glob(f"{_PREFIX}*-step-*")):
            self._remove(left.name)


def rollout_engine(
    flags: UmedFlags, settings: SamplingSettings, output_dir: str | Path, ranks: Ranks
) -> OwnRollouts | ServerRollouts:
    """The engine that the flags name."""
    if flags.umed_rollout_server is None:
        return OwnRollouts(settings, ranks)
    server = RolloutServer(
        flags.umed_rollout_server.rstrip("/"), flags.umed_rollout_timeout, flags.umed_rollout_retries
    )
    return ServerRollouts(server, settings, _folder_of(flags, Path(output_dir)), ranks)


def _folder_of(flags: UmedFlags, output_dir: Path) -> Path:
    """Where a run writes its adapters: below a folder that runs share, each has its own, which it tidies when it starts."""
    if flags.umed_rollout_adapters is None:
        return output_dir / ADAPTERS
    run = hashlib.sha256(text_bytes(str(output_dir.resolve()))).hexdigest()[:8]
    return Path(flags.umed_rollout_adapters) / f"{_PREFIX}run-{run}"


def _refuse_untold(policy: Any) -> None:
    """Refuse trained weights that no server would learn of: all but the adapter, the projector and the prompts' embeddings."""
    told = ("lora_", "mm_projector", "embed_tokens", "vision_tower")
    untold = [
        name for name, p in policy.named_parameters() if p.requires_grad and not any(part in name for part in told)
    ]
    if untold:
        raise UmedError(
            f"--umed_rollout_server: this run also trains {untold[0]} ({len(untold)} such weights), which an adapter does not "
            "hold. Train with --lora_enable True alone, or sample here."
        )
