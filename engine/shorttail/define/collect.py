"""Collects definitions from a file, which is executed, or from objects of the running program."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from shorttail.define.entities import Alias, Entity
from shorttail.define.models import Model
from shorttail.define.views import Feature, FeatureView
from shorttail.errors import InvalidArgument, NotFound, ShorttailError

MODULE_NAME = "shorttail_definitions"  # __name__ in the executed file


@dataclass
class Definitions:
    """What a definitions file declares, by name. Paths of files are absolute.

    origin: {"file": path, "sha256": of it} of definitions that are a file.
    """

    entities: dict[str, Entity] = field(default_factory=dict)
    aliases: dict[str, Alias] = field(default_factory=dict)
    views: dict[str, FeatureView] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict, compare=False)

    def to_json(self) -> bytes:
        """Return a JSON document by which another process has the definitions, without running their file."""
        document = {
            "entities": [entity.to_json() for entity in self.entities.values()],
            "aliases": [alias.to_json() for alias in self.aliases.values()],
            "views": [
                view.to_json() | {"features": list(map(whole_json, view.features))} for view in self.views.values()
            ],
            "models": [model.to_json() for model in self.models.values()],
            "origin": self.origin,
        }
        return json.dumps(document).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Definitions:
        """Return the definitions of a document. Raises InvalidArgument for that of another version."""
        try:
            document = json.loads(data)
            entities = {item["name"]: Entity.from_json(item) for item in document["entities"]}
            views = [FeatureView.from_json(item) for item in document["views"]]
            return cls(
                entities,
                {item["name"]: Alias.from_json(item, entities) for item in document["aliases"]},
                {
                    view.name: replace(view, features=list(map(with_unstored, view.features, item["features"])))
                    for view, item in zip(views, document["views"], strict=True)
                },
                {item["name"]: Model.from_json(item) for item in document["models"]},
                document["origin"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidArgument(f"definitions of another version of shorttail: {error!r}; use the same one") from None


def whole_json(feature: Feature) -> dict[str, Any]:
    """Return a feature's JSON document with the fields that the catalog does not keep."""
    stored = feature.to_json()
    return stored | {each.name: getattr(feature, each.name) for each in fields(feature) if each.name not in stored}


def with_unstored(feature: Feature, document: dict[str, Any]) -> Feature:
    """Return a feature with the fields of `whole_json` that the catalog does not keep."""
    stored = feature.to_json()
    return replace(feature, **{each.name: document[each.name] for each in fields(feature) if each.name not in stored})


def collect(source: str | os.PathLike[str] | Definitions | Any) -> Definitions:
    """Return the definitions of a file (given as a path), of an object, or of lists and dicts of objects.

    Relative paths in definitions start at the file's folder; for objects, at the working folder.
    Raises NotFound if there is no such file, InvalidArgument if it does not run or defines nothing.
    """
    if isinstance(source, Definitions):
        return source
    if not isinstance(source, str | os.PathLike):
        return collect_objects(source, Path.cwd())
    path = Path(source)
    if not path.is_file():
        raise NotFound(f"{path}: there is no such definitions file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{path}: the definitions file cannot be read: {error.strerror}") from None
    definitions = collect_objects(run_file(path, content), path.absolute().parent)
    if definitions == Definitions():
        raise InvalidArgument(f"{path}: it defines no entity, feature view or model at its top level")
    return replace(definitions, origin={"file": str(path.absolute()), "sha256": hashlib.sha256(content).hexdigest()})


def run_file(path: Path, content: bytes) -> dict[str, Any]:
    """Execute the content of a file with its folder first on the import path, and return its globals.

    The import system is not used: its cached bytecode is stale if a file is edited twice within a second.
    """
    module = ModuleType(MODULE_NAME)
    module.__file__ = str(path.absolute())
    folder = str(path.absolute().parent)
    sys.path.insert(0, folder)
    sys.modules[MODULE_NAME] = module
    try:
        exec(compile(content, module.__file__, "exec"), module.__dict__)
    except SyntaxError as error:
        raise InvalidArgument(f"{error.filename or path}:{error.lineno}: SyntaxError: {error.msg}") from error
    except (Exception, SystemExit) as error:
        text = error.message if isinstance(error, ShorttailError) else describe(error)
        raise InvalidArgument(f"{path}:{user_line(error, module.__file__)}: {text}") from error
    finally:
        sys.path.remove(folder)
        del sys.modules[MODULE_NAME]
    return module.__dict__


def describe(error: BaseException) -> str:
    """Return "ValueError: text", with the first line of the text only."""
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def user_line(error: BaseException, filename: str) -> int:
    """Return the line of the definitions file that was running when the error was raised."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == filename]
    return lines[-1] if lines else 1


def collect_objects(objects: Any, folder: Path) -> Definitions:
    """Return the definitions among these objects, with the entities of views and aliases.

    Relative paths start at `folder`.
    """
    definitions = Definitions()
    for item in walk(objects, set()):
        if isinstance(item, Entity):
            add(definitions.entities, item, "entities")
        elif isinstance(item, Alias):
            add(definitions.entities, item.entity, "entities")
            add(definitions.aliases, item, "aliases")
        elif isinstance(item, FeatureView):
            add(definitions.entities, item.entity, "entities")
            add(definitions.views, with_absolute_source(item, folder), "feature views")
        elif isinstance(item, Model):
            examples = None if item.examples is None else absolute(folder, item.examples)
            add(definitions.models, replace(item, path=absolute(folder, item.path), examples=examples), "models")
    return definitions


def walk(value: Any, seen: set[int]) -> Iterator[Any]:
    """Yield every definition in `value`, which may be a list, tuple, set or dict of others. seen: ids to skip."""
    if isinstance(value, Entity | Alias | FeatureView | Model):
        yield value
    elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
        seen.add(id(value))
        items: Iterable[Any] = list(value.values()) if isinstance(value, Mapping) else value
        for item in items:
            yield from walk(item, seen)


def add(found: dict[str, Any], item: Any, what: str) -> None:
    """Add a definition. Raises InvalidArgument if another, different one has its name."""
    if found.setdefault(item.name, item) != item:
        raise InvalidArgument(f"two different {what} are named '{item.name}'; names must be unique")


def with_absolute_source(view: FeatureView, folder: Path) -> FeatureView:
    if view.source is None:
        return view
    return replace(view, source=replace(view.source, path=absolute(folder, view.source.path)))


def absolute(folder: Path, path: str) -> str:
    # normpath and not resolve(), so that a later check still sees a symbolic link.
    return os.path.normpath(folder / path)
