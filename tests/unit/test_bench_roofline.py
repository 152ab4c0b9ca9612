"""Shares of the machine: bytes and operations counted by hand on small graphs, rates against a second clock."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, ValueInfoProto, helper, numpy_helper, save

from edgephi.benchmarks.bench.report.table import facts, markdown
from edgephi.benchmarks.bench.results import Ceiling, figure
from edgephi.benchmarks.bench.roofline import measure_machine, read_rates, roofline, with_shares
from edgephi.benchmarks.bench.work import Cache, Work, graph_work
from edgephi.errors import BundleError
from tests.bench_reports import case, report

HIDDEN, VOCABULARY, KV_HEADS, HEAD_DIM, CONTEXT = 64, 100, 2, 16, 40


def port(name: str, kind: int, shape: list[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def nbits(name: str, source: str, n: int, k: int, bits: int, scales: str, output: str, level: int) -> object:
    return helper.make_node(
        "MatMulNBits",
        [source, name, scales],
        [output],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=bits,
        block_size=32,
        accuracy_level=level,
    )


def decoder(path: Path, *, window: int = -1, level: int = 4) -> Path:
    """Embedding, a 4-bit projection, attention, a norm weight that two nodes share, an 8-bit head, a cast."""
    arrays = {
        "embedding": np.zeros((VOCABULARY, HIDDEN), np.uint8),
        "embedding_scales": np.zeros((VOCABULARY, 2), np.float16),
        "qkv": np.zeros((128, 2, 16), np.uint8),
        "qkv_scales": np.zeros((128, 2), np.float16),
        "cos": np.zeros((CONTEXT, 8), np.float32),
        "sin": np.zeros((CONTEXT, 8), np.float32),
        "gain": np.zeros(HIDDEN, np.float32),
        "head": np.zeros((VOCABULARY, 2, 32), np.uint8),
        "head_scales": np.zeros((VOCABULARY, 2), np.float16),
    }
    attention = helper.make_node(
        "GroupQueryAttention",
        ["qkv_out", "", "", "past_key_values.0.key", "past_key_values.0.value", "lens", "total", "cos", "sin"],
        ["attended", "present.0.key", "present.0.value"],
        domain="com.microsoft",
        num_heads=4,
        kv_num_heads=KV_HEADS,
        local_window_size=window,
    )
    nodes = [
        helper.make_node("Cast", ["embedding_scales"], ["es"], to=TensorProto.FLOAT),
        helper.make_node(
            "GatherBlockQuantized",
            ["embedding", "input_ids", "es"],
            ["x"],
            domain="com.microsoft",
            bits=8,
            block_size=32,
            gather_axis=0,
            quantize_axis=1,
        ),
        helper.make_node("Mul", ["x", "gain"], ["normed"]),
        helper.make_node("Cast", ["qkv_scales"], ["qs"], to=TensorProto.FLOAT),
        nbits("qkv", "normed", 128, HIDDEN, 4, "qs", "qkv_out", level),
        attention,
        helper.make_node("Mul", ["attended", "gain"], ["last"]),
        helper.make_node("Cast", ["head_scales"], ["hs"], to=TensorProto.FLOAT),
        nbits("head", "last", VOCABULARY, HIDDEN, 8, "hs", "scores", level),
        helper.make_node("Cast", ["scores"], ["logits"], to=TensorProto.FLOAT),
    ]
    past: list[int | str] = ["batch", KV_HEADS, "past", HEAD_DIM]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [
            port("input_ids", TensorProto.INT64, ["batch", "length"]),
            port("lens", TensorProto.INT32, ["batch", 1]),
            port("total", TensorProto.INT32, []),
            port("past_key_values.0.key", TensorProto.FLOAT, past),
            port("past_key_values.0.value", TensorProto.FLOAT, past),
        ],
        [port("logits", TensorProto.FLOAT, ["batch", "length", VOCABULARY])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    save(helper.make_model(graph), path)
    return path


def test_a_decode_step_reads_every_weight_once_and_one_row_of_every_table(tmp_path: Path) -> None:
    found = graph_work(decoder(tmp_path / "model.onnx"))
    embedding = HIDDEN + 2 * 4  # one row of int8 codes, its two scales as float32
    rotary = 2 * 8 * 4
    gain = HIDDEN * 4  # two nodes, one weight
    projection = 128 * 2 * 16 + 128 * 2 * 4
    head = VOCABULARY * HIDDEN + VOCABULARY * 2 * 4
    assert found.weight_bytes == embedding + rotary + gain + projection + head
    one = Cache(KV_HEADS * HEAD_DIM * 4, None)
    assert found.caches == (one, one)


def test_a_prompt_multiplies_every_token_in_the_layers_and_one_in_the_head(tmp_path: Path) -> None:
    found = graph_work(decoder(tmp_path / "model.onnx"))
    assert found.prompt_operations(10) == 10 * 2 * 128 * HIDDEN + 2 * VOCABULARY * HIDDEN
    in_floats = graph_work(decoder(tmp_path / "float.onnx", level=0))
    assert in_floats.prompt_operations(10) == 0
    assert in_floats.weight_bytes == found.weight_bytes


def test_the_cache_is_read_as_far_as_attention_looks_back(tmp_path: Path) -> None:
    found = graph_work(decoder(tmp_path / "model.onnx", window=10))
    per_token = 2 * KV_HEADS * HEAD_DIM * 4
    assert found.step_bytes([4]) == found.weight_bytes + 4 * per_token
    assert found.step_bytes([8, 30]) == found.weight_bytes + 9 * per_token


def test_a_token_is_sent_to_some_of_the_experts(tmp_path: Path) -> None:
    node = helper.make_node("QMoE", ["x", "p", "fc1", "s1"], ["logits"], domain="com.microsoft", k=2)
    graph = helper.make_graph(
        [node],
        "experts",
        [port("x", TensorProto.FLOAT, [1, 8]), port("p", TensorProto.FLOAT, [1, 16])],
        [port("logits", TensorProto.FLOAT, [1, 8])],
        [
            numpy_helper.from_array(np.zeros((16, 8, 4), np.uint8), "fc1"),
            numpy_helper.from_array(np.zeros((16, 8), np.float32), "s1"),
        ],
    )
    save(helper.make_model(graph), tmp_path / "moe.onnx")
    assert graph_work(tmp_path / "moe.onnx").weight_bytes == 2 * (8 * 4 + 8 * 4)


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff\xff")
    with pytest.raises(BundleError, match="graph"):
        graph_work(tmp_path / "model.onnx")


WORK = Work(weight_bytes=1000, caches=(Cache(6, None), Cache(4, 12)), token_operations=50, head_operations=30)
READINGS = {"bandwidth": [4e5, 5e5, 6e5], "int8": [1000.0, 3000.0], "matmul_nbits": [500.0]}


def test_shares_follow_from_time_work_and_ceiling() -> None:
    limits = roofline((READINGS, READINGS), 2, WORK)  # type: ignore[arg-type]
    assert max(limits.bandwidth.per_s.values) == 6e5 and len(limits.bandwidth.per_s.values) == 6
    decode = case("d", "decode", {"decode_tokens_per_s": [100, 50]}, depth=9, prompt_tokens=1, new_tokens=4)
    # timed steps end with 11, 12 and 13 tokens: keys 6 bytes of each, values 4 of the last 12 at most
    read = 1000 + 6 * 12 + 4 * (11 + 12 + 12) / 3
    assert with_shares(decode, WORK, limits).figures["bandwidth_share"].values == pytest.approx(
        (read * 100 / 6e5, read * 50 / 6e5)
    )
    prefill = case("p", "prefill", {"time_to_first_token_s": [0.5]}, prompt_tokens=10)
    assert with_shares(prefill, WORK, limits).figures["int8_share"].median == pytest.approx(530 / 0.5 / 3000)
    floats = Work(1000, (), 0, 0)
    assert with_shares(prefill, floats, limits) == prefill
    unmeasured = case("d", "decode", {}, state="not measured")
    assert with_shares(unmeasured, WORK, limits) == unmeasured


def test_the_report_names_the_ceilings_and_how_they_were_measured() -> None:
    limits = roofline((READINGS,), 2, WORK)  # type: ignore[arg-type]
    made = report(case("d", "decode", {"bandwidth_share": [0.5]}), roofline=limits)
    said = dict(facts(made))
    assert "dot product" in said["memory bandwidth, GB/s"] and "MatMulInteger" in said["int8 peak, GOP/s"]
    assert "of bandwidth, %" in markdown(made) and "MatMulNBits" in markdown(made)
    assert "int8 peak, GOP/s" not in dict(facts(report()))


def test_ceilings_are_measured_in_seconds_and_are_rates_of_this_machine() -> None:
    found = measure_machine(1, 4, 32)
    assert all(value > 0 for values in found.values() for value in values)
    assert min(len(values) for values in found.values()) >= 5
    # between a tenth of a GB/s and a TB/s, one to a hundred thousand billion operations: units, not speed, are tested
    assert 1e8 < figure(found["bandwidth"]).median < 1e12
    assert 1e9 < figure(found["int8"]).median < 1e14
    assert Ceiling(per_s=figure(found["int8"]), method="m").per_s.values


def test_the_array_that_is_read_shrinks_with_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    seen = []
    original = np.ones

    def remember(size: int, dtype: type) -> object:
        seen.append(size * 4)
        return original(size, dtype=dtype)

    class Scarce:
        available = 64 * 2**20

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Scarce)
    monkeypatch.setattr(np, "ones", remember)
    read_rates(1)
    assert seen == [8 * 2**20]
