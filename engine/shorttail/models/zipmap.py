"""Takes ZipMap off an ONNX file before it is registered.

Converters of classifiers end a graph with ZipMap, which makes a dict {class: probability} of each row. The tensor under
it has the same numbers: a column for each class, in the order of the training's classes. It becomes the output, under
the name that ZipMap's output had.
"""

from __future__ import annotations

from typing import Any

IDENTITY_OPSET = 9  # of files that import no version of ONNX's own operators, as CatBoost's


def remove_zipmaps(model: Any) -> bool:
    """Make tensors of the outputs of an onnx.ModelProto that ZipMap made maps. Returns whether there are any."""
    import onnx

    graph = model.graph
    made_by = {name: node for node in graph.node for name in node.output}
    found = [(output, zipmap) for output in graph.output if (zipmap := zipmap_under(output.name, made_by))]
    for output, zipmap in found:
        node = made_by[output.name]
        at = list(graph.node).index(node)
        graph.node.remove(node)
        # An Identity, because the tensor may be an output itself, or another node's input.
        graph.node.insert(at, onnx.helper.make_node("Identity", zipmap.input[:1], [output.name], node.name))
        shape = [None, n_classes(zipmap)]
        output.CopyFrom(onnx.helper.make_tensor_value_info(output.name, onnx.TensorProto.FLOAT, shape))
    if found and all(opset.domain not in ("", "ai.onnx") for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("", IDENTITY_OPSET))
    return bool(found)


def zipmap_under(name: str, made_by: dict[str, Any]) -> Any:
    """Return the ZipMap node that makes a tensor, perhaps passed on by Identity, or None."""
    node = made_by.get(name)
    while node is not None and node.op_type == "Identity":
        node = made_by.get(node.input[0])
    return node if node is not None and node.op_type == "ZipMap" else None


def n_classes(zipmap: Any) -> int | None:
    """Return how many classes a ZipMap names."""
    counts = [len(attribute.strings) or len(attribute.ints) for attribute in zipmap.attribute]
    return max(counts, default=0) or None
