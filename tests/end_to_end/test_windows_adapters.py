"""LoRA adapters through `edgephi.windows`, on a tiny bundle that takes them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgephi
from edgephi.errors import AdapterError, UsageError
from edgephi.export.adapter import convert_adapter
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.windows import (
    GenerateStructuredJsonResponseStatus,
    LanguageModel,
    LanguageModelLowRankAdapter,
    LanguageModelOptions,
    LanguageModelResponseStatus,
    use_model,
)
from tests.lora import TINY, random_adapter
from tests.tiny_phi import PHI_3, tiny_phi
from tests.windows_phi import CONTEXT, TEMPLATE, run

Status = LanguageModelResponseStatus
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in float32, adapters `one` and `two` for it, and `other` for a model of other sizes."""
    made = tmp_path_factory.mktemp("windows-adapters")
    for name, seed in (("bundle", 0), ("another", 1)):
        source = tiny_phi(made / f"{name}-source", PHI_3, CONTEXT, seed, ascii_text=True)
        (source / "chat_template.jinja").write_text(TEMPLATE)
        edgephi.export_model(source, made / name, precision="fp32", lora=8)
    for seed, (name, base) in enumerate((("one", "bundle"), ("two", "bundle"), ("other", "another"))):
        convert_adapter(random_adapter(made / name, TINY, seed=seed), made / base, made / f"{name}.onnx_adapter")
    return made


@pytest.fixture
def phi(folder: Path) -> Iterator[Model]:
    files = {name: folder / f"{name}.onnx_adapter" for name in ("one", "two")}
    with load(folder / "bundle", threads=1, adapters=files) as model:
        use_model(model)
        yield model


def created(file: Path) -> LanguageModelLowRankAdapter:
    made = LanguageModelLowRankAdapter.create_from_path(file)
    assert made.low_rank_adapter is not None and made.extended_error is None
    return made.low_rank_adapter


def with_adapter(adapter: LanguageModelLowRankAdapter | None) -> LanguageModelOptions:
    return LanguageModelOptions(temperature=0, max_new_tokens=NEW, low_rank_adapter=adapter)


def test_an_answer_is_that_of_its_adapter(phi: Model, folder: Path) -> None:
    expected = {
        name: phi.chat("Hello", adapter=name, max_new_tokens=NEW).result().text for name in (None, "one", "two")
    }
    assert len(set(expected.values())) == 3
    one, two = created(folder / "one.onnx_adapter"), created(folder / "two.onnx_adapter")

    async def program(model: LanguageModel) -> None:
        for adapter, name in ((one, "one"), (None, None), (two, "two"), (one, "one")):
            result = await model.generate_response_async("Hello", with_adapter(adapter))
            assert (result.status, result.text) == (Status.Complete, expected[name])
        both = await asyncio.gather(
            *[model.generate_response_async("Hello", with_adapter(adapter)) for adapter in (one, two, None)]
        )
        assert [result.text for result in both] == [expected[name] for name in ("one", "two", None)]

    run(program)
    assert phi.adapters == ("one", "two"), "a language model that was closed leaves none in the model"


def test_a_conversation_goes_on_with_another_adapter(phi: Model, folder: Path) -> None:
    def said(adapters: list[str | None]) -> list[str]:
        messages: list[dict[str, object]] = [{"role": "system", "content": "Be brief."}]
        answers = []
        for adapter in adapters:
            messages.append({"role": "user", "content": "Hello"})
            answers.append(phi.chat(messages, adapter=adapter, max_new_tokens=NEW).result().text)
            messages.append({"role": "assistant", "content": answers[-1]})
        return answers

    one, two = created(folder / "one.onnx_adapter"), created(folder / "two.onnx_adapter")

    async def program(model: LanguageModel) -> None:
        context = model.create_context("Be brief.")
        answers = [
            (await model.generate_response_async(context, "Hello", with_adapter(adapter))).text
            for adapter in (one, None, two)
        ]
        assert answers == said(["one", None, "two"])

    run(program)


def test_a_wrong_adapter_is_a_status(phi: Model, folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.onnx_adapter"
    damaged.write_bytes((folder / "one.onnx_adapter").read_bytes()[:-2000])
    right, schema = created(folder / "one.onnx_adapter"), '{"type": "object", "additionalProperties": false}'

    async def program(model: LanguageModel) -> None:
        for file, said in ((folder / "other.onnx_adapter", "another base"), (damaged, "damaged.onnx_adapter")):
            wrong = with_adapter(created(file))
            context = model.create_context()
            for arguments in (("Hello", wrong), (context, "Hello", wrong)):
                result = await model.generate_response_async(*arguments)  # type: ignore[arg-type]
                assert (result.status, result.text) == (Status.IncompatibleLowRankAdapter, "")
                assert isinstance(result.extended_error, AdapterError) and said in str(result.extended_error)
            json = await model.generate_structured_json_response_async("Hello", schema, wrong)
            assert json.status == GenerateStructuredJsonResponseStatus.Error
            again = await model.generate_response_async(context, "Hello", with_adapter(right))
            assert again.status == Status.Complete, "the context is as it was"

    run(program)


def test_an_adapter_of_peft_is_refused_with_the_command_that_converts_it(
    phi: Model, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "one", tmp_path / "my adapter")
    adapter = created(tmp_path / "my adapter" / "adapter_model.safetensors")

    async def program(model: LanguageModel) -> None:
        result = await model.generate_response_async("Hello", with_adapter(adapter))
        assert result.status == Status.IncompatibleLowRankAdapter and isinstance(result.extended_error, AdapterError)
        assert f'edgephi adapter convert "{adapter.path.parent}"' in result.extended_error.remedy
        assert f'--bundle "{phi.folder}"' in result.extended_error.remedy

    run(program)


@pytest.mark.parametrize("content", [None, b"", b"no adapter at all", "folder"])
def test_a_file_that_is_no_adapter_is_a_result(content: bytes | str | None, tmp_path: Path) -> None:
    path = tmp_path / "one.onnx_adapter"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    made = LanguageModelLowRankAdapter.create_from_path(path)
    assert made.low_rank_adapter is None and isinstance(made.extended_error, AdapterError)
    assert "edgephi adapter convert" in made.extended_error.remedy


def test_closing_takes_it_out_of_the_model(phi: Model, folder: Path) -> None:
    adapter = created(folder / "one.onnx_adapter")

    async def program(model: LanguageModel) -> None:
        with await LanguageModel.create_async() as second:
            for each in (model, second):
                result = await each.generate_response_async("Hello", with_adapter(adapter))
                assert result.status == Status.Complete, "two language models may have one model and one adapter"
            assert len(phi.adapters) == 4
            adapter.close()
            adapter.close()
            assert phi.adapters == ("one", "two")
        with pytest.raises(UsageError, match="the adapter is closed"):
            model.generate_response_async("Hello", with_adapter(adapter))

    run(program)


def test_what_asks_for_a_closed_one_is_told_at_once(folder: Path) -> None:
    adapter = created(folder / "one.onnx_adapter")
    adapter.close()
    released: list[bool] = []
    adapter.on_close(lambda: released.append(True))
    assert released == [True], "an answer that began before it was closed leaves none in the model"
