"""Guesses verified in the NPU's prompt graph, and prefixes that answers share, on the simulator.

The model copies, and its layers add a little to every token, so that a bit that went wrong in the KV cache shows in the
logits. Runs are counted: the simulator's times say nothing about an NPU's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import edgephi
from edgephi.runtime.engines.npu import NpuEngine
from edgephi.runtime.engines.npu_sequence import NpuSequence
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from tests.tiny_phi import PHI_3, copying_phi, cycle

pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed: pip install edgephi[qnn]")

TARGET = "snapdragon-x-elite"
CHUNK, CONTEXT, CYCLE = 64, 256, 13
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] | replace('X', '" + chr(0x4E00 + 50) + "') }}{% endfor %}"
)
"""The tokenizer has no letters; a prefix ends where conversations differ, and one of those compared begins with X."""
SYSTEM = cycle(CYCLE, 70)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npu")
    shape = PHI_3 | {"num_hidden_layers": 1}
    source = copying_phi(folder / "source", shape, CYCLE, CONTEXT + CHUNK, layers_weigh=0.05)
    (source / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    edgephi.export(source, folder / "bundle", devices=[TARGET], quantize="rtn", npu_numerics="float16")
    return folder / "bundle"


@pytest.fixture(scope="module")
def plain(bundle: Path) -> Iterator[Model]:
    with load(bundle, TARGET, speculation=False) as model:
        yield model


@pytest.fixture(scope="module")
def guessing(bundle: Path) -> Iterator[Model]:
    """As an app loads it: the simulator's prompt graph was measured to compute what its token graph does."""
    with load(bundle, TARGET) as model:
        assert isinstance(model.engine, NpuEngine)
        assert model.engine.may_verify
        yield model


@dataclass
class Runs:
    """Of each graph."""

    prompt: int = 0
    token: int = 0


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    counted, run = Runs(), NpuEngine._run

    def noted(engine: NpuEngine, tokens: list[int], *rest):  # type: ignore[no-untyped-def]
        if len(tokens) == 1:
            counted.token += 1
        else:
            counted.prompt += 1
        return run(engine, tokens, *rest)

    monkeypatch.setattr(NpuEngine, "_run", noted)
    return counted


def said(sequence: NpuSequence, count: int) -> tuple[list[int], NDArray[np.float32]]:
    """Greedy tokens and the logits they were chosen by."""
    rows: list[NDArray[np.float32]] = []

    def choose(row: NDArray[np.float32]) -> int:
        rows.append(row)
        return int(row.argmax())

    return [sequence.step(choose) for _ in range(count)], np.array(rows)


def test_an_answer_that_copies_takes_a_tenth_of_the_runs_and_is_the_same(
    plain: Model, guessing: Model, runs: Runs
) -> None:
    prompt, new = cycle(CYCLE, CYCLE + 4), 40
    expected = plain.generate(prompt, max_new_tokens=new).result()
    assert runs == Runs(prompt=1, token=new - 1)
    runs.prompt = runs.token = 0
    answer = guessing.generate(prompt, max_new_tokens=new).result()
    assert answer.token_ids == expected.token_ids
    assert (expected.guessed_tokens, expected.accepted_tokens) == (0, 0)
    # each run computes the chosen token and the guess, which ends where the text does
    assert runs.prompt + runs.token <= 5
    assert answer.accepted_tokens > new / 2


def test_wrong_guesses_leave_the_logits_of_a_run_without_them(plain: Model, guessing: Model, runs: Runs) -> None:
    """The prompt goes on otherwise behind phrases that the model says, and the conversation behind its answer."""
    other = "".join(chr(0x4E00 + token) for token in range(30, 50))
    prompt = plain.tokenizer.encode(cycle(CYCLE, 6) + other + cycle(CYCLE, 4))
    turn = plain.tokenizer.encode(other[:3])
    sequences = [model.answering_sequence(CONTEXT) for model in (plain, guessing)]
    seen = []
    for sequence in sequences:
        assert isinstance(sequence, NpuSequence)
        sequence.prefill(prompt, lambda: False)
        first = said(sequence, 8)
        sequence.prefill(turn, lambda: False)
        second = said(sequence, 4)
        sequence.rewind(len(prompt) + 2)
        sequence.prefill(turn, lambda: False)
        seen.append((first, second, said(sequence, 4)))
    for (tokens, rows), (expected, expected_rows) in zip(*seen, strict=True):
        assert tokens == expected
        assert np.array_equal(rows, expected_rows)
    guessed, right = sequences[1].guesses
    assert guessed - right > 10
    assert list(sequences[0].tokens) == list(sequences[1].tokens)
    caches = [one.cache.rows(len(one.tokens)) for one in sequences if isinstance(one, NpuSequence)]
    assert all(np.array_equal(rows, caches[1][name]) for name, rows in caches[0].items())


def test_two_answers_and_a_session_reuse_one_prefix(plain: Model, guessing: Model, runs: Runs) -> None:
    asked = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": cycle(CYCLE, n)}] for n in (3, 9)]
    alone = [plain.chat(messages, max_new_tokens=6).result() for messages in asked]
    assert [answer.reused_tokens for answer in alone] == [0, 0]
    runs.prompt = 0
    with guessing.prefix(SYSTEM) as prefix:
        assert (prefix.cost.tokens, prefix.cost.computed_tokens, prefix.cost.restored) == (70, 70, False)
        assert runs.prompt == 2
        shared = [guessing.chat(messages, max_new_tokens=6).result() for messages in asked]
        session = guessing.session(system=SYSTEM, max_new_tokens=6)
        turn = session.say(cycle(CYCLE, 3)).result()
        session.close()
    assert [answer.reused_tokens for answer in (*shared, turn)] == [70, 70, 70]
    assert [answer.token_ids for answer in (*shared, turn)] == [alone[i].token_ids for i in (0, 1, 0)]
    assert all(answer.accepted_tokens for answer in shared), "forks of a prefix guess too"
    assert guessing.chat(asked[0], max_new_tokens=1).result().reused_tokens == 0, "it was let go"


IN_ANOTHER_PROCESS = """
import json, sys
from edgephi import load
with load(sys.argv[1], sys.argv[2], speculation=False) as model, model.prefix(sys.argv[3], saved=True) as prefix:
    messages = [{"role": "system", "content": sys.argv[3]}, {"role": "user", "content": sys.argv[4]}]
    answer = model.chat(messages, max_new_tokens=4).result()
    print(json.dumps([prefix.cost.restored, prefix.cost.computed_tokens, answer.reused_tokens, answer.token_ids]))
"""


def test_a_saved_prefix_is_restored_in_a_new_process(
    bundle: Path, plain: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path))
    with plain.prefix(SYSTEM, saved=True) as prefix:
        assert not prefix.cost.restored
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": cycle(CYCLE, 5)}]
        expected = plain.chat(messages, max_new_tokens=4).result()
    arguments = [str(bundle), TARGET, SYSTEM, cycle(CYCLE, 5)]
    done = subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, *arguments], capture_output=True, check=True)
    restored, computed, reused, tokens = json.loads(done.stdout.splitlines()[-1])
    assert (restored, computed, reused) == (True, 0, len(SYSTEM))
    assert tuple(tokens) == expected.token_ids
