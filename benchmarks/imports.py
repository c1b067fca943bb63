"""Which part of a package imports which? The arrows between rooms and files, against the map.

A room is a folder of a package, or a file directly in it. ARCHITECTURE.md lists rooms, and the
files of each room, in import order: each may import those above it.

    python -m benchmarks.imports
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("solvers", "lben")
_LINE = re.compile(r"^(?P<indent> *)(?P<name>[\w./]+) {2,}\S")


@dataclass(frozen=True)
class Arrow:
    """One file imports another.

    Attributes:
        source, target: dotted names of modules.
    """

    source: str
    target: str

    @property
    def rooms(self) -> tuple[str, str]:
        """The rooms of both."""
        return room(self.source), room(self.target)


def room(module: str) -> str:
    """Return the folder of a package, or the file directly in it, that a module belongs to."""
    return ".".join(module.split(".")[:2])


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return the files of both packages by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def arrows(root: Path = ROOT) -> list[Arrow]:
    """Return every import of one file of the packages by another, also those inside functions."""
    files, found = modules(root), set()
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            targets: list[str] = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                whole = (f"{node.module}.{alias.name}" for alias in node.names)
                targets = [t if t in files else str(node.module) for t in whole]
            found |= {Arrow(name, t) for t in targets if t in files and t != name}
    return sorted(found, key=lambda a: (a.source, a.target))


def order(root: Path = ROOT) -> dict[str, list[str]]:
    """Return the import order of ARCHITECTURE.md: rooms by package, and files by folder."""
    text = (root / "ARCHITECTURE.md").read_text()
    found: dict[str, list[str]] = defaultdict(list)
    above: list[tuple[int, str]] = []
    for block in re.findall(r"```\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            match = _LINE.match(line)
            if match is None:
                continue
            depth, name = len(match["indent"]), match["name"].removesuffix("/").removesuffix(".py")
            while above and above[-1][0] >= depth:
                above.pop()
            parent = above[-1][1] if above else ""
            whole = f"{parent}.{name}" if parent else name
            if parent:
                found[parent].append(whole)
            above.append((depth, whole))
    return dict(found)


def upward(found: list[Arrow], known: dict[str, list[str]]) -> list[Arrow]:
    """Return the arrows that run up: between rooms, or between files of one folder.

    The __init__ of a folder stands below all its files; within a package it is no room.
    """
    wrong = []
    for arrow in found:
        if arrow.source in PACKAGES:
            continue
        if arrow.source.startswith("solvers") and arrow.target.startswith("lben"):
            wrong.append(arrow)
        a, b = arrow.source.split("."), arrow.target.split(".")
        for depth in range(1, min(len(a), len(b))):
            if a[:depth] != b[:depth]:
                break
            folder, one, other = ".".join(a[:depth]), a[depth], b[depth]
            places = known.get(folder, [])
            for file in (one, other):
                if one != other and f"{folder}.{file}" not in places:
                    raise ValueError(
                        f"{folder}.{file} is not on the map: add its line to ARCHITECTURE.md, "
                        "below what it imports"
                    )
            if one != other and places.index(f"{folder}.{other}") > places.index(f"{folder}.{one}"):
                wrong.append(arrow)
    return wrong


def between_rooms(found: list[Arrow], package: str) -> dict[str, set[str]]:
    """Return, by room of a package, the other rooms that it imports; __init__ is no room."""
    result: dict[str, set[str]] = defaultdict(set)
    for arrow in found:
        source, target = arrow.rooms
        inside = source.startswith(f"{package}.") and target.startswith(f"{package}.")
        if inside and source != target:
            result[source].add(target)
    return dict(result)


def main() -> None:
    """Print the arrows."""
    found, known = arrows(), order()
    for package in PACKAGES:
        rooms = between_rooms(found, package)
        print(f"{package}: {sum(map(len, rooms.values()))} arrows between rooms")
        for source in known[package]:
            names = sorted(rooms.get(source, ()), key=known[package].index)
            words = " ".join(name.removeprefix(f"{package}.") for name in names)
            print(f"  {source.removeprefix(f'{package}.'):20} {words}")
    for arrow in upward(found, known):
        print(f"upward: {arrow.source} imports {arrow.target}")


if __name__ == "__main__":
    main()
