"""Many threads ask one model, and change their minds: nothing is lost, nothing mixed up, and the memory stays flat."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import psutil
import pytest

import edgephi
from edgephi.devices.memory import return_freed_memory
from edgephi.runtime import scheduler, stream
from edgephi.runtime.engines import onnx, onnx_sequence, onnx_slots
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from tests.interrupts import struck_in
from tests.tiny_phi import PHI_3, PHI_4_MINI, tiny_phi

THREADS, REQUESTS = 8, 100
NEW_TOKENS = 12
FLAT_BYTES = 20e6


@pytest.fixture(scope="module", params=["phi-3", "phi-4-mini"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("callers")
    shape = {"phi-3": PHI_3, "phi-4-mini": PHI_4_MINI}[request.param]
    # float32 throughout: with rounded activations a near tie could fall either way in a batch
    edgephi.export(tiny_phi(folder / "source", shape, 128), folder / "bundle", precision="fp32")
    return folder / "bundle"


def prompts() -> list[str]:
    """Many begin alike; with LongRoPE some answers cross from one rope into the other."""
    rng = random.Random(7)
    letters = [chr(0x4E00 + index) for index in range(3, 60)]
    beginnings = ["".join(rng.choices(letters, k=length)) for length in (30, 90, 118)]
    return [rng.choice(beginnings) + "".join(rng.choices(letters, k=rng.randrange(1, 9))) for _ in range(24)]


def test_eight_threads_of_a_hundred_requests(bundle: Path) -> None:
    asked = prompts()
    with load(bundle, threads=1, prefix_cache_bytes=0) as lone:
        expected = {prompt: lone.generate(prompt, max_new_tokens=NEW_TOKENS).result().token_ids for prompt in asked}
    with load(bundle, threads=1, max_parallel=4, prefix_cache_bytes=4 * 2**20) as model:
        run(model, asked, expected, requests=20)  # the caches and the allocators fill
        before = resident()
        cancelled = run(model, asked, expected, requests=REQUESTS)
        grown = resident() - before
        statistics = model.engine.prefix_statistics  # type: ignore[attr-defined]  # the CPU's engine has them
    assert 0 < cancelled < THREADS * REQUESTS / 2
    assert statistics.reused_tokens > statistics.prompt_tokens / 3
    assert statistics.stored_bytes <= statistics.limit_bytes
    assert grown < FLAT_BYTES, f"{grown / 1e6:.1f} MB more"


def test_ctrl_c_anywhere_in_one_thread_changes_no_answer_of_another(bundle: Path) -> None:
    asked = prompts()
    with load(bundle, threads=1, prefix_cache_bytes=0) as lone:
        expected = {prompt: lone.generate(prompt, max_new_tokens=4).result().token_ids for prompt in asked}
    struck, wrong, number = 0, list[str](), 0

    def other(seed: int) -> None:
        for prompt in random.Random(seed).choices(asked, k=2):
            if model.generate(prompt, max_new_tokens=4).result().token_ids != expected[prompt]:
                wrong.append(prompt)

    with load(bundle, threads=1, max_parallel=2, prefix_cache_bytes=2**19, speculation=True) as model:
        for seed in range(60):
            number += 5 if number < 150 else 12
            threads = [threading.Thread(target=other, args=(2 * seed + one,), daemon=True) for one in range(2)]
            for thread in threads:
                thread.start()
            question = model.generate(asked[seed % len(asked)], max_new_tokens=4)
            struck += struck_in(question.result, number, stream, onnx, onnx_sequence, onnx_slots, scheduler)
            for thread in threads:
                thread.join(30)
            assert not any(thread.is_alive() for thread in threads), f"somebody waits for ever, place {number}"
            assert not wrong, f"place {number}"
        for prompt in asked:
            assert model.generate(prompt, max_new_tokens=4).result().token_ids == expected[prompt]
    assert struck > 20


def run(model: Model, asked: list[str], expected: dict[str, tuple[int, ...]], *, requests: int) -> int:
    """How many were cancelled; the others' answers, and what was heard of the cancelled ones, are compared."""
    wrong, cancelled, done = list[str](), 0, 0
    lock = threading.Lock()

    def caller(seed: int) -> None:
        nonlocal cancelled, done
        rng = random.Random(seed)
        for _ in range(requests):
            prompt = rng.choice(asked)
            stream = model.generate(prompt, max_new_tokens=NEW_TOKENS)
            stop_after = rng.randrange(NEW_TOKENS) if rng.random() < 0.3 else None
            timer = threading.Timer(rng.random() * 0.02, stream.cancel) if rng.random() < 0.1 else None
            if timer is not None:
                timer.start()
            for heard, _ in enumerate(stream):
                if heard == stop_after:
                    stream.cancel()
            given = stream.result()
            with lock:
                done += 1
                cancelled += given.finish == "cancelled"
                whole = expected[prompt]
                if given.token_ids != (whole if given.finish != "cancelled" else whole[: len(given.token_ids)]):
                    wrong.append(f"{given.token_ids} where {whole} was expected, {given.finish}")
            if timer is not None:
                timer.join()

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
    assert done == THREADS * requests
    assert not wrong, wrong[:3]
    return cancelled


def resident() -> int:
    return_freed_memory()
    return int(psutil.Process().memory_info().rss)
