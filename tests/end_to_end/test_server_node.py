"""The official client of OpenAI for Node against a server on the loopback: `tests/node/openai.test.mjs`."""

# ruff: noqa: E402 - what is not installed skips these tests before it is imported

from __future__ import annotations

import re
from pathlib import Path

import pytest

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)

from edgephi.runtime.tools.formats import HERMES
from tests.node_tools import PROJECT, node_modules, run_node
from tests.planted_tools import written
from tests.serving import Planted, serving

SUITE = PROJECT / "tests" / "node" / "openai.test.mjs"


def test_the_suite_of_the_node_client_passes(hermes_bundle: Path, tmp_path: Path) -> None:
    node_modules("openai")
    planted = Planted(hermes_bundle)
    planted.answers += [
        "Fine, thank you.",
        "One, two, three.",
        "Wait. " + written(HERMES, "get_weather", {"city": "Oslo"}),
        "It is 21 degrees.",
        '{"age": 36}',
        "My name is Ada.",
        "Ada, as I said.",
    ]
    with serving({"tiny": planted}) as running:
        said = run_node(SUITE, tmp_path, test=True, EDGEPHI_URL=running.url)
    found = re.search(r"pass (\d+)", said)
    assert found and int(found[1]) == len(re.findall(r"^test\(", SUITE.read_text(encoding="utf-8"), re.MULTILINE)), said
    assert not planted.answers
