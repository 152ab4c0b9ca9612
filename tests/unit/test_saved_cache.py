"""A saved KV cache comes back as it was, or not at all."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgephi.errors import EngineError, OutputError
from edgephi.runtime.engines.saved_cache import ROWS, CacheTensor, SavedCache, read_cache, write_cache

KEY = {"bundle": "ab12", "engine": "toy", "onnxruntime": "1.2.3"}
TOKENS = [5, 0, 17]
TENSORS = {
    "key.0": CacheTensor(np.dtype(np.float16), (1, 2, ROWS, 4)),
    "value.0": CacheTensor(np.dtype(np.uint8), (1, 2, ROWS, 4)),
    "key.1": CacheTensor(np.dtype(np.float32), (1, ROWS, 2)),
}


def arrays(rows: int = 3) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    made = {name: rng.integers(0, 200, tensor.shape_for(rows)).astype(tensor.dtype) for name, tensor in TENSORS.items()}
    # a view with gaps, as the rows in use of a larger cache are
    made["key.0"] = np.concatenate([made["key.0"], made["key.0"]], axis=2)[:, :, :rows]
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_cache(tmp_path / "a.cache", KEY, TOKENS, arrays())
    return tmp_path / "a.cache"


def read(file: Path, key: dict[str, str] = KEY, *, capacity: int = 3, vocabulary: int = 18) -> SavedCache:
    return read_cache(file, key, TENSORS, capacity=capacity, vocabulary=vocabulary)


def rewritten(file: Path, change: Callable[[dict[str, Any]], object], data: bytes | None = None) -> Path:
    """The file with another header, and other data if there is any."""
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + (whole[8 + length :] if data is None else data))
    return file


def test_a_cache_comes_back_as_it_was(file: Path) -> None:
    saved = read(file)
    assert saved.tokens == TOKENS
    assert list(saved.tensors) == list(TENSORS)
    for name, array in arrays().items():
        assert saved.tensors[name].dtype == array.dtype
        assert np.array_equal(saved.tensors[name], array)


def test_it_is_a_safetensors_file(file: Path) -> None:
    loaded = safetensors.numpy.load_file(file)
    assert loaded["tokens"].dtype == np.int32
    assert loaded["tokens"].tolist() == TOKENS
    assert np.array_equal(loaded["key.0"], arrays()["key.0"])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes; the folder's permissions count")
def test_only_the_user_may_read_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_cache(tmp_path / "a.cache", KEY, TOKENS, arrays())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.cache").stat().st_mode) == 0o600


def test_an_earlier_file_is_replaced_and_nothing_lies_beside_it(file: Path) -> None:
    write_cache(file, KEY, [1], arrays(1))
    assert read(file).tokens == [1]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="could not be written"):
        write_cache(tmp_path / "none" / "a.cache", KEY, TOKENS, arrays())


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (KEY | {"bundle": "cd"}, "another bundle: 'ab12', and here it is 'cd'"),
        (KEY | {"rope": "long"}, "another rope: 'nothing', and here it is 'long'"),
        ({"bundle": "ab12", "engine": "toy"}, "another onnxruntime: '1.2.3', and here it is 'nothing'"),
    ],
)
def test_a_key_that_differs_is_named(file: Path, key: dict[str, str], what: str) -> None:
    with pytest.raises(EngineError, match=what) as refused:
        read(file, key)
    assert "Delete this file" in refused.value.remedy


def test_more_tokens_than_the_capacity_are_no_damage(file: Path) -> None:
    with pytest.raises(EngineError, match=r"3 tokens, more than the 2") as refused:
        read(file, capacity=2)
    assert "Delete" not in refused.value.remedy


def test_a_token_the_model_does_not_have_is_refused(file: Path) -> None:
    with pytest.raises(EngineError, match="outside the model's vocabulary of 17"):
        read(file, vocabulary=17)


def test_a_negative_token_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "a.cache", KEY, [5, -1, 2], arrays())
    with pytest.raises(EngineError, match="outside the model's vocabulary"):
        read(tmp_path / "a.cache")


def drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda header: header.pop(name)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (drop("key.1"), "tensor key.1"),
        (drop("tokens"), "how many tokens"),
        (drop("__metadata__"), "no saved cache, or of another version"),
        (lambda header: header["__metadata__"].update(format="edgephi-kv-cache-9"), "another version's format"),
        (lambda header: header["__metadata__"].update({"key.more": "x"}), "another more"),
        (lambda header: header["__metadata__"].update(sha256="0" * 64), "SHA-256"),
        (lambda header: header["__metadata__"].pop("sha256"), "SHA-256"),
        (lambda header: header.update(other=header["key.0"]), "tensor other"),
        (lambda header: header["key.0"].update(dtype="F32"), "tensor key.0"),
        (lambda header: header["key.0"].update(shape=[1, 2, 4, 3]), "tensor key.0"),
        (lambda header: header["key.0"].update(data_offsets=[0, 48]), "tensor key.0"),
        (lambda header: header["tokens"].update(shape=[3, 1]), "how many tokens"),
        (lambda header: header["tokens"].update(shape=[True]), "how many tokens"),
        (lambda header: header["tokens"].update(shape=[0]), "how many tokens"),
        (lambda header: header["tokens"].update(shape=[2]), "tensor tokens"),
        (lambda header: header["tokens"].update(shape=[2**60]), "more than the 3"),
    ],
)
def test_a_header_that_saving_would_not_have_written_is_refused(
    file: Path, change: Callable[[dict[str, Any]], object], what: str
) -> None:
    with pytest.raises(EngineError, match=what):
        read(rewritten(file, change))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\0",
        (2**63).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{]",
        (1).to_bytes(8, "little") + b"7",
        (100).to_bytes(8, "little") + b"{}",
    ],
)
def test_what_is_no_saved_cache_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.cache").write_bytes(content)
    with pytest.raises(EngineError):
        read(tmp_path / "a.cache")


def test_a_header_beyond_its_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.cache").open("wb") as stream:
        stream.write((2**33).to_bytes(8, "little"))
        stream.truncate(2**34)  # no byte of it is on the disk
    with pytest.raises(EngineError, match="no saved cache"):
        read(tmp_path / "a.cache")


def test_a_file_that_is_missing_or_a_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such file"):
        read(tmp_path / "none.cache")
    with pytest.raises(EngineError, match="no regular file"):
        read(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_byte_never_becomes_another_cache(file: Path, data: st.DataObject) -> None:
    whole = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] = data.draw(st.integers(0, 255))
    damaged = file.with_name("damaged.cache")
    damaged.write_bytes(whole)
    try:
        saved = read(damaged)
    except EngineError:
        return
    assert saved.tokens == TOKENS
    assert all(np.array_equal(saved.tensors[name], array) for name, array in arrays().items())


@pytest.mark.parametrize("missing", [1, 20, 60])
def test_a_file_cut_short_or_grown_is_refused(file: Path, missing: int) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:-missing])
    with pytest.raises(EngineError, match="bytes instead of"):
        read(file)
    file.write_bytes(whole + b"x")
    with pytest.raises(EngineError, match="bytes instead of"):
        read(file)
