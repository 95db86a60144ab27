"""Parses an ONNX file with the onnx package, and takes the weights that it keeps in files beside it into it.

ONNX Runtime opens such files by itself, at paths that the model chooses (CVE-2024-27318 and similar ones), and a file
that is left beside the model does not come into the store. So what is registered is always a single file. The onnx
package reads it as ONNX Runtime does: a reader of our own that differs in one detail could be deceived.

Only commands that register models import this module. A server loads the files that they wrote, by their SHA-256.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shorttail.define.names import quoted
from shorttail.errors import InvalidArgument

FILE_BYTES: Final = (2 << 30) - 1  # a protocol buffer holds no more
ORT_FORMAT: Final = b"ORTM"  # at byte 4 of a file in ONNX Runtime's own format
CURE: Final = "save it as one file: onnx.save_model(model, path, save_as_external_data=False)"


def parse_model(data: bytes, label: str) -> Any:
    """Return the onnx.ModelProto of a file's content. label: what errors call the file. Raises InvalidArgument."""
    import onnx

    try:
        return onnx.ModelProto.FromString(data)
    except Exception:  # protobuf's DecodeError, under a name that depends on its implementation
        kind = "a model in ONNX Runtime's own format (.ort)" if data[4:8] == ORT_FORMAT else "no ONNX model, or damaged"
        raise InvalidArgument(f"{label} is {kind}; give the .onnx file that the converter wrote") from None


def names_without_shape(model: Any) -> frozenset[str]:
    """Return the inputs and outputs for which a model declares no shape. ONNX Runtime shows them with the shape []."""
    values = [*model.graph.input, *model.graph.output]
    return frozenset(value.name for value in values if not value.type.tensor_type.HasField("shape"))


def take_in_weights(model: Any, path: Path, label: str) -> bool:
    """Move the weights that a model keeps in other files into it. Returns whether there were any.

    path: the model's file; the others must be in its folder. Raises InvalidArgument for any other place, and for a
    model that is too large for one file; the message begins with `label`.
    """
    external = [tensor for tensor in tensors(model) if tensor.external_data or tensor.data_location == tensor.EXTERNAL]
    pieces = [StoredWeights.of(tensor, path, label) for tensor in external]
    size_bytes = model.ByteSize() + sum(piece.size_bytes for piece in pieces)
    if pieces and size_bytes > FILE_BYTES:
        raise InvalidArgument(
            f"{label} has {size_bytes / (1 << 30):.1f} GiB with the weights that it keeps in other files; a model may"
            " have less than 2 GiB"
        )
    for tensor, piece in zip(external, pieces, strict=True):
        tensor.raw_data = piece.read()
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    return bool(external)


def tensors(message: Any) -> Iterator[Any]:
    """Yield every TensorProto of a message, wherever it is: in graphs, attributes, functions, or fields yet to come."""
    waiting = [message]
    while waiting:
        message = waiting.pop()
        if message.DESCRIPTOR.full_name == "onnx.TensorProto":
            yield message
            continue
        for field, value in message.ListFields():
            if field.message_type is not None:
                waiting.extend([value] if hasattr(value, "ListFields") else value)


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """A tensor's part of a file that lies beside the model."""

    label: str
    path: Path
    offset: int
    size_bytes: int

    @classmethod
    def of(cls, tensor: Any, path: Path, label: str) -> StoredWeights:
        """Return the part that a tensor refers to. Raises InvalidArgument if it is not within the model's folder."""
        try:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            location = Path(entries["location"])
            offset, length = int(entries.get("offset") or 0), entries.get("length")
            file = (path.parent / location).resolve()
            if location.is_absolute() or ".." in location.parts or not file.is_relative_to(path.parent.resolve()):
                raise InvalidArgument(
                    f"{label} keeps weights in {quoted(str(location))}, which is not in its folder; {CURE}"
                )
            if not file.is_file():
                raise InvalidArgument(f"{label} keeps weights in {quoted(str(location))}, and there is no such file")
            held_bytes = file.stat().st_size - offset
            size_bytes = held_bytes if length is None else int(length)
        except (KeyError, ValueError, OSError, RuntimeError) as error:  # RuntimeError: symbolic links in a circle
            raise InvalidArgument(f"{label} keeps weights in other files, and does not say where; {CURE}") from error
        if offset < 0 or not 0 <= size_bytes <= held_bytes:
            raise InvalidArgument(
                f"{label} keeps weights in {quoted(str(location))}, which is shorter than it says; export it again"
            )
        return cls(label, file, offset, size_bytes)

    def read(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size_bytes)
        except OSError as error:
            raise InvalidArgument(f"{self.label}: cannot read {self.path}: {error.strerror}") from None
        if len(data) != self.size_bytes:
            raise InvalidArgument(f"{self.label}: {self.path} became shorter while it was read")
        return data
