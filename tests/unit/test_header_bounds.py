"""Headers made to be costly: refused within bounds of memory and time, whatever they hold.

A sparse file of 600 MB took 6.7 GB before, a safetensors header of 100 MB half a minute.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgephi.errors import EdgephiError, SourceError, WeightError
from edgephi.export.checkpoint.gguf import open_gguf, read_gguf_header
from edgephi.export.checkpoint.safetensors import open_folder, read_header
from tests.unit.test_gguf_reader import write_llama

SPARSE = 600 * 2**20
MEMORY = 1 << 30
SECONDS = 20
"""On two cores that others use too; alone the slowest takes 3."""

OPEN = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
from edgephi.errors import EdgephiError
from edgephi.export.families import describe
from edgephi.export.checkpoint.source import open_source
try:
    describe(open_source(sys.argv[1]))
except EdgephiError as error:
    print(type(error).__name__, str(error)[:2000])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_bytes(*values: bytes, tensors: bytes = b"", count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, count, len(values)) + b"".join(values) + tensors


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return text("x.y") + struct.pack("<IIQ", 9, kind, count) + data


def tensors(count: int) -> bytes:
    return b"".join(text(f"t{number}") + struct.pack("<IQIQ", 1, 1, 0, 0) for number in range(count))


GGUF: dict[str, Callable[[], bytes]] = {
    "bytes": lambda: gguf_bytes(array(0, SPARSE - 1000)),
    "floats": lambda: gguf_bytes(array(12, SPARSE // 8 - 1000)),
    "many bytes": lambda: gguf_bytes(array(0, 60_000_000)),
    "texts": lambda: gguf_bytes(array(8, SPARSE // 8 - 1000)),
    "nested": lambda: gguf_bytes(array(9, 4_000_000)),
    "keys": lambda: gguf_bytes(*[text(f"x.{number}") + struct.pack("<IB", 0, 0) for number in range(99_000)]),
    "a long text": lambda: gguf_bytes(text("general.name") + struct.pack("<IQ", 8, SPARSE - 1000)),
    "a long key": lambda: gguf_bytes(struct.pack("<Q", 60_000_000)),
    "tensors": lambda: gguf_bytes(tensors=tensors(99_000), count=99_000),
    "counts": lambda: gguf_bytes(count=2**40),
}

HEADERS: dict[str, Callable[[], bytes]] = {
    "90 MB": lambda: b" " * (90 * 2**20) + b"{}",
    "lists": lambda: b'{"a":[' + b"[]," * 5_000_000 + b"[]]}",
    "objects": lambda: b'{"a":[' + b'{"":0},' * 2_000_000 + b"{}]}",
    "numbers": lambda: b'{"a":[' + b"0," * 7_500_000 + b"0]}",
    "deep": lambda: b'{"a":' + b"[" * 15_000_000 + b"}",
    "tensors": lambda: (
        b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(200_000)) + b"}"
    ),
    "a shape": lambda: b'{"a":{"dtype":"F32","shape":[' + b"9" * 40 + b",1" * 6_000_000 + b'],"data_offsets":[0,0]}}',
    "a name": lambda: b'{"' + b"a" * 15_000_000 + b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
}


def opened(source: Path) -> str:
    """What opening says, in a process that may have `MEMORY`."""
    began = time.perf_counter()
    program = OPEN.format(limit=MEMORY + 2 * 2**30)  # address space: NumPy's threads reserve more than they use
    done = subprocess.run([sys.executable, "-c", program, source], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert time.perf_counter() - began < SECONDS
    *said, peak = done.stdout.splitlines()
    assert int(peak) * 1024 < MEMORY
    return "\n".join(said)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are set as Linux has them")
@pytest.mark.parametrize("case", GGUF)
def test_a_gguf_header_takes_little_whatever_it_holds(case: str, tmp_path: Path) -> None:
    with (tmp_path / "m.gguf").open("wb") as stream:
        stream.write(GGUF[case]())
        stream.truncate(SPARSE)
    said = opened(tmp_path / "m.gguf")
    assert said.split()[0] in ("SourceError", "UnsupportedModelError", "WeightError") and len(said) < 600


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are set as Linux has them")
@pytest.mark.parametrize("case", HEADERS)
def test_a_safetensors_header_takes_little_whatever_it_holds(case: str, fixtures: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((fixtures / "llama-tied" / "config.json").read_bytes())
    header = HEADERS[case]()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    said = opened(tmp_path)
    assert said.split()[0] in ("SourceError", "WeightError") and len(said) < 600


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b'{"a": "' + b"x" * 2_000_000 + b'"}'),
        ("config.json", b'{"hidden_size": ' + b"9" * 4300 + b"}"),
        ("config.json", b'{"model_type": "llama", "model_type": "phi3"}'),
        ("model.safetensors.index.json", b'{"weight_map": {"a": ' + b"1" * 5000 + b"}}"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {' + b",".join(b'"%d": "a"' % n for n in range(200_000)) + b"}}",
        ),
        ("model.safetensors.index.json", b'{"weight_map": {}}'),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "x\\u0000.safetensors"}}'),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "model.safetensors", "a": "b.safetensors"}}'),
    ],
)
def test_json_files_have_bounds_too(name: str, content: bytes, fixtures: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((fixtures / "llama-tied" / "config.json").read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError) as caught:
        open_folder(tmp_path)
    assert len(str(caught.value)) < 1000 and caught.value.remedy


# -- one meaning for every reader --------------------------------------------------------------------------------------


def safetensors(path: Path, header: bytes, data: int = 64) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data))
    return path


@pytest.mark.parametrize(
    ("header", "error", "said"),
    [
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', SourceError, "stands twice"),
        (b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', SourceError, "dtype"),
        (b'{"a":{"dtype":{"F32":1},"shape":[1],"data_offsets":[0,4]}}', SourceError, "dtype"),
        (b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', WeightError, "F99"),
        (b'{"a":{"dtype":"F32","shape":[' + b"1" * 4300 + b'],"data_offsets":[0,4]}}', SourceError, "digits"),
        (b'{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}', SourceError, "malformed"),
        (b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', SourceError, "malformed"),
        (b"\xef\xbb\xbf{}", SourceError, "byte order mark"),
    ],
)
def test_a_header_that_readers_take_differently_is_refused(
    header: bytes, error: type[EdgephiError], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        read_header(safetensors(tmp_path / "f.safetensors", header))


def test_a_hole_between_tensors_hurts_nobody(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]}}).encode()
    assert read_header(safetensors(tmp_path / "f.safetensors", header))[0].bytes == 8


def entry(name: str, size: int, offset: int) -> bytes:
    return text(name) + struct.pack("<IQIQ", 1, size, 0, offset)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (gguf_bytes(*[text("general.name") + struct.pack("<I", 8) + text(name) for name in "ab"]), "stands twice"),
        (gguf_bytes(tensors=entry("a", 16, 0) + entry("b", 16, 32), count=2), "overlaps"),
        (gguf_bytes(tensors=entry("a", 4, 0) + entry("b", 4, 16), count=2), "between two multiples"),
        (gguf_bytes(tensors=entry("a", 4, 2**63), count=1), "ends at"),
        (gguf_bytes(text("general.alignment") + struct.pack("<I?", 7, True)), "alignment"),
        (gguf_bytes(text("general.alignment") + struct.pack("<II", 4, 24)), "alignment"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    ],
)
def test_a_gguf_header_that_contradicts_itself_is_refused(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(data + bytes(512))
    with pytest.raises(SourceError, match=said):
        read_gguf_header(tmp_path / "m.gguf")


@pytest.mark.parametrize(("kind", "name"), [(31, "Q4_0_4_4"), (33, "Q4_0_8_8"), (4, "Q4_2"), (36, "IQ4_NL_4_4")])
def test_a_type_that_llama_cpp_gave_up_is_named(kind: int, name: str, tmp_path: Path) -> None:
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 2, kind, 0)
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(tensors=tensor, count=1) + bytes(512))
    with pytest.raises(WeightError, match=name) as caught:
        read_gguf_header(tmp_path / "m.gguf")
    assert "Q4_0" in caught.value.remedy


@pytest.mark.parametrize("by", ["type", "tensors"])
def test_an_adapter_in_gguf_is_named(by: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    if by == "type":
        writer.add_type("adapter")
    writer.add_tensor("blk.0.attn_q.weight.lora_a" if by == "tensors" else "x", np.ones((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(EdgephiError, match="adapter") as caught:
        open_gguf(tmp_path / "m.gguf")
    assert "llama-export-lora" in caught.value.remedy


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1e-5])
def test_a_gguf_epsilon_that_cannot_be_is_refused_by_key_and_value(value: float, tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    at = whole.index(b"layer_norm_rms_epsilon") + len("layer_norm_rms_epsilon") + 4
    (tmp_path / "m.gguf").write_bytes(whole[:at] + struct.pack("<f", value) + whole[at + 4 :])
    with pytest.raises(EdgephiError, match=r"llama\.attention\.layer_norm_rms_epsilon is "):
        open_gguf(tmp_path / "m.gguf")


def test_a_tensor_that_llama_cpp_skips_does_no_harm(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", extra="blk.0.attn_rot_embd.weight")
    assert not [name for name in open_gguf(tmp_path / "m.gguf").tensors if "rot" in name]
