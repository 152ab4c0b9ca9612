"""A text becomes a table: rows of as many cells as there are columns, each cell copied from the text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Unpack

from edgephi.arguments import require_texts
from edgephi.errors import PromptError, UsageError
from edgephi.runtime.grammar import Lark
from edgephi.runtime.model import Model
from edgephi.runtime.sampling import SamplingOptions
from edgephi.runtime.skills.pieces import split
from edgephi.runtime.skills.prompts import Prompts
from edgephi.runtime.skills.run import SkillProgress, SkillRun, SkillStatistics, require_words, until_cancelled

MOST_COLUMNS, LONGEST_COLUMN = 16, 60
"""Of given columns, and the characters of a name."""
CHOSEN_COLUMNS, LONGEST_CHOSEN = 6, 30
"""Of columns the model chooses."""
LONGEST_CELL = 120
"""Characters."""
COLUMNS_TOKENS = 300
"""For the names of columns; six of 30 letters have fewer in any script a model writes well."""
REPEATED_ROWS = 2
"""Rows in succession that were there before: then the model is going round in circles."""
_CHOSEN: dict[str, object] = {
    "type": "object",
    "properties": {
        "columns": {
            "type": "array",
            "items": {"type": "string", "pattern": rf"^[^\W\d_][\w %/()-]{{1,{LONGEST_CHOSEN - 1}}}$"},
            "minItems": 2,
            "maxItems": CHOSEN_COLUMNS,
        }
    },
    "required": ["columns"],
    "additionalProperties": False,
}
_NO_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""Letters of scripts that put no spaces between words."""


@dataclass(frozen=True)
class Table:
    """Columns and rows; every row has a cell for every column."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """Cells are words of the text as they stand there, or empty. No row is empty, and none is there twice."""
    complete: bool
    """The model ended every part of the table itself; else rows may be missing."""
    cancelled: bool
    """The rows are those that were finished."""
    statistics: SkillStatistics

    def markdown(self) -> str:
        """The table as Markdown."""
        return "".join([_header(self.columns), *map(_markdown_row, self.rows)])


def text_to_table(
    model: Model,
    text: str,
    *,
    columns: Sequence[str] | None = None,
    prompts: Prompts | None = None,
    on_progress: Callable[[SkillProgress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Table:
    """Make a table of what a text of any length lists.

    The answer's format leaves the model no other choice than rows of all columns whose cells are copied from the text,
    120 characters at most. What it chooses for them depends on the model: a small one needs `columns`.

    Args:
        columns: their names, at most 16 of 60 characters. None: the model chooses two to six, by the beginning of the
            text.
        prompts: a folder or a mapping with other prompts (`docs/skills.md`).
        on_progress: called with steps, and the lines of `Table.markdown()`.
        cancelled: asked every 20 ms, in another thread, whether to stop; the answer being written ends then.
        sampling: as for `Model.chat`; greedy by default.

    Raises:
        PromptError: the text is empty, the model has no chat template, or it did not end the list of columns.
        PromptTooLongError: the context has no room beside the prompt.
        UsageError: an argument of another type or outside its range, or prompts that cannot be used.
        EngineError: the model is closed.
        EdgephiError: what else `Model.chat` raises.
    """
    source = require_words("text", text).strip()
    given = None if columns is None else _checked_columns(columns)
    with SkillRun(model, prompts, on_progress, cancelled, sampling) as run:
        return _Making(run).result(source, given)


class _Making:
    """One table on its way."""

    def __init__(self, run: SkillRun) -> None:
        self._run = run
        self._columns: tuple[str, ...] = ()
        self._rows: dict[tuple[str, ...], None] = {}
        self._complete = True

    def result(self, source: str, given: tuple[str, ...] | None) -> Table:
        run, finished = self._run, False
        with until_cancelled():
            run.require_going()
            prompt = run.prompts["table-rows"]
            names = given or ("a" * LONGEST_CHOSEN,) * CHOSEN_COLUMNS
            limit = run.room(prompt, prompt.answer_share, columns=_written(names))
            pieces = split(source, limit, run.count)
            run.plan(len(pieces) + (given is None))
            self._columns = given or self._chosen(source)
            run.report(int(given is None), _header(self._columns))
            for piece in pieces:
                self._add_rows(piece)
                run.report(run.done + 1)
            finished = True
        return Table(self._columns, tuple(self._rows), self._complete and finished, not finished, run.statistics())

    def _chosen(self, source: str) -> tuple[str, ...]:
        run, prompt = self._run, self._run.prompts["table-columns"]
        room = run.room(prompt, 1)
        room = min(room, run.model.context_length // 2)
        beginning = split(source, room, run.count)[0]
        with closing(run.ask(prompt, COLUMNS_TOKENS, _CHOSEN, text=beginning)) as pieces:
            "".join(pieces)
        parsed = run.answer.parsed
        if not isinstance(parsed, dict):
            raise PromptError("the model did not end the list of columns", remedy="Give columns=[...]")
        names: dict[str, str] = {}
        for name in parsed["columns"]:
            names.setdefault(name.strip().casefold(), name.strip())
        return tuple(names.values())

    def _add_rows(self, piece: str) -> None:
        run, prompt = self._run, self._run.prompts["table-rows"]
        plain = " ".join(re.sub(r'["“”\\\x00-\x1f\x7f]', _plain, piece).split())
        if not plain:  # signs that no cell can have
            return
        tokens = run.count(piece)
        most = min(prompt.most_answer_tokens, max(64, round(tokens * prompt.answer_share)))
        form = Lark(_grammar(self._columns, plain, most_rows=max(1, tokens // 3)))
        written, read, repeated = "", 0, 0
        with closing(run.ask(prompt, most, form, text=piece, columns=_written(self._columns))) as pieces:
            for new in pieces:
                written += new
                rows, read = _whole_rows(written, read)
                for row in rows:
                    known = row in self._rows
                    repeated = repeated + 1 if known else 0
                    if any(row) and not known:
                        self._rows[row] = None
                        run.say(_markdown_row(row))
                if repeated >= REPEATED_ROWS:
                    break
        self._complete &= run.answer.finish == "stop"


def _grammar(columns: Sequence[str], source: str, *, most_rows: int) -> str:
    """JSON with a list of rows; their keys are the columns, and their values runs of words of the source."""
    keys = [json.dumps(f"{json.dumps(column, ensure_ascii=False)}: ", ensure_ascii=False) for column in columns]
    row = ' ", " '.join(f"{key} cell" for key in keys)
    kind = "substring_chars" if _NO_SPACES.search(source) else "substring_words"
    words = json.dumps({kind: source}, ensure_ascii=False)
    more = f' (", " row){{0,{most_rows - 1}}}' if most_rows > 1 else ""  # {0,0} is no grammar
    return (
        f'start: "{{\\"rows\\": [" (row{more})? "]}}"\n'
        f'row: "{{" {row} "}}"\n'
        'cell: "\\"" CELL? "\\""\n'
        "CELL: WORDS & SHORT\n"
        f"WORDS: %regex {words}\n"
        f"SHORT: /[\\w$€£(+#@-].{{0,{LONGEST_CELL - 1}}}/\n"
    )


def _written(columns: Sequence[str]) -> str:
    return json.dumps([*columns], ensure_ascii=False)


def _whole_rows(written: str, read: int) -> tuple[list[tuple[str, ...]], int]:
    """Rows that are whole from a place on, and the place behind them."""
    decoder, rows = json.JSONDecoder(), []
    while (start := written.find("{", max(read, 1))) >= 0:
        try:
            row, read = decoder.raw_decode(written, start)
        except ValueError:
            break
        rows.append(tuple(str(cell).rstrip(" ,;:") for cell in row.values()))
    return rows, read


def _plain(found: re.Match[str]) -> str:
    """Signs that JSON writes in another way."""
    return "'" if found[0] in '"“”' else " "


def _checked_columns(columns: Sequence[str]) -> tuple[str, ...]:
    require_texts("columns", columns, "the names of columns as a list of texts")
    names = [" ".join(name.split()) for name in columns]
    if len(names) > MOST_COLUMNS:
        raise UsageError(f"there are {len(names)} columns", remedy=f"Give at most {MOST_COLUMNS}")
    for name in names:
        if not 0 < len(name) <= LONGEST_COLUMN:
            raise UsageError(f"a column has the name {name!r}", remedy=f"Use 1 to {LONGEST_COLUMN} characters")
    if len({name.casefold() for name in names}) < len(names):
        raise UsageError("two columns have the same name", remedy="Name each column once")
    return tuple(names)


def _markdown_row(cells: Sequence[str]) -> str:
    written = [re.sub(r"[|\\]", lambda found: "\\" + found[0], cell) for cell in cells]
    return f"| {' | '.join(written)} |\n"


def _header(columns: Sequence[str]) -> str:
    return _markdown_row(columns) + f"|{'---|' * len(columns)}\n"
