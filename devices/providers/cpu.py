"""The CPU, which every onnxruntime has. It runs every graph that edgephi builds, and a bundle always has one for it."""

from __future__ import annotations

from edgephi.devices.providers.base import GraphTraits, Provider

CPU = Provider(
    name="CPUExecutionProvider",
    short="cpu",
    title="CPU",
    wheels=("onnxruntime",),
    graph=GraphTraits(
        opset=18,  # up to there onnxruntime's AveragePool is vectorized
        row_numbers=True,
        last_row=True,  # the head is 7 to 12 % of a prompt
        logit_rows=True,
        float_weights=True,
        experts=True,
        block_sparse=True,
        sliding_window=True,
        partial_blocks=True,
    ),
)
