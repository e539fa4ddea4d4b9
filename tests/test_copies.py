# SPDX-License-Identifier: Apache-2.0
"""Code that several standalone scripts need is copied under `# Copied from SCRIPT.NAME [with OLD->NEW, OLD->NEW]`.

A test fails where a copy differs from its original; `make fix-copies` rewrites the copies.
"""

import ast
import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"^# Copied from (\w+)\.(\w+)(?: with (\S+->\S+(?:, \S+->\S+)*))?$")


def definition(text: str, name: str | None = None, line: int | None = None) -> tuple[int, int]:
    """First and last line (from 0, end exclusive) of the top-level definition or assignment named, or at a line."""
    for node in ast.parse(text).body:
        names = [getattr(node, "name", None)]
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
        if name in names and name is not None or line == first:
            return first, node.end_lineno
    raise LookupError(f"no top-level definition {name or f'under line {line}'}")


def copies() -> list[tuple[Path, int]]:
    """Every mark: (file, line from 0)."""
    return [
        (path, number)
        for path in sorted(ROOT.glob("*.py"))
        for number, line in enumerate(path.read_text().splitlines())
        if line.startswith("# Copied from")
    ]


def expected(path: Path, number: int) -> tuple[list[str], slice]:
    """What should stand under a mark, and where it stands."""
    text = path.read_text()
    script, name, renamed = MARK.match(text.splitlines()[number]).groups()
    original = (ROOT / f"{script}.py").read_text()
    first, last = definition(original, name=name)
    lines = original.splitlines()[first:last]
    for pair in renamed.split(", ") if renamed else []:
        lines = [line.replace(*pair.split("->")) for line in lines]
    return lines, slice(*definition(text, line=number + 1))


@pytest.mark.parametrize("path, number", copies(), ids=lambda value: getattr(value, "name", str(value)))
def test_copy_is_identical(path, number):
    lines, where = expected(path, number)
    assert path.read_text().splitlines()[where] == lines, f"{path.name}:{number + 1}: run `make fix-copies`"


def test_scripts_stand_alone():
    """A top-level script imports no other file of the repository, so that it can be downloaded alone."""
    own = {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {module.split(".")[0] for module in modules} & own, f"{path.name}:{node.lineno}"


def main(fix: bool) -> int:
    wrong = 0
    for path in sorted({path for path, _ in copies()}):
        # From the last to the first, so that the lines of those above stay where they are.
        for number in [number for file, number in reversed(copies()) if file == path]:
            lines, where = expected(path, number)
            text = path.read_text().splitlines()
            if text[where] != lines:
                wrong += 1
                print(f"{path.name}:{number + 1}: {'rewritten' if fix else 'differs: run make fix-copies'}")
                if fix:
                    text[where] = lines
                    path.write_text("\n".join(text) + "\n")
    return 0 if fix else int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(fix="--fix" in sys.argv))
