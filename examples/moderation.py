"""A small classifier of one's own judges prompts and answers: weighted words, as a stand-in for a trained one.

python examples/moderation.py smollm2
"""

import re
import sys

import edgephi
from edgephi.runtime.moderation import ContentFilter, Limits, Moderation, Severity, Side, moderated

WEIGHTS = {"fight": ("violent", 1), "punch": ("violent", 2), "kill": ("violent", 3), "idiot": ("hate", 2)}


def by_words(text: str, side: Side) -> dict[str, Severity]:
    weight: dict[str, int] = {}
    for word in re.findall(r"\w+", text.lower()):
        category, points = WEIGHTS.get(word, ("hate", 0))
        weight[category] = min(3, weight.get(category, 0) + points)
    return {category: Severity(10 + points) for category, points in weight.items()}


moderation = Moderation(by_words, ContentFilter(response=Limits(violent=Severity.MINIMUM)))
print(f"default: {Moderation().description}; here: {moderation.description}")
try:
    with edgephi.load(sys.argv[1]) as model:
        for question in ("What is the capital of Japan?", "Say hello, idiot idiot.", "Rewrite: The two men fight."):
            print(f"> {question}")
            blocked = moderation.check_prompt(question)
            if blocked is None:
                answer = moderated(model.chat(question, max_new_tokens=40), moderation)
                print("".join(answer))
                blocked = answer.blocked
            if blocked is not None:
                print(f"{blocked.side} blocked: {blocked.category} is {blocked.severity.name}")
except edgephi.EdgephiError as error:
    sys.exit(f"{error.what}. What to do: {error.remedy}.")
