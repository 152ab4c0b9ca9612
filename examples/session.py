"""A conversation: answers are streamed, and each turn computes only what is new.

python examples/session.py phi-4-mini
"""

import sys

import edgephi

QUESTIONS = ("What is the capital of Japan?", "And of France?")

try:
    with edgephi.load(sys.argv[1]) as model:
        session = model.session(system="Answer in one short sentence.", max_new_tokens=40)
        for question in QUESTIONS:
            print(f"> {question}")
            stream = session.say(question)
            for piece in stream:
                print(piece, end="", flush=True)
            answer = stream.result()
            print(f"\n  ({answer.prompt_tokens} prompt tokens, {answer.reused_tokens} of them from the KV cache)")
        print(f"{len(session.messages)} messages")
except edgephi.EdgephiError as error:
    sys.exit(f"{error.what}. What to do: {error.remedy}.")
