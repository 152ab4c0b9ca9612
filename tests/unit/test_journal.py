"""A journal is compared with what is there: what changed since is made again, with the bytes of an undisturbed run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edgephi
from edgephi.export.journal import JOURNAL, Journal
from edgephi.export.options import Progress
from edgephi.export.weights.data_file import DataFile
from edgephi.export.weights.layout import Layout, StoredTensor
from tests.tiny_phi import PHI_3, tiny_phi

DATA = "model.onnx.data"
TEXT = "".join(chr(0x4E00 + 3 + index % 50) for index in range(3000))


class Interrupted(BaseException):
    pass


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("journal")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return tiny_phi(folder / "source", PHI_3 | {"num_hidden_layers": 3})


RECIPES: dict[str, dict[str, object]] = {
    "rtn": {"quantize": "rtn"},
    "gptq": {"quantize": "gptq", "head_bits": 4},
    "budget": {"quantize": "rtn", "bits": 5.5},
    "float": {"precision": "fp32"},
}


def export(source: Path, output: Path, recipe: str, **options: object) -> None:
    text = source.parent / "text.txt" if recipe in ("gptq", "budget") else None
    edgephi.export(source, output, calibration=text, **RECIPES[recipe], **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=RECIPES)
def case(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A recipe, and a folder with the undisturbed bundle."""
    folder = tmp_path_factory.mktemp(request.param)
    export(source, folder / "whole", request.param)
    return request.param, folder / "whole"


def lines_of(journal: Path) -> list[str]:
    return journal.read_text(encoding="utf-8").splitlines()[1:] if journal.is_file() else []


def interrupt(source: Path, output: Path, recipe: str, after: str) -> Path:
    """An export that ends once the journal names a group; its staged folder."""
    partial = output.parent / f".{output.name}.partial"

    def stop(progress: Progress) -> None:
        if any(line.endswith(after) for line in lines_of(partial / JOURNAL)):
            raise Interrupted

    with pytest.raises(Interrupted):
        export(source, output, recipe, on_progress=stop)
    assert lines_of(partial / JOURNAL)
    return partial


def truncate(partial: Path) -> None:
    data = partial / DATA
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


def delete(partial: Path) -> None:
    (partial / DATA).unlink()


def zero(partial: Path) -> None:
    (partial / DATA).write_bytes(bytes((partial / DATA).stat().st_size))


def fill(partial: Path) -> None:
    """Every byte, those between the tensors too, and more behind the end."""
    (partial / DATA).write_bytes(b"\xff" * (2 * (partial / DATA).stat().st_size + 200_000))


def flip(partial: Path) -> None:
    vouched = json.JSONDecoder().raw_decode(lines_of(partial / JOURNAL)[0])[0]
    offset = vouched[0][0] if isinstance(vouched, list) and vouched else 0
    with (partial / DATA).open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte[0] ^ 1]))


def invent(partial: Path) -> None:
    """Lines for everything, in the form of earlier versions and of this one."""
    nothing = hashlib.sha256(b"").hexdigest()
    names = ["embed.weight", "head.weight", *(f"layers.{n}{part}" for n in range(3) for part in ("", ".linear"))]
    with (partial / JOURNAL).open("a", encoding="utf-8") as stream:
        for name in [*names, "calibration.npy", "sensitivity.json", "sensitivity.2"]:
            stream.write(f"[] {name}\n" + f'{{}} {name}\n[[0, 0, "{nothing}"]] {name}\n')


def invent_plainly(partial: Path) -> None:
    with (partial / JOURNAL).open("a", encoding="utf-8") as stream:
        stream.writelines(f"{name}\n" for name in ("embed.weight", "head.weight", "layers.1", "layers.2"))


def spoil(partial: Path) -> None:
    (partial / JOURNAL).write_bytes(b"\xff\xfe" + (partial / JOURNAL).read_bytes())


def cut(partial: Path) -> None:
    """As a kill in the middle of a line leaves it."""
    (partial / JOURNAL).write_bytes((partial / JOURNAL).read_bytes()[:-7])


def litter(partial: Path) -> None:
    (partial / "extra.bin").write_bytes(b"not ours")
    (partial / "extra").mkdir()


@pytest.mark.parametrize(
    "change", [truncate, delete, zero, fill, flip, invent, invent_plainly, spoil, cut, litter], ids=lambda f: f.__name__
)
def test_whatever_was_changed_meanwhile_the_bytes_are_those_of_an_undisturbed_run(
    change: Callable[[Path], None], case: tuple[str, Path], source: Path, tmp_path: Path
) -> None:
    recipe, whole = case
    last = {"gptq": "layers.1.linear", "budget": "sensitivity.2"}.get(recipe, "layers.1")
    partial = interrupt(source, tmp_path / "out", recipe, last)
    if (partial / DATA).is_file() or change not in (truncate, delete, zero, fill, flip):
        change(partial)
    export(source, tmp_path / "out", recipe)
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("name", ["calibration.npy", "sensitivity.npy", "sensitivity.json"])
@pytest.mark.parametrize("damage", ["shorter", "other", "away"])
def test_tokens_states_and_sensitivities_are_hashed_too(name: str, damage: str, source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "whole", "budget")
    partial = interrupt(source, tmp_path / "out", "budget", "sensitivity.2")
    (file,) = [path for path in partial.iterdir() if path.name.endswith(name)]
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    if damage == "away":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "shorter" else data)
    export(source, tmp_path / "out", "budget")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_forged_hash_of_what_numpy_cannot_read_ends_in_the_same_bytes(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "whole", "budget")
    partial = interrupt(source, tmp_path / "out", "budget", "sensitivity.2")
    names = ("calibration.npy", "2.sensitivity.npy", "2.sensitivity.json")
    for name in names:
        (partial / name).write_bytes(b"not what it seems")
    hashed = hashlib.sha256(b"not what it seems").hexdigest()
    with (partial / JOURNAL).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({names[0]: hashed}) + f" {names[0]}\n")
        stream.write(json.dumps(dict.fromkeys(names[1:], hashed)) + " sensitivity.2\n")
    export(source, tmp_path / "out", "budget")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_pieces_have_to_cover_a_tensor(tmp_path: Path) -> None:
    first, second = StoredTensor("a", 64, (4, 8), "uint8"), StoredTensor("b", 128, (2, 2), "float32")
    data = DataFile(tmp_path / "data")
    data.write(first, 2, np.full((2, 8), 2, np.uint8))
    data.write(first, 0, np.full((2, 8), 1, np.uint8))
    data.write(second, 0, np.ones((2, 2), np.float32))
    pieces = data.written([first, second])
    assert [piece[:2] for piece in pieces] == [(64, 16), (80, 16), (128, 16)]
    assert data.holds([second, first], pieces)
    for wrong in (pieces[:-1], pieces[1:], [*pieces, pieces[0]], [], None, {}, [(64, 64, pieces[0][2])]):
        assert not data.holds([first, second], wrong)
    assert not data.holds([first], pieces)
    data.write(first, 3, np.zeros((1, 8), np.uint8))
    assert not data.holds([first, second], pieces)
    data.close()


def test_gaps_are_zeros_and_nothing_follows_the_last_tensor(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"\xff" * 300)
    data = DataFile(tmp_path / "data")
    layout = Layout({}, {"a": StoredTensor("a", 64, (8,), "uint8"), "b": StoredTensor("b", 128, (8,), "uint8")}, 136)
    data.clear_gaps(layout)
    data.close()
    kept = (tmp_path / "data").read_bytes()
    assert kept == bytes(64) + b"\xff" * 8 + bytes(56) + b"\xff" * 8


def test_a_journal_that_is_no_journal_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    journal = Journal(path, "key")
    journal.add("a", [(0, 1, "0" * 64)])
    good = path.read_text()
    assert Journal(path, "key").done == {"a": [[0, 1, "0" * 64]]}
    for bad in ("a\n", "[1] a\n", '{"a": 1} a\n', '[[0, 1, "x"]] a\n', "[[]]a\n", "[" * 100_000 + "\n", "\n"):
        path.write_text(good + bad + "[] b\n")
        assert not Journal(path, "key").continues, bad
    path.write_text(good + "[] cut off")
    again = Journal(path, "key")
    assert again.continues and set(again.done) == {"a"}
    again.add("b")
    assert set(Journal(path, "key").done) == {"a", "b"}, "a line behind one that was cut off is a line of its own"


def test_compiled_stages_are_hashed_too(tmp_path: Path) -> None:
    from edgephi.bundle import NpuStage
    from edgephi.export.npu.compile_stages import COMPILED, _already

    stage = NpuStage(
        name="prefill_0_2",
        phase="prefill",
        first_layer=0,
        last_layer=2,
        graph="prefill_0_2.onnx",
        binary="prefill_0_2_qnn.bin",
        nodes=3,
        compile_seconds=1.0,
        compile_peak_bytes=1,
    )
    graph, binary = tmp_path / stage.graph, tmp_path / stage.binary
    line = COMPILED + json.dumps({"qairt": "2.51.0", "stages": [stage.model_dump(mode="json")]})

    def left() -> set[str]:
        return set(_already(Journal(tmp_path / JOURNAL, "key"), tmp_path)[0])

    graph.write_bytes(b"graph")
    binary.write_bytes(b"binary")
    Journal(tmp_path / JOURNAL, "key").add_files(line, tmp_path, graph.name, binary.name)
    assert left() == {stage.name}
    binary.write_bytes(b"Binary")
    assert left() == set()
    binary.unlink()
    assert left() == set()
    binary.write_bytes(b"binary")
    assert left() == {stage.name}
    Journal(tmp_path / JOURNAL, "key").add(COMPILED + "{}")  # invented
    Journal(tmp_path / JOURNAL, "key").add(line.replace("prefill_0_2.onnx", "../x"))
    assert left() == {stage.name}
