"""Where a resumed run goes on, compared with a walk over all batches; tests/training/test_accumulation.py has whole runs."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from umed_plugin.patches.resumed_batches import _resumed
from umed_plugin.training.sampler import EpochSampler

RECORDS = 11


def dealt(processes: int = 1, rank: int = 0):
    Accelerator(cpu=True)  # its state is asked for the device
    loader = DataLoader(range(RECORDS), 1, sampler=EpochSampler(RECORDS, 0))
    return prepare_data_loader(loader, num_processes=processes, process_index=rank, put_on_device=False)


def trainer(accumulation: int, said: list[str]):
    args = SimpleNamespace(gradient_accumulation_steps=accumulation, process_index=0, ignore_data_skip=False)
    return SimpleNamespace(args=args, add_callback=lambda callback: None, _load_rng_state=said.append)


def taken(loader, epochs: int) -> list[int]:
    return [int(index) for _ in range(epochs) for batch in loader for index in batch]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9, 20])
@pytest.mark.parametrize(("accumulation", "processes", "rank"), [(2, 1, 0), (3, 1, 0), (4, 1, 0), (4, 2, 1), (5, 2, 0)])
def test_a_resumed_run_takes_every_batch_behind_its_last_step(accumulation, processes, rank, steps):
    length = len(dealt(processes, rank))
    assert length % accumulation
    told: list[str] = []
    resuming = trainer(accumulation, told)
    loader = _resumed(resuming, dealt(processes, rank), steps, "checkpoint")
    assert resuming.args.ignore_data_skip and len(loader) == length
    whole = taken(dealt(processes, rank), 40)[steps * accumulation :]
    # transformers asks for one epoch fewer for each that it believes to be over.
    found = taken(loader, 40 - steps // (length // accumulation))
    assert found == list(islice(whole, len(found))) and len(found) >= len(whole) - length
    inside = steps * accumulation % length != 0
    assert told == (["checkpoint"] if inside else []), "where an epoch begins, transformers loads the random state"


def test_epochs_of_whole_steps_are_left_alone(capsys):
    loader = dealt()
    assert _resumed(trainer(11, []), loader, 3, "checkpoint") is loader
    assert capsys.readouterr().err == ""
