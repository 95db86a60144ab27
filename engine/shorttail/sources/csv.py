"""CSV files: every field is read as text, and becomes a value by the one grammar of define/text.py."""

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
from shorttail.define.values import filled, of_arrow

# Texts that Arrow's own conversions read exactly as parse_text does, and what it makes of them.
WHOLE: Final = (r"^-?[0-9]{1,18}$", pa.int64())
NUMBER: Final = (r"^-?[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,2})?$", pa.float64())
TIME: Final = (r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?$", pa.timestamp("us"))


def csv_format(names: Iterable[str]) -> Any:
    """Reads these columns as text, null where nothing stands between two commas, and every line as a row."""
    return pyarrow.dataset.CsvFileFormat(
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


def of_texts(dtype: DType, column: Any) -> tuple[Any, Any]:
    """A column of texts as define.values.of_arrow gives it. Raises Refused.

    Columns of usual texts are converted by Arrow at once; others text by text.
    """
    if dtype == String:
        return of_arrow(dtype, column)
    for pattern, kind in _usual(dtype):
        if pc.all(pc.match_substring_regex(column, pattern)).as_py() is not False:  # None: all are null
            try:
                return of_arrow(dtype, column.cast(kind))
            except pa.ArrowInvalid:  # a 30th of February
                break
    found = []
    for row, text in enumerate(column.to_pylist()):
        try:
            found.append(None if text is None else parse_text(dtype, text))
        except Refused as error:
            raise Refused(error.got, row) from None
    return filled(dtype, found)


def _usual(dtype: DType) -> list[tuple[str, Any]]:
    if dtype.is_float:
        return [NUMBER]
    if dtype == Timestamp:
        return [WHOLE, TIME]
    return [WHOLE] if dtype.is_integer else []
