"""Summarize a text, rewrite it, and make a table of it.

python examples/skills.py smollm2
"""

import sys

import edgephi
from edgephi.runtime.skills import SkillProgress, rewrite, summarize, text_to_table

TEXT = """We sell three teapots. The Osaka pot holds 0.9 litres and costs 38 euros. The Delft pot holds 1.2 litres and
costs 45 euros. The Lisbon pot holds 0.5 litres and costs 29 euros. All are made in the workshop of Ines Rocha."""


def show(progress: SkillProgress) -> None:
    print(progress.text_delta, end="\n" if progress.done == progress.total else "", flush=True)


try:
    with edgephi.load(sys.argv[1]) as model:
        summary = summarize(model, TEXT, kind="paragraph", on_progress=show)
        made = rewrite(model, TEXT, tone="formal", on_progress=show)
        print(f"{made.unchanged} of {len(made.parts)} parts stayed as they were")
        table = text_to_table(model, TEXT, columns=["Pot", "Litres", "Euros"], on_progress=show)
        print(f"{len(table.rows)} rows in {table.statistics.seconds:.1f} s")
except edgephi.EdgephiError as error:
    sys.exit(f"{error.what}. What to do: {error.remedy}.")
