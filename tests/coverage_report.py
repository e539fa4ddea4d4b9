# SPDX-License-Identifier: Apache-2.0
"""Lines of the scripts that the tests run, from the file of `coverage json`. A shared section, or a function that is
marked as a copy, stands in several scripts. It counts once: a line is covered if the tests run it in any of them."""

import json
import sys
from collections import defaultdict
from pathlib import Path

from test_copies import MARK, definitions, marks, read_scripts, sections


def places(scripts: dict[str, list[str]]) -> dict[tuple[str, int], tuple]:
    """(script, line number) → what the line is: in shared code its section or original, and its place there."""
    found, originals = {}, {}
    for script, lines in scripts.items():
        for section, _, where in sections(lines):
            found |= {(script, i + 1): (f"section {section}", i - where.start) for i in range(where.start, where.stop)}
        for number in marks(lines):
            _, where = next((name, where) for name, where in definitions(lines) if where.start == number + 1)
            home, original = MARK.fullmatch(lines[number]).groups()[:2]
            originals[home, original] = f"{home}.{original}"
            found |= {(script, i + 1): (f"{home}.{original}", i - where.start) for i in range(where.start, where.stop)}
    for (home, original), label in originals.items():
        where = next(where for name, where in definitions(scripts[home]) if name == original)
        found |= {(home, i + 1): (label, i - where.start) for i in range(where.start, where.stop)}
    return found


def main(file: str) -> None:
    root = Path(__file__).resolve().parent.parent
    scripts, report = read_scripts(root), json.loads(Path(file).read_text())["files"]
    shared, covered, first = places(scripts), defaultdict(bool), {}
    for script in scripts:
        part = report[f"{script}.py"]
        for name, known in (("executed_lines", True), ("missing_lines", False)):
            for line in part[name]:
                place = shared.get((script, line), (f"{script}.py", line))
                covered[place] |= known
                first.setdefault(place, (script, line))
    parts = defaultdict(list)
    for place, known in covered.items():
        script, line = first[place]
        parts[place[0] if place[0].startswith("section ") else f"{script}.py"].append((line, known, script))
    for name, lines in sorted(parts.items()):
        missing = sorted(line for line, known, _ in lines if not known)
        where = f" ({lines[0][2]}.py)" if name.startswith("section ") else ""
        share = 1 - len(missing) / len(lines)
        print(f"{name}{where}: {share:.1%} of {len(lines)}; not run: {', '.join(map(str, missing)) or 'none'}")
    print(f"{sum(covered.values()) / len(covered):.1%} of {len(covered)} lines")


if __name__ == "__main__":
    main(sys.argv[1])
