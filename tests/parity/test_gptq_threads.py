"""The same bytes whatever the number of cores and of BLAS's threads: sampled text, statistics, codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgephi.quantize.workers import COLUMNS, TILE, add_gram, mirror, product, worker_pool

FIT = """
import os, sys
from hashlib import sha256
from pathlib import Path
if sys.argv[3] == "one":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
import numpy as np
from edgephi.export.journal import JOURNAL, Journal
from edgephi.export.graph.builder import DATA_FILE
from edgephi.export.families import describe
from edgephi.export.calibrate.fit import pack_decoder
from edgephi.export.checkpoint.safetensors import open_folder
from edgephi.export.calibrate.self_text import sample_text
from edgephi.export.weights.layout import plan_storage
from edgephi.export.weights.recipe import make_recipe
from edgephi.quantize.formats import BlockFormat
from edgephi.quantize.gptq import gptq
from edgephi.quantize.workers import add_gram, mirror, worker_pool

folder = Path(sys.argv[2])
folder.mkdir()
architecture = describe(open_folder(Path(sys.argv[1])))
tokens = sample_text(architecture, architecture.spec.vocabulary_size, (24, 24), 5, folder / "text", 1)
layout = plan_storage(architecture, make_recipe("int4", 32, quantize="gptq"))
pack_decoder(architecture, layout, tokens, folder / DATA_FILE, Journal(folder / JOURNAL, ""), 1, lambda count: None)
print(sha256(tokens.tobytes()).hexdigest(), sha256((folder / DATA_FILE).read_bytes()).hexdigest())
# large enough that BLAS would cut it
rng = np.random.default_rng(0)
inputs, weight = rng.standard_normal((2048, 1200), np.float32), rng.standard_normal((2500, 1200), np.float32)
total = np.zeros((1200, 1200), np.float32)
with worker_pool() as pool:
    add_gram(pool, total, inputs)
mirror(total)
fitted = gptq(weight, total, BlockFormat(4, 128, False))
print(sha256(total).hexdigest(), sha256(fitted.codes).hexdigest(), sha256(fitted.scales).hexdigest())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot take a core away")
def test_threads_and_cores_do_not_show_in_the_bytes(fixtures: Path, tmp_path: Path) -> None:
    said = []
    for blas, cores in (("1", "all"), ("2", "all"), ("2", "one")):
        folder = tmp_path / f"{blas}-{cores}"
        command = [sys.executable, "-c", FIT, str(fixtures / "llama-gqa"), str(folder), cores]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": blas}
        said.append(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert len(said[0].split()) == 5
    assert said[0] == said[1] == said[2]


def test_products_in_pieces_are_products() -> None:
    rng = np.random.default_rng(1)
    left, right = rng.standard_normal((70, 90)), rng.standard_normal((90, 2 * COLUMNS + 5))
    rows = rng.standard_normal((300, TILE + 40))
    total = np.zeros((TILE + 40, TILE + 40), np.float32)
    with worker_pool() as pool:
        found = product(pool, left.astype(np.float32), right.astype(np.float32))
        add_gram(pool, total, rows[:100].astype(np.float32))
        add_gram(pool, total, rows[100:].astype(np.float32))
    mirror(total)
    np.testing.assert_allclose(found, left @ right, rtol=0, atol=1e-4)
    np.testing.assert_allclose(total, rows.T @ rows, rtol=0, atol=1e-3)
    np.testing.assert_allclose(total, total.T, rtol=0, atol=1e-3)
