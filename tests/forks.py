# SPDX-License-Identifier: Apache-2.0
"""Runs scripts in forks of a process that has imported their libraries: a new interpreter takes 10 to 30 seconds for
that, a tiny run takes one. That process computes nothing itself: a fork of a process with threads may hang."""

import ast
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Iterable
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
STARTED_WITH = dict(os.environ)
SCRIPTS = [file.name for file in ROOT.glob("*.py")]
# Packages that scripts load parts of when they need them.
LAZY = "accelerate datasets diffusers fastapi gradio huggingface_hub matplotlib peft torch transformers uvicorn".split()
codes: dict[str, types.CodeType] = {}  # of the scripts


# In the process that is forked ----------------------------------------------------------------------------------------
def import_libraries(scripts: Iterable[str]) -> None:
    """What the scripts import at their top, in this process; and the scripts' code."""
    for script in sorted(scripts):
        tree = ast.parse((ROOT / script).read_text())
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), script, "exec"), {"__name__": script})
        codes[script] = compile(tree, str(ROOT / script), "exec")


def import_modules(names: list[str]) -> None:
    """What an earlier run imported later: the classes of a pipeline are loaded when they are asked for."""
    for name in names:
        if name not in sys.modules and name.split(".")[0] in LAZY:
            with contextlib.suppress(BaseException):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the collector of a child would otherwise write to, and so copy, every page


def execute(words: list[str]) -> int:
    """`python WORDS`, in this process; returns Python's exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv, sys.path[0] = words, str((ROOT / words[0]).parent)
    try:
        if words[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *words[2:]], ""
            exec(compile(words[1], "<string>", "exec"), main.__dict__)
        else:
            main.__file__ = str(ROOT / words[0])
            exec(codes.get(words[0]) or compile(Path(main.__file__).read_text(), words[0], "exec"), main.__dict__)
        return 0
    except SystemExit as stopped:
        if isinstance(stopped.code, int | None):
            return stopped.code or 0
        print(stopped.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 130 if isinstance(error, KeyboardInterrupt) else 1


def take_output(stdout: int, stderr: int) -> None:
    for number, file, name in ((1, stdout, "stdout"), (2, stderr, "stderr")):
        os.dup2(file, number)
        setattr(sys, name, os.fdopen(number, "w", 1, closefd=False))


def end(code: int) -> None:
    """Ends this process as Python does."""
    threading._shutdown()  # waits for threads
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code & 255)


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def serve(connection: socket.socket, learned: Path) -> None:
    """Forks for each request: a child that waits, and its child, which runs the command."""
    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    import_libraries(SCRIPTS)
    while True:
        import_modules(learned.read_text().split())
        learned.write_text("")
        message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:  # the tests have ended
            return learned.unlink()
        if os.fork() == 0:
            attend(json.loads(message), *files, learned)
        for file in files:
            os.close(file)


def attend(request: dict, stdout: int, stderr: int, report: int, learned: Path) -> None:
    """Reports the pid of the command, and its exit code."""
    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (pid := os.fork()) == 0:
        die_with_parent()
        os.setsid()
        os.close(report)
        take_output(stdout, stderr)
        os.environ.clear()
        os.environ.update(request["environment"])
        known = set(sys.modules)
        code = execute(request["words"])
        with learned.open("a") as file:
            file.write(" ".join(name for name in [*sys.modules] if name not in known) + " ")
        end(code)
    os.write(report, b"%d\n" % pid)
    os.write(report, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


# In the process of the tests ------------------------------------------------------------------------------------------
class Zygote:
    """A process that runs commands in forks of itself, with an environment that libraries read when imported."""

    def __init__(self, environment: dict[str, str]):
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.learned = Path(tempfile.mkstemp(prefix="learned-")[1])
        words = [sys.executable, __file__, str(theirs.fileno()), str(self.learned)]
        options = {"stdin": subprocess.DEVNULL, "pass_fds": [theirs.fileno()], "cwd": ROOT}
        self.process = subprocess.Popen(words, env=environment, **options)
        theirs.close()


class Process:
    """A command of such a process: of `subprocess.Popen` what tests need. Its output goes to files, or to `stdout`."""

    def __init__(self, zygote: Zygote, words: list, environment: dict[str, str] = {}, stdout: int | None = None):  # noqa: B006
        self.files = [tempfile.TemporaryFile("w+") for _ in range(2)]
        report, end = os.pipe()
        request = {"words": list(map(str, words)), "environment": environment}
        outputs = [self.files[0].fileno() if stdout is None else stdout, self.files[1].fileno()]
        socket.send_fds(zygote.connection, [json.dumps(request).encode()], [*outputs, end])
        os.close(end)
        self.report, self.returncode = os.fdopen(report), None
        self.pid = int(self.report.readline())

    def poll(self, seconds: float = 0) -> int | None:
        if self.returncode is None and select.select([self.report], [], [], seconds)[0]:
            self.returncode = int(self.report.readline())
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        if self.poll(timeout) is None:
            self.send_signal(signal.SIGKILL)
            raise TimeoutError("\n".join(self.communicate()))
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait()

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Waits, and gives what it wrote to stdout and stderr."""
        self.wait(timeout)
        for file in self.files:
            file.seek(0)
        return tuple(file.read() for file in self.files)


@functools.cache
def zygote(*environment: tuple[str, str]) -> Zygote:
    """One for each environment, made when it is needed first."""
    return Zygote(STARTED_WITH | dict(environment))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))
