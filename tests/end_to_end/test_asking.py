"""What an app asks for beside a plain answer: stops, log probabilities, `async`, conversations that go on elsewhere."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from edgephi.errors import PromptError, PromptTooLongError, UsageError
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model


@pytest.fixture(scope="module")
def model(smollm2_bundle: Path) -> Iterator[Model]:
    with load(smollm2_bundle, threads=2) as loaded:
        yield loaded


QUESTION = "Name the capitals of France, Italy and Japan in one sentence."


def test_a_stop_text_ends_the_answer_before_it(model: Model) -> None:
    whole = model.chat(QUESTION, max_new_tokens=40).result()
    word = whole.text.split()[4]
    answer = model.chat(QUESTION, max_new_tokens=40, stop=[word]).result()
    assert answer.text == whole.text[: whole.text.index(word)]
    assert answer.finish == "stop"
    pieces = list(model.chat(QUESTION, max_new_tokens=40, stop=[word, "never"]))
    assert "".join(pieces) == answer.text


def test_a_bias_of_a_token_that_is_none_is_refused_and_hurts_nobody(model: Model) -> None:
    other = model.chat(QUESTION, max_new_tokens=8)
    with pytest.raises(UsageError, match=r"the token 50,000, and the vocabulary has 49,152"):
        model.chat(QUESTION, logit_bias={7: 1.0, 50_000: 1.0}).result()
    assert other.result().new_tokens == 8 == model.chat(QUESTION, max_new_tokens=8).result().new_tokens


def first_logits(model: Model) -> list[np.ndarray]:
    sequence, prompt = model.open_sequence(200), model.encode_chat([{"role": "user", "content": QUESTION}])
    sequence.prefill(prompt, lambda: False)
    rows: list[np.ndarray] = []
    sequence.step(lambda row: rows.append(row.astype(np.float64)) or int(row.argmax()))  # type: ignore[func-returns-value]
    return rows


def test_log_probabilities_are_those_of_the_logits(smollm2_bundle: Path) -> None:
    with load(smollm2_bundle, threads=1, prefix_cache_bytes=0) as model:
        answer = model.chat(QUESTION, max_new_tokens=6, logprobs=3).result()
        rows = first_logits(model)
    assert [one.token for one in answer.logprobs] == list(answer.token_ids)
    expected = rows[0] - rows[0].max()
    expected -= np.log(np.exp(expected).sum())
    first = answer.logprobs[0]
    assert first.logprob == pytest.approx(expected.max(), abs=1e-4)
    assert [token for token, _ in first.top] == np.argsort(-expected)[:3].tolist()


def test_an_answer_that_only_repeats_itself_ends(model: Model) -> None:
    prompt = "1, " * 40 + "1,"
    answer = model.generate(prompt, max_new_tokens=300).result()
    assert answer.finish == "repetition"
    assert answer.new_tokens < 200
    whole = model.generate(prompt, max_new_tokens=120, stop_repetition=False).result()
    assert whole.finish == "length"


def test_unknown_arguments_name_their_neighbour(model: Model) -> None:
    with pytest.raises(UsageError, match="Did you mean temperature"):
        model.chat("Hi", temprature=1)  # type: ignore[call-arg]


def test_async_for_gives_the_same_pieces(model: Model) -> None:
    async def ask() -> str:
        return "".join([piece async for piece in model.chat(QUESTION, max_new_tokens=20)])

    async def several() -> list[str]:
        return await asyncio.gather(ask(), ask(), ask())

    expected = model.chat(QUESTION, max_new_tokens=20).result().text
    assert asyncio.run(several()) == [expected] * 3


def test_await_gives_the_whole_answer(model: Model) -> None:
    async def ask() -> str:
        return (await model.chat(QUESTION, max_new_tokens=12).whole()).text

    assert asyncio.run(ask()) == model.chat(QUESTION, max_new_tokens=12).result().text


def test_a_cancelled_task_cancels_its_answer(model: Model) -> None:
    stream = model.chat("Tell me a very long story about a lighthouse.", max_new_tokens=400)

    async def ask() -> None:
        async def listen() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(listen())
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ask())  # waits for the thread beside it
    assert stream.finished
    answer = stream.result()
    assert answer.finish == "cancelled"
    assert answer.new_tokens < 400


def test_a_task_cancelled_before_its_thread_begins_frees_its_answer(model: Model) -> None:
    stream, begin = model.chat(QUESTION, max_new_tokens=400), threading.Event()

    async def ask() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, begin.wait)
        task = asyncio.create_task(stream.whole())
        await asyncio.sleep(0)  # the task waits for the only thread
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        begin.set()
        await busy

    asyncio.run(ask())
    assert stream.finished
    assert stream.result().finish == "cancelled"


def test_another_thread_stops_an_answer(model: Model) -> None:
    """As the button of a window does."""
    stream = model.chat("Tell me a very long story about a lighthouse.", max_new_tokens=400)
    threading.Timer(0.4, stream.cancel).start()
    assert stream.result().finish == "cancelled"


def test_a_conversation_goes_on_in_another_session(model: Model) -> None:
    first = model.session(system="You are brief.", max_new_tokens=16)
    first.say("My name is Ada.").result()
    second = model.session(messages=first.messages, max_new_tokens=16)
    assert second.messages == first.messages
    one, other = first.say("What is my name?").result(), second.say("What is my name?").result()
    assert one.text == other.text
    assert other.reused_tokens > 0
    second.reset()
    assert second.messages == (), "its system message came with the messages"


def test_a_forked_session_leaves_the_first_alone(model: Model) -> None:
    session = model.session(max_new_tokens=12)
    session.say("Hello there.").result()
    before = session.messages
    branch = session.fork()
    answer = branch.say(QUESTION).result()
    assert answer.reused_tokens > 0
    assert session.messages == before
    assert branch.messages[: len(before)] == before
    branch.close()
    session.close()


def test_tokens_are_counted_as_the_model_reads_them(model: Model) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    assert model.count_tokens(QUESTION) == model.count_tokens(messages) == len(model.encode_chat(messages))
    session = model.session(max_new_tokens=4)
    assert model.context_left(session) == model.context_length
    session.say(QUESTION).result()
    assert 0 < model.context_left(session) < model.context_length


@pytest.fixture(scope="module")
def short(smollm2_bundle: Path) -> Iterator[Model]:
    with load(smollm2_bundle, threads=2) as loaded:
        loaded.context_length = 220
        yield loaded


def test_a_conversation_that_is_too_long_is_an_error_unless_it_may_be_shortened(short: Model) -> None:
    session = short.session(max_new_tokens=8)
    with pytest.raises(PromptTooLongError):
        for _ in range(20):
            session.say("The number is 4711. " * 5).result()
    with pytest.raises(UsageError, match="overflow"):
        short.session(overflow="forget")  # type: ignore[arg-type]
    with pytest.raises(PromptError):
        short.session(max_new_tokens=8, overflow="drop_oldest").say("word " * 300)


def test_the_oldest_turns_are_dropped_and_the_system_message_stays(short: Model) -> None:
    session = short.session(system="You are brief.", overflow="drop_oldest", max_new_tokens=8)
    for turn in range(8):
        assert session.say(f"Turn {turn}. " + "The number is 4711. " * 4).result().new_tokens > 0
    contents = [str(message["content"]) for message in session.messages]
    assert contents[0] == "You are brief."
    assert any("Turn 7" in one for one in contents)
    assert not any("Turn 0" in one for one in contents)
    assert session.messages[1]["role"] == "user"


def test_the_older_half_is_summarized(short: Model) -> None:
    session = short.session(system="You are brief.", overflow="summarize", max_new_tokens=8)
    for turn in range(8):
        session.say(f"Turn {turn}. " + "The number is 4711. " * 4).result()
    contents = [str(message["content"]) for message in session.messages]
    assert contents[0] == "You are brief."
    assert contents[1].startswith("Summary of the conversation so far: ")
    assert len(contents[1]) > 40
    assert any("Turn 7" in one for one in contents)
