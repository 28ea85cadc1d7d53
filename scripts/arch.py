"""Draws the layers of the package from the import contracts and checks every import against them.

Reads pyproject.toml and src/ of the current folder, so that a test can point it at a copy. Changes nothing.

    python scripts/arch.py [--check]        --check leaves the drawing out
"""

import sys
import tomllib
from pathlib import Path

from importlinter.cli import lint_imports

WIDTH = 72
SEPARATORS = "|:"


def main() -> int:
    if "--check" not in sys.argv[1:]:
        print(drawing(layers(Path("pyproject.toml"), contract_id="layers"), Path("src/gpulane")))
    return lint_imports(no_logo=True, no_cache=True)


def layers(pyproject: Path, *, contract_id: str) -> list[list[str]]:
    """Returns the modules of each layer, the highest first."""
    contracts = tomllib.loads(pyproject.read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = [each for each in contracts if each["id"] == contract_id]
    return [names(line) for line in contract["layers"]]


def names(layer: str) -> list[str]:
    for separator in SEPARATORS:
        layer = layer.replace(separator, " ")
    return [name.strip("()") for name in layer.split()]


def drawing(stack: list[list[str]], package: Path) -> str:
    """One box per layer; each names its modules that exist, with their files and lines."""
    edge = "+" + "-" * WIDTH + "+"
    rows = [[size(package, name) for name in layer if exists(package, name)] for layer in stack]
    boxes = [edge + "\n" + "\n".join(f"| {cell:<{WIDTH - 2}} |" for cell in row) for row in rows if row]
    return "\n".join(
        [*boxes, edge, "Imports point down only; modules in one box do not import each other.", ""]
    )


def exists(package: Path, name: str) -> bool:
    return (package / name / "__init__.py").exists() or (package / f"{name}.py").exists()


def size(package: Path, name: str) -> str:
    folder = package / name
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [package / f"{name}.py"]
    lines = sum(len(file.read_text().splitlines()) for file in files)
    return f"{name:<14} {len(files):>3} files {lines:>6} lines   {first_sentence(files[0], folder)}".rstrip()


def first_sentence(first: Path, folder: Path) -> str:
    """Returns the start of the docstring that says what the module is for."""
    text = (folder / "__init__.py" if folder.is_dir() else first).read_text().lstrip()
    if not text.startswith('"""'):
        return ""
    sentence = text.removeprefix('"""').split("\n", 1)[0].split('"""')[0]
    room = WIDTH - 2 - 37
    return sentence if len(sentence) <= room else sentence[: room - 3].rstrip() + "..."


if __name__ == "__main__":
    sys.exit(main())
