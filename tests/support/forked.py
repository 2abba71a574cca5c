"""Python processes forked from one that has imported torch, transformers and MONAI: of a tiny run more than half is imports.

What is forked is ``python -m llava.train.train_mem``, under `umed-run` or torchrun too, ``python -m umed_plugin.cli`` and
``python benchmarks/NAME.py``. A shell's lines get there by `support.forked_shells`. The child takes its command's environment,
working directory, path, descriptors and session, runs the sitecustomize of its path, then the module as ``__main__``, so that
LLaVA, the plugin and its patches are imported in each anew. Only the start is not the real one: tests/test_launch.py and
test_deepspeed.py start real processes, and ``UMED_FRESH_RUNS=1`` makes all tests do so.

    python tests/support/forked.py      the server: one JSON request a line on stdin; it answers with files
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("llava.train.train_mem", "umed_plugin.cli")
BENCHMARKS = ROOT / "benchmarks"
TORCHRUN = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--nproc_per_node"]
PRELOADED = (
    *("torch", "torch.distributed", "transformers.trainer", "transformers.models.mistral.modeling_mistral"),
    *("transformers.models.llama.modeling_llama", "transformers.models.llama.tokenization_llama", "peft", "accelerate"),
    *("transformers.models.mpt.modeling_mpt", "transformers.models.clip.modeling_clip", "monai", "scipy.ndimage"),
    "transformers.models.clip.image_processing_clip",
)
# `sys.path` of every Python here, without the script's folder and PYTHONPATH.
_BASE_PATH: list[str] = []
# What is to be tidied up at the end of every process, by the libraries that are preloaded.
_BASE_FINALIZERS: set[weakref.finalize] = set()
_LOCK = threading.Lock()


def parsed(command: Sequence[Any], environment: dict[str, str]) -> tuple[int, str, list[str], dict[str, str]] | None:
    """(ranks, module or script, arguments, environment) of a command that can be forked; None for any other."""
    from umed_plugin.launch import child_environment

    words, ranks = _with_modules(command), 1
    if words[:3] == ["python", "-m", "umed_plugin.launch"]:
        words, environment = _with_modules(words[3:]), child_environment(environment)
    if words[:3] == ["python", "-m", "torch.distributed.run"] and words[3:8] == TORCHRUN:
        ranks, words = int(words[8]), words[9:]
        words = _with_modules(words[1:]) if words[:1] == ["--no-python"] else ["python", *words]
    if words[:2] == ["python", "-m"] and words[2] in MODULES:
        return ranks, words[2], words[3:], environment
    if words[:1] == ["python"] and len(words) > 1 and Path(words[1]).parent == BENCHMARKS:
        return ranks, words[1], words[2:], environment
    return None


def _with_python(module: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs a module or script."""
    return [sys.executable, *([] if module.endswith(".py") else ["-m"]), module, *arguments]


def _with_modules(command: Sequence[Any]) -> list[str]:
    """The words of a command, with ``python -m MODULE`` for the scripts beside this Python."""
    words = [str(word) for word in command]
    folder = Path(sys.executable).parent
    scripts = {"torchrun": "torch.distributed.run", "umed": "umed_plugin.cli", "umed-run": "umed_plugin.launch"}
    for name, module in scripts.items():
        if words[:1] in ([str(folder / name)], [name]):
            return ["python", "-m", module, *words[1:]]
    return ["python", *words[1:]] if words[:1] == [sys.executable] else words


class ForkingPopen(subprocess.Popen):
    """`subprocess.Popen` that forks what `parsed` knows, in a process that has imported `PRELOADED`; runs the rest as ever."""

    _SIGNATURE = inspect.signature(subprocess.Popen._execute_child)

    def _execute_child(self, *arguments: Any) -> None:
        given = self._SIGNATURE.bind(self, *arguments).arguments
        environment = dict(os.environ if given["env"] is None else given["env"])
        command = given["args"]
        found = None if isinstance(command, (str, bytes)) else parsed(command, environment)
        if found is None:
            super()._execute_child(*arguments)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(given, *found)
        self._child_created = True
        for kept, end in (("p2cwrite", "p2cread"), ("c2pread", "c2pwrite"), ("errread", "errwrite")):
            if given[end] != -1 and given[kept] != -1:
                os.close(given[end])
        devnull = getattr(self, "_devnull", None)
        if devnull is not None:
            os.close(devnull)


def _become(
    given: dict[str, Any], ranks: int, module: str, arguments: list[str], environment: dict[str, str]
) -> NoReturn:
    """In a child: take over what exec and Python's start would set up, run the module or its ranks, and end."""
    code = 1
    try:
        for descriptor, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
            if given[name] not in (-1, descriptor):
                os.dup2(given[name], descriptor)
        _close_as_exec_does()
        for finalizer in set(weakref.finalize._registry) - _BASE_FINALIZERS:
            finalizer.detach()  # the temporary folders of the process that it is forked from
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGCHLD, signal.SIG_DFL)):
            signal.signal(number, handler)
        if given.get("start_new_session"):
            os.setsid()
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(given["cwd"] or os.getcwd())
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        entries = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
        command = _with_python(module, arguments)
        if ranks > 1:
            code = _wait_for(
                [ForkingPopen(command, env={**environment, **more}) for more in _variables_of_ranks(ranks)]
            )
        else:
            is_script = module.endswith(".py")
            sys.path[:] = [str(Path(module).parent) if is_script else os.getcwd(), *entries, *_BASE_PATH]
            importlib.invalidate_caches()
            sys.argv = [module if is_script else "-m", *arguments]
            sys.orig_argv = command
            _run_sitecustomize(entries)
            code = _run_main(module)
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        if code == -signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(code)


def _close_as_exec_does() -> None:
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if descriptor > 2 and not os.get_inheritable(descriptor):
                os.close(descriptor)


def _run_sitecustomize(entries: list[str]) -> None:
    file = next((file for entry in entries if (file := Path(entry, "sitecustomize.py")).is_file()), None)
    if file is not None:
        spec = importlib.util.spec_from_file_location("sitecustomize", file)
        sys.modules["sitecustomize"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["sitecustomize"])


def _run_main(module: str) -> int:
    """Run a module or script as ``__main__``; the exit status that Python would end with."""
    import runpy

    try:
        try:
            if module.endswith(".py"):
                runpy.run_path(module, run_name="__main__")
            else:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001 (any, as Python does)
            sys.excepthook(type(error), error, error.__traceback__)  # ours ends with the status of a SystemExit
            return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 255
        print(end.code, file=sys.stderr)
        return 1
    return 0


# The server ------------------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Fork a process for each request, which runs the command and writes its pids and status into the request's folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    added = set(os.environ.get("PYTHONPATH", "").split(os.pathsep))
    _BASE_PATH[:] = [entry for entry in sys.path[1:] if entry not in added]
    for name in PRELOADED:
        importlib.import_module(name)
    _BASE_FINALIZERS.update(weakref.finalize._registry)
    gc.collect()
    gc.freeze()  # or each garbage collection would search, and copy, all of these libraries' objects
    for line in sys.stdin:
        if os.fork() == 0:
            _attend(json.loads(line))
            os._exit(0)


def _attend(request: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if request["forks_too"]:
        subprocess.Popen = ForkingPopen  # type: ignore[misc]
    folder, command, environment = Path(request["folder"]), request["command"], request["environment"]
    ranks, module, arguments, environment = parsed(command, environment)
    plain = _with_python(module, arguments)
    with open(request["out"], "ab") as out, open(request["err"], "ab") as err:
        streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, "cwd": request["cwd"]}
        processes = [
            ForkingPopen(plain, env={**environment, **more}, start_new_session=request["new_session"], **streams)
            for more in _variables_of_ranks(ranks)
        ]
    _write(folder / "pids", [process.pid for process in processes])
    _write(folder / "status", _wait_for(processes))


def _write(file: Path, value: Any) -> None:
    file.with_suffix(".partial").write_text(json.dumps(value))
    file.with_suffix(".partial").rename(file)


def _variables_of_ranks(ranks: int) -> list[dict[str, str]]:
    """What torchrun sets for each process."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    return [{**where, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _wait_for(processes: list[subprocess.Popen]) -> int:
    """The status of the one process; of several, 0 or 1 as torchrun has it, which ends the others when one fails."""
    if len(processes) == 1:
        return processes[0].wait()
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            break
        time.sleep(0.02)
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return int(any(process.returncode for process in processes))


# The client ------------------------------------------------------------------------------------------------------------------


class Forked:
    """A command that the server runs; what tests use of `subprocess.Popen`.

    Args:
        new_session: a session of its own, so that all it starts can be killed with it.
        forks_too: what `parsed` knows of the commands that it starts is forked from it.
        log: file to which all that it prints is added.
    """

    def __init__(
        self,
        command: Sequence[Any],
        *,
        env: dict[str, str],
        cwd: str | Path | None = None,
        new_session: bool = False,
        forks_too: bool = False,
        log: str | None = None,
    ) -> None:
        self.args = [str(word) for word in command]
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self._out, self._err = Path(self._folder.name, "out"), Path(self._folder.name, "err")
        request = {
            "command": self.args,
            "environment": env,
            "cwd": str(cwd or os.getcwd()),
            "folder": self._folder.name,
        }
        request |= {"out": log or str(self._out), "err": log or str(self._err)}
        request |= {"new_session": new_session, "forks_too": forks_too}
        _server().request(request)
        self.pids: list[int] = self._read("pids", 120)
        self.pid = self.pids[0]
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        if self.returncode is None and Path(self._folder.name, "status").is_file():
            self.returncode = self._read("status", 0)
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """The exit status; a command that has not ended by then is killed."""
        ended = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > ended:
                for pid in self.pids:
                    os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To the process, or to each rank."""
        for pid in self.pids:
            os.kill(pid, number)

    def terminate(self) -> None:
        """SIGTERM to the process, or to each rank."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the process, or to each rank."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait, and what it has printed and what it has said on standard error."""
        ended = self.done(timeout)
        return ended.stdout, ended.stderr

    def done(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Wait, and what it has printed."""
        code = self.wait(timeout)
        printed = [file.read_text(errors="replace") for file in (self._out, self._err)]
        return subprocess.CompletedProcess(self.args, code, *printed)

    def _read(self, name: str, timeout: float) -> Any:
        file, ended = Path(self._folder.name, name), time.monotonic() + timeout
        while not file.is_file():
            _server().check()
            assert time.monotonic() < ended, f"the fork server has not started {self.args}"
            time.sleep(0.01)
        return json.loads(file.read_text())


class _Server:
    """The server's process; it ends with this one."""

    def __init__(self) -> None:
        from support.umed_runs import environment

        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (for as long as the process)
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stderr=self._log)
        atexit.register(self._end)

    def request(self, request: dict[str, Any]) -> None:
        """Send a request; what comes of it is seen in its folder."""
        with _LOCK:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """Of the server's process."""
        return self._process.pid

    def check(self) -> None:
        """Raise if the server has ended."""
        if self._process.poll() is not None:
            self._log.seek(0)
            raise RuntimeError(f"the fork server has ended: {self._log.read().decode()[-3000:]}")

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()


@cache
def _only_server() -> _Server:
    return _Server()


def _server() -> _Server:
    with _LOCK:
        return _only_server()


def server_pid() -> int:
    """The server's process, which is started if there is none."""
    return _server().pid


def start(command: Sequence[Any], *, new_session: bool = False, **keywords: Any) -> Any:
    """A command that runs on its own, to be killed: `Forked`, or a `subprocess.Popen` where it cannot be forked."""
    if wanted(command):
        return Forked(command, new_session=new_session, **keywords)
    keywords.pop("forks_too", None)
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, start_new_session=new_session, **streams, **keywords)


def popen(command: Sequence[Any], *, stdout: Any, env: dict[str, str] | None, cwd: Path | None, **more: Any) -> Any:
    """In place of the `subprocess.Popen` of `umed_plugin.commands.processes`, which adds what is printed to a log."""
    if not wanted(command):
        return subprocess.Popen(command, stdout=stdout, env=env, cwd=cwd, **more)
    return Forked(command, env=dict(os.environ if env is None else env), cwd=cwd, log=stdout.name)


def wanted(command: Sequence[Any]) -> bool:
    """Whether a command is to be forked."""
    return not os.environ.get("UMED_FRESH_RUNS") and parsed(command, {}) is not None


if __name__ == "__main__":
    serve()
