"""The study of skills: its set of texts, and the checks that it counts."""

from __future__ import annotations

from edgephi.benchmarks.studies.skills import Judged, markdown_rows, read_texts, right_cells, table


def test_the_set_has_20_texts_and_two_are_long() -> None:
    texts = read_texts()
    assert len(texts) == len({text.name for text in texts}) == 20
    long = [text for text in texts if len(text.text) > 20_000]
    assert len(long) == 2 and {text.kind for text in texts} == {"text", "paragraph", "conversation"}
    for text in texts:
        assert (text.tone is None) == (text in long)
        assert all(len(row) == len(text.columns) for row in text.rows)
        assert right_cells(text.rows, text.rows) == sum(map(len, text.rows))
        assert all(cell in text.text for row in text.rows for cell in row)


def test_a_markdown_table_is_read_or_is_none() -> None:
    right = "Here:\n| A | b |\n|---|:-:|\n| 1 | x \\| y |\n| 2 | |\n"
    assert markdown_rows(right, ["a", "B"]) == [["1", "x \\| y"], ["2", ""]]
    assert markdown_rows(right, ["A"]) is None
    assert markdown_rows(right + "| 3 |\n", ["A", "B"]) is None
    assert markdown_rows("A, b\n1, 2", ["A", "B"]) is None


def test_cells_are_right_in_the_row_they_belong_to() -> None:
    wanted = [["Osaka", "0.9", "38"], ["Delft", "1.2", "45"]]
    assert right_cells(wanted, [["the Osaka pot", "0.9 litres", "38"], ["Delft", "11.2", "38"]]) == 4
    assert right_cells(wanted, []) == 0


def test_the_table_counts_what_was_judged() -> None:
    judged = [
        Judged("a", "summarize", False, "x", True, 1.0, kept=2, facts=3, whole=True, length_right=True),
        Judged("a", "summarize", True, "", False, 1.0),
        Judged("b", "summarize", False, "x", True, 1.0, kept=1, facts=4),
        Judged("b", "summarize", True, "x", True, 2.5, kept=4, facts=4, invented_numbers=2),
    ]
    lines = table(judged).splitlines()
    cells = {parts[1].strip(): parts[2:4] for parts in (line.split("|") for line in lines)}
    assert [cell.strip() for cell in cells["summarize: texts answered"]] == ["2 of 2", "1 of 2"]
    kept = cells["summarize: names and numbers kept, texts that both read"]
    assert [cell.strip() for cell in kept] == ["1 of 4", "4 of 4"]
    assert [cell.strip() for cell in cells["summarize: seconds"]] == ["2.0", "3.5"]
