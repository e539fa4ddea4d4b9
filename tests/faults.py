# SPDX-License-Identifier: Apache-2.0
"""Injects faults into tiny runs of all scripts: nothing finished may be lost, and nothing may be wrong in silence.

    python tests/faults.py --seed 0 --jobs 2                     # all classes of faults
    python tests/faults.py --only kill/sdxl --seed 7 --count 1   # one case again

A case injects faults into runs in a folder of its own, does what a user would do, and compares the results with those
of an undisturbed run. Its verdict is SILENT if a run exits with 0 and leaves other results, or takes what it must
refuse; LOST if the results are not reached, if something finished was destroyed, made again or is half-written, or if a
refusal comes after the work or does not name what is wrong. A fault that came too late, after the run, does not count.

As forks.py says, this process imports the scripts' libraries once, computes nothing with them, and forks a child for
each run of a script.
"""

import argparse
import ctypes
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections import Counter, namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from pathlib import Path


os.environ["OMP_NUM_THREADS"] = "1"  # no pool of threads that a fork would lose
os.environ["MPLBACKEND"] = "agg"

import conftest
import forks
import numpy as np
import pyarrow.parquet as pq
import yaml
from datasets import config as datasets_config
from PIL import Image as PILImage
from safetensors.numpy import load_file


TIMEOUT = 60  # seconds; a tiny run takes one
# tqdm's: 30%|###  | 3/10 [00:01<00:02, 2.50image/s]. A message may stand behind it on the same line.
BAR = r"^.*\[\d\d:\d\d(:\d\d)?[<,]([^\]]*\]|\d\d:\d\d[\w?./, =+-]*$)"
# Events of Python's audit that change files: the moments that faults aim at.
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
Golden = namedtuple("Golden", "results seconds changes")  # of an undisturbed run
world = Path()  # the folder of models, data, and undisturbed runs
golden: dict[str, Golden] = {}
planted = ""  # a defect: code that runs before each script, to see whether it is found


# Runs of scripts ------------------------------------------------------------------------------------------------------
@dataclass
class Moment:
    """Something that happens to a run by itself: before its n-th change of a file in the case's folder."""

    number: int
    action: int | str  # a signal; or quota: of `number` bytes a file
    again: int = 0  # a second signal, so many changes later
    after: str = ""  # count only from a change of a path on that contains this
    rank: int = 0  # of two processes the one that it happens to


@dataclass
class Outcome:
    """What a run left."""

    code: int  # 128 + n: ended by signal n
    codes: list[int]  # of all processes
    output: str
    seconds: float
    changes: int  # of files
    injected: bool  # the moment came
    hung: bool

    @property
    def lines(self) -> list[str]:
        """The lines of the output, without progress bars."""
        lines = self.output.replace("\x1b[A", "").split("\n")
        return [line for line in (re.sub(BAR, "", line.split("\r")[-1]).rstrip() for line in lines) if line]

    @property
    def tail(self) -> str:
        return "\n".join([f"exit codes {self.codes}", *self.lines])[-3000:]


class Run:
    """A script in a fork of this process, or in two, as a launcher starts them."""

    def __init__(self, folder: Path, words: list, moment: Moment | None = None, processes: int = 1):
        self.logs, self.started, self.codes, self.pids = folder / "logs", time.time(), {}, []
        self.logs.mkdir(exist_ok=True)
        self.number = len(list(self.logs.glob("*-0.log")))
        port = str(conftest.free_port())
        together = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(processes):
            self.file(rank, "log").touch()
            environment = together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            mine = moment if moment and moment.rank == rank else None
            arguments = folder, list(map(str, words)), partial(self.file, rank), mine, environment
            self.pids.append(in_fork(child, *arguments, wait=False))

    def file(self, rank: int, ending: str) -> Path:
        return self.logs / f"{self.number:02d}-{rank}.{ending}"

    def said(self, ending: str) -> bool:
        """began: the script has; came: the moment has."""
        return any(self.file(rank, ending).exists() for rank in range(len(self.pids)))

    def until(self, ending: str) -> None:
        while not self.said(ending) and not self.ended():
            time.sleep(0.01)

    def ended(self) -> bool:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                code = os.waitstatus_to_exitcode(found[1])
                self.codes[rank] = code if code >= 0 else 128 - code
        return len(self.codes) == len(self.pids)

    def send(self, number: int, rank: int | None = None) -> bool:
        """Sends a signal to one process, or to all; False if it has ended already."""
        self.ended()
        alive = [pid for place, pid in enumerate(self.pids) if place not in self.codes and rank in (None, place)]
        for pid in alive:
            os.kill(pid, number)
        return bool(alive)

    def wait(self, grace: float = 20.0, rank: int = 0) -> Outcome:
        """The outcome, with the exit code of process `rank`. As launchers do, ends the others after one has failed."""
        end, hung = time.time() + TIMEOUT, False
        while not self.ended():
            if any(self.codes.values()):
                end, grace = min(end, time.time() + grace), TIMEOUT
            if time.time() > end and self.send(signal.SIGKILL):
                hung |= not any(self.codes.values())
            time.sleep(0.003)
        codes, changes = [code for _, code in sorted(self.codes.items())], self.file(0, "changes")
        output = "\n".join(self.file(place, "log").read_text(errors="replace") for place in range(len(codes)))
        count, seconds = int(changes.read_text()) if changes.exists() else 0, time.time() - self.started
        return Outcome(codes[rank] or max(codes), codes, output, seconds, count, self.said("came"), hung)


def child(folder: Path, words: list[str], file: Callable, moment: Moment | None, environment: dict) -> None:
    """Runs the script as `python script.py ...` would, and ends the process with Python's exit code."""
    forks.die_with_parent()  # no orphan stays if the harness is stopped
    log = os.open(file("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    forks.take_output(log, log)
    datasets_config.HF_DATASETS_CACHE = folder / "hf"
    os.environ |= environment
    os.chdir(forks.ROOT)
    changes = watch(folder, file, moment)
    exec(planted, {})
    file("began").touch()
    code = forks.execute(words)
    threading._shutdown()  # waits for threads
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    file("changes").write_text(str(changes[0]))
    file("modules").write_text("\n".join(sys.modules))
    forks.end(code)


def watch(folder: Path, file: Callable, moment: Moment | None) -> list[int]:
    """Counts the run's changes in the folder, and does what `moment` says before one of them. Returns the counter."""
    count, begun, others = [0], [not (moment and moment.after)], (f"{folder}/logs", f"{folder}/hf")
    if moment and moment.action == "quota":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (moment.number, resource.RLIM_INFINITY))

    def hook(event: str, args: tuple) -> None:
        writes = event != "open" or isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event not in CHANGES or not writes:
            return
        path = os.fsdecode(args[0]) if not isinstance(args[0], int) else ""
        if not path.startswith(f"{folder}/") or path.startswith(others):
            return
        begun[0] |= moment is not None and moment.after in f"{path} {args[1]}"
        count[0] += begun[0]
        if not moment or not begun[0]:
            return
        if moment.action != "quota" and count[0] in (moment.number, moment.number + moment.again):
            file("came").touch()
            os.kill(os.getpid(), moment.action)

    sys.addaudithook(hook)
    return count


def in_fork(function: Callable, *args, wait: bool = True) -> int:
    """Calls a function in a child, which may compute with torch, and have threads."""
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            function(*args)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if wait and os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"{function} failed")
    return pid


# The world: models, data, commands, their results ---------------------------------------------------------------------
REWARDS = """import numpy as np
red = lambda images, prompts: [np.asarray(image.convert("RGB"))[..., 0].mean() / 255 for image in images]
contrast = lambda images, prompts: [np.asarray(image.convert("RGB")).std() / 255 for image in images]
"""
TRAINERS, STUDY = ("sdxl", "sd3", "zimage", "qsd"), ("serve", "tally", "export")
TRAINING = """--output_dir {out} --cache_dir {cache} --rank 2 --learning_rate 1e-2 --beta_dpo 100 --resolution 32
    --max_train_steps 4 --checkpointing_steps 1 --resume_from_checkpoint latest --report_to none
    --validation_prompts star --validation_num_inference_steps 1 --pretrained_model_name_or_path {world}/models/"""
COMMANDS = {
    # One image at a time: then its last bits do not depend on which others are missing.
    "build": """build_synpic.py --output_dir {out} --prompts {world}/prompts.txt --generators {world}/generators.yaml
        --rewards {world}/rewards.py:red {world}/rewards.py:contrast --shard_size 2 --generation_batch_size 1
        --image_format png""",
    "pairs": """score_pairs.py --output_dir {out} --dataset_name {world}/pairs --reward {world}/rewards.py:red
        --shard_size 3 --num_examples 1 --include_images""",
    "sdxl": f"train_rankdpo_sdxl.py {TRAINING}sdxl --dataset_name {{world}}/ranked",
    "sd3": f"train_rankdpo_sd3.py {TRAINING}sd3 --dataset_name {{world}}/ranked --max_sequence_length 20",
    "zimage": f"train_rankdpo_zimage.py {TRAINING}zimage --dataset_name {{world}}/ranked",
    "qsd": f"train_dpo_qsd.py {TRAINING}sd --dataset_name {{world}}/pairs --top_fraction 1",
    "evaluate": """evaluate.py --output_dir {out} --pretrained_model_name_or_path {world}/models/sdxl
        --prompts {world}/prompts.txt --loras mine={world}/golden/sdxl/out --num_inference_steps 1 --batch_size 1
        --metrics {world}/rewards.py:red {world}/rewards.py:contrast""",
    "serve": """user_study.py serve --study_dir {out} --prompts {world}/prompts.txt --num_prompts 4
        --images one={world}/pictures/one/{{index}}.png two={world}/pictures/two/{{index}}.png
        --votes_per_comparison 3 --questions q0=Which? q1=Which? q2=Which? q3=Which? q4=Which? q5=Which?""",
    "tally": "user_study.py tally --output_dir {out} --study_dir {world}/golden/serve/out",
    "export": "user_study.py export --output_dir {out} --study_dir {world}/golden/serve/out",
}
NEEDS = {"evaluate": ["sdxl"], "tally": ["serve"], "export": ["serve"]}  # jobs whose results a job reads
IN_TWO = ("build", "pairs", *TRAINERS, "evaluate")  # processes
DATASET = "out/data/*.parquet out/scores/*.parquet out/*.png out/figures/*.png out/README.md"
TRAINED = "out/*.safetensors out/comfyui/*.safetensors out/images/*.png out/training_log.jsonl out/README.md"
RESULTS = {"build": DATASET, "pairs": DATASET, "export": DATASET, **dict.fromkeys(TRAINERS, TRAINED)}
RESULTS |= {"evaluate": "out/images/*/*.png out/*.png out/results.*", "tally": "out/*"}
# Finished units of work of any job, which stay as they are.
UNITS = "out/checkpoint-*/* cache/*/*.safetensors out/work/images/*/*.parquet out/work/scores/**/*.parquet "
UNITS += "out/images/*/*.png out/scores/*/*/*.json"
OTHER = {"build": {"image_format": "jpg"}, "pairs": {"shard_size": 4}}  # flags of another run; else: {"seed": 1}


def command(job: str, folder: Path, **changes) -> list:
    """The command of a job, with its output in folder/out and its cache in folder/cache. `changes`: flags to set."""
    words = COMMANDS[job].format(world=world, out=folder / "out", cache=folder / "cache").split()
    for name, value in changes.items():
        words += [f"--{name}", value]
    return words


def make_world() -> None:
    """Tiny models, prompts, rewards, datasets and pictures."""
    os.dup2(os.open(world / "world.err", os.O_WRONLY | os.O_CREAT), 2)  # warnings that nobody needs
    conftest.make_tiny_sdxl(world / "models" / "sdxl")
    conftest.make_tiny_sdxl(world / "models" / "other", seed=1)
    conftest.make_tiny_sd(world / "models" / "sd")
    conftest.make_tiny_sd3(world / "models" / "sd3", t5=False)
    conftest.make_tiny_zimage(world / "models" / "zimage")
    (world / "rewards.py").write_text(REWARDS)
    (world / "prompts.txt").write_text("a red circle\na green circle\na blue circle\na cross\n")
    write_generators(world / "generators.yaml")
    conftest.write_pairs(world / "pairs", conftest.pair_rows(n=8))
    conftest.write_dataset(world / "ranked", conftest.ranked_rows(n=4, k=3))
    for seed, name in enumerate(("one", "two")):
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
        (world / "pictures" / name).mkdir(parents=True)
        for i in range(4):
            PILImage.fromarray(pixels[i]).save(world / "pictures" / name / f"{i}.png")


def write_generators(file: Path, call: dict = {}, **entry) -> Path:  # noqa: B006
    """The recipe of two generators; `call` and `entry` change the first one."""
    models, settings = {"one": "sdxl", "two": "other"}, {"num_inference_steps": 1, "height": 32, "width": 32}
    entries = [{"name": name, "model": f"{world}/models/{models[name]}", "call": settings} for name in models]
    entries[0] |= {"call": settings | call, **entry}
    file.write_text(yaml.safe_dump(entries))
    return file


def digest(found) -> str:
    return hashlib.sha256(found if isinstance(found, bytes) else repr(found).encode()).hexdigest()[:16]


TIMES = r'"\w*(second|time|sha256)\w*": [^,}]*'  # what a record says besides results
KINDS = (".parquet", ".safetensors", ".pt", ".png", ".jpg", ".json")  # files that are whole if they can be read


def read(file: Path, root: Path) -> str:
    """A hash of what a file says, without times, speeds and places."""
    try:
        if file.suffix == ".parquet":
            return digest(pq.read_table(file, use_threads=False).to_pylist())
        if file.suffix == ".safetensors":
            return digest(sorted((name, tensor.tobytes()) for name, tensor in load_file(file).items()))
        if file.suffix == ".pt":
            return digest(zipfile.ZipFile(file).testzip())
        if file.suffix in (".png", ".jpg"):
            with PILImage.open(file) as image:
                return digest((image.mode, image.size, np.asarray(image).tobytes()))
        text = file.read_text().replace(str(root), "")
        if file.suffix == ".json":
            json.loads(text)
            return digest(re.sub(TIMES, "", text))
        if file.suffix == ".jsonl":
            names = ("step", "loss", "grad_norm", "lr", "margin", "implicit_accuracy")
            return digest([[row.get(name) for name in names] for row in map(json.loads, text.splitlines())])
        if file.name == "README.md":  # its text tells speeds: it must be a card that can be read
            _, front, rest = text.split("---\n", 2)
            return f"card of {type(yaml.safe_load(front)).__name__}, {bool(rest.strip())}"
        return digest(text)
    except Exception as error:
        return f"unreadable: {type(error).__name__}: {str(error)[:100]}"


def final_files(root: Path, patterns: str) -> list[Path]:
    """Files under their final names: figures in `building` have none yet, score_pairs.py draws them in every run."""
    files = [file for pattern in patterns.split() for file in sorted(root.glob(pattern)) if file.is_file()]
    files = [file for file in files if "/building/figures/" not in str(file)]
    parts = [file.relative_to(root).parts for file in files]
    return [file for file, names in zip(files, parts) if not any(n.startswith(".") or ".tmp" in n for n in names)]


def state(root: Path, patterns: str) -> dict[str, str]:
    """What is in a folder: file → what it says."""
    return {str(file.relative_to(root)): read(file, root) for file in final_files(root, patterns)}


def make_golden(job: str, processes: int = 1) -> None:
    """An undisturbed run; in one process twice: the second is warm, its time is that of the cases."""
    name = job if processes == 1 else f"{job}@{processes}"
    folder = world / "golden" / name
    if job == "serve":
        forks.import_modules(["gradio", "fastapi", "uvicorn"])
        votes(case := Case("golden/serve", 0, folder), job)
        if case.problems:
            raise RuntimeError(case.problems)
        return
    folder.mkdir(parents=True)
    for _ in range(3 - processes):
        for part in ("out", "cache"):
            shutil.rmtree(folder / part, ignore_errors=True)
        run = Run(folder, command(job, folder), processes=processes)
        outcome, found = run.wait(), state(folder, RESULTS[job])
        if outcome.code or not found or any("unreadable" in value for value in found.values()):
            raise RuntimeError(f"the undisturbed {name} failed: {found}\n{outcome.tail}")
        forks.import_modules(run.file(0, "modules").read_text().split("\n"))
    golden[name] = Golden(found, outcome.seconds, outcome.changes)


def answer_all(port: int, file: Path) -> None:
    """Three raters answer at random until nothing is left; the file takes the number of their answers."""
    import raters

    raters.Rater.judge = lambda self, state: self.rng.choice(["left", "right"])
    with ThreadPoolExecutor(3) as pool:
        people = list(pool.map(lambda i: raters.Rater(f"http://127.0.0.1:{port}", f"r{i}", 0.0, 0), range(3)))
        file.write_text(str(sum(pool.map(raters.Rater.work, people))))


def answers_in(folder: Path) -> tuple[int, int]:
    """Answers in a study's logs, and how many different ones."""
    lines = [line for file in sorted((folder / "out").rglob("*.jsonl")) for line in file.read_text().split("\n")[:-1]]
    votes = [vote for vote in map(json.loads, lines) if "answer" in vote]
    return len(votes), len({(vote["rater"], vote["item"], vote["question"]) for vote in votes})


# Cases ----------------------------------------------------------------------------------------------------------------
@dataclass
class Case:
    """Some faults in a folder of their own, with random numbers of their own, and the verdict."""

    name: str
    seed: int
    folder: Path
    faults: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)
    story: list[str] = field(default_factory=list)  # what was done, for the report

    def __post_init__(self):
        self.rng = random.Random(f"{self.name}|{self.seed}")
        in_two = self.name.startswith(("kill", "signal")) and self.name.endswith(IN_TWO)
        self.processes = 1 + (in_two and self.seed % 3 == 2)
        self.folder.mkdir(parents=True)

    def problem(self, kind: str, text: str, outcome: Outcome | None = None) -> None:
        self.problems.append((kind, text + (f"\n{outcome.tail}" if outcome else "")))

    def end(self, run: Run, **options) -> Outcome:
        outcome = run.wait(**options)
        said = " / ".join(outcome.lines[-2:])[:300]
        self.story.append(f"exit codes {outcome.codes} in {outcome.seconds:.1f} s: {said}")
        if outcome.hung:
            raise TimeoutError(f"no end after {TIMEOUT} seconds\n{outcome.tail}")
        return outcome

    def run(self, words: list, moment: Moment | None = None, **options) -> Outcome:
        self.story += [str(moment)] * (moment is not None)
        return self.end(Run(self.folder, words, moment, self.processes), **options)

    def check(self, job: str, outcome: Outcome, root: Path | None = None) -> None:
        """Whether a run has reached the results of an undisturbed one."""
        if outcome.code:
            return self.problem("LOST", "the result is not reached", outcome)
        wanted = golden.get(f"{job}@{self.processes}", golden[job]).results
        found = state(root or self.folder, RESULTS[job])
        if bad := [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]:
            self.problem("SILENT", f"exit code 0, but other, missing or unreadable: {', '.join(bad[:6])}", outcome)

    def whole(self, root: Path, before: dict = {}) -> dict:  # noqa: B006
        """After a run: no file is half there under its final name, and units that were finished before stay as they
        were. Returns all units that are finished: file → what tells it from one that was made again."""
        files = [file for file in final_files(root, "out/**/* cache/**/*") if file.suffix in KINDS]
        if bad := [f"{file.relative_to(root)} {what}" for file in files if (what := read(file, root))[:5] == "unrea"]:
            self.problem("LOST", f"half-written: {'; '.join(bad[:3])}")
        after = {file: file.stat() for file in final_files(root, UNITS)}
        after = {file: (stat.st_ino, stat.st_mtime_ns) for file, stat in after.items()}
        if lost := [file for file in before if after.get(file) != before[file]]:
            self.problem("LOST", f"{lost[0].relative_to(root)} was finished, and is gone or made again")
        return after

    def refused(self, outcome: Outcome, *words: str, raises: bool = False) -> None:
        """Not 0, and a last line that contains the words (a|b: one of them); `raises`: Python's own error will do."""
        if outcome.code == 0:
            return self.problem("SILENT", f"exit code 0, no refusal that says {' '.join(words)}", outcome)
        if "Traceback (most recent" in outcome.output and not raises:
            self.problem("LOST", "a traceback, not one line", outcome)
        text = (outcome.output if raises else (outcome.lines or [""])[-1]).lower()
        if missing := [word for word in words if not any(part.lower() in text for part in word.split("|"))]:
            self.problem("LOST", f"the message does not say {', '.join(missing)}", outcome)


REGISTRY: dict[str, tuple[Callable[[Case], None], int]] = {}  # name → what injects it, number of cases


def fault(name: str, **counts: int) -> Callable:
    """Registers NAME/JOB for each job, with its number of cases."""

    def decorate(function: Callable) -> Callable:
        for job, count in counts.items():
            REGISTRY[f"{name}/{job}"] = (lambda case, job=job: function(case, job)), count
        return function

    return decorate


# Kills and signals ----------------------------------------------------------------------------------------------------
def disturb(case: Case, job: str, words: list, number: int, late: int = 0, again: int = 0) -> Outcome | None:
    """Runs a command and sends it a signal: before one of its file changes, or after some time. None: it was over."""
    rank, chance, expected = case.rng.randrange(case.processes), case.rng.random(), golden[job]
    grace = 0.5 if number == signal.SIGKILL else 20
    if chance < 0.65:
        moment = Moment(case.rng.randint(1, max(expected.changes // (1 + late + rank), 2)), number, again, rank=rank)
        if job in TRAINERS and chance < 0.2:  # between the last checkpoint and the card
            moment = Moment(case.rng.randint(1, 12), number, again, "checkpoint-4")
        outcome = case.run(words, moment, grace=grace, rank=moment.rank)
        sent = outcome.injected
    else:  # not in the first instants: until a script's first lines have run, the answer to Ctrl-C is Python's own
        run, pause = Run(case.folder, words, None, case.processes), case.rng.uniform(0.05, expected.seconds * 0.9)
        run.until("began")
        time.sleep(pause)
        sent = run.send(number, rank)
        case.story.append(f"signal {number} to process {rank} of {case.processes} after {pause:.2f} s")
        outcome = case.end(run, grace=grace, rank=rank)
    case.faults += sent and any(outcome.codes)
    return outcome if sent and any(outcome.codes) else None


@fault("kill", build=10, pairs=8, sdxl=10, sd3=5, zimage=3, qsd=5, evaluate=8, tally=2, export=2)
def kill(case: Case, job: str) -> None:
    """Up to four kills, of one process or one of two, and then an undisturbed run."""
    before = {}
    for late in range(case.rng.randint(1, 4)):
        disturb(case, job, command(job, case.folder), signal.SIGKILL, late)
        before = case.whole(case.folder, before)
    case.check(job, case.run(command(job, case.folder)))
    case.whole(case.folder, before)


@fault("signal", build=5, pairs=5, sdxl=8, sd3=4, zimage=2, qsd=4, evaluate=5, tally=2, export=2)
def stop(case: Case, job: str) -> None:
    """SIGTERM or Ctrl-C, perhaps twice: exit code 128 + n; of a trainer a checkpoint of the last whole step."""
    number, again = (signal.SIGTERM, signal.SIGINT)[case.seed % 2], 3 * (case.seed % 4 > 1)
    words = command(job, case.folder, **({"checkpointing_steps": 1000} if job in TRAINERS else {}))
    if outcome := disturb(case, job, words, number, again=again):
        log = case.folder / "out" / "training_log.jsonl"
        steps = log.read_text().count("\n") if log.exists() else 0
        raised = "Traceback" in outcome.output and "KeyboardInterrupt" not in outcome.output and case.processes == 1
        if outcome.code != 128 + number or raised:
            case.problem("LOST", f"exit code {outcome.code} after signal {number}, not {128 + number}", outcome)
        if outcome.code and steps and not (case.folder / "out" / f"checkpoint-{steps}").is_dir():
            case.problem("LOST", f"{steps} steps are logged, but there is no checkpoint of step {steps}", outcome)
        if steps and 128 + signal.SIGKILL in outcome.codes:
            case.problem("LOST", "the processes did not leave together", outcome)
        case.whole(case.folder)
    case.check(job, case.run(words))


@fault("tasks", build=3, pairs=2, evaluate=2)
def tasks(case: Case, job: str) -> None:
    """Two tasks at once, one of which is killed and begins again; then a run that joins their work."""
    words = [command(job, case.folder, task_index=index, num_tasks=2) for index in range(2)]
    moment = Moment(case.rng.randint(1, golden[job].changes // 2), signal.SIGKILL)
    runs = [Run(case.folder, words[0], moment), Run(case.folder, words[1])]
    case.faults += [case.end(run) for run in runs][0].injected
    if (outcome := case.run(words[0])).code:
        case.problem("LOST", "a killed task does not go on", outcome)
    case.check(job, case.run(command(job, case.folder)))


@fault("votes", serve=3)
def votes(case: Case, job: str) -> None:
    """Three raters vote while the server is killed three times. Each answer that was confirmed is there, once."""
    number, given = (signal.SIGTERM, signal.SIGINT)[case.seed % 2], case.folder / "given"
    port = conftest.free_port()
    words = command(job, case.folder, port=port)
    run, people = Run(case.folder, words), in_fork(answer_all, port, given, wait=False)
    for _ in range(3 if job in golden else 0):
        before, end = answers_in(case.folder)[0], time.time() + TIMEOUT
        while answers_in(case.folder)[0] == before and not given.exists() and time.time() < end:
            time.sleep(0.01)
        time.sleep(case.rng.uniform(0, 0.1))
        if not given.exists() and run.send(signal.SIGKILL):
            case.end(run)
            case.faults += 1
            run = Run(case.folder, words)
    os.waitpid(people, 0)
    case.faults += run.send(number)
    outcome, wanted = case.end(run), int(given.read_text()) if given.exists() else "all"
    if outcome.code != 128 + number or answers_in(case.folder) != (wanted, wanted):
        case.problem("LOST", f"{wanted} answers given, logged, different: {answers_in(case.folder)}", outcome)
    golden.setdefault(job, Golden({}, outcome.seconds, 20))


# Disks and other runs -------------------------------------------------------------------------------------------------
def mount(folder: Path, options: str) -> bool:
    """A small file system that only this process and its children see; False where that is not allowed."""
    folder.mkdir()
    if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS
        return False
    commands = [["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]]
    return all(subprocess.run(words, capture_output=True).returncode == 0 for words in commands)


@fault("disk-full", build=9, pairs=7, sdxl=10, sd3=6, qsd=6, evaluate=7, tally=3, export=3)
def disk_full(case: Case, job: str) -> None:
    """A file system too small, in bytes or in files, or read-only since a kill; or no file may grow beyond a limit, as
    with a quota. The run ends in Python's own error and leaves nothing half-written; on a large disk it goes on."""
    disk, kind, share = case.folder / "disk", case.seed % 4, case.rng.uniform(0.03, 0.9)
    files = [file for name in ("out", "cache") for file in (world / "golden" / job / name).rglob("*")]
    size = max(4096, int(share * sum(file.stat().st_size + 4096 for file in files)))
    options = [f"size={size}", f"nr_inodes={max(2, int(share * len(files)))}", "size=64m", "size=64m"][kind]
    kind, words, moment = kind if mount(disk, options) else 3, command(job, disk), None
    if kind == 2:
        case.run(words, Moment(case.rng.randint(1, golden[job].changes), signal.SIGKILL))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    if kind == 3:
        moment = Moment(case.rng.choice([1000, 3000, 6000, 9000, 14000, 24000]), "quota")
    case.story.append(f"a disk of {options}, read-only: {kind == 2}")
    outcome = case.run(words, moment)
    if outcome.code or kind == 2:
        case.faults += 1
        case.refused(outcome, "space|inode|free|read-only|writ|large|quota", raises=True)
        case.whole(disk)
        subprocess.run(["mount", "-o", "remount,rw,size=64m,nr_inodes=0", disk], capture_output=True)
        case.check(job, case.run(words), disk)


@fault("two-writers", build=2, pairs=2, sdxl=2, sd3=2, qsd=2, evaluate=2)
def two_writers(case: Case, job: str) -> None:
    """A second run in the folder, with the same flags or others, is refused; and so is another one afterwards."""
    moment = Moment(case.rng.randint(golden[job].changes // 4, golden[job].changes - 3), signal.SIGSTOP)
    first = Run(case.folder, command(job, case.folder), moment)
    first.until("came")
    other = command(job, case.folder, **OTHER.get(job, {"seed": 1}))
    if not first.ended():
        case.faults += 1
        case.refused(case.run(other if case.seed % 2 else command(job, case.folder)), "output_dir|out")
        first.send(signal.SIGCONT)
    outcome = case.end(first)
    case.faults += 1
    case.refused(case.run(other), "output_dir|out")
    case.check(job, outcome)


# Malformed inputs -----------------------------------------------------------------------------------------------------
def malformed(name: str, jobs: str, flags: dict | Callable, *words: str, raises=False, late=False) -> None:
    """Registers an input that must be refused with these words, before anything is written. flags: to set, or what
    prepares them; raises: Python's own error will do; late: it cannot be found before the work has begun."""

    def inject(case: Case, job: str) -> None:
        changes = flags(case) if callable(flags) else flags
        out = Path(changes.get("output_dir", case.folder / "out"))
        before, outcome = state(out, "**/*"), case.run(command(job, case.folder, **changes))
        case.faults += 1
        case.refused(outcome, *words, raises=raises)
        if outcome.code and not late and state(out, "**/*") != before:
            case.problem("LOST", f"refused after work: {state(out, '**/*').items() ^ before.items()}", outcome)

    fault(f"input/{name.replace(' ', '-')}", **dict.fromkeys(jobs.split(), 1))(inject)


def written(flag: str, file: str, text: str | bytes, after: str = "") -> Callable:
    """Writes a file into the case's folder and sets the flag to it."""

    def prepare(case: Case) -> dict:
        (case.folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        return {flag: f"{case.folder}/{file}{after}"}

    return prepare


# Jobs: flag value, flag value, … The message names the flag or the value.
VALUES = """
build sdxl sd3 qsd evaluate: seed -1, seed 4294967296, seed one
sdxl sd3 qsd evaluate: resolution 33, resolution 100000
sdxl sd3 qsd: rank 0, learning_rate nan, learning_rate 0, learning_rate fast, train_batch_size 0, max_train_steps 0
sdxl sd3 qsd: gradient_accumulation_steps 0, num_train_epochs nan, checkpointing_steps 0, adam_beta1 1, beta_dpo nan
sdxl sd3 qsd: adam_epsilon -1, adam_weight_decay nan, max_grad_norm nan, lr_scheduler cubic, mixed_precision fp8
sdxl sd3 qsd: report_to foo, proportion_empty_prompts 2, loss_type foo, resume_from_checkpoint checkpoint-77
sdxl sd3 qsd build pairs evaluate serve: config nowhere.yaml, learning_rat 1
build: shard_size 0, generation_batch_size 0, generation_batch_size many, max_prompts 0, stages paint, image_format gif
build: num_tasks 0, task_index 1, gpu_hourly_cost nan, reward_batch_size 0, rewards nosuch, generators nowhere.yaml
build evaluate: prompts nowhere.txt
pairs: shard_size 0, top_fraction nan, top_fraction 0, top_fraction 2, reward nosuch, normalization foo, num_examples -1
evaluate: batch_size 0, num_inference_steps 0, metrics nosuch, loras nonsense, loras a=nowhere, baseline nobody
serve: port 0, num_prompts 0, num_prompts 5, votes_per_comparison 0, picture_size 0, images one, questions foo
serve: baseline nobody, prompts nowhere.txt, comparisons_per_rater 0
tally: max_failed_checks -1, study_dir nowhere
export: question nope, export_format csv, study_dir nowhere
qsd: top_fraction 0, top_fraction 2, min_quality high
sdxl sd3 qsd: dataset_name nowhere, dataset_split nope, pretrained_model_name_or_path nowhere
"""
for line in VALUES.strip().splitlines():
    jobs, _, values = line.partition(": ")
    for flag, value in (item.split() for item in values.split(", ")):
        malformed(f"{flag} {value}", jobs, {flag: value}, f"{flag}|{value}", raises="nowhere" in value)

for name, file, text, *words in (
    ("broken jsonl", "rows.jsonl", '{"prompt": "a cross"}\n{"prompt": "a', "2"),
    ("empty prompt", "gap.txt", "a cross\n\na square\n", "row 2|line 2"),
    ("blank prompt", "rows.jsonl", '{"prompt": "a cross"}\n{"prompt": " "}', "row 2|line 2"),
    ("number as prompt", "rows.jsonl", '{"prompt": "a cross"}\n{"prompt": 5}', "row 2|line 2"),
    ("list as prompt", "rows.jsonl", '{"prompt": ["a cross"]}\n', "row"),
    ("no prompts", "none.txt", ""),
    ("latin-1 prompts", "latin.txt", "a caf\xe9\n".encode("latin-1")),
    ("broken parquet", "rows.parquet", b"PAR1 no, this is not one PAR1"),
    ("other column", "rows.csv", "text\na cat\n", "prompt"),
):
    malformed(name, "build evaluate serve", written("prompts", file, text), file, *words)
for name, text in {"broken config": "seed: [1", "nested config": "yaml: {b: 1}"}.items():
    malformed(name, "build pairs sdxl evaluate", written("config", "c.yaml", text), "yaml", raises=True)
malformed("csv dataset", "sdxl sd3 qsd pairs", written("dataset_name", "rows.csv", "a\nb\n"), "csv|column", raises=True)
malformed("cut parquet", "sdxl sd3 qsd pairs", written("dataset_name", "c.parquet", b"PAR1"), "parquet", raises=True)
jobs = "build pairs sdxl sd3 qsd evaluate tally export"
malformed("file as folder", jobs, written("output_dir", "file", ""), "file", raises=True)

for name, change, word in (
    ("typo in call", {"call": {"num_inference_step": 2}}, "num_inference_step"),
    ("output_type", {"call": {"output_type": "latent"}}, "output_type"),
    ("width 33", {"call": {"width": 33}}, "33"),
    ("generator ..", {"name": ".."}, ".."),
    ("generator a/b", {"name": "a/b"}, "a/b"),
    ("generator twice", {"name": "two"}, "two"),
    ("typo in generator", {"lod": {}}, "lod"),
    ("no model", {"model": "nowhere"}, "nowhere"),
):
    late = name == "width 33"  # only the pipeline knows
    prepare = lambda case, change=change: {"generators": write_generators(case.folder / "g.yaml", **change)}  # noqa: E731
    malformed(name, "build", prepare, word, raises=late, late=late)

for name, text in {
    "does not parse": "def bad(images, prompts:\n",
    "exits at import": "raise SystemExit(0)\n",
    "returns a dict": "def bad(images, prompts):\n    return {i: 1.0 for i in range(len(images))}\n",
    "returns NaN": "def bad(images, prompts):\n    return [float('nan')] * len(images)\n",
    "returns too few": "def bad(images, prompts):\n    return [1.0] * (len(images) - 1)\n",
    "returns text": "def bad(images, prompts):\n    return ['good'] * len(images)\n",
    "takes nothing": "def bad():\n    return []\n",
}.items():
    late = name not in ("does not parse", "exits at import")
    for job, flag in {"build": "rewards", "pairs": "reward", "evaluate": "metrics"}.items():
        if (job, name) != ("evaluate", "returns NaN"):  # there it means: does not apply
            prepare = written(flag, "mine.py", text, ":bad")
            malformed(f"reward {name}", job, prepare, "mine.py|bad|good", raises=late, late=late)


# Main -----------------------------------------------------------------------------------------------------------------
def run_case(name: str, seed: int, folder: Path) -> None:
    """One case, in a process of its own; its verdict goes into a file."""
    case = Case(name, seed, folder)
    try:
        REGISTRY[name][0](case)
    except BaseException:
        case.problem("LOST", f"the case failed:\n{traceback.format_exc()}")
    verdict = {"faults": case.faults, "problems": case.problems, "story": case.story}
    folder.with_suffix(".json").write_text(json.dumps(verdict))


def run_cases(cases: list[tuple[str, int]], jobs: int) -> Counter:
    """Runs the cases, `jobs` at a time; prints what was found, and returns (class, what) → number."""
    totals, running, waiting = Counter(), {}, cases[::-1]
    (world / "cases").mkdir(exist_ok=True)
    while waiting or running:
        while waiting and len(running) < jobs:
            name, seed = waiting.pop()
            folder = world / "cases" / f"{name.replace('/', '-')}-{seed}"
            running[in_fork(run_case, name, seed, folder, wait=False)] = name, seed, folder, time.time()
        for pid, (name, seed, folder, started) in list(running.items()):
            if not os.waitpid(pid, os.WNOHANG)[0]:
                continue
            del running[pid]
            verdict = json.loads(folder.with_suffix(".json").read_text())
            kinds = {kind for kind, _ in verdict["problems"]}
            found = {"faults": verdict["faults"], "seconds": time.time() - started, **dict.fromkeys(kinds, 1)}
            totals.update({(re.sub("/.*/", "/", name), what): number for what, number in found.items()})
            totals.update({("all", what): number for what, number in found.items()})
            if kinds and not planted:
                told = [*verdict["story"], *(f"{kind}: {text}" for kind, text in verdict["problems"])]
                print(f"\n--- python tests/faults.py --only {name} --seed {seed} --count 1")
                print(*(text.replace("\n", "\n      ") for text in told), sep="\n  ", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.005)
    return totals


def main() -> int:
    global world, planted
    parser, started = argparse.ArgumentParser(description=__doc__.splitlines()[0]), time.time()
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case of each class; the next has 1 more")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--only", nargs="+", default=[""], help="only classes like these, e.g. kill/sdxl or */build")
    parser.add_argument("--count", type=int, help="cases of each class")
    parser.add_argument("--planted", nargs="*", default=[], help="file=class: is this defect found?")
    args = parser.parse_args()
    names = [name for name in REGISTRY if any(fnmatch(name, f"{only}*") for only in args.only)]
    if not find_spec("gradio"):
        print("gradio is not installed: user_study.py is left out")
        names = [name for name in names if not name.endswith(STUDY)]
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    world = Path(tempfile.mkdtemp(prefix="faults-", dir=shm))
    try:
        asked = {name.rpartition("/")[2] for name in names}
        asked |= {needed for job in asked for needed in NEEDS.get(job, ())}
        jobs = [job for job in COMMANDS if job in asked]
        forks.import_libraries({COMMANDS[job].split()[0] for job in jobs})
        in_fork(make_world)
        for job in jobs:
            make_golden(job)
            if job in TRAINERS:
                make_golden(job, 2)
        cases = [(name, args.seed + i) for name in names for i in range(args.count or REGISTRY[name][1])]
        print(f"{len(cases)} cases, ready after {time.time() - started:.0f} s", flush=True)
        totals = run_cases(cases, args.jobs)
        print(f"\n{'class':24} {'faults':>7} {'lost':>5} {'silent':>7} {'seconds':>8}")
        for group in dict.fromkeys(group for group, _ in totals):
            cells = [totals[group, what] for what in ("faults", "LOST", "SILENT", "seconds")]
            print("{:24} {:7} {:5} {:7} {:8.1f}".format(group, *cells))
        for file, _, only in (item.partition("=") for item in args.planted):
            planted = Path(file).read_text()
            found = run_cases([case for case in cases if fnmatch(case[0], only)], args.jobs)
            print(f"{Path(file).name}: {found['all', 'LOST']} lost, {found['all', 'SILENT']} silent")
    finally:
        shutil.rmtree(world, ignore_errors=True)
    faults, lost, silent = (totals["all", what] for what in ("faults", "LOST", "SILENT"))
    print(f"{time.time() - started:.0f} seconds\n{faults} faults injected, {lost} lost, {silent} silent")
    return int(lost + silent > 0)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # some libraries complain at exit that they were forked
