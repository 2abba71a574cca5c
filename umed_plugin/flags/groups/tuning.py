"""The flags of stage 1's further losses, of its order, and of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from umed_plugin.flags.needs import flag
from umed_plugin.flags.rules import EXISTING, FIXED, RESTORED, TUNING, Needs, parse_keep

KEEP = Needs("--umed_keep above 0", lambda flags: flags.keeps())
TRAINED_TOWER = Needs("--umed_tower_lr, which trains the vision tower", lambda flags: flags.umed_tower_lr is not None)
TOWER_TEACHER = Needs("--umed_tower_teacher", lambda flags: flags.umed_tower_teacher is not None)


@dataclass
class TuningFlags:
    """The flags of stage 1's further losses, of its order, and of the vision tower."""

    umed_keep: str = flag(
        "0",
        "Weight W of a loss that keeps what the checkpoint could do: W x KL(start || now) on answer tokens, added to the "
        "cross-entropy. clinkd: (cross-entropy + 0.5 KL) / 1.5 at temperature 0.5, as in ClinKD (arXiv 2502.05928). 0: none.",
        stage=TUNING,
        parse=parse_keep,
        instead="There --umed_kl_coef holds the policy near its start.",
    )
    umed_teacher: Optional[str] = flag(
        None,
        "Another full LLaVA checkpoint, of the same tokenizer, whose answers --umed_keep holds to. Default: the start itself.",
        stage=TUNING,
        needs=KEEP,
        folder=EXISTING,
        instead="There --umed_kl_coef holds the policy near its start.",
    )
    umed_distill_temperature: Optional[float] = flag(
        None,
        "Temperature at which --umed_keep compares the two distributions. Default: 1, and 0.5 with clinkd.",
        stage=TUNING,
        needs=KEEP,
        above=0,
    )
    umed_replay: float = flag(
        0.0,
        "From the second epoch on, this share of the records comes twice: those with the highest loss in the epoch before. "
        "0: none.",
        stage=TUNING,
        least=0,
        most=1,
    )
    umed_tower_lr: Optional[float] = flag(
        None,
        "Train the vision tower too, with this learning rate, and save it in the checkpoint. A hundredth of --learning_rate is "
        "a start (arXiv 2306.05642). Default: the tower is frozen.",
        stage=TUNING,
        above=0,
        on_resume=RESTORED,
        instead="Stage 2 trains with the tower as stage 1 left it. Remove it.",
    )
    umed_tower_teacher: Optional[str] = flag(
        None,
        "Weights of a SAM ViT image encoder (SAM's own, or LVM-Med's lvmmed_vit.pth), to which the trained tower's patch "
        "features are drawn. Its licence binds the result's use.",
        stage=TUNING,
        needs=TRAINED_TOWER,
        on_resume=FIXED,
    )
    umed_tower_teacher_weight: float = flag(
        0.1,
        "Weight of the loss of --umed_tower_teacher, 1 - cosine per patch. 0: the file is not even read.",
        stage=TUNING,
        needs=TOWER_TEACHER,
        least=0,
    )
