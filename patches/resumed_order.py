"""Let a resumed run continue with the sample order of the epoch in which it was stopped.

Target: `Trainer._run_epoch` of transformers 5.
Why: on resume, transformers 4 iterates the sampler once for each epoch that was trained before; transformers 5 does not. Then a
sampler whose order depends on the number of epochs begun (ours) gives the resumed run the batches of another epoch.
Versions: transformers 5.
Delete when: transformers tells every sampler which epoch begins, also with skipped batches and in several processes.
"""

from __future__ import annotations

from typing import Any

from umed_plugin.patches.training_run import ON_5, TRANSFORMERS_5
from umed_plugin.patching import Patch, Recorder, Target


def change(recorder: Recorder) -> None:
    """Wrap the method."""
    from transformers import Trainer

    from umed_plugin.training.sampler import sampler_in

    stock = Trainer._run_epoch

    def _run_epoch(self: Any, *, epoch: int, train_dataloader: Any, epochs_trained: int, **keywords: Any) -> Any:
        if epoch == epochs_trained:
            sampler = sampler_in(train_dataloader)
            for _ in range(epochs_trained):
                iter(sampler)  # only begins an epoch: PyTorch's own samplers draw nothing before the first index
        return stock(self, epoch=epoch, train_dataloader=train_dataloader, epochs_trained=epochs_trained, **keywords)

    recorder.replace(Trainer, "_run_epoch", _run_epoch)


PATCH = Patch(
    name="resumed_order",
    targets=(
        Target(
            "transformers.trainer:Trainer._run_epoch",
            TRANSFORMERS_5,
            ("31aff00f34c302a241b458727e59ae4befab906c51632831b90f6dac4357b823",),
        ),
        Target(
            "transformers.trainer:Trainer._inner_training_loop",
            TRANSFORMERS_5,
            ("20ec4276e99fe7aee4db57e6d2dbe9455982362f051a96c9a1be3e6190d7a90a",),
        ),
    ),
    why="transformers 5 does not advance the sampler to the current epoch, so a resumed run sees batches of another epoch",
    delete_when="transformers tells every sampler which epoch begins",
    change=change,
    trigger="transformers.trainer",
    needed=ON_5,
)
