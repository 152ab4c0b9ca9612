"""Reading GGUF: the same metadata and values as the gguf package, and damaged files are named."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgephi.errors import EdgephiError, SourceError, UnsupportedModelError, WeightError
from edgephi.export.checkpoint.gguf import open_gguf, read_gguf_header
from edgephi.export.checkpoint.tensors import read_rows
from edgephi.export.families import describe

HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 64, 96, 4, 2, 40


def write_llama(path: Path, quantization: str = "F32", extra: str = "") -> dict[str, np.ndarray]:
    """A one-layer llama as llama.cpp's converter writes it (q and k rows with rotary pairs side by side)."""
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_v.weight": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (INNER, HIDDEN),
        "blk.0.ffn_up.weight": (INNER, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, INNER),
    }
    if extra:
        shapes[extra] = (HIDDEN,)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_array("test.texts", ["a", "ü", ""])
    writer.add_array("test.numbers", [1, 2, 3])
    for name, values in tensors.items():
        if quantization == "F32" or values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType[quantization]
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


SCALES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}
SCALES["Q6_K"] = [208]
"""Where the float16 numbers of a block lie: ggml-org/llama.cpp, ggml/src/ggml-common.h."""


def write_blocks(path: Path, quantization: str, rows: int, columns: int) -> None:
    """One matrix of random blocks: every bit pattern is a valid one as long as the float16 scales are finite."""
    rng = np.random.default_rng(2)
    kind = gguf.GGMLQuantizationType[quantization]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // values, size), np.uint8)
    for at in SCALES[quantization]:
        blocks[:, at : at + 2] = rng.standard_normal((len(blocks), 1)).astype(np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", blocks.reshape(rows, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_llama(tmp_path / "m.gguf")
    return tmp_path / "m.gguf"


def test_metadata_equals_the_gguf_package(smollm2_gguf: Path) -> None:
    metadata, tensors = read_gguf_header(smollm2_gguf)
    reader = gguf.GGUFReader(smollm2_gguf)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert metadata == theirs
    assert [(ref.name, ref.offset, ref.bytes) for ref in tensors] == [
        (tensor.name, tensor.data_offset, tensor.n_bytes) for tensor in reader.tensors
    ]


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_values_equal_the_gguf_package(quantization: str, tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", quantization)
    refs = {ref.name: ref for ref in read_gguf_header(tmp_path / "m.gguf")[1]}
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        ref = refs[tensor.name]
        np.testing.assert_array_equal(read_rows(ref, 0, ref.shape[0]), expected)
        np.testing.assert_array_equal(read_rows(ref, 5, 9), expected[5:9])


@pytest.mark.parametrize("quantization", SCALES)
def test_random_blocks_equal_the_gguf_package_whole_and_in_slices(quantization: str, tmp_path: Path) -> None:
    write_blocks(tmp_path / "m.gguf", quantization, 40, 512)
    (ref,) = read_gguf_header(tmp_path / "m.gguf")[1]
    (tensor,) = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert ref.shape == expected.shape == (40, 512)
    assert np.isfinite(expected).all()
    for start, stop in [(0, 40), (0, 1), (39, 40), (5, 38)]:
        rows = read_rows(ref, start, stop)
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, expected[start:stop])
    # rotary pairs put back in halves, for a slice that begins and ends inside heads of 8 rows
    halves = expected.reshape(5, 4, 2, 512).swapaxes(1, 2).reshape(40, 512)
    np.testing.assert_array_equal(read_rows(replace(ref, interleaved_head_dim=8), 3, 21), halves[3:21])


@pytest.mark.parametrize("quantization", SCALES)
def test_reading_a_slice_takes_a_small_multiple_of_its_float32_size(quantization: str, tmp_path: Path) -> None:
    write_blocks(tmp_path / "m.gguf", quantization, 2048, 1024)
    (ref,) = read_gguf_header(tmp_path / "m.gguf")[1]
    read_rows(ref, 0, 16)
    tracemalloc.start()
    rows = read_rows(ref, 0, 1024)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * rows.nbytes


@pytest.mark.parametrize("quantization", SCALES)
def test_rows_that_are_no_multiple_of_a_block_are_refused(quantization: str, tmp_path: Path) -> None:
    """Even where the file has bytes enough: a block would begin in one row and end in the next."""
    path = tmp_path / "m.gguf"
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quantization]][0]
    write_blocks(path, quantization, 2, 2 * block)
    whole = path.read_bytes()
    name = b"token_embd.weight"
    at = whole.index(name) + len(name) + 4

    def with_columns(columns: int, rows: int) -> Path:
        path.write_bytes(whole[:at] + struct.pack("<QQ", columns, rows) + whole[at + 16 :])
        return path

    assert read_gguf_header(with_columns(block, 4))[1][0].shape == (4, block)
    for columns in range(1, 3 * block):
        if columns % block:
            with pytest.raises(WeightError, match=r"token_embd\.weight has rows of \d+ values"):
                read_gguf_header(with_columns(columns, 4 * block // columns or 1))
    for columns, rows in [(2**63, 2), (block, 2**62), (2**64 - block, 1), (4 * block, 2)]:
        with pytest.raises(SourceError, match="token_embd"):
            read_gguf_header(with_columns(columns, rows))


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K"])
def test_a_vector_in_blocks_is_refused(kind: str, tmp_path: Path) -> None:
    """A block of a vector has no row to lie in; converters keep norms and biases in F32."""
    path, quantization = tmp_path / "m.gguf", gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[quantization]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("output_norm.weight", np.zeros(256 // values * size, np.uint8), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WeightError, match=rf"output_norm\.weight is a vector stored as {kind}"):
        read_gguf_header(path)


def test_rotary_pairs_return_to_halves(file: Path) -> None:
    tensors = write_llama(file)
    q = open_gguf(file).tensors["model.layers.0.self_attn.q_proj.weight"]
    head_dim = HIDDEN // HEADS
    stored = tensors["blk.0.attn_q.weight"].reshape(HEADS, head_dim, HIDDEN)
    # llama.cpp puts row i of the first half at 2i and row i of the second half at 2i + 1
    expected = np.concatenate([stored[:, 0::2], stored[:, 1::2]], axis=1).reshape(HIDDEN, HIDDEN)
    np.testing.assert_array_equal(read_rows(q, 0, HIDDEN), expected)
    np.testing.assert_array_equal(read_rows(q, 7, 35), expected[7:35])
    v = open_gguf(file).tensors["model.layers.0.self_attn.v_proj.weight"]
    np.testing.assert_array_equal(read_rows(v, 0, 4), tensors["blk.0.attn_v.weight"][:4])


def test_metadata_becomes_a_decoder(file: Path) -> None:
    spec = describe(open_gguf(file)).spec
    assert (spec.hidden_size, spec.intermediate_size, spec.heads, spec.kv_heads) == (HIDDEN, INNER, HEADS, KV_HEADS)
    assert (spec.vocabulary_size, spec.context_length, spec.tied_embedding) == (VOCABULARY, 256, True)
    assert spec.rope.inv_freq[1] == pytest.approx(5000.0 ** (-2 / 16), rel=1e-6)


def test_truncation_anywhere_is_an_error(file: Path) -> None:
    whole = file.read_bytes()
    for keep in [0, 3, 8, 20, 100, 500, len(whole) // 2, len(whole) - 1]:
        file.write_bytes(whole[:keep])
        with pytest.raises(SourceError, match=r"m\.gguf"):
            open_gguf(file)


def test_flipped_bytes_in_the_header_never_escape_as_other_errors(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    rng = np.random.default_rng(1)
    for position in rng.integers(0, 1200, 300):
        damaged = bytearray(whole)
        damaged[position] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        try:
            describe(open_gguf(file))
        except EdgephiError as error:
            assert error.remedy


def test_another_architecture_an_unknown_tensor_and_an_unknown_type_are_named(tmp_path: Path) -> None:
    gguf.GGUFWriter(tmp_path / "a.gguf", "mamba").close()
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="mamba"):
        open_gguf(tmp_path / "a.gguf")
    write_llama(tmp_path / "b.gguf", extra="blk.0.attn_q_norm.weight")
    with pytest.raises(UnsupportedModelError, match="attn_q_norm"):
        open_gguf(tmp_path / "b.gguf")
    write_llama(tmp_path / "c.gguf", "Q8_0")
    raw = (tmp_path / "c.gguf").read_bytes()
    name = b"blk.0.ffn_up.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8
    (tmp_path / "c.gguf").write_bytes(raw[:at] + (16).to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises(WeightError, match="IQ2_XXS"):
        open_gguf(tmp_path / "c.gguf")


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(SourceError, match="no GGUF"):
        open_gguf(tmp_path / "x.gguf")
