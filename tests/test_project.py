"""The project as a whole: its front page, its links, its generated pages, its floors and the size of its files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from lockstep_isa import reference

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
#: Package -> its folder, and the packages that it may import.
FLOORS = {
    "lockstep_isa": ("isa", set()),
    "lockstep_rtl": ("rtl", {"lockstep_isa"}),
    "lockstep_hls": ("hls", {"lockstep_isa"}),
    "lockstep_sim": ("sim", {"lockstep_isa", "lockstep_rtl", "lockstep_hls"}),
    "lockstep_driver": ("driver", {"lockstep_isa", "lockstep_rtl", "lockstep_hls", "lockstep_sim"}),
    "lockstep": ("host", {"lockstep_isa", "lockstep_rtl", "lockstep_hls", "lockstep_sim", "lockstep_driver"}),
}
SUFFIXES = {".py", ".hpp", ".cpp", ".v"}
MOST_LINES = 500


def sources(package: str) -> list[Path]:
    folder = ROOT / FLOORS[package][0] / package
    return sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands(text: str) -> list[str]:
    """The lines of all code blocks without a language."""
    return [line for block in re.findall(r"^```\n(.*?)^```$", text, re.S | re.M) for line in block.splitlines()]


def test_the_readme_gives_one_command_to_run_and_one_to_test() -> None:
    found = [line for line in commands((ROOT / "README.md").read_text()) if line.startswith("pip install")]
    assert found == [
        'pip install -e ".[demo]" && lockstep demo',
        'pip install -e ".[test]" && python -m pytest',
    ]


def test_continuous_integration_runs_the_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    (command,) = (line for line in commands((ROOT / "README.md").read_text()) if line.endswith("pytest"))
    steps = command.split(" && ")
    assert [line for line in script if line in steps] == steps
    assert script[-1] == steps[-1], "the summary of the tests must be the last thing printed"
    for check in ("ruff check .", "ruff format --check .", "lint-imports", "mypy"):
        assert check in script


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=name)
def test_every_page_is_linked_from_the_readme(page: Path) -> None:
    assert f"({name(page)})" in (ROOT / "README.md").read_text()


def test_reference_pages_are_what_the_tables_say() -> None:
    folder = ROOT / "docs" / "reference"
    assert (folder / "instructions.md").read_text() == reference.instructions_page(), "run: " + REMEDY
    assert (folder / "registers.md").read_text() == reference.registers_page(), "run: " + REMEDY
    errors = (ROOT / "docs" / "errors.md").read_text()
    assert errors == reference.errors_page(errors), "run: " + REMEDY


REMEDY = "PYTHONPATH=isa python -m lockstep_isa.reference"


@pytest.mark.parametrize("package", FLOORS)
def test_no_file_is_longer_than_500_lines(package: str) -> None:
    long = {name(path): n for path in sources(package) if (n := len(path.read_text().splitlines())) > MOST_LINES}
    assert not long


@pytest.mark.parametrize("package", FLOORS)
def test_imports_go_downwards_only(package: str) -> None:
    allowed = FLOORS[package][1] | {package}
    upward = []
    for path in sources(package):
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            else:
                continue
            upward += [f"{name(path)}: {m}" for m in modules if m.split(".")[0] in FLOORS.keys() - allowed]
    assert not upward


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_in_pages_is_python(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M):
        ast.parse(block)
