"""Windows' language-model API with a Phi of one's own behind it.

python examples/windows_api.py phi-4-mini
"""

import asyncio
import sys

import edgephi
from edgephi.windows import AIFeatureReadyState, LanguageModel, LanguageModelOptions, use_model

OPTIONS = LanguageModelOptions(temperature=0, max_new_tokens=40)


async def main(name: str) -> None:
    use_model(name)
    if LanguageModel.get_ready_state() == AIFeatureReadyState.NotReady:
        await LanguageModel.ensure_ready_async()
    with await LanguageModel.create_async() as model:
        context = model.create_context("Answer in one short sentence.")
        for prompt in ("What is the capital of Japan?", "And of France?", "word " * 20_000):
            fits = model.get_usable_prompt_length(context, prompt)
            print(f"> {prompt[:30]} ({fits:,} of {len(prompt):,} characters fit)")
            operation = model.generate_response_async(context, prompt, OPTIONS)
            async for delta in operation:
                print(delta, end="", flush=True)
            print(f"  ({(await operation).status.name})")


try:
    asyncio.run(main(sys.argv[1]))
except edgephi.EdgephiError as error:
    sys.exit(f"{error.what}. What to do: {error.remedy}.")
