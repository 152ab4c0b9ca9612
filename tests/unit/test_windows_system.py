"""`edgephi.windows` over Windows' own model, against a stand-in of win32more's bindings (tests/windows_bindings.py)."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgephi.errors import DeviceError, EdgephiError, UsageError
from edgephi.installed import install_extra
from edgephi.windows import (
    AIFeatureReadyResultState,
    AIFeatureReadyState,
    ContentFilterOptions,
    ConversationItem,
    ConversationSummaryOptions,
    GenerateStructuredJsonResponseStatus,
    InputKind,
    LanguageModel,
    LanguageModelLowRankAdapter,
    LanguageModelOptions,
    LanguageModelResponseStatus,
    SeverityLevel,
    TextRewriter,
    TextRewriteTone,
    TextSummarizer,
    TextToTableConverter,
    settings,
    use_model,
)
from tests.windows_bindings import (
    CALLS,
    MODULES,
    NativeFilters,
    NativeModel,
    NativeOptions,
    NativeSummaryOptions,
    Operation,
    ReadyResult,
    Result,
)

REFERENCE = json.loads((Path(__file__).parents[1] / "fixtures" / "windows_ai.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with the bindings."""
    for name, members in MODULES.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    CALLS.clear()
    monkeypatch.setattr(settings, "_chosen", None)
    use_model(backend="system")
    yield


def run(program: Callable[[LanguageModel], Any]) -> None:
    async def main() -> None:
        with await LanguageModel.create_async() as model:
            await program(model)

    asyncio.run(main())


def test_the_stand_in_has_no_name_that_windows_has_not() -> None:
    for module in ("Text", "ContentSafety"):
        namespace = f"Microsoft.Windows.AI.{module}"
        for name, stand_in in MODULES[f"win32more.{namespace}"].items():
            known = set(REFERENCE["classes"][f"{namespace}.{name}"])
            names = {re.sub(r"\d+$", "", one) for one in vars(stand_in) if one[0].isupper()}
            assert names <= known, name


def test_readiness_is_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LanguageModel.get_ready_state() == AIFeatureReadyState.NotReady
    monkeypatch.setattr(NativeModel, "ready", 5)
    assert LanguageModel.get_ready_state() == AIFeatureReadyState.NotCompatibleWithSystemHardware
    assert CALLS == [("initialize",)], "the runtime is started once"

    async def main() -> None:
        operation = LanguageModel.ensure_ready_async()
        assert [share async for share in operation] == [0.25, 1.0]
        assert (await operation).status == AIFeatureReadyResultState.Success
        monkeypatch.setattr(NativeModel, "made", ReadyResult(2, "No connection.", failed=True))
        result = await LanguageModel.ensure_ready_async()
        assert (result.status, result.package_installation_failed) == (AIFeatureReadyResultState.Failure, True)
        assert "0x80040005: No connection." in result.error_display_text

    asyncio.run(main())


def test_an_answer_is_windows(tmp_path: Path) -> None:
    async def program(model: LanguageModel) -> None:
        operation = model.generate_response_async("Capital of Japan?")
        assert "".join([delta async for delta in operation]) == "Tokyo."
        result = await operation
        assert (result.text, result.status, result.answer) == ("Tokyo.", LanguageModelResponseStatus.Complete, None)
        name, prompt, options = CALLS[-1]
        assert (name, prompt) == ("GenerateResponseAsync2", "Capital of Japan?")
        assert isinstance(options, NativeOptions) and options.ContentFilterOptions is None
        # with everything that can be set
        (tmp_path / "lora.safetensors").touch()
        adapter = LanguageModelLowRankAdapter.create_from_path(tmp_path / "lora.safetensors").low_rank_adapter
        filters = ContentFilterOptions()
        filters.prompt_max_allowed_severity_level.self_harm = SeverityLevel.Low
        filters.image_max_allowed_severity_level.gory_content_level = SeverityLevel.Minimum
        wanted = LanguageModelOptions(0.1, 0.2, 3, filters, adapter)
        context = model.create_context("Be brief.")
        await model.generate_response_async(context, "Capital of Japan?", wanted)
        name, system, prompt, options = CALLS[-1]
        assert (name, system, prompt) == ("GenerateResponseAsync3", ("Be brief.",), "Capital of Japan?")
        assert isinstance(options, NativeOptions)
        assert (options.Temperature, options.TopP, options.TopK) == (0.1, 0.2, 3)
        levels = options.ContentFilterOptions
        assert (levels.PromptMaxAllowedSeverityLevel.SelfHarm, levels.PromptMaxAllowedSeverityLevel.Hate) == (11, 12)
        assert levels.ImageMaxAllowedSeverityLevel.GoryContentLevel == 10
        assert options.LowRankAdapter == str((tmp_path / "lora.safetensors").resolve())
        context.close()
        assert CALLS[-1] == ("context.Close",)

    run(program)
    assert CALLS[-1] == ("model.Close",)


def test_contexts_are_made_by_windows_overloads() -> None:
    async def program(model: LanguageModel) -> None:
        for arguments, native in (((), ()), (("Be brief.",), ("Be brief.",))):
            await model.generate_response_async(model.create_context(*arguments), "Hello")
            assert CALLS[-1][1] == native
        await model.generate_response_async(model.create_context(None, ContentFilterOptions()), "Hello")
        system, filters = CALLS[-1][1]  # type: ignore[misc]
        assert system == "" and isinstance(filters, NativeFilters)

    run(program)


def test_a_status_of_windows_is_one_here(monkeypatch: pytest.MonkeyPatch) -> None:
    async def program(model: LanguageModel) -> None:
        for status in LanguageModelResponseStatus:
            if status != LanguageModelResponseStatus.Complete:
                monkeypatch.setattr(NativeModel, "answer", Operation(Result("half", status, -0x7FFFBFFB)))
                context = model.create_context()
                result = await model.generate_response_async(context, "Hello")
                assert (result.text, result.status) == ("", status) and "0x80004005" in str(result.extended_error)
                if "Blocked" in status.name and "Moderation" in status.name:
                    with pytest.raises(UsageError, match=status.name):
                        model.generate_response_async(context, "Hello")
        monkeypatch.setattr(
            NativeModel, "answer", Operation(OSError("The group or resource is not in the correct state"))
        )
        result = await model.generate_response_async("Hello")
        assert result.status == LanguageModelResponseStatus.Error and "correct state" in str(result.extended_error)

    run(program)


def test_json_is_windows() -> None:
    async def program(model: LanguageModel) -> None:
        result = await model.generate_structured_json_response_async("Hello", '{"type": "object"}')
        assert CALLS[-1] == ("GenerateStructuredJsonResponseAsync2", "Hello", '{"type": "object"}')
        assert result.status == GenerateStructuredJsonResponseStatus.CompleteWithInvalidStructure
        assert result.text == "{" and result.extended_error is not None
        refused = await model.generate_structured_json_response_async(model.create_context(), "Hello", "{}")
        assert refused.status == GenerateStructuredJsonResponseStatus.Error
        assert "takes no context for JSON" in str(refused.extended_error)

    run(program)


def test_cancelling_reaches_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeModel, "answer", Operation(None, ("Tok",), endless=True))

    async def program(model: LanguageModel) -> None:
        operation = model.generate_response_async("Hello")
        async for _ in operation:
            break
        operation.cancel()
        with pytest.raises(asyncio.CancelledError):
            await operation
        assert ("Cancel",) in CALLS

    run(program)


def test_lengths_are_in_characters() -> None:
    async def program(model: LanguageModel) -> None:
        assert model.get_usable_prompt_length("👍👍👍") == 1, "3 UTF-16 code units are one and a half of them"
        assert model.get_usable_prompt_length(model.create_context(), "👍👍👍") == 1
        assert model.get_usable_prompt_length("abc") == 3
        with pytest.raises(UsageError, match="does not count tokens"):
            model.count_tokens("abc")
        summarizer = TextSummarizer(model)
        assert summarizer.is_prompt_larger_than_context("abcd") == (False, 4)
        assert summarizer.is_prompt_larger_than_context("abcdef") == (True, 3)
        with pytest.raises(UsageError, match="what Windows counts"):
            summarizer.is_prompt_larger_than_context([ConversationItem("Anna", "Hello.")])

    run(program)


def test_skills_are_windows() -> None:
    async def program(model: LanguageModel) -> None:
        summarizer, rewriter = TextSummarizer(model), TextRewriter(model)
        operation = summarizer.summarize_async("Long.")
        assert "".join([delta async for delta in operation]) == (await operation).text == "text: Long."
        assert (await summarizer.summarize_paragraph_async("Long.")).text == "paragraph: Long."
        assert (await rewriter.rewrite_async("Long.", TextRewriteTone.Formal)).text == "Long. in tone 4"
        assert (await rewriter.rewrite_custom_async("Long.", "like a pirate")).text == "Long. like a pirate"
        options = ConversationSummaryOptions(InputKind.Email, include_participant_attribution=True, max_key_points=3)
        result = await summarizer.summarize_conversation_async([ConversationItem("Anna", "Hello.")], options)
        assert result.text == "They greet."
        _, items, native = CALLS[-1]
        assert items == [("Anna", "Hello.")] and isinstance(native, NativeSummaryOptions)
        assert (native.InputKind, native.IncludeParticipantAttribution, native.MaxKeyPoints) == (1, True, 3)
        assert native.IncludeMessageCitations is True, "what is None stays as Windows has it"
        table = await TextToTableConverter(model).convert_async("Tokyo 14")
        assert [row.get_columns() for row in table.get_rows()] == [("city", "people"), ("Tokyo", "14")]

    run(program)


@pytest.mark.parametrize("options", [{"seed": 1}, {"max_new_tokens": 5}, {"tools": (print,)}])
def test_what_windows_has_not_is_refused_by_its_name(options: dict[str, Any]) -> None:
    async def program(model: LanguageModel) -> None:
        result = await model.generate_response_async("Hello", LanguageModelOptions(**options))
        assert result.status == LanguageModelResponseStatus.Error and f"{min(options)} is set" in str(
            result.extended_error
        )

    run(program)


def test_what_windows_lacks_of_tools_is_refused_by_name() -> None:
    async def program(model: LanguageModel) -> None:
        given = await model.give_tool_results_async(model.create_context(), ["3"])
        assert given.status == LanguageModelResponseStatus.Error and "calls no tools" in str(given.extended_error)
        with pytest.raises(UsageError, match="calls no tools"):
            model.get_usable_prompt_length("Hello", LanguageModelOptions(tools=[print]))

    run(program)


def test_an_adapter_that_windows_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").touch()
    adapter = LanguageModelLowRankAdapter.create_from_path(tmp_path / "broken.safetensors").low_rank_adapter

    async def program(model: LanguageModel) -> None:
        result = await model.generate_response_async("Hello", LanguageModelOptions(low_rank_adapter=adapter))
        assert result.status == LanguageModelResponseStatus.Error and "broken.safetensors" in str(result.extended_error)

    run(program)


def test_without_the_bindings_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "win32more.appsdk", None)
    use_model(backend="system")
    with pytest.raises(DeviceError, match=re.escape(install_extra("windows"))) as caught:
        LanguageModel.get_ready_state()
    assert caught.value.step == "wheel"


def test_without_the_runtime_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def initialize() -> None:
        raise OSError("This application requires the Windows App Runtime Version 2.5")

    monkeypatch.setattr(sys.modules["win32more.appsdk"], "initialize", initialize, raising=False)
    use_model(backend="system")
    with pytest.raises(EdgephiError, match=r"requires the Windows App Runtime Version 2\.5") as caught:
        LanguageModel.get_ready_state()
    assert isinstance(caught.value, DeviceError) and caught.value.step == "library"
