"""How often bundles say the last word of a paragraph, given what comes before it, as LAMBADA asks.

    python -m edgephi.benchmarks.studies.last_words --text FILE DIR [DIR ...]

The word counts as said when every token of it is the most probable one, so that greedy decoding would say it. The
paragraphs are those of the text, in its order; a paragraph has at least WORDS_FROM words, of which the last WORDS_TO
are shown, and ends in a word of letters before its full stop. LAMBADA (Paperno et al. 2016, arXiv 1606.06031) kept the
passages whose last word people guess; nobody chose here, so the figures are lower and compare only with one another.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import closing
from math import sqrt
from pathlib import Path

from edgephi.benchmarks import arguments
from edgephi.benchmarks.evaluate.choices import Question, candidates
from edgephi.benchmarks.evaluate.graph_logits import GraphLogits
from edgephi.benchmarks.report import circumstances, in_one_line, markdown_table, progress, run
from edgephi.errors import SourceError, UsageError
from edgephi.files import read_argument

WORDS_FROM, WORDS_TO = 20, 80


def paragraphs(text: str, count: int) -> list[Question]:
    """The first paragraphs that end in a word, each with that word as its only choice."""
    found: list[Question] = []
    for line in text.split("\n"):
        words = line.rstrip(" .").split(" ")[-WORDS_TO:]
        if len(found) < count and line.rstrip().endswith(".") and len(words) >= WORDS_FROM and words[-1].isalpha():
            found.append(Question(" ".join(words[:-1]).lstrip(), (f" {words[-1]}",), 0))
    return found


def said(bundle: Path, asked: Sequence[Question], advance: Callable[[], None]) -> list[bool]:
    """Whether a bundle says the last word of each paragraph.

    Raises:
        EdgephiError: the bundle cannot be run.
    """
    from edgephi.runtime.text.tokenizer import Tokenizer

    with closing(Tokenizer(bundle)) as tokenizer:
        given = candidates(asked, tokenizer.encode)
    graph = GraphLogits(bundle, max(len(one.ids) for one in given))
    right = []
    for one in given:
        likeliest = graph.logits(one.ids)[one.start - 1 : -1].argmax(axis=-1)
        right.append(bool((likeliest == one.ids[one.start :]).all()))
        advance()
    return right


def table(results: Sequence[tuple[str, Sequence[bool]]]) -> str:
    """A row for each bundle: words said, and the share's standard error."""
    rows = []
    for name, right in results:
        share = sum(right) / len(right)
        error = sqrt(share * (1 - share) / len(right))
        rows.append((name, f"{sum(right)} of {len(right)}", f"{100 * share:.1f} % ± {100 * error:.1f}"))
    return markdown_table(("bundle", "last words", "share"), rows)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        prog="edgephi.benchmarks.studies.last_words", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("bundles", nargs="+", type=arguments.bundle, metavar="DIR", help="bundles to measure")
    parser.add_argument("--text", required=True, type=arguments.file, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--count", type=int, default=300, metavar="N", help="paragraphs, from the beginning (300)")
    given = parser.parse_args()
    if given.count < 1:
        raise UsageError("there is nothing to measure", remedy="Take at least one paragraph")
    asked = paragraphs(read_argument(given.text, "the text", error=SourceError), given.count)
    if not asked:
        raise UsageError(
            f"no paragraph of at least {WORDS_FROM} words ends in a word and a full stop",
            where=given.text,
            remedy="Name a text with a paragraph a line",
        )
    with progress("measuring", len(asked) * len(given.bundles)) as advance:
        results = [(bundle.resolve().name, said(bundle, asked, advance)) for bundle in given.bundles]
    print(table(results))
    print(f"\n{given.text.name}: {len(asked):,} paragraphs. {in_one_line(circumstances('onnxruntime', 'numpy'))}")


if __name__ == "__main__":
    run(main)
