"""Reports as a browser shows them, at three widths, in light and dark (`tests/page/report.test.mjs`)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from edgephi.benchmarks.bench.report.charts import picture
from edgephi.benchmarks.bench.report.page import page
from tests.bench_reports import case, everything, report
from tests.node_tools import PROJECT, node_with_browser

REPORTS = PROJECT / "benchmarks" / "reports"


def test_reports_in_a_browser(tmp_path: Path) -> None:
    node = node_with_browser()
    hostile = everything("<script>alert(1)</script>" + "W" * 300)
    few = report(*(case(f"d{depth}", "decode", {"decode_tokens_per_s": [9, 10]}, depth=depth) for depth in (0, 64)))
    for name, made in (("everything", everything()), ("hostile", hostile), ("few", few)):
        (tmp_path / f"{name}.html").write_text(page(made), encoding="utf-8")
    (tmp_path / "charts.svg").write_text(picture(everything()) or "", encoding="utf-8")
    shutil.copyfile(REPORTS / "peers-smollm2" / "peers.svg", tmp_path / "peers.svg")
    command = [node, "--test-reporter=spec", "tests/page/report.test.mjs"]
    environment = {**os.environ, "EDGEPHI_REPORTS": str(tmp_path)}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert re.search(r"pass 5\b", done.stdout) and "skipped 0" in done.stdout
