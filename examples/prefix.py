"""Instructions that many questions share are computed once, and questions of several threads are answered together.

python examples/prefix.py phi-4-mini
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import edgephi
from edgephi.runtime.answer import Answer

RULES = "Answer in one short sentence. Use plain words, and be kind to everybody who asks you something."
COUNTRIES = ("Japan", "Italy", "France", "Germany")

with edgephi.load(sys.argv[1]) as model, model.prefix(RULES) as prefix, ThreadPoolExecutor(4) as callers:
    print(f"{prefix.cost.tokens} tokens are kept, computed in {prefix.cost.seconds:.2f} s")

    def ask(country: str) -> Answer:
        question = {"role": "user", "content": f"What is the capital of {country}?"}
        return model.chat([{"role": "system", "content": RULES}, question], max_new_tokens=40).result()

    for answer in callers.map(ask, COUNTRIES):
        print(f"{answer.text} ({answer.reused_tokens} of {answer.prompt_tokens} prompt tokens were found)")
