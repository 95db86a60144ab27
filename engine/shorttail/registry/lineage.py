"""Lineage: what a source, a view, a feature, a function or a model comes from, and what comes from it.

The way is source -> view -> feature -> on-demand function -> model -> version. Versions of a model may read different
features, so a step that leads to a model knows the versions that it is for, and a path is followed only while there is
a version that takes all of it.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from shorttail.define.catalog import Catalog, ModelEntry
from shorttail.define.models import Column
from shorttail.define.names import REQUEST, quoted, split_reference, suggestion
from shorttail.define.ondemand import OnDemand, OnDemandFeature
from shorttail.errors import NotFound, printable
from shorttail.ondemand.trust import functions_of

Use = tuple[str, int]  # a model and a version of it
Uses = frozenset[Use] | None  # None: all, also those to come

# The characters that mean nothing in Mermaid's quoted text; all others of ASCII are written as their numbers.
_PLAIN_IN_MERMAID: Final = re.compile(r"[^\w .:/@%(),-]", re.ASCII)


class LineageNode(NamedTuple):
    """A thing in a lineage.

    kind: source, entity, alias, view, feature, request (a column of requests), function, model or version.
    """

    kind: str
    name: str


Node = LineageNode
Step = tuple[Node, Uses]


@dataclass(frozen=True)
class Lineage:
    """What some things of a store come from, and what comes from them.

    starts: the things that were asked for; more than one if they share a name. notes: node -> what else is to be said,
    such as the roles of a version. before, after: (node, the versions of a path to it) -> the next steps up or down.
    """

    starts: list[Node]
    notes: dict[Node, str]
    before: dict[Step, list[Step]] = field(repr=False)
    after: dict[Step, list[Step]] = field(repr=False)

    @property
    def edges(self) -> list[tuple[Node, Node]]:
        """Each step as (from, to), each once."""
        up = ((other, node) for (node, _), steps in self.before.items() for other, _ in steps)
        down = ((node, other) for (node, _), steps in self.after.items() for other, _ in steps)
        return list(dict.fromkeys([*up, *down]))

    @property
    def nodes(self) -> list[Node]:
        return list(dict.fromkeys([*self.starts, *(node for edge in self.edges for node in edge)]))

    def label(self, node: Node) -> str:
        """Return a node as text for people: "version fraud@3 (current)"."""
        note = self.notes.get(node)
        return printable(f"{node.kind} {node.name}") + (f" ({note})" if note else "")

    def to_dict(self) -> dict[str, Any]:
        """Return {"of", "nodes": [{"id", "kind", "name", "note"}], "edges": [{"from", "to"}]}, ready for JSON.

        of, from, to: ids, "kind name".
        """
        return {
            "of": [" ".join(node) for node in self.starts],
            "nodes": [
                {"id": " ".join(node), "kind": node.kind, "name": node.name, "note": self.notes.get(node, "")}
                for node in self.nodes
            ],
            "edges": [{"from": " ".join(a), "to": " ".join(b)} for a, b in self.edges],
        }

    def text(self) -> str:
        """Return both ways as trees, indented by two spaces. What was shown before is not shown again below."""
        return "\n".join(line for start in self.starts for line in self._lines(start))

    def __str__(self) -> str:
        return self.text()

    def _lines(self, start: Node) -> Iterator[str]:
        yield self.label(start)
        for title, steps in (("from", self.before), ("to", self.after)):
            if steps[start, None]:
                yield f"{title}:"
                yield from self._tree((start, None), steps, 1, set())

    def _tree(self, at: Step, steps: dict[Step, list[Step]], depth: int, shown: set[Step]) -> Iterator[str]:
        for step in steps[at]:
            known = step in shown and bool(steps[step])
            yield f"{'  ' * depth}{self.label(step[0])}{' ...' if known else ''}"
            if not known:
                shown.add(step)
                yield from self._tree(step, steps, depth + 1, shown)

    def dot(self) -> str:
        """Return the graph for Graphviz."""
        numbers = {node: f"n{number}" for number, node in enumerate(self.nodes)}
        lines = [
            f'  {number} [label="{_dot_text(self.label(node))}"{", style=bold" * (node in self.starts)}];'
            for node, number in numbers.items()
        ]
        lines += [f"  {numbers[a]} -> {numbers[b]};" for a, b in self.edges]
        return "\n".join(["digraph lineage {", "  rankdir=LR;", "  node [shape=box];", *lines, "}"])

    def mermaid(self) -> str:
        """Return the graph for Mermaid."""
        numbers = {node: f"n{number}" for number, node in enumerate(self.nodes)}
        lines = [f'  {number}["{_mermaid_text(self.label(node))}"]' for node, number in numbers.items()]
        lines += [f"  {numbers[a]} --> {numbers[b]}" for a, b in self.edges]
        lines += [f"  style {numbers[node]} stroke-width:3px" for node in self.starts]
        return "\n".join(["flowchart LR", *lines])


def lineage(catalog: Catalog, name: str) -> Lineage:
    """Return the lineage of everything that has this name.

    name: the path of a source; an entity, an alias, a view, "view:feature", "request:column", a function, a model, or
    "model@version". Raises NotFound that suggests a name.
    """
    graph = _Graph(catalog)
    starts = graph.named(name)
    before: dict[Step, list[Step]] = {}
    after: dict[Step, list[Step]] = {}
    for start in starts:
        graph.follow((start, None), graph.up, before)
        graph.follow((start, None), graph.down, after)
    return Lineage(starts, graph.notes, before, after)


class _Graph:
    """The steps between all things of a catalog. up, down: node -> {next node: the versions that the step is for}."""

    def __init__(self, catalog: Catalog) -> None:
        self.up: dict[Node, dict[Node, Uses]] = defaultdict(dict)
        self.down: dict[Node, dict[Node, Uses]] = defaultdict(dict)
        self.notes: dict[Node, str] = {}
        self.nodes: dict[Node, None] = {}  # a set that keeps the order
        self._functions = _function_names(catalog)
        for entity in catalog.entities.values():
            self._node("entity", entity.name)
        for alias in catalog.aliases.values():
            self._step(Node("entity", alias.entity.name), self._node("alias", alias.name))
        for view in catalog.views.values():
            node = self._node("view", view.name)
            if view.source:
                self._step(Node("source", view.source.path), node)
            self._step(Node("entity", view.entity.name), node)
            for feature in view.features:
                self._step(node, Node("feature", f"{view.name}:{feature.name}"))
        known = set(self.nodes)
        for name, entry in catalog.models.items():
            model = self._node("model", name)
            for number, info in sorted(entry.versions.items()):
                use = (name, number)
                version = Node("version", f"{name}@{number}")
                self._step(model, version, use)
                self.notes[version] = ", ".join(roles(entry, number))
                for column in info.model.columns:
                    self._feed(column, model, use)
        for node in self.nodes:
            if node.kind in ("feature", "alias") and node not in known:  # read by a version that was current once
                self.notes[node] = "gone"

    def _node(self, kind: str, name: str) -> Node:
        node = Node(kind, name)
        self.nodes[node] = None
        return node

    def _step(self, a: Node, b: Node, use: Use | None = None) -> None:
        """Add a step. use: a version that it is for; None: it is for all."""
        self.nodes |= {a: None, b: None}
        for steps, x, y in ((self.down, a, b), (self.up, b, a)):
            steps[x][y] = None if use is None else (steps[x].get(y) or frozenset()) | {use}

    def _feed(self, column: Column, to: Node, use: Use) -> None:
        """Add what a column of a version's inputs, or an argument of a function, comes from."""
        if isinstance(column, OnDemandFeature):
            function = Node("function", self._functions[column.function])
            self._step(function, to, use)
            for argument in column.args:
                self._feed(argument, function, use)
            return
        lookup, feature = split_reference(column)
        alias, _, view = lookup.rpartition(":")
        if view == REQUEST:
            self._step(Node("request", feature), to, use)
            return
        self._step(Node("feature", f"{view}:{feature}"), to, use)
        if alias:
            self._step(Node("alias", alias), to, use)

    def named(self, name: str) -> list[Node]:
        """Return the nodes that a user means by a name. Raises NotFound."""
        wanted = {name, name.partition(":")[2]} if name.count(":") == 2 else {name}  # a feature by an alias
        paths = {name, str(Path(name).absolute())}
        known = {node: self._shown(node) for node in self.nodes}
        found = [node for node, shown in known.items() if shown in (paths if node.kind == "source" else wanted)]
        if not found:
            raise NotFound(f"nothing in the store is named {quoted(name)}{suggestion(name, known.values(), 'names')}")
        return found

    def _shown(self, node: Node) -> str:
        if node.kind == "function":
            return node.name.partition(" ")[0]  # one of several of its name has a hash behind it
        return f"{REQUEST}:{node.name}" if node.kind == "request" else node.name

    def follow(self, at: Step, steps: dict[Node, dict[Node, Uses]], found: dict[Step, list[Step]]) -> None:
        """Put all steps that can be taken from a step into `found`."""
        if at in found:
            return
        node, uses = at
        found[at] = []
        for other, only in steps.get(node, {}).items():
            left = only if uses is None else uses if only is None else uses & only
            if left is None or left:
                found[at].append((other, left))
                self.follow((other, left), steps, found)


def roles(entry: ModelEntry, number: int) -> list[str]:
    """Return what a version of a model is now: current, previous, "canary 5%", "shadow 10%"."""
    found = [what for what, version in (("current", entry.current), ("previous", entry.previous)) if version == number]
    shares = (("canary", entry.canary), ("shadow", entry.shadow))
    return found + [f"{what} {share.percent:g}%" for what, share in shares if share and share.version == number]


def _function_names(catalog: Catalog) -> dict[OnDemand, str]:
    """Return a name for each function: its own, with a hash of its source if another function has the same name."""
    models = (info.model for entry in catalog.models.values() for info in entry.versions.values())
    functions = dict.fromkeys(function for model in models for function in functions_of(model))
    by_name: dict[str, list[OnDemand]] = defaultdict(list)
    for function in functions:
        by_name[function.name].append(function)

    def name_of(function: OnDemand) -> str:
        if len(by_name[function.name]) == 1:
            return function.name
        return f"{function.name} {hashlib.sha256(repr(function).encode()).hexdigest()[:8]}"

    return {function: name_of(function) for function in functions}


def _dot_text(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _mermaid_text(text: str) -> str:
    return _PLAIN_IN_MERMAID.sub(lambda found: f"#{ord(found[0])};" if found[0].isascii() else found[0], text)
