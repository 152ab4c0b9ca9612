"""Reports as rows for other programs: CSV for spreadsheets, SQL with llama-bench's columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev

from edgephi.benchmarks.bench.results import CaseResult, Metric, Report

Named = tuple[str, Report]
"""A report with what it is called."""

CSV_COLUMNS = (
    "label",
    "created",
    "cpu",
    "hardware",
    "system",
    "device",
    "provider",
    "threads",
    "bundle",
    "precision",
    "edgephi",
    "onnxruntime",
    "workload",
    "stopped",
    "case",
    "group",
    "depth",
    "prompt_tokens",
    "new_tokens",
    "state",
    "noisy",
    "figure",
    "median",
    "low",
    "high",
    "repetitions",
)

SQL_COLUMNS: dict[str, str] = {
    "build_commit": "TEXT",
    "build_number": "INTEGER",
    "cpu_info": "TEXT",
    "gpu_info": "TEXT",
    "backends": "TEXT",
    "model_filename": "TEXT",
    "model_type": "TEXT",
    "model_size": "INTEGER",
    "model_n_params": "INTEGER",
    "n_batch": "INTEGER",
    "n_ubatch": "INTEGER",
    "n_threads": "INTEGER",
    "cpu_mask": "TEXT",
    "cpu_strict": "INTEGER",
    "poll": "INTEGER",
    "type_k": "TEXT",
    "type_v": "TEXT",
    "n_gpu_layers": "INTEGER",
    "split_mode": "TEXT",
    "main_gpu": "INTEGER",
    "no_kv_offload": "INTEGER",
    "flash_attn": "INTEGER",
    "tensor_split": "TEXT",
    "tensor_buft_overrides": "TEXT",
    "use_mmap": "INTEGER",
    "embeddings": "INTEGER",
    "no_op_offload": "INTEGER",
    "n_prompt": "INTEGER",
    "n_gen": "INTEGER",
    "n_depth": "INTEGER",
    "test_time": "TEXT",
    "avg_ns": "INTEGER",
    "stddev_ns": "INTEGER",
    "avg_ts": "REAL",
    "stddev_ts": "REAL",
}
"""Columns of llama-bench's `-o sql` and their types, as llama.cpp's scripts/compare-llama-bench.py reads them."""

_OF_GROUP: dict[str, Metric] = {"prefill": "prefill_tokens_per_s", "decode": "decode_tokens_per_s"}


def as_csv(reports: Sequence[Named]) -> str:
    """One line for every figure of every case, and one for a case without figures; seconds, bytes, joules, shares.

    A text that a spreadsheet would compute as a formula begins with an apostrophe.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for name, report in reports:
        facts = (
            name,
            report.created,
            report.machine.cpu,
            report.hardware or "CPU",
            report.machine.system,
            report.device,
            report.provider,
            report.threads,
            report.bundle.name,
            report.bundle.precision,
            report.edgephi,
            report.versions.get("onnxruntime", ""),
            report.workload.name,
            report.stopped or "",
        )
        for case in report.cases:
            about = (case.name, case.group, case.depth, case.prompt_tokens, case.new_tokens, case.state)
            for figures in _figures(case):
                writer.writerow(map(_cell, (*facts, *about, case.noisy, *figures)))
    return text.getvalue()


def table_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows of one shape as CSV, with their keys as the heading; nothing for no row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([list(rows[0])] if rows else [])
    writer.writerows([_cell(cell) for cell in row.values()] for row in rows)
    return text.getvalue()


def as_sql(reports: Sequence[Named]) -> str:
    """Statements that make and fill llama-bench's table `llama_bench`: one row for every prefill and decode case.

    `n_prompt` and `n_gen` are the tokens of a prefill or a decode case; `avg_ts` and `stddev_ts` are mean and sample
    standard deviation of the repetitions' tokens/s, and `avg_ns` what `n_prompt + n_gen` tokens take at that rate.
    `build_commit` is edgephi's version with onnxruntime's, `model_filename` the bundle, `backends` the execution
    provider. Settings of llama.cpp that onnxruntime does not have are null.
    """
    columns = ",\n".join(f"  {name} {kind}" for name, kind in SQL_COLUMNS.items())
    lines = [f"CREATE TABLE IF NOT EXISTS llama_bench (\n{columns}\n);"]
    for _, report in reports:
        for case in report.cases:
            metric = _OF_GROUP.get(case.group)
            if metric is not None and metric in case.figures:
                row = _sql_row(report, case, case.figures[metric].values)
                values = ", ".join(_sql_value(row.get(name)) for name in SQL_COLUMNS)
                lines.append(f"INSERT INTO llama_bench ({', '.join(SQL_COLUMNS)}) VALUES ({values});")
    return "\n".join(lines) + "\n"


def _sql_row(report: Report, case: CaseResult, rates: Sequence[float]) -> dict[str, str | int | float]:
    decodes = case.group == "decode"
    tokens = case.new_tokens if decodes else case.prompt_tokens
    times = [tokens / rate * 1e9 for rate in rates]
    several = len(rates) > 1
    return {
        "build_commit": f"edgephi-{report.edgephi}-ort-{report.versions.get('onnxruntime', 'unknown')}",
        "build_number": 0,
        "cpu_info": report.machine.cpu,
        "gpu_info": report.hardware or "",
        "backends": report.provider,
        "model_filename": report.bundle.name,
        "model_type": f"{report.bundle.family} {report.bundle.precision}",
        "model_size": report.bundle.stored_bytes,
        "model_n_params": report.bundle.parameters,
        "n_threads": report.threads,
        "n_prompt": 0 if decodes else tokens,
        "n_gen": tokens if decodes else 0,
        "n_depth": case.depth,
        "test_time": report.created.replace("+00:00", "Z"),
        "avg_ns": round(fmean(times)),
        "stddev_ns": round(stdev(times)) if several else 0,
        "avg_ts": fmean(rates),
        "stddev_ts": stdev(rates) if several else 0.0,
    }


def _sql_value(value: str | int | float | None) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        # a line of a shell that reads SQL, such as sqlite3's, must not end within a text
        text = " ".join(value.replace("\0", " ").split()).replace("'", "''")
        return f"'{text}'"
    return repr(value)


def _figures(case: CaseResult) -> Iterator[tuple[str, float | str, float | str, float | str, int]]:
    for metric, one in case.figures.items():
        yield metric, one.median, one.low, one.high, len(one.values)
    if not case.figures:
        yield "", "", "", "", 0


def _cell(value: object) -> object:
    """No formula, and truth values as JSON has them."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return value
