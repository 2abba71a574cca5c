"""The flags of sampling, logging and validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from umed_plugin.flags.names import BOX_REWARDS
from umed_plugin.flags.needs import GRPO, ROLLOUT_SERVER, flag
from umed_plugin.flags.rules import CREATED, FREE, REWARDING, SAID, Needs, must_sample_all
from umed_plugin.remote.settings import ROLLOUT_MAX_DIFFERENCE

VALIDATION = Needs("--umed_val_every", lambda flags: flags.umed_val_every > 0)


@dataclass
class SamplingFlags:
    """The flags of sampling, logging and validation."""

    umed_sampling_batch_size: Optional[int] = flag(
        None,
        "Maximum number of questions per process whose answers are sampled together. Default: all of an optimizer step (batch "
        "size x accumulation steps). Lower it if sampling runs out of memory.",
        stage=REWARDING,
        least=1,
        on_resume=SAID,
    )
    umed_cut_off: str = flag(
        "penalise",
        "What to do with answers that --umed_max_new_tokens cuts off: keep (reward them as they are), mask (leave them out of "
        "the loss and the statistics), or penalise (subtract the sum of --umed_reward_weights from their reward).",
        stage=REWARDING,
        choices=("keep", "mask", "penalise"),
    )
    umed_dynamic_sampling: int = flag(
        0,
        "Dynamic sampling (DAPO, arXiv 2503.14476): questions whose answers all have the same reward teach nothing, and are "
        "replaced by further questions. At most this many extra samplings per rollout (by default an optimizer step); 0: none.",
        stage=REWARDING,
        needs=GRPO,
        least=0,
    )
    umed_packed: bool = flag(
        True,
        "Sample a question's answers in one row behind its prompt, and train them so under gradient checkpointing.",
        stage=REWARDING,
        on_resume=SAID,
    )
    umed_logit_rows: int = flag(
        1024,
        "Answer tokens whose logits are in memory at once: in the passes over sampled answers, in the KL of --umed_keep, and in "
        "the losses of --umed_replay; 0: all. The backward pass computes them again, part by part.",
        needs=Needs(
            "stage 2 or --umed_keep or --umed_replay",
            lambda flags: flags.umed_stage == REWARDING or flags.keeps() or flags.umed_replay > 0,
        ),
        least=0,
        on_resume=SAID,
    )
    umed_max_new_tokens: int = flag(
        128,
        "Maximum length of an answer, in tokens: sampled, or of a validation.",
        needs=Needs(
            "--umed_val_every in stage 1",
            lambda flags: flags.umed_stage == REWARDING or flags.umed_val_every > 0,
        ),
        least=1,
    )
    umed_temperature: float = flag(
        1.0,
        "Sampling temperature. At 1, a model unsure of its boxes may learn to hedge with large ones: lower it then.",
        stage=REWARDING,
        above=0,
    )
    umed_top_p: float = flag(
        1.0,
        "Must be 1. A nucleus (top-p) would sample from another distribution than the one that learns. Lower "
        "--umed_temperature instead: its distribution is the one that is sampled, compared and trained.",
        stage=REWARDING,
        parse=must_sample_all,
        on_resume=SAID,
    )
    umed_rollout_server: Optional[str] = flag(
        None,
        "Address of a vLLM server that samples the answers, such as http://127.0.0.1:8000/v1; `umed rollout-server` starts one. "
        "Needs --lora_enable True. Default: this process samples.",
        stage=REWARDING,
        on_resume=SAID,
    )
    umed_rollout_remote: bool = flag(
        False,
        "Allow --umed_rollout_server to be another machine, which then gets the embedded images.",
        stage=REWARDING,
        needs=ROLLOUT_SERVER,
        on_resume=FREE,
    )
    umed_rollout_adapters: Optional[str] = flag(
        None,
        "Folder for the adapters of each step, which the rollout server must see too; /dev/shm is fast. Default: "
        "rollout_adapters in --output_dir.",
        stage=REWARDING,
        needs=ROLLOUT_SERVER,
        folder=CREATED,
        on_resume=FREE,
    )
    umed_rollout_timeout: float = flag(
        600.0,
        "Timeout of one request to the rollout server, in seconds.",
        stage=REWARDING,
        needs=ROLLOUT_SERVER,
        above=0,
        on_resume=FREE,
    )
    umed_rollout_retries: int = flag(
        3,
        "Retries when the rollout server cannot be reached or is busy (429, 5xx); the pauses begin at 1 s and double.",
        stage=REWARDING,
        needs=ROLLOUT_SERVER,
        least=0,
        on_resume=FREE,
    )
    umed_rollout_max_difference: float = flag(
        ROLLOUT_MAX_DIFFERENCE,
        "Largest mean difference, in nats a token, of the rollout server's log-probabilities from this process's. Above it the "
        "server holds another model, and the run ends. So it does if the server answers without the adapter.",
        stage=REWARDING,
        needs=ROLLOUT_SERVER,
        above=0,
        on_resume=FREE,
    )
    umed_importance_cap: float = flag(
        3.0,
        "Largest importance weight of a token that the rollout server has sampled: its probability here over that on the server "
        "(TRL: 3).",
        stage=REWARDING,
        needs=ROLLOUT_SERVER,
        least=1,
    )
    umed_log_candidates: int = flag(
        0,
        "Write the sampled answers with their rewards to candidates.jsonl, and to TensorBoard or W&B under --report_to, every "
        "this many steps; 0: never. If a rollout feeds several steps, at the next rollout.",
        stage=REWARDING,
        least=0,
        on_resume=FREE,
    )
    umed_start_check: Optional[int] = flag(
        None,
        "Training studies with a lesion to which answers are sampled before the first step; if none of the answers has a box, "
        "the run is refused. 0: no check. Default: 16, but 0 in a run of fewer than 20 steps.",
        stage=REWARDING,
        needs=Needs(
            f"{', '.join(BOX_REWARDS[:-1])} or {BOX_REWARDS[-1]} in --umed_rewards",
            lambda flags: bool({*BOX_REWARDS} & {*flags.reward_names()}),
        ),
        least=0,
        on_resume=FREE,
    )
    umed_val_every: int = flag(
        0,
        "Answer held-out records (split val) greedily before the first step and every this many steps, and log val/iou, "
        "val/accuracy and val/box_area_ratio; 0: never.",
        least=0,
        on_resume=FREE,
    )
    umed_val_records: int = flag(
        64,
        "Maximum number of held-out records per validation.",
        needs=VALIDATION,
        least=1,
    )
    umed_stop_after: int = flag(
        0,
        "End the stage after this many validations without gain in the mean of val/iou and val/accuracy, and keep the weights of "
        "the best one; 0: train to the last step and keep its weights.",
        needs=VALIDATION,
        least=0,
        on_resume=SAID,
    )
    umed_val_pictures: int = flag(
        4,
        "Number of held-out studies that each validation shows with the answer's and the true boxes in TensorBoard or W&B, under "
        "--report_to.",
        needs=VALIDATION,
        least=0,
        on_resume=FREE,
    )
