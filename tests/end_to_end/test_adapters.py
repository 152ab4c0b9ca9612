"""Answers with LoRA adapters: one or none for each request, and nothing computed with one is taken for another's."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import edgephi
from edgephi.errors import AdapterError, EngineError, UsageError
from edgephi.export.adapter import convert_adapter
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.tools.formats import HERMES
from tests.end_to_end.test_command import edgephi as command
from tests.end_to_end.test_command import refused
from tests.lora import TINY, random_adapter
from tests.planted_tools import ENDING, TEMPLATES, add
from tests.tiny_phi import PHI_3, PHI_4_MINI, tiny_phi

SYSTEM = "Answer in one short sentence, and be kind."
QUESTION = "What is the capital of Japan?"
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
NEW = 12
Names = str | None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in float32, adapters `one` and `two`, and the bundle without inputs for them."""
    made = tmp_path_factory.mktemp("adapters")
    source = tiny_phi(made / "source", PHI_3, 1024, ascii_text=True)
    (source / "chat_template.jinja").write_text(TEMPLATES[HERMES] + ENDING)
    edgephi.export_model(source, made / "bundle", precision="fp32", lora=8)
    edgephi.export_model(source, made / "plain", precision="fp32")
    for seed, name in enumerate(("one", "two")):
        convert_adapter(random_adapter(made / name, TINY, seed=seed), made / "bundle", made / f"{name}.onnx_adapter")
    return made


def files(folder: Path) -> dict[str, Path]:
    return {name: folder / f"{name}.onnx_adapter" for name in ("one", "two")}


@pytest.fixture
def model(folder: Path) -> Iterator[Model]:
    with load(folder / "bundle", threads=1, adapters=files(folder)) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[Names, str]:
    """Answers to MESSAGES, each computed by a model that has computed nothing else."""
    texts = {}
    for name in (None, "one", "two"):
        with load(folder / "bundle", threads=1, prefix_cache_bytes=0, adapters=files(folder)) as alone:
            texts[name] = alone.chat(MESSAGES, adapter=name, max_new_tokens=NEW).result().text
    assert len(set(texts.values())) == 3
    return texts


def test_every_request_has_the_adapter_it_names(model: Model, expected: dict[Names, str]) -> None:
    assert model.adapters == ("one", "two")
    for name in ("one", None, "two", None, "one", "one"):
        assert model.chat(MESSAGES, adapter=name, max_new_tokens=NEW).result().text == expected[name]
    texts = {name: model.generate(QUESTION, adapter=name, max_new_tokens=NEW).result().text for name in expected}
    assert len(set(texts.values())) == 3


def test_prompts_share_nothing_with_those_of_another_adapter(model: Model, expected: dict[Names, str]) -> None:
    length = len(model.encode_chat(MESSAGES))
    for name in (None, "one", "two"):
        first = model.chat(MESSAGES, adapter=name, max_new_tokens=NEW).result()
        assert first.reused_tokens == 0, f"{name} began with what another computed"
        again = model.chat(MESSAGES, adapter=name, max_new_tokens=NEW).result()
        assert again.reused_tokens == length - 2
        assert first.text == again.text == expected[name]
    for name in ("one", None, "two"):  # from the tree, since the slots were taken by others
        assert model.chat(MESSAGES, adapter=name, max_new_tokens=NEW).result().reused_tokens == length - 2


def test_the_same_with_one_slot_that_all_take_in_turn(folder: Path, expected: dict[Names, str]) -> None:
    with load(folder / "bundle", threads=1, max_parallel=1, adapters=files(folder)) as model:
        sessions = {name: model.session(system=SYSTEM, adapter=name, max_new_tokens=NEW) for name in expected}
        for name, session in sessions.items():
            assert session.say(QUESTION).result().text == expected[name]
        second = {name: session.say("Why?").result().text for name, session in sessions.items()}
    with load(folder / "bundle", threads=1, prefix_cache_bytes=0, adapters=files(folder)) as alone:
        for name in expected:
            session = alone.session(system=SYSTEM, adapter=name, max_new_tokens=NEW)
            session.say(QUESTION).result()
            assert session.say("Why?").result().text == second[name]


def test_a_kept_prefix_is_its_adapters(model: Model, expected: dict[Names, str]) -> None:
    with model.prefix(SYSTEM, adapter="one") as prefix:
        assert prefix.cost.computed_tokens == len(prefix.tokens)
        assert model.chat(MESSAGES, adapter="two", max_new_tokens=NEW).result().reused_tokens == 0
        assert model.chat(MESSAGES, max_new_tokens=NEW).result().reused_tokens == 0
        answer = model.chat(MESSAGES, adapter="one", max_new_tokens=NEW).result()
        assert answer.reused_tokens >= len(prefix.tokens) and answer.text == expected["one"]


def test_saved_prefixes_are_files_of_their_own(
    folder: Path, expected: dict[Names, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path))
    for process in (0, 1):
        with load(folder / "bundle", threads=1, adapters=files(folder)) as model:
            for name in (None, "one", "two"):
                with model.prefix(SYSTEM, adapter=name, saved=True) as prefix:
                    assert prefix.cost.restored == bool(process), name
                    answer = model.chat(MESSAGES, adapter=name, max_new_tokens=NEW).result()
                    assert answer.reused_tokens >= len(prefix.tokens) and answer.text == expected[name]
    assert len(list((tmp_path / "prefixes").iterdir())) == 3
    # one that lies there under another's name is not believed
    saved = sorted((tmp_path / "prefixes").iterdir())
    contents = [file.read_bytes() for file in saved]
    for file, content in zip(saved, [*contents[1:], contents[0]], strict=True):
        file.write_bytes(content)
    with load(folder / "bundle", threads=1, adapters=files(folder)) as model:
        for name in (None, "one", "two"):
            with model.prefix(SYSTEM, adapter=name, saved=True) as prefix:
                assert not prefix.cost.restored
                assert model.chat(MESSAGES, adapter=name, max_new_tokens=NEW).result().text == expected[name]


def test_a_saved_sequence_goes_on_with_its_adapter_only(model: Model, tmp_path: Path) -> None:
    engine, prompt = model.engine, model.encode_chat(MESSAGES)
    one, two = (model.find_adapter(name) for name in ("one", "two"))
    sequence = engine.sequence(256, adapter=one)
    assert sequence.prefill(prompt, lambda: False)
    sequence.save(tmp_path / "a.cache")
    fork = sequence.fork()
    restored = engine.restore(tmp_path / "a.cache", 256, adapter=one)
    found = restored.reuse([*prompt, 5])
    assert restored.prefill([*prompt, 5][found:], lambda: False) and fork.prefill([5], lambda: False)
    assert sequence.prefill([5], lambda: False)

    def following(cache: object) -> list[int]:
        return [cache.step(lambda row: int(row.argmax())) for _ in range(5)]  # type: ignore[attr-defined]

    assert following(restored) == following(fork) == following(sequence)
    for wrong in (None, two):
        with pytest.raises(EngineError, match="another adapter"):
            engine.restore(tmp_path / "a.cache", 256, adapter=wrong)
    plain = engine.sequence(256)
    assert plain.prefill(prompt, lambda: False)
    plain.save(tmp_path / "b.cache")
    with pytest.raises(EngineError, match="another adapter"):
        engine.restore(tmp_path / "b.cache", 256, adapter=one)


def test_sessions_and_their_forks_keep_an_adapter_that_is_removed(model: Model, expected: dict[Names, str]) -> None:
    session = model.session(system=SYSTEM, adapter="one", max_new_tokens=NEW)
    stream = model.chat(MESSAGES, adapter="one", max_new_tokens=NEW)
    model.remove_adapter("one")
    assert model.adapters == ("two",)
    assert stream.result().text == expected["one"] == session.say(QUESTION).result().text
    branch = session.fork()
    assert branch.say("Why?").result().text == session.say("Why?").result().text
    with pytest.raises(UsageError, match="no adapter 'one'"):
        model.chat(MESSAGES, adapter="one")
    with pytest.raises(UsageError, match="no adapter 'one'"):
        model.remove_adapter("one")
    for use in (model.generate, model.prefix):
        with pytest.raises(UsageError, match="no adapter 'one'"):
            use("Hi", adapter="one")  # type: ignore[operator]
    with pytest.raises(UsageError, match="no adapter 'one'"):
        model.session(adapter="one")


def test_adapters_come_and_go_while_the_model_is_loaded(folder: Path, expected: dict[Names, str]) -> None:
    with load(folder / "bundle", threads=1) as model:
        assert model.adapters == ()
        with pytest.raises(UsageError, match="no adapter 'one'"):
            model.chat(MESSAGES, adapter="one")
        model.add_adapter("one", folder / "one.onnx_adapter")
        assert model.chat(MESSAGES, adapter="one", max_new_tokens=NEW).result().text == expected["one"]
        with pytest.raises(UsageError, match="'one' already"):
            model.add_adapter("one", folder / "two.onnx_adapter")
        model.remove_adapter("one")
        model.add_adapter("one", str(folder / "two.onnx_adapter"))
        assert model.chat(MESSAGES, adapter="one", max_new_tokens=NEW).result().text == expected["two"]
        for name, file in (("", "x"), (3, "x"), ("a", 3)):
            with pytest.raises(UsageError):
                model.add_adapter(name, file)  # type: ignore[arg-type]
        with pytest.raises(AdapterError, match="no such file"):
            model.add_adapter("missing", folder / "missing")


def test_tools_are_called_with_an_adapter(model: Model) -> None:
    for name in (None, "one"):
        run = model.run_tools(QUESTION, [add], tool_choice="required", max_rounds=1, adapter=name, max_new_tokens=60)
        alone = model.chat(QUESTION, tools=[add], tool_choice="required", adapter=name, max_new_tokens=60).result()
        first = run.messages[1]["tool_calls"] if run.calls else None
        assert bool(first) == bool(alone.tool_calls)
        if first:
            assert json.loads(json.dumps(run.calls[0].arguments)) == alone.tool_calls[0].arguments


@pytest.fixture(scope="module", params=[PHI_3, PHI_4_MINI], ids=["phi-3", "phi-4-mini"])
def short(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A bundle whose context, or whose short rope, has 128 tokens, and adapters."""
    folder, shape = tmp_path_factory.mktemp("short"), request.param
    edgephi.export_model(tiny_phi(folder / "source", shape, 128), folder / "bundle", precision="fp32", lora=8)
    modules = TINY if shape is PHI_3 else {**TINY, "self_attn.qkv_proj": (128, 256)}
    given = {name: folder / f"{name}.onnx_adapter" for name in ("one", "two")}
    for seed, (name, file) in enumerate(given.items()):
        convert_adapter(random_adapter(folder / name, modules, seed=seed), folder / "bundle", file)
    return folder / "bundle", given


def test_a_row_between_two_of_another_adapter_may_be_full(short: tuple[Path, dict[str, Path]]) -> None:
    """It gets its last token first, and stands by while the others get theirs."""
    bundle, given = short
    with load(bundle, threads=1, adapters=given) as model:
        rows = [model.open_sequence(128, adapter=model.find_adapter(name)) for name in ("one", "two", "one")]
        for row, length in zip(rows, (20, 127, 20), strict=True):
            assert row.prefill(
                list(range(3, 23)) * 6 + list(range(3, 10)) if length == 127 else [5] * 20, lambda: False
            )
            row.entering = 7, length  # type: ignore[attr-defined]  # the CPU's engine has it
        engine = model.engine
        logits = engine.scheduler.alone(lambda: engine.slots.step([rows[1], rows[0], rows[2]]))  # type: ignore[attr-defined]
        alone: list[NDArray[np.float32]] = []
        for row in rows:
            row.rewind(row.tokens.index(7, len(row.tokens) - 1))
            assert row.prefill([7], lambda: False)
            row.step(lambda values: (alone.append(values.copy()), 0)[1])
    for place, computed in enumerate((logits[1], logits[0], logits[2])):
        np.testing.assert_allclose(computed, alone[place], atol=1e-4)


def test_threads_with_adapters_of_their_own_get_the_answers_they_get_alone(
    short: tuple[Path, dict[str, Path]],
) -> None:
    """With LongRoPE some answers cross from one rope into the other."""
    bundle, given = short
    letters = [chr(0x4E00 + index) for index in range(3, 60)]
    rng = random.Random(3)
    asked = ["".join(rng.choices(letters, k=length)) for length in (20, 40, 121, 118)]
    jobs = [(name, prompt) for name in (None, "one", "two") for prompt in asked]
    with load(bundle, threads=1, prefix_cache_bytes=0, adapters=given) as alone:
        answers = {
            (name, prompt): alone.generate(prompt, adapter=name, max_new_tokens=NEW).result().token_ids
            for name, prompt in jobs
        }
    assert len({answers[name, asked[0]] for name in (None, "one", "two")}) == 3
    wrong: list[object] = []
    with load(bundle, threads=1, max_parallel=4, adapters=given) as model:

        def ask(seed: int) -> None:
            order = random.Random(seed)
            try:
                for name, prompt in order.choices(jobs, k=12):
                    got = model.generate(prompt, adapter=name, max_new_tokens=NEW).result().token_ids
                    if got != answers[name, prompt]:
                        wrong.append((name, prompt, got))
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sizes = model.engine.scheduler.statistics.sizes  # type: ignore[attr-defined]  # the CPU's engine has one
    assert not wrong
    assert any(size > 1 for size in sizes), "nothing was computed together"


def test_guessing_changes_no_answer_of_an_adapter(folder: Path, expected: dict[Names, str]) -> None:
    for speculation in (True, None, False):
        with load(folder / "bundle", threads=1, speculation=speculation, adapters=files(folder)) as model:
            for name in (None, "one", "two"):
                long = model.chat(MESSAGES, adapter=name, max_new_tokens=120, stop_repetition=False).result()
                assert long.text.startswith(expected[name])
                if speculation is False:
                    assert long.guessed_tokens == 0
            if speculation is None:
                engine = model.engine
                adapter = model.find_adapter("one")
                exact = engine.measure_verification(adapter)  # type: ignore[attr-defined]
                assert engine.may_verify(adapter) == (exact and engine.may_verify())  # type: ignore[attr-defined]


def test_engines_and_bundles_without_adapters_refuse_them(folder: Path) -> None:
    with pytest.raises(AdapterError, match=r"takes no adapters.*device='cpu'.*the CPU's engine"):
        load(folder / "bundle", threads=1, engine="genai", adapters=files(folder))
    with load(folder / "bundle", threads=1, engine="genai") as model:
        with pytest.raises(AdapterError, match="takes no adapters"):
            model.add_adapter("one", folder / "one.onnx_adapter")
        with load(folder / "bundle", threads=1, adapters=files(folder)) as other:
            adapter = other.find_adapter("one")
        with pytest.raises(EngineError, match="cannot adapt a sequence"):
            model.engine.sequence(64, adapter=adapter)
        assert model.chat(MESSAGES, max_new_tokens=4).result().new_tokens == 4
    with pytest.raises(AdapterError, match=r"takes no adapters.*--lora RANK"):
        load(folder / "plain", threads=1, adapters=files(folder))
    with load(folder / "plain", threads=1) as model, pytest.raises(EngineError, match="takes no adapters"):
        model.engine.sequence(64, adapter=adapter)
    with pytest.raises(UsageError, match="adapters is "):
        load(folder / "bundle", adapters=[folder / "one.onnx_adapter"])  # type: ignore[arg-type]


def test_commands(folder: Path, expected: dict[Names, str], tmp_path: Path) -> None:
    bundle, peft, file = folder / "bundle", folder / "one", tmp_path / "one.onnx_adapter"
    made = command("adapter", "convert", peft, "--bundle", bundle, "--output", file)
    assert made.returncode == 0 and "rank 8, 8 modules of source" in made.stdout, made.stderr
    assert file.read_bytes() == (folder / "one.onnx_adapter").read_bytes()
    shown = json.loads(command("adapter", "inspect", file, "--json").stdout)
    assert (shown["base"]["name"], shown["rank"], shown["tensors"], shown["type"]) == ("source", 8, 16, "float32")
    assert "source" in command("adapter", "inspect", file).stdout
    assert "LoRA of up to rank 8 behind attn.qkv_proj" in command("inspect", bundle).stdout
    options = ("--max-new-tokens", 8, "--adapter", file)
    answers = [
        json.loads(command("generate", bundle, QUESTION, "--json", *options[: 2 * count]).stdout)["token_ids"]
        for count in (1, 2)
    ]
    assert answers[0] != answers[1]
    said = command("chat", bundle, *options, stdin=QUESTION + "\n")
    assert said.returncode == 0, said.stderr
    refused(command("adapter", "convert", peft, "--bundle", bundle, "--output", file), "already")
    refused(command("adapter", "convert", peft, "--bundle", folder / "plain", "--output", file, "--force"), "--lora")
    refused(command("generate", bundle, QUESTION, "--adapter", bundle / "model.onnx"), "no adapter")


def test_weights_that_are_packed_for_the_processor_take_adapters_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path))
    edgephi.export_model(folder / "source", tmp_path / "int4", quantize="rtn", lora=8)
    answers = []
    for packing in ("never", "now"):
        with load(tmp_path / "int4", threads=1, prepacked=packing, adapters=files(folder)) as model:  # type: ignore[arg-type]
            assert (model.prepacked.folder is not None) == (packing == "now")
            answers.append(
                [model.chat(MESSAGES, adapter=name, max_new_tokens=NEW).result().text for name in (None, "one")]
            )
    assert answers[0] == answers[1] and answers[0][0] != answers[0][1]


def test_a_name_is_a_text(model: Model, folder: Path) -> None:
    for wrong in (None, [], {}, 5, ""):
        with pytest.raises(UsageError, match="name"):
            model.add_adapter(wrong, files(folder)["one"])  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="name"):
            model.remove_adapter(wrong)  # type: ignore[arg-type]
    assert model.adapters == ("one", "two")
