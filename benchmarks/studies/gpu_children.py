"""What `gpu_check` measures, each call in a process of its own, so that a driver that crashes ends one figure only.

Arguments and answers are plain data (`edgephi.child.call`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgephi.benchmarks.bench.cases import Case
from edgephi.benchmarks.bench.measure import Instruments, measure
from edgephi.errors import one_line
from edgephi.ort import open_session, session_options
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.sampling import Chooser

if TYPE_CHECKING:
    import onnxruntime

WARM_UP_TOKENS = 8
PREFIX = "past_key_values."


def token_ids(count: int, vocabulary: int) -> tuple[int, ...]:
    """The same ids for every device: drawn evenly, from seed 0."""
    return tuple(int(one) for one in np.random.default_rng(0).integers(0, vocabulary, count))


def answer(folder: str, device: str, prompt: int, tokens: int) -> dict[str, Any]:
    """Decode greedily behind a prompt.

    Returns:
        tokens, first_logits ([vocabulary]), margins (the best logit less the second, per token), and `place`.
    """
    kept: dict[str, Any] = {"margins": []}

    def choose(logits: NDArray[Any]) -> int:
        row = logits.astype(np.float32)
        kept.setdefault("first_logits", row.tolist())
        second, first = np.partition(row, -2)[-2:]
        kept["margins"].append(float(first - second))
        return int(row.argmax())

    with load(folder, device, prepacked="never") as model:
        sequence = model.open_sequence(prompt + tokens)
        sequence.prefill(token_ids(prompt, model.manifest.model.vocabulary_size), lambda: False)
        chosen = [sequence.step(choose) for _ in range(tokens)]
        return {"tokens": chosen, **kept, "place": _place(model)}


def speed(
    folder: str, device: str, prompts: Sequence[int], depths: Sequence[int], tokens: int, rounds: int
) -> dict[str, Any]:
    """Prefill from an empty cache, and decode behind so many tokens, each `rounds` times after one uncounted time.

    Returns:
        prefill_s and decode_s: seconds a prompt, seconds a token (medians within an answer), a list for each length;
        decoded: the tokens of each depth; and `place`.
    """
    with load(folder, device, prepacked="never") as model:
        prefill, decode, decoded = {}, {}, {}
        for length in prompts:
            case = Case("prefill", "prefill", "prefill", (), token_ids(length, model.manifest.model.vocabulary_size), 1)
            prefill[str(length)] = [one.first_token_s for one in _samples(model, case, rounds)]
        for depth in depths:
            ids = token_ids(depth + WARM_UP_TOKENS, model.manifest.model.vocabulary_size)
            case = Case("decode", "decode", "decode", ids[:depth], ids[depth:], tokens + 1)
            samples = _samples(model, case, rounds)
            decode[str(depth)] = [median(one.intervals_s) for one in samples]
            decoded[str(depth)] = list(samples[0].tokens)
        return {"prefill_s": prefill, "decode_s": decode, "decoded": decoded, "place": _place(model)}


def _samples(model: Model, case: Case, rounds: int) -> list[Any]:
    return [measure(model.open_sequence, case, Instruments()) for _ in range(rounds + 1)][1:]


def _place(model: Model) -> dict[str, Any]:
    """provider, kind of device, threads, and the placement (see `runtime/placement/nodes.py`)."""
    device = model.place.device
    return {
        "provider": model.place.choice.provider,
        "kind": "cpu" if device is None else device.kind,
        "threads": model.threads,
        "placement": asdict(model.placement),
    }


def plain_loop(
    graph: str, kinds: list[str], prompts: Sequence[int], depths: Sequence[int], tokens: int, rounds: int, chunk: int
) -> dict[str, Any]:
    """WebGPU without onnxruntime-genai: onnxruntime's Python API, the KV cache in buffers of the device.

    Past and present keys and values are bound to one buffer. Only token ids and the attention mask go to the device,
    and only the logits come back.

    Returns:
        allocated: by way of making a buffer (`memory_info`: of the device, `session`: of the session), "works" or what
        onnxruntime said; where one works also used, prefill_s (in pieces of `chunk`), whole_prefill_s (in one piece),
        whole_refused (what onnxruntime said to that, by length), decode_s and decoded, as in `speed`.
    """
    from edgephi.devices.providers import register
    from edgephi.runtime.placement.probe import pick_device

    raw = pick_device("webgpu", register("webgpu"), kinds).raw
    options = session_options(device=raw, device_options={}, spinning=False, record_placement=True)
    session = open_session(graph, options, where=graph, remedy="Run `edgephi doctor`")
    ways = _ways(session, raw)
    allocated: dict[str, str] = {}
    found: dict[str, Any] = {}
    for name, make in ways.items():
        try:
            loop = PlainLoop(session, make, 64)
            loop.feed(token_ids(4, loop.vocabulary))
            allocated[name] = "works"
        except Exception as error:  # onnxruntime's own, and what its wrapper raises
            allocated[name] = one_line(error)[:300]
            continue
        if not found:
            found = {"used": name, **_plain_speed(session, make, prompts, depths, tokens, rounds, chunk)}
    return {"allocated": allocated, **found}


def _ways(session: Any, device: Any) -> dict[str, Callable[[list[int], Any], Any]]:
    from onnxruntime import OrtDeviceMemoryType, OrtValue

    def by_memory_info(shape: list[int], kind: Any) -> Any:
        info = device.memory_info(OrtDeviceMemoryType.DEFAULT)
        return OrtValue.ortvalue_from_shape_and_type(shape, kind, memory_info=info)

    def by_session(shape: list[int], kind: Any) -> Any:
        return session.create_ortvalue_from_shape_and_type(shape, kind, "gpu", 0, device.device.vendor_id)

    return {"memory_info": by_memory_info, "session": by_session}


class PlainLoop:
    """One sequence: a binding, and a cache for `capacity` tokens."""

    def __init__(
        self, session: onnxruntime.InferenceSession, make: Callable[[list[int], Any], Any], capacity: int
    ) -> None:
        self._session, self._binding, self.length = session, session.io_binding(), 0
        ports = session.get_inputs()
        past = {port.name: port.shape for port in ports if port.name.startswith(PREFIX)}
        self._type = np.float16 if any("float16" in port.type for port in ports) else np.float32
        self.vocabulary = int(next(port.shape[-1] for port in session.get_outputs() if port.name == "logits"))
        self._caches = {name: make([1, shape[1], capacity, shape[3]], self._type) for name, shape in past.items()}
        for name, cache in self._caches.items():
            self._binding.bind_ortvalue_input(name, cache)
            self._binding.bind_ortvalue_output(name.replace(PREFIX, "present."), cache)
        self._fed: dict[str, Any] = {}

    def feed(self, tokens: Sequence[int]) -> NDArray[Any]:
        """Append tokens; the last one's logits."""
        self.length += len(tokens)
        self._fed = {
            "input_ids": np.asarray([tokens], np.int64),
            "attention_mask": np.ones((1, self.length), np.int64),
            "logits": np.empty((1, len(tokens), self.vocabulary), self._type),
        }
        for name in ("input_ids", "attention_mask"):
            self._binding.bind_cpu_input(name, self._fed[name])
        row: NDArray[Any] = self._fed["logits"]
        self._binding.bind_output("logits", "cpu", 0, self._type, row.shape, row.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        last: NDArray[Any] = row[0, -1]
        return last


def _plain_speed(
    session: Any,
    make: Callable[[list[int], Any], Any],
    prompts: Sequence[int],
    depths: Sequence[int],
    tokens: int,
    rounds: int,
    chunk: int,
) -> dict[str, Any]:
    choose: Chooser = lambda logits: int(logits.argmax())  # noqa: E731
    found: dict[str, dict[str, list[Any]]] = {
        "prefill_s": {},
        "whole_prefill_s": {},
        "decode_s": {},
        "decoded": {},
    }
    said: dict[str, str] = {}

    def fed(ids: Sequence[int], capacity: int, piece: int) -> tuple[PlainLoop, int, float]:
        loop, started, token = PlainLoop(session, make, capacity), perf_counter(), 0
        for start in range(0, len(ids), piece):
            token = choose(loop.feed(ids[start : start + piece]))
        return loop, token, perf_counter() - started

    vocabulary = PlainLoop(session, make, 1).vocabulary
    for length in prompts:
        ids = token_ids(length, vocabulary)
        found["prefill_s"][str(length)] = [fed(ids, length + 1, chunk)[2] for _ in range(rounds + 1)][1:]
        try:
            found["whole_prefill_s"][str(length)] = [fed(ids, length + 1, length)[2] for _ in range(rounds + 1)][1:]
        except Exception as error:  # the logits of all rows are a buffer that a device may refuse
            said[str(length)] = one_line(error)[:300]
    for depth in depths:
        ids, times = token_ids(depth + WARM_UP_TOKENS, vocabulary), []
        for _ in range(rounds + 1):
            loop, token, _spent = fed(ids, len(ids) + tokens + 1, chunk)
            steps, chosen = [], [token]
            for _ in range(tokens):
                started = perf_counter()
                chosen.append(choose(loop.feed(chosen[-1:])))
                steps.append(perf_counter() - started)
            times.append(median(steps))
            found["decoded"][str(depth)] = chosen
        found["decode_s"][str(depth)] = times[1:]
    return {**found, "whole_refused": said}
