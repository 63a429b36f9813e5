"""What the README shows is what there is: every command parses, and every name that its Python imports exists."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

from mbrl import cli

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README.read_text() if README.exists() else "", re.M | re.S)
COMMANDS = [line for kind, text in BLOCKS if not kind for line in text.splitlines() if line.startswith("mbrl ")]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]


def test_there_are_commands_and_python():
    assert len(COMMANDS) > 20
    assert len(PYTHON) > 3


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_parses(line):
    tyro.cli(cli._commands(), args=shlex.split(line, comments=True)[1:], prog="mbrl")


def test_the_learner_that_is_shown_keeps_the_contract(tmp_path, monkeypatch):
    (text,) = (x for x in PYTHON if "check_dynamics(" in x)
    (tmp_path / "shown_in_the_readme.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("shown_in_the_readme")


@pytest.mark.parametrize("text", PYTHON)
def test_what_is_imported_exists(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
