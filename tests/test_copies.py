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
LIMITS = {"train_": 1500, "build_synpic": 1850, "user_study": 1500, "score_pairs": 1755, "evaluate": 2208}

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
        start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        else:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else []
        found += [(name, slice(start, node.end_lineno)) for name in names]
    return found


def is_marked(lines: Lines, where: slice) -> bool:
    return where.start > 0 and lines[where.start - 1].startswith("# Copied from")


def section_at_home(scripts: Scripts, name: str, home: str) -> Lines | None:
    """The section's lines in its home; None if the home does not hold it."""
    lines = scripts.get(home, [])
    return next((lines[where] for other, _, where in sections(lines) if other == name), None)


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


def marks(lines: Lines) -> list[int]:
    return [number for number, line in enumerate(lines) if line.startswith("# Copied from")]


def check_sections(scripts: Scripts) -> list[str]:
    """Copies that differ, homes without the section, banners misspelt or written twice."""
    wrong = []
    for script, lines in scripts.items():
        found = sections(lines)
        for i, (name, home, where) in enumerate(found):
            place, wanted = f"{script}.py:{where.start + 1}: section `{name}`", section_at_home(scripts, name, home)
            if name in (other for other, _, _ in found[:i]):
                wrong.append(f"{place} stands in this script twice")
            if wanted is None:
                wrong.append(f"{place}: {home}.py does not hold it")
            elif lines[where] != wanted:
                wrong.append(f"{place} differs from {home}.py: run make fix-copies")
        titles = {where.start + 1 for _, _, where in found}
        for number, line in enumerate(lines):
            if re.match(r"#(\W*shared:|.*fix-copies)", line, re.I) and number not in titles:
                wrong.append(f"{script}.py:{number + 1}: the banner of a shared section is misspelt: {line}")
    return wrong


def check_marks(scripts: Scripts) -> list[str]:
    wrong = []
    for script, lines in scripts.items():
        for number in marks(lines):
            copy = marked_copy(scripts, script, number)
            if isinstance(copy, str):
                wrong.append(f"{script}.py:{number + 1}: {copy}")
            elif lines[copy[0]] != copy[1]:
                wrong.append(f"{script}.py:{number + 1}: differs from its original: run make fix-copies")
    return wrong


def check_definitions(scripts: Scripts) -> list[str]:
    """Definitions of a section that another script holds outside it: the banner is missing.

    A script without the section may define the same name in its own way. A script with the section may not.
    """
    wrong = []
    homes = {(name, home) for lines in scripts.values() for name, home, _ in sections(lines)}
    for section, home in sorted(homes):
        block = section_at_home(scripts, section, home) or []
        shared = {name: block[where] for name, where in definitions(block) if not is_marked(block, where)}
        for script, lines in scripts.items():
            own = next((where for name, _, where in sections(lines) if name == section), None)
            for name, where in definitions(lines):
                inside = own is not None and own.start <= where.start < own.stop
                if name in shared and not inside and not is_marked(lines, where):
                    if own is not None or lines[where] == shared[name]:
                        place = f"{script}.py:{where.start + 1}: {name}"
                        wrong.append(f"{place} belongs to section `{section}` of {home}.py; is a banner missing?")
    return wrong


def own_lines(lines: Lines) -> list[tuple[int, str]]:
    """(line number, text) outside sections and marks, without blank lines, imports, comments and lone brackets."""
    dropped = {number for _, _, where in sections(lines) for number in range(where.start, where.stop)}
    for node in parse("\n".join(lines)).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            dropped |= set(range(node.lineno - 1, node.end_lineno))
    for _, where in definitions(lines):
        if is_marked(lines, where):
            dropped |= set(range(where.start, where.stop))
    texts = [(number + 1, line.strip()) for number, line in enumerate(lines) if number not in dropped]
    return [(number, text) for number, text in texts if len(text) > 2 and not text.startswith("#")]


def repetitions(a: list[tuple[int, str]], b: list[tuple[int, str]]) -> list[tuple[int, int, int]]:
    """(line in a, line in b, length) of every run of RUN or more equal lines."""
    windows = {}
    for j in range(len(b) - RUN + 1):
        windows.setdefault(tuple(text for _, text in b[j : j + RUN]), j)
    found, i = [], 0
    while i <= len(a) - RUN:
        j, length = windows.get(tuple(text for _, text in a[i : i + RUN])), RUN
        if j is None:
            i += 1
            continue
        while i + length < len(a) and j + length < len(b) and a[i + length][1] == b[j + length][1]:
            length += 1
        found.append((a[i][0], b[j][0], length))
        i += length
    return found


def check_repetitions(scripts: Scripts) -> list[str]:
    own = {script: own_lines(lines) for script, lines in scripts.items()}
    return [
        f"{b}.py:{i} and {a}.py:{j}: {length} equal lines; put them into a shared section"
        for a in own
        for b in own
        if a < b
        for i, j, length in repetitions(own[b], own[a])
    ]


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


CHECKS = (check_sections, check_marks, check_definitions, check_repetitions, check_method_first, check_length)


def check(folder: Path) -> list[str]:
    """All that is wrong, a line each."""
    scripts = read_scripts(folder)
    return [line for function in CHECKS for line in function(scripts)]


def fix(folder: Path) -> list[str]:
    """Writes sections and marked copies from their homes; returns the files that it wrote."""
    scripts, before = read_scripts(folder), read_scripts(folder)
    for _ in range(4):  # a mark may stand in a section, and its original may be a copy itself
        for lines in scripts.values():
            for name, home, where in reversed(sections(lines)):  # from the end, so that the lines above stay in place
                lines[where] = section_at_home(scripts, name, home) or lines[where]
        for script, lines in scripts.items():
            for number in reversed(marks(lines)):
                copy = marked_copy(scripts, script, number)
                if not isinstance(copy, str):
                    lines[copy[0]] = copy[1]
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
OWN = f"""{RULE}
# Model
{RULE}


def {{}}():
    pass
"""
FIRST = f"import json\n\n\ndef rank(scores):\n    return sorted(scores)\n\n\n{FILES}"
SECOND = f"import json\n\n\ndef own():\n    return 1\n\n\n{TRAINER}\n\n{FILES}\n\n{OWN.format('a')}"
THIRD = f"""import json


# Copied from first.rank with rank->order, scores->values
def order(values):
    return sorted(values)


{FILES}


{TRAINER}"""
FOURTH = f"import json\n\n\n{TRAINER}\n\n{FILES}"
LINES = "".join(f"    value_{i} = compute({i})\n" for i in range(8))


@pytest.fixture
def folder(tmp_path):
    for name, text in {"first": FIRST, "second": SECOND, "third": THIRD, "fourth": FOURTH}.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert not check(tmp_path)
    return tmp_path


def edit(folder: Path, script: str, old: str, new: str, count: int = 1) -> None:
    file = folder / f"{script}.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, count))


BANNER_OF_FILES = FILES[: FILES.index("\n\n\n")]
OUTSIDE = ["SUFFIX belongs to section `files`", "write belongs to section `files`"]
# script, what is replaced by what there, words of each complaint
BROKEN = {
    "line changed": ("second", "write_text(text)", "write_text(str(text))", ["second.py:22: section `files` differs"]),
    "line added at the end": ("third", "scores)\n", "scores)\nX = 1\n", ["section `trainer` differs"]),
    "comment changed": ("second", '".tmp"', '".tmp"  # new', ["section `files` differs"]),
    "line changed at home": ("first", "path.write_text", "path.write", ["second.py", "third.py", "fourth.py"]),
    "no banner": ("third", BANNER_OF_FILES, "", OUTSIDE),
    "no banner after another section": ("fourth", BANNER_OF_FILES, "", ["section `trainer` differs", *OUTSIDE]),
    "title misspelt": ("third", "# Shared: files", "# shared: files", ["is misspelt", *OUTSIDE]),
    "title without the file": ("third", "# Shared: files (first.py; ", "# Shared: files (", ["is misspelt", *OUTSIDE]),
    "short rule": ("third", RULE, RULE[:-1], ["is misspelt", *OUTSIDE]),
    "other home": ("third", "files (first.py", "files (second.py", ["section `files` differs from second.py"]),
    "unknown home": ("third", "files (first.py", "files (fifth.py", ["fifth.py does not hold it"]),
    "not at home": ("first", FILES, "", ["first.py does not hold it"] * 3),
    "twice": ("third", TRAINER, f"{TRAINER}\n\n{FILES}", ["stands in this script twice", *OUTSIDE]),
    "defined again": ("second", "def own():", "def write():", ["write belongs to section `files`"]),
    "marked copy changed": ("third", "sorted(values)", "values", ["third.py:4: differs from its original"]),
    "original changed": ("first", "sorted(scores)", "scores", ["second.py", "third.py:4", "third.py", "fourth.py"]),
    "mark misspelt": ("third", "first.rank with", "first.rank", ["the mark must read"]),
    "mark of nothing": ("third", "first.rank w", "first.best w", ["first.py defines no best"]),
    "mark over nothing": ("third", "def order", "\n\ndef order", ["no top-level definition under the mark"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_checker_sees(folder, name):
    script, old, new, complaints = BROKEN[name]
    edit(folder, script, old, new)
    wrong = check(folder)
    assert len(wrong) == len(complaints), wrong
    assert all(any(words in line for line in wrong) for words in complaints), wrong


@pytest.mark.parametrize("length, repeated", [(7, False), (8, True)])
def test_runs_of_eight_equal_lines_are_repetitions(folder, length, repeated):
    """Blank lines, comments, imports and lone brackets do not count; indentation does not either."""
    lines = LINES.splitlines(keepends=True)[:length]
    edit(folder, "first", "import json\n", "import json\n\n\ndef f(\n):\n" + "\n    # Why\n".join(lines))
    edit(
        folder,
        "second",
        "import json\n",
        "import json\n\n\ndef g():\n" + "".join(f"    {line}" for line in ["if 1:\n", *lines]),
    )
    wrong = check(folder)
    assert [f"{length} equal lines" in line for line in wrong] == [True] * repeated, wrong


def test_fix_restores(folder):
    good = {path: path.read_text() for path in folder.iterdir()}
    edit(folder, "second", "write_text(text)", "write_text(str(text))")
    edit(folder, "third", "return sorted(values)", "return values")
    edit(folder, "third", "return sorted(scores)", "x = 1\n    return scores")
    edit(folder, "third", "return range(n)", "return n")
    assert len(check(folder)) == 4
    assert fix(folder) == ["second.py: rewritten", "third.py: rewritten"]
    assert {path: path.read_text() for path in folder.iterdir()} == good and not fix(folder)


def test_fix_carries_changes_through_marks_and_sections(folder):
    """A copy of a copy, a marked copy inside a section, and two sections of one script that grow."""
    edit(folder, "first", "import json\n", "import json\n\n\n# Copied from third.order\ndef order():\n    pass\n")
    edit(folder, "first", "return sorted(scores)", "scores = list(scores)\n    return sorted(scores)")
    edit(folder, "first", 'SUFFIX = ".tmp"', 'SUFFIX = ".part"\nPREFIX = "."')
    edit(folder, "second", "return range(n)", "n += 1\n    return range(n)")
    assert check(folder)
    fix(folder)
    assert not check(folder)
    texts = {path.stem: path.read_text() for path in folder.iterdir()}
    assert all("values = list(values)" in texts[script] for script in ("first", "third"))
    assert all("scores = list(scores)" in texts[script] for script in ("second", "third", "fourth"))
    assert all('SUFFIX = ".part"\nPREFIX = "."' in text for text in texts.values())
    assert all("n += 1" in texts[script] for script in ("third", "fourth"))
    assert "def own():\n    return 1\n" in texts["second"] and OWN.format("a") in texts["second"]


def test_sections_marks_and_imports_are_no_repetitions(folder):
    imports = "from json import (\n" + "".join(f"    name_{i},\n" for i in range(9)) + ")\n"
    for script in ("first", "second"):
        edit(folder, script, "import json\n", imports)
    edit(folder, "first", "def rank(scores):\n", f"def rank(scores):\n{LINES}")
    edit(folder, "first", "def write(path, text):\n", f"def write(path, text):\n{LINES}")
    fix(folder)
    assert not check(folder)


def test_main_tells_by_its_exit_code(folder, capsys):
    assert main([], folder) == 0 and not capsys.readouterr().out
    edit(folder, "second", "write_text(text)", "write_text(str(text))")
    assert main([], folder) == 1 and "second.py" in capsys.readouterr().out
    assert main(["--fix"], folder) == 0 and "second.py: rewritten" in capsys.readouterr().out
    assert main([], folder) == 0


@pytest.mark.parametrize("objective, start, length, complaints", [
    ("rankdpo_loss", 230, 197, 0), ("pair_loss", 231, 150, 1), ("pair_loss", 230, 198, 1), ("loss", 9, 9, 1),
    ("pair_loss", 9, 1500, 2),
])  # fmt: skip
def test_trainers_have_the_method_first(folder, objective, start, length, complaints):
    loop = "for step in range(first, args.max_train_steps):\n" + "    step\n" * length
    text = "\n" * (start - 1) + f"def {objective}():\n    pass\n\n{loop}"
    (folder / "train_small.py").write_text(text)
    wrong = check(folder)
    assert len(wrong) == complaints and all("train_small.py: the" in line for line in wrong), wrong


def main(arguments: list[str], folder: Path = ROOT) -> int:
    lines = fix(folder) if "--fix" in arguments else check(folder)
    print("\n".join(lines), end="\n" * bool(lines))
    return 0 if "--fix" in arguments else int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
