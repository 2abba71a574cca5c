"""Load the vision tower that is inside the checkpoint, in a dtype in which the device can compute.

Targets: `LlavaMetaModel.initialize_vision_modules`, `CLIPVisionTower.to` and `forward`, `find_all_linear_names` in
`llava.train.train`, and the names of tensors that `LlavaLlamaForCausalLM` and `LlavaMistralForCausalLM` may leave unused.
Why: (1) LLaVA builds the tower late. So the tower weights in a checkpoint (LLaVA-Med 1.5 has its own: LLaVA-Med #86, #105, #109)
are reported as unused, and training uses the original CLIP instead. Where this patch loads and compares them itself, that list of
names says nothing, and is left out. (2) Without ``--bf16`` `train()` casts the tower to fp16,
which fails on a CPU (LLaVA #1177, #1483) and loses precision in fp32 training. (3) In a checkpoint with
``unfreeze_mm_vision_tower`` the tower exists before LoRA is added, and gets adapters that are never trained. It also holds the
checkpoint's weights already, whatever ``--umed_tower_weights`` asks for. (4) Its forward pass
lets no gradient through, which ``--umed_tower_lr`` needs. (5) LoRA adapts all linear layers; ``--umed_lora_targets`` names some.
Versions: LLaVA 1.2.x.
Delete when: LLaVA loads its checkpoint's tower, in the training's dtype, keeps LoRA out of it, and can train it.

If the tower is trained, or differs from the original, ``unfreeze_mm_vision_tower`` is set in the configuration that training
saves. It makes stock LLaVA load tower weights from a checkpoint. Where ``--umed_tower_weights original`` leaves out a tower that
differs, the configuration beside an adapter or a projector says so: `umed merge` and evaluation take the original one then.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from umed_plugin.checkpoints.folder import ORIGINAL_TOWER, TOWER, TOWER_WEIGHTS, UNFREEZE
from umed_plugin.checkpoints.loading import tower_misfit, tower_tensors
from umed_plugin.errors import UmedError, unknown_name
from umed_plugin.patches.training_run import LLAVA, TRAIN, TrainingRun
from umed_plugin.patching import Patch, Recorder, Target

# transformers' list of patterns: tensors of these names may be in a checkpoint and not in its model.
_UNUSED = "_keys_to_ignore_on_load_unexpected"
_OF_THE_TOWER = f"^{re.escape(TOWER)}"


def change(recorder: Recorder) -> None:
    """Wrap all of them."""
    from llava.model.llava_arch import LlavaMetaModel
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    llava_train = sys.modules["llava.train.train"]
    stock_initialize = LlavaMetaModel.initialize_vision_modules
    stock_to = CLIPVisionTower.to
    stock_forward = CLIPVisionTower.forward  # under torch.no_grad; `__wrapped__` is the same without it
    stock_names = llava_train.find_all_linear_names

    def initialize_vision_modules(self: Any, model_args: Any, fsdp: Any = None) -> None:
        run = getattr(model_args, "umed_run", None)
        if run is not None and run.active:
            _forget_early_tower(self)
        stock_initialize(self, model_args=model_args, fsdp=fsdp)
        if run is not None:
            _prepare_tower(self, run)

    def to(self: Any, *args: Any, **keywords: Any) -> Any:
        return stock_to(self, *args, **_computable(self, keywords))

    def forward(self: Any, images: Any) -> Any:
        trained = getattr(self, "umed_trained", False)
        return stock_forward.__wrapped__(self, images) if trained else stock_forward(self, images)

    def find_all_linear_names(model: Any) -> Any:
        wanted = find_all_linear_names.umed_targets  # type: ignore[attr-defined]
        return _outside_the_tower(model, _chosen(stock_names(model), wanted))

    # LLaVA calls it with the model alone; `choose_lora_targets` says at the start of a run which layers it is to name.
    find_all_linear_names.umed_targets = []  # type: ignore[attr-defined]

    recorder.replace(LlavaMetaModel, "initialize_vision_modules", initialize_vision_modules)
    recorder.replace(CLIPVisionTower, "to", to)
    recorder.replace(CLIPVisionTower, "forward", forward)
    recorder.replace(llava_train, "find_all_linear_names", find_all_linear_names)
    for model_class in _model_classes():
        recorder.replace(model_class, _UNUSED, list(getattr(model_class, _UNUSED) or ()))


def _model_classes() -> list[Any]:
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM

    return [LlavaLlamaForCausalLM, LlavaMistralForCausalLM]


def expect_tower_tensors(run: TrainingRun) -> None:
    """Keep transformers from listing the checkpoint's tower tensors as unused, if this run is about to compare and load them.

    `_load_checkpoint_tower` says of all of them whether they are equal, or differ, or do not fit. Other tensors are still listed.
    """
    compared = run.active and run.flags.umed_tower_weights == "checkpoint"
    for model_class in _model_classes():
        patterns = getattr(model_class, _UNUSED)
        if not isinstance(patterns, list):  # this patch is not in force
            continue
        # In place: the patch is undone only where its list still stands.
        patterns[:] = [pattern for pattern in patterns if pattern != _OF_THE_TOWER] + [_OF_THE_TOWER] * compared


def choose_lora_targets(run: TrainingRun) -> None:
    """Let LoRA adapt only the layers of ``--umed_lora_targets`` in this run."""
    names = sys.modules["llava.train.train"].find_all_linear_names
    if hasattr(names, "umed_targets"):
        names.umed_targets = run.flags.lora_targets() if run.active else []


def _chosen(names: list[str], wanted: list[str]) -> list[str]:
    """Those of the model's layers that are wanted, or all.

    Raises:
        UmedError: the model has no layer of a wanted name.
    """
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise UmedError(f"--umed_lora_targets: {unknown_name('layer', unknown[0], sorted(names))}")
    return wanted or names


def _forget_early_tower(model: Any) -> None:
    """Let LLaVA read the tower anew from its own files if it was built with the model, and so holds the checkpoint's weights.

    That is so under ``unfreeze_mm_vision_tower``. `_prepare_tower` can then compare the two, and take the ones asked for.
    """
    tower = model.get_vision_tower()
    if tower is not None:
        tower.is_loaded = False
    if hasattr(model.config, UNFREEZE):
        delattr(model.config, UNFREEZE)


def _prepare_tower(model: Any, run: TrainingRun) -> None:
    """Pass the tower's patch size and count to the data, and load the checkpoint's tower weights if a stage requests them.

    ``--umed_similar`` looks with the tower itself.
    """
    tower = model.get_vision_tower()
    run.data_args.umed_patch_size = tower.config.patch_size
    run.data_args.umed_num_patches = tower.num_patches + (tower.select_feature == "cls_patch")
    if not run.active:
        return
    tower.umed_keep_fp32 = not (run.training_args.fp16 or run.training_args.bf16)
    if run.flags.umed_similar:
        run.data_args.umed_tower = tower
    # One that the base's config.json holds is about another training.
    if hasattr(model.config, TOWER_WEIGHTS):
        delattr(model.config, TOWER_WEIGHTS)
    weights = tower_tensors(run.model_args.model_name_or_path, run.training_args.cache_dir)
    if weights and run.flags.umed_tower_weights == "checkpoint":
        _load_checkpoint_tower(model, tower, weights, run)
    elif weights:
        _note_original_tower(model, tower, weights, run)
    if run.flags.umed_tower_lr is not None:
        tower.umed_trained = True
        setattr(model.config, UNFREEZE, True)


def _load_checkpoint_tower(model: Any, tower: Any, weights: dict[str, Any], run: TrainingRun) -> None:
    """Replace the original tower weights with those in the checkpoint's weight files, and report how much they differ."""
    checkpoint = run.model_args.model_name_or_path
    with _gathered(tower):
        state = tower.state_dict()
        misfit = tower_misfit(state, weights)
        if misfit:
            raise UmedError(
                f"{checkpoint}: its vision-tower weights do not fit --vision_tower {tower.vision_tower_name}: {misfit}. Pass the "
                "tower with which the checkpoint was trained, or ignore its weights with --umed_tower_weights original."
            )
        own = {name: state[name] for name in weights}
        differing = _differing(own, weights)
        distance = max((float((own[n].cpu().float() - weights[n].float()).abs().max()) for n in differing), default=0.0)
        if differing:
            tower.load_state_dict({name: weights[name].to(own[name].dtype) for name in own}, strict=False)
    if not differing:
        run.say(f"vision tower: the {len(own)} tensors in {checkpoint} equal those of {tower.vision_tower_name}.")
        return
    setattr(model.config, UNFREEZE, True)
    run.say(
        f"vision tower: loaded {len(own)} tensors from {checkpoint}; {len(differing)} of them differ from "
        f"{tower.vision_tower_name}, by {distance:.3g} at most. (To use the latter: --umed_tower_weights original.)"
    )


def _note_original_tower(model: Any, tower: Any, weights: dict[str, Any], run: TrainingRun) -> None:
    """Note in the configuration, for merging and evaluation, that the checkpoint's own tower was left out, if it differs.

    Full fine-tuning saves the tower with the model, so nothing need be noted.
    """
    with _gathered(tower):
        state = tower.state_dict()
        differs = tower_misfit(state, weights) is not None or bool(_differing(state, weights))
    if not differs:
        return
    run.say(
        f"vision tower: the weights in {run.model_args.model_name_or_path} are left out, and those of "
        f"{tower.vision_tower_name} are used (--umed_tower_weights original)."
    )
    if run.training_args.lora_enable or run.model_args.tune_mm_mlp_adapter:
        setattr(model.config, TOWER_WEIGHTS, ORIGINAL_TOWER)


def _differing(state: dict[str, Any], weights: dict[str, Any]) -> list[str]:
    """Names of a tower's tensors that are not those of a checkpoint; ``state`` has all of ``weights``."""
    import torch

    # Training in bf16 saves a rounded tower, which still counts as the original one.
    return [name for name in weights if not torch.equal(state[name].cpu().to(weights[name].dtype), weights[name])]


def _gathered(tower: Any) -> Any:
    """Gather the tower's parameters for the block: under ZeRO-3 each rank holds only a partition."""
    import contextlib

    parameters = [p for p in tower.parameters() if hasattr(p, "ds_id")]
    if not parameters:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def _computable(tower: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """Replace fp16 with fp32 on a CPU and in fp32 training: `train()` requests fp16 whenever it does not train in bf16."""
    import torch

    if keywords.get("dtype") != torch.float16:
        return keywords
    on_cpu = torch.device(keywords.get("device") or tower.device).type == "cpu"
    if on_cpu or getattr(tower, "umed_keep_fp32", False):
        return {**keywords, "dtype": torch.float32}
    return keywords


def _outside_the_tower(model: Any, names: list[str]) -> Any:
    """LoRA targets: LLaVA's names, or a pattern that excludes the tower if it is loaded already and has layers of these names."""
    inside = {
        name.rpartition(".")[2] for name, _ in model.named_modules() if "vision_tower" in name or "mm_projector" in name
    }
    if inside.isdisjoint(names):
        return names
    return rf"(?!.*(vision_tower|mm_projector|vision_resampler)).*\.({'|'.join(sorted(names))})"


PATCH = Patch(
    name="vision_tower",
    targets=(
        TRAIN,
        Target(
            "llava.model.llava_arch:LlavaMetaModel.initialize_vision_modules",
            LLAVA,
            ("38e4b8eaa11d6ffef115207f0d5fffe496a6ce7f5a37e461238453e8804223d7",),
        ),
        Target(
            "llava.model.multimodal_encoder.clip_encoder:CLIPVisionTower",
            LLAVA,
            ("c9a48b32051e29f766c7a01e03795bc5e77187cd2b74e759e08cf5fd283fc170",),
        ),
        Target(
            "llava.train.train:find_all_linear_names",
            LLAVA,
            ("33c886f04eff61dcc01f519c018fd3b0440874853bb8a6b323245a1c28ac9513",),
        ),
    ),
    why="tower weights in the checkpoint are ignored, the tower is cast to fp16 even on a CPU and never trained, and LoRA adds "
    "adapters to it",
    delete_when="LLaVA loads its checkpoint's tower, in the training's dtype, keeps LoRA out of it, and can train it",
    change=change,
)
