"""A checkpoint folder as the checks see it: its config.json, its kind, and the tensors in its files.

Files are read once, headers only. Problems of the files themselves are found here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from umed_plugin.checkpoints.adapter_folder import named_base
from umed_plugin.checkpoints.archives import PROGRAM
from umed_plugin.checkpoints.folder import ADAPTER, NON_LORA, is_plain_name
from umed_plugin.checkpoints.pickles import read_pickle
from umed_plugin.checkpoints.stored import BadFile, StoredTensor, read_safetensors
from umed_plugin.commands.doctor.catalogue import finding
from umed_plugin.commands.doctor.findings import ERROR, Finding, JsonChange

_OF_TRAINING = "umed.json"  # beside what a training under umed-run wrote
FULL, LORA, PROJECTOR, NOTHING = "full", "LoRA", "projector only", "nothing"
MM_PROJECTOR = "mm_projector.bin"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# In transformers' search order.
WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"(model|pytorch_model)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "sliding_window", "tokenizer_model_max_length")
_SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "mm_hidden_size", *_MAY_BE_NULL
)  # fmt: skip
_TEXTS = ("model_type", "mm_vision_tower", "vision_tower", "mm_projector_type", "_name_or_path")
_LISTS = ("architectures",)
_SHOWN = 5


@dataclass
class Contents:
    """A checkpoint folder.

    Attributes:
        path: absolute; symbolic links are not resolved, because LLaVA reads the folder's name.
        config: of config.json, without impossible values; empty if there is none.
        kind: full, LoRA, projector only, or nothing.
        weights: the full model's tensors, by name.
        adapter: a LoRA folder's low-rank matrices.
        others: tensors of ``non_lora_trainables.bin`` or ``mm_projector.bin``, under the full model's names.
        base: the base of a LoRA folder or projector; None if it is not on this machine.
        findings: problems of the files.
        read: weight files that were looked into, by their real paths.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    kind: str = NOTHING
    weights: dict[str, StoredTensor] = field(default_factory=dict)
    adapter: dict[str, StoredTensor] = field(default_factory=dict)
    others: dict[str, StoredTensor] = field(default_factory=dict)
    base: Contents | None = None
    findings: list[Finding] = field(default_factory=list)
    read: set[Path] = field(default_factory=set)

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def is_intermediate(self) -> bool:
        """Whether it is the adapter that a training under umed-run left, which `umed merge` makes a checkpoint of."""
        return self.kind == LORA and (self.path / _OF_TRAINING).is_file()

    @cached_property
    def adapter_config(self) -> dict[str, Any]:
        """adapter_config.json of a LoRA folder; {} if there is none."""
        return read_object(self.path / ADAPTER)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json; {} if there is none."""
        return read_object(self.path / "generation_config.json")

    def configures(self, **values: Any) -> JsonChange:
        """A change that sets ``values`` in config.json."""
        return JsonChange(self.config_file, values)


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object; {} if the file is missing or is not a JSON object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def is_weight_file(file: Path) -> bool:
    """Whether a file has the name of weights, which hold nothing but plain tensors."""
    return file.name in (*WHOLE, *ADAPTER_WEIGHTS, NON_LORA, MM_PROJECTOR) or bool(_SHARD.fullmatch(file.name))


def read_contents(path: Path, base: Path | None = None) -> Contents:
    """Read a checkpoint folder.

    Args:
        path: the folder.
        base: base of a LoRA folder or projector; by default the one that its files name.
    """
    contents = Contents(path)
    add = contents.findings.append
    if not contents.config_file.is_file():
        add(finding("config-missing", "there is no config.json", str(path)))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", ADAPTER):
        if (path / name).is_file() and not read_object(path / name):
            add(finding("config-unreadable", "the file is not a JSON object", str(path / name)))
    contents.config = _sensible(contents, read_object(contents.config_file))
    contents.kind = _kind(path)
    if contents.kind == FULL:
        contents.weights = _full_weights(contents)
    elif contents.kind == NOTHING:
        add(finding("weights-missing", "there are no weight files", str(path)))
    else:
        _read_trained_parts(contents)
        named = base or contents.adapter_config.get("base_model_name_or_path") or contents.config.get("_name_or_path")
        named = named_base(path, named)
        if named and Path(named).is_dir():
            contents.base = read_contents(Path(named).absolute())
            contents.findings += [fault for fault in contents.base.findings if fault.severity == ERROR]
    return contents


def _sensible(contents: Contents, config: dict[str, Any]) -> dict[str, Any]:
    """``config`` without impossible values, each of which is reported."""
    odd = {key for key in _SIZES if key in config and not _is_size(config[key], key in _MAY_BE_NULL)}
    odd |= {key for key in _TEXTS if not isinstance(config.get(key, ""), (str, type(None)))}
    odd |= {key for key in _LISTS if not isinstance(config.get(key, []), (list, type(None)))}
    for key in sorted(odd):
        found = f"{key} is {config[key]!r}"
        contents.findings.append(finding("config-value", found, f"{contents.config_file}: {key}"))
    return {key: value for key, value in config.items() if key not in odd}


def _is_size(value: Any, may_be_null: bool) -> bool:
    return (value is None and may_be_null) or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


def _kind(path: Path) -> str:
    if (path / ADAPTER).is_file():
        return LORA
    if any((path / name).is_file() for name in WHOLE) or any(_SHARD.fullmatch(file.name) for file in path.iterdir()):
        return FULL
    return PROJECTOR if (path / MM_PROJECTOR).is_file() else NOTHING


def _full_weights(contents: Contents) -> dict[str, StoredTensor]:
    """The tensors that transformers would load: from the first weight file or index that exists."""
    path = contents.path
    first = next((name for name in WHOLE if (path / name).is_file()), None)
    shards = sorted(file for file in path.iterdir() if _SHARD.fullmatch(file.name))
    if first is None:
        tensors, files = _without_index(contents, shards)
    elif first.endswith(".json"):
        tensors, files = _by_index(contents, path / first)
    else:
        tensors, files = read_weights(contents, path / first) or {}, [path / first]
    used = {file.name for file in files} | {first}
    idle = [name for name in WHOLE if (path / name).is_file() and name not in used]
    idle += [file.name for file in shards if file.name not in used]
    if idle:
        found = f"{', '.join(idle)}: not loaded, because {first or files[0].name} is"
        contents.findings.append(finding("second-weights", found, str(path), files=", ".join(idle)))
    return tensors


def _by_index(contents: Contents, index: Path) -> tuple[dict[str, StoredTensor], list[Path]]:
    """The tensors that an index names, from the shards that exist."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        return _without_index(
            contents, [file for file in sorted(contents.path.iterdir()) if _SHARD.fullmatch(file.name)]
        )
    outside = sorted({str(name) for name in places.values() if not is_plain_name(name)})
    if outside:
        found = f"it names {outside[0]!r}, which is not a file of its folder ({len(outside)} such in all)"
        contents.findings.append(finding("shard-outside", found, str(index)))
        return {}, [file for file in contents.path.iterdir() if _SHARD.fullmatch(file.name)]
    names = sorted(set(places.values()))
    files = [contents.path / name for name in names]
    missing = [name for name in names if not (contents.path / name).is_file()]
    for name in missing:
        lost = [tensor for tensor, shard in places.items() if shard == name]
        contents.findings.append(
            finding(
                "shard-missing", f"{name} is missing, with {len(lost)} tensors ({lost[0]}, ...)", str(index), file=name
            )
        )
    if missing:
        files = [file for file in files if file.is_file()]
    tensors, whole = _read_all(contents, files)
    held = {name: tensor.file.name for name, tensor in tensors.items()}
    if whole and not missing and held != places:
        wrong = sorted(name for name in set(held) | set(places) if held.get(name) != places.get(name))
        # Shards that the index does not name may belong to it or be older: no automatic fix.
        change = _new_index(index, tensors) if not _left_out(contents.path, names) else None
        found = f"the index and the shards disagree on {len(wrong)} tensors ({wrong[0]}, ...)"
        contents.findings.append(finding("index-wrong", found, str(index), change, checkpoint=contents.path))
    return tensors, files


def _left_out(path: Path, names: list[str]) -> list[Path]:
    return [file for file in path.iterdir() if _SHARD.fullmatch(file.name) and file.name not in names]


def _without_index(contents: Contents, shards: list[Path]) -> tuple[dict[str, StoredTensor], list[Path]]:
    """The tensors of all shards. If they form one complete set, ``--fix`` can write their index."""
    tensors, whole = _read_all(contents, shards)
    matches = [_SHARD.fullmatch(file.name) for file in shards]
    sets = {(match[1], match[3], match[4]) for match in matches if match}
    complete = len(sets) == 1 and len(shards) == int(next(iter(sets))[1])
    suffix = shards[0].suffix if shards else ""
    index = contents.path / ("model.safetensors.index.json" if suffix == ".safetensors" else WHOLE[3])
    change = _new_index(index, tensors) if complete and whole else None
    found = f"{len(shards)} shards and no {index.name} that names them" + (
        "" if complete else ", and they are not one complete set"
    )
    contents.findings.append(finding("index-missing", found, str(contents.path), change, checkpoint=contents.path))
    return tensors, shards


def _new_index(index: Path, tensors: dict[str, StoredTensor]) -> JsonChange:
    places = {name: tensor.file.name for name, tensor in sorted(tensors.items())}
    size = sum(tensor.size for tensor in tensors.values())
    return JsonChange(index, {"metadata": {"total_size": size}, "weight_map": places})


def _read_all(contents: Contents, files: list[Path]) -> tuple[dict[str, StoredTensor], bool]:
    """The tensors of all files, and whether all files could be read."""
    tensors: dict[str, StoredTensor] = {}
    whole = True
    for file in files:
        stored = read_weights(contents, file)
        whole = whole and stored is not None
        tensors.update(stored or {})
    return tensors, whole


def read_weights(contents: Contents, file: Path) -> dict[str, StoredTensor] | None:
    """The tensors of one weight file; None if it cannot be read, which is reported."""
    contents.read.add(file.resolve())
    try:
        if file.suffix == ".safetensors":
            return read_safetensors(file)
        pickled = read_pickle(file)
    except BadFile as error:
        contents.findings.append(finding(error.code, error.found, str(file), file=file.name))
        return None
    if pickled.foreign:
        found = f"it names {', '.join(pickled.foreign[:_SHOWN])}"
        contents.findings.append(finding(PROGRAM, found, str(file)))
    return pickled.tensors


def _read_trained_parts(contents: Contents) -> None:
    """Read the tensors of a LoRA folder or projector."""
    path = contents.path
    name = NON_LORA if contents.kind == LORA else MM_PROJECTOR
    if contents.kind == LORA:
        files = [path / weights for weights in ADAPTER_WEIGHTS if (path / weights).is_file()]
        if files:
            contents.adapter = read_weights(contents, files[0]) or {}
            first = next((tensor for tensor in contents.adapter if ".language_model." in tensor), None)
            if first is not None:
                contents.findings.append(finding("adapter-of-transformers", f"it trained {first}", str(files[0])))
                return
        else:
            found = f"there is neither {ADAPTER_WEIGHTS[0]} nor {ADAPTER_WEIGHTS[1]}"
            contents.findings.append(finding("adapter-missing", found, str(path)))
    if (path / name).is_file():
        trained = read_weights(contents, path / name) or {}
        contents.others = {key.removeprefix("base_model.model."): tensor for key, tensor in trained.items()}
    else:
        contents.findings.append(finding("projector-not-saved", f"there is no {name}", str(path)))
