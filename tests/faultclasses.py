# SPDX-License-Identifier: Apache-2.0
"""Faults of tests/faults.py that come from outside: kills, signals, damaged files, full disks, a second writer."""

import ctypes
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import faultlab
from faultcase import Case, fault, for_jobs
from faultlab import TRAINERS, Golden, Moment, Outcome, Run


# ----------------------------------------------------------------------------------------------------------------------
# Kills and signals
# ----------------------------------------------------------------------------------------------------------------------


def whole_files(folder: Path) -> dict[Path, str]:
    """Finished work: shards, checkpoints, pictures, caches; what a later run must leave as it is."""
    patterns = ("out/work/*/**/*.parquet", "out/checkpoint-*/*", "out/images/*/*.png", "cache/*/[!.]*")
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
        # Not in the first instants: until a script's first lines have run, the answer to Ctrl-C is Python's own.
        wait, run = case.rng.uniform(0.05, golden.seconds * 0.9), case.start(words)
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
    """A signal, perhaps a second one: exit code 128 + n; of a builder a line that it is heard and one at the end, of a
    trainer a checkpoint of the last step. A trainer that has no step yet dies of the signal."""
    changes = {"checkpointing_steps": 1000} if job in TRAINERS else {}
    words = case.command(job, **changes)
    if outcome := disturb(case, words, case.golden[job], number, again):
        early = job in TRAINERS or not (case.folder / "out").exists()
        allowed = {128 + number, 0} | ({-number} if early else set())
        if outcome.code not in allowed:
            case.problem("LOST", f"exit code {outcome.code} after signal {number}, not {128 + number}", outcome)
        many = job not in TRAINERS and len(outcome.lines) > 2
        if outcome.code == 128 + number and many and "Traceback" not in outcome.err:
            case.problem("LOST", f"{len(outcome.lines)} lines on stderr after signal {number}, not 2", outcome)
        if outcome.code and job in TRAINERS and not again:
            log = case.folder / "out" / "training_log.jsonl"
            steps = len(log.read_text().splitlines()) if log.exists() else 0
            if steps and not (case.folder / "out" / f"checkpoint-{steps}").is_dir():
                case.problem("LOST", f"{steps} steps are logged, but there is no checkpoint of step {steps}", outcome)
    case.mend(job, words)


# ----------------------------------------------------------------------------------------------------------------------
# Damaged files: of the builders and evaluate.py
# ----------------------------------------------------------------------------------------------------------------------


def kind_of(file: Path) -> str:
    return re.sub(r"\d+", "#", str(file))


def choose_file(case: Case, root: Path) -> Path:
    """A file of the folder: first its kind (names that differ only by numbers are one), so that rare kinds come too."""
    files = sorted(f for f in root.rglob("*") if f.is_file() and f.name != ".lock")
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


@for_jobs("corrupt-finished", build=36, pairs=24, evaluate=24)
def corrupt_finished(case: Case, job: str) -> None:
    """A file of a finished run, its output folder, is damaged; the same command again."""
    case.take(job)
    damage(case, choose_file(case, case.folder / "out"))
    case.mend(job)


@for_jobs("corrupt-middle", build=30, pairs=16, evaluate=16)
def corrupt_middle(case: Case, job: str) -> None:
    """A file of a run that was killed on the way is damaged; the same command again."""
    case.take(job, "middle")
    damage(case, choose_file(case, case.folder / "out"))
    case.mend(job)


@fault("missing-data-file/evaluate", 2)
def missing_data_file(case: Case) -> None:
    """evaluate.py reads prompts from a data folder without one of its -of-N files: it is not whole."""
    data = case.folder / "data-copy"
    shutil.copytree(case.lab.world / "golden" / "build" / "out", data, ignore=shutil.ignore_patterns("work"))
    files = sorted(data.glob("data/*.parquet"))
    files[case.seed % len(files)].unlink()
    case.faults += 1
    case.one_line(case.run(case.command("evaluate", prompts=data)), "-of-|of 2|missing")


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


def no_space(case: Case, job: str, outcome: Outcome, folder: Path, *words: str) -> None:
    """A trainer ends with Python's own error, the others with one line. No file is half there under its final name."""
    if job not in TRAINERS:
        case.one_line(outcome, *words)
        return
    readers = {"safetensors": faultlab.tensors_of, "json": lambda file: json.loads(file.read_text())}
    readers |= {"png": faultlab.pixels, "pt": lambda file: zipfile.ZipFile(file).testzip()}
    for file in [*folder.glob("out/**/[!.]*.*"), *folder.glob("cache/**/[!.]*.*")]:
        read = readers.get(file.suffix[1:])
        if read and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            if str(found := faultlab.attempt(read, file)).startswith("unreadable"):
                case.problem("LOST", f"{file.relative_to(folder)} is half-written: {found}", outcome)


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
    outcome = case.run(words, may_raise=job in TRAINERS)
    if outcome.code == 0:
        return  # the disk was large enough
    case.faults += 1
    case.tell(f"disk of {options}")
    if outcome.code != 1:
        case.problem("LOST", f"exit code {outcome.code} on a full disk", outcome)
    no_space(case, job, outcome, disk, "free|space|inode", str(disk))
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
    outcome = case.run(words, may_raise=job in TRAINERS)
    no_space(case, job, outcome, disk, "read-only|written|write", str(disk))
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    case.mend(job, words, folder=disk)


@for_jobs("file-too-large", build=5, sdxl=5, pairs=4, evaluate=4, sd3=2, qsd=2)
def file_too_large(case: Case, job: str) -> None:
    """No file may grow beyond a limit: writes fail in the middle, as with a quota."""
    limit = case.rng.choice([3000, 6000, 9000, 14000, 18000, 24000])
    outcome = case.run(case.command(job), limits={"RLIMIT_FSIZE": limit}, may_raise=job in TRAINERS)
    if outcome.code == 0:
        return
    case.faults += 1
    case.tell(f"no file above {limit} bytes")
    no_space(case, job, outcome, case.folder, "written|write|large", str(case.folder))
    case.mend(job)


@for_jobs("write-fails", build=8, sdxl=8, pairs=5, evaluate=6, sd3=3, qsd=3)
def write_fails(case: Case, job: str) -> None:
    """From some change of files on, all changes fail with "No space left on device"."""
    moment = Moment(case.rng.randint(1, case.golden[job].changes), "full")
    case.tell(f"no space from file change {moment.number} on")
    outcome = case.run(case.command(job), moment=moment, may_raise=job in TRAINERS)
    if not outcome.injected:
        return
    case.faults += 1
    if outcome.code:
        no_space(case, job, outcome, case.folder, "space|free|write|written")
    case.mend(job)


@for_jobs("parent-is-a-file", build=1, sdxl=1, pairs=1, evaluate=1, sd3=1, qsd=1)
def parent_is_a_file(case: Case, job: str) -> None:
    (case.folder / "file").write_text("")
    case.faults += 1
    changes = {"cache_dir": case.folder / "cache"} if job in TRAINERS else {}
    case.one_line(case.run(case.command(job, case.folder / "file", **changes)), str(case.folder / "file"))


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
    # A trainer that finds a checkpoint with other settings does not look who is there.
    case.one_line(second, "is in use|holds a run with" if job in TRAINERS else str(first.pid))
    first.send(signal.SIGCONT)
    case.check(job, case.end(first))


@for_jobs("shared-cache", sdxl=3, sd3=1, qsd=2)
def shared_cache(case: Case, job: str) -> None:
    """Two runs on one cache at once: both reach the result."""
    if not (first := stopped_run(case, job)):
        return
    case.faults += 1
    (case.folder / "second").mkdir()
    second = case.start(case.command(job, case.folder / "second", cache_dir=case.folder / "cache"))
    time.sleep(1)
    first.send(signal.SIGCONT)
    case.check(job, case.end(first))
    case.check(job, case.end(second), case.folder / "second")


@for_jobs("stale-lock", build=2, pairs=2, evaluate=2)
def stale_lock(case: Case, job: str) -> None:
    """The lock file of a run that was killed on this host, or a damaged one, does not block."""
    case.take(job, "middle")
    owner = f"process 4194304 on {platform.node()}" if case.seed % 2 else ""
    (case.folder / "out" / ".lock").write_text(owner)
    case.faults += 1
    case.mend(job)


@fault("stale-lock-of-another-host", 1)
def foreign_lock(case: Case) -> None:
    """A run of another host that was killed: its lock file shows no life, so the folder is free after some time."""
    case.take("build", "middle")
    (case.folder / "out" / ".lock").write_text("process 1 on another-host")
    case.faults += 1
    case.check("build", case.end(case.start(case.command("build")), timeout=100))
