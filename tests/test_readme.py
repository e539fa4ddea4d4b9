# SPDX-License-Identifier: Apache-2.0
"""The documents: every command parses, every link leads somewhere, every flag and every logged figure is explained."""

import ast
import dataclasses
import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TRAINERS, call, logged


SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py"))]
METRICS = [path.stem for path in sorted((ROOT / "metrics").glob("*.py"))]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml")) + sorted((ROOT / "shapes").glob("*.yaml"))
COMMAND = re.compile(r"^(?:srun )?(?:accelerate launch|python|torchrun|uv run|hf jobs uv run)\b.*?(\S+)\.py\b(.*)$")


def texts() -> dict[str, str]:
    """Where commands stand: the bash blocks of the pages, the scripts' docstrings, the comments of the recipes."""
    found = {f"{name}.py": importlib.import_module(name).__doc__ for name in SCRIPTS}
    for name in METRICS:
        file = f"metrics/{name}.py"
        found[file] = ast.get_docstring(ast.parse((ROOT / file).read_text()))
    for page in PAGES:
        if page.exists():
            found[str(page.relative_to(ROOT))] = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.S))
    for path in RECIPES:
        found[str(path.relative_to(ROOT))] = re.sub(r"^# ?", "", path.read_text(), flags=re.M)
    return found


def commands() -> list[tuple[str, str]]:
    """(where, command on one line) of every command that runs a Python file."""
    lines = [(where, line) for where, text in texts().items() for line in re.sub(r"\\\n\s*", " ", text).splitlines()]
    return [(where, line.strip()) for where, line in lines if COMMAND.match(line.strip())]


@pytest.mark.parametrize("where, command", commands(), ids=lambda value: value[:70])
def test_command_parses(where, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    file, flags = COMMAND.match(command).groups()
    script = file.rpartition("/")[2]
    if script not in SCRIPTS:
        assert Path(f"{file}.py").exists(), f"{where}: {file}.py"
        return
    if flags.strip() == "--help":
        return
    flags = flags.replace("...", "").replace("$SLURM_ARRAY_TASK_ID", "0")
    args = importlib.import_module(script).parse_arguments(shlex.split(flags, comments=True))
    for flag in ("generators", "prompts"):
        file = getattr(args, flag, None)
        if isinstance(file, str) and file.startswith(("recipes/", "shapes/")):
            assert Path(file).exists(), f"{where}: {file}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_is_used_by_a_command(path):
    """test_command_parses parses it then."""
    import build_synpic

    if isinstance(yaml.safe_load(path.read_text()), list):
        build_synpic.read_generators(str(path))
    name = str(path.relative_to(ROOT))
    makefile = re.sub(r"\\\n\s*", " ", (ROOT / "Makefile").read_text())
    used = [*(command for _, command in commands()), *makefile.splitlines(), *(p.read_text() for p in RECIPES)]
    used.append((ROOT / "shapes" / "reproduce.py").read_text())
    assert any(re.search(rf"(--config|--generators|generators:) {re.escape(name)}\b", line) for line in used)


def test_every_row_of_the_papers_has_its_command():
    """The rows of the tables of results in docs/papers.md, against the comments above its commands."""
    page = (ROOT / "docs" / "papers.md").read_text()
    parts = re.split(r"^## ", page, flags=re.M)
    tables = {part.partition("\n")[0]: part for part in parts if "Table" in part.partition("\n")[0]}
    assert len(tables) == 7
    trained = re.compile(r"^# ([^:(\n]+).*\n(?:accelerate launch|python) (\w+)\.py", re.M)
    for title, part in tables.items():
        rows = re.findall(r"^\| (?!row|-)([^|]+?) \|", part, re.M)
        named = {name.strip(): script for name, script in trained.findall(part)}
        published = {"SDXL", "DPO-SDXL", "MaPO-SDXL", "SPO-SDXL", "SD3-Medium", "RankDPO, SDXL"}
        assert rows and set(rows) - published <= named.keys(), (title, set(rows) - published - named.keys())
        assert all(script.startswith("train_") for script in named.values())


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {(where, target) for where, text in texts().items() for target in re.findall(r"^make ([\w-]+)", text, re.M)}
    assert named and not [(where, target) for where, target in named if target not in targets]


def prose(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What `#...` may follow the page's name: its headings, as GitHub writes them."""
    found = []
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return set(found)


def broken_links(page: Path) -> list[str]:
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", prose(page)) + re.findall(r'(?:src|href)="([^"]+)"', prose(page))
    broken = []
    for link in links:
        if not re.match(r"\w+:", link):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            if not target.exists() or anchor and anchor not in anchors(target):
                broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    assert not broken_links(page)


def test_broken_links_are_found(tmp_path):
    (tmp_path / "page.md").write_text("# One `--flag`, two\n\n# Again\n\n# Again\n")
    good = ["page.md", "page.md#one---flag-two", "page.md#again-1", "#here", "https://h/i"]
    bad = ["pages.md", "page.md#one", "page.md#again-2", "#there"]
    (tmp_path / "index.md").write_text("# Here\n" + " ".join(f"[x]({link})" for link in good + bad))
    assert broken_links(tmp_path / "index.md") == bad


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_the_text_exist(page):
    """A flag between backticks is one of ours, or one of the tools that the documents name."""
    known = {"config", "help", "num_processes", "multi_gpu", "timeout", "env-file", "fix"}
    for script in SCRIPTS:
        known |= importlib.import_module(script).ScriptArguments.__dataclass_fields__.keys()
    spans = " ".join(re.findall(r"`[^`\n]+`", prose(page)))
    assert not set(re.findall(r"(?<!\S)`?--([a-z][\w-]*)", spans)) - known


@pytest.mark.parametrize("script", TRAINERS)
def test_page_explains_every_logged_figure(script, trainer_flags, tmp_path):
    call(script, *trainer_flags(script), "--max_train_steps", 1, "--output_dir", tmp_path / "lora")
    (line,) = logged(tmp_path / "lora")
    assert {"step", "loss", "implicit_accuracy", "margin", "grad_norm", "lr", "images_per_second"} <= line.keys()
    page = (ROOT / "docs" / f"{script}.md").read_text()
    assert not [name for name in line if f"`{name}`" not in page]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_page_name_every_flag(script, capsys):
    module, page = importlib.import_module(script), (ROOT / "docs" / f"{script}.md").read_text()
    with pytest.raises(SystemExit) as stopped:
        module.parse_arguments(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    squeezed = re.sub(r"\s", "", text)  # argparse breaks the lines
    for name, spec in module.ScriptArguments.__dataclass_fields__.items():
        text = re.sub(r"\s", "", spec.metadata["help"]).replace("%%", "%")
        assert f"--{name}" in squeezed and len(text) > 5 and text in squeezed, name
        assert re.search(rf"--{name}(?![\w-])", page), name
        default = spec.default_factory() if callable(spec.default_factory) else spec.default
        if not (default is dataclasses.MISSING or default in (None, [])):
            shown = " ".join(default) if isinstance(default, list | tuple) else str(default)
            assert text.count("Default:" + shown.replace(" ", "")) == 1, name


# What a script's own imports use without its being imported by name, and `uv run` must install all the same.
USED_BY = {
    "tensorboard": "accelerate",  # --report_to tensorboard, the default
    "protobuf": "transformers",  # T5's tokenizer
    "sentencepiece": "transformers",  # T5's tokenizer
    "peft": "diffusers",  # load_lora_weights
    "transformers": "diffusers",  # text encoders
    "scipy": "transformers",  # Mask2Former
}
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}


@pytest.mark.parametrize("script", [*SCRIPTS, *(f"metrics/{name}" for name in METRICS)])
def test_header_names_exactly_what_the_script_imports(script):
    """The PEP 723 header: what the script imports, and what that needs for what the script does; no more."""
    text = (ROOT / f"{script}.py").read_text()
    block = re.search(r"^# /// script\n(.*?)^# ///$", text, re.M | re.S).group(1)
    header = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))["dependencies"]
    assert header == sorted(set(header))
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    imported -= sys.stdlib_module_names | set(METRICS)  # metrics may use each other, and the rewards of the builder
    imported -= {"build_synpic"} if script.startswith("metrics/") else set()
    packages = {DISTRIBUTIONS.get(name, name) for name in imported}
    more = set(header) - packages
    assert packages <= set(header), packages - set(header)
    assert all(USED_BY.get(name) in packages for name in more), more - USED_BY.keys()
    files = ["requirements.txt"] + ["requirements-test.txt"] * (script == "user_study")  # its page: Gradio
    required = {name for file in files for name in re.findall(r"^([\w.-]+)", (ROOT / file).read_text(), re.M)}
    assert set(header) <= required, set(header) - required
