# SPDX-License-Identifier: Apache-2.0
"""Injects faults into runs of the scripts: nothing may be lost, nothing silently wrong, no message a traceback.

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
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import faultclasses
import faultinputs  # noqa: F401 (it registers its classes)
from faultcase import REGISTRY, Case, Lab, Problem, Stop
from faultlab import JOBS, TRAINERS, Golden, Moment, Run, command


CASE_TIMEOUT = 120  # seconds


def prepare(world: Path) -> Lab:
    """Models, data, undisturbed runs, and the states in which faults find a run."""
    lab = Lab(world, can_mount=faultclasses.can_mount(world))
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
        lab = prepare(world)
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
    print(f"\n{'class':42} {'faults':>7} {'lost':>5} {'silent':>7} {'tracebacks':>11} {'seconds':>8}")
    for name, t in totals.items():
        print(f"{name:42} {t.faults:7} {t.lost:5} {t.silent:7} {t.tracebacks:11} {t.seconds:8.1f}")
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
