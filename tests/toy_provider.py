"""A provider in one file, as `devices/providers/` has them: onnxruntime's CPU provider under another name.

It wants a graph that the CPU's is not: float16, separate attention, its own graph for the last row.
"""

from __future__ import annotations

from typing import Any

import pytest

from edgephi.devices import providers
from edgephi.devices.providers.base import GraphTraits, PowerOption, Provider
from edgephi.devices.providers.options import OneOf

TOY = Provider(
    name="CPUExecutionProvider",
    short="toy",
    title="Toy",
    wheels=("onnxruntime-toy",),
    aliases=("plaything",),
    options={"pace": OneOf(("fast", "slow"))},
    power=PowerOption("pace", {"performance": "fast", "balanced": "slow", "saver": "slow"}),
    device_class="gpu",
    profile="toy-gpu",
    graph=GraphTraits(
        float_type="float16", separate_attention=True, row_numbers=True, whole_prompts=True, last_row=True
    ),
)


def add_to(patch: pytest.MonkeyPatch) -> None:
    """What the line in `PROVIDERS` does."""
    patch.setattr(providers, "PROVIDERS", (*providers.PROVIDERS, TOY))


def try_graph(**arguments: Any) -> dict[str, Any]:
    """The child's side of `runtime.placement.probe.prove`, in a process that has to be told of the toy as well."""
    from edgephi.runtime.placement import probe

    with pytest.MonkeyPatch.context() as patch:
        add_to(patch)
        # onnxruntime's CPU provider takes no options
        return probe.try_graph(**arguments | {"options": {}})
