# SPDX-License-Identifier: Apache-2.0
"""A case of tests/faults.py: its folder, its judgement, and the registry of the classes of faults."""

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import faultlab
from faultlab import TRAINERS, Golden, Outcome, Run, command, differences, results


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

    def end(self, run: Run, timeout: float = faultlab.TIMEOUT, may_raise: bool = False) -> Outcome:
        """Waits for a run's end. No end, or a traceback of one that may not raise, is a fault, whatever came before."""
        outcome = run.wait(timeout)
        self.tell(f"exit code {outcome.code} in {outcome.seconds:.1f} s: {' / '.join(outcome.lines[-2:])[:400]}")
        if "Traceback (most recent call last)" in outcome.out + outcome.err and not may_raise:
            self.problem("TRACEBACK", "a traceback", outcome)
        if "HUNG" in outcome.err:
            self.problem("LOST", "no end", outcome)
            raise Stop
        return outcome

    def run(self, words: list, may_raise: bool = False, **kwargs) -> Outcome:
        return self.end(self.start(words, **kwargs), may_raise=may_raise)

    def take(self, job: str, state: str = "golden") -> None:
        """Copies a prepared state into the case's folder: golden (finished), middle (killed on the way)."""
        faultlab.copy_state(self.lab.world / state / job, self.folder)

    def check(self, job: str, outcome: Outcome, folder: Path | None = None, golden: str | None = None) -> None:
        """The final judgement of a run that should have reached the golden result."""
        if outcome.code:
            self.problem("LOST", "the result is not reached", outcome)
            return
        bad = differences(self.golden[golden or job].results, results(job, folder or self.folder))
        if bad:
            self.problem("SILENT", f"exit code 0, but {'; '.join(bad[:6])}", outcome)
        if job in TRAINERS:  # a lock that nobody holds and a temporary file of a killed run may stay: they do not hurt
            return
        for file in (folder or self.folder).rglob("*"):
            inside = "logs" not in file.parts and "hf" not in file.parts
            if inside and re.search(r"^\.lock$|\.tmp|tmp\d", file.name):
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
