"""The flags of records, images and caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from umed_plugin.flags.needs import RECIPE, flag
from umed_plugin.flags.rules import CREATED, EXISTING, FIXED, FREE, REWARDING, SAID, TUNING, Needs


@dataclass
class DataFlags:
    """The flags of records, images and caches."""

    umed_recipe: Optional[str] = flag(
        None,
        "Recipe name or YAML file to build the records from. They replace --data_path, or add to it if both are given.",
        on_resume=SAID,
    )
    umed_data_root: Optional[str] = flag(
        None,
        "Folder that holds the recipe's data set.",
        needs=RECIPE,
        folder=EXISTING,
        on_resume=SAID,
    )
    umed_box_decimals: int = flag(
        2,
        "Decimals of box coordinates in built records: 2 (LLaVA-1.5) or 3.",
        needs=Needs("--umed_recipe: the records of --data_path are already written", RECIPE.met),
        choices=(2, 3),
    )
    umed_stock_template_share: float = flag(
        0.5,
        "Share of records trained under the stock template of --version, so that stock LLaVA can query the model.",
        least=0,
        most=1,
    )
    umed_on_bad_image: str = flag(
        "stop",
        "What to do with an image that cannot be read: stop, or skip (report it and use the next one).",
        choices=("stop", "skip"),
    )
    umed_tower_weights: str = flag(
        "checkpoint",
        "Weights of the vision tower: checkpoint (the checkpoint's own, if it has any) or original (as stock LLaVA).",
        choices=("checkpoint", "original"),
        on_resume=FIXED,
    )
    umed_attention: str = flag(
        "auto",
        "Attention of the language model: eager, sdpa or flash (flash-attn 2). auto: what the script requests if it can run "
        "here, else what transformers chooses. With each of them a question's answers share its prompt (--umed_packed).",
        choices=("auto", "eager", "sdpa", "flash"),
        on_resume=SAID,
    )
    umed_image_cache: Optional[str] = flag(
        None,
        "Folder that caches decoded and resized images, so that later epochs and runs decode nothing. A recipe's DICOM and "
        "NIfTI files are then read in place, not rendered to PNG.",
        folder=CREATED,
        on_resume=FREE,
    )
    umed_image_cache_gb: float = flag(
        20.0,
        "Maximum size of the image cache, in GB (10^9 bytes).",
        needs=Needs("--umed_image_cache", lambda flags: flags.umed_image_cache is not None),
        above=0,
        on_resume=FREE,
    )
    umed_feature_cache: Optional[str] = flag(
        None,
        "Folder that caches the frozen vision tower's features, so that later epochs and runs do not open the image.",
        stage=REWARDING,
        folder=CREATED,
        on_resume=FREE,
    )
    umed_augment: bool = flag(
        False,
        "Augment the training studies, anew in each epoch: turn, zoom, shift, grey levels and noise, and mirror where the recipe "
        "allows it. Boxes and words of side move along. The recipe's `augment` says how.",
    )
    umed_label_share: Optional[float] = flag(
        None,
        "Share of the labelled studies that stage 1 trains on; stage 2 trains on the others. Give both stages the same. Divided "
        "by patient: stage 1 has nothing about patients of stage 2. Default: both stages train on all.",
        above=0,
        below=1,
    )
    umed_similar: int = flag(
        0,
        "Number of similar training studies whose diagnoses stand before each question, except under the stock template. They "
        "are found by the tower's mean patch feature, without the patient's own and near-duplicates. 0: none.",
        least=0,
        most=16,
    )
    umed_supervision_check_samples: int = flag(
        64,
        "Records per template whose supervised tokens are checked before training; 0: no check.",
        stage=TUNING,
        least=0,
        on_resume=FREE,
    )
