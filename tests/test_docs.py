"""Every code block of README and docs runs as it stands.

Python blocks are executed, one namespace per page. Shell blocks: each ``rdd`` command must be one
that the command line accepts; ``make`` targets must exist. YAML blocks with students are read as
part of a configuration.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rdd_pipeline.config import parse_config
from tiny import tiny_tree

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [text for language, text in found if language in languages]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    code = "\n".join(blocks(page, "python", "py"))
    script = tmp_path / "page.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{page.name}:\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in blocks(page, "bash", "sh", "console"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["make"]:
                assert words[1] in targets, f"{page.name}: {line}"
            elif words[:1] == ["rdd"]:
                _require_valid_command(words[1:], f"{page.name}: {line}")


def _require_valid_command(words: list[str], where: str) -> None:
    """Walk the command tree; options must be known to the command they are given to."""
    import typer.main

    from rdd_flows.cli import app

    command = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        assert name in command.commands, f"{where}: no command {name}"
        command = command.commands[name]
    known = {flag for parameter in command.params for flag in (*parameter.opts, "--help")}
    for word in rest:
        if word.startswith("-"):
            assert word.partition("=")[0] in known, f"{where}: no option {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_students_in_yaml_blocks_are_valid(page: Path, tmp_path: Path) -> None:
    for text in blocks(page, "yaml"):
        tree = yaml.safe_load(text)
        if "grid" in tree:
            config = parse_config(tiny_tree(tmp_path) | {"students": [], "grid": tree["grid"]})
            grid = tree["grid"]
            size = len(grid.get("networks", [0])) * len(grid["methods"]) * len(grid["seeds"])
            assert len(config.students) == size
        if "students" in tree:
            config = parse_config(tiny_tree(tmp_path) | {"students": tree["students"]})
            assert len(config.students) == len(tree["students"])


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES[1:] if f"docs/{page.name}" not in readme]
    assert not missing


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
