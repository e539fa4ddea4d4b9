# SPDX-License-Identifier: Apache-2.0
"""tests/faults.py finds defects that are planted into the scripts, and a share of its cases finds none without them."""

import re
import subprocess
import sys

from conftest import ROOT


CASES = "kill/build kill/sdxl signal/sdxl disk-full/build disk-full/sdxl two-writers/sdxl input/seed*/sdxl".split()
FOUND = r"^(\w+): (\d+) lost, (\d+) silent$"
# Name → the class of faults that must find it, and code that runs before the script.
DEFECTS = {
    # Half a file, or of a folder, has its final name for a moment.
    "not_atomic": (
        "kill/build",
        """
import os, pathlib, shutil

def replace(source, target):
    if os.path.isdir(source):
        shutil.copytree(source, target)
        return shutil.rmtree(source)
    content = pathlib.Path(source).read_bytes()
    for part in (content[:len(content) // 2], content):
        with open(target, "wb") as file:
            file.write(part)
    os.remove(source)

os.replace = replace
""",
    ),
    # Noise and timesteps are no functions of seed, epoch and row.
    "random": (
        "kill/sdxl",
        """
import numpy
original = numpy.random.default_rng
numpy.random.default_rng = lambda seed=None: original()
""",
    ),
    # Signals are ignored, or end the process before it has written a checkpoint.
    "deaf": (
        "signal/sdxl",
        """
import signal
original = signal.signal
signal.signal = lambda number, handler: original(number, signal.SIG_DFL)
""",
    ),
    # Ranges of flags are not checked.
    "any_value": (
        "input/*",
        """
import operator
for name in ("ge", "gt", "le", "lt"):
    setattr(operator, name, lambda a, b: True)
""",
    ),
    # Nobody else is asked to wait.
    "no_lock": (
        "two-writers/*",
        """
import filelock
filelock.FileLock.acquire = lambda self, *args, **kwargs: None
filelock.FileLock.release = lambda self, *args, **kwargs: None
""",
    ),
}


def test_planted_defects_are_found(tmp_path):
    planted = []
    for name, (only, code) in DEFECTS.items():
        (tmp_path / name).write_text(code)
        planted.append(f"{tmp_path / name}={only}")
    command = [sys.executable, ROOT / "tests" / "faults.py", "--seed", "1", "--count", "2", "--only", *CASES]
    result = subprocess.run([*command, "--planted", *planted], cwd=ROOT, capture_output=True, text=True, timeout=900)
    report = result.stdout[-8000:] + result.stderr[-2000:]
    last = re.fullmatch(r"(\d+) faults injected, 0 lost, 0 silent", result.stdout.strip().splitlines()[-1])
    assert last and int(last[1]) >= 10 and result.returncode == 0, report
    found = {name: (int(lost), int(silent)) for name, lost, silent in re.findall(FOUND, result.stdout, re.M)}
    assert found.keys() == DEFECTS.keys() and all(map(any, found.values())), report
    assert found["random"][1] and found["no_lock"][1], report
