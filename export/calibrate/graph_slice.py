"""Parts of one decoder layer's graph, cut where a linear layer reads its input, so that no part is computed twice."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto


class GraphSlices:
    """Which values of a graph lie across a cut, and the models between two cuts.

    Args:
        model: nodes in order; weights are inputs of the graph.
        start: name of the hidden states that come in, float32 [1, length, hidden].
        end: name of those that go out.
    """

    def __init__(self, model: ModelProto, start: str, end: str) -> None:
        self._model, self._start, self._end = model, start, end
        self._makers = {name: number for number, node in enumerate(model.graph.node) for name in node.output if name}
        self._computed = _computed_from(model.graph.node, start)

    def carried(self, value: str, known: Collection[str]) -> list[str]:
        """What the rest of the graph needs of all that leads up to a value and to known ones, and the value itself.

        What does not depend on hidden states (positions, lengths) is not among it: that is computed again.
        """
        before = self._needed([value, *known], ())
        rest = self._needed([self._end], ()) - before
        nodes = self._model.graph.node
        needed = {name for number in rest for name in nodes[number].input if name in self._computed}
        names = [name for number in sorted(before) for name in nodes[number].output]
        carried = [name for name in names if name == value or name in needed]
        return [self._start, *carried] if self._start in self.read(carried) else carried

    def read(self, known: Collection[str]) -> set[str]:
        """Inputs of the graph that the end needs besides known values."""
        nodes = [self._model.graph.node[number] for number in self._needed([self._end], known)]
        inputs = {value.name for value in self._model.graph.input}
        return {name for node in nodes for name in node.input if name in inputs and name not in known}

    def between(self, known: Collection[str], wanted: Sequence[str]) -> ModelProto:
        """The model that computes values from known ones, float32 [1, length, width] all of them."""
        from onnx import TensorProto, helper

        graph = self._model.graph
        nodes = [graph.node[number] for number in sorted(self._needed(wanted, known))]
        read = {name for node in nodes for name in node.input}

        def port(name: str) -> ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "length", f"width of {name}"])

        inputs = [value for value in graph.input if value.name in read]
        given = {value.name for value in inputs}
        inputs += [port(name) for name in known if name in read and name not in given]
        declared = {value.name: value for value in graph.output}
        outputs = [declared.get(name) or port(name) for name in wanted]
        constants = [value for value in graph.initializer if value.name in read]
        part = helper.make_graph(nodes, graph.name, inputs, outputs, constants)
        return helper.make_model(part, ir_version=self._model.ir_version, opset_imports=self._model.opset_import)

    def _needed(self, wanted: Sequence[str], known: Collection[str]) -> set[int]:
        """Numbers of the nodes that lead from the graph's inputs and the known values to the wanted ones."""
        found: set[int] = set()
        open_names = list(wanted)
        while open_names:
            name = open_names.pop()
            if name in known or name not in self._makers or self._makers[name] in found:
                continue
            found.add(self._makers[name])
            open_names += self._model.graph.node[self._makers[name]].input
        return found


def _computed_from(nodes: Sequence[NodeProto], start: str) -> set[str]:
    """Names of the values that depend on what `start` holds, and not only on its shape."""
    found = {start}
    for node in nodes:
        if node.op_type != "Shape" and any(name in found for name in node.input):
            found.update(name for name in node.output if name)  # an output that is left out has the name ""
    return found
