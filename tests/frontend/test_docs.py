"""The documents name what the program has."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from natsfs import assembly, context, options

DOCS = Path(__file__).parents[2] / "docs"
MAN = DOCS / "man" / "natsfs.1"
COMMANDS = ("mount", "umount", "recover", "demo", "install-helper")


def _roff(text: str) -> str:
    return text.replace("\\", "\\\\").replace("-", "\\-")


def test_configuration_has_the_tables_of_the_program() -> None:
    assert options.markdown() in (DOCS / "configuration.md").read_text()


def test_configuration_names_what_is_not_in_the_tables() -> None:
    text = (DOCS / "configuration.md").read_text()
    for word in (assembly.PASSWORD_VARIABLE, assembly.TOKEN_VARIABLE, *context.UNSUPPORTED):
        assert word in text, word


def test_man_page_names_every_command_and_option() -> None:
    text = MAN.read_text()
    for command in COMMANDS:
        assert f".B {_roff(command)}\n" in text, command
    for row in options.ROWS:
        assert re.search(rf"^\.BR? {re.escape(_roff(row.name))}( |$)", text, re.MULTILINE), row.name
        assert _roff(row.help) in text, row.name
        assert _roff(row.default) in text, row.name


def test_help_names_every_option() -> None:
    text = options.help_text()
    for row in options.ROWS:
        assert f"  {row.usage} " in text, row.name


@pytest.mark.parametrize("program", [["groff", "-man", "-ww", "-Tutf8"], ["mandoc", "-Wwarning"]])
def test_man_page_has_no_faults(program: list[str]) -> None:
    if shutil.which(program[0]) is None:
        return  # either formatter is enough, and a machine without one is no reason to fail
    done = subprocess.run([*program, MAN], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_statement_of_the_semantics_has_a_test_and_every_test_its_statement() -> None:
    stated = re.findall(r"^- \*\*([a-z0-9-]+)\*\* ", (DOCS / "semantics.md").read_text(), re.MULTILINE)
    assert len(stated) == len(set(stated)), "a statement stands twice"
    shown: set[str] = set()
    for path in (DOCS.parent / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.semantics":
                shown |= {str(ast.literal_eval(argument)) for argument in node.args}
    assert set(stated) - shown == set(), "statements without a test"
    assert shown - set(stated) == set(), "tests of statements that are not there"
