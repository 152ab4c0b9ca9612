"""What skills hold that the same model, asked plainly, does not: checks a program can make, on 20 texts.

    python -m edgephi.benchmarks.studies.skills BUNDLE [--text NAME ...] [--json FILE]

The texts are in `skill_texts/`: notes, mails, conversations and descriptions, and two of more than 8,192 tokens. Each
is summarized; the short ones are also rewritten in a tone, and where a text holds a table, it is made. "Asked
plainly" is one message with the same wish and the text, as people write it, decoded greedily.

Names are words with a capital where none is needed; numbers are those written in digits (`runtime/skills/facts.py`). A
name or number is kept if it is in the answer as a word. A model that is given a text it cannot read gives no answer.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, cast

from edgephi.benchmarks.report import circumstances, in_one_line, markdown_table, progress, run, write_json
from edgephi.errors import PromptTooLongError, SourceError, UsageError
from edgephi.files import parse_toml, read_argument
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.skills import Kind, Tone, rewrite, summarize, text_to_table
from edgephi.runtime.skills.facts import invented, missing, names, numbers

FOLDER = Path(__file__).parent / "skill_texts"
LONGEST_SUMMARY = 2 / 3
"""Of the source's characters."""
LONGEST_REWRITE = {"concise": 1.0}
LONGER = 1.5
"""Of the source's characters, for the other tones."""
WISHES = {
    "text": "Summarize this text",
    "paragraph": "Summarize this paragraph in one or two sentences",
    "conversation": "Summarize this conversation",
}


@dataclass(frozen=True)
class SkillText:
    """One text of the set."""

    name: str
    text: str
    kind: Kind
    tone: Tone | None
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """The table that a reader makes; empty: it holds none."""


@dataclass(frozen=True)
class Judged:
    """What one answer is like. Numbers are counts."""

    text: str
    skill: str
    plain: bool
    answer: str
    answered: bool
    """Not where the model refused a text that is too long."""
    seconds: float
    kept: int = 0
    facts: int = 0
    """Names and numbers of the source."""
    invented_numbers: int = 0
    invented_names: int = 0
    length_right: bool = False
    whole: bool = False
    """It ends with a sentence, or was ended by the model."""
    changed: bool = False
    parses: bool = False
    """A table: every row has the columns that were asked for."""
    cells_right: int = 0
    cells: int = 0
    cells_invented: int = 0
    """Cells of the answer that are not in the text."""


def read_texts(folder: Path = FOLDER) -> list[SkillText]:
    """The committed set.

    Raises:
        SourceError: a file is missing.
    """
    listed = parse_toml(read_argument(folder / "texts.toml", "the list of texts", error=SourceError))
    found = []
    for entry in cast(list[dict[str, Any]], listed["texts"]):
        file = entry.get("file")
        text = read_argument(folder / file, "the text", error=SourceError) if file else str(entry["text"])
        rows = tuple(tuple(row) for row in entry.get("rows", ()))
        columns = tuple(entry.get("columns", ()))
        found.append(SkillText(entry["name"], text.strip(), entry["kind"], entry.get("tone"), columns, rows))
    return found


def judge(model: Model, text: SkillText) -> list[Judged]:
    """All answers to one text: with the skill and plainly, in turns."""
    made = [_summary(model, text, plain=False), _summary(model, text, plain=True)]
    if text.tone is not None:
        made += [_rewritten(model, text, text.tone, plain=False), _rewritten(model, text, text.tone, plain=True)]
    if text.columns:
        made += [_table(model, text, plain=False), _table(model, text, plain=True)]
    return made


def _summary(model: Model, text: SkillText, *, plain: bool) -> Judged:
    words = min(200, max(20, len(text.text.split()) // 3))
    ended = True

    def skill() -> str:
        nonlocal ended
        summary = summarize(model, text.text, kind=text.kind)
        ended = not summary.cut or bool(re.search(r"[.!?]$", summary.text))
        return summary.text

    wish = f"{WISHES[text.kind]}, in at most {words} words:\n\n{text.text}"
    answer, seconds, plainly_ended = _ask(model, wish) if plain else _timed(skill)
    if answer is None:
        return Judged(text.name, "summarize", plain, "", False, seconds)
    most = len(text.text) * LONGEST_SUMMARY
    judged = Judged(
        text.name,
        "summarize",
        plain,
        answer,
        True,
        seconds,
        length_right=0 < len(answer) <= most,
        whole=plainly_ended if plain else ended,
    )
    return _with_facts(judged, text.text)


def _rewritten(model: Model, text: SkillText, tone: Tone, *, plain: bool) -> Judged:
    how = "as concisely as possible" if tone == "concise" else f"in a {tone} tone"
    wish = f"Rewrite this text {how}:\n\n{text.text}"
    answer, seconds, ended = _ask(model, wish) if plain else _timed(lambda: rewrite(model, text.text, tone=tone).text)
    if answer is None:
        return Judged(text.name, "rewrite", plain, "", False, seconds)
    most = len(text.text) * LONGEST_REWRITE.get(tone, LONGER)
    judged = Judged(
        text.name,
        "rewrite",
        plain,
        answer,
        True,
        seconds,
        length_right=0 < len(answer) <= most,
        whole=ended,
        changed=answer.split() != text.text.split(),
    )
    return _with_facts(judged, text.text)


def _table(model: Model, text: SkillText, *, plain: bool) -> Judged:
    wish = f"Make a Markdown table of this text, with the columns {', '.join(text.columns)}:\n\n{text.text}"
    if plain:
        answer, seconds, ended = _ask(model, wish)
    else:
        answer, seconds, ended = _timed(lambda: text_to_table(model, text.text, columns=text.columns).markdown())
    if answer is None:
        return Judged(text.name, "table", plain, "", False, seconds)
    rows = markdown_rows(answer, text.columns)
    return Judged(
        text.name,
        "table",
        plain,
        answer,
        True,
        seconds,
        whole=ended,
        parses=rows is not None,
        cells_right=right_cells(text.rows, rows or []),
        cells=sum(map(len, text.rows)),
        cells_invented=sum(bool(cell) and not _holds(text.text, cell) for row in rows or [] for cell in row),
    )


def markdown_rows(answer: str, columns: Sequence[str]) -> list[list[str]] | None:
    """Rows of the first Markdown table; None: there is none with these columns, or a row has other ones."""
    lines = [line.strip() for line in answer.splitlines()]
    tables = [line for line in lines if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in tables]
    if len(cells) < 3 or [name.casefold() for name in cells[0]] != [name.casefold() for name in columns]:
        return None
    if not all(re.fullmatch(r":?-+:?", cell) for cell in cells[1]):
        return None
    return cells[2:] if all(len(row) == len(columns) for row in cells) else None


def right_cells(expected: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]) -> int:
    """Cells that hold what they should, in the row that begins as the expected one does."""
    right = 0
    for wanted in expected:
        row = next((row for row in rows if row and _holds(row[0], wanted[0])), None)
        if row is not None:
            right += sum(_holds(cell, value) for cell, value in zip(row, wanted, strict=True))
    return right


def _holds(text: str, value: str) -> bool:
    """As words of their own: 1.2 is not in 11.25, and Sol not in Solar."""
    plain = re.escape(" ".join(value.split()))
    return bool(re.search(rf"(?<![\w.,:]){plain}(?![\w]|[.,:][0-9])", " ".join(text.split()), re.IGNORECASE))


def _with_facts(judged: Judged, source: str) -> Judged:
    facts = len(names(source)) + len(numbers(source))
    new = invented(source, judged.answer)
    of_numbers = sum(one[0].isdigit() for one in new)
    return replace(
        judged,
        facts=facts,
        kept=facts - len(missing(source, judged.answer)),
        invented_numbers=of_numbers,
        invented_names=len(new) - of_numbers,
    )


def _ask(model: Model, wish: str) -> tuple[str | None, float, bool]:
    """Plainly: the answer (None: the text is too long), seconds, and whether the model ended it."""
    started = perf_counter()
    try:
        answer = model.chat(wish).result()
    except PromptTooLongError:
        return None, perf_counter() - started, False
    return answer.text.strip(), perf_counter() - started, answer.finish == "stop"


def _timed(work: Callable[[], str]) -> tuple[str | None, float, bool]:
    started = perf_counter()
    text = work()
    return text, perf_counter() - started, True


def table(judged: Sequence[Judged]) -> str:
    """Counts of each check, for the skill and for the same model asked plainly."""

    def both(name: str, skill: str, value: Callable[[list[Judged]], str]) -> list[str]:
        columns = [[one for one in judged if one.skill == skill and one.plain is plain] for plain in (False, True)]
        return [f"{skill}: {name}", *map(value, columns)]

    def count(field: str) -> Callable[[list[Judged]], str]:
        return lambda found: f"{sum(getattr(one, field) for one in found)} of {len(found)}"

    def total(field: str, of: str) -> Callable[[list[Judged]], str]:
        return lambda found: f"{sum(getattr(o, field) for o in found)} of {sum(getattr(o, of) for o in found)}"

    def read_by_both(value: Callable[[list[Judged]], str]) -> Callable[[list[Judged]], str]:
        answered = {one.text for one in judged if one.plain and one.answered}
        return lambda found: value([one for one in found if one.text in answered])

    def density(found: list[Judged]) -> str:
        return f"{1000 * sum(one.kept for one in found) / max(1, sum(len(one.answer) for one in found)):.0f}"

    def seconds(found: list[Judged]) -> str:
        return f"{sum(one.seconds for one in found):.1f}"

    def new(found: list[Judged]) -> str:
        return f"{sum(o.invented_numbers for o in found)} and {sum(o.invented_names for o in found)}"

    rows = [
        both("texts answered", "summarize", count("answered")),
        both("at most 2/3 of the text's length", "summarize", count("length_right")),
        both("ends with a whole sentence", "summarize", count("whole")),
        both("names and numbers kept, texts that both read", "summarize", read_by_both(total("kept", "facts"))),
        both("the same, in 1,000 characters of summary", "summarize", read_by_both(density)),
        both("numbers and names that the text lacks", "summarize", new),
        both("seconds", "summarize", seconds),
        both("names and numbers kept", "rewrite", total("kept", "facts")),
        both("texts that keep all", "rewrite", lambda f: f"{sum(o.kept == o.facts for o in f)} of {len(f)}"),
        both("numbers and names that the text lacks", "rewrite", new),
        both("at most 1.5 times as long, concise not longer", "rewrite", count("length_right")),
        both("texts that are other than before", "rewrite", count("changed")),
        both("seconds", "rewrite", seconds),
        both("columns and rows parse", "table", count("parses")),
        both("cells right", "table", total("cells_right", "cells")),
        both("cells that are not in the text", "table", lambda f: str(sum(one.cells_invented for one in f))),
        both("seconds", "table", seconds),
    ]
    return markdown_table(["check", "skill", "asked plainly"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", action="append", metavar="NAME", help="only this text (may be repeated)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every answer and its checks")
    asked = parser.parse_args()
    texts = read_texts()
    if unknown := sorted(set(asked.text or ()) - {text.name for text in texts}):
        raise UsageError(f"there is no text {unknown[0]!r}", remedy=f"Choose from {', '.join(t.name for t in texts)}")
    chosen = [text for text in texts if not asked.text or text.name in asked.text]
    judged: list[Judged] = []
    with load(asked.bundle, "cpu", spinning=False) as model, progress("texts", len(chosen)) as step:
        context, threads = model.context_length, model.threads
        for text in chosen:
            judged += judge(model, text)
            step()
    print(table(judged))
    facts = circumstances("onnxruntime") | {"threads": str(threads), "context": f"{context:,}"}
    print(f"\n{in_one_line(facts)}")
    if asked.json is not None:
        write_json(asked.json, {"facts": facts, "answers": [asdict(one) for one in judged]})


if __name__ == "__main__":
    run(main)
