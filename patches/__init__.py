"""Everything that umed-plugin changes in other libraries: one file for each thing, and nothing else touches another library.

Each file says what it changes, why, which versions and sources it knows, and when it can be deleted; ``umed patches`` checks
all of them against what is installed. ``umed-run`` installs `after_import` in every Python child (see `umed_plugin.launch`).
Importing this package imports no library that is patched.
"""

from __future__ import annotations

from umed_plugin.patches import (
    attention_implementation,
    attention_mask,
    conversation_templates,
    data_module,
    lora_resume,
    main_script,
    model_class,
    torch_load,
    train_arguments,
    trainer,
    vision_tower,
    xformers_attention,
    zero_3,
)

from umed_plugin.patching import Patch, apply

ALL: tuple[Patch, ...] = tuple(
    module.PATCH
    for module in (
        train_arguments,
        conversation_templates,
        data_module,
        trainer,
        model_class,
        attention_implementation,
        attention_mask,
        xformers_attention,
        vision_tower,
        torch_load,
        zero_3,
        lora_resume,
    )
)
TRIGGERS = frozenset({main_script.TRIGGER, *(patch.trigger for patch in ALL)})


def after_import(module: str) -> None:
    """Apply the patches that wait for ``module``.

    Raises:
        UsageError: LLaVA was started in the one way that cannot be patched.
        PatchMisfit: one of them does not fit; none was applied.
    """
    main_script.report_errors_plainly()
    if module == main_script.TRIGGER:
        main_script.refuse_main_script()
    apply([patch for patch in ALL if patch.trigger == module])
