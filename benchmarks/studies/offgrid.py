"""Every way to four bits on weights that lie on a 4-bit grid, and on the same model's weights taken off it: one table.

    python -m edgephi.benchmarks.studies.offgrid SmolLM2-135M-Instruct.Q4_1.gguf --text FILE --folder DIR
    --llama-python llama/bin/python

The models are made by `benchmarks/off_grid.py`. Each is exported in every way, by the command, in a process of its own
that is measured from outside; llama.cpp quantizes the same files, and edgephi exports what they mean to float32. KL
divergence and top-1 agreement are to the float32 export of the same model, as in `quality`. A row is measured once:
its result lies in the folder, and the next run reads it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgephi.benchmarks import arguments
from edgephi.benchmarks.child_cost import ChildCost, run_and_measure
from edgephi.benchmarks.evaluate.graph_logits import GraphLogits
from edgephi.benchmarks.evaluate.windows import Predictions, figures, score_window
from edgephi.benchmarks.off_grid import write_off_grid
from edgephi.benchmarks.report import circumstances, in_one_line, markdown_table, progress, run
from edgephi.benchmarks.studies.quality import Logits, tokenize
from edgephi.errors import UsageError

LENGTH = 512
"""Tokens of a window."""
PEER = "llama.cpp Q4_K_M"
ON_GRID = "on its grid"
WAYS: dict[str, tuple[str, ...]] = {
    "rtn": ("--quantize", "rtn"),
    "effort fast (weighted)": ("--effort", "fast"),
    "effort balanced": ("--effort", "balanced"),
    "effort best": ("--effort", "best"),
    "effort balanced, blocks of 128": ("--effort", "balanced", "--block-size", "128"),
    "effort best, blocks of 128": ("--effort", "best", "--block-size", "128"),
    "gptq": ("--quantize", "gptq"),
    "gptq, blocks of 128": ("--quantize", "gptq", "--block-size", "128"),
}
"""Options of `edgephi export`, the fast ones first."""
CARRIED_OVER = "auto, from the GGUF file"
FORMATS = ("Q4_0", "Q4_K_M", "Q5_K_M")


@dataclass(frozen=True)
class Model:
    """One of the models that compute the same."""

    name: str
    file: str
    """Name of its GGUF file in the folder."""
    factors: int | None = None
    order: int | None = None


@dataclass(frozen=True)
class Row:
    """What one way costs on one model. Bytes of the data file, or of llama.cpp's GGUF file."""

    model: str
    way: str
    kl_mean: float
    top1_agreement: float
    bytes: int
    seconds: float
    cpu_seconds: float | None
    peak_bytes: int


class _Stored:
    """Logits [windows, LENGTH, vocabulary] in a file, as `Predictions`."""

    def __init__(self, path: Path) -> None:
        self._values: NDArray[np.float32] = np.load(path, mmap_mode="r")

    def logits(self, sequence: int, start: int, stop: int) -> Logits:
        return self._values[sequence, start:stop]


class _Given:
    """Logits [LENGTH, vocabulary] of one window, whatever its number."""

    def __init__(self, values: Logits) -> None:
        self._values = values

    def logits(self, sequence: int, start: int, stop: int) -> Logits:
        return self._values[start:stop]


def models(seeds: Sequence[int]) -> list[Model]:
    """Off the grid by factors, one for each seed; by the order of channels, from the first seed; on the grid."""
    scaled = [Model(f"factors, seed {seed}", f"factors-{seed}.gguf", factors=seed) for seed in seeds]
    return [*scaled, Model("orders", "orders.gguf", order=seeds[0]), Model(ON_GRID, "on-grid.gguf")]


def ways(model: Model, *, llama: bool) -> Iterator[str]:
    """Rows of a model, in the order of the table."""
    if llama:
        yield from (f"llama.cpp {kind}" for kind in FORMATS)
    if model.name == ON_GRID:
        yield CARRIED_OVER
    yield from WAYS


class Study:
    """Measures rows, and keeps their results in a folder.

    Args:
        source: GGUF file.
        folder: for models, bundles, logits and results.
        llama_python: interpreter that has llama-cpp-python; None: edgephi's rows only.
    """

    def __init__(self, source: Path, text: Path, folder: Path, windows: int, llama_python: Path | None) -> None:
        self.source, self.text, self.folder, self.windows = source.resolve(), text, folder.resolve(), windows
        self.llama_python = llama_python
        self._ids: NDArray[np.int64] | None = None

    def row(self, model: Model, way: str) -> Row:
        """The stored result, or a new one.

        Raises:
            EdgephiError: an export or llama.cpp failed, or the text is too short.
        """
        if (stored := self.stored(model, way)) is not None:
            return stored
        result = self._result(model, way)
        place = result.parent
        place.mkdir(exist_ok=True)
        file = self._file(model)
        expected = self._reference(model, file)
        made = place / result.stem
        if way.startswith("llama.cpp "):
            cost = self._quantize(file, made.with_suffix(".gguf"), way.removeprefix("llama.cpp "))
            size = made.with_suffix(".gguf").stat().st_size
            self._export(made.with_suffix(".gguf"), made, ("--precision", "fp32"))
        else:
            cost = self._export(self.source if way == CARRIED_OVER else file, made, WAYS.get(way, ()))
            size = (made / "model.onnx.data").stat().st_size
        kl, agreement = self._score(made, expected)
        if way.startswith("llama.cpp "):
            shutil.rmtree(made)  # float32: five times as large as the bundles that stay
        row = Row(model.name, way, kl, agreement, size, cost.seconds, cost.cpu_seconds, cost.peak_bytes)
        new = result.with_suffix(".new")
        new.write_text(json.dumps({**asdict(row), "windows": self.windows}, indent=1) + "\n", encoding="utf-8")
        new.replace(result)
        return row

    def stored(self, model: Model, way: str) -> Row | None:
        """The result of a run before; None: there is none.

        Raises:
            UsageError: it is of another number of windows.
        """
        result = self._result(model, way)
        if not result.is_file():
            return None
        stored = json.loads(result.read_text(encoding="utf-8"))
        if stored.pop("windows") != self.windows:
            raise UsageError(
                "the results there are of another number of windows",
                where=result,
                remedy="Name another --folder, or the same --windows",
            )
        return Row(**stored)

    def _result(self, model: Model, way: str) -> Path:
        name = re.sub("[ ,()]+", "-", way).strip("-")
        return self.folder / model.file.removesuffix(".gguf") / f"{name}.json"

    def _file(self, model: Model) -> Path:
        path = self.folder / model.file
        if not path.is_file():
            write_off_grid(self.source, path, factors=model.factors, order=model.order)
        return path

    def _reference(self, model: Model, file: Path) -> Predictions:
        """The float32 model's logits, computed once."""
        path = file.with_suffix(".npy")
        if not path.is_file():
            bundle = file.with_name(f"{file.stem}-fp32")
            self._export(file, bundle, ("--precision", "fp32"))
            graph = GraphLogits(bundle, LENGTH)
            new = file.with_suffix(".new.npy")
            np.save(new, np.stack([graph.logits(ids).astype(np.float32) for ids in self._tokens(bundle)]))
            new.replace(path)
            shutil.rmtree(bundle)
        return _Stored(path)

    def _tokens(self, bundle: Path) -> NDArray[np.int64]:
        if self._ids is None:
            self._ids = tokenize([bundle], self.text, self.windows * LENGTH).reshape(self.windows, LENGTH)
        return self._ids

    def _score(self, bundle: Path, expected: Predictions) -> tuple[float, float]:
        graph = GraphLogits(bundle, LENGTH)
        scores = [
            score_window(_Given(graph.logits(ids)), expected, index, ids)
            for index, ids in enumerate(self._tokens(bundle))
        ]
        found, _ = figures(scores)
        assert found.kl_mean is not None and found.top1_agreement is not None
        return found.kl_mean, found.top1_agreement

    def _export(self, file: Path, bundle: Path, options: Sequence[str]) -> ChildCost:
        shutil.rmtree(bundle, ignore_errors=True)  # of a run that was interrupted
        return _measured([sys.executable, "-m", "edgephi", "export", str(file), "--output", str(bundle), *options])

    def _quantize(self, file: Path, target: Path, kind: str) -> ChildCost:
        children = Path(__file__).parents[1] / "compare_runtimes" / "children"
        settings = {"source": str(file), "target": str(target), "type": kind, "threads": os.cpu_count() or 1}
        program = (
            f"import sys; sys.path.insert(0, {str(children)!r}); import with_llama; with_llama.prepare({settings})"
        )
        return _measured([str(self.llama_python), "-c", program])


def _measured(command: Sequence[str]) -> ChildCost:
    with tempfile.TemporaryDirectory() as scratch:
        return run_and_measure(command, folder=Path(scratch), environment=os.environ)


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, each KL beside that of llama.cpp's Q4_K_M of the same model."""
    header = ("model", "way", "KL mean", "÷ Q4_K_M's", "top-1", "MB", "seconds", "processor s", "peak MB")
    peers = {row.model: row.kl_mean for row in rows if row.way == PEER}
    cells = []
    for row in rows:
        ratio = f"{row.kl_mean / peers[row.model]:.2f}" if row.model in peers else "–"
        cpu = "–" if row.cpu_seconds is None else f"{row.cpu_seconds:.0f}"
        quality = (f"{row.kl_mean:#.2g}", ratio, f"{100 * row.top1_agreement:.1f} %")
        cost = (f"{row.bytes / 1e6:.1f}", f"{row.seconds:.0f}", cpu, f"{row.peak_bytes / 1e6:,.0f}")
        cells.append((row.model, row.way, *quality, *cost))
    return markdown_table(header, cells, left=(0, 1))


def side_by_side(rows: Sequence[Row]) -> str:
    """KL divergences in Markdown, a column for each model, and in brackets their ratio to Q4_K_M's of that model."""
    names = list(dict.fromkeys(row.model for row in rows))
    found = {(row.way, row.model): row.kl_mean for row in rows}
    cells = []
    for way in dict.fromkeys(row.way for row in rows):
        line = []
        for name in names:
            kl, peer = found.get((way, name)), found.get((PEER, name))
            ratio = f" ({kl / peer:.2f})" if kl is not None and peer else ""
            line.append("–" if kl is None else f"{kl:#.2g}{ratio}")
        cells.append((way, *line))
    return markdown_table(("KL mean (÷ Q4_K_M's)", *names), cells)


def _seeds(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of seeds; write 5,7")
    return [int(part) for part in parts]


def main() -> None:
    """Parse the command line, measure what is not measured yet, print."""
    parser = argparse.ArgumentParser(
        prog="edgephi.benchmarks.studies.offgrid", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("source", type=arguments.file, metavar="FILE.gguf", help="a llama model, as SmolLM2's")
    parser.add_argument("--text", required=True, type=arguments.file, metavar="FILE", help="UTF-8 text")
    parser.add_argument(
        "--folder", required=True, type=arguments.new_folder, metavar="DIR", help="for models, bundles and results"
    )
    parser.add_argument("--seeds", type=_seeds, default=[5, 7], metavar="N,N", help="of the random factors (5,7)")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="windows of 512 tokens to score (8)")
    parser.add_argument(
        "--llama-python", type=arguments.interpreter, metavar="PYTHON", help="interpreter with llama-cpp-python"
    )
    parser.add_argument("--stored", action="store_true", help="print what is in --folder, and measure nothing")
    given = parser.parse_args()
    if given.windows < 1:
        raise UsageError("there is nothing to score", remedy="Take at least one window")
    given.folder.mkdir(parents=True, exist_ok=True)
    study = Study(given.source, given.text, given.folder, given.windows, given.llama_python)
    order = [(model, way) for model in models(given.seeds) for way in ways(model, llama=bool(given.llama_python))]
    with progress("measuring", len(order)) as advance:
        rows = []
        for model, way in order:
            row = study.stored(model, way) if given.stored else study.row(model, way)
            rows += [row] if row else []
            advance()
    print(f"{side_by_side(rows)}\n\n{table(rows)}")
    print(f"\n{given.text.name}: {given.windows * (LENGTH - 1):,} predictions; KL in nats.")
    print(in_one_line(circumstances("onnxruntime", "numpy")))


if __name__ == "__main__":
    run(main)
