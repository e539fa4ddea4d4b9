# SPDX-License-Identifier: Apache-2.0
"""Checks the shape of scripts and metrics: shared sections, marked copies, repeated lines, the method first.

A shared section starts with a banner and runs to the next banner or to the end of the file:

    # --- (118 dashes)
    # Shared: NAME (HOME.py; `make fix-copies` writes it into the other scripts)
    # --- (118 dashes)

Every script that has the section must hold the same lines as the home. A single definition that two scripts share
stands under `# Copied from SCRIPT.NAME`, or `# Copied from SCRIPT.NAME with OLD->NEW, OLD->NEW` where names differ.
Outside sections and marks, no two scripts may share eight equal lines in a row.

`python tests/test_copies.py` prints what is wrong. `--fix` writes sections and marked copies from their homes.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
RULE = "# " + "-" * 118
BANNER = re.compile(
    rf"{RULE}\n# Shared: (.+) \((\w+)\.py; `make fix-copies` writes it into the other scripts\)\n{RULE}"
)
MARK = re.compile(r"# Copied from (\w+)\.(\w+)(?: with (\S+->\S+(?:, \S+->\S+)*))?")
RUN = 8  # equal lines in a row that count as a repetition
OBJECTIVES = ("rankdpo_loss", "pair_loss")
OBJECTIVE_LIMIT, LOOP_LIMIT = 230, 430  # a trainer's objective starts and its loop ends by these lines
# Lines of the scripts whose names start so.
LIMITS = {"train_": 1500, "build_synpic": 1850, "user_study": 1500, "score_pairs": 1700, "evaluate": 2208}

Lines = list[str]
Scripts = dict[str, Lines]  # script without .py → its lines


def script_files(folder: Path) -> dict[str, Path]:
    """The top-level scripts and the metrics, under their names without .py."""
    return {path.stem: path for path in sorted([*folder.glob("*.py"), *folder.glob("metrics/*.py")])}


def read_scripts(folder: Path) -> Scripts:
    return {name: path.read_text().splitlines() for name, path in script_files(folder).items()}


def sections(lines: Lines) -> list[tuple[str, str, slice]]:
    """(name, home, lines) of every shared section: its banner and all up to the next banner of any kind."""
    rules = [bool(re.match(r"# -{60,}$", line)) for line in lines]
    starts = [i for i in range(len(lines) - 2) if rules[i] and rules[i + 2]]
    found = []
    for start, end in zip(starts, [*starts[1:], len(lines)]):
        if banner := BANNER.fullmatch("\n".join(lines[start : start + 3])):
            while not lines[end - 1].strip():  # blank lines before the next banner are not part of the section
                end -= 1
            found.append((banner[1], banner[2], slice(start, end)))
    return found


@cache
def parse(text: str) -> ast.Module:
    return ast.parse(text)


def definitions(lines: Lines) -> list[tuple[str, slice]]:
    """(name, lines with decorators) of every top-level function, class and assignment."""
    found = []
    for node in parse("\n".join(lines)).body:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        targets = getattr(node, "targets", None) or [getattr(node, "target", node)]
        names = [getattr(target, "id", getattr(target, "name", None)) for target in targets]
        found += [(name, slice(first - 1, node.end_lineno)) for name in names if name]
    return found


def marked_copy(scripts: Scripts, script: str, number: int) -> tuple[slice, Lines] | str:
    """What the mark on a line (counted from 0) covers, and what must stand there; or what is wrong with the mark."""
    mark = MARK.fullmatch(scripts[script][number])
    if not mark:
        return "the mark must read `# Copied from SCRIPT.NAME [with OLD->NEW, ...]`"
    where = next((w for _, w in definitions(scripts[script]) if w.start == number + 1), None)
    if where is None:
        return "no top-level definition under the mark"
    home = scripts.get(mark[1], [])
    wanted = next((home[w] for name, w in definitions(home) if name == mark[2]), None)
    if wanted is None:
        return f"{mark[1]}.py defines no {mark[2]}"
    for rename in mark[3].split(", ") if mark[3] else []:
        wanted = [line.replace(*rename.split("->")) for line in wanted]
    return where, wanted


def copies(scripts: Scripts) -> Iterator[tuple[str, int, tuple[slice, Lines] | str]]:
    """(script, line number, what stands there and what must, or what is wrong) of every section and every mark. From
    the end of a script, so that the lines above stay in place when one is written."""
    for script, lines in scripts.items():
        for name, home, where in reversed(sections(lines)):
            at_home = scripts.get(home, [])
            wanted = [at_home[place] for title, _, place in sections(at_home) if title == name]
            yield script, where.start, (where, wanted[0]) if wanted else f"{home}.py does not hold section `{name}`"
        for number in reversed([number for number, line in enumerate(lines) if line.startswith("# Copied from")]):
            yield script, number, marked_copy(scripts, script, number)


def check_copies(scripts: Scripts) -> list[str]:
    """Copies that differ, homes without the section, marks and banners misspelt, sections written twice."""
    wrong = []
    for script, number, copy in copies(scripts):
        place = f"{script}.py:{number + 1}:"
        if isinstance(copy, str):
            wrong.append(f"{place} {copy}")
        elif scripts[script][copy[0]] != copy[1]:
            wrong.append(f"{place} differs from its original: run make fix-copies")
    for script, lines in scripts.items():
        names = [name for name, _, _ in sections(lines)]
        wrong += [f"{script}.py: section `{name}` stands here twice" for name in {*names} if names.count(name) > 1]
        titles = {where.start + 1 for _, _, where in sections(lines)}
        for number, line in enumerate(lines):
            if re.match(r"#(\W*shared:|.*fix-copies)", line, re.I) and number not in titles:
                wrong.append(f"{script}.py:{number + 1}: the banner of a shared section is misspelt: {line}")
    return wrong


def windows(lines: Lines, shared: bool) -> list[tuple[int, tuple]]:
    """(number of the first one, RUN lines in a row) of all runs, without marked copies; `shared`: with sections. Blank
    lines, imports, comments and lone brackets do not count, nor does indentation."""
    dropped = [slice(node.lineno - 1, node.end_lineno) for node in parse("\n".join(lines)).body if is_import(node)]
    dropped += [where for _, where in definitions(lines) if lines[where.start - 1].startswith("# Copied from")]
    dropped += [where for _, _, where in sections(lines) if not shared]
    left = set(range(len(lines))).difference(*(range(where.start, where.stop) for where in dropped))
    kept = [(number, text) for number in sorted(left) if len(text := lines[number].strip()) > 2 and text[0] != "#"]
    return [(kept[i][0] + 1, tuple(text for _, text in kept[i : i + RUN])) for i in range(len(kept) - RUN + 1)]


def is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def check_repetitions(scripts: Scripts) -> list[str]:
    """Own lines of a script that another one has, too: a section or a mark is missing."""
    wrong, everything = [], {name: {run for _, run in windows(lines, shared=True)} for name, lines in scripts.items()}
    for script, lines in scripts.items():
        own = windows(lines, shared=False)
        for other in scripts.keys() - {script}:
            found = [i for i, (_, run) in enumerate(own) if run in everything[other]]
            starts = [own[i][0] for i in found if i - 1 not in found]
            wrong += [f"{script}.py:{start}: {RUN} or more equal lines in {other}.py" for start in starts]
    return sorted(wrong)


def check_method_first(scripts: Scripts) -> list[str]:
    """In every trainer the objective and the loop stand at the top."""
    wrong = []
    for script in (script for script in scripts if script.startswith("train_")):
        tree = parse("\n".join(scripts[script]))
        objectives = [n.lineno for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in OBJECTIVES]
        loops = [(ast.unparse(n.iter), n.end_lineno) for n in ast.walk(tree) if isinstance(n, ast.For)]
        ends = [end for steps, end in loops if steps.startswith("range(") and "max_train_steps" in steps]
        if not objectives or max(objectives) > OBJECTIVE_LIMIT:
            wrong.append(f"{script}.py: the objective starts at {objectives}; it must by line {OBJECTIVE_LIMIT}")
        if not ends or max(ends) > LOOP_LIMIT:
            wrong.append(f"{script}.py: the loop ends at {ends}; it must by line {LOOP_LIMIT}")
    return wrong


def check_length(scripts: Scripts) -> list[str]:
    return [
        f"{script}.py: the file has {len(lines)} lines; it may have {limit}"
        for script, lines in scripts.items()
        for start, limit in LIMITS.items()
        if script.startswith(start) and len(lines) > limit
    ]


CHECKS = (check_copies, check_repetitions, check_method_first, check_length)


def check(folder: Path) -> list[str]:
    """All that is wrong, a line each."""
    scripts = read_scripts(folder)
    return [line for function in CHECKS for line in function(scripts)]


def fix(folder: Path) -> list[str]:
    """Writes sections and marked copies from their homes; returns the files that it wrote."""
    scripts, before = read_scripts(folder), read_scripts(folder)
    for _ in range(4):  # a mark may stand in a section, and its original may be a copy itself
        for script, _, copy in copies(scripts):
            if not isinstance(copy, str):
                scripts[script][copy[0]] = copy[1]
    written = [script for script in scripts if scripts[script] != before[script]]
    for script in written:
        script_files(folder)[script].write_text("\n".join(scripts[script]) + "\n")
    return [f"{script}.py: rewritten" for script in written]


# ----------------------------------------------------------------------------------------------------------------------
# The scripts of this repository
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", CHECKS, ids=lambda function: function.__name__)
def test_scripts(function):
    wrong = function(read_scripts(ROOT))
    assert not wrong, "\n" + "\n".join(wrong)


def test_scripts_stand_alone():
    """A top-level script imports no other file of the repository, so that it can be downloaded alone."""
    own = {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {module.split(".")[0] for module in modules} & own, f"{path.name}:{node.lineno}"


# ----------------------------------------------------------------------------------------------------------------------
# The checker itself, on small scripts
# ----------------------------------------------------------------------------------------------------------------------


TITLE = "# Shared: {} ({}.py; `make fix-copies` writes it into the other scripts)"
FILES = f"""{RULE}
{TITLE.format("files", "first")}
{RULE}


SUFFIX = ".tmp"


def write(path, text):
    path.write_text(text)
"""
# A section of another home, with a marked copy in it.
TRAINER = f"""{RULE}
{TITLE.format("trainer", "second")}
{RULE}


def steps(n):
    return range(n)


# Copied from first.rank
def rank(scores):
    return sorted(scores)
"""
SCRIPTS = {
    "first": f"import json\n\n\ndef rank(scores):\n    return sorted(scores)\n\n\n{FILES}",
    "second": f"import json\n\n\n{TRAINER}\n\n{FILES}\n\n{RULE}\n# Model\n{RULE}\n\n\ndef own():\n    return 1\n",
    "third": f"""import json


# Copied from first.rank with rank->order, scores->values
def order(values):
    return sorted(values)


{FILES}


{TRAINER}""",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert not check(tmp_path)
    return tmp_path


def edit(folder: Path, script: str, old: str, new: str) -> None:
    file = folder / f"{script}.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))


# script, what is replaced by what there, words of each complaint
BROKEN = [
    ("second", "write_text(text)", "write_text(str(text))", ["second.py:18: differs from its original"]),
    ("first", "path.write_text", "path.write", ["second.py", "third.py"]),
    ("third", "# Shared: files", "# shared: files", ["is misspelt"]),
    ("first", FILES, "", ["first.py does not hold section `files`"] * 2),
    ("third", TRAINER, f"{TRAINER}\n\n{FILES}", ["section `files` stands here twice"]),
    ("third", "sorted(values)", "values", ["third.py:4: differs from its original"]),
    ("third", "first.rank with", "first.rank", ["the mark must read"]),
    ("third", "first.rank w", "first.best w", ["first.py defines no best"]),
    ("third", "def order", "\n\ndef order", ["no top-level definition under the mark"]),
]


def complain(folder: Path, complaints: list[str]) -> None:
    wrong = check(folder)
    assert len(wrong) == len(complaints), wrong
    assert all(any(words in line for line in wrong) for words in complaints), wrong


@pytest.mark.parametrize("script, old, new, complaints", BROKEN)
def test_checker_sees(folder, script, old, new, complaints):
    edit(folder, script, old, new)
    complain(folder, complaints)


@pytest.mark.parametrize("length", [7, 8])
def test_runs_of_eight_equal_lines_are_repetitions(folder, length):
    """Those of two scripts, and those of a section that a script holds without its banner."""
    lines = [f"value_{i} = compute({i})\n" for i in range(length)]
    edit(folder, "first", "import json\n", "import json\n\n\ndef f(\n):\n    " + "\n    # Why\n    ".join(lines))
    edit(folder, "second", "import json\n", "import json\n\n\ndef g():\n" + "".join(f"  {line}" for line in lines))
    complain(folder, ["first.py:6: 8 or more", "second.py:5: 8 or more"] * (length == 8))
    edit(folder, "first", "def f(", f"{RULE}\n{TITLE.format('more', 'first')}\n{RULE}\n\n\ndef f(")
    complain(folder, ["second.py:5: 8 or more"] * (length == 8))


def test_fix_carries_changes_through_marks_and_sections(folder, capsys):
    edit(folder, "first", "return sorted(scores)", "scores = list(scores)\n    return sorted(scores)")
    edit(folder, "first", 'SUFFIX = ".tmp"', 'SUFFIX = ".part"\nPREFIX = "."')
    edit(folder, "second", "return range(n)", "n += 1\n    return range(n)")
    edit(folder, "third", "return range(n)", "return n")
    assert main([], folder) == 1 and "third.py" in capsys.readouterr().out
    assert main(["--fix"], folder) == 0
    assert capsys.readouterr().out == "second.py: rewritten\nthird.py: rewritten\n"
    assert main([], folder) == 0 and not fix(folder)
    texts = {path.stem: path.read_text() for path in folder.iterdir()}
    assert "values = list(values)" in texts["third"] and "n += 1" in texts["third"]
    assert all("scores = list(scores)" in texts[script] for script in ("second", "third"))
    assert all('SUFFIX = ".part"\nPREFIX = "."' in text for text in texts.values())
    assert "def own():\n    return 1\n" in texts["second"]


def main(arguments: list[str], folder: Path = ROOT) -> int:
    lines = fix(folder) if "--fix" in arguments else check(folder)
    print("\n".join(lines), end="\n" * bool(lines))
    return 0 if "--fix" in arguments else int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
