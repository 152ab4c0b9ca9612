"""A conversation crosses the length at which a LongRoPE model changes its rope, and stays right.

The reference is transformers, one whole forward for every token: there are no cached keys that could be stale.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import edgephi
from edgephi.bundle import LONG_ROPE_ADAPTER, ModelFacts, read_manifest
from edgephi.commands.terminal.console import statistics
from edgephi.runtime.engines import onnx_sequence as engine_module
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from tests.decoding import Decoder, distance, genai_tokens

SWITCH, CONTEXT = 32, 128  # of the fixture
PROMPT = 26
FP32_TOLERANCE = 1e-4  # of a logit's spread


def text_of(ids: Iterable[int]) -> str:
    """A Chinese character for each token: its code counts from here."""
    return "".join(chr(0x4E00 + int(token)) for token in ids)


def add_tokenizer(folder: Path, vocabulary: int) -> None:
    """Every token is a character, and a conversation is its messages without anything between."""
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": {text_of([index]): index for index in range(vocabulary)}, "merges": []},
    }
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    settings = {"eos_token": text_of([2]), "chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def export_tiny(fixtures: Path, folder: Path, **changes: object) -> Path:
    """The fixture as a float32 bundle with a tokenizer, its configuration changed."""
    checkpoint = Path(shutil.copytree(fixtures / "phi3-longrope-long", folder / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text()) | changes
    (checkpoint / "config.json").write_text(json.dumps(config))
    add_tokenizer(checkpoint, config["vocab_size"])
    edgephi.export(checkpoint, folder / "bundle", precision="fp32")
    return folder / "bundle"


@pytest.fixture(scope="module")
def bundle(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(fixtures, tmp_path_factory.mktemp("longrope"))


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[Model]:
    with load(bundle, threads=1, prefix_cache_bytes=0) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def reference(fixtures: Path) -> Mapping[str, NDArray[np.int64]]:
    return np.load(fixtures / "phi3-longrope-long" / "reference.npz")


def test_the_bundle_states_the_switch_and_how_to_compute_long_prompts_in_pieces(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.model.rope_switch == SWITCH
    assert LONG_ROPE_ADAPTER in {entry.path for entry in manifest.files}
    written_before = {key: value for key, value in manifest.model.model_dump().items() if key != "rope_switch"}
    assert ModelFacts.model_validate(written_before).rope_switch is None


def test_an_answer_that_crosses_is_the_references(model: Model, reference: Mapping[str, NDArray[np.int64]]) -> None:
    expected = reference["greedy"].tolist()
    answer = model.generate(text_of(reference["input_ids"][0, :PROMPT]), max_new_tokens=len(expected)).result()
    assert list(answer.token_ids) == expected
    assert answer.recomputed_tokens == SWITCH  # what the cache held when the 33rd token came
    assert "32 computed again" in statistics(answer)


def test_the_logits_on_both_sides_are_the_references(model: Model, reference: Mapping[str, NDArray[np.int64]]) -> None:
    sequence = model.open_sequence(64)
    sequence.prefill(reference["input_ids"][0, :PROMPT].tolist(), lambda: False)
    for token, expected in zip(reference["greedy"], reference["greedy_logits"], strict=True):
        seen: list[NDArray[np.float32]] = []
        assert sequence.step(lambda logits, seen=seen: seen.append(logits.copy()) or int(logits.argmax())) == token
        assert distance(seen[0], expected) < FP32_TOLERANCE


@pytest.mark.parametrize("chunk", [1, 7, 16, 33, 256])
def test_a_long_prompt_in_pieces_equals_the_reference(
    chunk: int, model: Model, reference: Mapping[str, NDArray[np.int64]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", chunk)
    sequence = model.open_sequence(64)
    sequence.prefill(reference["input_ids"][0].tolist(), lambda: False)
    assert sequence.recomputed == 0
    seen: list[NDArray[np.float32]] = []
    sequence.step(lambda logits: seen.append(logits.copy()) or 0)
    assert distance(seen[0], reference["logits"][0, -1]) < FP32_TOLERANCE


def test_a_conversation_that_crosses_between_turns_answers_like_a_fresh_run(
    model: Model, reference: Mapping[str, NDArray[np.int64]]
) -> None:
    ids = reference["input_ids"][0]
    session = model.session(max_new_tokens=4)
    first = session.say(text_of(ids[:20])).result()
    second = session.say(text_of(ids[20:36])).result()
    assert first.recomputed_tokens == 0
    assert second.prompt_tokens == 20 + len(first.text) + 16 > SWITCH
    assert second.reused_tokens == 0
    assert second.recomputed_tokens == 20 + first.new_tokens - 1  # the last token of an answer was not yet cached
    assert second.token_ids == fresh(model, session.messages[:3])
    third = session.say(text_of([50, 51])).result()
    assert third.recomputed_tokens == 0
    assert third.reused_tokens > SWITCH
    assert third.token_ids == fresh(model, session.messages[:5])


def test_a_conversation_rewound_below_the_switch_is_computed_again(
    model: Model, reference: Mapping[str, NDArray[np.int64]]
) -> None:
    ids = reference["input_ids"][0]
    session = model.session(max_new_tokens=4)
    session.say(text_of(ids[:40])).result()
    session.reset()
    short = session.say(text_of(ids[:20])).result()
    assert (short.reused_tokens, short.recomputed_tokens) == (0, 18)
    assert short.token_ids == fresh(model, session.messages[:1])


def fresh(model: Model, messages: tuple[Mapping[str, object], ...]) -> tuple[int, ...]:
    return model.chat(list(messages), max_new_tokens=4).result().token_ids


# --- the switch of the published models, 4,096, which onnxruntime-genai has built in


@pytest.fixture(scope="module")
def published_switch(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(
        fixtures,
        tmp_path_factory.mktemp("longrope-4096"),
        max_position_embeddings=8192,
        original_max_position_embeddings=4096,
    )


@pytest.fixture(scope="module")
def long_prompt() -> NDArray[np.int64]:
    return np.random.default_rng(4096).integers(3, 160, 4092)


def test_greedy_tokens_across_4096_are_those_of_a_graph_without_a_cache(
    published_switch: Path, long_prompt: NDArray[np.int64]
) -> None:
    with load(published_switch, threads=2) as model:
        answer = model.generate(text_of(long_prompt), max_new_tokens=9).result()
        assert answer.recomputed_tokens == 4096
        assert_greedy(published_switch, long_prompt, answer.token_ids)


def test_stock_onnxruntime_genai_crosses_4096_by_itself(published_switch: Path, long_prompt: NDArray[np.int64]) -> None:
    assert_greedy(published_switch, long_prompt, genai_tokens(published_switch, long_prompt, 4200, 9))


def assert_greedy(bundle: Path, prompt: NDArray[np.int64], tokens: tuple[int, ...] | list[int]) -> None:
    """Each token is the most likely one of a run of the graph over everything before it, at once."""
    ids = np.concatenate([prompt, tokens])[None]
    for length in (4095, 4096, 4097, 4098, 4100):
        logits = Decoder(bundle / "model.onnx").feed(ids[:, :length])[0, -1]
        assert logits[ids[0, length]] > logits.max() - 1e-3 * logits.std()
