# SPDX-License-Identifier: Apache-2.0
"""The laboratory of tests/faults.py: scripts run in forks of one process, a tiny world for them, and their results.

Importing torch and its friends takes 10 seconds, a tiny run less than one. So this process imports them once, computes
nothing with them (a fork of a process with threads may hang), and forks a child for each run of a script.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # also: no pool of threads that a fork would lose
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"

import ast  # noqa: E402
import atexit  # noqa: E402
import contextlib  # noqa: E402
import ctypes  # noqa: E402
import gc  # noqa: E402
import hashlib  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
import select  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import types  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from functools import cache  # noqa: E402
from pathlib import Path  # noqa: E402

import conftest  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import yaml  # noqa: E402
from datasets import config as datasets_config  # noqa: E402
from PIL import Image as PILImage  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402


ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (
    "build_synpic",
    "score_pairs",
    "train_rankdpo_sdxl",
    "train_rankdpo_sd3",
    "train_dpo_qsd",
    "evaluate",
)
TIMEOUT = 30  # seconds; a tiny run takes one
# tqdm's: 30%|###  | 3/10 [00:01<00:02, 2.50image/s]. Older versions cut it at the width of the console.
BAR = r"^.*\[\d\d:\d\d(:\d\d)?[<,]([^\]]*\]|\d\d:\d\d[\w?./, =+-]*$)"
# Events of Python's audit that change files: the moments that faults aim at.
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")


# ----------------------------------------------------------------------------------------------------------------------
# Runs of scripts
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Moment:
    """Something that happens to a run by itself: before its n-th change of a file in the folder (1 = the first)."""

    number: int
    action: int | str  # a signal; or "full": from this one on, nothing new can be made, as on a full disk
    again: int | None = None  # a second signal, so many changes later
    name: str = ""  # count only changes of paths that contain this
    after: str = ""  # and only once a change of a path that contains this has come


@dataclass
class Outcome:
    """What a run left: its exit code (negative: killed by a signal), its output, its number of file changes."""

    code: int
    out: str
    err: str
    seconds: float
    changes: int = 0
    injected: bool = False  # the moment came

    @property
    def lines(self) -> list[str]:
        """The lines on stderr, without progress bars: a message may stand behind one on the same line. Bars below each
        other move the cursor up."""
        lines = [re.sub(BAR, "", line.split("\r")[-1]).rstrip() for line in self.err.replace("\x1b[A", "").split("\n")]
        return [line for line in lines if line.strip()]

    @property
    def tail(self) -> str:
        return f"exit code {self.code}\n" + (self.out[-800:] + "\n" + "\n".join(self.lines)[-2500:]).strip()


class Run:
    """A script in a fork of this process. `ready` comes when the script begins."""

    def __init__(self, folder: Path, command: list, moment: Moment | None = None, limits: dict | None = None):
        self.logs = folder / "logs"
        self.logs.mkdir(exist_ok=True)
        self.number = len(list(self.logs.glob("*.out")))
        self.file(".out").touch()
        self.started = time.time()
        reader, writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid, self.code, self.pipe = os.fork(), None, reader
        if self.pid == 0:
            try:
                os.close(reader)
                child(folder, [str(item) for item in command], self.file, writer, moment, limits or {})
            finally:
                os._exit(99)
        os.close(writer)
        self.seen = b""

    def file(self, ending: str) -> Path:
        return self.logs / f"{self.number:02d}{ending}"

    def read(self, timeout: float) -> bytes:
        """All that the child has said so far: r, the script begins; i, the moment came."""
        while select.select([self.pipe], [], [], timeout)[0]:
            if not (said := os.read(self.pipe, 64)):
                break
            self.seen, timeout = self.seen + said, 0
        return self.seen

    def wait_ready(self) -> None:
        while b"r" not in self.read(TIMEOUT) and self.poll() is None:
            pass

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def send(self, number: int) -> bool:
        """Sends a signal; False if the run has ended already."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, number)
        return True

    def wait(self, timeout: float = TIMEOUT) -> Outcome:
        end = time.time() + timeout
        while self.poll() is None and time.time() < end:
            self.read(0.0)
            time.sleep(0.002)
        if hung := self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.code = os.waitstatus_to_exitcode(status)
        seen = self.read(0.0)
        os.close(self.pipe)
        out, err = (self.file(ending).read_text(errors="replace") for ending in (".out", ".err"))
        changes = self.file(".changes")
        count = int(changes.read_text() or 0) if changes.exists() else 0
        if hung:
            err += f"\nHUNG: no end after {timeout} seconds\n"
        return Outcome(self.code, out, err, time.time() - self.started, count, b"i" in seen)


def child(folder: Path, command: list[str], file: Callable, pipe: int, moment: Moment | None, limits: dict) -> None:
    """Runs the script as `python script.py …` would, and ends the process with Python's exit code."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan stays if the harness is stopped
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXFSZ, signal.SIGHUP):
        default = {signal.SIGINT: signal.default_int_handler, signal.SIGXFSZ: signal.SIG_IGN}
        signal.signal(number, default.get(number, signal.SIG_DFL))
    for fd, ending in ((1, ".out"), (2, ".err")):
        target = os.open(file(ending), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, fd)
        os.close(target)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
    sys.excepthook = sys.__excepthook__
    datasets_config.HF_DATASETS_CACHE = folder / "hf"
    os.chdir(ROOT)
    sys.argv, sys.path[0] = command, str(ROOT)
    code = compiled(command[0])
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    changes = watch(folder, pipe, moment)
    exit_code = 0
    try:
        main = types.ModuleType("__main__")
        main.__dict__.update(__file__=str(ROOT / command[0]), __builtins__=__builtins__)
        sys.modules["__main__"] = main
        os.write(pipe, b"r")
        exec(code, main.__dict__)
    except SystemExit as stopped:
        exit_code = stopped.code
        if exit_code is None or isinstance(exit_code, int):
            exit_code = exit_code or 0
        else:
            print(exit_code, file=sys.stderr)
            exit_code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        exit_code = 130 if isinstance(error, KeyboardInterrupt) else 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        file(".changes").write_text(str(changes[0]))
        file(".modules").write_text("\n".join(sys.modules))
    finally:
        os._exit(exit_code & 255)


def watch(folder: Path, pipe: int, moment: Moment | None) -> list[int]:
    """Counts the run's changes in the folder, and does what `moment` says before one of them. Returns the counter."""
    count, begun, root = [0], [moment is None or not moment.after], str(folder)
    inside = tuple(f"{root}/{name}" for name in ("out", "cache"))

    def hook(event: str, args: tuple) -> None:
        if event not in CHANGES:
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        path = args[0] if not isinstance(args[0], bytes) else os.fsdecode(args[0])
        if isinstance(path, int) or not str(path).startswith(inside):
            return
        if moment and (moment.name or moment.after):
            paths = f"{path} {args[1] if event == 'os.rename' else ''}"
            begun[0] |= moment.after in paths
            if moment.name not in paths or not begun[0]:
                return
        count[0] += 1
        if moment is None:
            return
        if moment.action == "full":
            if count[0] >= moment.number and event in ("open", "os.mkdir", "os.link", "os.symlink"):
                os.write(pipe, b"i")
                raise OSError(28, "No space left on device", str(path))
        elif count[0] == moment.number or (moment.again and count[0] == moment.number + moment.again):
            os.write(pipe, b"i")
            os.kill(os.getpid(), moment.action)

    sys.addaudithook(hook)
    return count


@cache
def compiled(script: str) -> types.CodeType:
    return compile((ROOT / script).read_text(), str(ROOT / script), "exec")


def import_libraries() -> None:
    """What the scripts import at their top, in this process; and the scripts' code."""
    for script in SCRIPTS:
        tree = ast.parse((ROOT / f"{script}.py").read_text())
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), script, "exec"), {"__name__": script})
        compiled(f"{script}.py")


def import_modules(names: list[str]) -> None:
    """What runs imported later: diffusers and transformers load a pipeline's classes when they are asked for."""
    for name in names:
        if name not in sys.modules and not name.startswith(("_", "synpic")):
            with contextlib.suppress(BaseException):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the collector of a child would otherwise write to, and so copy, every page


def in_fork(function: Callable, *args) -> None:
    """Calls a function in a child: it may compute with torch."""
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            function(*args)
            code = 0
        except BaseException as error:
            sys.__excepthook__(type(error), error, error.__traceback__)
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"{function.__name__} failed")


# ----------------------------------------------------------------------------------------------------------------------
# The world: models, data, commands
# ----------------------------------------------------------------------------------------------------------------------


REWARDS = """import numpy as np


def red(images, prompts):
    return [float(np.asarray(image.convert("RGB"))[..., 0].mean()) / 255 for image in images]


def contrast(images, prompts):
    return [float(np.asarray(image.convert("RGB")).std()) / 255 for image in images]


def left(images, prompts):
    return [float(np.asarray(image.convert("RGB"))[:, :16].mean()) / 255 for image in images]
"""
PROMPTS = ("a red circle", "a green circle", "a blue circle", "a cross")
CALL = {"num_inference_steps": 1, "height": 32, "width": 32}


def make_world(world: Path) -> None:
    """Tiny models, prompts, rewards and pairs. Runs in a fork, whose warnings nobody needs."""
    os.dup2(os.open(world / "world.err", os.O_WRONLY | os.O_CREAT), 2)
    conftest.make_tiny_sdxl(world / "models" / "sdxl")
    conftest.make_tiny_sdxl(world / "models" / "other", seed=1)
    conftest.make_tiny_sd(world / "models" / "sd")
    conftest.make_tiny_sd3(world / "models" / "sd3", t5=False)
    (world / "rewards.py").write_text(REWARDS)
    (world / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    write_generators(world / "generators.yaml", world)
    conftest.write_pairs(world / "pairs", conftest.pair_rows(n=8))


def write_generators(file: Path, world: Path, change: Callable = lambda entries: None) -> Path:
    entries = [
        {"name": "one", "model": str(world / "models" / "sdxl"), "call": dict(CALL)},
        {"name": "two", "model": str(world / "models" / "other"), "call": dict(CALL)},
    ]
    change(entries)
    file.write_text(yaml.safe_dump(entries))
    return file


def rewards(world: Path, *names: str) -> list[str]:
    return [f"{world}/rewards.py:{name}" for name in names]


TRAINING = (
    "--rank 2 --learning_rate 1e-2 --beta_dpo 100 --validation_num_inference_steps 1 --report_to none "
    "--max_train_steps 4 --checkpointing_steps 1 --resume_from_checkpoint latest"
).split() + ["--validation_prompts", PROMPTS[0]]


def command(world: Path, job: str, folder: Path, **changes) -> list:
    """The command of a job, with its output in folder/out and its cache in folder/cache. `changes`: flags to set."""
    data = world / "golden" / "build" / "out"  # the trainers read what build_synpic.py wrote
    lora = world / "golden" / "sdxl" / "out"
    models = world / "models"
    flags = {
        "build": {
            "prompts": world / "prompts.txt",
            "generators": world / "generators.yaml",
            "rewards": rewards(world, "red", "contrast", "left"),
            "shard_size": 2,
            "generation_batch_size": 1,  # then an image's last bits do not depend on which others are missing
            "image_format": "png",
        },
        "pairs": {
            "dataset_name": world / "pairs",
            "reward": rewards(world, "red")[0],
            "shard_size": 3,
            "num_examples": 1,
            "include_images": None,
        },
        "sdxl": {"pretrained_model_name_or_path": models / "sdxl", "dataset_name": data, "resolution": 32},
        "sd3": {
            "pretrained_model_name_or_path": models / "sd3",
            "dataset_name": data,
            "resolution": 32,
            "max_sequence_length": 20,
        },
        "qsd": {
            "pretrained_model_name_or_path": models / "sd",
            "dataset_name": world / "golden" / "pairs" / "out",
            "resolution": 32,
            "top_fraction": 1,
        },
        "evaluate": {
            "pretrained_model_name_or_path": models / "sdxl",
            "prompts": world / "prompts.txt",
            "loras": f"mine={lora}",
            "metrics": rewards(world, "red", "contrast"),
            "num_inference_steps": 1,
            "batch_size": 1,
        },
    }[job]
    flags = {**flags, "output_dir": folder / "out"}
    words = [f"{JOBS[job]}.py"]
    if job in TRAINERS:
        flags["cache_dir"] = folder / "cache"
        words += TRAINING
    for name, value in {**flags, **changes}.items():
        words += [f"--{name}", *(value if isinstance(value, list | tuple) else [] if value is None else [value])]
    return words


JOBS = {
    "build": "build_synpic",
    "pairs": "score_pairs",
    "sdxl": "train_rankdpo_sdxl",
    "sd3": "train_rankdpo_sd3",
    "qsd": "train_dpo_qsd",
    "evaluate": "evaluate",
}
TRAINERS = ("sdxl", "sd3", "qsd")


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


def digest(*parts) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else repr(part).encode())
    return found.hexdigest()[:16]


def results(job: str, folder: Path) -> dict[str, str]:
    """What a job's user takes from its folder: name → hash of the content, without times and speeds."""
    out = folder / "out"
    reader = {"build": dataset_results, "pairs": dataset_results, "evaluate": evaluation_results}
    return reader.get(job, training_results)(out)


def dataset_results(out: Path) -> dict[str, str]:
    found = {}
    for file in sorted([*out.glob("data/*.parquet"), *out.glob("scores/*.parquet")]):
        found[str(file.relative_to(out))] = attempt(rows_of, file)
    for file in [*out.glob("grid.png"), *out.glob("figures/*.png")]:
        found[str(file.relative_to(out))] = attempt(pixels, file)
    found["README.md"] = attempt(card, out)
    return found


def rows_of(file: Path) -> str:
    return digest(pq.read_table(file, use_threads=False).to_pylist())


def tensors_of(file: Path) -> str:
    return digest(sorted((name, tensor.tobytes()) for name, tensor in load_file(file).items()))


def training_results(out: Path) -> dict[str, str]:
    found = {"README.md": attempt(card, out)}
    for name in ("pytorch_lora_weights.safetensors", "comfyui/out.safetensors"):
        if name.startswith("pytorch") or (out / "comfyui").exists():
            found[name] = attempt(tensors_of, out / name)
    for file in sorted(out.glob("images/*.png")):
        found[str(file.relative_to(out))] = attempt(pixels, file)
    found["training_log.jsonl"] = attempt(lambda: digest(training_log(out / "training_log.jsonl")))
    return found


def training_log(file: Path) -> list[dict]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    names = ("step", "loss", "grad_norm", "lr", "margin", "implicit_accuracy")
    return [{name: row.get(name) for name in names} for row in rows]


def evaluation_results(out: Path) -> dict[str, str]:
    found = {}
    for file in sorted(out.glob("images/*/*.png")):
        found[str(file.relative_to(out))] = attempt(pixels, file)
    found["results.json"] = attempt(lambda: digest(results_record(out / "results.json")))
    found["grid.png"] = attempt(pixels, out / "grid.png")
    found["results.md"] = attempt(lambda: digest((out / "results.md").read_text()))
    return found


def results_record(file: Path) -> dict:
    """The figures, without the digests of the metrics' files: some cases use another file with the same result."""
    record = json.loads(file.read_text())
    record["settings"].pop("metrics", None)
    return timeless(record)


def timeless(record: dict) -> dict:
    return {key: value for key, value in record.items() if not re.search("second|time|checksum|sha256", key)}


def pixels(file: Path) -> str:
    with PILImage.open(file) as image:
        return digest(image.mode, image.size, np.asarray(image).tobytes())


def card(out: Path) -> str:
    """Is there a card that can be read? Its text may differ: it tells speeds."""
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    return f"card of {type(yaml.safe_load(front)).__name__}" if text.strip() else "empty card"


def attempt(read: Callable, *args) -> str:
    try:
        return read(*args)
    except Exception as error:
        return f"unreadable: {type(error).__name__}: {str(error)[:100]}"


def differences(golden: dict[str, str], found: dict[str, str]) -> list[str]:
    """What is not as the undisturbed run left it."""
    bad = []
    for name in sorted({*golden, *found}):
        if golden.get(name) != found.get(name):
            unreadable = found.get(name, "").startswith("unreadable")
            what = found[name] if unreadable else "differs" if name in golden and name in found else "missing"
            bad.append(f"{name}: {what if name in golden else 'should not be there'}")
    return bad


@dataclass
class Golden:
    """What an undisturbed run gives."""

    results: dict[str, str]
    seconds: float
    changes: int
    modules: list[str] = field(default_factory=list)


def make_golden(world: Path, job: str) -> Golden:
    folder = world / "golden" / job
    folder.mkdir(parents=True)
    run = Run(folder, command(world, job, folder))
    outcome = run.wait()
    if outcome.code:
        raise RuntimeError(f"the undisturbed {job} failed:\n{outcome.tail}")
    modules = run.file(".modules").read_text().split("\n")
    found = results(job, folder)
    if bad := [f"{name}: {value}" for name, value in found.items() if "unreadable" in value]:
        raise RuntimeError(f"the undisturbed {job} left {bad}")
    return Golden(found, outcome.seconds, outcome.changes, modules)


def copy_state(source: Path, target: Path) -> None:
    """Copies a prepared folder: its output and cache, not its logs."""
    for name in ("out", "cache"):
        if (source / name).exists():
            shutil.copytree(source / name, target / name, symlinks=True)
