"""Reads CSV files: every field is read as text, and parsed by the grammar of define/text.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset

from shorttail.define.dtypes import DType, String, Timestamp
from shorttail.define.refusal import Refused
from shorttail.define.text import parse_text
from shorttail.define.values import from_arrow, from_values

# Texts that Arrow converts exactly as parse_text does: (regular expression, Arrow type to cast to).
WHOLE: Final = (r"^-?[0-9]{1,18}$", pa.int64())
NUMBER: Final = (r"^-?[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,2})?$", pa.float64())
TIME: Final = (r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?$", pa.timestamp("us"))


def csv_format(names: Iterable[str]) -> Any:
    """Return a CSV format that reads these columns as text, an empty field as null, and every line as a row."""
    return pyarrow.dataset.CsvFileFormat(
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


def from_texts(dtype: DType, column: Any) -> tuple[Any, Any]:
    """Convert a column of texts to (array, nulls), as define.values.from_arrow returns them. Raises Refused.

    Arrow converts a column of common texts in a single call. Other columns are parsed text by text.
    """
    if dtype == String:
        return from_arrow(dtype, column)
    for pattern, kind in _arrow_forms(dtype):
        if pc.all(pc.match_substring_regex(column, pattern)).as_py() is not False:  # None: every text is null
            try:
                return from_arrow(dtype, column.cast(kind))
            except (pa.ArrowInvalid, Refused):  # such as February 30, or 3000000000 for Int32; the text is named below
                break
    found = []
    for row, text in enumerate(column.to_pylist()):
        try:
            found.append(None if text is None else parse_text(dtype, text))
        except Refused as error:
            raise Refused(error.got, row) from None
    return from_values(dtype, found)


def _arrow_forms(dtype: DType) -> list[tuple[str, Any]]:
    """Return the entries of WHOLE, NUMBER and TIME that apply to a type."""
    if dtype.is_float:
        return [NUMBER]
    if dtype == Timestamp:
        return [WHOLE, TIME]
    return [WHOLE] if dtype.is_integer else []
