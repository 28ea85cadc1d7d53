"""House style as a test: sizes, docstrings, words, links. Each rule says what to do instead.

It reads the files of the tree and imports none of them.
"""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("src", "tests", "bench", "scripts")
FUNCTION_LINES_MAX = 70
MODULE_LINES_MAX = 600
FILE_BYTES_MAX = 1 << 20
SELF = "tests/test_tidy.py"
GLOSSARY = "docs/glossary.md"

# Anywhere in a name that we define.
BANNED_IN_NAMES = {
    "helper": "say what it does",
    "helpers": "say what it does",
    "manager": "say what it does",
    "util": "put it beside its only caller, or name the module after the thing",
    "utils": "put it beside its only caller, or name the module after the thing",
    "worker": "a node, an engine, an agent or a dispatcher",
    "tenant": "an account",
    "lane": "a queue, or a GPU's row",
}
# In names of classes and modules; a function's argument may be called what a library calls it.
BANNED_IN_CLASSES = {"handler": "say what it does with what", "common": "name the module after the thing"}
# Anywhere in the text of the tree, whole words.
BANNED_IN_TEXT = {
    r"FIXME|XXX|TODO|HACK": "do it now, or write an issue",
    r"[Ll]anes?|[Tt]enants?": "see docs/glossary.md",
    r"pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)": "name the package alone",
    r"deb\.debian\.org|archive\.ubuntu\.com": "name the package alone",
}
# Paths that exist on one machine only.
BANNED_PATHS = re.compile(r"(?<![\w./-])/(?:work|root|home/\w+)/")


@cache
def files() -> tuple[Path, ...]:
    """Returns the tracked and the new files of the tree, relative to its root."""
    git = shutil.which("git") or "false"
    command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        found = [Path(name) for name in listed.stdout.split("\0") if name]
    else:  # an unpacked archive, which has no generated files yet beside caches
        found = [
            path.relative_to(ROOT)
            for path in ROOT.rglob("*")
            if not path.relative_to(ROOT).parts[0].startswith(".")
        ]
    return tuple(sorted(path for path in set(found) if (ROOT / path).is_file()))


def modules(*folders: str) -> list[Path]:
    return [path for path in files() if path.suffix == ".py" and path.parts[0] in (folders or CODE)]


@cache
def text_of(path: Path) -> str:
    try:
        return (ROOT / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(text_of(path), str(path))


def test_every_module_says_what_it_is_for() -> None:
    silent = [str(p) for p in modules() if text_of(p).strip() and ast.get_docstring(tree_of(p)) is None]
    empty = [str(p) for p in modules("src") if not text_of(p).strip()]
    assert silent + empty == [], "a module starts with 1-6 lines: what it is for, what it must never do"


def test_functions_and_modules_are_short() -> None:
    found = [f"{p}: {n} lines" for p in modules() if (n := len(text_of(p).splitlines())) > MODULE_LINES_MAX]
    for path in modules():
        for node in ast.walk(tree_of(path)):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and (n := length(node)) > FUNCTION_LINES_MAX
            ):
                found.append(f"{path}:{node.lineno}: {node.name} has {n} lines")
    assert found == []


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Returns the lines of a function, its docstring and decorators not counted."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= (function.body[0].end_lineno or 0) - function.body[0].lineno + 1
    return lines


def test_names_are_those_of_the_glossary() -> None:
    found: list[str] = []
    for path in modules():
        for line, name, is_class in defined_names(path):
            banned = BANNED_IN_NAMES | (BANNED_IN_CLASSES if is_class else {})
            found += [f"{path}:{line}: {name}: {banned[part]}" for part in words(name) if part in banned]
    assert found == []


def defined_names(path: Path) -> Iterator[tuple[int, str, bool]]:
    yield 1, path.stem, True
    for node in ast.walk(tree_of(path)):
        match node:
            case ast.ClassDef():
                yield node.lineno, node.name, True
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node.lineno, node.name, False
            case ast.arg():
                yield node.lineno, node.arg, False
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id, False
            case _:
                pass


def words(name: str) -> list[str]:
    """Splits snake_case and CamelCase."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")


@pytest.mark.parametrize("pattern", BANNED_IN_TEXT)
def test_text_is_free_of(pattern: str) -> None:
    word = re.compile(rf"\b(?:{pattern})\b")
    assert matches(word) == [], BANNED_IN_TEXT[pattern]


def test_no_path_of_one_machine() -> None:
    assert matches(BANNED_PATHS) == [], "use a path from the repository's root, or tmp_path"


def matches(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path}:{number}: {line.strip()[:120]}"
        for path in files()
        if str(path) not in {SELF, GLOSSARY} and "data" not in path.parts
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if pattern.search(line)
    ]


def test_links_in_documents_lead_somewhere() -> None:
    link = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
    broken = [
        f"{path}: {target}"
        for path in files()
        if path.suffix == ".md"
        for target in link.findall(re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL))
        if not re.match(r"[a-z]+:|#", target) and not (ROOT / path.parent / target.split("#")[0]).exists()
    ]
    assert broken == []


def test_decisions_are_all_in_the_index() -> None:
    index = text_of(Path("docs/decisions/README.md"))
    missing = [p.name for p in files() if p.match("docs/decisions/0*.md") and f"({p.name})" not in index]
    assert missing == []


def test_every_dependency_has_its_reason() -> None:
    reasons = text_of(Path("docs/decisions/0002-dependencies.md"))
    project = re.search(
        r"^dependencies = \[(.*?)^\]", text_of(Path("pyproject.toml")), re.DOTALL | re.MULTILINE
    )
    extras = re.search(
        r"^\[project.optional-dependencies\]\n(.*?)^\[",
        text_of(Path("pyproject.toml")),
        re.DOTALL | re.MULTILINE,
    )
    assert project
    assert extras
    names = re.findall(r'"([a-zA-Z0-9-]+)(?:\[\w+\])?[>=]', project[1] + extras[1])
    assert [name for name in names if f"| {name} |" not in reasons] == []


def test_changelog_starts_with_what_is_not_released() -> None:
    headings = re.findall(r"^## (.*)$", text_of(Path("CHANGELOG.md")), re.MULTILINE)
    assert headings[0] == "Unreleased"


def test_no_file_is_large() -> None:
    assert [str(p) for p in files() if (ROOT / p).stat().st_size > FILE_BYTES_MAX] == []
