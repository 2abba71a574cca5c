"""Everything that umed-plugin changes in other libraries, one file per change. Nothing outside this folder changes a library, but
`safe_loading.behind_the_door` does what `torch_load` does for the time of one call.

Each file says what it changes, why, which versions and sources it was written for, and when it can be deleted. ``umed patches``
checks all of them against the installed libraries. ``umed-run`` installs `after_import` in every Python child (see
`umed_plugin.launch`). docs/patches-contributing.md says how to add one.
Importing this package imports no library that is patched.
"""

from __future__ import annotations

from umed_plugin.patches import (
    attention_implementation,
    attention_mask,
    config_layout,
    conversation_templates,
    data_module,
    deepspeed_save,
    empty_groups,
    finished_run,
    full_precision,
    late_weights,
    layer_norms,
    lora_resume,
    main_script,
    model_class,
    old_flags,
    one_writer,
    own_code,
    process_group,
    quantized_base,
    resumed_batches,
    resumed_order,
    sdpa_mask,
    shared_memory_build,
    short_epochs,
    split_attention,
    torch_load,
    tower_layout,
    train_arguments,
    trainer,
    trainer_signatures,
    vision_tower,
    xformers_attention,
    zero_3,
)
from umed_plugin.patching import Patch, apply
from umed_plugin.patching.import_hook import install

# Without these LLaVA fails, or computes other numbers, on libraries newer than its pins. Without `torch_load` it runs code in a
# checkpoint's pickles, and without `own_code` a checkpoint's Python if somebody says yes. For every process that uses LLaVA.
STACK: tuple[Patch, ...] = tuple(
    module.PATCH
    for module in (
        layer_norms,
        trainer_signatures,
        resumed_order,
        full_precision,
        tower_layout,
        config_layout,
        sdpa_mask,
        torch_load,
        own_code,
    )
)
# These add the plugin's features to LLaVA's training, or fix LLaVA's training. For training processes only.
TRAINING: tuple[Patch, ...] = tuple(
    module.PATCH
    for module in (
        old_flags,
        train_arguments,
        conversation_templates,
        data_module,
        trainer,
        quantized_base,
        model_class,
        attention_implementation,
        attention_mask,
        split_attention,
        xformers_attention,
        vision_tower,
        zero_3,
        shared_memory_build,
        late_weights,
        deepspeed_save,
        empty_groups,
        lora_resume,
        one_writer,
        finished_run,
        resumed_batches,
        short_epochs,
        process_group,
    )
)
ALL = (*STACK, *TRAINING)
TRIGGERS = frozenset({main_script.TRIGGER, *(patch.trigger for patch in ALL)})


def after_import(module: str) -> None:
    """Apply the patches whose trigger is ``module``, in a training process.

    Raises:
        UsageError: LLaVA was started in the one way that cannot be patched.
        PatchMisfit: a patch does not fit; none was applied.
    """
    main_script.report_errors_plainly()
    if module == main_script.TRIGGER:
        main_script.refuse_main_script()
    apply([patch for patch in ALL if patch.trigger == module])


def prepare_llava() -> None:
    """Let LLaVA run on the installed libraries, in a process that does not train. Call it before `llava` is imported.

    Raises:
        PatchMisfit: a patch does not fit; raised now or when LLaVA is imported.
    """
    install({patch.trigger for patch in STACK}, _after_import_without_training)


def _after_import_without_training(module: str) -> None:
    apply([patch for patch in STACK if patch.trigger == module])
