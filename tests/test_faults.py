# SPDX-License-Identifier: Apache-2.0
"""A seeded share of `make test-faults`: one case of each class outside the malformed inputs, and some of those."""

import re
import subprocess
import sys

from conftest import ROOT


CLASSES = (
    *("kill/build", "kill/sdxl", "kill/evaluate", "kill-finish/qsd", "sigterm/", "sigint/sdxl", "two-signals/build"),
    *("corrupt-finished/", "corrupt-middle/", "corrupt-cache/", "corrupt-data/sdxl", "missing-data-file"),
    *("disk-full/", "read-only/", "write-fails/", "two-writers/", "shared-cache/sdxl", "stale-lock/build"),
    *("extended/sdxl", "foreign-checkpoint/qsd", "replaced-model/sdxl", "replaced-images/sdxl", "card-latin-1/"),
)


def test_faults_lose_nothing():
    """Each class once: nothing lost, nothing silently wrong, no traceback."""
    only = [word for name in CLASSES for word in ("--only", name)]
    command = [sys.executable, ROOT / "tests" / "faults.py", "--seed", "1", "--count", "1", "--jobs", "1", *only]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    last = result.stdout.strip().splitlines()[-1:]
    match = re.fullmatch(r"(\d+) faults injected, 0 lost, 0 silent, 0 tracebacks", *last)
    assert match and int(match[1]) >= 40 and result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
