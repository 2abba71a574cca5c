"""Every finding of the doctor, in the order of its checks. The table in docs/doctor.md is generated from this list.

"LLaVA" means unmodified LLaVA 1.2.2. Most statements about it are tested: `tests/commands/test_doctor_fixes.py` lets it load the
faulty checkpoints and the fixed ones.
"""

from __future__ import annotations

import shlex
from typing import Any

from umed_plugin.commands.doctor.findings import ERROR, NOTE, WARNING, Finding, JsonChange, Kind

_AGAIN = "Download or copy the file again: {file}."

FILES = (
    Kind(
        "config-missing", ERROR, "no config.json",
        "Nothing says what model this is; LLaVA does not load it.",
        "Copy config.json from the checkpoint that this one was made from. A LoRA run's checkpoint-N folder has none: use the "
        "output folder of a finished run.",
    ),
    Kind(
        "config-unreadable", ERROR, "config.json or another settings file is not a JSON object",
        "LLaVA does not load the checkpoint.",
        "Copy the file from the checkpoint that this one was made from.",
    ),
    Kind(
        "weights-missing", ERROR, "no weights, no adapter and no projector",
        "There is nothing to load.",
        "Needed: model.safetensors or pytorch_model.bin (or their shards and index), adapter_config.json, or "
        "mm_projector.bin.",
    ),
    Kind(
        "shard-missing", ERROR, "a shard that the index names is missing",
        "LLaVA does not load the checkpoint.",
        _AGAIN,
    ),
    Kind(
        "index-missing", ERROR, "shards without an index, or with one that cannot be read",
        "LLaVA finds no weights.",
        "umed doctor {checkpoint} --fix writes the index if all shards are present. Otherwise get the checkpoint "
        "again.",
        "writes the index from the shards' headers, if all shards are present",
    ),
    Kind(
        "index-wrong", ERROR, "the index and the shards name different tensors",
        "LLaVA skips tensors that the index does not name and initializes them randomly, without an error.",
        "umed doctor {checkpoint} --fix rewrites the index from the shards' headers.",
        "rewrites the index from the shards' headers",
    ),
    Kind(
        "shard-outside", ERROR, "the index names files outside the checkpoint's folder",
        "The loader would read whatever lies there. umed refuses it.",
        "Get the checkpoint again, from its publisher.",
    ),
    Kind(
        "second-weights", WARNING, "weight files that will not be loaded",
        "The folder holds two sets of weights. The loader takes one of them, perhaps the older one.",
        "Move the files that do not belong out of the folder: {files}.",
    ),
    Kind(
        "file-truncated", ERROR, "a weight file is truncated",
        "The file cannot be loaded, or part of its tensors is garbage.",
        _AGAIN,
    ),
    Kind(
        "file-placeholder", ERROR, "a weight file is a git LFS pointer",
        "The weights themselves were not downloaded.",
        "Run git lfs pull in the folder, or huggingface-cli download NAME --local-dir DIR.",
    ),
    Kind(
        "file-unreadable", ERROR, "the content of a weight file does not match its name",
        "The file cannot be loaded.",
        _AGAIN,
    ),
    Kind(
        "pickle-runs-code", ERROR, "a weight file of the checkpoint or its tower holds more than plain tensors",
        "LLaVA's torch loads pickles without a check and calls the functions that they name. It also runs TorchScript archives. "
        "umed refuses both.",
        "Do not load it. If you trust its source, load it once in a Python without credentials or network, and save its "
        "tensors again: torch.save({{k: v for k, v in torch.load(F).items()}}, F).",
    ),
    Kind(
        "pickle-beside", WARNING, "a pickle beside the loaded weights names functions that no training run writes",
        "Resuming training, loading it as weights, or calling torch.load on it, runs them.",
        "Delete it, unless you trust its source and want to resume training from it: {file}.",
    ),
    Kind(
        "code-inside", WARNING, "Python files, or auto_map in config.json or tokenizer_config.json",
        "Programs that trust remote code run it. LLaVA does so for folders with 'mpt' in their names.",
        "Read the code, or delete it together with auto_map: LLaVA's Llama and Mistral models need none.",
    ),
)  # fmt: skip

CONFIG = (
    Kind(
        "transformers-form", ERROR, "LlavaForConditionalGeneration, transformers' form",
        "LLaVA's own code cannot load this form, for inference or for training.",
        "umed convert {checkpoint} --out DIR/llava{mistral} writes LLaVA's form. vLLM and TRL take this one.",
    ),
    Kind(
        "family-unknown", ERROR, "umed does not support this model_type",
        "umed trains and evaluates Llama- and Mistral-based LLaVA checkpoints.",
        "{advice}",
    ),
    Kind(
        "config-value", ERROR, "config.json holds an impossible value, or lacks a size",
        "LLaVA does not load the checkpoint, or builds another model.",
        "Take config.json from the checkpoint that this one was made from.",
    ),
    Kind(
        "delta", ERROR, "the weights are differences from a base model, as LLaVA-Med 1.0 was published",
        "If they are loaded directly, the model writes garbage.",
        "python -m llava.model.apply_delta --base-model-path LLAMA-7B --target-model-path DIR/llava-med-7b "
        "--delta-path {checkpoint}",
    ),
    Kind(
        "mixed-config", WARNING, "llava_llama in config.json over Mistral weights",
        "LLaVA's train() loads every checkpoint as Llama and saves this. Template and loader are then those of Llama.",
        "Set model_type to llava_mistral and architectures to LlavaMistralForCausalLM, and use the template mistral_instruct. "
        "Train under umed-run, which loads by model_type.",
        "sets model_type and architectures, unless a sliding window makes the two classes differ",
    ),
    Kind(
        "config-of-transformers-5", ERROR, "rope_parameters instead of rope_theta",
        "LLaVA with its pinned transformers does not read rope_parameters. It uses a rotary base of 10000 without a "
        "warning.",
        "umed doctor {checkpoint} --fix writes rope_theta and rope_scaling.",
        "writes rope_theta, rope_scaling and torch_dtype from the newer keys",
    ),
    Kind(
        "rope-scaling", ERROR, "rope_scaling has other keys than type and factor, or other values than LLaVA knows",
        "LLaVA with its pinned transformers refuses such a Llama checkpoint. It scales by linear or dynamic, with a factor above "
        "1.0 that is written as a fraction. It does not read rope_scaling of a Mistral.",
        "umed doctor {checkpoint} --fix writes the two keys, if the kind is linear or dynamic. Of another kind, serve the "
        "checkpoint with transformers or vLLM.",
        "writes type and factor of a linear or dynamic scaling, and removes one of the kind default",
    ),
    Kind(
        "head-counts", ERROR, "num_key_value_heads does not match the key and value weights",
        "Training and umed refuse the checkpoint (size mismatch). LLaVA fails at the first token.",
        "Set num_key_value_heads to {heads} in config.json.",
        "sets num_key_value_heads, if all layers agree",
    ),
    Kind(
        "layers-dropped", ERROR, "more layers in the weights than num_hidden_layers",
        "LLaVA drops the last layers and continues.",
        "Set num_hidden_layers to the number of layers that the model was trained with.",
    ),
    Kind(
        "tensors-missing", ERROR, "tensors that the model needs are missing",
        "Training and umed refuse the checkpoint. LLaVA's loader initializes them randomly and only prints a warning.",
        "Get the checkpoint again, or export it again from its training run.",
    ),
    Kind(
        "tensors-unknown", WARNING, "tensors that the model does not have",
        "LLaVA drops them and only prints a warning.",
        "If they were trained, this checkpoint belongs to another model class. Use the code that trained it.",
    ),
    Kind(
        "shape-mismatch", ERROR, "tensor shapes that do not match config.json",
        "Training and umed refuse the checkpoint (size mismatch). LLaVA's loader does not check and may fail later.",
        "Take config.json from the checkpoint that the weights belong to.",
    ),
    Kind(
        "vocabulary-size", ERROR, "vocab_size differs from the number of rows of the embeddings and the output layer",
        "Training and umed refuse the checkpoint (size mismatch). LLaVA's loader does not check, so LLaVA answers with "
        "it.",
        "Set vocab_size to {rows} in config.json.",
        "sets vocab_size, if embeddings and output layer agree",
    ),
    Kind(
        "projector-missing", ERROR, "no projector weights",
        "LLaVA initializes the projector randomly and only prints a warning: the model sees noise.",
        "Get the checkpoint again. If it was trained in two steps, add mm_projector.bin with "
        "--pretrain_mm_mlp_adapter.",
    ),
    Kind(
        "projector-type", ERROR, "mm_projector_type does not match the projector in the weights",
        "LLaVA builds another projector and initializes it randomly, or refuses the weights.",
        "Set mm_projector_type to {kind} in config.json.",
        "sets mm_projector_type, if the weights are those of a linear or mlpNx_gelu projector",
    ),
    Kind(
        "image-mode-unset", WARNING, "image_aspect_ratio is not set",
        "LLaVA center-crops images that are not square: lesions at the edge are lost, and boxes refer to the crop.",
        "LLaVA 1.5 and LLaVA-Med 1.5 were trained with \"image_aspect_ratio\": \"pad\". Set the value that this one was "
        "trained with.",
    ),
    Kind(
        "image-mode-unknown", ERROR, "image_aspect_ratio is neither pad, square nor anyres",
        "LLaVA treats any other word as square without a message, and center-crops the image.",
        "Allowed: pad, square, anyres.",
    ),
    Kind(
        "image-mode-anyres", WARNING, "image_aspect_ratio is anyres",
        "umed's records support pad and square. Boxes in tiles are neither trained nor evaluated.",
        "Train with --image_aspect_ratio pad. LLaVA itself still answers with anyres.",
    ),
    Kind(
        "image-tiles-unset", ERROR, "anyres without image_grid_pinpoints, or spatial_unpad without image_newline",
        "LLaVA fails at the first image, or initializes image_newline randomly.",
        "Copy image_grid_pinpoints and mm_patch_merge_type from the config.json of the LLaVA-NeXT checkpoint that this "
        "one was made from.",
    ),
    Kind(
        "generation-config", WARNING, "generation_config.json has sampling values without do_sample",
        "transformers refuses to save it: 4.36 omits it from what training saves, later versions fail at the first save "
        "(LLaVA #1144, #1252).",
        "Set do_sample to true in generation_config.json. LLaVA's programs set do_sample themselves.",
        "sets do_sample to true",
    ),
    Kind(
        "quantized", ERROR, "the weights are stored in 8 or 4 bits",
        "They cannot be trained, merged or compared.",
        "Use the half-precision checkpoint. LLaVA quantizes while loading (--load-4bit).",
    ),
)  # fmt: skip

TOKENS = (
    Kind(
        "tokenizer-missing", ERROR, "no tokenizer.model, or no vocab.json and merges.txt for GPT2Tokenizer",
        "LLaVA reads its slow tokenizer from these files and fails without them.",
        "Copy them, tokenizer_config.json and special_tokens_map.json from the checkpoint that this one was made from.",
    ),
    Kind(
        "tokenizer-unreadable", ERROR, "the tokenizer's files cannot be read",
        "LLaVA does not load the checkpoint.",
        "Copy the tokenizer's files from the checkpoint that this one was made from.",
    ),
    Kind(
        "tokens-without-rows", ERROR, "the tokenizer has more tokens than the embeddings have rows",
        "LLaVA adds rows of random values for these tokens.",
        "Use the tokenizer that the model was trained with. If config.json asks for tokens that training did not add, set "
        "mm_use_im_start_end to false.",
    ),
    Kind(
        "image-patch-token", WARNING, "mm_use_im_patch_token is not set, and `<im_patch>` has no row",
        "LLaVA treats it as true and adds a row of random values. The model may then write this token.",
        "Set mm_use_im_patch_token to false in config.json: no prompt uses the token.",
        "sets mm_use_im_patch_token to false",
    ),
    Kind(
        "rows-without-tokens", WARNING, "the embeddings have more rows than the tokenizer has tokens",
        "LLaVA removes the extra rows when it loads. That is harmless for padding, but not if the tokenizer lost added "
        "tokens.",
        "Compare added_tokens.json with the file of the checkpoint that this one was made from.",
    ),
    Kind(
        "end-token", ERROR,
        "eos_token_id in config.json or generation_config.json is not the tokenizer's end token, or is not set in the latter",
        "Answers never end, or end too early.",
        "Set eos_token_id to {token} in {files}.",
        "sets eos_token_id, if the tokenizer's end token is the `</s>` of LLaVA's templates, or config.json's",
    ),
    Kind(
        "questions-masked", NOTE, "a non-legacy tokenizer with Vicuna's templates",
        "LLaVA's training masks samples with several questions entirely, and only prints 'tokenization mismatch' (#661, #1166, "
        "#1706).",
        "Write one record per question, as umed's recipes do. A umed run stops before it trains on masked records.",
    ),
    Kind(
        "padding-token", ERROR, "pad_token_id lies outside the vocabulary",
        "The embedding layer cannot be created: LLaVA does not load the checkpoint.",
        "Set pad_token_id to {token} in config.json. Padding is masked, so any token works.",
        "sets pad_token_id to the tokenizer's unknown token",
    ),
)  # fmt: skip

TOWER = (
    Kind(
        "tower-unset", ERROR, "config.json names no vision tower",
        "The model sees no images.",
        "Set mm_vision_tower to the tower that it was trained with, such as openai/clip-vit-large-patch14-336.",
    ),
    Kind(
        "tower-moved", ERROR, "mm_vision_tower is neither a folder on this machine nor a tower that LLaVA knows",
        "LLaVA stops with 'Unknown vision tower'.",
        "Set mm_vision_tower in config.json to the tower's absolute path, or to its name on the hub.",
        "sets it to the checkpoint's own folder vision_tower, if it has one",
    ),
    Kind(
        "tower-relative", WARNING, "mm_vision_tower is a relative path",
        "LLaVA resolves it against the working directory, and fails in any other directory.",
        "Write the absolute path in config.json.",
        "writes the absolute path of the folder inside the checkpoint, if it exists",
    ),
    Kind(
        "tower-not-here", NOTE, "the tower is on the hub, not on this machine",
        "The first load needs the network.",
        "huggingface-cli download {tower}",
    ),
    Kind(
        "tower-incomplete", ERROR, "the weight files of the tower, or their index, lack tensors of a CLIP vision model",
        "LLaVA gives random values to what is missing: the model sees noise. umed and its training refuse the tower.",
        "Copy or download the tower's folder again, with all of its weight files. A text model of CLIP alone is no tower.",
    ),
    Kind(
        "tower-ignored", ERROR, "tower weights in the checkpoint differ from the tower that LLaVA loads",
        "LLaVA drops them and answers with a tower that was not trained with this model (LLaVA-Med #86, #105, #109).",
        "Set unfreeze_mm_vision_tower to true in config.json: LLaVA then loads them. umed always uses them.",
        "sets unfreeze_mm_vision_tower, if the weights fit the tower",
    ),
    Kind(
        "tower-copy", NOTE, "tower weights in the checkpoint equal the tower that LLaVA loads",
        "LLaVA reports them as unused, which is correct. They only take disk space.",
        "Nothing to do. umed merge and umed upgrade keep them.",
    ),
    Kind(
        "tower-not-compared", WARNING, "tower weights in the checkpoint are dropped, and the tower is not available for "
        "comparison",
        "If they were trained, LLaVA answers with the wrong tower.",
        "Run huggingface-cli download {tower}, then umed doctor again. Or set unfreeze_mm_vision_tower to true in "
        "config.json.",
    ),
    Kind(
        "tower-misfit", ERROR, "tower weights in the checkpoint do not fit the tower that config.json names",
        "umed refuses them. LLaVA drops them, or initializes the rest randomly when told to use them.",
        "Set mm_vision_tower in config.json to the tower that the checkpoint was trained with.",
    ),
    Kind(
        "tower-promised", ERROR, "unfreeze_mm_vision_tower without tower weights",
        "LLaVA initializes the tower randomly: the model sees noise.",
        "Remove unfreeze_mm_vision_tower from config.json.",
        "removes unfreeze_mm_vision_tower from config.json",
    ),
    Kind(
        "tower-width", ERROR, "mm_hidden_size differs from the tower's width or from the projector's input width",
        "Training and umed refuse the checkpoint (size mismatch). LLaVA's loader does not check; LLaVA fails at the first image "
        "if tower and projector differ.",
        "Set mm_hidden_size to {width}, and mm_vision_tower to the tower of that width.",
        "sets mm_hidden_size, if tower and projector agree",
    ),
    Kind(
        "tower-image-size", ERROR, "the tower's image processor and the tower disagree about the image size",
        "LLaVA fails at the first image if crop_size is another. Else it shows another part of each image, and boxes are off.",
        "Set crop_size and size (shortest_edge) in the tower's preprocessor_config.json to {size}, and do_resize and "
        "do_center_crop to true.",
    ),
    Kind(
        "tower-size-null", WARNING, "size or crop_size is null in the preprocessor_config.json of a tower for 224 pixels",
        "LLaVA's transformers takes 224 for null. With transformers 5 no image can be prepared: training and umed refuse the "
        "tower.",
        "Set size (shortest_edge) and crop_size in the tower's preprocessor_config.json to {size}.",
    ),
)  # fmt: skip

WEIGHTS = (
    Kind(
        "not-finite", ERROR, "NaN or infinite values",
        "Answers are empty or garbage.",
        "Use an earlier checkpoint of the run. Training in fp16 causes this: use bf16, or fp32 on older GPUs.",
    ),
    Kind(
        "half-overflow", ERROR, "values that fp16 cannot represent",
        "LLaVA loads weights in fp16, where these values become infinite.",
        "Load in bf16 or fp32 (umed does), or use an earlier checkpoint.",
    ),
    Kind(
        "empty-tensors", ERROR, "tensors without values",
        "They were saved under ZeRO-3 without gathering: the weights are missing.",
        "Run zero_to_fp32.py in the run folder, or train with stage3_gather_16bit_weights_on_model_save.",
    ),
    Kind(
        "mixed-dtypes", WARNING, "the language model has several dtypes",
        "LLaVA loads everything as fp16, so values of higher precision are rounded. Some programs refuse the mixture.",
        "umed merge and umed upgrade keep the dtypes of their input checkpoint. If the input was not mixed, export "
        "again.",
    ),
)  # fmt: skip

ADAPTER = (
    Kind(
        "adapter-of-transformers", ERROR, "an adapter of transformers' form of LLaVA",
        "LLaVA's layout has other names; TRL and peft train this form.",
        "Merge it there first: PeftModel.from_pretrained(model, FOLDER).merge_and_unload().save_pretrained(MERGED). Then: umed "
        "convert MERGED --out DIR",
    ),
    Kind(
        "adapter-missing", ERROR, "adapter_config.json without adapter weights",
        "There is nothing to load.",
        "Copy adapter_model.safetensors or adapter_model.bin from the run folder.",
    ),
    Kind(
        "adapter-not-plain", ERROR, "an adapter that is not plain LoRA",
        "PEFT makes another model of it, and each version of PEFT a different one. The plugin refuses it.",
        "Merge it with the program and the peft that trained it, and use the merged checkpoint.",
    ),
    Kind(
        "adapter-tensors", ERROR, "an adapter whose tensors are not those of its adapter_config.json",
        "PEFT drops what does not fit, without an error.",
        "Copy both files again from the same training's output folder.",
    ),
    Kind(
        "projector-not-saved", ERROR, "a LoRA folder without non_lora_trainables.bin",
        "The trained projector is missing: LLaVA writes it only at the end of training (LLaVA #729, #1200), and then "
        "looks for it on the hub.",
        "Use the output folder of a finished run. Under umed-run every checkpoint-N has the file.",
    ),
    Kind(
        "base-missing", ERROR, "the base of a LoRA folder or projector is not on this machine",
        "Without its base it is not a model.",
        "Run umed doctor {checkpoint} --base CKPT. Give --base, or LLaVA's --model-base, wherever you use it.",
    ),
    Kind(
        "base-mismatch", ERROR, "the trained weights do not fit the base",
        "LLaVA fails, or drops them without an error.",
        "With --base, name the checkpoint that it was trained on.",
    ),
    Kind(
        "adapter-not-merged", NOTE, "the LoRA folder of a training under umed-run",
        "It is an intermediate result. Stock LLaVA loads what umed merge makes of it, whatever this folder is called.",
        "Run umed merge {checkpoint} --base CKPT --out DIR/llava-mistral (llava-v1 for a Llama base).",
    ),
    Kind(
        "adapter-of-mistral", ERROR, "a LoRA folder or projector over a Mistral base",
        "LLaVA loads the base of every LoRA folder or projector as Llama, and fails.",
        "Run umed merge {checkpoint} --base CKPT --out DIR/llava-mistral. LLaVA loads the result.",
    ),
    Kind(
        "adapter-model-type", WARNING, "model_type 'llava' in a LoRA folder or projector",
        "LLaVA reads it by model_type, and transformers treats 'llava' as its own form. That form has no defaults "
        "for what an older config.json omits, so LLaVA fails (LLaVA #1031).",
        "Set model_type to llava_llama in config.json.",
        "sets model_type to llava_llama",
    ),
    Kind(
        "adapter-fields", WARNING, "adapter_config.json has fields that the installed peft does not know",
        "Depending on its version, peft drops them or fails. These fields have neutral values.",
        "Remove the fields from adapter_config.json, or install the peft version that wrote it.",
        "removes the fields, because their values change nothing",
    ),
    Kind(
        "adapter-fields-needed", ERROR, "adapter_config.json has fields that the installed peft does not know and that "
        "change the model",
        "peft fails, or drops them and loads a different model than the trained one.",
        "Install the peft version that wrote it, or use umed merge, which knows use_rslora.",
    ),
)  # fmt: skip

NAMES = (
    Kind(
        "name-without-llava", ERROR, "the folder's name does not contain 'llava'",
        "LLaVA treats it as a language model without images.",
        "{advice}",
    ),
    Kind(
        "name-of-mpt", ERROR, "'mpt' in the folder's name, as some temporary folders have",
        "LLaVA loads the weights into an MPT model and fails (LLaVA #1022, #1416, #1567, #1597).",
        "{advice}",
    ),
    Kind(
        "name-of-other-class", WARNING, "'mistral' in the name of a Llama model, or missing in the name of a Mistral "
        "model",
        "LLaVA chooses class, tokenizer and template by the name: what config.json omits gets the other class's "
        "defaults.",
        "{advice}",
    ),
    Kind(
        "name-of-adapter", WARNING, "'lora' in the name of a full checkpoint or projector, or missing in the name of a "
        "LoRA folder",
        "LLaVA treats a folder with a base as LoRA if and only if its name contains 'lora'.",
        "{advice}",
    ),
    Kind(
        "name-template", WARNING, "by the folder's name LLaVA would choose another template",
        "llava.serve.cli and llava.eval.run_llava choose the template by the name. The model then gets prompts unlike "
        "its training.",
        "Give --conv-mode {template}.",
    ),
    Kind(
        "path-with-mpt", WARNING, "'mpt' in the path",
        "LLaVA's train() treats any path that contains 'mpt' as an MPT model, even a temporary folder.",
        "Train from another path: move it, or ln -s {checkpoint} ELSEWHERE/llava{mistral}.",
    ),
)  # fmt: skip

GROUPS = {
    "Files": FILES,
    "Configuration": CONFIG,
    "Tokens": TOKENS,
    "Vision tower": TOWER,
    "Values": WEIGHTS,
    "LoRA and projector folders": ADAPTER,
    "Names": NAMES,
}
KINDS = {kind.code: kind for kinds in GROUPS.values() for kind in kinds}


def finding(code: str, found: str, where: str, change: JsonChange | None = None, **values: Any) -> Finding:
    """A finding of the catalogue; ``values`` fill the names in braces. Folders stand in commands: they are quoted for a shell."""
    kind = KINDS[code]
    values |= {name: shlex.quote(str(values[name])) for name in ("checkpoint", "tower") if name in values}
    return Finding(code, kind.severity, found, where, kind.why, kind.remedy.format(**values), change)
