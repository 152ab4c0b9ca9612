"""The quality contract on real weights: recorded, reproduced, and broken by what must break it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import edgephi
from edgephi.benchmarks.evaluate.golden import NEAR_TIE, PROMPTS, Flip, reproduce
from edgephi.bundle import GoldenAnswer, Manifest, Quality, describe_file, read_manifest, write_manifest
from edgephi.commands.app import app
from edgephi.errors import BundleError, QualityError, UsageError
from edgephi.runtime.loading import load

WINDOWS = ("--windows", "2", "--window-length", "64")


def command(*arguments: object) -> Result:
    """Run the command; errors come as exceptions, as they reach `main`."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def contract_of(folder: Path) -> Quality:
    quality = read_manifest(folder).quality
    assert quality is not None
    return quality


def record(folder: Path, **changes: object) -> None:
    """Change the manifest, which nobody signs."""
    write_manifest(folder, read_manifest(folder).model_copy(update=changes))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("The lighthouse keeper wrote a letter to his sister in the city. " * 20, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def recorded(smollm2_bundle: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's bundle with a contract."""
    folder = tmp_path_factory.mktemp("contract") / "bundle"
    shutil.copytree(smollm2_bundle, folder, copy_function=_link)
    before = read_manifest(folder)
    shown = command("evaluate", folder, "--text", text, *WINDOWS, "--record").stdout
    assert "perplexity" in shown and "recorded" in shown
    assert read_manifest(folder).model_copy(update={"quality": None}) == before, "nothing else was written"
    return folder


def _link(source: str, target: str) -> None:
    """Weights are not copied; edgephi.json is replaced when it is written, so the original keeps its own."""
    Path(target).hardlink_to(source)


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "copy", copy_function=_link))


def test_the_contract_is_reproduced(recorded: Path, text: Path) -> None:
    quality = contract_of(recorded)
    assert [answer.prompt for answer in quality.golden] == list(PROMPTS)
    assert all(min(answer.margins) > 0 for answer in quality.golden)
    assert quality.versions["onnxruntime-genai"] and quality.providers == ("CPUExecutionProvider",)
    plain = command("verify", recorded, "--run").stdout
    assert "golden tokens on CPUExecutionProvider" in plain
    kept = json.loads(command("verify", recorded, "--run", "--text", text, "--json").stdout)["contract"]
    assert kept["golden_tokens"] == sum(len(answer.token_ids) for answer in quality.golden)
    assert kept["near_ties"] == 0
    assert kept["figures"]["perplexity"] == pytest.approx(quality.perplexity, rel=1e-3)


def test_golden_answers_are_what_generate_says(recorded: Path) -> None:
    golden = contract_of(recorded).golden[0]
    with load(recorded) as model:
        answer = model.generate(golden.prompt, max_new_tokens=len(golden.token_ids)).result()
    assert answer.token_ids == golden.token_ids
    assert " Paris" in answer.text


def test_a_tampered_golden_token_is_found_and_named(copy: Path) -> None:
    quality = contract_of(copy)
    answer = quality.golden[1]
    place = max(range(len(answer.token_ids)), key=lambda index: answer.margins[index])
    tokens = (*answer.token_ids[:place], 500, *answer.token_ids[place + 1 :])
    golden = (quality.golden[0], answer.model_copy(update={"token_ids": tokens}), *quality.golden[2:])
    versions = quality.versions | {"onnxruntime": "1.0"}
    record(copy, quality=quality.model_copy(update={"golden": golden, "versions": versions}))
    with pytest.raises(QualityError) as caught:
        command("verify", copy, "--run")
    said = str(caught.value)
    for words in (repr(answer.prompt), f"token {place + 1}:", "expected 500", f"got {answer.token_ids[place]}"):
        assert words in said
    assert "onnxruntime 1.0 then, 1." in said and "numpy" not in said
    assert "\n" not in said


def test_other_weights_are_found_though_their_hashes_are_recorded(
    copy: Path, smollm2_gguf: Path, text: Path, tmp_path: Path
) -> None:
    """Another quantization of the same model answers otherwise; perplexity alone would tell too."""
    edgephi.export(smollm2_gguf, tmp_path / "b128", block_size=128, quantize="rtn")
    for name in ("model.onnx", "model_last_row.onnx", "model_rows.onnx", "model.onnx.data"):
        (copy / name).unlink()
        shutil.move(tmp_path / "b128" / name, copy / name)
    with pytest.raises(BundleError):
        command("verify", copy, "--run")
    manifest: Manifest = read_manifest(copy)
    record(copy, files=tuple(describe_file(copy, entry.path) for entry in manifest.files))
    with pytest.raises(QualityError, match=r"the answer to .* changed at token .* the versions are those of then"):
        command("verify", copy, "--run")
    golden: tuple[GoldenAnswer, ...] = contract_of(copy).golden
    with load(copy) as model:
        found = reproduce(model, golden)
    assert found.margin_shift > NEAR_TIE


def test_a_changed_figure_is_found(copy: Path, text: Path) -> None:
    quality = contract_of(copy)
    record(copy, quality=quality.model_copy(update={"perplexity": quality.perplexity * 1.05}))
    command("verify", copy, "--run")
    with pytest.raises(QualityError, match=r"perplexity on story\.txt was"):
        command("verify", copy, "--run", "--text", text)


def test_another_text_and_a_bundle_without_contract_are_refused(
    recorded: Path, smollm2_bundle: Path, tmp_path: Path
) -> None:
    other = tmp_path / "story.txt"
    other.write_text("Something else")
    with pytest.raises(UsageError, match="not the text"):
        command("verify", recorded, "--run", "--text", other)
    with pytest.raises(UsageError, match="--run"):
        command("verify", recorded, "--text", other)
    with pytest.raises(BundleError, match="no quality contract"):
        command("verify", smollm2_bundle, "--run")
    with pytest.raises(UsageError, match="--text"):
        command("evaluate", smollm2_bundle, "--choices", other, "--record")


def test_a_tokenizer_that_cuts_prompts_otherwise_is_found(copy: Path) -> None:
    quality = contract_of(copy)
    ids = quality.golden[0].prompt_ids
    golden = (quality.golden[0].model_copy(update={"prompt_ids": (*ids, 5)}), *quality.golden[1:])
    record(copy, quality=quality.model_copy(update={"golden": golden}))
    with pytest.raises(QualityError, match="other tokens"):
        command("verify", copy, "--run")


def test_the_float_model_is_streamed_from_the_checkpoint(smollm2_bundle: Path, smollm2_gguf: Path, text: Path) -> None:
    arguments = ("evaluate", smollm2_bundle, "--against", smollm2_gguf, "--text", text, *WINDOWS, "--json")
    found = json.loads(command(*arguments).stdout)
    figures = found["figures"]
    assert found["against"] == smollm2_gguf.name and found["recorded"] is False
    # int8 activations cost a little; one wrong layer, norm or rope would cost whole nats
    assert 0 < figures["kl_mean"] < 0.05
    assert figures["kl_mean"] < figures["kl_p99"]
    assert 0.9 < figures["top1_agreement"] <= 1
    assert figures["against_perplexity"] == pytest.approx(figures["perplexity"], rel=0.05)


def test_a_flip_counts_when_the_logits_moved_further_than_rounding_moves_them() -> None:
    assert Flip("p", 0, 1, 2, margin=0.1, gap=0.1).is_near_tie
    assert not Flip("p", 0, 1, 2, margin=0.1, gap=NEAR_TIE).is_near_tie
    assert not Flip("p", 0, 1, 2, margin=3.0, gap=0.01).is_near_tie
