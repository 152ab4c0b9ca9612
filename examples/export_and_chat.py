"""Export a checkpoint and ask it a question.

python examples/export_and_chat.py microsoft/Phi-4-mini-instruct phi-4-mini
"""

import sys

import edgephi

source, bundle = sys.argv[1:3]
manifest = edgephi.export_model(source, bundle)
print(f"{manifest.source.name}: {manifest.stored_bytes / 1e6:.0f} MB, {manifest.bits_per_weight:.2f} bits per weight")

with edgephi.load(bundle) as model:
    stream = model.chat("What is the capital of Japan?", max_new_tokens=40)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    answer = stream.result()
    print(f"{answer.new_tokens} tokens on {answer.provider}, ended by {answer.finish}")
