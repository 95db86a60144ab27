"""Checks the layout of the package from its imports: allowed imports, no circles, and no two types of the same name.

docs/design.md draws the same rule. The test reads only the source, and imports nothing of the package.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "engine" / "shorttail"
TEMPLATES = PACKAGE / "templates"  # what `shorttail init` copies: programs of their own, not modules of the package

# Rooms (top-level modules and folders), lowest first. A room imports only rooms on a line above its own.
FLOORS = [
    {"_native", "errors"},
    {"config"},
    {"results", "protocol", "define"},
    {"ondemand", "store", "client", "observe"},
    {"models", "sources"},
    {"pipeline"},
    {"plan"},
    {"registry"},
    {"engine"},
    {"__init__", "loadtest", "server"},
    {"cli"},
    {"__main__"},
]
# The hot path. It never imports a room of BESIDE.
HOT = ["pipeline.py", "plan.py", "server/batcher.py"]
BESIDE = {"sources", "offline", "registry", "web", "replicate"}
OBSERVED_BY_THE_HOT_PATH = {"shorttail.observe.memory", "shorttail.observe.tap"}

LINES_MAX, NODES_MAX, ARROWS_MAX = 500, 22, 102


class Tree:
    """The modules of the package and their imports, also imports in functions and under TYPE_CHECKING.

    changed: path in the package -> text that replaces the file on disk.
    """

    def __init__(self, changed: dict[str, str] | None = None):
        modules = [path for path in sorted(PACKAGE.rglob("*.py")) if TEMPLATES not in path.parents]
        texts = {str(path.relative_to(PACKAGE)): path.read_text() for path in modules} | (changed or {})
        self.files = {self.name(path): text for path, text in texts.items()}
        self.facts = {name: read(text) for name, text in self.files.items()}
        self.imports = {name: set(self._resolved(facts)) - {name} for name, facts in self.facts.items()}

    def name(self, path: str) -> str:
        parts = ("shorttail", *Path(path).with_suffix("").parts)
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def _resolved(self, facts: Facts) -> Iterator[str]:
        """Yield the modules that a file imports. `from shorttail.x import y` gives x.y if that is a module, else x."""
        for module, name in facts.imports:
            yield f"{module}.{name}" if f"{module}.{name}" in self.files else module

    def room(self, module: str) -> str:
        parts = module.split(".")
        return parts[1] if len(parts) > 1 else "__init__"

    def arrows(self) -> dict[tuple[str, str], list[str]]:
        """Return {(room, room that it imports): the imports of modules that make the arrow}."""
        found = defaultdict(list)
        for module, imported in self.imports.items():
            for other in imported:
                if self.room(module) != self.room(other):
                    found[self.room(module), self.room(other)].append(f"{module} imports {other}")
        return found

    def lines(self) -> list[tuple[str, int]]:
        return [(name, len(text.splitlines())) for name, text in self.files.items()]


@dataclass(frozen=True)
class Facts:
    """The facts of a file that the rules need. imports: (module, name or ""), only of this package."""

    imports: list[tuple[str, str]]
    classes: list[str]
    sets: list[tuple[int, str]]  # (line, "Type.attribute") of types of other modules


@cache  # the tests build many trees, which share most files
def read(text: str) -> Facts:
    parsed = ast.parse(text)
    nodes = list(ast.walk(parsed))
    imports = [found for node in nodes for found in imported(node) if found[0].partition(".")[0] == "shorttail"]
    classes = [node.name for node in parsed.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    own = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    others = {name for _, name in imports} - own
    return Facts(imports, classes, [found for function in functions for found in foreign_sets(function, others)])


def imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "a relative import"
        yield from ((str(node.module), alias.name) for alias in node.names)
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
        yield from ((arg.value, "") for arg in node.args if isinstance(arg, ast.Constant))


def foreign_sets(function: ast.FunctionDef | ast.AsyncFunctionDef, others: set[str]) -> Iterator[tuple[int, str]]:
    """Yield assignments to an attribute of another module's type.

    Annotations of arguments and calls of constructors tell the type; other variables are not checked.
    """
    kinds: dict[str, str] = {}
    for argument in [*function.args.args, *function.args.kwonlyargs]:
        kind = getattr(argument.annotation, "id", None)
        if kind in others:
            kinds[argument.arg] = kind
    assigned = [node for node in ast.walk(function) if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign)]
    for node in assigned:
        made = getattr(getattr(node.value, "func", None), "id", "")
        if made in others and made[:1].isupper():
            kinds |= {target.id: made for target in targets(node) if isinstance(target, ast.Name)}
    for node in assigned:
        for target in targets(node):
            if isinstance(target, ast.Attribute) and getattr(target.value, "id", None) in kinds:
                yield target.lineno, f"{kinds[target.value.id]}.{target.attr}"


def targets(node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one node (Tarjan, 1972)."""
    after = defaultdict(set)
    for a, b in edges:
        after[a].add(b)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(after[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in sorted(after):
        if node not in index:
            visit(node)
    return found


def problems(tree: Tree) -> list[str]:
    """Return a line for each violation of a rule of the layout."""
    return [
        *upward(tree),
        *hot_path(tree),
        *(f"circle of modules: {', '.join(c)}" for c in circles((a, b) for a in tree.imports for b in tree.imports[a])),
        *(f"circle of folders: {', '.join(circle)}" for circle in circles(tree.arrows())),
        *two_types_of_one_name(tree),
        *attributes_of_others(tree),
        *(f"{name} has {lines} lines; {LINES_MAX} at most" for name, lines in tree.lines() if lines > LINES_MAX),
    ]


def upward(tree: Tree) -> Iterator[str]:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for (room, other), imports in tree.arrows().items():
        missing = [name for name in (room, other) if name not in floor]
        if missing:
            yield f"{missing[0]} has no floor: add it to FLOORS and to docs/design.md"
        elif floor[other] >= floor[room]:
            yield f"{room} may not import {other}: {imports[0]}"


def hot_path(tree: Tree) -> Iterator[str]:
    for file in HOT:
        module = tree.name(file)
        for other in tree.imports.get(module, ()):
            room = tree.room(other)
            if room in BESIDE or (room == "observe" and other not in OBSERVED_BY_THE_HOT_PATH):
                yield f"{module} is on the hot path and may not import {other}"


def two_types_of_one_name(tree: Tree) -> Iterator[str]:
    homes = defaultdict(list)
    for module, facts in tree.facts.items():
        for name in facts.classes:
            homes[name].append(module)
    for name, modules in homes.items():
        if len(modules) > 1:
            yield f"two types are named {name}: {', '.join(modules)}"


def attributes_of_others(tree: Tree) -> Iterator[str]:
    for module, facts in tree.facts.items():
        yield from (f"{module}:{line} sets {what}, which belongs to another module" for line, what in facts.sets)


def test_the_package_keeps_its_layout() -> None:
    assert problems(Tree()) == []


def test_the_graph_of_rooms_stays_small() -> None:
    tree = Tree()
    arrows = tree.arrows()
    rooms = {tree.room(module) for module in tree.files} | {room for arrow in arrows for room in arrow}
    assert len(rooms) <= NODES_MAX, sorted(rooms)
    assert len(arrows) <= ARROWS_MAX


def test_native_sources_stay_small() -> None:
    long = {
        path.name: lines
        for path in sorted((ROOT / "native").iterdir())
        if path.suffix in (".pyx", ".pxi", ".pxd", ".c", ".h")
        and (lines := len(path.read_text().splitlines())) > LINES_MAX
    }
    assert long == {}


BROKEN = {
    "an upward import": (
        "store/files.py",
        "from shorttail.registry import versions\n",
        "store may not import registry",
    ),
    "an upward import for types": (
        "define/names.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from shorttail.store import Store\n",
        "define may not import store",
    ),
    "an upward import in a function": (
        "models/load.py",
        "def f():\n    from shorttail import engine\n",
        "models may not import engine",
    ),
    "an import by name": (
        "models/load.py",
        "from importlib import import_module\nx = import_module('shorttail.engine')\n",
        "models may not import engine",
    ),
    "the hot path imports a source": ("plan.py", "from shorttail.sources import rows\n", "plan is on the hot path"),
    "the hot path imports a log": (
        "server/batcher.py",
        "from shorttail.observe import logs\n",
        "shorttail.server.batcher is on the hot path and may not import shorttail.observe.logs",
    ),
    "a circle of modules": ("define/dtypes.py", "from shorttail.define import views\n", "circle of modules: "),
    "a room without a floor": ("extra/thing.py", "from shorttail import errors\n", "extra has no floor"),
    "a second type of one name": ("models/load.py", "class Store:\n    pass\n", "two types are named Store: "),
    "a module that grew": ("names.py", "x = 1\n" * 501, "shorttail.names has 502 lines"),
    "an attribute of another module's class": (
        "registry/tune.py",
        "from shorttail.store import Store\ndef f(store: Store):\n    store.catalog = None\n",
        "sets Store.catalog, which belongs to another module",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_violation_of_each_rule_is_found(broken: str) -> None:
    file, text, message = BROKEN[broken]
    path = PACKAGE / file
    found = problems(Tree({file: f"{path.read_text() if path.exists() else ''}\n{text}"}))
    assert any(message in line for line in found), found


def test_a_circle_of_folders_is_found() -> None:
    assert circles([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]) == [["a", "b", "c"]]
    assert circles([("a", "b"), ("a", "c"), ("b", "c")]) == []
