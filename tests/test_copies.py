# SPDX-License-Identifier: Apache-2.0
"""Checks the shape of scripts and metrics: shared sections, marked copies, repeated lines, the method first.

A shared section starts with a banner and runs to the next banner or to the end of the file:

    # --- (118 dashes)
    # Shared: NAME (HOME.py; `make fix-copies` writes it into the other scripts)
    # --- (118 dashes)

Every script that has the section must hold the same lines as the home. A single definition that two scripts share
stands under `# Copied from SCRIPT.NAME`, or `# Copied from SCRIPT.NAME with OLD->NEW` where a name differs.
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
MARK = re.compile(r"# Copied from (\w+)\.(\w+)(?: with (\w+)->(\w+))?")
RUN = 8  # equal lines in a row that count as a repetition
OBJECTIVES = ("rankdpo_loss", "pair_loss")
OBJECTIVE_LIMIT, LOOP_LIMIT = 230, 430  # a trainer's objective starts and its loop ends by these lines
# Lines of the scripts whose names start so.
LIMITS = {"train_": 1500, "build_synpic": 1850, "user_study": 1500, "score_pairs": 1700, "evaluate": 2000}

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
        return "the mark must read `# Copied from SCRIPT.NAME [with OLD->NEW]`"
    where = next((w for _, w in definitions(scripts[script]) if w.start == number + 1), None)
    if where is None:
        return "no top-level definition under the mark"
    home = scripts.get(mark[1], [])
    wanted = next((home[w] for name, w in definitions(home) if name == mark[2]), None)
    if wanted is None:
        return f"{mark[1]}.py defines no {mark[2]}"
    return where, [line.replace(mark[3], mark[4]) for line in wanted] if mark[3] else wanted


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


SECTION = "# Shared: prompts (build_synpic.py; `make fix-copies` writes it into the other scripts)"
MARKED = "# Copied from build_synpic.flag"
# What sees that a line of a script is changed so, and words of its complaint.
BROKEN = [
    (check_copies, "evaluate", "class ArgumentParser(TrlParser):", "class Parser(TrlParser):", "differs from"),
    (check_copies, "build_synpic", "def warn(text: str)", "def warn(text: str, *more)", "user_study.py"),
    (check_copies, "evaluate", SECTION, SECTION.lower(), "is misspelt"),
    (check_copies, "evaluate", SECTION, SECTION.replace("build_synpic", "score_pairs"), "does not hold section"),
    (check_copies, "evaluate", SECTION, SECTION.replace("prompts", "reward models"), "stands here twice"),
    (check_copies, "evaluate", MARKED, f"{MARKED}s", "defines no flags"),
    (check_copies, "evaluate", MARKED, "# Copied from build_synpic", "the mark must read"),
    (check_copies, "evaluate", MARKED, f"{MARKED}\n", "no top-level definition"),
    (check_repetitions, "evaluate", SECTION, "# Prompts", "equal lines in build_synpic.py"),
    (check_repetitions, "train_dpo_qsd", "# Copied from train_rankdpo_sdxl.train\n", "\n", "train_rankdpo_sdxl.py"),
    (check_method_first, "train_rankdpo_sdxl", "def rankdpo_loss(", "def loss(", "the objective starts at []"),
    (check_method_first, "train_dpo_qsd", "\n\n", "\n" * 300, "the loop ends at"),
    (check_length, "build_synpic", "\n\n", "\n" * 1000, "it may have 1850"),
]


@pytest.mark.parametrize("function, script, old, new, words", BROKEN)
def test_each_check_sees_what_it_is_for(function, script, old, new, words):
    scripts = read_scripts(ROOT)
    text = "\n".join(scripts[script])
    assert old in text
    wrong = function({**scripts, script: text.replace(old, new, 1).splitlines()})
    assert any(words in line for line in wrong), wrong


def test_fix_carries_changes_through_marks_and_sections(tmp_path, capsys):
    (tmp_path / "metrics").mkdir()
    for path in script_files(ROOT).values():
        (tmp_path / path.relative_to(ROOT)).write_text(path.read_text())
    home = tmp_path / "build_synpic.py"
    home.write_text(home.read_text().replace("def warn(text: str)", "def warn(text: str, *more)"))
    copies = [tmp_path / f"{name}.py" for name in ("evaluate", "score_pairs", "user_study")]
    assert main([], tmp_path) == 1 and "run make fix-copies" in capsys.readouterr().out
    assert main(["--fix"], tmp_path) == 0
    assert capsys.readouterr().out == "".join(f"{path.name}: rewritten\n" for path in copies)
    assert main([], tmp_path) == 0 and not fix(tmp_path)
    assert all("def warn(text: str, *more)" in path.read_text() for path in copies)


def main(arguments: list[str], folder: Path = ROOT) -> int:
    lines = fix(folder) if "--fix" in arguments else check(folder)
    print("\n".join(lines), end="\n" * bool(lines))
    return 0 if "--fix" in arguments else int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
