"""Adapter files: edgephi and onnxruntime read what the other writes, and nothing else passes."""

from __future__ import annotations

import dataclasses
import random
import struct
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

import edgephi
from edgephi.adapter_file import MAGIC, AdapterFooter, lora_names, read_adapter, require_fitting, with_footer
from edgephi.bundle import Manifest, read_manifest
from edgephi.errors import AdapterError
from edgephi.export.adapter import convert_adapter
from tests.lora import TINY, random_adapter
from tests.tiny_phi import PHI_3, tiny_phi

FOOTER = AdapterFooter(base="0" * 64, base_name="tiny", trained_on=None, rank=8, modules=8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    edgephi.export_model(tiny_phi(folder / "source", PHI_3, 256), folder / "bundle", precision="fp32", lora=8)
    return folder / "bundle"


@pytest.fixture(scope="module")
def adapter(bundle: Path) -> Path:
    file = bundle.parent / "adapter.onnx_adapter"
    convert_adapter(random_adapter(bundle.parent / "peft", TINY), bundle, file)
    return file


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


def written(path: Path, tensors: dict[str, NDArray[np.generic]], footer: AdapterFooter | None = FOOTER) -> Path:
    """An adapter by onnxruntime's own writer."""
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(values) for name, values in tensors.items()})
    adapter.export_adapter(str(path))
    if footer is not None:
        path.write_bytes(with_footer(path.read_bytes(), footer))
    return path


def test_edgephi_and_onnxruntime_read_the_same(adapter: Path) -> None:
    read = read_adapter(adapter)
    theirs = {
        name: value.numpy() for name, value in ort.AdapterFormat.read_adapter(str(adapter)).get_parameters().items()
    }
    assert read.tensors.keys() == theirs.keys() and len(theirs) == 16
    for name, values in theirs.items():
        assert np.array_equal(read.tensors[name], values) and read.tensors[name].dtype == values.dtype
    assert read.footer is not None and (read.footer.rank, read.footer.modules) == (8, 8)


def test_onnxruntime_alone_runs_the_graph_with_it(bundle: Path, adapter: Path) -> None:
    session = ort.InferenceSession(str(bundle / "model_rows.onnx"), providers=["CPUExecutionProvider"])
    feeds: dict[str, NDArray[np.generic]] = {
        port.name: np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32)
        for port in session.get_inputs()
        if port.name.startswith("past")
    }
    feeds |= {"input_ids": np.arange(3, 20)[None], "attention_mask": np.ones((1, 17), np.int64)}
    loaded, options = ort.LoraAdapter(), ort.RunOptions()
    loaded.Load(str(adapter))
    options.add_active_adapter(loaded)
    by_adapter = session.run(["logits"], feeds, options)[0]
    by_hand = session.run(["logits"], feeds | dict(read_adapter(adapter).tensors))[0]
    assert np.array_equal(by_adapter, by_hand)
    assert not np.allclose(by_hand, session.run(["logits"], feeds)[0])


def test_the_same_adapter_gives_the_same_bytes(bundle: Path, adapter: Path, tmp_path: Path) -> None:
    convert_adapter(bundle.parent / "peft", bundle, tmp_path / "again.onnx_adapter")
    assert (tmp_path / "again.onnx_adapter").read_bytes() == adapter.read_bytes()


def test_damage_is_an_error_and_never_more(adapter: Path, tmp_path: Path) -> None:
    """Bytes of the file's structure, which the tensors' values are not, replaced and cut at random."""
    data, file, rng = adapter.read_bytes(), tmp_path / "damaged.onnx_adapter", random.Random(0)
    structure = [*range(64), *range(len(data) - 600, len(data))]
    zeros = [place for place in range(len(data)) if data[place : place + 4] in (b"\x04\0\0\0", b"\x08\0\0\0")]
    refused = 0
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            place = rng.choice(structure if rng.random() < 0.5 else zeros)
            broken[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        if rng.random() < 0.2:
            del broken[rng.randrange(len(broken)) :]
        file.write_bytes(broken)
        try:
            read_adapter(file)
        except AdapterError:
            refused += 1
    assert refused > 150


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "does not begin"),
        (b"\x0c\0\0\0TORT", "offset leads out"),
        (b"\xff\xff\xff\x7fTORT", "offset leads out"),
        (b"{}" + (2).to_bytes(8, "little") + MAGIC, "its footer"),
        ((2**63).to_bytes(8, "little") + MAGIC, "footer is cut short"),
        (b"PK\x03\x04 a zip", "does not begin"),
    ],
)
def test_what_is_no_adapter_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "x.onnx_adapter"
    file.write_bytes(content)
    with pytest.raises(AdapterError, match=said):
        read_adapter(file)
    with pytest.raises(AdapterError, match="no such file"):
        read_adapter(tmp_path / "missing")
    with pytest.raises(AdapterError, match="no regular file"):
        read_adapter(tmp_path)


def test_tensors_without_values_are_refused(tmp_path: Path) -> None:
    """They take no bytes whatever their other dimension is, and onnxruntime cannot be given them."""
    file = written(tmp_path / "a.onnx_adapter", {"a": np.zeros((0, 3), np.float32)}, None)
    honest = file.read_bytes()
    place = honest.index(struct.pack("<qq", 0, 3))
    for shape in ((0, 3), (0, 2**62), (2**63 - 1, 0)):
        file.write_bytes(honest[:place] + struct.pack("<qq", *shape) + honest[place + 16 :])
        with pytest.raises(AdapterError, match=r"a of shape \["):
            read_adapter(file)


def test_offsets_that_lie_are_refused(tmp_path: Path) -> None:
    """One field after the other of a small file, each with a value that no honest writer puts there."""
    file = written(tmp_path / "a.onnx_adapter", {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, None)
    honest = file.read_bytes()
    assert read_adapter(file).tensors["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    outcomes = set()
    for place in range(0, len(honest) - 3, 2):
        for value in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(honest), len(honest) - 4):
            data = bytearray(honest)
            data[place : place + 4] = struct.pack("<I", value)
            file.write_bytes(data)
            try:
                outcomes.add(str(read_adapter(file).tensors.keys()))
            except AdapterError as problem:
                outcomes.add(problem.what)
    assert len(outcomes) > 5


def test_other_values_than_finite_floats_are_refused(tmp_path: Path) -> None:
    for values, said in (
        (np.array([[1.0, np.nan]], np.float32), "not finite"),
        (np.array([[1.0, -np.inf]], np.float16), "not finite"),
        (np.array([[1]], np.int64), "neither float32 nor float16"),
        (np.array([[1.0]], np.float64), "neither float32 nor float16"),
    ):
        with pytest.raises(AdapterError, match=said):
            read_adapter(written(tmp_path / "a.onnx_adapter", {"a": values}))


def test_an_adapter_is_compared_with_the_bundle(adapter: Path, manifest: Manifest) -> None:
    read = read_adapter(adapter)
    facts, layers, where = manifest.lora, manifest.model.layers, adapter
    assert facts is not None and read.footer is not None
    require_fitting(read, facts, layers, "float32", where)
    a, b = lora_names(1, "attn.o_proj")

    def changed(**tensors: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
        return {**read.tensors, **{{"a": a, "b": b}[name]: values for name, values in tensors.items()}}

    zeros = {rank: (np.zeros((128, rank), np.float32), np.zeros((rank, 128), np.float32)) for rank in (3, 8, 9)}
    for tensors, said in (
        (changed(a=zeros[9][0], b=zeros[9][1]), "rank 9, and the bundle takes up to 8"),
        (changed(a=zeros[3][0]), "have the shapes"),
        (changed(a=zeros[8][1]), "have the shapes"),
        (changed(a=zeros[8][0].astype(np.float16)), "not float32"),
        (changed(a=np.zeros(128, np.float32)), "have the shapes"),
        ({name: values for name, values in read.tensors.items() if name != b}, "have the shapes"),
        ({**read.tensors, "rope_switch": zeros[8][0]}, "no input for the adapter's rope_switch"),
        ({**read.tensors, lora_names(2, "attn.o_proj")[0]: zeros[8][0]}, "no input for the adapter's model.layers.2"),
    ):
        with pytest.raises(AdapterError, match=said):
            require_fitting(dataclasses.replace(read, tensors=tensors), facts, layers, "float32", where)
    small = {name: values for name, values in changed(a=zeros[3][0], b=zeros[3][1]).items() if ".o_proj." in name}
    require_fitting(dataclasses.replace(read, tensors=small), facts, layers, "float32", where)
    with pytest.raises(AdapterError, match="another base: elsewhere"):
        footer = read.footer.model_copy(update={"base": "f" * 64, "base_name": "elsewhere"})
        require_fitting(dataclasses.replace(read, footer=footer), facts, layers, "float32", where)
    with pytest.raises(AdapterError, match="another tool wrote it"):
        require_fitting(dataclasses.replace(read, footer=None), facts, layers, "float32", where)
    with pytest.raises(AdapterError, match="takes no adapters"):
        require_fitting(read, None, layers, "float32", where)
