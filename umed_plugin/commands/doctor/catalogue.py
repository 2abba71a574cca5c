"""Everything that can be found, in the order in which it is looked for; the README's table is made of it.

LLaVA means LLaVA 1.2.2 as it is. Most of what is said of it was tried: `tests/test_doctor_fixes.py` lets it load the faulty
checkpoints and the mended ones.
"""

from __future__ import annotations

from typing import Any

from umed_plugin.commands.doctor.findings import ERROR, NOTE, WARNING, Finding, JsonChange, Kind

_AGAIN = "Get the file again: {file}."

FILES = (
    Kind(
        "config-missing", ERROR, "no config.json",
        "Nothing says what model this is; LLaVA does not load it.",
        "Copy config.json from the checkpoint that this one was made from. A LoRA run's checkpoint-N folder has none: take the "
        "output folder of a run that ended.",
    ),
    Kind(
        "config-unreadable", ERROR, "config.json or another settings file is no JSON object",
        "LLaVA does not load the checkpoint.",
        "Copy the file from the checkpoint that this one was made from.",
    ),
    Kind(
        "weights-missing", ERROR, "neither weights, nor an adapter, nor a projector",
        "There is nothing to load.",
        "Needed: model.safetensors or pytorch_model.bin (or their shards and index), adapter_config.json, or mm_projector.bin.",
    ),
    Kind(
        "shard-missing", ERROR, "a shard that the index names is missing",
        "LLaVA does not load the checkpoint.",
        _AGAIN,
    ),
    Kind(
        "index-missing", ERROR, "shards without an index, or with one that cannot be read",
        "LLaVA finds no weights.",
        "umed doctor {checkpoint} --fix writes the index where all shards are there; else get the checkpoint again.",
        "writes the index from the shards' headers, when all shards are there",
    ),
    Kind(
        "index-wrong", ERROR, "the index names other tensors than the shards hold",
        "LLaVA leaves out what the index does not name, and begins those tensors at random without an error.",
        "umed doctor {checkpoint} --fix writes the index anew from the shards' headers.",
        "writes the index anew from the shards' headers",
    ),
    Kind(
        "second-weights", WARNING, "weight files that are not loaded",
        "Of two sets of weights the loader takes one, which may be the older one.",
        "Move the files away that do not belong: {files}.",
    ),
    Kind(
        "file-truncated", ERROR, "a weight file is cut off",
        "The file cannot be loaded, or part of its tensors is garbage.",
        _AGAIN,
    ),
    Kind(
        "file-placeholder", ERROR, "a weight file is a placeholder of git LFS",
        "The weights themselves were not downloaded.",
        "git lfs pull in the folder, or huggingface-cli download NAME --local-dir DIR.",
    ),
    Kind(
        "file-unreadable", ERROR, "a weight file is something else than its name says",
        "The file cannot be loaded.",
        _AGAIN,
    ),
    Kind(
        "pickle-runs-code", ERROR, "a weight file holds more than plain tensors",
        "LLaVA's torch loads pickles without a check: what they name is called. umed refuses them.",
        "Do not load it. If you trust where it comes from, load it once in a Python without keys and network, and save its "
        "tensors anew: torch.save({{k: v for k, v in torch.load(F).items()}}, F).",
    ),
    Kind(
        "pickle-beside", WARNING, "a pickle beside the weights names what no training writes",
        "Resuming training, or a curious torch.load, runs it.",
        "Delete it unless training is to be resumed from it: {file}.",
    ),
    Kind(
        "code-inside", WARNING, "Python files, or auto_map in config.json",
        "Programs that trust remote code run it; LLaVA does so for folders with 'mpt' in their names.",
        "Read the code, or delete it together with auto_map: LLaVA's Llama and Mistral models need none.",
    ),
)  # fmt: skip

CONFIG = (
    Kind(
        "transformers-form", ERROR, "LlavaForConditionalGeneration, transformers' form",
        "LLaVA's own code, and training with it, cannot load this form.",
        "umed convert {checkpoint} --out DIR/llava{mistral} writes LLaVA's form. vLLM and TRL take this one.",
    ),
    Kind(
        "family-unknown", ERROR, "model_type is none of LLaVA's that umed knows",
        "umed trains and evaluates Llama- and Mistral-based LLaVA checkpoints.",
        "{advice}",
    ),
    Kind(
        "config-value", ERROR, "a value in config.json that cannot be, or a size that is missing",
        "LLaVA does not load the checkpoint, or builds another model.",
        "Take config.json from the checkpoint that this one was made from.",
    ),
    Kind(
        "delta", ERROR, "weights are differences from a base model, as LLaVA-Med 1.0 was published",
        "Loaded as they are, the model writes garbage.",
        "python -m llava.model.apply_delta --base-model-path LLAMA-7B --target-model-path DIR/llava-med-7b "
        "--delta-path {checkpoint}",
    ),
    Kind(
        "mixed-config", WARNING, "llava_llama in config.json over Mistral weights",
        "LLaVA's train() loads every checkpoint as Llama and saves this; templates and loader are then Llama's.",
        "Set model_type to llava_mistral and architectures to LlavaMistralForCausalLM, and ask with mistral_instruct. Train "
        "under umed-run, which loads by model_type.",
        "sets model_type and architectures, when no sliding window makes the two differ",
    ),
    Kind(
        "config-of-transformers-5", ERROR, "rope_parameters instead of rope_theta",
        "LLaVA on its pins reads no rope_parameters and takes a rotary base of 10000 without a warning.",
        "umed doctor {checkpoint} --fix writes rope_theta and rope_scaling.",
        "writes rope_theta, rope_scaling and torch_dtype from the newer keys",
    ),
    Kind(
        "head-counts", ERROR, "num_key_value_heads does not fit the key and value weights",
        "Training and umed refuse the checkpoint (size mismatch); LLaVA fails at the first token.",
        "Set num_key_value_heads to {heads} in config.json.",
        "sets num_key_value_heads, when all layers agree",
    ),
    Kind(
        "layers-dropped", ERROR, "more layers in the weights than num_hidden_layers",
        "LLaVA leaves the last layers out and says nothing that stops it.",
        "Set num_hidden_layers to the number of layers that the model was trained with.",
    ),
    Kind(
        "tensors-missing", ERROR, "tensors that the model needs are missing",
        "LLaVA begins them at random and only warns.",
        "Get the checkpoint again, or export it again from the run that trained it.",
    ),
    Kind(
        "tensors-unknown", WARNING, "tensors that the model does not have",
        "LLaVA leaves them out and only warns.",
        "If they were trained, this checkpoint belongs to another class: use the code that trained it.",
    ),
    Kind(
        "shape-mismatch", ERROR, "shapes that config.json does not give",
        "Training and umed refuse the checkpoint (size mismatch); LLaVA's loader does not look, and may fail later.",
        "Take config.json from the checkpoint that the weights belong to.",
    ),
    Kind(
        "vocabulary-size", ERROR, "vocab_size is not the number of rows of embeddings and output",
        "Training and umed refuse the checkpoint (size mismatch); LLaVA answers with it, as its loader does not look.",
        "Set vocab_size to {rows} in config.json.",
        "sets vocab_size, when embeddings and output layer agree",
    ),
    Kind(
        "projector-missing", ERROR, "no projector weights",
        "LLaVA begins the projector at random and only warns: the model sees noise.",
        "Get the checkpoint again; if it was trained in two steps, add mm_projector.bin with --pretrain_mm_mlp_adapter.",
    ),
    Kind(
        "projector-type", ERROR, "mm_projector_type is not the projector that lies in the weights",
        "LLaVA builds another projector and begins it at random, or refuses the weights.",
        "Set mm_projector_type to {kind} in config.json.",
        "sets mm_projector_type, when the weights are those of a linear or mlpNx_gelu one",
    ),
    Kind(
        "image-mode-unset", WARNING, "image_aspect_ratio is not set",
        "LLaVA cuts the middle out of images that are not square: lesions at the edge are gone, and boxes count from the cut.",
        "LLaVA 1.5 and LLaVA-Med 1.5 were trained with \"image_aspect_ratio\": \"pad\"; set what this one was trained with.",
    ),
    Kind(
        "image-mode-unknown", ERROR, "image_aspect_ratio is neither pad, square nor anyres",
        "LLaVA takes any other word for square without a message, and cuts the middle out.",
        "Allowed: pad, square, anyres.",
    ),
    Kind(
        "image-mode-anyres", WARNING, "image_aspect_ratio is anyres",
        "umed's records know pad and square: boxes in tiles are neither trained nor measured.",
        "Train with --image_aspect_ratio pad; LLaVA itself answers with anyres as before.",
    ),
    Kind(
        "image-tiles-unset", ERROR, "anyres without image_grid_pinpoints, or spatial_unpad without image_newline",
        "LLaVA fails at the first image, or begins image_newline at random.",
        "Copy image_grid_pinpoints and mm_patch_merge_type from the config.json of the LLaVA-NeXT checkpoint that this is of.",
    ),
    Kind(
        "generation-config", WARNING, "generation_config.json has sampling values without do_sample",
        "transformers refuses to save it: 4.36 leaves it out of what training saves, later ones fail at the first save "
        "(LLaVA #1144, #1252).",
        "Set do_sample to true in generation_config.json. LLaVA's programs say themselves whether to sample.",
        "sets do_sample to true",
    ),
    Kind(
        "quantized", ERROR, "weights are stored in 8 or 4 bits",
        "They can be neither trained, nor merged, nor compared.",
        "Use the checkpoint in half precision; LLaVA quantizes while loading (--load-4bit).",
    ),
)  # fmt: skip

TOKENS = (
    Kind(
        "tokenizer-missing", ERROR, "no tokenizer.model",
        "LLaVA reads its slow tokenizer from tokenizer.model and fails without.",
        "Copy tokenizer.model, tokenizer_config.json and special_tokens_map.json from the checkpoint that this was made from.",
    ),
    Kind(
        "tokenizer-unreadable", ERROR, "the tokenizer's files cannot be read",
        "LLaVA does not load the checkpoint.",
        "Copy the tokenizer's files from the checkpoint that this one was made from.",
    ),
    Kind(
        "tokens-without-rows", ERROR, "the tokenizer has more tokens than the embeddings have rows",
        "LLaVA adds rows of random values for them.",
        "Take the tokenizer that the model was trained with; if config.json asks for tokens that training did not add, set "
        "mm_use_im_start_end to false.",
    ),
    Kind(
        "image-patch-token", WARNING, "mm_use_im_patch_token is not set, and no row is there for `<im_patch>`",
        "LLaVA takes it for true and adds a row of random values, which the model may come to write.",
        "Set mm_use_im_patch_token to false in config.json: no prompt holds the token.",
        "sets mm_use_im_patch_token to false",
    ),
    Kind(
        "rows-without-tokens", WARNING, "embeddings have rows that no token has",
        "LLaVA cuts them off when it loads. Harmless if they are padding; not if the tokenizer lost its added tokens.",
        "Compare added_tokens.json with that of the checkpoint that this one was made from.",
    ),
    Kind(
        "end-token", ERROR, "config.json or generation_config.json ends answers at another token than the tokenizer's end",
        "Answers do not end, or end too early.",
        "Set eos_token_id to {token} in {files}.",
        "sets eos_token_id, when `</s>` of LLaVA's templates is the tokenizer's end",
    ),
    Kind(
        "questions-masked", NOTE, "a tokenizer that is not legacy, under the templates of Vicuna",
        "LLaVA's training masks samples with several questions whole, and only prints 'tokenization mismatch' (#661, #1166, "
        "#1706).",
        "One record for each question, as umed's recipes write them; a run of umed's stops before it trains on masked ones.",
    ),
    Kind(
        "padding-token", ERROR, "pad_token_id lies outside the vocabulary",
        "The embedding layer cannot be made: LLaVA does not load the checkpoint.",
        "Set pad_token_id to {token} in config.json; padding is masked, so any token will do.",
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
        "tower-moved", ERROR, "mm_vision_tower names no folder on this machine, nor a tower that LLaVA knows",
        "LLaVA stops with 'Unknown vision tower'.",
        "Write the tower's absolute path, or its name on the hub, as mm_vision_tower in config.json.",
        "names the checkpoint's own folder vision_tower, when it holds one",
    ),
    Kind(
        "tower-relative", WARNING, "mm_vision_tower is a relative path",
        "LLaVA resolves it against the folder that it is started in, and fails in any other.",
        "Write the absolute path in config.json.",
        "writes the absolute path of the folder inside the checkpoint, when it is there",
    ),
    Kind(
        "tower-not-here", NOTE, "the tower is on the hub and not on this machine",
        "The first load needs the network.",
        "huggingface-cli download {tower}",
    ),
    Kind(
        "tower-ignored", ERROR, "tower weights in the checkpoint differ from the tower that LLaVA loads",
        "LLaVA drops them and answers with another tower than was trained (LLaVA-Med #86, #105, #109).",
        "Set unfreeze_mm_vision_tower to true in config.json: LLaVA then loads them. umed uses them in any case.",
        "sets unfreeze_mm_vision_tower, when the weights fit the tower",
    ),
    Kind(
        "tower-copy", NOTE, "tower weights in the checkpoint equal the tower that LLaVA loads",
        "LLaVA reports them as unused, which is right; they only take room.",
        "Nothing to do. umed merge and umed upgrade keep them.",
    ),
    Kind(
        "tower-not-compared", WARNING, "tower weights in the checkpoint are dropped, and the tower is not here to compare with",
        "If they were trained, LLaVA answers with another tower than was trained.",
        "huggingface-cli download {tower}, then umed doctor again; or set unfreeze_mm_vision_tower to true in config.json.",
    ),
    Kind(
        "tower-misfit", ERROR, "tower weights in the checkpoint do not fit the tower that config.json names",
        "umed refuses them; LLaVA drops them, or begins the rest at random when told to use them.",
        "Name the tower in config.json (mm_vision_tower) that the checkpoint was trained with.",
    ),
    Kind(
        "tower-promised", ERROR, "unfreeze_mm_vision_tower without tower weights",
        "LLaVA begins the tower at random: the model sees noise.",
        "Take unfreeze_mm_vision_tower out of config.json.",
        "takes unfreeze_mm_vision_tower out of config.json",
    ),
    Kind(
        "tower-width", ERROR, "mm_hidden_size is not the width of the tower, or not that of the projector's input",
        "Training and umed refuse the checkpoint (size mismatch); LLaVA's loader does not look, and fails at the first image "
        "where tower and projector differ.",
        "Set mm_hidden_size to {width}, and name the tower of that width.",
        "sets mm_hidden_size, when tower and projector agree",
    ),
    Kind(
        "tower-image-size", ERROR, "the tower's image processor makes images of another size than the tower takes",
        "LLaVA fails at the first image.",
        "Set crop_size and size in the tower's preprocessor_config.json to {size}.",
    ),
)  # fmt: skip

WEIGHTS = (
    Kind(
        "not-finite", ERROR, "NaN or infinite values",
        "Answers are empty or garbage.",
        "Take an earlier checkpoint of the run. Training in fp16 does this: use bf16, or fp32 on older GPUs.",
    ),
    Kind(
        "half-overflow", ERROR, "values that half precision cannot hold",
        "LLaVA loads in fp16, where they become infinite.",
        "Load in bf16 or fp32 (umed does), or take an earlier checkpoint.",
    ),
    Kind(
        "empty-tensors", ERROR, "tensors without values",
        "Saved under ZeRO-3 without gathering: the weights are not there.",
        "Run zero_to_fp32.py in the run's folder, or train with stage3_gather_16bit_weights_on_model_save.",
    ),
    Kind(
        "mixed-dtypes", WARNING, "language model in several number formats",
        "LLaVA loads all as fp16, so the finer ones are rounded; some programs refuse the mixture.",
        "umed merge and umed upgrade keep the formats of the checkpoint that they began with; export again if it was not so.",
    ),
)  # fmt: skip

ADAPTER = (
    Kind(
        "adapter-missing", ERROR, "adapter_config.json without adapter weights",
        "There is nothing to load.",
        "Copy adapter_model.safetensors or adapter_model.bin from the run's folder.",
    ),
    Kind(
        "projector-not-saved", ERROR, "a LoRA folder without non_lora_trainables.bin",
        "The trained projector is not there: LLaVA writes it at the end of training only (LLaVA #729, #1200), and looks for it "
        "on the hub.",
        "Take the output folder of a run that ended. Under umed-run every checkpoint-N has it.",
    ),
    Kind(
        "base-missing", ERROR, "the base of a LoRA folder or projector is not on this machine",
        "Without its base it is no model.",
        "umed doctor {checkpoint} --base CKPT; and --base, or LLaVA's --model-base, wherever it is used.",
    ),
    Kind(
        "base-mismatch", ERROR, "the trained weights do not fit the base",
        "LLaVA fails, or leaves them out without an error.",
        "Give the checkpoint that it was trained on with --base.",
    ),
    Kind(
        "adapter-of-mistral", ERROR, "a LoRA folder or projector over a Mistral base",
        "LLaVA loads every base of a LoRA folder or projector as Llama, and fails.",
        "umed merge {checkpoint} --base CKPT --out DIR/llava-mistral: LLaVA loads the result.",
    ),
    Kind(
        "adapter-model-type", WARNING, "model_type 'llava' in a LoRA folder or projector",
        "LLaVA reads it by model_type, and transformers takes 'llava' for its own form, which has no defaults for what an older "
        "config.json leaves out: LLaVA then fails (LLaVA #1031).",
        "Set model_type to llava_llama in config.json.",
        "sets model_type to llava_llama",
    ),
    Kind(
        "adapter-fields", WARNING, "adapter_config.json has fields that the installed peft does not know",
        "peft drops them or fails, depending on its version. These have their neutral values.",
        "Take the fields out of adapter_config.json, or install the peft that wrote it.",
        "takes the fields out, as their values change nothing",
    ),
    Kind(
        "adapter-fields-needed", ERROR, "adapter_config.json has such fields that change the model",
        "peft drops them, and loads another model than was trained, or fails.",
        "Install the peft that wrote it, or umed merge, which knows use_rslora.",
    ),
)  # fmt: skip

NAMES = (
    Kind(
        "name-without-llava", ERROR, "the folder's name does not hold 'llava'",
        "LLaVA takes it for a language model without images.",
        "{advice}",
    ),
    Kind(
        "name-of-mpt", ERROR, "'mpt' in the folder's name, as in a temporary folder's",
        "LLaVA loads the weights into an MPT model, and fails (LLaVA #1022, #1416, #1567, #1597).",
        "{advice}",
    ),
    Kind(
        "name-of-other-class", WARNING, "'mistral' in the name of a Llama model, or not in that of a Mistral model",
        "LLaVA chooses class, tokenizer and template by it: what config.json leaves out gets the other class's defaults.",
        "{advice}",
    ),
    Kind(
        "name-of-adapter", WARNING, "'lora' in the name of a full checkpoint or projector, or not in that of a LoRA folder",
        "LLaVA treats a folder with a base as LoRA if and only if its name says so.",
        "{advice}",
    ),
    Kind(
        "name-template", WARNING, "LLaVA would choose another template by the folder's name",
        "llava.serve.cli and llava.eval.run_llava choose the template by the name, and the model is asked as it was not trained.",
        "Give --conv-mode {template}.",
    ),
    Kind(
        "path-with-mpt", WARNING, "'mpt' in the path",
        "LLaVA's train() takes any path with 'mpt' in it, a temporary folder's too, for an MPT model.",
        "Train from another path: mv, or ln -s {checkpoint} ELSEWHERE/llava{mistral}.",
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
    """A finding of the catalogue; ``values`` fill the names in braces."""
    kind = KINDS[code]
    return Finding(code, kind.severity, found, where, kind.why, kind.remedy.format(**values), change)
