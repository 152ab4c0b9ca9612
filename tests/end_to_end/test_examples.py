"""Every script in examples/ runs, on a tiny model or on SmolLM2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import edgephi
from edgephi.export.adapter import convert_adapter
from edgephi.runtime.tools.formats import HERMES
from tests.lora import TINY, random_adapter
from tests.node_tools import node_modules, run_node
from tests.planted_tools import CHATML_WITH_TOOLS, ENDING, TEMPLATES, with_template
from tests.tiny_phi import PHI_3, TOKENS, tiny_phi

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str, *arguments: Path | str) -> list[str]:
    """Lines that an example prints."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Phi-3 (`checkpoint`) and its bundle (`bundle`)."""
    folder = tmp_path_factory.mktemp("tiny")
    edgephi.export(tiny_phi(folder / "checkpoint", PHI_3), folder / "bundle")
    return folder


def test_export_and_chat(smollm2_gguf: Path, tmp_path: Path) -> None:
    size, answer, end = example("export_and_chat.py", smollm2_gguf, tmp_path / "bundle")
    assert size.endswith(" bits per weight") and "Tokyo" in answer and end.endswith("on cpu, ended by stop")


def test_session(smollm2_bundle: Path) -> None:
    lines = example("session.py", smollm2_bundle)
    assert "Tokyo" in "".join(lines) and lines[-1] == "5 messages"
    reused = [int(line.split(" of them")[0].split()[-1]) for line in lines if "from the KV cache" in line]
    assert reused[0] == 0 and reused[1] > 0, "the second turn computes only what is new"


def test_session_ends_in_a_sentence_where_there_is_no_bundle(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / "session.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and "What to do: " in done.stderr and "Traceback" not in done.stderr


def test_prefix(smollm2_bundle: Path) -> None:
    kept, *answers = example("prefix.py", smollm2_bundle)
    count = int(kept.split()[0])
    assert count > 16 and len(answers) == 4 and "Tokyo" in answers[0]
    assert all(int(line.rpartition("(")[2].split()[0]) >= count for line in answers)


def test_windows_api(smollm2_bundle: Path) -> None:
    lines = example("windows_api.py", smollm2_bundle)
    assert "Tokyo" in lines[1] and lines[1].endswith("(Complete)") and lines[3].endswith("(Complete)")
    assert lines[-2].endswith("of 100,000 characters fit)") and lines[-1] == "  (PromptLargerThanContext)"


def test_async_chat(smollm2_bundle: Path) -> None:
    first, second, end = example("async_chat.py", smollm2_bundle)
    assert "Tokyo" in first and "Italy" in second and end == "the story was cancelled"


def test_stop_from_a_window(smollm2_bundle: Path) -> None:
    *story, end = example("stop_from_a_window.py", smollm2_bundle)
    assert "[Stop]" in "".join(story) and end.endswith("tokens, ended by cancelled")


def test_structured(smollm2_bundle: Path) -> None:
    letter, year = example("structured.py", smollm2_bundle)
    sender, wants, order = letter.split(" | ")
    assert "Ada" in sender and wants in ("refund", "repair", "information") and order == "AB-1234"
    assert year == "1969"


def test_tools(smollm2_bundle: Path, tmp_path: Path) -> None:
    called, *_, roles = example("tools.py", with_template(smollm2_bundle, tmp_path, CHATML_WITH_TOOLS))
    assert called.startswith("called get_weather with {'city': 'Oslo'")
    assert roles.startswith("['user', 'assistant', 'tool'") and roles.endswith("'assistant']")


def test_skills(smollm2_bundle: Path) -> None:
    text = "\n".join(example("skills.py", smollm2_bundle))
    assert "parts stayed as they were" in text and "| Pot | Litres | Euros |" in text
    assert int(text.rsplit(" rows in ", 1)[0].rsplit("\n", 1)[-1]) >= 1


def test_moderation(smollm2_bundle: Path) -> None:
    text = "\n".join(example("moderation.py", smollm2_bundle))
    assert text.startswith("default: no moderation") and "Tokyo" in text
    assert "prompt blocked: hate is HIGH" in text and "response blocked: violent is" in text


def test_server_client(smollm2_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    with served(smollm2_bundle, tmp_path) as url:
        whole, streamed, city, call = example("server_client.py", url, "smollm2")
    assert "Tokyo" in whole and streamed == whole and city.startswith("name='") and call.startswith("call clock with {")


def test_javascript(smollm2_bundle: Path, tmp_path: Path) -> None:
    node_modules("openai")
    with served(smollm2_bundle, tmp_path) as url:
        script = EXAMPLES / "javascript" / "chat.mjs"
        (tmp_path / "node").mkdir()
        streamed, city = run_node(script, tmp_path / "node", url, "smollm2").splitlines()
    assert "Tokyo" in streamed and ", " in city


@contextmanager
def served(bundle: Path, folder: Path) -> Iterator[str]:
    """The URL of a server whose model knows tools."""
    for package in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    from tests.serving import serving

    with serving({"smollm2": with_template(bundle, folder, CHATML_WITH_TOOLS)}) as running:
        yield running.url


def test_web_app(smollm2_bundle: Path) -> None:
    for package in ("starlette", "uvicorn", "httpx"):
        pytest.importorskip(package)
    import httpx

    command = [sys.executable, EXAMPLES / "web_app.py", smollm2_bundle, "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            url = next(found[1] for line in process.stderr if (found := re.search(r"(http://[\d.]+:\d+)", line)))
            with httpx.stream("GET", f"{url}/ask?question=What is the capital of Japan?", timeout=60) as answered:
                pieces = list(answered.iter_text())
            assert "Tokyo" in "".join(pieces) and len(pieces) > 1
        finally:
            process.kill()


def test_adapter(tmp_path: Path) -> None:
    source = tiny_phi(tmp_path / "source", PHI_3, 1024, ascii_text=True)
    (source / "chat_template.jinja").write_text(TEMPLATES[HERMES] + ENDING)
    edgephi.export_model(source, tmp_path / "bundle", precision="fp32", lora=8)
    file = tmp_path / "support.onnx_adapter"
    convert_adapter(random_adapter(tmp_path / "peft", TINY), tmp_path / "bundle", file)
    with_it, without = (line.partition(": ") for line in example("adapter.py", tmp_path / "bundle", file))
    assert (with_it[0], without[0]) == ("support", "no adapter") and with_it[2] != without[2]


def test_device_report(tiny: Path) -> None:
    lines = example("device_report.py", tiny / "bundle")
    assert any(line.startswith("device   CPUExecutionProvider: cpu") for line in lines)
    assert any(line.startswith("runs on  CPUExecutionProvider: ") for line in lines)


def test_quality_check(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(0x4E00 + 3 + index % (TOKENS - 3)) for index in range(300)), encoding="utf-8")
    perplexity, divergence = example("quality_check.py", tiny / "bundle", tiny / "checkpoint", text)
    assert perplexity.startswith("perplexity ") and divergence.startswith("KL divergence 0.")


def test_read_manifest(tiny: Path) -> None:
    lines = example("read_manifest.py", tiny / "bundle")
    assert lines[0].startswith("phi3, 2 layers") and lines[1] == "from folder checkpoint, int4"
    assert "graph for cpu: model.onnx" in lines


def test_examples_are_short_and_all_of_them_run() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    tested = Path(__file__).read_text(encoding="utf-8")
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for script in scripts:
        assert len(script.read_text(encoding="utf-8").splitlines()) < 40, script.name
        assert f'"{script.name}"' in tested and f"({script.name})" in listed
