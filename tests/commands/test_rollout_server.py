"""`umed rollout-server`: the command that vLLM gets, what is refused, and the process that becomes the server."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.umed_runs import environment, run_python

from umed_plugin.cli import build_parser, main
from umed_plugin.commands import rollout_server


@pytest.fixture
def served(tmp_path) -> Path:
    """A folder as `umed convert --language-model-only` writes it, without weights."""
    folder = tmp_path / "language-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "umed_language_model_of": {"name": "x"}}))
    return folder


def environment_with(tmp_path: Path, distribution: str, version: str, *, module: bool = True) -> str:
    """A Python that finds this distribution of vLLM, whose server prints what it was called with."""
    packages = tmp_path / "packages"
    information = packages / f"{distribution.replace('-', '_')}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    if module:
        server = packages / "vllm" / "entrypoints" / "openai" / "api_server.py"
        server.parent.mkdir(parents=True)
        server.write_text(
            "import json, os, sys\n"
            "names = [n for n in os.environ if n.startswith(('VLLM_', 'PYTHONPATH'))]\n"
            "print('SERVER', json.dumps([sys.argv[1:], {n: os.environ[n] for n in names}, os.getpid()]))\n"
        )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(packages))} exec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return str(python)


def words_of(printed: str) -> tuple[dict[str, str], list[str]]:
    words = shlex.split(printed.splitlines()[-1])
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words if "=" in word.split("/")[0]}
    return given, [word for word in words if word.partition("=")[0] not in given]


def test_the_command_is_printed_for_a_gpu(served, tmp_path, capsys):
    python = environment_with(tmp_path, "vllm", "0.33.0")
    arguments = ["rollout-server", str(served), "--python", python, "--print", "--lora-rank", "100"]
    assert main([*arguments, "--vllm", "--gpu-memory-utilization", "0.4"]) == 0
    variables, words = words_of(capsys.readouterr().out)
    assert variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1" and "VLLM_CPU_KVCACHE_SPACE" not in variables
    assert words[:3] == [python, "-m", "vllm.entrypoints.openai.api_server"]
    assert words[words.index("--max-lora-rank") + 1] == "128", "the next rank that vLLM allows"
    assert words[words.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert words[words.index("--host") + 1] == "127.0.0.1" and words[words.index("--model") + 1] == str(served)
    assert {"--enable-prompt-embeds", "--enable-lora", "--enable-prefix-caching"} <= set(words)
    assert words[-2:] == ["--gpu-memory-utilization", "0.4"] and "--block-size" not in words


@pytest.mark.parametrize(("name", "version"), [("vllm-cpu", "0.32.0"), ("vllm", "0.32.0+cpu")])
def test_a_build_for_cpus_gets_its_settings(name, version, served, tmp_path, capsys):
    python = environment_with(tmp_path, name, version)
    assert main(["rollout-server", str(served), "--python", python, "--print", "--kv-cache-gb", "1"]) == 0
    variables, words = words_of(capsys.readouterr().out)
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "1" and variables["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert words[words.index("--block-size") + 1] == "32"


def test_the_command_is_printed_without_any_vllm(served, capsys):
    assert main(["rollout-server", str(served), "--print"]) == 0
    said = capsys.readouterr()
    assert words_of(said.out)[1][0] == "python" and len(said.out.splitlines()) == 1
    assert "build for GPUs" in said.err and "--python" in said.err


def test_a_shell_runs_what_is_printed(served, tmp_path, capsys):
    """Also where a value has a space: a quoted NAME=VALUE would be the name of a program."""
    args = build_parser().parse_args(["rollout-server", str(served), "--print", "--python", "/bin/echo"])
    printed = {"LD_PRELOAD": "/a b/lib.so"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            rollout_server, "_engine_of", lambda args: rollout_server.Engine("/bin/echo", True, "/a b/lib.so")
        )
        assert args.run(args) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"LD_PRELOAD={shlex.quote(printed['LD_PRELOAD'])} /bin/echo" in line
    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("-m vllm.entrypoints.openai.api_server")


def test_the_command_becomes_the_server(served, tmp_path):
    """The very process, so that signals and Ctrl-C are vLLM's; without our PYTHONPATH."""
    python = environment_with(tmp_path, "vllm", "0.33.0")
    arguments = ["-m", "umed_plugin.cli", "rollout-server", str(served), "--python", python, "--port", "8123"]
    done = run_python(arguments, env=environment(), fresh=True)
    assert done.returncode == 0, done.stderr
    assert "starting vLLM" in done.stdout and "http://127.0.0.1:8123/v1" in done.stdout
    called, variables, _ = json.loads(done.stdout.split("SERVER ")[1])
    assert called[called.index("--port") + 1] == "8123"
    assert variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert variables["PYTHONPATH"] == str(tmp_path / "packages")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "other machines could load files of this one"),
        (["--lora-rank", "1000"], "must be from 1 to 512"),
        (["--port", "0"], "must be from 1 to 65535"),
        (["--kv-cache-gb", "0"], "must be 1 or more"),
        (["--python", "/no/such/python"], "cannot be run"),
        (["--python", sys.executable], "has no vLLM. It is the Python of"),
        (["--python", sys.executable], "LLaVA's pins cannot hold it. Make another one (python -m venv ENV"),
        ([], "vLLM is not installed in this environment"),
    ],
)
def test_what_would_fail_later_is_refused(arguments, words, served, monkeypatch, capsys):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert main(["rollout-server", str(served), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_vllm_is_installed_into_an_environment_without_llava_alone(served, tmp_path, capsys):
    plain = tmp_path / "plain" / "bin" / "python"
    plain.parent.mkdir(parents=True)
    plain.symlink_to(os.path.realpath(sys.executable))
    (tmp_path / "plain" / "pyvenv.cfg").write_text(f"home = {Path(os.path.realpath(sys.executable)).parent}\n")
    call = ["rollout-server", str(served), "--python", str(plain)]
    assert main(call) == 2
    assert f"has no vLLM. Install it there: {plain} -m pip install vllm" in capsys.readouterr().err
    packages = Path(
        subprocess.check_output([plain, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    )
    (packages / "llava-1.2.2.dist-info").mkdir(parents=True)
    (packages / "llava-1.2.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: llava\nVersion: 1.2.2\n")
    assert main(call) == 2
    assert "has no vLLM. It is the Python of LLaVA's environment" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "flag", "remedy"),
    [
        (["--host", "0.0.0.0"], "--host", "Give --host before --vllm"),
        (["--host=0.0.0.0"], "--host", "Give --host before --vllm"),
        (["--hos", "0.0.0.0"], "--host", "Give --host before --vllm"),
        (["--enforce-eager", "--port", "80"], "--port", "Give --port before --vllm"),
        (["--model", "other"], "--model", "--language-model"),
        (["--served_model_name=other"], "--served-model-name", "--language-model"),
        (["--served", "other"], "--served-model-name", "--language-model"),
    ],
)
def test_vllm_is_not_told_another_address_or_model(words, flag, remedy, served, monkeypatch, capsys):
    """vLLM takes the last of two, which nothing has checked."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert main(["rollout-server", str(served), "--print", "--vllm", *words]) == 2
    said = capsys.readouterr().err
    assert f"this command sets vLLM's {flag} itself" in said and remedy in said


def test_vllms_other_flags_go_to_it(served, capsys):
    more = ["--hf-overrides", "{}", "--model-impl", "vllm", "--max-num-seqs", "8", "-O3"]
    assert main(["rollout-server", str(served), "--print", "--vllm", *more]) == 0
    assert words_of(capsys.readouterr().out)[1][-len(more) :] == more


@pytest.mark.parametrize(
    ("version", "refused"), [("0.33.0", True), ("0.33.0+cpu", False), (None, True)], ids=["gpu", "cpu", "none"]
)
def test_a_kv_cache_that_no_build_reads_is_refused(version, refused, served, tmp_path, capsys):
    python = [] if version is None else ["--python", environment_with(tmp_path, "vllm", version)]
    assert main(["rollout-server", str(served), *python, "--print", "--kv-cache-gb", "4"]) == 2 * refused
    assert ("--kv-cache-gb 4: has no effect" in capsys.readouterr().err) == refused


def test_a_folder_for_a_language_model_that_is_one_is_refused(served, tmp_path, capsys):
    assert main(["rollout-server", str(served), "--print", "--language-model", str(tmp_path / "x")]) == 2
    assert f"has no effect, because {served} is a language model already" in capsys.readouterr().err


def test_the_key_reaches_the_server_without_its_line_end(served, tmp_path):
    python = environment_with(tmp_path, "vllm", "0.33.0")
    arguments = ["-m", "umed_plugin.cli", "rollout-server", str(served), "--python", python]
    done = run_python(arguments, env={**environment(), "VLLM_API_KEY": "a-key\r\n"}, fresh=True)
    assert json.loads(done.stdout.split("SERVER ")[1])[1]["VLLM_API_KEY"] == "a-key"
    done = run_python(arguments, env={**environment(), "VLLM_API_KEY": "a-\rkey"}, fresh=True)
    assert done.returncode == 2 and "VLLM_API_KEY holds a key whose character 3" in done.stderr


def test_another_host_needs_a_key(served, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_API_KEY", "a key")
    assert main(["rollout-server", str(served), "--host", "0.0.0.0", "--print"]) == 0
    assert "a key" not in capsys.readouterr().out


@pytest.mark.llava
def test_a_checkpoints_language_model_is_written_once(tiny_mistral, tmp_path, capsys):
    folder = tmp_path / "language-model"
    arguments = ["rollout-server", str(tiny_mistral), "--language-model", str(folder), "--quiet"]
    python = environment_with(tmp_path, "vllm", "0.33.0")
    assert main([*arguments, "--print"]) == 0
    said = capsys.readouterr()
    assert not folder.exists(), "nothing is written where the command is only printed"
    assert f"--model {folder}" in said.out
    assert f"umed convert {tiny_mistral} --language-model-only --out {folder}" in said.err
    arguments += ["--python", python]
    run_python(["-m", "umed_plugin.cli", *arguments], env=environment(), fresh=True)
    written = os.stat(folder / "config.json").st_mtime_ns
    arguments += ["--print"]
    assert main(arguments) == 0 and os.stat(folder / "config.json").st_mtime_ns == written
    said = capsys.readouterr()
    assert f"--model {folder}" in said.out and "not written" not in said.err
    config = json.loads((folder / "config.json").read_text())
    config["umed_language_model_of"]["weights"][0][1] += 1
    (folder / "config.json").write_text(json.dumps(config))
    assert main(arguments) == 1 and "is not the language model of" in capsys.readouterr().err
