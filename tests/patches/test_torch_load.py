"""Pickles of a checkpoint run no code when they are loaded, and the states of a real run still load."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support.canaries import DISGUISED, KINDS, hostile

from umed_plugin import patching
from umed_plugin.errors import UmedError
from umed_plugin.patches import torch_load

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def load_as(caller: str, file: Path):
    """`torch.load` called from a module of that name."""
    namespace = {"__name__": caller, "torch": torch, "file": str(file)}
    exec("result = torch.load(file, map_location='cpu', weights_only=False)", namespace)
    return namespace["result"]


CALLERS = (
    "llava.model.builder",
    "transformers.trainer",
    "peft.peft_model",
    "accelerate.utils",
    "deepspeed.runtime.engine",
)


@pytest.mark.parametrize("kind", [*KINDS, *DISGUISED])
def test_pickles_of_a_checkpoint_run_no_code(kind, tmp_path):
    """Also where the caller switches the check off, as DeepSpeed does."""
    patching.apply([torch_load.PATCH])
    for name in ("mm_projector.bin", "rng_state.pth"):
        file = hostile(kind, tmp_path / name, tmp_path / "canary")
        for caller in CALLERS:
            with pytest.raises(UmedError, match=f"{name}: .*It was not loaded") as told:
                load_as(caller, file)
            assert "weights_only" not in str(told.value)
    assert not (tmp_path / "canary").exists()


def test_other_callers_load_as_they_please(tmp_path):
    patching.apply([torch_load.PATCH])
    load_as("somebody.else", hostile("reduce", tmp_path / "own.bin", tmp_path / "canary"))
    assert (tmp_path / "canary").exists()


def test_states_of_a_real_run_load(tmp_path):
    patching.apply([torch_load.PATCH])
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 1, 10)
    states = {
        "optimizer.pt": optimizer.state_dict(),
        "scheduler.pt": scheduler.state_dict(),
        "non_lora_trainables.bin": {"w": torch.ones(2, dtype=torch.bfloat16)},
    }
    for name, state in states.items():
        torch.save(state, tmp_path / name)
        assert str(load_as("transformers.trainer", tmp_path / name)) == str(state)
    random_states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    torch.save(random_states, tmp_path / "rng_state_0.pth")
    loaded = load_as("transformers.trainer", tmp_path / "rng_state_0.pth")
    np.random.set_state(loaded["numpy"])
    random.setstate(loaded["python"])
    assert torch.equal(loaded["cpu"], random_states["cpu"])
    assert np.array_equal(loaded["numpy"][1], random_states["numpy"][1])
