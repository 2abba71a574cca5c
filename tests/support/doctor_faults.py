"""Checkpoints with one fault each, made of small ones from LLaVA's own classes; what the doctor must say of each."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support import canaries
from umed_plugin.checkpoints.folder import TOWER

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = {"mistral": "tiny-llava-mistral", "llama": "tiny-llava-v1"}
KEY = "model.layers.0.self_attn.q_proj.weight"


class Harmful:
    """Unpickling it would make the file that its name says."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def copied(source: Path, folder: Path) -> Path:
    """A checkpoint of its own, with its tower inside its folder."""
    shutil.copytree(source, folder)
    edit(folder, mm_vision_tower=str(folder / "vision_tower"))
    return folder


def edit(folder: Path, file: str = "config.json", remove: tuple[str, ...] = (), **values: object) -> None:
    path = folder / file
    content = json.loads(path.read_text())
    kept = {key: value for key, value in content.items() if key not in remove}
    path.write_text(json.dumps({**kept, **values}, indent=2))


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def save(folder: Path, content: dict[str, torch.Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in content.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def change(folder: Path, do: Callable[[dict[str, torch.Tensor]], None]) -> None:
    content = tensors(folder)
    do(content)
    save(folder, content)


def split(folder: Path) -> None:
    """Two shards and their index instead of one file."""
    content = tensors(folder)
    names = sorted(content)
    places = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: content[name] for name in part}, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(part, file))
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def as_pickle(folder: Path, zipped: bool = True, **more: object) -> None:
    content = tensors(folder)
    (folder / WEIGHTS).unlink()
    torch.save({**content, **more}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


def with_tower(folder: Path, by: float, name: str = "vision_model.post_layernorm.weight") -> None:
    """Put the tower's weights into the checkpoint, one of its tensors changed ``by`` a number."""
    tower = load_file(folder / "vision_tower" / WEIGHTS)
    bare = {key.removeprefix("vision_model."): value.half() for key, value in tower.items()}
    inside = {f"{TOWER}vision_tower.vision_model.{key}": value for key, value in bare.items()}
    inside[f"{TOWER}vision_tower.{name}"] += by
    save(folder, {**tensors(folder), **inside})


def change_tower(folder: Path, by: float, name: str = "pre_layrnorm.weight") -> None:
    """The tower's own folder with one of its tensors changed."""
    file = folder / "vision_tower" / WEIGHTS
    tower = load_file(file)
    key = next(one for one in tower if one.endswith(name))
    tower[key] += by
    save_file(tower, file, metadata={"format": "pt"})


def lose_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def forget_one(folder: Path) -> None:
    """Take the first tensor out of the index."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].pop(min(index["weight_map"]))
    (folder / INDEX).write_text(json.dumps(index))


def as_text_model(folder: Path) -> None:
    """Leave of a tower what a text model of CLIP has: other names."""
    save(
        folder, {f"text_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in tensors(folder).items()}
    )


def as_tower_of_224(folder: Path) -> None:
    """As many patches, each larger; and an image processor that leaves its sizes to transformers."""
    edit(folder, image_size=224, patch_size=28)
    change(folder, lambda c: c.update({"vision_model.embeddings.patch_embedding.weight": torch.zeros(64, 3, 28, 28)}))
    edit(folder, "preprocessor_config.json", size=None, crop_size=None)


def extra_rows(folder: Path, count: int) -> None:
    def grow(content: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            content[name] = torch.cat([content[name], content[name][:count]])

    change(folder, grow)
    edit(folder, vocab_size=config(folder)["vocab_size"] + count)


def as_delta(folder: Path) -> None:
    """Subtract a base, as LLaVA's make_delta does: here one that is almost the same, as a real base is."""
    torch.manual_seed(3)

    def subtract(content: dict[str, torch.Tensor]) -> None:
        for name, tensor in content.items():
            if "mm_projector" not in name:
                content[name] = (torch.randn(tensor.shape) * 0.01).to(tensor.dtype)

    change(folder, subtract)


def first_kind(folder: Path) -> None:
    """LLaVA-Med 1.0: a linear projector, marks around the image, tokens for them."""

    def linear(content: dict[str, torch.Tensor]) -> None:
        for name in [name for name in content if "mm_projector" in name]:
            tensor = content.pop(name)
            if ".0." in name:
                content[name.replace(".0.", ".")] = tensor

    change(folder, linear)
    extra_rows(folder, 3)
    edit(folder, mm_projector_type="linear", mm_use_im_start_end=True, mm_use_im_patch_token=True, model_type="llava")


def next_kind(folder: Path) -> None:
    """LLaVA-NeXT: tiles, a learnt end of row."""
    width = config(folder)["hidden_size"]
    change(folder, lambda content: content.update({"model.image_newline": torch.zeros(width).half()}))
    tiles = {"image_grid_pinpoints": [[64, 128], [128, 64]], "mm_patch_merge_type": "spatial_unpad"}
    edit(folder, image_aspect_ratio="anyres", **tiles)


def set_value(folder: Path, value: float, dtype: torch.dtype | None = None) -> None:
    def put(content: dict[str, torch.Tensor]) -> None:
        if dtype is not None:
            content.update({name: tensor.to(dtype) for name, tensor in content.items()})
        content[KEY][3, 5] = value

    change(folder, put)


def cut(file: Path, count: int = 100) -> None:
    file.write_bytes(file.read_bytes()[:-count])


def five_keys(folder: Path) -> None:
    theta = config(folder).get("rope_theta", 10000.0)
    edit(folder, remove=("rope_theta",), rope_parameters={"rope_theta": theta, "rope_type": "default"})


def bad_token_file(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"no sentencepiece model")


@dataclass(frozen=True)
class Fault:
    """One fault: the code that the doctor must give it, alone.

    Attributes:
        make: puts the fault into a copy of a good checkpoint.
        family: of the good checkpoint.
        name: of the folder.
        also: codes that cannot be apart from it.
        said: a part of what the doctor must say it found.
    """

    code: str
    make: Callable[[Path], object] = lambda folder: None
    family: str = "mistral"
    name: str | None = None
    also: frozenset[str] = field(default_factory=frozenset)
    said: str = ""

    def folder(self, parent: Path) -> Path:
        return parent / (self.name or NAMES[self.family])


def drop(*keys: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, remove=keys)


def put(**values: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder, **values)


def lose(*names: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda content: [content.pop(name) for name in names])


def then(*steps: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda folder: [step(folder) for step in steps] and None


def rename_tensor(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda content: content.update({new: content.pop(old)}))


def forget(folder: Path) -> None:
    """Take a tensor out of the index."""
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][KEY]
    (folder / INDEX).write_text(json.dumps(index))


def mark_of(folder: Path) -> Path:
    return folder.parent / "ran"


def point_outside(folder: Path, name: object) -> None:
    """Let the index name a file that is not beside it."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][KEY] = name
    (folder / INDEX).write_text(json.dumps(index))


def as_hostile(folder: Path, kind: str) -> None:
    (folder / WEIGHTS).unlink()
    canaries.hostile(kind, folder / "pytorch_model.bin", mark_of(folder))


def tower_as_hostile(folder: Path, kind: str) -> None:
    content = load_file(folder / "vision_tower" / WEIGHTS)
    (folder / "vision_tower" / WEIGHTS).unlink()
    canaries.hostile(kind, folder / "vision_tower" / "pytorch_model.bin", mark_of(folder), content)


def beside(folder: Path, kind: str, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    canaries.hostile(kind, folder / name, mark_of(folder))


def move(folder: Path, place: Callable[[int, int], tuple[int, int]]) -> None:
    """Change the place of one tensor in a safetensors header, which keeps its length."""
    file = folder / WEIGHTS
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[KEY]["data_offsets"] = place(*header[KEY]["data_offsets"])
    new = json.dumps(header, separators=(",", ":")).encode()
    new += b" " * (-len(new) % 8)
    file.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


def pickled(value: object, file: Path) -> None:
    file.write_bytes(pickle.dumps(value))


TWICE_NAMED = {"factor": 2.0, "rope_type": "linear", "type": "linear"}  # as transformers 5 saves it
EVERY_KIND = (*canaries.KINDS, *canaries.DISGUISED)
FAULTS = (
    Fault("config-missing", lambda f: (f / "config.json").unlink()),
    Fault("config-unreadable", lambda f: (f / "config.json").write_text('{"model_type": ')),
    Fault("weights-missing", lambda f: (f / WEIGHTS).unlink()),
    Fault("shard-missing", then(split, lose_shard), said="model-00002"),
    Fault("index-missing", then(split, lambda f: (f / INDEX).unlink())),
    Fault("index-missing", then(split, lambda f: (f / INDEX).write_text("{")), said="that names them"),
    Fault("index-wrong", then(split, forget), said=KEY),
    Fault("shard-outside", then(split, lambda f: point_outside(f, "../elsewhere.safetensors")), said="../elsewhere"),
    Fault("shard-outside", then(split, lambda f: point_outside(f, "/etc/passwd")), said="/etc/passwd"),
    Fault("shard-outside", then(split, lambda f: point_outside(f, 5)), said="'5'"),
    Fault("second-weights", lambda f: torch.save(tensors(f), f / "pytorch_model.bin"), said="pytorch_model.bin"),
    Fault("file-truncated", lambda f: cut(f / WEIGHTS), said="100 bytes fewer"),
    Fault("file-truncated", then(as_pickle, lambda f: cut(f / "pytorch_model.bin"))),
    Fault("file-truncated", then(lambda f: as_pickle(f, False), lambda f: cut(f / "pytorch_model.bin"))),
    Fault("file-truncated", lambda f: (f / WEIGHTS).write_bytes(b""), said="empty"),
    Fault("file-placeholder", lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n")),
    Fault("file-unreadable", lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 500)),
    Fault("file-unreadable", lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"x"), said="1 bytes more"),
    Fault("pickle-runs-code", lambda f: as_pickle(f, harm=Harmful(mark_of(f))), said="mkdir"),
    Fault("pickle-runs-code", lambda f: as_pickle(f, False, harm=Harmful(mark_of(f))), said="mkdir"),
    *(Fault("pickle-runs-code", lambda f, k=k: as_hostile(f, k)) for k in EVERY_KIND),
    *(Fault("pickle-runs-code", lambda f, k=k: tower_as_hostile(f, k)) for k in EVERY_KIND),
    *(Fault("pickle-beside", lambda f, k=k: beside(f, k, "optimizer.pt")) for k in EVERY_KIND),
    *(Fault("pickle-beside", lambda f, k=k: beside(f, k, "checkpoint-4/rng_state.pth")) for k in EVERY_KIND),
    *(
        Fault("pickle-beside", lambda f, n=name: beside(f, "reduce", n), also=also)
        for name, also in (
            ("mm_projector.bin", frozenset()),
            ("non_lora_trainables.bin", frozenset()),
            ("adapter_model.bin", frozenset()),
            ("pytorch_model.bin", frozenset({"second-weights"})),
            ("pytorch_model-00001-of-00002.bin", frozenset({"second-weights"})),
            ("vision_tower/mm_projector.bin", frozenset()),
        )
    ),
    Fault("file-unreadable", lambda f: move(f, lambda s, e: (s - 8, e - 8)), said="overlaps another tensor"),
    Fault("file-unreadable", lambda f: move(f, lambda s, e: (s - 2**60, e - 2**60)), said="not a tensor's place"),
    Fault("file-truncated", lambda f: move(f, lambda s, e: (s, 2**62)), said="bytes fewer"),
    Fault("pickle-beside", lambda f: torch.save(Harmful(mark_of(f)), f / "training_args.bin"), said="mkdir"),
    Fault("pickle-beside", lambda f: pickled(Harmful(mark_of(f)), f / "notes.pkl"), said="mkdir"),
    Fault("code-inside", lambda f: (f / "modeling_llava.py").write_text("raise SystemExit")),
    Fault("family-unknown", put(model_type="llava_mistrl"), said="llava_mistrl"),
    Fault("family-unknown", put(model_type="mistral")),
    Fault("config-value", put(num_attention_heads=0), said="num_attention_heads is 0"),
    Fault("config-value", drop("intermediate_size"), said="intermediate_size is not set"),
    Fault("delta", as_delta, family="llama"),
    Fault("mixed-config", put(model_type="llava_llama", architectures=["LlavaLlamaForCausalLM"]),
          also=frozenset({"name-of-other-class", "name-template"}), said="sliding_window"),
    Fault("mixed-config", put(architectures=["LlavaLlamaForCausalLM"])),
    Fault("config-of-transformers-5", five_keys),
    Fault("rope-scaling", put(rope_scaling=TWICE_NAMED), family="llama", said="'rope_type': 'linear'"),
    Fault("rope-scaling", put(rope_scaling={"type": "linear", "factor": 2}), family="llama", said="'factor': 2}"),
    Fault("rope-scaling", put(rope_scaling={"rope_type": "default"})),
    Fault("rope-scaling", put(rope_scaling={"rope_type": "yarn", "factor": 4.0}), said="yarn"),
    Fault("head-counts", put(num_key_value_heads=4), said="num_key_value_heads is 4"),
    Fault("head-counts", drop("num_key_value_heads"), family="llama", said="not set"),
    Fault("layers-dropped", put(num_hidden_layers=3), said="4 layers"),
    Fault("tensors-missing", lose(KEY), said=KEY),
    Fault("tensors-unknown", lambda f: change(f, lambda c: c.update({"model.vision_resampler.x": torch.ones(2)})),
          also=frozenset({"mixed-dtypes"}), said="vision_resampler"),
    Fault("shape-mismatch", put(intermediate_size=128), said="mlp"),
    Fault("vocabulary-size", put(vocab_size=999), said="vocab_size is 999"),
    Fault("projector-missing", lose(*(f"model.mm_projector.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")))),
    Fault("projector-type", drop("mm_projector_type"), said="mlp2x_gelu"),
    Fault("projector-type", rename_tensor("model.mm_projector.2.bias", "model.mm_projector.4.bias")),
    Fault("image-mode-unset", drop("image_aspect_ratio")),
    Fault("image-mode-unknown", put(image_aspect_ratio="anyres_max_9")),
    Fault("image-mode-anyres", next_kind),
    Fault("image-tiles-unset", then(next_kind, drop("image_grid_pinpoints")), also=frozenset({"image-mode-anyres"})),
    Fault("image-tiles-unset", put(mm_patch_merge_type="spatial_unpad"), said="image_newline"),
    Fault("generation-config", lambda f: edit(f, "generation_config.json", temperature=0.9, top_p=0.6), said="top_p 0.6"),
    Fault("quantized", lambda f: change(f, lambda c: c.update({KEY: c[KEY].to(torch.int8)}))),
    Fault("tokenizer-missing", lambda f: (f / "tokenizer.model").unlink()),
    Fault("tokenizer-unreadable", bad_token_file),
    Fault("tokens-without-rows", put(mm_use_im_start_end=True), said="rows"),
    Fault("image-patch-token", drop("mm_use_im_patch_token")),
    Fault("rows-without-tokens", lambda f: extra_rows(f, 2)),
    Fault("end-token", lambda f: edit(f, "generation_config.json", eos_token_id=7), said="eos_token_id is 7"),
    Fault("end-token", lambda f: edit(f, "generation_config.json", ("eos_token_id",)), said="eos_token_id is not set"),
    Fault("padding-token", put(pad_token_id=5000)),
    Fault("tower-unset", drop("mm_vision_tower")),
    Fault("tower-unset", drop("mm_vision_select_layer")),
    Fault("tower-moved", put(mm_vision_tower="/moved/away/vision_tower")),
    *(
        Fault("tower-moved", then(put(mm_vision_tower=name), lambda f: shutil.rmtree(f / "vision_tower")), said=repr(name))
        for name in ("../clip", "./clip", "a/b/c", "C:\\clip")
    ),
    Fault("tower-relative", put(mm_vision_tower="vision_tower")),
    Fault("tower-not-here", then(put(mm_vision_tower="openai/not-on-this-machine"),
                                 lambda f: shutil.rmtree(f / "vision_tower"))),
    *(
        Fault("tower-incomplete", make, said=said)
        for make, said in (
            (lambda f: (f / "vision_tower" / WEIGHTS).unlink(), "contains no weights"),
            (lambda f: lose("vision_model.pre_layrnorm.bias")(f / "vision_tower"), "1 tensors are missing (pre_layrnorm"),
            (lambda f: then(split, forget_one)(f / "vision_tower"), "1 tensors are missing ("),
            (lambda f: then(split, lambda t: (t / INDEX).unlink())(f / "vision_tower"), "contains no weights"),
            (lambda f: as_text_model(f / "vision_tower"), "37 tensors are missing (embeddings.class_embedding"),
        )
    ),
    Fault("shard-missing", lambda f: then(split, lose_shard)(f / "vision_tower"), said="model-00002"),
    Fault("tower-ignored", lambda f: with_tower(f, 0.5), said="1 of 39 tensors differ, by 0.5 at most"),
    Fault("tower-ignored", lambda f: (with_tower(f, 0.0), lose("vision_model.pre_layrnorm.bias")(f / "vision_tower")),
          said="1 are missing there (pre_layrnorm.bias"),
    Fault("tower-copy", lambda f: with_tower(f, 0.0), said="39 tensors equal"),
    Fault("tower-not-compared", then(lambda f: with_tower(f, 0.5), put(mm_vision_tower="openai/not-on-this-machine"),
                                     lambda f: shutil.rmtree(f / "vision_tower")), also=frozenset({"tower-not-here"})),
    Fault("tower-misfit", then(lambda f: with_tower(f, 0.0),
                               lose(TOWER + "vision_tower.vision_model.embeddings.class_embedding"))),
    Fault("tower-promised", put(unfreeze_mm_vision_tower=True)),
    Fault("tower-width", put(mm_hidden_size=1024), said="1024"),
    Fault("tower-image-size", lambda f: edit(f / "vision_tower", "preprocessor_config.json", crop_size=224), said="224"),
    Fault("tower-image-size", lambda f: edit(f / "vision_tower", "preprocessor_config.json", size={"shortest_edge": 73}),
          said="size is 73 x 73, and crop_size 64 x 64"),
    Fault("tower-image-size", lambda f: edit(f / "vision_tower", "preprocessor_config.json", do_resize=False),
          said="do_resize is false"),
    Fault("tower-image-size", lambda f: edit(f / "vision_tower", "preprocessor_config.json", size=None),
          said="size is 224 x 224, and crop_size 64 x 64, so boxes are elsewhere in the image than umed computes (size is null"),
    Fault("tower-image-size", lambda f: edit(f / "vision_tower", "preprocessor_config.json", crop_size=None),
          said="images are made 224 x 224, but the tower expects 64 x 64 (crop_size is null"),
    Fault("tower-size-null", lambda f: as_tower_of_224(f / "vision_tower"), said="size and crop_size are null"),
    Fault("not-finite", lambda f: set_value(f, float("nan")), said=KEY),
    Fault("not-finite", lambda f: set_value(f, float("inf")), said="1 values"),
    Fault("half-overflow", lambda f: set_value(f, 1e5, torch.bfloat16), said="9.98e+04"),
    Fault("empty-tensors", lambda f: change(f, lambda c: c.update({KEY: torch.empty(0, 128).half()})), said=KEY),
    Fault("mixed-dtypes", lambda f: change(f, lambda c: c.update({KEY: c[KEY].float()})), said=f"{KEY} is F32"),
    Fault("name-without-llava", name="my-mistral"),
    Fault("name-of-other-class", name="llava-umed", also=frozenset({"name-template"}), said="Llama"),
    Fault("name-of-mpt", name="llava-mistral-tmptgj", said="MPT"),
    Fault("name-of-other-class", family="llama", name="llava-v1-mistral", also=frozenset({"name-template"})),
    Fault("name-of-adapter", name="llava-mistral-lora-merged"),
    Fault("name-template", family="llama", name="my-llava", said="llava_v0"),
    Fault("path-with-mpt", name="tmptgj/tiny-llava-mistral"),
)  # fmt: skip
