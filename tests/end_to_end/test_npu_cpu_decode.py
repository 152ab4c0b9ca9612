"""Prompts on the NPU, tokens on the CPU, one KV cache: what an ordinary bundle for the CPU answers.

The NPU is QAIRT's x86 simulator. Phi-4-mini rotates a part of every head, for which the NPU's graphs reorder its
channels; the reference's do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import edgephi
from edgephi.bundle import check_bundle, read_manifest
from edgephi.devices.ai_hub.graphs import hub_graphs
from edgephi.errors import BundleError, DeviceError, UsageError
from edgephi.runtime.engines.npu import NpuEngine, open_npu
from edgephi.runtime.engines.npu_sequence import NpuSequence
from edgephi.runtime.loading import load
from edgephi.runtime.placement.report import placement_report
from tests.decoding import Decoder, build_graph, genai_tokens
from tests.tiny_phi import PHI_3, PHI_4_MINI, TOKENS, tiny_phi

pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed: pip install edgephi[qnn]")

SPLIT = "snapdragon-x-elite-cpu-decode"
CONTEXT, NEW, END = 256, 3, 2
LOGITS = 0.05
"""Largest difference of a logit; the logits' standard deviation is 1."""


@dataclass(frozen=True)
class Pair:
    """The same decoder in both phases' places, and wholly on the CPU."""

    npu: NpuEngine
    reference: Path
    """An int4 graph in float32."""
    folder: Path


@pytest.fixture(scope="module", params=[PHI_3, PHI_4_MINI], ids=["phi-3", "phi-4-mini"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("npu")
    source = tiny_phi(folder / "source", request.param, CONTEXT + 64)
    edgephi.export(source, folder / "bundle", devices=[SPLIT], quantize="rtn", accuracy_level=1)
    npu = open_npu(folder / "bundle", "npu-simulator")
    yield Pair(npu, build_graph(source, folder / "reference", "int4"), folder / "bundle")
    npu.close()


@dataclass(frozen=True)
class Said:
    """Greedy tokens and the logits [count, vocabulary] they were chosen by."""

    tokens: list[int]
    logits: NDArray[np.float32]

    @property
    def clear(self) -> bool:
        """No near-tie: an error within bounds chooses the same tokens."""
        best = np.sort(self.logits, axis=-1)
        return bool((best[:, -1] - best[:, -2] > 2 * LOGITS).all()) and END not in self.tokens


def answer(engine: NpuSequence, prompt: list[int], count: int = NEW) -> Said:
    seen: list[NDArray[np.float32]] = []

    def choose(logits: NDArray[np.float32]) -> int:
        seen.append(logits)
        return int(logits.argmax())

    assert engine.prefill(prompt, lambda: False)
    return Said([engine.step(choose) for _ in range(count)], np.array(seen))


def on_the_cpu(decoder: Decoder, prompt: list[int], count: int = NEW) -> Said:
    tokens: list[int] = []
    logits = [decoder.feed(np.array([prompt]))[0, -1]]
    tokens.append(int(logits[0].argmax()))
    while len(tokens) < count:
        logits.append(decoder.feed(np.array([tokens[-1:]]))[0, -1])
        tokens.append(int(logits[-1].argmax()))
    return Said(tokens, np.array(logits))


def clear_turns(pair: Pair, lengths: tuple[int, ...]) -> tuple[list[list[int]], list[Said]]:
    """Prompts of a conversation and the reference's answers to them."""
    for seed in range(100):
        rng, decoder = np.random.default_rng(seed), Decoder(pair.reference)
        turns = [rng.integers(3, TOKENS, length).tolist() for length in lengths]
        said: list[Said] = []
        for turn in turns:
            pending = said[-1].tokens[-1:] if said else []
            said.append(on_the_cpu(decoder, [*pending, *turn]))
        if all(one.clear for one in said):
            return turns, said
    raise AssertionError("no conversation without near-ties")


@pytest.mark.parametrize(
    "lengths",
    [(1,), (63,), (64,), (65,), (127,), (200,), (10, 1, 70)],
    ids=str,
)
def test_prompts_and_conversations_are_answered_as_by_the_cpu(pair: Pair, lengths: tuple[int, ...]) -> None:
    turns, expected = clear_turns(pair, lengths)
    engine = pair.npu.sequence(CONTEXT)
    for turn, said in zip(turns, expected, strict=True):
        computed = answer(engine, turn)
        assert np.abs(computed.logits - said.logits).max() < LOGITS
        assert computed.tokens == said.tokens
    assert len(engine.tokens) == sum(lengths) + NEW * len(lengths) - 1


def test_what_is_rewound_leaves_no_trace(pair: Pair) -> None:
    (first,), _ = clear_turns(pair, (63,))
    (second,), (expected,) = clear_turns(pair, (65,))
    engine = pair.npu.sequence(CONTEXT)
    answer(engine, [*second[:20], *first])
    assert engine.reuse(second) == 20
    computed = answer(engine, second[20:])
    assert computed.tokens == expected.tokens
    assert np.abs(computed.logits - expected.logits).max() < LOGITS
    engine.rewind(len(second) + 1)  # into the answer, whose rows the CPU wrote
    again = answer(engine, expected.tokens[1:2], NEW - 2)
    assert again.tokens == expected.tokens[2:]


def test_guesses_are_verified_on_the_npu_where_that_is_asked_for(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU computes a token in float32, the NPU in float16: near, and not the same."""
    assert not pair.npu.measure_verification()
    assert not pair.npu.may_verify
    prompt, seen = [3, 4, 5, 6, 7, 8, 9] * 3, []
    for asked in (False, True):
        monkeypatch.setattr(pair.npu, "_may_verify", asked)
        engine = pair.npu.sequence(CONTEXT, speculate=True)
        engine.prefill(prompt, lambda: False)
        engine.step(lambda row: prompt[0])  # so that what follows it is looked up
        seen.append(answer(engine, [], 1))
        engine.rewind(len(prompt))
        assert bool(engine.guesses[0]) == asked
    assert np.abs(seen[0].logits - seen[1].logits).max() < LOGITS


def test_prompts_run_on_the_npu_and_tokens_on_the_cpu(pair: Pair) -> None:
    """One token of a prompt, too: the NPU computes it in a padded chunk."""
    ran: list[str] = []
    run_stage = pair.npu._run_stage

    def noted(stage, *rest):  # type: ignore[no-untyped-def]
        ran.append(f"{stage.phase} {next(iter(stage.placement.nodes_per_provider))}")
        return run_stage(stage, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair.npu, "_run_stage", noted)
        engine = pair.npu.sequence(CONTEXT)
        for prompt in ([5] * 65, [5]):
            answer(engine, prompt, 2)
    prompt, token = "prefill QNNExecutionProvider", "decode CPUExecutionProvider"
    assert ran == [prompt, prompt, token, prompt, token]


def test_every_answer_and_report_say_which_phase_ran_where(pair: Pair) -> None:
    with load(pair.folder, SPLIT) as model:
        said = model.generate("丅丆万", max_new_tokens=3).result()
        placed = model.placement
    assert (said.prefill_provider, said.provider, said.new_tokens) == ("qnn", "cpu", 3)
    place = placement_report(pair.folder, SPLIT)
    assert place.as_json()["provider"] == "qnn"
    assert place.as_json()["decode_provider"] == "cpu"
    assert place.placement == placed
    operators = {one.provider: one.op_types for one in placed.providers}
    assert operators["QNNExecutionProvider"] == {"com.microsoft::EPContext": 1}
    # four products and an attention to a layer, and the head
    assert operators["CPUExecutionProvider"]["com.microsoft::MatMulNBits"] == 4 * 2 + 1
    assert operators["CPUExecutionProvider"]["com.microsoft::GroupQueryAttention"] == 2


def test_the_manifest_and_the_folder_hold_one_copy_of_the_weights_for_tokens(pair: Pair) -> None:
    manifest = read_manifest(pair.folder)
    check_bundle(pair.folder, manifest, every_byte=True)
    npu = manifest.npu
    assert npu is not None
    assert (npu.target, npu.tokens_on, npu.token_graph) == (SPLIT, "cpu", "decode_0_2.onnx")
    assert [(stage.name, stage.phase) for stage in npu.stages] == [("prefill_0_2", "prefill")]
    names = {path.name for path in pair.folder.iterdir()}
    assert names == {entry.path for entry in manifest.files} | {"edgephi.json"}
    assert {"decode_0_2.onnx", "layers.onnx.data", "prefill_0_2_qnn.bin"} < names
    assert [graph.files[0].path for graph in hub_graphs(pair.folder)] == ["prefill_0_2.onnx"]


def test_a_profile_with_another_order_is_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokens on the CPU, and snapdragon-x-elite wants it on the NPU.*cpu-decode"):
        load(pair.folder, "snapdragon-x-elite")
    with pytest.raises(DeviceError, match="only its simulator"):
        load(pair.folder, "auto")
    with pytest.raises(UsageError, match=r"tokens on the CPU, which has no graph of w4a16"):
        edgephi.export(pair.folder, tmp_path / "w4a16", devices=[SPLIT], npu_numerics="w4a16")


def test_a_profile_of_ones_own_asks_for_it(tmp_path: Path) -> None:
    source = tiny_phi(tmp_path / "source", PHI_3 | {"num_hidden_layers": 1}, 128)
    own = (Path(edgephi.__file__).parents[1] / "devices/profiles" / f"{SPLIT}.toml").read_text(encoding="utf-8")
    profile = tmp_path / "mine.toml"
    profile.write_text(own.replace(f'"{SPLIT}"', '"mine"'), encoding="utf-8")
    manifest = edgephi.export(source, tmp_path / "bundle", devices=[str(profile)], quantize="rtn")
    assert manifest.npu is not None and (manifest.npu.target, manifest.npu.tokens_on) == ("mine", "cpu")
    with load(tmp_path / "bundle", profile) as model:
        assert model.place.choice.decode_provider == "cpu"
    with pytest.raises(BundleError, match="tokens on the CPU, and snapdragon-x-elite wants it on the NPU"):
        load(tmp_path / "bundle", "snapdragon-x-elite")


@pytest.mark.usefixtures("qnn_in_genai")
@pytest.mark.parametrize("length", [64, 127])
def test_stock_genai_runs_the_folder_to_the_same_tokens(pair: Pair, length: int) -> None:
    (prompt,), (expected,) = clear_turns(pair, (length,))
    config = json.loads((pair.folder / "genai_config.json").read_text(encoding="utf-8"))
    assert config["model"]["type"] == "decoder-pipeline"
    assert genai_tokens(pair.folder, prompt, CONTEXT + 64, NEW) == expected.tokens
