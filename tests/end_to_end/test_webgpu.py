"""The WebGPU graph really runs, on Mesa's software Vulkan or a GPU: the CPU's tokens, and proof of what ran where.

The first run on a machine compiles shaders, a minute or so; Mesa keeps them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

import edgephi
from edgephi.bundle import read_manifest
from edgephi.commands.app import app
from edgephi.errors import DeviceError
from edgephi.runtime.loading import load
from edgephi.runtime.placement.dispatch import plan, verify_placement
from edgephi.runtime.placement.nodes import Placement
from tests.end_to_end.test_export import TOKENIZER, added_token
from tests.tiny_phi import PHI_4_MINI, tiny_phi

PROFILE = "webgpu-gpu"
CPU, WEBGPU = "CPUExecutionProvider", "WebGpuExecutionProvider"
PROMPT, TOKENS = "thequickbrownfox", 24

pytestmark = pytest.mark.usefixtures("software_webgpu")


@pytest.fixture(scope="module")
def checkpoint(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Phi-3 with a tokenizer of 27 tokens, none of which it ever ends at."""
    folder = Path(shutil.copytree(fixtures / "phi3-mha", tmp_path_factory.mktemp("webgpu") / "checkpoint"))
    tokenizer = TOKENIZER | {"added_tokens": [added_token(26, "</s>")]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "tokenizer_class": "GPT2Tokenizer"}))
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 26, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Computes in float32: for comparisons."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    edgephi.export(checkpoint, folder, accuracy_level=1, quantize="rtn", devices=["cpu", "webgpu"])
    return folder


def answer(bundle: Path, device: str) -> tuple[tuple[int, ...], str, Placement]:
    with load(bundle, device) as model:
        got = model.generate(PROMPT, max_new_tokens=TOKENS).result()
        return got.token_ids, got.provider, model.placement


def test_the_greedy_tokens_are_those_of_the_cpu_and_the_placement_proves_where(bundle: Path) -> None:
    cpu_tokens, cpu_provider, cpu_placement = answer(bundle, "cpu")
    tokens, provider, placement = answer(bundle, PROFILE)
    assert tokens == cpu_tokens
    assert len(tokens) == TOKENS
    assert (cpu_provider, provider) == ("cpu", "webgpu")
    assert set(cpu_placement.nodes_per_provider) == {CPU}
    on_gpu = next(part for part in placement.providers if part.provider == WEBGPU)
    assert on_gpu.op_types["com.microsoft::MatMulNBits"] == 4 * 2 + 1
    assert on_gpu.op_types["com.microsoft::GroupQueryAttention"] == 2
    assert on_gpu.weight_bytes == cpu_placement.providers[0].weight_bytes > 0.9 * data_bytes(bundle)
    # what stays is arithmetic on the attention mask's length, and on the row that gets logits
    assert {one.cause for one in placement.kept} == {"integers"}
    assert sum(one.nodes for one in placement.kept) == placement.nodes_per_provider[CPU] == 10
    assert all(one.weight_bytes == 0 and "integers" in one.why for one in placement.kept)


def data_bytes(bundle: Path) -> int:
    return (bundle / "model.onnx.data").stat().st_size


def test_the_twin_tells_what_the_session_of_onnxruntime_genai_does(bundle: Path, tmp_path: Path) -> None:
    """og's own session, profiled by onnxruntime: every kernel that ran, with its provider. In a process of its own,
    because a profile is written when its session ends."""
    place = verify_placement(bundle, plan(bundle, read_manifest(bundle), PROFILE, False).choices[0])
    program = (
        "import json, sys\nfrom pathlib import Path\nimport numpy as np, onnxruntime_genai as og\n"
        "from edgephi.bundle import read_manifest\n"
        "from edgephi.runtime.placement.dispatch import plan, verify_placement\n"
        "from edgephi.runtime.placement.config import read_genai_config\n"
        "from edgephi.runtime.engines.genai_settings import og_config\n"
        "folder = Path(sys.argv[1])\n"
        "place = verify_placement(folder, plan(folder, read_manifest(folder), sys.argv[3], False).choices[0])\n"
        "session = {'enable_profiling': sys.argv[2]}\n"
        "with og_config(folder, read_genai_config(folder, read_manifest(folder)), place, 1) as config:\n"
        "    config.overlay(json.dumps({'model': {'decoder': {'session_options': session}}}))\n"
        "    model = og.Model(config)\n"
        "params = og.GeneratorParams(model)\nparams.set_search_options(max_length=16)\n"
        "generator = og.Generator(model, params)\ngenerator.append_tokens(np.array([1, 2, 3], np.int32))\n"
        "generator.get_logits()\ndel generator, params, model\n"
    )
    subprocess.run([sys.executable, "-c", program, str(bundle), str(tmp_path / "profile"), PROFILE], check=True)
    (profile,) = tmp_path.glob("profile*.json")
    ran = {
        event["name"].removesuffix("_kernel_time"): (event["args"]["provider"], event["args"]["op_name"])
        for event in json.loads(profile.read_text())
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }
    on_cpu = Counter(operator for provider, operator in ran.values() if provider == CPU)
    assert place.placement is not None
    assert on_cpu == {one.op_type: one.nodes for one in place.placement.kept}
    on_gpu = Counter(operator for provider, operator in ran.values() if provider == WEBGPU)
    assert on_gpu["MatMulNBits"] == 9
    assert on_gpu["GroupQueryAttention"] == 2


def test_a_sequence_beyond_the_rope_switch_takes_the_long_rope(tmp_path: Path) -> None:
    """16 tokens take the short one. Fewer than 32 rows a run: Mesa's driver computes wider ones wrongly."""
    folder = tmp_path / "bundle"
    source = tiny_phi(tmp_path / "checkpoint", PHI_4_MINI, context=16)
    edgephi.export(source, folder, accuracy_level=1, quantize="rtn", devices=["cpu", "webgpu"])
    prompts = [list(range(5, 5 + length)) for length in (12, 24)]
    cpu, gpu = (logits_and_tokens(folder, prompts, device) for device in ("cpu", PROFILE))
    for (expected, tokens), (got, gpu_tokens) in zip(cpu, gpu, strict=True):
        assert np.abs(got - expected).max() < 1e-4 * expected.std()
        assert gpu_tokens == tokens


def logits_and_tokens(
    folder: Path, prompts: list[list[int]], device: str
) -> list[tuple[NDArray[np.float32], list[int]]]:
    """Logits of the first new token and eight tokens behind each prompt; those behind the shorter cross the switch."""
    found = []
    with load(folder, device) as model:
        for prompt in prompts:
            rows: list[NDArray[np.float32]] = []

            def choose(logits: NDArray[np.float32], rows: list[NDArray[np.float32]] = rows) -> int:
                rows.append(np.array(logits, np.float32))
                return int(logits.argmax())

            sequence = model.open_sequence(64)
            sequence.prefill(prompt, lambda: False)
            tokens = [sequence.step(choose) for _ in range(8)]
            found.append((rows[0], tokens))
            sequence.close()
    return found


def test_float16_keeps_to_the_cpus_tokens_as_far_as_its_logits_allow(checkpoint: Path, tmp_path: Path) -> None:
    """int8 activations on the CPU, float16 on WebGPU: near-ties may flip, the first token is clear enough."""
    edgephi.export(checkpoint, tmp_path / "fast", quantize="rtn", devices=["webgpu"])
    assert read_manifest(tmp_path / "fast").graph_for("webgpu").computes_in == "float16"  # type: ignore[union-attr]
    assert answer(tmp_path / "fast", "cpu")[0][0] == answer(tmp_path / "fast", PROFILE)[0][0]


def test_a_conversation_rewinds_its_cache_on_the_device(bundle: Path) -> None:
    """Prefix reuse: the second answer computes only what the first did not."""
    with load(bundle, PROFILE) as model:
        sequence = model.open_sequence(60)
        prompt = model.tokenizer.encode(PROMPT)
        sequence.prefill(prompt, lambda: False)
        first = sequence.step(lambda logits: int(np.argmax(logits)))
        assert sequence.reuse(prompt) == len(prompt) - 1
        sequence.prefill(prompt[-1:], lambda: False)
        assert sequence.step(lambda logits: int(np.argmax(logits))) == first
        sequence.close()


@pytest.mark.usefixtures("no_gpu")
def test_a_software_driver_is_never_chosen_by_itself(bundle: Path) -> None:
    with load(bundle) as model:
        assert model.place.choice.provider == "cpu"
    with pytest.raises(DeviceError, match="gpu-software") as caught:
        load(bundle, "gpu")
    assert caught.value.step == "device"
    assert "--device webgpu-gpu" in caught.value.remedy


@pytest.mark.usefixtures("no_gpu")
def test_a_fallback_is_in_the_statistics_of_every_answer(bundle: Path) -> None:
    with load(bundle, "gpu", fallback=True) as model:
        got = model.generate(PROMPT, max_new_tokens=2).result()
    assert got.provider == "cpu"
    assert "gpu-software" in got.rejected[0]


@pytest.mark.usefixtures("no_gpu")
def test_without_the_variable_that_allows_it_the_software_driver_is_no_device(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgephi.devices.providers import SOFTWARE_GPU

    monkeypatch.delenv(SOFTWARE_GPU)
    with pytest.raises(DeviceError) as caught:
        load(bundle, PROFILE)
    assert caught.value.step == "device"
    assert SOFTWARE_GPU in caught.value.remedy


def test_the_command_takes_a_profile_and_reports_the_provider(bundle: Path) -> None:
    arguments = ["generate", str(bundle), PROMPT, "--raw", "--max-new-tokens", "3", "--json", "--device", PROFILE]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["provider"], record["rejected"], record["new_tokens"]) == ("webgpu", [], 3)


def test_a_placement_is_json(bundle: Path, software_webgpu: tuple[str, ...]) -> None:
    from edgephi.runtime.placement.report import placement_report

    record = json.loads(json.dumps(placement_report(bundle, PROFILE).as_json()))
    assert record["placement"]["requested"] == [WEBGPU]
    assert record["device"]["kind"] == software_webgpu[0]


def test_the_program_ends_well_with_a_model_left_open(bundle: Path) -> None:
    program = (
        "import edgephi, sys; m = edgephi.load(sys.argv[1], sys.argv[2]); print(m.generate('a').result().provider)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(bundle), PROFILE], capture_output=True, text=True, env=os.environ.copy()
    )
    assert (done.returncode, done.stdout) == (0, "webgpu\n"), done.stderr
