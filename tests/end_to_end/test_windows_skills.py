"""Windows' text skills by edgephi's own, on a tiny model: its answers are any text that the formats let pass."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgephi
from edgephi import Model
from edgephi.runtime.moderation import Side
from edgephi.runtime.skills import text_to_table
from edgephi.windows import (
    ConversationItem,
    ConversationSummaryOptions,
    InputKind,
    LanguageModel,
    LanguageModelResponseStatus,
    SeverityLevel,
    TextRewriter,
    TextRewriteTone,
    TextSummarizer,
    TextToTableConverter,
    use_model,
)
from tests.tiny_phi import PHI_3, tiny_phi
from tests.windows_phi import TEMPLATE, run

Status = LanguageModelResponseStatus
NEWS = "The Harbour Museum in Lund closes on 14 March. Ingrid Sole said that 37 paintings were moved.\n\n"
TALK = [ConversationItem("Anna", "The museum closes on 14 March. "), ConversationItem("Ben", NEWS)]


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder: Path = tmp_path_factory.mktemp("windows-skills")
    source = tiny_phi(folder / "source", PHI_3, 2048, ascii_text=True)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    edgephi.export_model(source, folder / "bundle", quantize="rtn")
    with edgephi.load(folder / "bundle", threads=1) as model:
        yield model


@pytest.fixture(autouse=True)
def chosen(phi: Model) -> None:
    use_model(phi)


def operations(model: LanguageModel, text: str = NEWS) -> list[Any]:
    """All skills but the table's."""
    summarizer, rewriter = TextSummarizer(model), TextRewriter(model)
    return [
        summarizer.summarize_async(text),
        summarizer.summarize_paragraph_async(text),
        summarizer.summarize_conversation_async([*TALK, ConversationItem("Cleo", text)]),
        summarizer.summarize_conversation_async(TALK, ConversationSummaryOptions(InputKind.Email)),
        rewriter.rewrite_async(text),
        *[rewriter.rewrite_async(text, tone) for tone in TextRewriteTone],
        rewriter.rewrite_custom_async(text, "like a pirate"),
    ]


def test_deltas_are_the_text() -> None:
    async def program(model: LanguageModel) -> None:
        for operation in operations(model):
            said = "".join([delta async for delta in operation])
            result = await operation
            assert (result.status, result.extended_error) == (Status.Complete, None)
            assert said == result.text != ""

    run(program)


def test_a_table_has_rows_of_all_columns_and_its_deltas_are_markdown(phi: Model) -> None:
    expected = text_to_table(phi, NEWS)

    async def program(model: LanguageModel) -> None:
        operation = TextToTableConverter(model).convert_async(NEWS)
        assert "".join([delta async for delta in operation]) == expected.markdown()
        result = await operation
        rows = [row.get_columns() for row in result.get_rows()]
        assert result.status == Status.Complete and rows == [expected.columns, *expected.rows]
        assert {len(row) for row in rows} == {len(expected.columns)}

    run(program)


def test_a_text_longer_than_the_context_is_summarized() -> None:
    async def program(model: LanguageModel) -> None:
        text = NEWS * 40
        summarizer = TextSummarizer(model)
        larger, cutoff = summarizer.is_prompt_larger_than_context(text)
        assert larger and 0 < cutoff < len(text)
        result = await summarizer.summarize_async(text)
        assert result.status == Status.Complete and 0 < len(result.text) < len(text)

    run(program)


@pytest.mark.parametrize("side", ["prompt", "response"])
def test_what_skills_read_and_write_is_moderated(phi: Model, side: Side) -> None:
    judged: list[str] = []

    def moderator(text: str, on: Side) -> dict[str, SeverityLevel]:
        if on == side:
            judged.append(text)
        return {"hate": SeverityLevel.High} if on == side else {}

    use_model(phi, moderator=moderator)
    blocked = {"prompt": Status.PromptBlockedByContentModeration, "response": Status.ResponseBlockedByContentModeration}

    async def program(model: LanguageModel) -> None:
        for operation in [*operations(model), TextToTableConverter(model).convert_async(NEWS)]:
            assert [delta async for delta in operation] == []
            result = await operation
            assert result.status == blocked[side] and not getattr(result, "text", "")
            assert "of severity High" in str(result.extended_error)

    run(program)
    if side == "prompt":
        assert any("like a pirate" in text for text in judged) and any("Ingrid Sole" in text for text in judged)


def test_a_skill_is_cancelled_and_ends_with_its_model() -> None:
    async def program(model: LanguageModel) -> None:
        operation = TextSummarizer(model).summarize_async(NEWS * 40)
        await asyncio.sleep(0.05)
        operation.cancel()
        with pytest.raises(asyncio.CancelledError):
            await operation
        blank = await TextRewriter(model).rewrite_async("  ")
        assert blank.status == Status.Error and "empty" in str(blank.extended_error)
        running = TextSummarizer(model).summarize_async(NEWS * 40)
        model.close()
        with pytest.raises(asyncio.CancelledError):
            await running

    run(program)
