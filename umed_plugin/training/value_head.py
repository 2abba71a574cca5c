"""The value network of PPO: one linear layer on the policy's last hidden states, at the positions that predict the answer.

It shares the policy's pass, and its gradient flows into the policy's trunk, as in TRL. The layer is not a module of the model, so
no state dict, adapter, configuration or export can contain it. The trainer handles its gradient as it does the model's
(see `umed_plugin.training.trainer`), and `value_head.safetensors` lies beside a checkpoint's other files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from umed_plugin.errors import UmedError

VALUE_HEAD = "value_head.safetensors"


class ValueHead(nn.Module):
    """``V(s_t) = w . h_t + b`` in float32.

    Departure from LLaVA-RLHF and TRL, whose value networks start at 0 or at random: this one starts at the mean reward of the
    first rollout (`begin_at`). From 0, the value loss of the first steps is one large constant. Its gradient turns the shared
    trunk away from what the policy knows. In the demo, held-out IoU then fell by 0.017 instead of rising by 0.026 (seed 1).

    Args:
        hidden_size: H.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[N, T, H] states from which each answer token is predicted -> [N, T] values, float32 also under autocast."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.linear(hidden_states.float()).squeeze(-1)

    def is_new(self) -> bool:
        """Whether it has neither been started by `begin_at` nor loaded."""
        return not (self.linear.weight.any() or self.linear.bias.any())

    @torch.no_grad()
    def begin_at(self, mean: float) -> None:
        """Predict ``mean`` everywhere."""
        self.linear.bias.fill_(mean)

    def save(self, folder: Path) -> None:
        """Write `value_head.safetensors` into a folder."""
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / VALUE_HEAD)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            UmedError: the file does not exist, or the layer has another size.
        """
        file = folder / VALUE_HEAD
        if not file.is_file():
            raise UmedError(
                f"{folder}: has no {VALUE_HEAD}. It was written by another --umed_algorithm than ppo, or with --save_only_model "
                "by an earlier release. Resume with the algorithm that the run was started with, or choose another --output_dir."
            )
        weights, own = load_file(file), self.state_dict()
        shapes, own_shapes = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (weights, own))
        if shapes != own_shapes:
            raise UmedError(f"{file}: holds {shapes}, but this model's value head is {own_shapes}. Check --output_dir.")
        self.load_state_dict(weights)
