"""Training of an anomaly map on a few normal images, with anomalies drawn anew in each step.

A step depends on the seed and its number alone, so a killed training goes on from its last kept state and ends with the same
weights. Departures from MediCLIP: the last state is taken, where MediCLIP takes the best epoch on its test set. Steps
are given in number, 16 images each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from umed_plugin import files
from umed_plugin.checkpoints.safe_loading import load_pickle
from umed_plugin.errors import warn
from umed_plugin.pseudo_boxes.anomaly_map import ABNORMAL, AnomalyMap, map_loss
from umed_plugin.pseudo_boxes.box_rule import QUANTILE
from umed_plugin.pseudo_boxes.synthesis import KINDS, Picture, anomaly
from umed_plugin.pseudo_boxes.tower import PatchTower

SAVE_EVERY = 25  # steps
_FORMAT = "map-1"  # raise it whenever the same settings give another map


@dataclass(frozen=True)
class MapSettings:
    """How a map is trained.

    Attributes:
        seed: of its weights and of the drawn anomalies.
        steps: optimizer steps.
        batch_size: images per step.
        learning_rate: of Adam, with betas 0.5 and 0.999.
        kinds: of anomalies, drawn evenly.
    """

    seed: int = 0
    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 1e-3
    kinds: tuple[str, ...] = KINDS


@dataclass(frozen=True)
class TrainedMap:
    """A map with what it says of normal images that it was not trained on.

    Attributes:
        level: 0.99 quantile of its values there, 0-1.
        highest: its highest value there, 0-1.
        key: digest of all that it depends on.
    """

    tower: PatchTower
    network: AnomalyMap
    level: float
    highest: float
    key: str

    @torch.no_grad()
    def of(self, pictures: Sequence[Picture]) -> np.ndarray:
        """The maps of images, float32 ``[B, S, S]`` in 0-1."""
        return _maps(self.tower, self.network, pictures)


def trained_map(
    tower: PatchTower,
    normals: Sequence[Picture],
    held_out: Sequence[Picture],
    settings: MapSettings,
    folder: Optional[Path] = None,
    progress: Optional[Callable[[int, int], None]] = None,
) -> TrainedMap:
    """Train a map, or read the one that an earlier call kept.

    Args:
        tower: whose patches it sees.
        normals: images to draw anomalies into, two at least.
        held_out: normal images that set the level, one at least.
        settings: how it is trained.
        folder: keeps the map, and the state of a training that was killed; None keeps nothing.
        progress: called with (steps done, steps in all).
    """
    key = _key(tower, normals, held_out, settings)
    kept = None if folder is None else folder / f"map-{key}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = AnomalyMap(tower.width, len(tower.depths)).to(tower.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate, betas=(0.5, 0.999))
    done = _resume(kept, network, optimizer) if kept is not None else 0
    for step in range(done, settings.steps):
        _step(tower, network, optimizer, normals, settings, step)
        if progress is not None:
            progress(step + 1, settings.steps)
        if kept is not None and ((step + 1) % SAVE_EVERY == 0 or step + 1 == settings.steps):
            _keep(kept, network, optimizer, step + 1)
    network.eval()
    values = np.concatenate([m[p.inside] for m, p in zip(_maps(tower, network, held_out), held_out)])
    level, highest = float(np.quantile(values, QUANTILE)), float(values.max())
    return TrainedMap(tower, network, level, highest, key)


def _step(
    tower: PatchTower,
    network: AnomalyMap,
    optimizer: torch.optim.Optimizer,
    normals: Sequence[Picture],
    settings: MapSettings,
    step: int,
) -> None:
    rng = np.random.default_rng([settings.seed, step])
    drawn = [anomaly(rng, normals, int(rng.integers(len(normals))), settings.kinds) for _ in range(settings.batch_size)]
    maps = network(tower.features([image for image, _ in drawn]), tower.side)
    changed = torch.from_numpy(np.stack([where for _, where in drawn]).astype(np.float32)).to(tower.device)
    optimizer.zero_grad()
    map_loss(maps, changed).backward()
    optimizer.step()


@torch.no_grad()
def _maps(tower: PatchTower, network: AnomalyMap, pictures: Sequence[Picture], batch_size: int = 16) -> np.ndarray:
    parts = []
    for start in range(0, len(pictures), batch_size):
        images = [picture.pixels for picture in pictures[start : start + batch_size]]
        parts.append(network(tower.features(images), tower.side)[:, ABNORMAL].cpu().numpy())
    return np.concatenate(parts)


def _key(tower: PatchTower, normals: Sequence[Picture], held_out: Sequence[Picture], settings: MapSettings) -> str:
    images = [[picture_digest(picture) for picture in group] for group in (normals, held_out)]
    about = [_FORMAT, tower.digest, tower.side, tower.depths, images, asdict(settings)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def picture_digest(picture: Picture) -> str:
    """A digest of an image as the tower sees it."""
    return hashlib.sha256(picture.pixels.tobytes() + picture.inside.tobytes()).hexdigest()[:32]


def _keep(path: Path, network: AnomalyMap, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    with files.replacing(path, durable=False) as partial:
        torch.save(state, partial)


def _resume(path: Path, network: AnomalyMap, optimizer: torch.optim.Optimizer) -> int:
    """Load the kept state, and return the number of its steps; 0 if there is none."""
    if not path.is_file():
        return 0
    try:
        state: Any = load_pickle(path)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])
    except Exception as error:  # noqa: BLE001  a damaged archive raises whatever zip, pickle and torch do
        warn(f"{path}: the kept anomaly map cannot be read ({type(error).__name__}); it is trained anew.")
        return 0
