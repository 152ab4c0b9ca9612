"""Last words are those of the text's paragraphs, and a model that repeats a cycle says them and no others."""

from __future__ import annotations

from pathlib import Path

import edgephi
from edgephi.benchmarks.evaluate.choices import Question
from edgephi.benchmarks.studies.last_words import WORDS_TO, paragraphs, said, table
from tests.tiny_phi import PHI_3, copying_phi, cycle


def test_a_paragraph_ends_in_a_word_and_a_full_stop_and_is_long_enough() -> None:
    long = "word " * 100
    text = f" = Title = \n too short .\n {long}end . \n {long}1999 .\n {long}comma ,\n {'x ' * 19}last .\n"
    first, second = paragraphs(text, 10)
    assert first.choices == (" end",) and first.prompt == " ".join(["word"] * (WORDS_TO - 1))
    assert second.choices == (" last",) and second.prompt.split() == ["x"] * 19
    assert paragraphs(text, 1) == [first]


def test_a_model_that_copies_says_what_follows_and_nothing_else(tmp_path: Path) -> None:
    source = copying_phi(tmp_path / "source", PHI_3, length=8)
    edgephi.export(source, tmp_path / "bundle", precision="fp32")
    text = cycle(8, 14)
    right, wrong = Question(text[:-2], (text[-2:],), 0), Question(text[:-2], (text[-2] + text[-2],), 0)
    told: list[None] = []
    assert said(tmp_path / "bundle", [right, wrong], lambda: told.append(None)) == [True, False]
    assert len(told) == 2


def test_a_share_has_its_standard_error() -> None:
    row = table([("smollm2", [True, False, False, False])]).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["smollm2", "1 of 4", "25.0 % ± 21.7"]
