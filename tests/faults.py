# SPDX-License-Identifier: Apache-2.0
"""Injects faults into runs of the scripts, and checks that nothing is lost, nothing silently wrong, nothing a traceback.

    python tests/faults.py --seed 0 --jobs 2                     # all classes of faults
    python tests/faults.py --only kill/sdxl --seed 7 --count 1   # one case again

A case prepares a folder, injects a fault, does what a user would do, and compares the results with those of an
undisturbed run. Its verdicts: TRACEBACK, a Python traceback in any output; SILENT, a run that exits with 0 and leaves
other results; LOST, the results are not reached, or work that was finished and whole is destroyed. A fault that did not
come about, because the run was over before it, does not count.
"""

import faultlab  # first: it sets the environment that the libraries read


# isort: split
import argparse
import ctypes
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from faultlab import JOBS, TRAINERS, Golden, Moment, Outcome, Run, command, differences, results


CASE_TIMEOUT = 300  # seconds


@dataclass
class Lab:
    """What all cases share: the world, and the results of undisturbed runs."""

    world: Path
    golden: dict[str, Golden] = field(default_factory=dict)
    can_mount: bool = False


@dataclass
class Problem:
    kind: str  # LOST, SILENT or TRACEBACK
    text: str


class Stop(Exception):
    """The case is decided."""


@dataclass
class Case:
    """One injection: its own folder, its own random numbers, its verdict."""

    lab: Lab
    name: str
    seed: int
    folder: Path
    faults: int = 0
    problems: list[Problem] = field(default_factory=list)
    story: list[str] = field(default_factory=list)  # what was done, for the report

    def __post_init__(self):
        self.rng = random.Random(f"{self.name}|{self.seed}")
        self.folder.mkdir(parents=True)

    @property
    def golden(self) -> dict[str, Golden]:
        return self.lab.golden

    def tell(self, text: str) -> None:
        self.story.append(text)

    def problem(self, kind: str, text: str, outcome: Outcome | None = None) -> None:
        self.problems.append(Problem(kind, text + (f"\n{outcome.tail}" if outcome else "")))

    def command(self, job: str, folder: Path | None = None, **changes) -> list:
        return command(self.lab.world, job, folder or self.folder, **changes)

    def start(self, words: list, **kwargs) -> Run:
        return Run(self.folder, words, **kwargs)

    def end(self, run: Run) -> Outcome:
        """Waits for a run's end. A traceback, or no end, is a fault of the script whatever came before."""
        outcome = run.wait()
        self.tell(f"exit code {outcome.code} in {outcome.seconds:.1f} s: {' / '.join(outcome.lines[-2:])[:400]}")
        if "Traceback (most recent call last)" in outcome.out + outcome.err:
            self.problem("TRACEBACK", "a traceback", outcome)
        if "HUNG" in outcome.err:
            self.problem("LOST", "no end", outcome)
            raise Stop
        return outcome

    def run(self, words: list, **kwargs) -> Outcome:
        return self.end(self.start(words, **kwargs))

    def take(self, job: str, state: str = "golden") -> None:
        """Copies a prepared state into the case's folder: golden (finished), middle (killed on the way)."""
        faultlab.copy_state(self.lab.world / state / job, self.folder)

    def check(self, job: str, outcome: Outcome, folder: Path | None = None, golden: str | None = None) -> None:
        """The final judgement of a run that should have reached the golden result."""
        if outcome.code:
            self.problem("LOST", "the result is not reached", outcome)
            return
        if bad := differences(self.golden[golden or job].results, results(job, folder or self.folder)):
            self.problem("SILENT", f"exit code 0, but {'; '.join(bad[:6])}", outcome)
        for file in (folder or self.folder).rglob("*"):
            inside = "logs" not in file.parts and "hf" not in file.parts
            if inside and (re.search(r"\.tmp|tmp\d", file.name) or file.name == ".lock"):
                self.problem("LOST", f"{file.relative_to(self.folder)} stays behind", outcome)

    def mend(self, job: str, words: list | None = None, golden: str | None = None, folder: Path | None = None) -> None:
        """Runs the command again as a user would, who deletes a file that the one line names; judges the result."""
        words, folder = words or self.command(job), folder or self.folder
        for _ in range(3):
            outcome = self.run(words)
            if outcome.code == 0:
                break
            self.one_line(outcome)
            if not (named := named_files(outcome, folder)):
                break
            self.tell(f"deleted {named[0].relative_to(self.folder)}, which the message names")
            shutil.rmtree(named[0]) if named[0].is_dir() else named[0].unlink()
        self.check(job, outcome, folder, golden)

    def one_line(self, outcome: Outcome, *words: str) -> None:
        """A refusal: not 0, one line on stderr, which contains the words (a|b: one of them)."""
        if outcome.code == 0:
            self.problem("SILENT", f"exit code 0, no refusal that says {' '.join(words)}", outcome)
            return
        lines = outcome.lines
        if len(lines) != 1 and "Traceback" not in outcome.err:
            self.problem("LOST", f"{len(lines)} lines on stderr, not 1", outcome)
        missing = [w for w in words if not any(part.lower() in " ".join(lines).lower() for part in w.split("|"))]
        if missing and "Traceback" not in outcome.err:
            self.problem("LOST", f"the message does not say {', '.join(missing)}", outcome)


def named_files(outcome: Outcome, folder: Path) -> list[Path]:
    """Files or folders of the case that the last line names."""
    words = re.findall(r"[^\s'\",;()]+", outcome.lines[-1] if outcome.lines else "")
    paths = [Path(word.rstrip(".:")) for word in words]
    paths = [path if path.is_absolute() else folder / "out" / path for path in paths]
    roots = (folder, folder / "out", folder / "cache")
    return [p for p in paths if p.exists() and p not in roots and folder in p.parents]


# ----------------------------------------------------------------------------------------------------------------------
# Registry
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class FaultClass:
    name: str
    inject: Callable[[Case], None]
    count: int


REGISTRY: dict[str, FaultClass] = {}


def register(name: str, inject: Callable, count: int) -> None:
    REGISTRY[name] = FaultClass(name, inject, count)


def for_jobs(name: str, **counts: int) -> Callable:
    """Registers NAME/JOB for every job with its number of cases."""

    def decorate(function: Callable) -> Callable:
        for job, count in counts.items():
            register(f"{name}/{job}", lambda case, job=job: function(case, job), count)
        return function

    return decorate


def fault(name: str, count: int = 1) -> Callable:
    def decorate(function: Callable) -> Callable:
        register(name, function, count)
        return function

    return decorate


# ----------------------------------------------------------------------------------------------------------------------
# Kills and signals
# ----------------------------------------------------------------------------------------------------------------------


def whole_files(folder: Path) -> dict[Path, str]:
    """Finished work: shards, checkpoints, pictures, caches; what a later run must leave as it is."""
    patterns = ("out/work/*/**/*.parquet", "out/checkpoint-*/*", "out/images/*/*.png", "cache/*/*.safetensors")
    files = [file for pattern in patterns for file in folder.glob(pattern) if ".tmp" not in str(file)]
    return {file: faultlab.digest(file.read_bytes()) for file in files if file.is_file()}


def disturb(case: Case, words: list, golden: Golden, number: int, again: bool = False) -> Outcome | None:
    """Runs a command and sends it a signal: before one of its file changes, or after some time. None: it came late."""
    second = case.rng.randint(1, 4) if again else None
    if case.rng.random() < 0.6:
        moment = Moment(case.rng.randint(1, golden.changes), number, second)
        case.tell(f"signal {number} before file change {moment.number} of about {golden.changes}")
        outcome = case.run(words, moment=moment)
        sent = outcome.injected
    else:
        wait, run = case.rng.uniform(0, golden.seconds * 0.9), case.start(words)
        run.wait_ready()
        time.sleep(wait)
        case.tell(f"signal {number} after {wait:.3f} s")
        if (sent := run.send(number)) and again:
            time.sleep(case.rng.uniform(0, 0.1))
            run.send(number)
        outcome = case.end(run)
    if not sent:
        case.tell("the run was over before")
        return None
    case.faults += 1
    return outcome


@for_jobs("kill", build=34, sdxl=34, pairs=18, evaluate=18, sd3=8, qsd=12)
def kill(case: Case, job: str) -> None:
    """One to three kills, then an undisturbed run. What was whole stays as it is."""
    for _ in range(case.rng.randint(1, 3)):
        before = whole_files(case.folder)
        disturb(case, case.command(job), case.golden[job], signal.SIGKILL)
        if lost := [file for file, was in before.items() if whole_files(case.folder).get(file) != was]:
            case.problem("LOST", f"{lost[0].relative_to(case.folder)} was whole, and is destroyed or made again")
    case.mend(job)


@for_jobs("kill-finish", sdxl=10, sd3=3, qsd=4)
def kill_while_finishing(case: Case, job: str) -> None:
    """Killed between the last checkpoint and the card."""
    case.take(job, "last")
    disturb(case, case.command(job), case.golden[f"{job}/last"], signal.SIGKILL)
    case.mend(job)


@for_jobs("sigterm", build=8, sdxl=12, pairs=6, evaluate=8, sd3=5, qsd=5)
def sigterm(case: Case, job: str) -> None:
    stop(case, job, signal.SIGTERM, False)


@for_jobs("sigint", build=6, sdxl=8, pairs=5, evaluate=6, sd3=4, qsd=4)
def sigint(case: Case, job: str) -> None:
    stop(case, job, signal.SIGINT, False)


@for_jobs("two-signals", build=4, sdxl=6, pairs=3, evaluate=4, sd3=2, qsd=3)
def two_signals(case: Case, job: str) -> None:
    stop(case, job, case.rng.choice([signal.SIGTERM, signal.SIGINT]), True)


def stop(case: Case, job: str, number: int, again: bool) -> None:
    """A signal, perhaps a second one: exit code 128 + n, one line, and for trainers no step lost."""
    changes = {"checkpointing_steps": 1000} if job in TRAINERS else {}
    words = case.command(job, **changes)
    if outcome := disturb(case, words, case.golden[job], number, again):
        early = not (case.folder / "out").exists()
        allowed = {128 + number, 0} | ({-number} if early else set())
        if outcome.code not in allowed:
            case.problem("LOST", f"exit code {outcome.code} after signal {number}, not {128 + number}", outcome)
        if outcome.code == 128 + number and len(outcome.lines) > 1 and "Traceback" not in outcome.err:
            case.problem("LOST", f"{len(outcome.lines)} lines on stderr after signal {number}, not 1", outcome)
        if outcome.code == 128 + number and job in TRAINERS and not again:
            log = case.folder / "out" / "training_log.jsonl"
            steps = len(log.read_text().splitlines()) if log.exists() else 0
            if steps and not (case.folder / "out" / f"checkpoint-{steps}").is_dir():
                case.problem("LOST", f"{steps} steps are logged, but there is no checkpoint of step {steps}", outcome)
    case.mend(job, words)


# ----------------------------------------------------------------------------------------------------------------------
# Damaged files
# ----------------------------------------------------------------------------------------------------------------------


def kind_of(file: Path) -> str:
    return re.sub(r"\d+", "#", str(file))


def choose_file(case: Case, root: Path, tops: tuple[str, ...]) -> Path:
    """A file of the folder: first its kind (names that differ only by numbers are one), so that rare kinds come too."""
    files = sorted(f for top in tops for f in (root / top).rglob("*") if f.is_file() and f.name != ".lock")
    kinds = sorted({kind_of(file.relative_to(root)) for file in files})
    kind = kinds[case.seed % len(kinds)]
    return case.rng.choice([file for file in files if kind_of(file.relative_to(root)) == kind])


def damage(case: Case, file: Path, how: str | None = None) -> None:
    how = how or case.rng.choice(["flip", "flip", "flip", "truncate", "empty", "delete"])
    content, detail = bytearray(file.read_bytes()), ""
    if how == "flip" and content:
        place, bit = case.rng.randrange(len(content)), case.rng.randrange(8)
        content[place] ^= 1 << bit
        detail = f" (byte {place} of {len(content)}, bit {bit})"
    elif how == "truncate":
        content = content[: case.rng.randrange(len(content)) if content else 0]
        detail = f" (to {len(content)} bytes)"
    elif how == "empty":
        content = b""
    time_before = file.stat()
    if how == "delete":
        file.unlink()
    else:
        file.write_bytes(content)
        os.utime(file, ns=(time_before.st_atime_ns, time_before.st_mtime_ns))  # a disk's fault changes no time
    case.faults += 1
    case.tell(f"{how} {file.relative_to(case.folder)}{detail}")


@for_jobs("corrupt-finished", build=36, sdxl=30, pairs=24, evaluate=24, sd3=8, qsd=10)
def corrupt_finished(case: Case, job: str) -> None:
    """A file of a finished run, its output folder, is damaged; the same command again."""
    case.take(job)
    damage(case, choose_file(case, case.folder, ("out",)))
    case.mend(job)


@for_jobs("corrupt-middle", build=30, sdxl=30, pairs=16, evaluate=16, sd3=8, qsd=8)
def corrupt_middle(case: Case, job: str) -> None:
    """A file of a run that was killed on the way is damaged; the same command again."""
    case.take(job, "middle")
    damage(case, choose_file(case, case.folder, ("out", "cache")))
    case.mend(job)


@for_jobs("corrupt-cache", sdxl=10, sd3=4, qsd=5)
def corrupt_cache(case: Case, job: str) -> None:
    """A shard of the cache is damaged; a new run reads it."""
    case.take(job)
    shutil.rmtree(case.folder / "out")
    damage(case, choose_file(case, case.folder, ("cache",)))
    case.mend(job)


@for_jobs("corrupt-data", sdxl=10, qsd=8)
def corrupt_data(case: Case, job: str) -> None:
    """The dataset that a trainer reads is an original: refused by name, or the damage was without meaning."""
    source = Path(str(case.command(job)[case.command(job).index("--dataset_name") + 1]))
    data = case.folder / "data-copy"
    shutil.copytree(source, data, ignore=shutil.ignore_patterns("work"))
    files = sorted(data.glob("data/*.parquet"))
    file = files[case.seed % len(files)]
    damage(case, file, case.rng.choice(["flip", "flip", "flip", "truncate", "empty"]))
    outcome = case.run(case.command(job, dataset_name=data))
    if outcome.code:
        case.one_line(outcome, f"{file.name}|row")
    else:
        case.check(job, outcome)


@fault("missing-data-file", 3)
def missing_data_file(case: Case) -> None:
    """A data folder without one of its -of-N files is not whole."""
    data = case.folder / "data-copy"
    shutil.copytree(case.lab.world / "golden" / "build" / "out", data, ignore=shutil.ignore_patterns("work"))
    files = sorted(data.glob("data/*.parquet"))
    files[case.seed % len(files)].unlink()
    case.faults += 1
    job = ("sdxl", "sd3", "evaluate")[case.seed % 3]
    words = case.command(job, **({"prompts": data} if job == "evaluate" else {"dataset_name": data}))
    case.one_line(case.run(words), "-of-|of 2|missing")


@fault("corrupt-lora-read", 12)
def corrupt_lora_read(case: Case) -> None:
    """evaluate.py reads a LoRA with one flipped bit."""
    lora = case.folder / "lora" / "out"
    shutil.copytree(case.lab.world / "golden" / "sdxl" / "out", lora)
    damage(case, lora / "pytorch_lora_weights.safetensors", case.rng.choice(["flip", "flip", "flip", "truncate"]))
    outcome = case.run(case.command("evaluate", loras=f"mine={lora}"))
    if outcome.code:
        case.one_line(outcome, "lora")
    else:
        case.check("evaluate", outcome)


# ----------------------------------------------------------------------------------------------------------------------
# Full and read-only disks
# ----------------------------------------------------------------------------------------------------------------------


def own_mounts() -> bool:
    """Mounts of this process, and only of it, from now on; False where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000):  # CLONE_NEWNS
        return False
    return subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode == 0


def mount(folder: Path, options: str) -> bool:
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode == 0


def can_mount(folder: Path) -> bool:
    """Tried in a child, whose mounts vanish with it."""
    if (pid := os.fork()) == 0:
        try:
            os._exit(0 if own_mounts() and mount(folder, "size=64k") else 1)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def own_disk(case: Case, options: str) -> Path:
    """A small file system of the case's own."""
    disk = case.folder / "disk"
    disk.mkdir()
    own_mounts()
    if not mount(disk, options):
        raise RuntimeError("mount does not work any more")
    return disk


def size_of(folder: Path) -> tuple[int, int]:
    files = list(folder.rglob("*"))
    return sum((file.stat().st_size + 4095) // 4096 for file in files) * 4096, len(files)


@for_jobs("disk-full", build=14, sdxl=14, pairs=10, evaluate=10, sd3=4, qsd=4)
def disk_full(case: Case, job: str) -> None:
    """A file system too small, in bytes or in files; then it grows, and the same command goes on."""
    if not case.lab.can_mount:
        return
    size, files = size_of(case.lab.world / "golden" / job)
    if case.rng.random() < 0.75:
        options = f"size={max(4096, int(size * case.rng.uniform(0.03, 0.9)))}"
    else:
        options = f"size=64m,nr_inodes={case.rng.randint(2, max(3, int(files * 0.8)))}"
    disk = own_disk(case, options)
    words = case.command(job, disk)
    outcome = case.run(words)
    if outcome.code == 0:
        return  # the disk was large enough
    case.faults += 1
    case.tell(f"disk of {options}")
    if outcome.code != 1:
        case.problem("LOST", f"exit code {outcome.code} on a full disk", outcome)
    case.one_line(outcome, "free|space|inode", str(disk))
    subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=0", disk], check=True)
    case.mend(job, words, folder=disk)


@for_jobs("read-only", build=4, sdxl=6, pairs=3, evaluate=4, sd3=2, qsd=2)
def read_only(case: Case, job: str) -> None:
    """The file system is read-only, from the start or since a kill; then it is writable again."""
    if not case.lab.can_mount:
        return
    disk = own_disk(case, "size=64m")
    if case.seed % 2:
        faultlab.copy_state(case.lab.world / "middle" / job, disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    case.faults += 1
    words = case.command(job, disk)
    outcome = case.run(words)
    case.one_line(outcome, "read-only|written|write", str(disk))
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    case.mend(job, words, folder=disk)


@for_jobs("file-too-large", build=5, sdxl=5, pairs=4, evaluate=4, sd3=2, qsd=2)
def file_too_large(case: Case, job: str) -> None:
    """No file may grow beyond a limit: writes fail in the middle, as with a quota."""
    limit = case.rng.choice([3000, 6000, 9000, 14000, 18000, 24000])
    outcome = case.run(case.command(job), limits={"RLIMIT_FSIZE": limit})
    if outcome.code == 0:
        return
    case.faults += 1
    case.tell(f"no file above {limit} bytes")
    case.one_line(outcome, "written|write|large", str(case.folder))
    case.mend(job)


@for_jobs("write-fails", build=8, sdxl=8, pairs=5, evaluate=6, sd3=3, qsd=3)
def write_fails(case: Case, job: str) -> None:
    """From some change of files on, all changes fail with "No space left on device"."""
    moment = Moment(case.rng.randint(1, case.golden[job].changes), "full")
    case.tell(f"no space from file change {moment.number} on")
    outcome = case.run(case.command(job), moment=moment)
    if not outcome.injected:
        return
    case.faults += 1
    if outcome.code:
        case.one_line(outcome, "space|free|write|written")
    case.mend(job)


@for_jobs("parent-is-a-file", build=1, sdxl=1, pairs=1, evaluate=1, sd3=1, qsd=1)
def parent_is_a_file(case: Case, job: str) -> None:
    (case.folder / "file").write_text("")
    case.faults += 1
    changes = {"cache_dir": case.folder / "cache"} if job in TRAINERS else {}
    case.one_line(case.run(case.command(job, case.folder / "file", **changes)), str(case.folder / "file"))
    if job in TRAINERS:
        changes = {"cache_dir": case.folder / "file" / "cache"}
        case.one_line(case.run(case.command(job, **changes)), str(case.folder / "file"))


# ----------------------------------------------------------------------------------------------------------------------
# Two writers
# ----------------------------------------------------------------------------------------------------------------------


OTHER_FLAGS = {
    "build": {"image_format": "jpg"},
    "pairs": {"normalization": "none"},
    "evaluate": {"seed": 1},
    **dict.fromkeys(TRAINERS, {"learning_rate": "1e-3"}),
}


def stopped_run(case: Case, job: str) -> Run | None:
    """A run that stands still in the middle of its work."""
    changes = case.golden[job].changes
    run = case.start(case.command(job), moment=Moment(case.rng.randint(changes // 4, changes - 3), signal.SIGSTOP))
    while b"i" not in run.read(0.01) and run.poll() is None:
        pass
    if run.poll() is None:
        return run
    case.end(run)
    return None


@for_jobs("two-writers", build=5, sdxl=5, pairs=4, evaluate=4, sd3=2, qsd=2)
def two_writers(case: Case, job: str) -> None:
    """A second run on the folder of the first, with the same flags or others, is refused; the first is not hurt."""
    if not (first := stopped_run(case, job)):
        return
    case.faults += 1
    others = OTHER_FLAGS[job] if case.seed % 2 else {}
    case.tell(f"a second run with {others or 'the same flags'}")
    second = case.run(case.command(job, **others))
    case.one_line(second, str(first.pid))
    first.send(signal.SIGCONT)
    case.check(job, case.end(first))


@for_jobs("shared-cache", sdxl=3, sd3=1, qsd=2)
def shared_cache(case: Case, job: str) -> None:
    """Two runs on one cache at once: the second waits or reads; both reach the result."""
    if not (first := stopped_run(case, job)):
        return
    case.faults += 1
    (case.folder / "second").mkdir()
    second = case.start(case.command(job, case.folder / "second", cache_dir=case.folder / "cache"))
    time.sleep(1)
    first.send(signal.SIGCONT)
    case.check(job, case.end(first))
    case.check(job, case.end(second), case.folder / "second")


@for_jobs("stale-lock", build=1, sdxl=1, pairs=1, evaluate=1, sd3=1, qsd=1)
def stale_lock(case: Case, job: str) -> None:
    """The lock file of a run that was killed, on this host or another, does not block."""
    case.take(job, "middle")
    for name in ("out", "cache"):
        if (case.folder / name).exists():
            (case.folder / name / ".lock").write_text("another-host 1\n")
    case.faults += 1
    case.mend(job)


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


def prepare(world: Path, jobs: list[str]) -> Lab:
    """Models, data, undisturbed runs, and the states in which faults find a run."""
    lab = Lab(world, can_mount=can_mount(world))
    faultlab.in_fork(faultlab.make_world, world)
    for job in JOBS:
        lab.golden[job] = faultlab.make_golden(world, job)
        faultlab.import_modules(lab.golden[job].modules)
    for job in JOBS:  # again, warm: times and numbers of changes as the cases will see them
        folder = world / "middle" / job
        folder.mkdir(parents=True)
        changes = lab.golden[job].changes
        outcome = Run(folder, command(world, job, folder), Moment(int(changes * 0.7), signal.SIGKILL)).wait()
        if not outcome.injected:
            raise RuntimeError(f"{job}: not killed\n{outcome.tail}")
        lab.golden[job].seconds = outcome.seconds / 0.7
    for job in TRAINERS:
        prepare_last(lab, job)
    return lab


def prepare_last(lab: Lab, job: str) -> None:
    """The state between the last checkpoint and the end, and what an undisturbed run does from there."""
    source, folder = lab.world / "golden" / job, lab.world / "last" / job
    folder.mkdir(parents=True)
    run = Run(folder, command(lab.world, job, folder))
    # The card comes last, so the LoRA's final name is the first change after the last checkpoint.
    final = folder / "out" / "pytorch_lora_weights.safetensors"
    while run.poll() is None and not (folder / "out" / "checkpoint-4").exists():
        time.sleep(0.0005)
    run.send(signal.SIGKILL)
    outcome = run.wait()
    if outcome.code != -9 or final.exists():
        shutil.rmtree(folder)
        faultlab.copy_state(source, folder)
        for name in ("pytorch_lora_weights.safetensors", "README.md"):
            (folder / "out" / name).unlink(missing_ok=True)
    rest = lab.world / "rest" / job
    rest.mkdir(parents=True)
    faultlab.copy_state(folder, rest)
    outcome = Run(rest, command(lab.world, job, rest)).wait()
    lab.golden[f"{job}/last"] = Golden({}, outcome.seconds, max(outcome.changes, 1))


def work(case: Case, file: Path) -> None:
    """One case, in a process of its own; its verdict goes into the file."""
    os.setsid()
    started = time.time()
    try:
        REGISTRY[case.name].inject(case)
    except Stop:
        pass
    except BaseException:
        case.problems.append(Problem("LOST", f"the harness failed:\n{traceback.format_exc()}"))
    problems = [[problem.kind, problem.text] for problem in case.problems]
    verdict = {"faults": case.faults, "problems": problems, "story": case.story, "seconds": time.time() - started}
    file.write_text(json.dumps(verdict))


@dataclass
class Worker:
    name: str
    seed: int
    folder: Path
    started: float


def run_cases(lab: Lab, cases: list[tuple[str, int]], jobs: int, on_verdict: Callable) -> None:
    """Runs the cases, `jobs` at a time, each in a fork."""
    workers: dict[int, Worker] = {}
    waiting = list(reversed(cases))
    while waiting or workers:
        while waiting and len(workers) < jobs:
            name, seed = waiting.pop()
            folder = lab.world / "cases" / f"{name.replace('/', '-')}-{seed}"
            folder.parent.mkdir(exist_ok=True)
            sys.stdout.flush()
            if (pid := os.fork()) == 0:
                try:
                    work(Case(lab, name, seed, folder), folder.with_suffix(".json"))
                finally:
                    os._exit(0)
            workers[pid] = Worker(name, seed, folder, time.time())
        for pid, worker in list(workers.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del workers[pid]
            elif time.time() - worker.started > CASE_TIMEOUT:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                del workers[pid]
            else:
                continue
            file = worker.folder.with_suffix(".json")
            missing = {"faults": 1, "problems": [["LOST", "the case did not end"]], "story": [], "seconds": 0}
            on_verdict(worker, json.loads(file.read_text()) if file.exists() else missing)
        time.sleep(0.005)


@dataclass
class Totals:
    faults: int = 0
    lost: int = 0
    silent: int = 0
    tracebacks: int = 0
    seconds: float = 0.0

    def add(self, verdict: dict) -> None:
        kinds = {kind for kind, _ in verdict["problems"]}
        self.faults += verdict["faults"]
        self.lost += "LOST" in kinds
        self.silent += "SILENT" in kinds
        self.tracebacks += "TRACEBACK" in kinds
        self.seconds += verdict["seconds"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case of each class; the next has 1 more")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--only", action="append", help="classes whose name starts with this; may be repeated")
    parser.add_argument("--count", type=int, help="cases of each class")
    parser.add_argument("--share", type=float, default=1.0, help="share of the cases of each class, at least 1")
    parser.add_argument("--folder", type=Path, help="where to work, and to keep everything; default: temporary")
    return parser.parse_args()


def temporary_folder() -> Path:
    """In memory where there is room: 500 cases sync thousands of small files."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**30
    return Path(tempfile.mkdtemp(prefix="faults-", dir=memory if roomy else None))


def main() -> int:
    args, started = parse_arguments(), time.time()
    names = [n for n in REGISTRY if not args.only or any(n == o or n.startswith(o) for o in args.only)]
    if not names:
        raise SystemExit(f"--only {args.only}: the classes are {', '.join(REGISTRY)}")
    world = args.folder or temporary_folder()
    world.mkdir(parents=True, exist_ok=True)
    try:
        faultlab.import_libraries()
        lab = prepare(world, names)
        cases = []
        for name in names:
            count = args.count or max(1, round(REGISTRY[name].count * args.share))
            cases += [(name, args.seed + number) for number in range(count)]
        totals = {name: Totals() for name in names}

        def on_verdict(worker: Worker, verdict: dict) -> None:
            totals[worker.name].add(verdict)
            if verdict["problems"]:
                report(worker, verdict)
            if not args.folder:
                shutil.rmtree(worker.folder, ignore_errors=True)

        print(f"ready after {time.time() - started:.0f} s; {len(cases)} cases", flush=True)
        run_cases(lab, cases, args.jobs, on_verdict)
    finally:
        if not args.folder:
            shutil.rmtree(world, ignore_errors=True)
    return summary(totals, time.time() - started)


def report(worker: Worker, verdict: dict) -> None:
    kinds = sorted({kind for kind, _ in verdict["problems"]})
    print(f"\n--- {' '.join(kinds)}: {worker.name}, seed {worker.seed}")
    print(f"again: python tests/faults.py --only {worker.name} --seed {worker.seed} --count 1")
    for line in verdict["story"]:
        print(f"  {line}")
    for kind, text in verdict["problems"]:
        print(f"  {kind}: " + text.replace("\n", "\n    "))
    sys.stdout.flush()


def summary(totals: dict[str, Totals], seconds: float) -> int:
    print(f"\n{'class':28} {'faults':>7} {'lost':>5} {'silent':>7} {'tracebacks':>11} {'seconds':>8}")
    for name, t in totals.items():
        print(f"{name:28} {t.faults:7} {t.lost:5} {t.silent:7} {t.tracebacks:11} {t.seconds:8.1f}")
    faults, lost, silent, tracebacks = (
        sum(getattr(t, kind) for t in totals.values()) for kind in ("faults", "lost", "silent", "tracebacks")
    )
    print(f"\n{seconds:.0f} seconds")
    print(f"{faults} faults injected, {lost} lost, {silent} silent, {tracebacks} tracebacks")
    return int(bool(lost or silent or tracebacks))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # some libraries complain at exit that they were forked
