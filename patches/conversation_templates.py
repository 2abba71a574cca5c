"""Add the templates ``umed_v1`` and ``umed_mistral``, and refuse an unknown ``--version``.

Target: the dictionary `llava.conversation.conv_templates`.
Why: LLaVA looks up templates only in this dictionary, and silently trains with ``vicuna_v1`` if ``--version`` is not in it.
Versions: LLaVA 1.2.x.
Delete when: LLaVA reads templates from a file and refuses an unknown one. The templates themselves stay ours.
"""

from __future__ import annotations

from umed_plugin.errors import unknown_name
from umed_plugin.flags.definition import UmedFlags
from umed_plugin.patches import model_class
from umed_plugin.patches.training_run import LLAVA, TRAIN, TrainingRun
from umed_plugin.patching import Patch, Recorder, Target

# train() handles these two itself, without the dictionary.
_VERSIONS_OF_TRAIN = ("v0", "v0.5")
# LLaVA's programs ask a `llava_mistral` checkpoint under this template, and no other checkpoint.


def change(recorder: Recorder) -> None:
    """Add our templates to LLaVA's."""
    from llava.conversation import conv_templates

    from umed_plugin.checkpoints.prompt_templates import TEMPLATES, conversation_template

    for name in TEMPLATES:
        recorder.add_item(conv_templates, name, conversation_template(name))


def find_faults(run: TrainingRun) -> list[str]:
    """Faults of ``--version``."""
    from llava.conversation import SeparatorStyle, conv_templates

    from umed_plugin.checkpoints.prompt_templates import TEMPLATES

    version = run.model_args.version
    allowed = {*conv_templates, *_VERSIONS_OF_TRAIN}
    if version not in allowed:
        return [
            f"--version: {unknown_name('template', version, allowed)} (Stock LLaVA would silently train with vicuna_v1.)"
        ]
    if run.active and (version == "v0.5" or conv_templates[version].sep_style == SeparatorStyle.PLAIN):
        return [f"--version {version} has no place for questions. Use umed_v1 or umed_mistral."]
    contradiction = _contradicts_checkpoint(run, version) if run.active else None
    if contradiction is not None:
        return [contradiction]
    if (
        run.active
        and version not in TEMPLATES
        and run.flags.umed_stock_template_share != UmedFlags.umed_stock_template_share
    ):
        return [
            f"--umed_stock_template_share has no effect with --version {version}, only with {' and '.join(TEMPLATES)}."
        ]
    return []


def _contradicts_checkpoint(run: TrainingRun, version: str) -> str | None:
    """Why a template does not belong to the checkpoint's ``model_type``, as a sentence.

    Stock LLaVA and ``umed evaluate`` choose the template by the checkpoint. A model that was trained under another one answers
    with empty or garbled text there.
    """
    from umed_plugin.checkpoints.prompt_templates import is_of_family

    name = run.model_args.model_name_or_path
    try:
        model_type = str(model_class.read_config(name, run.training_args.cache_dir).get("model_type"))
    except (OSError, ValueError):
        return None  # `model_class.find_faults` says so
    if model_type not in model_class.FAMILIES or is_of_family(version, model_type):
        return None
    fitting = "umed_mistral (or stock mistral_instruct)" if "mistral" in model_type else "umed_v1 (or stock v1)"
    return (
        f"--version {version}: does not fit --model_name_or_path {name}, whose model_type is {model_type!r}. Stock LLaVA and "
        f"`umed evaluate` would ask the trained checkpoint under another template. Use --version {fitting}."
    )


PATCH = Patch(
    name="conversation_templates",
    targets=(
        TRAIN,
        Target("llava.conversation:conv_templates", LLAVA, ()),
        Target(
            "llava.conversation:Conversation",
            LLAVA,
            ("5ffc2b75bb0fc67ed7bc8ee37156ca4203f802eebb7a83a41fd51bbbe3c42fd3",),
        ),
    ),
    why="LLaVA has no medical template, and silently trains with vicuna_v1 if --version is unknown",
    delete_when="LLaVA reads templates from a file and refuses an unknown one",
    change=change,
)
