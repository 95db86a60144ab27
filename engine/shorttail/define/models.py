"""Declares models: the ONNX file and the columns that feed it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from shorttail.define.durations import parse_duration
from shorttail.define.names import check_path_name, check_tags, check_text, plain_name, split_reference
from shorttail.define.ondemand import OnDemand, OnDemandFeature
from shorttail.errors import InvalidArgument

Json = dict[str, Any]
Column = str | OnDemandFeature
"""An entry of a model's inputs: "view:feature", "alias:view:feature", "request:column" or an on-demand feature."""
BATCHING = {"rows": "shares runs between requests", "request": "runs one request at a time"}
"""How requests share the runs of a model, and what it is called."""


@dataclass(frozen=True)
class Model:
    """An ONNX model and the columns that feed it.

    `inputs` is a list of columns for a model with a single input: they are the columns of its matrix, in order, and a
    vector feature fills as many columns as it has elements. For several inputs it is a dict: input name -> such a list.
    `outputs` names the model's outputs to return; None returns all. `path` is relative to the definitions file.
    `run` is a link to the training run ("mlflow:..." or any URL). `metrics` holds measured figures: {name: number}.
    `inputs=None` makes a model of raw tensors: each request brings the arrays of the file's inputs, over HTTP or in
    `Engine.predict`, and runs by itself.
    `missing` gives the value that stands in where a request, or the store, has none: {column: value}. A column is the
    name of a request column, or "view:feature", or the name of a feature if no other column has it. docs/models.md says
    what the model gets without it.
    `batching` says how requests share runs: "rows" puts the rows of several requests into one run, "request" runs each
    request by itself; None lets `apply` find out whether the answer for a row depends on the other rows.
    `run_timeout` ends a run of the model that takes longer: "200ms", "2s"; None is LIMITS.run_timeout_s.
    `examples` is the path of a Parquet, Arrow or CSV file of rows with the outputs that are expected for them; `apply`
    and every load of the model compare. It is relative to the definitions file. Its columns are request columns,
    features ("view:feature") and outputs (docs/models.md). `tags` are words by which people find the model.
    Raises InvalidArgument.
    """

    name: str
    path: str
    inputs: Sequence[Column] | Mapping[str, Sequence[Column]] | None = None
    outputs: Sequence[str] | None = None
    description: str = ""
    owner: str = ""
    run: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[str, Any] = field(default_factory=dict)
    batching: str | None = None
    run_timeout: str | None = None
    examples: str | None = None
    tags: Sequence[str] = ()  # stored as a tuple

    def __post_init__(self) -> None:
        check_path_name(self.name, "model")
        where = f"model '{self.name}'"
        object.__setattr__(self, "tags", check_tags(self.tags, where))
        if not isinstance(self.path, str | Path) or not str(self.path):
            raise InvalidArgument(f"{where}: path must be the path of an ONNX file")
        object.__setattr__(self, "path", str(self.path))
        if isinstance(self.inputs, Mapping):
            if not self.inputs:
                raise InvalidArgument(f"{where}: inputs is empty")
            for name in self.inputs:
                check_text(name, f"{where}: the name of an input")
            checked: Any = {
                name: check_columns(columns, f"{where}: input '{name}'") for name, columns in self.inputs.items()
            }
        elif self.inputs is None:
            checked = None
        else:
            checked = check_columns(self.inputs, f"{where}: inputs")
        object.__setattr__(self, "inputs", checked)
        if self.outputs is not None:
            names = [] if isinstance(self.outputs, str) else list(self.outputs)
            if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
                raise InvalidArgument(f"{where}: outputs must be a list of different output names")
            object.__setattr__(self, "outputs", tuple(self.outputs))
        check_text(self.description, f"{where}: description")
        check_text(self.owner, f"{where}: owner")
        check_run(self.run, where)
        object.__setattr__(self, "metrics", check_metrics(self.metrics, where))
        object.__setattr__(self, "missing", check_missing(self.missing, self.references, where))
        if self.batching not in (None, *BATCHING):
            raise InvalidArgument(f"{where}: batching must be 'rows' or 'request', not {self.batching!r}")
        if self.inputs is None and self.batching == "rows":
            raise InvalidArgument(
                f"{where}: batching='rows' needs inputs=: a request of tensors may have any shape, and runs by itself"
            )
        if self.run_timeout is not None:
            parse_duration(self.run_timeout, f"{where}: run_timeout", "'200ms', '2s' or '1m'")
        if self.examples is not None:
            if not isinstance(self.examples, str | Path) or not str(self.examples):
                raise InvalidArgument(f"{where}: examples must be the path of a file of rows with expected outputs")
            if self.inputs is None:
                raise InvalidArgument(f"{where}: examples are rows of columns, so they need inputs=")
            object.__setattr__(self, "examples", str(self.examples))

    __hash__ = None  # type: ignore[assignment]  # it may hold a dict

    @property
    def is_raw(self) -> bool:
        """Whether requests bring the tensors of the file, and no columns."""
        return self.inputs is None

    @property
    def columns(self) -> list[Column]:
        """The columns of all inputs, in order."""
        if isinstance(self.inputs, Mapping):
            return [column for columns in self.inputs.values() for column in columns]
        return list(self.inputs or ())

    @property
    def run_timeout_us(self) -> int | None:
        """The limit of a run in microseconds, None for the default."""
        return None if self.run_timeout is None else parse_duration(self.run_timeout, "run_timeout", "'200ms'")

    @property
    def references(self) -> list[str]:
        """Each feature and "request:column" that the model reads, also as an argument, in order, each once."""
        found: dict[str, None] = {}
        for column in self.columns:
            for reference in column.references if isinstance(column, OnDemandFeature) else (column,):
                found[reference] = None
        return list(found)

    def inputs_by_name(self, input_names: Sequence[str]) -> dict[str, tuple[Column, ...]]:
        """Return the columns of each input. input_names: the ONNX file's inputs; a list belongs to its only input.

        A model of raw tensors has no columns.
        """
        if self.inputs is None:
            return dict.fromkeys(input_names, ())
        if isinstance(self.inputs, Mapping):
            return {name: tuple(columns) for name, columns in self.inputs.items()}
        return {input_names[0]: tuple(self.inputs)}

    def to_json(self) -> Json:
        inputs: Any
        if isinstance(self.inputs, Mapping):
            # A list of pairs, because the order of inputs is the order of their columns in requests and messages.
            inputs = {"named": [[name, [column_json(c) for c in columns]] for name, columns in self.inputs.items()]}
        elif self.inputs is None:
            inputs = {"tensors": []}
        else:
            inputs = {"only": [column_json(column) for column in self.inputs]}
        return {
            "name": self.name,
            "path": self.path,
            "inputs": inputs,
            "outputs": list(self.outputs) if self.outputs is not None else None,
            "description": self.description,
            "owner": self.owner,
            "run": self.run,
            "metrics": dict(self.metrics),
            "missing": dict(self.missing),
            "batching": self.batching,
            "run_timeout": self.run_timeout,
            "examples": self.examples,
            "tags": list(self.tags),
        }

    @classmethod
    def from_json(cls, data: Json) -> Model:
        inputs: Any
        if "named" in data["inputs"]:
            inputs = {name: [column_from_json(c) for c in columns] for name, columns in data["inputs"]["named"]}
        elif "tensors" in data["inputs"]:
            inputs = None
        else:
            inputs = [column_from_json(column) for column in data["inputs"]["only"]]
        return cls(
            data["name"],
            data["path"],
            inputs,
            data["outputs"],
            data["description"],
            data["owner"],
            data.get("run", ""),
            data.get("metrics", {}),
            data.get("missing", {}),
            data.get("batching"),
            data.get("run_timeout"),
            data.get("examples"),
            data.get("tags", ()),
        )


def check_run(run: object, where: str) -> None:
    """Check that `run` is "" or a link with a scheme: "mlflow:RUN", "https://...". Raises InvalidArgument."""
    check_text(run, f"{where}: run")
    if run and not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s]+", str(run)):
        raise InvalidArgument(f"{where}: run must be a link such as 'mlflow:3f2a' or 'https://...', not {run!r}")


def check_metrics(metrics: object, where: str) -> dict[str, float]:
    """Return the metrics as floats. Raises InvalidArgument for a wrong name and for a number that is not finite."""
    if not isinstance(metrics, Mapping):
        raise InvalidArgument(f"{where}: metrics must be {{name: number}}, not {type(metrics).__name__}")
    for name, value in metrics.items():
        if not isinstance(name, str) or not name or not name.isprintable():
            raise InvalidArgument(f"{where}: metrics: {name!r} is not a name; write {{'auc': 0.91}}")
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise InvalidArgument(f"{where}: metric '{name}' must be a finite number, not {value!r}")
    return {name: float(value) for name, value in metrics.items()}


def check_missing(missing: object, references: Sequence[str], where: str) -> dict[str, Any]:
    """Check the names of `missing`, and return it with request columns by their names and features as "view:feature".

    models/signature.py checks the values, where the types of columns are known. Raises InvalidArgument.
    """
    if not isinstance(missing, Mapping):
        raise InvalidArgument(f"{where}: missing must be {{column: value}}, not {type(missing).__name__}")
    found: dict[str, Any] = {}
    for name, value in missing.items():
        named = [item for item in references if name in (item, plain_name(item))]
        if not named:
            known = ", ".join(item.removeprefix("request:") for item in references)
            raise InvalidArgument(f"{where}: missing names {name!r}, which is not one of its columns: {known}")
        if len(named) > 1:
            raise InvalidArgument(
                f"{where}: missing names {name!r}, which is {' and '.join(named)}; write one of these"
            )
        bare = named[0].removeprefix("request:")
        is_plain = sum(bare in (item, plain_name(item)) for item in references) == 1
        kept = bare if is_plain else named[0]
        if kept in found:
            raise InvalidArgument(f"{where}: missing names {named[0]} twice")
        found[kept] = value
    return found


def missing_reference(name: str) -> str:
    """Return the reference of a name in `Model.missing`, which has request columns by their names."""
    return name if ":" in name else f"request:{name}"


def check_columns(columns: object, where: str) -> tuple[Column, ...]:
    """Return the columns of an input as a tuple. Raises InvalidArgument."""
    if isinstance(columns, str | OnDemandFeature) or not isinstance(columns, Sequence) or not columns:
        raise InvalidArgument(f"{where} must be a list of 'view:feature', 'request:column' or on-demand features")
    for column in columns:
        if isinstance(column, OnDemand):
            raise InvalidArgument(f"{where}: call {column.name} with its arguments: {column.name}('view:feature', ...)")
        if not isinstance(column, OnDemandFeature):
            try:
                split_reference(column)
            except InvalidArgument as error:
                raise InvalidArgument(f"{where}: {error.message}") from None
    return tuple(columns)


def column_json(column: Column) -> Any:
    return column.to_json() if isinstance(column, OnDemandFeature) else column


def column_from_json(data: Any) -> Column:
    return data if isinstance(data, str) else OnDemandFeature.from_json(data)


def column_label(column: Column) -> str:
    """Return a column as the user wrote it: a reference, or function(reference, ...)."""
    return column if isinstance(column, str) else column.label
