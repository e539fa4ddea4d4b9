# SPDX-License-Identifier: Apache-2.0
"""Every command that the README, a recipe or a script's docstring shows must parse."""

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run


SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py"))]
COMMAND = re.compile(r"^(?:accelerate launch|python|torchrun|uv run|hf jobs uv run)\b.*?\b(\w+)\.py\b(.*)$")


def commands() -> list[tuple[str, str]]:
    """(where, command on one line) of every command of a script of ours."""
    found = []
    texts = {"README.md": "\n".join(re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S))}
    for name in SCRIPTS:
        texts[f"{name}.py"] = importlib.import_module(name).__doc__
    for path in sorted((ROOT / "recipes").glob("*.yaml")) + sorted((ROOT / "shapes").glob("*.yaml")):
        texts[str(path.relative_to(ROOT))] = re.sub(r"^# ?", "", path.read_text(), flags=re.M)
    for where, text in texts.items():
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            match = COMMAND.match(line.strip())
            if match and match.group(1) in SCRIPTS:
                found.append((where, line.strip()))
    return found


@pytest.mark.parametrize("where, command", commands(), ids=lambda value: value[:70])
def test_command_parses(where, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, flags = COMMAND.match(command).groups()
    flags = shlex.split(flags.replace("...", ""), comments=True)
    module = importlib.import_module(script)
    args = module.parse_arguments(flags)
    for flag in ("generators", "prompts"):
        file = getattr(args, flag, None)
        if isinstance(file, str) and file.startswith(("recipes/", "shapes/")):
            assert Path(file).exists(), f"{where}: {file}"


def test_there_are_commands_to_check():
    assert {"README.md", *(f"{name}.py" for name in SCRIPTS)} <= {where for where, _ in commands()}


def test_recipes_parse():
    import yaml

    import build_synpic

    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        if isinstance(content, list):
            build_synpic.read_generators(str(path))
        else:
            script = path.stem.split("_")[0]
            assert script in ("rankdpo", "qsd", "synpic", "evaluate"), path.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag_with_its_help(script):
    text = run(f"{script}.py", "--help").stdout
    fields = importlib.import_module(script).ScriptArguments.__dataclass_fields__
    for name, spec in fields.items():
        assert f"--{name}" in text and spec.metadata["help"]


# What a script's own imports use without its being imported by name, and `uv run` must install all the same.
USED_BY = {
    "tensorboard": "accelerate",  # --report_to tensorboard, the default
    "protobuf": "transformers",  # T5's tokenizer
    "sentencepiece": "transformers",  # T5's tokenizer
    "peft": "diffusers",  # load_lora_weights
}
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_header_names_exactly_what_the_script_imports(script):
    """The PEP 723 header: what the script imports, and what that needs for what the script does; no more."""
    text = (ROOT / f"{script}.py").read_text()
    header = re.findall(r'^#     "([\w.-]+)"', text, re.M)
    assert header == sorted(set(header))
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    packages = {DISTRIBUTIONS.get(name, name) for name in imported - sys.stdlib_module_names}
    more = set(header) - packages
    assert packages <= set(header), packages - set(header)
    assert all(USED_BY.get(name) in packages for name in more), more - USED_BY.keys()
    required = set(re.findall(r"^([\w.-]+)", (ROOT / "requirements.txt").read_text(), re.M))
    assert set(header) <= required, set(header) - required
