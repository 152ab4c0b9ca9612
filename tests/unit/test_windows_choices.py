"""Which model stands behind `edgephi.windows`, whether it is ready, and its skills: against stand-ins of both parts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgephi.errors import DownloadError, EdgephiError, PromptTooLongError, UsageError
from edgephi.runtime import skills as runtime_skills
from edgephi.runtime.moderation import NO_MODERATION, HeldText
from edgephi.runtime.skills import SkillProgress
from edgephi.store import Readiness, ReadyState, readiness
from edgephi.windows import (
    AIFeatureReadyResultState,
    AIFeatureReadyState,
    ContentFilterOptions,
    ConversationItem,
    ConversationSummaryOptions,
    ImageContentFilterSeverity,
    InputKind,
    LanguageModel,
    LanguageModelResponseStatus,
    SeverityLevel,
    TextContentFilterSeverity,
    TextRewriter,
    TextRewriteTone,
    TextSummarizer,
    TextToTableConverter,
    settings,
    use_model,
)
from edgephi.windows.lengths import index_of_utf16, may_end_before
from edgephi.windows.moderation import Moderator, blocked_error, moderation_for
from edgephi.windows.phi_model import PhiModel


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_chosen", None)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The store's two functions say what a test wants; the real ones are in test_windows_store.py."""
    stand_in = SimpleNamespace(state=ReadyState.READY, steps=[], error=None, asked=[], cancelled=None)

    def ready_state(name: str, device: str = "auto") -> Readiness:
        stand_in.asked.append(name if device == "auto" else (name, device))
        return Readiness(stand_in.state)

    def ensure_ready(
        name: str,
        *,
        device: str = "auto",
        on_progress: Callable[[Readiness], None],
        cancelled: Callable[[], bool],
    ) -> None:
        stand_in.asked.append(name if device == "auto" else (name, device))
        stand_in.cancelled = cancelled
        for done, total in stand_in.steps:
            on_progress(Readiness(ReadyState.DOWNLOADING, done_bytes=done, total_bytes=total))
        if stand_in.error is not None:
            raise stand_in.error

    monkeypatch.setattr(readiness, "ready_state", ready_state)
    monkeypatch.setattr(readiness, "ensure_ready", ensure_ready)
    return stand_in


@pytest.mark.parametrize(
    ("state", "windows"),
    [
        (ReadyState.NOT_INSTALLED, AIFeatureReadyState.NotReady),
        (ReadyState.DOWNLOADING, AIFeatureReadyState.NotReady),
        (ReadyState.EXPORTING, AIFeatureReadyState.NotReady),
        (ReadyState.COMPILING, AIFeatureReadyState.NotReady),
        (ReadyState.READY, AIFeatureReadyState.Ready),
        (ReadyState.NOT_SUPPORTED, AIFeatureReadyState.NotSupportedOnCurrentSystem),
    ],
)
def test_readiness_in_windows_words(store: SimpleNamespace, state: ReadyState, windows: AIFeatureReadyState) -> None:
    store.state = state
    assert LanguageModel.get_ready_state() == windows
    assert store.asked == ["phi-4-mini"]


def test_the_environment_names_a_model(store: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPHI_WINDOWS_MODEL", "phi-4")
    LanguageModel.get_ready_state()
    use_model("demo")
    LanguageModel.get_ready_state()
    assert store.asked == ["phi-4", "demo"]
    monkeypatch.setattr(settings, "_chosen", None)
    monkeypatch.setenv("EDGEPHI_WINDOWS_BACKEND", "cloud")
    with pytest.raises(UsageError, match="EDGEPHI_WINDOWS_BACKEND is 'cloud'"):
        LanguageModel.get_ready_state()


def test_readiness_is_that_of_the_device(store: SimpleNamespace) -> None:
    use_model("phi-4", device="npu")
    LanguageModel.get_ready_state()
    asyncio.run(progress_of_making_ready())
    assert store.asked == [("phi-4", "npu"), ("phi-4", "npu")]


async def progress_of_making_ready() -> tuple[list[float], Any]:
    operation = LanguageModel.ensure_ready_async()
    return [share async for share in operation], await operation


def test_making_ready_reports_shares_that_never_fall(store: SimpleNamespace) -> None:
    store.steps = [(0, None), (25, 100), (20, 100), (75, 100)]
    shares, result = asyncio.run(progress_of_making_ready())
    assert shares == [0.0, 0.25, 0.75, 1.0]
    assert (result.status, result.error, result.error_display_text) == (AIFeatureReadyResultState.Success, None, "")


@pytest.mark.parametrize(("kind", "download"), [(DownloadError, True), (EdgephiError, False)])
def test_what_does_not_get_ready_is_a_result(store: SimpleNamespace, kind: type[EdgephiError], download: bool) -> None:
    store.error = kind("the disk is full", remedy="Make room")
    _, result = asyncio.run(progress_of_making_ready())
    assert (result.status, result.package_installation_failed) == (AIFeatureReadyResultState.Failure, download)
    assert result.error is result.extended_error is store.error
    assert result.error_display_text == "the disk is full. Make room."


def test_making_ready_can_be_cancelled(store: SimpleNamespace) -> None:
    store.steps = [(1, 2)]

    async def main() -> None:
        operation = LanguageModel.ensure_ready_async()
        operation.cancel()
        with pytest.raises(asyncio.CancelledError):
            await operation

    asyncio.run(main())
    assert store.cancelled()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"model": 7}, "model is 7"),
        ({"backend": "cloud"}, "backend is 'cloud'"),
        ({"moderator": 7}, "moderator is 7"),
        ({"model": "phi-4", "backend": "system"}, "model is 'phi-4'"),
        ({"device": "npu", "backend": "system"}, "device is 'npu'"),
        ({"moderator": dict, "backend": "system"}, "moderator is "),
    ],
)
def test_a_wrong_choice_is_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        use_model(**arguments)


def test_a_folder_needs_no_store(tmp_path: Path) -> None:
    use_model(tmp_path)
    assert LanguageModel.get_ready_state() == AIFeatureReadyState.Ready


# skills


class Skills:
    """In the place of `edgephi.runtime.skills`: what was asked, and what is said. The real ones answer in
    test_windows_skills.py."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object, dict[str, object]]] = []
        self.deltas = ["A first sentence.", " A second one."]
        self.error: EdgephiError | None = None

    def _do(self, name: str, source: object, on_progress: Any, cancelled: Any, **arguments: object) -> SimpleNamespace:
        self.calls.append((name, source, arguments))
        if self.error is not None:
            raise self.error
        said = ""
        for done, delta in enumerate(self.deltas, 1):
            if cancelled():
                break
            said += delta
            on_progress(SkillProgress(done, len(self.deltas), delta))
        return SimpleNamespace(text=said, columns=("city", "people"), rows=(("Tokyo", "14"), ("Paris", "2")))

    def summarize(self, model: object, text: object, **arguments: Any) -> SimpleNamespace:
        return self._do("summarize", text, **arguments)

    def rewrite(self, model: object, text: object, **arguments: Any) -> SimpleNamespace:
        return self._do("rewrite", text, **arguments)

    def text_to_table(self, model: object, text: object, **arguments: Any) -> SimpleNamespace:
        return self._do("text_to_table", text, **arguments)


@pytest.fixture
def skills(monkeypatch: pytest.MonkeyPatch) -> Skills:
    stand_in = Skills()
    for name in ("summarize", "rewrite", "text_to_table"):
        monkeypatch.setattr(runtime_skills, name, getattr(stand_in, name))
    return stand_in


class CountingModel:
    """A model of 400 tokens of context, a token a character."""

    context_length = 400

    def count_tokens(self, messages: Sequence[dict[str, str]], tools: Sequence[object] = ()) -> int:
        return sum(len(message["content"]) for message in messages)


def language_model(moderator: Moderator | None = None) -> LanguageModel:
    return LanguageModel(PhiModel(CountingModel(), moderator, lambda: None))  # type: ignore[arg-type]


async def with_deltas(operation: Any) -> tuple[str, Any]:
    said = "".join([delta async for delta in operation])
    return said, await operation


def test_skills_are_edgephis(skills: Skills) -> None:
    async def main() -> None:
        model = language_model()
        summarizer, rewriter = TextSummarizer(model), TextRewriter(model)
        for operation in (
            summarizer.summarize_async("Long."),
            summarizer.summarize_paragraph_async("Long."),
            rewriter.rewrite_async("Long."),
            rewriter.rewrite_async("Long.", TextRewriteTone.Formal),
            rewriter.rewrite_custom_async("Long.", "like a pirate"),
        ):
            said, result = await with_deltas(operation)
            assert said == result.text == "A first sentence. A second one."
            assert result.status == LanguageModelResponseStatus.Complete
        items = [ConversationItem("Anna", "Hello."), ConversationItem("Ben", "Good day.")]
        options = ConversationSummaryOptions(input_kind=InputKind.Email)
        await summarizer.summarize_conversation_async(items, options)
        await summarizer.summarize_conversation_async(items)

    asyncio.run(main())
    talk = [runtime_skills.ConversationItem("Anna", "Hello."), runtime_skills.ConversationItem("Ben", "Good day.")]
    assert skills.calls == [
        ("summarize", "Long.", {"kind": "text"}),
        ("summarize", "Long.", {"kind": "paragraph"}),
        ("rewrite", "Long.", {"tone": "default"}),
        ("rewrite", "Long.", {"tone": "formal"}),
        ("rewrite", "Long.", {"instruction": "Rewrite the text in this tone: like a pirate."}),
        ("summarize", talk, {"kind": "conversation", "input_kind": "email"}),
        ("summarize", talk, {"kind": "conversation", "input_kind": "general"}),
    ]


def test_a_table_has_its_names_first(skills: Skills) -> None:
    async def main() -> None:
        result = await TextToTableConverter(language_model()).convert_async("Tokyo 14, Paris 2")
        assert result.status == LanguageModelResponseStatus.Complete
        rows = [row.get_columns() for row in result.get_rows()]
        assert rows == [("city", "people"), ("Tokyo", "14"), ("Paris", "2")]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PromptTooLongError("no room", remedy="Shorten it"), LanguageModelResponseStatus.PromptLargerThanContext),
        (EdgephiError("it broke", remedy="Mend it"), LanguageModelResponseStatus.Error),
    ],
)
def test_a_skill_that_fails_gives_a_status(
    skills: Skills, error: EdgephiError, status: LanguageModelResponseStatus
) -> None:
    skills.error = error

    async def main() -> None:
        result = await TextSummarizer(language_model()).summarize_async("Long.")
        assert (result.text, result.status, result.extended_error) == ("", status, error)
        table = await TextToTableConverter(language_model()).convert_async("Long.")
        assert (table.get_rows(), table.status, table.extended_error) == ((), status, error)

    asyncio.run(main())


def test_skills_are_moderated_and_stop_where_they_are_blocked(skills: Skills) -> None:
    def moderator(text: str, direction: str) -> dict[str, int]:
        return {"sexual": SeverityLevel.High if "second" in text or "bad" in text else SeverityLevel.Low}

    skills.deltas = ["A first sentence.", " A second one.", " A third one."]

    async def main() -> None:
        rewriter = TextRewriter(language_model(moderator))
        said, result = await with_deltas(rewriter.rewrite_async("Long."))
        assert said == "A first sentence."
        assert (result.text, result.status) == ("", LanguageModelResponseStatus.ResponseBlockedByContentModeration)
        for operation in (rewriter.rewrite_async("bad"), rewriter.rewrite_custom_async("Long.", "bad")):
            assert (await operation).status == LanguageModelResponseStatus.PromptBlockedByContentModeration

    asyncio.run(main())
    assert len(skills.calls) == 1, "a blocked text never reaches the model"


def test_a_cancelled_skill_is_told(skills: Skills) -> None:
    async def main() -> None:
        operation = TextSummarizer(language_model()).summarize_async("Long.")
        operation.cancel()
        with pytest.raises(asyncio.CancelledError):
            await operation

    asyncio.run(main())


def test_whether_a_text_is_larger_than_the_context() -> None:
    summarizer = TextSummarizer(language_model())
    assert summarizer.is_prompt_larger_than_context("x" * 300) == (False, 300)
    assert summarizer.is_prompt_larger_than_context("x" * 500) == (True, 300)
    items = [ConversationItem("Anna", "x" * 140), ConversationItem("Ben", "y" * 140)]
    assert summarizer.is_prompt_larger_than_context(items) == (False, 292)
    assert summarizer.is_prompt_larger_than_context([*items, *items], ConversationSummaryOptions()) == (True, 300)


@pytest.mark.parametrize("name", ["include_message_citations", "include_participant_attribution"])
def test_a_setting_that_our_summaries_do_not_know_is_refused(name: str) -> None:
    items = [ConversationItem("Anna", "Hello.")]
    with pytest.raises(UsageError, match=f"{name} is set"):
        TextSummarizer(language_model()).summarize_conversation_async(items, ConversationSummaryOptions(**{name: True}))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: TextSummarizer("phi-4"), "language_model"),  # type: ignore[arg-type]
        (lambda: TextSummarizer(language_model()).summarize_async(7), "text"),  # type: ignore[arg-type]
        (lambda: TextSummarizer(language_model()).summarize_conversation_async([]), "messages"),
        (lambda: TextSummarizer(language_model()).summarize_conversation_async(["Hello"]), "a message"),  # type: ignore[list-item]
        (lambda: TextRewriter(language_model()).rewrite_async("x", "formal"), "tone"),  # type: ignore[arg-type]
        (lambda: TextRewriter(language_model()).rewrite_custom_async("x", 7), "custom_tone"),  # type: ignore[arg-type]
        (lambda: TextSummarizer(language_model()).is_prompt_larger_than_context(), "number of arguments"),  # type: ignore[call-overload]
        (lambda: TextContentFilterSeverity(5), "hate is 5"),  # type: ignore[arg-type]
        (
            lambda: setattr(ContentFilterOptions().prompt_max_allowed_severity_level, "spam", 10),
            "'spam' is no category",
        ),
        (lambda: ConversationSummaryOptions(max_key_points=0).check(), "max_key_points"),
        (lambda: ConversationSummaryOptions(input_kind=7).check(), "input_kind"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        call()


# moderation


def allowing(level: SeverityLevel) -> ContentFilterOptions:
    return ContentFilterOptions(TextContentFilterSeverity(level), TextContentFilterSeverity(level))


@pytest.mark.parametrize("allowed", SeverityLevel)
@pytest.mark.parametrize("found", SeverityLevel)
def test_what_passes(allowed: SeverityLevel, found: SeverityLevel) -> None:
    moderation = moderation_for(lambda text, side: {"self_harm": found}, allowing(allowed))
    passes = moderation.check("x", "prompt") is None
    assert passes == (found <= allowed and found != SeverityLevel.High), "High passes never"


def test_prompt_and_response_are_judged_by_levels_of_their_own() -> None:
    options = ContentFilterOptions()
    options.prompt_max_allowed_severity_level.violent = SeverityLevel.Minimum
    judged = moderation_for(lambda text, side: {"violent": 11}, options)
    blocked = judged.check("x", "prompt")
    assert blocked is not None and judged.check("x", "response") is None
    said = blocked_error(blocked).what
    assert said == "the moderator found violent of severity Low in the prompt, and the content filter allows Minimum"


def test_no_moderator_holds_nothing_back() -> None:
    for nobody in (None, NO_MODERATION):
        assert HeldText(moderation_for(nobody, None)).push("half a sen") == "half a sen"


@pytest.mark.parametrize("said", [{"spam": 10}, {"hate": 3}, 7])
def test_a_moderator_that_says_nonsense_is_an_error(said: object) -> None:
    with pytest.raises(EdgephiError, match="the moderator"):
        moderation_for(lambda text, side: said, None).check("x", "prompt")  # type: ignore[arg-type, return-value]


def test_severities_compare_and_show_themselves() -> None:
    assert TextContentFilterSeverity() == TextContentFilterSeverity(SeverityLevel.Medium)
    assert TextContentFilterSeverity() != ImageContentFilterSeverity()
    assert repr(TextContentFilterSeverity(SeverityLevel.Low)).endswith(
        "(hate=Low, sexual=Low, violent=Low, self_harm=Low)"
    )


# lengths


@given(st.text(alphabet="aé漢👍🏽", max_size=20), st.integers(0, 20))
def test_windows_index_counts_utf16(text: str, index: int) -> None:
    index = min(index, len(text))
    units = len(text[:index].encode("utf-16-le")) // 2
    assert index_of_utf16(text, units) == index
    assert index_of_utf16(text, 10**6) == len(text)


def test_half_of_a_pair_counts_as_nothing() -> None:
    assert index_of_utf16("a👍b", 2) == 1


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("ab", [0, 1, 2]),
        ("e\u0301x", [0, 2, 3]),
        ("👍🏽x", [0, 2, 3]),
        ("👩‍👩‍👧x", [0, 5, 6]),
        ("🇯🇵🇫🇷", [0, 2, 4]),
        ("\r\nx", [0, 2, 3]),
        ("✈️x", [0, 2, 3]),
        ("1️⃣x", [0, 3, 4]),
    ],
)
def test_where_a_text_may_be_cut(text: str, places: list[int]) -> None:
    assert [index for index in range(len(text) + 1) if may_end_before(text, index)] == places
