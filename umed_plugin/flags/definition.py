"""The ``--umed_*`` flags of LLaVA's training scripts: one dataclass, in which each field says all that holds for its flag.

A new flag is one field here, and its use. The field states default, help, stage, needs and allowed values
(`umed_plugin.flags.rules`); `umed_plugin.flags.checks` checks them, together with what several flags must agree on.

The paper (arXiv 2501.01377) publishes no hyper-parameters, so every default here is our own choice and not the paper's.
Where a default comes from other work, its help text names that work.

How to run: ``umed-run bash finetune.sh --umed_stage instruction_tuning --umed_recipe NAME`` (see `umed_plugin.launch`).
Without ``--umed_stage``, stock LLaVA behaviour applies, and any other ``--umed_*`` flag is refused.

Departures from the paper: the default algorithm is GRPO (the paper uses PPO), and the reward terms have weights.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from umed_plugin.errors import UsageError
from umed_plugin.flags.rules import (
    CREATED,
    DEFAULT_JUDGE_OPTIONS,
    EXISTING,
    FIXED,
    FREE,
    RESTORED,
    REWARDING,
    SAID,
    STAGES,
    TUNING,
    Needs,
    Rules,
    must_sample_all,
    parse_judge_options,
)
from umed_plugin.flags.weights import Weight
from umed_plugin.remote import settings

__all__ = [
    "BOX_REWARDS",
    "DEFAULT_JUDGE_OPTIONS",
    "LOCAL_JUDGE_NAMES",
    "OPENAI",
    "PAPER_REWARDS",
    "REPLAY",
    "REWARDING",
    "SHIPPED_REWARDS",
    "STAGES",
    "SYMBOLIC",
    "TUNING",
    "UmedFlags",
    "is_own_reward",
    "rules_of",
]

PAPER_REWARDS = ("relevance", "localization", "vision_relevance")
# Each file of that folder is one reward, named as the file. Importing them would import NumPy, so they are only listed.
_REWARD_FILES = Path(__file__).parent.parent / "rewards" / "terms"
SHIPPED_REWARDS = (
    *PAPER_REWARDS,
    *sorted({module.name for module in pkgutil.iter_modules([str(_REWARD_FILES)])} - set(PAPER_REWARDS)),
)

# The rewards that are 0 for an answer without a box.
BOX_REWARDS = ("localization", "localization_diou", "localization_curriculum")
# The one shipped reward that needs a file: symbolic:FILE.yaml.
SYMBOLIC = "symbolic"


def is_own_reward(name: str) -> bool:
    """Whether a name of ``--umed_rewards`` is ``my_module:my_reward``, a reward of the user."""
    return ":" in name and not name.startswith(f"{SYMBOLIC}:")


LOCAL_JUDGE_NAMES = ("lexical", "classes")
OPENAI, REPLAY = "openai", "replay"

PPO = Needs("--umed_algorithm ppo", lambda flags: flags.umed_algorithm == "ppo")
GRPO = Needs("--umed_algorithm grpo", lambda flags: flags.umed_algorithm == "grpo")
# On the first update the probability ratio is 1 and the value is the old one, whatever the range.
SEVERAL_UPDATES = Needs(
    "--umed_updates_per_rollout or --umed_minibatches_per_rollout above 1",
    lambda flags: flags.umed_updates_per_rollout * flags.umed_minibatches_per_rollout > 1,
)
# A single answer has no group to be normalised over.
SEVERAL_CANDIDATES = Needs("--umed_num_candidates above 1", lambda flags: flags.umed_num_candidates > 1)
# An own reward (module:name) may ask for it too; that is known only when it is imported.
NORMALISED_REWARD = Needs(
    "a reward that max normalises in --umed_rewards: localization, localization_diou, vision_relevance or your own",
    lambda flags: any(
        name in ("localization", "localization_diou", "vision_relevance") or is_own_reward(name)
        for name in flags.reward_names()
    ),
)
RECIPE = Needs("--umed_recipe", lambda flags: flags.umed_recipe is not None)
RELEVANCE = Needs("relevance in --umed_rewards", lambda flags: "relevance" in flags.reward_names())
VISION_RELEVANCE = Needs(
    "vision_relevance in --umed_rewards (stage 2) or --umed_attention_loss (stage 1)",
    lambda flags: (
        flags.umed_attention_loss > 0 if flags.umed_stage == TUNING else "vision_relevance" in flags.reward_names()
    ),
)
MODEL_JUDGE = Needs(
    "--umed_judge openai:MODEL or replay:FILE", lambda flags: flags.judge_kind() not in LOCAL_JUDGE_NAMES
)
ROLLOUT_SERVER = Needs("--umed_rollout_server", lambda flags: flags.umed_rollout_server is not None)
SERVER_JUDGE = Needs("--umed_judge openai:MODEL", lambda flags: flags.judge_kind() == OPENAI)

# transformers hands a field's whole metadata to argparse, which refuses unknown keys. It would also act on `choices` and
# exit at the first fault, where all faults shall come at once. So metadata holds the help text, and the rules stand here.
_RULES: dict[dataclasses.Field[Any], Rules] = {}


def _flag(default: Any, help_text: str, **rules: Any) -> Any:
    """A dataclass field for one flag; ``rules`` are those of :class:`umed_plugin.flags.rules.Rules`."""
    flag = field(default=default, metadata={"help": help_text + Rules(**rules).help_words()})
    _RULES[flag] = Rules(**rules)
    return flag


def rules_of(flag: dataclasses.Field[Any]) -> Rules:
    """The rules of one of ``dataclasses.fields(UmedFlags)``."""
    return _RULES[flag]


@dataclass
class UmedFlags:
    """Flags that `umed_plugin.patches.train_arguments` adds to LLaVA's TrainingArguments; ``args.umed`` returns them."""

    umed_stage: Optional[str] = _flag(
        None,
        "instruction_tuning (stage 1) or rewarding (stage 2). Without it, stock LLaVA behaviour applies.",
        choices=STAGES,
        on_resume=FREE,
    )

    umed_accept_changed: Optional[str] = _flag(
        None,
        "Comma list of flags that may differ from the run that is resumed, such as umed_temperature,data_path. Without it a run "
        "whose batches, order, objective or weights would change is refused.",
        on_resume=FREE,
    )

    # Data
    umed_recipe: Optional[str] = _flag(
        None,
        "Recipe name or YAML file to build the records from. They replace --data_path, or add to it if both are given.",
        on_resume=SAID,
    )
    umed_data_root: Optional[str] = _flag(
        None,
        "Folder that holds the recipe's data set.",
        needs=RECIPE,
        folder=EXISTING,
        on_resume=SAID,
    )
    umed_box_decimals: int = _flag(
        2,
        "Decimals of box coordinates in built records: 2 (LLaVA-1.5) or 3.",
        needs=Needs("--umed_recipe: the records of --data_path are already written", RECIPE.met),
        choices=(2, 3),
    )
    umed_stock_template_share: float = _flag(
        0.5,
        "Share of records trained under the stock template of --version, so that stock LLaVA can query the model.",
        least=0,
        most=1,
    )
    umed_on_bad_image: str = _flag(
        "stop",
        "What to do with an image that cannot be read: stop, or skip (report it and use the next one).",
        choices=("stop", "skip"),
    )
    umed_tower_weights: str = _flag(
        "checkpoint",
        "Weights of the vision tower: checkpoint (the checkpoint's own, if it has any) or original (as stock LLaVA).",
        choices=("checkpoint", "original"),
        on_resume=FIXED,
    )
    umed_attention: str = _flag(
        "auto",
        "Attention of the language model: eager, sdpa or flash (flash-attn 2). auto: what the script requests if it can run "
        "here, else what transformers chooses. With each of them a question's answers share its prompt (--umed_packed).",
        choices=("auto", "eager", "sdpa", "flash"),
        on_resume=SAID,
    )
    umed_image_cache: Optional[str] = _flag(
        None,
        "Folder that caches decoded and resized images, so that later epochs and runs decode nothing. A recipe's DICOM and "
        "NIfTI files are then read in place, not rendered to PNG.",
        folder=CREATED,
        on_resume=FREE,
    )
    umed_image_cache_gb: float = _flag(
        20.0,
        "Maximum size of the image cache, in GB (10^9 bytes).",
        needs=Needs("--umed_image_cache", lambda flags: flags.umed_image_cache is not None),
        above=0,
        on_resume=FREE,
    )
    umed_feature_cache: Optional[str] = _flag(
        None,
        "Folder that caches the frozen vision tower's features, so that later epochs and runs do not open the image.",
        stage=REWARDING,
        folder=CREATED,
        on_resume=FREE,
    )
    umed_augment: bool = _flag(
        False,
        "Augment the training studies, anew in each epoch: turn, zoom, shift, grey levels and noise, and mirror where the recipe "
        "allows it. Boxes and words of side move along. The recipe's `augment` says how.",
    )
    umed_label_share: Optional[float] = _flag(
        None,
        "Share of the labelled studies that stage 1 trains on; stage 2 trains on the others. Give both stages the same. Divided "
        "by patient. Default: both stages train on all.",
        above=0,
        below=1,
    )
    umed_supervision_check_samples: int = _flag(
        64,
        "Records per template whose supervised tokens are checked before training; 0: no check.",
        stage=TUNING,
        least=0,
        on_resume=FREE,
    )

    # Rewards
    umed_algorithm: str = _flag(
        "grpo",
        "grpo: advantages within a question's group of answers, no value network. ppo: the paper's, with a value network.",
        stage=REWARDING,
        choices=("grpo", "ppo"),
        on_resume=FIXED,
    )
    umed_num_candidates: int = _flag(
        8, "Answers sampled per question (K): at least 2 with grpo, at least 1 with ppo.", stage=REWARDING, least=1
    )
    umed_rewards: str = _flag(
        ",".join(PAPER_REWARDS),
        f"Comma list of {', '.join(SHIPPED_REWARDS)}, or my_module:my_reward for your own. localization_diou replaces "
        "localization: it also tells near misses from far ones. symbolic needs its file: symbolic:FILE.yaml.",
        stage=REWARDING,
    )
    umed_reward_weights: Optional[str] = _flag(
        None,
        "Comma list of numbers, one for each reward, all at least 0. Default: 1 for each. 0..1 goes from 0 at the start of the "
        "run to 1 at its end; 0..1@0.5 reaches 1 at half of it.",
        stage=REWARDING,
    )
    umed_reward_norm: str = _flag(
        "max",
        "Normalisation over a question's answers: max (paper: divide by the maximum), none, or zscore (each reward by itself "
        "to mean 0 and deviation 1, as GDPO does, arXiv 2601.05242; --umed_advantage_scale batch is its second step).",
        stage=REWARDING,
        needs=SEVERAL_CANDIDATES,
        choices=("max", "none", "zscore"),
    )
    umed_reward_floor: float = _flag(
        0.1,
        "Lower bound of the maximum that max divides by, so that a best IoU of 0.02 does not become 1. In each reward's "
        "own scale: for vision_relevance a multiple of the even share, the share of the patches that the lesion covers.",
        stage=REWARDING,
        needs=Needs("--umed_reward_norm max", lambda flags: flags.umed_reward_norm == "max")
        & NORMALISED_REWARD
        & SEVERAL_CANDIDATES,
        least=0,
        most=1,
    )

    # Judge
    umed_judge: str = _flag(
        "lexical",
        "Who scores relevance. Local: lexical (class names and words) or classes (class names only). Also openai:MODEL (sends "
        "text, no images, to an OpenAI-compatible server) or replay:FILE (replies saved by an earlier run).",
        stage=REWARDING,
        needs=RELEVANCE,
        pattern=rf"{'|'.join(LOCAL_JUDGE_NAMES)}|({OPENAI}|{REPLAY}):.+",
        form="lexical, classes, openai:MODEL or replay:FILE",
    )
    umed_judge_base_url: Optional[str] = _flag(
        None,
        "Address of the judge's server, such as http://localhost:8000/v1. Default: OpenAI's.",
        stage=REWARDING,
        needs=SERVER_JUDGE,
        on_resume=SAID,
    )
    umed_judge_prompt: Optional[str] = _flag(
        None,
        "Text file with the judge's prompt, with {reference}, {answer} and {question}. Default: judges/prompt.txt.",
        stage=REWARDING,
        needs=MODEL_JUDGE,
    )
    umed_judge_options: str = _flag(
        DEFAULT_JUDGE_OPTIONS,
        "Further fields of the judge's requests, as JSON. Some models take no temperature or max_tokens.",
        stage=REWARDING,
        needs=MODEL_JUDGE,
        parse=parse_judge_options,
    )
    umed_judge_max_score: float = _flag(
        10.0,
        "Score that the judge's prompt gives the best answer; the worst gets 0.",
        stage=REWARDING,
        needs=MODEL_JUDGE,
        above=0,
    )
    umed_judge_ledger: Optional[str] = _flag(
        None,
        "File that keeps the judge's replies; runs may share one. Default: judge.jsonl in --output_dir.",
        stage=REWARDING,
        needs=SERVER_JUDGE,
        on_resume=FREE,
    )
    umed_judge_concurrency: int = _flag(
        16,
        "Concurrent requests to the judge per process.",
        stage=REWARDING,
        needs=SERVER_JUDGE,
        least=1,
        on_resume=FREE,
    )
    umed_judge_timeout: float = _flag(
        60.0,
        "Timeout of one request to the judge, in seconds.",
        stage=REWARDING,
        needs=SERVER_JUDGE,
        above=0,
        on_resume=FREE,
    )
    umed_judge_retries: int = _flag(
        5,
        "Retries after a failed request to the judge.",
        stage=REWARDING,
        needs=SERVER_JUDGE,
        least=0,
        on_resume=FREE,
    )
    umed_judge_budget: Optional[str] = _flag(
        None,
        "What all replies in the ledger may cost together: 5000requests, 2000000tokens or 20usd. Once it is spent, the run "
        "finishes the step, saves a checkpoint and ends.",
        stage=REWARDING,
        needs=SERVER_JUDGE,
        parse=settings.parse_budget,
        on_resume=FREE,
    )
    umed_judge_prices: Optional[str] = _flag(
        None,
        "US dollars per million tokens that the judge reads and writes: 0.15,0.60. Logs judge/usd.",
        stage=REWARDING,
        needs=SERVER_JUDGE,
        parse=settings.parse_prices,
        on_resume=FREE,
    )
    umed_judge_patience: int = _flag(
        3,
        "Stop the run after this many consecutive rollouts in which the judge returned no score. A rollout is all that is "
        "sampled before the next update.",
        stage=REWARDING,
        needs=MODEL_JUDGE,
        least=1,
        on_resume=FREE,
    )

    # Objective
    umed_reward_coef: float = _flag(
        1.0,
        "c1 of the paper: weight of the advantage (grpo), or of the reward relative to the KL penalty (ppo).",
        stage=REWARDING,
        above=0,
    )
    umed_advantage_scale: str = _flag(
        "group",
        "Standard deviation that divides an answer's distance from its question's mean reward: within this question (group), "
        "within the whole batch (batch: a question whose answers are nearly equal then weighs little), or none (Dr. GRPO).",
        stage=REWARDING,
        needs=GRPO,
        choices=("group", "batch", "none"),
    )
    umed_loss_aggregation: str = _flag(
        "grpo",
        "How the loss adds up tokens. grpo: mean over an answer's tokens, then over answers. dapo: mean over all tokens of the "
        "optimizer step (arXiv 2503.14476). dr_grpo: sum over tokens, divided by answers x --umed_max_new_tokens (arXiv "
        "2503.20783; the paper adds --umed_advantage_scale none). PPO always averages over all tokens.",
        stage=REWARDING,
        needs=GRPO,
        choices=("grpo", "dapo", "dr_grpo"),
    )
    umed_kl_coef: Optional[float] = _flag(
        None,
        "Weight of the per-token KL to the reference policy: a term of the loss (grpo; default 0.04, DeepSeekMath's) or a "
        "penalty in the token rewards (ppo; default 0.1, LLaVA-RLHF's). 0: no reference policy.",
        stage=REWARDING,
        least=0,
    )
    umed_kl_target: Optional[float] = _flag(
        None,
        "Target KL of an answer, in nats, that the weight is steered to (Ziegler et al. 2019). Default: the weight is fixed.",
        stage=REWARDING,
        needs=Needs("--umed_kl_coef above 0", lambda flags: flags.kl_coef() > 0),
        above=0,
    )
    umed_kl_horizon: float = _flag(
        10000.0,
        "Number of answers over which the KL weight may change by about a fifth.",
        stage=REWARDING,
        needs=Needs("--umed_kl_target", lambda flags: flags.umed_kl_target is not None),
        above=0,
    )
    umed_clip_range: float = _flag(
        0.2,
        "Half width of the clipped probability ratio (LLaVA-RLHF: 0.2).",
        stage=REWARDING,
        needs=SEVERAL_UPDATES,
        above=0,
        below=1,
    )
    umed_clip_range_high: Optional[float] = _flag(
        None,
        "How far the probability ratio may rise above 1; --umed_clip_range is then how far it may fall (DAPO: 0.28 and 0.2). "
        "Default: --umed_clip_range on both sides.",
        stage=REWARDING,
        needs=SEVERAL_UPDATES,
        above=0,
    )
    umed_entropy_coef: float = _flag(0.0, "Weight of the entropy bonus (c3 of the paper).", stage=REWARDING, least=0)
    umed_value_coef: float = _flag(
        0.1, "Weight of the value loss (c2 of the paper; LLaVA-RLHF: 0.1).", stage=REWARDING, needs=PPO, above=0
    )
    umed_value_clip_range: float = _flag(
        0.2,
        "Largest change of a value from the old one, in units of reward (LLaVA-RLHF: 0.2).",
        stage=REWARDING,
        needs=PPO & SEVERAL_UPDATES,
        above=0,
    )
    umed_value_learning_rate: float = _flag(
        1e-4,
        "Learning rate of the value head, which starts at the first rollout's mean reward; scheduled as --learning_rate.",
        stage=REWARDING,
        needs=PPO,
        above=0,
        on_resume=RESTORED,
    )
    umed_gamma: float = _flag(
        1.0, "Discount of later rewards (LLaVA-RLHF: 1).", stage=REWARDING, needs=PPO, least=0, most=1
    )
    umed_gae_lambda: float = _flag(
        0.95,
        "Lambda of generalised advantage estimation: 0 is one step ahead, 1 the whole return (LLaVA-RLHF: 0.95).",
        stage=REWARDING,
        needs=PPO,
        least=0,
        most=1,
    )
    umed_updates_per_rollout: int = _flag(
        1, "Epochs over each rollout (TRL: num_ppo_epochs).", stage=REWARDING, least=1
    )
    umed_minibatches_per_rollout: int = _flag(
        1,
        "Optimizer steps per epoch over a rollout: it is sampled whole, then shuffled into this many minibatches.",
        stage=REWARDING,
        least=1,
    )

    # Vision relevance
    umed_attention_loss: float = _flag(
        0.0,
        "Weight of a loss that turns the attention of tokens that name a lesion to its patches: the differentiable form of "
        "vision_relevance (A3Tune, arXiv 2505.18503: 0.03). Records without boxes add nothing; 0: no such loss.",
        stage=TUNING,
        least=0,
    )
    umed_vrr_layers: str = _flag(
        "all",
        "Layers averaged by vision_relevance and --umed_attention_loss: all, last_half, or a comma list of indices (-1 is the "
        "last).",
        needs=VISION_RELEVANCE,
        pattern=r"all|last_half|\s*-?\d+\s*(,\s*-?\d+\s*)*",
        form="all, last_half, or indices such as 16,20,-1",
    )
    umed_vrr_heads: str = _flag(
        "all",
        "Heads averaged by vision_relevance and --umed_attention_loss: all, or a comma list of indices.",
        needs=VISION_RELEVANCE,
        pattern=r"all|\s*\d+\s*(,\s*\d+\s*)*",
        form="all, or indices such as 0,3,17",
    )
    umed_vrr_mask_sinks: float = _flag(
        0.0,
        "Exclude attention sinks from vision_relevance and --umed_attention_loss: patches with a hidden value of at least this "
        "many times their root mean square (arXiv 2503.03321: 20; a model of width D has none above sqrt(D)); 0: mask none.",
        needs=VISION_RELEVANCE,
        above=1,
        or_zero=True,
    )

    # Sampling, logging, validation
    umed_sampling_batch_size: Optional[int] = _flag(
        None,
        "Maximum number of questions per process whose answers are sampled together. Default: all of an optimizer step (batch "
        "size x accumulation steps). Lower it if sampling runs out of memory.",
        stage=REWARDING,
        least=1,
        on_resume=SAID,
    )
    umed_cut_off: str = _flag(
        "penalise",
        "What to do with answers that --umed_max_new_tokens cuts off: keep (reward them as they are), mask (leave them out of "
        "the loss and the statistics), or penalise (subtract the sum of --umed_reward_weights from their reward).",
        stage=REWARDING,
        choices=("keep", "mask", "penalise"),
    )
    umed_dynamic_sampling: int = _flag(
        0,
        "Dynamic sampling (DAPO, arXiv 2503.14476): questions whose answers all have the same reward teach nothing, and are "
        "replaced by further questions. At most this many extra samplings per rollout (by default an optimizer step); 0: none.",
        stage=REWARDING,
        needs=GRPO,
        least=0,
    )
    umed_packed: bool = _flag(
        True,
        "Sample a question's answers in one row behind its prompt, and train them so under gradient checkpointing.",
        stage=REWARDING,
        on_resume=SAID,
    )
    umed_logit_rows: int = _flag(
        1024,
        "Answer tokens whose logits are in memory at once, in the passes over sampled answers; 0: all. The backward pass "
        "computes them again, part by part.",
        stage=REWARDING,
        least=0,
        on_resume=SAID,
    )
    umed_max_new_tokens: int = _flag(128, "Maximum length of a sampled answer, in tokens.", stage=REWARDING, least=1)
    umed_temperature: float = _flag(
        1.0,
        "Sampling temperature. At 1, a model unsure of its boxes may learn to hedge with large ones: lower it then.",
        stage=REWARDING,
        above=0,
    )
    umed_top_p: float = _flag(
        1.0,
        "Must be 1. A nucleus (top-p) would sample from another distribution than the one that learns. Lower "
        "--umed_temperature instead: its distribution is the one that is sampled, compared and trained.",
        stage=REWARDING,
        parse=must_sample_all,
        on_resume=SAID,
    )
    umed_rollout_server: Optional[str] = _flag(
        None,
        "Address of a vLLM server that samples the answers, such as http://127.0.0.1:8000/v1; `umed rollout-server` starts one. "
        "Needs --lora_enable True. Default: this process samples.",
        stage=REWARDING,
        on_resume=SAID,
    )
    umed_rollout_remote: bool = _flag(
        False,
        "Allow --umed_rollout_server to be another machine, which then gets the embedded images.",
        stage=REWARDING,
        needs=ROLLOUT_SERVER,
        on_resume=FREE,
    )
    umed_rollout_adapters: Optional[str] = _flag(
        None,
        "Folder for the adapters of each step, which the rollout server must see too; /dev/shm is fast. Default: "
        "rollout_adapters in --output_dir.",
        stage=REWARDING,
        needs=ROLLOUT_SERVER,
        folder=CREATED,
        on_resume=FREE,
    )
    umed_rollout_timeout: float = _flag(
        600.0,
        "Timeout of one request to the rollout server, in seconds.",
        stage=REWARDING,
        needs=ROLLOUT_SERVER,
        above=0,
        on_resume=FREE,
    )
    umed_rollout_retries: int = _flag(
        3,
        "Retries after a lost connection to the rollout server; the pauses begin at 1 s and double.",
        stage=REWARDING,
        needs=ROLLOUT_SERVER,
        least=0,
        on_resume=FREE,
    )
    umed_rollout_max_difference: float = _flag(
        0.1,
        "Largest mean difference, in nats a token, of the rollout server's log-probabilities from this process's. Above it the "
        "server holds another model, and the run ends.",
        stage=REWARDING,
        needs=ROLLOUT_SERVER,
        above=0,
        on_resume=FREE,
    )
    umed_importance_cap: float = _flag(
        3.0,
        "Largest importance weight of a token that the rollout server has sampled: its probability here over that on the server "
        "(TRL: 3).",
        stage=REWARDING,
        needs=ROLLOUT_SERVER,
        least=1,
    )
    umed_log_candidates: int = _flag(
        0,
        "Write the sampled answers with their rewards to candidates.jsonl, and to TensorBoard or W&B under --report_to, every "
        "this many steps; 0: never.",
        stage=REWARDING,
        least=0,
        on_resume=FREE,
    )
    umed_start_check: Optional[int] = _flag(
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
    umed_val_every: int = _flag(
        0,
        "Answer held-out records (split val) greedily before the first step and every this many steps, and log val/iou, "
        "val/accuracy and val/box_area_ratio; 0: never.",
        stage=REWARDING,
        least=0,
        on_resume=FREE,
    )
    umed_val_records: int = _flag(
        64,
        "Maximum number of held-out records per validation.",
        stage=REWARDING,
        needs=Needs("--umed_val_every", lambda flags: flags.umed_val_every > 0),
        least=1,
        on_resume=FREE,
    )

    @classmethod
    def of(cls, args: Any) -> UmedFlags:
        """Copy the flags from an object that has them as attributes (LLaVA's TrainingArguments)."""
        return cls(**{flag.name: getattr(args, flag.name) for flag in dataclasses.fields(cls)})

    def accepted_changes(self) -> set[str]:
        """``--umed_accept_changed`` as names without dashes."""
        names = (self.umed_accept_changed or "").split(",")
        return {name.strip().lstrip("-") for name in names} - {""}

    def reward_names(self) -> list[str]:
        """``--umed_rewards`` as a list."""
        return [name.strip() for name in self.umed_rewards.split(",")]

    def reward_schedule(self) -> list[Weight]:
        """``--umed_reward_weights``, one per reward.

        Raises:
            ValueError: one of them cannot be read.
        """
        if self.umed_reward_weights is None:
            return [Weight(1.0, 1.0)] * len(self.reward_names())
        return [Weight.read(weight) for weight in self.umed_reward_weights.split(",")]

    def reward_weights(self, progress: float = 0.0) -> list[float]:
        """``--umed_reward_weights`` as floats, one per reward, when this share of the run is done, 0-1."""
        return [weight.at(progress) for weight in self.reward_schedule()]

    def judge_kind(self) -> str:
        """``lexical``, ``classes``, ``openai`` or ``replay``: the part of ``--umed_judge`` before the colon."""
        return self.umed_judge.partition(":")[0]

    def judge_target(self) -> str:
        """The model of ``openai:MODEL`` or the file of ``replay:FILE``; empty for local judges."""
        return self.umed_judge.partition(":")[2]

    def kl_coef(self) -> float:
        """``--umed_kl_coef``, or the algorithm's own default."""
        if self.umed_kl_coef is not None:
            return self.umed_kl_coef
        return 0.1 if self.umed_algorithm == "ppo" else 0.04

    def learnt_from_once(self) -> bool:
        """Whether a rollout feeds a single optimizer step: the policy that learns is then the one that sampled."""
        return self.umed_updates_per_rollout * self.umed_minibatches_per_rollout == 1

    def rollout_is_any_step(self) -> bool:
        """Whether a rollout is what an optimizer step takes, even less at an epoch's end: GRPO compares within a query."""
        return self.umed_algorithm == "grpo" and self.learnt_from_once()

    def vrr_layer_indices(self, num_layers: int) -> list[int]:
        """``--umed_vrr_layers`` as sorted indices in ``range(num_layers)``.

        Raises:
            UsageError: an index is outside the model's layers.
        """
        if self.umed_vrr_layers == "all":
            return list(range(num_layers))
        if self.umed_vrr_layers == "last_half":
            return list(range(num_layers // 2, num_layers))
        indices = [int(part) for part in self.umed_vrr_layers.split(",")]
        outside = [index for index in indices if not -num_layers <= index < num_layers]
        if outside:
            raise UsageError(
                f"--umed_vrr_layers {self.umed_vrr_layers}: the model has {num_layers} layers, so {outside} do not exist. "
                f"Allowed: {-num_layers} to {num_layers - 1}, all, last_half."
            )
        return sorted({index % num_layers for index in indices})

    def vrr_head_indices(self, num_heads: int) -> list[int] | None:
        """``--umed_vrr_heads`` as sorted indices in ``range(num_heads)``; None for all.

        Raises:
            UsageError: an index is outside the model's heads.
        """
        if self.umed_vrr_heads == "all":
            return None
        indices = [int(part) for part in self.umed_vrr_heads.split(",")]
        outside = [index for index in indices if not 0 <= index < num_heads]
        if outside:
            raise UsageError(
                f"--umed_vrr_heads {self.umed_vrr_heads}: the model has {num_heads} heads, so {outside} do not exist. "
                f"Allowed: 0 to {num_heads - 1}, or all."
            )
        return sorted(set(indices))
