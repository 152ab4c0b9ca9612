"""Operations of `edgephi.windows` on a tiny model: cancelling, closing, the event loop, arguments."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

import edgephi
from edgephi import Model
from edgephi.errors import EdgephiError, EngineError, PromptError, UnsupportedModelError, UsageError
from edgephi.windows import (
    AIFeatureReadyResultState,
    AIFeatureReadyState,
    AsyncOperation,
    LanguageModel,
    LanguageModelContext,
    LanguageModelOptions,
    LanguageModelResponseStatus,
    TextRewriter,
    TextSummarizer,
    use_model,
)
from edgephi.windows.phi_model import PhiModel
from tests.windows_phi import phi_bundle, run


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phi_bundle(tmp_path_factory.mktemp("windows"))


@pytest.fixture(scope="module")
def phi(bundle: Path) -> Iterator[Model]:
    with edgephi.load(bundle, threads=1) as model:
        yield model


@pytest.fixture(autouse=True)
def chosen(phi: Model) -> None:
    use_model(phi)


ENDLESS = LanguageModelOptions(max_new_tokens=400, seed=3)


def test_cancelling_ends_the_models_work() -> None:
    async def program(model: LanguageModel) -> None:
        operation = model.generate_response_async("Hello", ENDLESS)
        async for _ in operation:
            break
        operation.cancel()
        started = perf_counter()
        with pytest.raises(asyncio.CancelledError):
            await operation
        assert operation.done() and perf_counter() - started < 2
        for thread in threading.enumerate():
            if "generate_response" in thread.name:
                thread.join(timeout=60)
                assert not thread.is_alive()
        # a task that is cancelled cancels what it awaits
        operation = model.generate_response_async("Hello", ENDLESS)
        task = asyncio.ensure_future(operation)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(asyncio.CancelledError):
            await operation

    run(program)


def test_the_loop_goes_on_while_the_model_computes() -> None:
    async def program(model: LanguageModel) -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0.001)

        counting = asyncio.ensure_future(count())
        await model.generate_response_async("Hello", LanguageModelOptions(max_new_tokens=100, seed=1))
        counting.cancel()
        assert turns > 3

    run(program)


def test_a_context_answers_one_prompt_at_a_time_and_may_be_closed_meanwhile() -> None:
    async def program(model: LanguageModel) -> None:
        context = model.create_context()
        operation = model.generate_response_async(context, "Hello", ENDLESS)
        with pytest.raises(UsageError, match="is answering another prompt"):
            model.generate_response_async(context, "Hello")
        context.close()
        with pytest.raises(asyncio.CancelledError):
            await operation

    run(program)


def test_closing_while_it_answers(bundle: Path) -> None:
    use_model(bundle, device="cpu")
    assert LanguageModel.get_ready_state() == AIFeatureReadyState.Ready

    async def program(model: LanguageModel) -> None:
        operation = model.generate_response_async("Hello", ENDLESS)
        async for _ in operation:
            break
        model.close()
        model.close()
        with pytest.raises(asyncio.CancelledError):
            await operation
        with pytest.raises(EngineError, match="the language model is closed"):
            model.generate_response_async("Hello")

    run(program)


def test_a_loaded_model_stays_its_owners(phi: Model) -> None:
    async def main() -> None:
        operation = LanguageModel.ensure_ready_async()
        assert [share async for share in operation] == [1.0]
        assert (await operation).status == AIFeatureReadyResultState.Success
        (await LanguageModel.create_async()).close()

    asyncio.run(main())
    assert phi.chat("Hello", max_new_tokens=1).result().new_tokens == 1


def test_a_model_that_nobody_waits_for_any_more_is_closed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[PhiModel] = []
    close = PhiModel.close
    monkeypatch.setattr(PhiModel, "close", lambda model: (closed.append(model), close(model)))
    use_model(bundle)

    async def main() -> None:
        operation = LanguageModel.create_async()
        operation.cancel()
        with pytest.raises(asyncio.CancelledError):
            await operation

    asyncio.run(main())
    assert len(closed) == 1


def test_what_cannot_be_loaded_raises(tmp_path: Path) -> None:
    use_model(tmp_path)

    async def main() -> None:
        with pytest.raises(EdgephiError, match=r"edgephi\.json"):
            await LanguageModel.create_async()

    asyncio.run(main())


def test_embeddings_are_refused_in_a_sentence() -> None:
    async def program(model: LanguageModel) -> None:
        for member in (model.generate_embedding_vectors, model.generate_response_from_embeddings_async):
            with pytest.raises(UnsupportedModelError, match="gives no embeddings"):
                member("Hello")
        with pytest.raises(UnsupportedModelError, match="gives no embeddings"):
            model.get_vector_space_id()

    run(program)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "0 arguments"),
        ((7,), "prompt"),
        (("Hello", 7), "options"),
        (("Hello", LanguageModelOptions(), 7), "3 arguments"),
        (("Hello", LanguageModelOptions(temperature=-1)), "temperature"),
        (("Hello", LanguageModelOptions(top_p=1.5)), "top_p"),
        (("Hello", LanguageModelOptions(top_k=40_000)), "top_k"),
        (("Hello", LanguageModelOptions(max_new_tokens=0)), "max_new_tokens"),
        (("Hello", LanguageModelOptions(low_rank_adapter="file")), "low_rank_adapter"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_refused_where_they_come_in(arguments: tuple[object, ...], named: str) -> None:
    async def program(model: LanguageModel) -> None:
        with pytest.raises(UsageError, match=named):
            model.generate_response_async(*arguments)  # type: ignore[call-overload]

    run(program)


def test_no_loop_no_operation(phi: Model) -> None:
    model = LanguageModel(PhiModel(phi, None, lambda: None))
    with pytest.raises(UsageError, match="no event loop runs"):
        model.generate_response_async("Hello")
    assert isinstance(model.create_context(), LanguageModelContext)


def test_an_operation_belongs_to_its_event_loop() -> None:
    left: list[AsyncOperation[Any, str]] = []

    async def begin() -> LanguageModelContext:
        model = await LanguageModel.create_async()
        context = model.create_context()
        left.append(model.generate_response_async(context, "Hello", ENDLESS))
        return context

    context = asyncio.run(begin())

    async def elsewhere(operation: AsyncOperation[Any, str]) -> None:
        with pytest.raises(UsageError, match="outside of the event loop"):
            await operation
        with pytest.raises(UsageError, match="outside of the event loop"):
            [delta async for delta in operation]
        with pytest.raises(UsageError, match="outside of the event loop"):
            operation.progress = print

    asyncio.run(elsewhere(left[0]))
    for thread in threading.enumerate():
        if "generate_response" in thread.name:
            thread.join(timeout=60)
            assert not thread.is_alive(), "a loop that is gone ends the work"

    async def go_on() -> None:
        with await LanguageModel.create_async() as model:
            result = await model.generate_response_async(context, "Hello", LanguageModelOptions(max_new_tokens=3))
            assert result.status == LanguageModelResponseStatus.Complete, "the context is free again"

    asyncio.run(go_on())


def test_a_model_whose_loop_is_gone_is_closed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, opening = threading.Event(), threading.Event()
    close, opened = PhiModel.close, PhiModel.__init__

    def slowly(*arguments: Any) -> None:
        assert opening.wait(timeout=20)
        opened(*arguments)

    monkeypatch.setattr(PhiModel, "__init__", slowly)
    monkeypatch.setattr(PhiModel, "close", lambda model: (close(model), closed.set()))
    use_model(bundle)

    async def main() -> None:
        LanguageModel.create_async()

    asyncio.run(main())
    opening.set()
    assert closed.wait(timeout=20)


def test_progress_that_raises_does_not_end_the_answer() -> None:
    async def program(model: LanguageModel) -> None:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
        deltas: list[str] = []

        def failing(operation: object, delta: str) -> None:
            deltas.append(delta)
            raise ValueError("mine")

        options = LanguageModelOptions(max_new_tokens=20, seed=1)
        operation = model.generate_response_async("Hello", options)
        operation.progress = failing
        result = await operation
        assert result.status == LanguageModelResponseStatus.Complete and "".join(deltas) == result.text
        late = model.generate_response_async("Hello", options)
        await late
        late.progress = failing
        assert (await late).text == result.text
        assert {str(context["exception"]) for context in told} == {"mine"} and len(told) == len(deltas)

    run(program)


def test_a_hundred_at_once() -> None:
    async def program(model: LanguageModel) -> None:
        short = LanguageModelOptions(max_new_tokens=5, temperature=0)
        expected = [(await model.generate_response_async(f"Hello {name}", short)).text for name in "ab"]
        results = await asyncio.gather(
            *[model.generate_response_async(f"Hello {'ab'[i % 2]}", short) for i in range(100)]
        )
        assert [result.text for result in results] == expected * 50
        operations = [model.generate_response_async("Hello", ENDLESS) for _ in range(100)]
        for operation in operations:
            operation.cancel()
        ended = await asyncio.gather(*operations, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in ended)

    run(program)


def test_a_machine_without_threads_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def program(model: LanguageModel) -> None:
        context = model.create_context()
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(EngineError, match="can't start new thread"):
                model.generate_response_async(context, "Hello")
        result = await model.generate_response_async(context, "Hello", LanguageModelOptions(max_new_tokens=3))
        assert result.status == LanguageModelResponseStatus.Complete

    run(program)


def test_half_of_a_surrogate_pair_is_no_text() -> None:
    async def program(model: LanguageModel) -> None:
        half = "Hello \ud83d"
        context, short = model.create_context(), LanguageModelOptions(max_new_tokens=3)
        for arguments in ((half, short), (context, half, short), (model.create_context(half), "Hello", short)):
            result = await model.generate_response_async(*arguments)  # type: ignore[arg-type]
            assert result.status == LanguageModelResponseStatus.Error
            assert "half of a surrogate pair" in str(result.extended_error)
        for operation in (TextRewriter(model).rewrite_async(half * 9), TextSummarizer(model).summarize_async(half * 9)):
            assert "half of a surrogate pair" in str((await operation).extended_error)
        for call in (model.get_usable_prompt_length, model.count_tokens):
            with pytest.raises(PromptError, match="half of a surrogate pair"):
                call(half)
        assert (await model.generate_response_async(context, "Hello", short)).status == 0, "the context is as it was"

    run(program)
