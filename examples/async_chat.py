"""Answers in an event loop: two at once, and one whose task is cancelled.

python examples/async_chat.py phi-4-mini
"""

import asyncio
import sys

import edgephi


async def ask(model: edgephi.Model, question: str) -> str:
    pieces = [piece async for piece in model.chat(question, max_new_tokens=40)]
    return "".join(pieces)


async def main(bundle: str) -> None:
    with edgephi.load(bundle) as model:
        countries = ("Japan", "Italy")
        answers = await asyncio.gather(*(ask(model, f"What is the capital of {country}?") for country in countries))
        print(*answers, sep="\n")

        stream = model.chat("Tell me a very long story about a lighthouse.", max_new_tokens=2000)
        begun = asyncio.Event()

        async def listen() -> None:
            async for _ in stream:
                begun.set()

        listener = asyncio.create_task(listen())
        await begun.wait()
        listener.cancel()  # as a web framework does when its client leaves
        await asyncio.wait([listener])
        print(f"the story was {(await stream.whole()).finish}")


asyncio.run(main(sys.argv[1]))
