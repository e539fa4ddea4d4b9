# SPDX-License-Identifier: Apache-2.0
"""A seeded share of `make test-faults`: one case of each kind but malformed inputs, which have tests of their own."""

import re
import subprocess
import sys

from conftest import ROOT


CLASSES = (
    *(
        "kill/build",
        "kill/sdxl",
        "kill/evaluate",
        "kill-finish/qsd",
        "sigterm/sdxl",
        "sigint/build",
        "two-signals/pairs",
    ),
    *("corrupt-finished/", "corrupt-middle/", "missing-data-file", "file-too-large/sdxl"),
    *("disk-full/build", "disk-full/qsd", "read-only/sd3", "write-fails/sdxl", "write-fails/evaluate"),
    *("two-writers/build", "two-writers/qsd", "shared-cache/sdxl", "extended/sdxl"),
    *("replaced-model/sdxl", "replaced-images/sdxl", "card-latin-1/pairs", "reward-breaks-midway/build"),
)


def test_faults_lose_nothing():
    """Each of these once: nothing lost, nothing silently wrong, no traceback."""
    only = [word for name in CLASSES for word in ("--only", name)]
    command = [sys.executable, ROOT / "tests" / "faults.py", "--seed", "1", "--count", "1", "--jobs", "1", *only]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    last = result.stdout.strip().splitlines()[-1:]
    match = re.fullmatch(r"(\d+) faults injected, 0 lost, 0 silent, 0 tracebacks", *last)
    assert match and int(match[1]) >= 25 and result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
