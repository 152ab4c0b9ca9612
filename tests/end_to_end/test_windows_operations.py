"""Operations of `edgephi.windows` on a tiny model: cancelling, closing, the event loop, arguments."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import pytest

import edgephi
from edgephi import Model
from edgephi.errors import EdgephiError, EngineError, UnsupportedModelError, UsageError
from edgephi.windows import (
    AIFeatureReadyResultState,
    AIFeatureReadyState,
    LanguageModel,
    LanguageModelContext,
    LanguageModelOptions,
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
                thread.join(timeout=5)
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
