"""The report's folder appears whole: written beside its place, then renamed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgephi.benchmarks.bench.report.charts import picture
from edgephi.benchmarks.bench.report.page import page
from edgephi.benchmarks.bench.report.table import markdown
from edgephi.benchmarks.bench.results import Report
from edgephi.errors import OutputError
from edgephi.files import replace_file, unwritable

JSON, MARKDOWN, HTML, PICTURE = "report.json", "report.md", "report.html", "report.svg"
PARTIAL = ".partial.json"
"""Behind the name of a report's folder: what is known of it while it is measured."""


def check_report_folder(output: Path, force: bool) -> None:
    """Refuse, before any work, a folder that holds something; with `force`, one that holds more than a report.

    Raises:
        OutputError: what is there must not be replaced.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or output.is_symlink():
        raise OutputError("the output exists and is no folder", where=output, remedy="Choose another --output")
    names = {path.name for path in output.iterdir()}
    if not names:
        return
    if not force:
        raise OutputError(
            "the output folder exists", where=output, remedy="Choose another --output, or pass --force to replace it"
        )
    if not names <= {JSON, MARKDOWN, HTML, PICTURE}:
        raise OutputError(
            "the output folder holds something that is no report; --force does not delete it",
            where=output,
            remedy="Choose another --output, or empty the folder yourself",
        )


def as_json(report: Report) -> str:
    """The report's document, with a line feed at its end."""
    return json.dumps(report.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"


@contextmanager
def keep_partial(output: Path | None) -> Iterator[Callable[[Report], None]]:
    """Yields what keeps an unfinished report in OUTPUT.partial.json; the file goes when the block ends well.

    Args:
        output: of the whole report; None: nothing is kept.

    Raises:
        OutputError: the disk refuses, also when called.
    """
    if output is None:
        yield lambda report: None
        return
    output = output.absolute()
    partial = output.with_name(f"{output.name}{PARTIAL}")

    def keep(report: Report) -> None:
        replace_file(partial, as_json(report).encode(), "Choose another --output")

    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise unwritable(problem, partial, "Choose another --output") from problem
    yield keep
    partial.unlink(missing_ok=True)


def write_report(output: Path, report: Report, *, force: bool) -> None:
    """Write report.json, report.md, report.html and, where there are charts, report.svg (UTF-8, \\n) into a new folder.

    Raises:
        OutputError: see `check_report_folder`; or the disk refuses.
    """
    output = output.absolute()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
            made, replaced = Path(scratch) / "report", Path(scratch) / "replaced"
            made.mkdir()
            texts = {
                JSON: as_json(report),
                MARKDOWN: markdown(report),
                HTML: page(report),
                PICTURE: picture(report),
            }
            for name, text in texts.items():
                if text is not None:
                    (made / name).write_text(text, encoding="utf-8", newline="\n")
            check_report_folder(output, force)
            if output.exists():
                output.rename(replaced)
            try:
                made.rename(output)
            except OSError:
                if replaced.exists():
                    replaced.rename(output)
                raise
    except OSError as error:
        raise OutputError(
            f"the report cannot be written: {error.strerror or error}", where=output, remedy="Choose another --output"
        ) from error
