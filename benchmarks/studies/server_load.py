"""Several clients at a server: whether every answer is the right one, and how fast they come.

    python -m edgephi.benchmarks.studies.server_load DIR --seconds 60
    python -m edgephi.benchmarks.studies.server_load DIR --seconds 60 --llama-python llama/bin/python --gguf FILE

`edgephi serve DIR` runs in a process of its own. First one client asks every request alone, greedily; those answers are
the reference. Then several ask for some time, in an order of their own, and a third of the requests are left midway.
Answers to the end are compared with their reference, and those that were left with its beginning. Where two tokens are
nearly as likely, a batch may choose the other one: such an answer is counted as `differs`, and as `mixed up` if it goes
on like the reference of another request. A prompt whose beginning is found in the prefix cache may choose the other one
too, so the server has no such cache here, unless --prefix-cache says otherwise.

With --llama-python the same requests go to llama.cpp's server (llama-cpp-python[server] of that interpreter) on --gguf,
whose answers are compared with its own references.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from edgephi.benchmarks.report import circumstances, in_one_line, markdown_table, run, write_json
from edgephi.errors import EngineError

START_S = 120
TOPICS = ("rivers", "bread", "the moon", "bicycles", "glass", "bees", "chess", "tea", "maps", "trains", "salt", "rain")
PADDING = "Keep in mind that the reader is new to the subject and wants short sentences. "
SAME = 24
"""Characters that an answer shares with another request's reference, and not with its own, if they are mixed up."""


@dataclass(frozen=True)
class Ask:
    """A request."""

    prompt: str
    max_tokens: int


@dataclass
class Outcome:
    """What became of the requests of one phase."""

    counts: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def row(self, name: str, resident: float) -> list[str]:
        first = sorted(self.first_token_s)
        p95 = first[int(0.95 * (len(first) - 1))] if first else 0.0
        wrong = sum(self.counts[word] for word in ("differs", "mixed up", "cut off", "error"))
        return [
            name,
            f"{self.counts['whole']}",
            f"{self.counts['left']}",
            f"{self.counts['429']}",
            f"{wrong}",
            f"{self.tokens / self.seconds:.1f}",
            f"{1000 * median(first):.0f}" if first else "",
            f"{1000 * p95:.0f}",
            f"{resident / 1e6:.0f}",
        ]


HEADER = (
    "server, clients",
    "whole",
    "left",
    "429",
    "wrong",
    "tokens/s",
    "first token, ms (median)",
    "95 %",
    "resident MB",
)


def asks() -> list[Ask]:
    """Requests of mixed lengths: prompts of about 20 to 250 tokens, answers of 16 to 96."""
    return [
        Ask(f"{PADDING * (number % 4 * 4)}Say {3 + number} things about {topic}.", 16 + 16 * (number % 6))
        for number, topic in enumerate(TOPICS)
    ]


def stream(port: int, model: str, ask: Ask, leave_after: int | None) -> Iterator[str]:
    """Pieces of an answer; a status that is not 200 is raised as HTTPException. It is left by closing."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        body = {"model": model, "messages": [{"role": "user", "content": ask.prompt}], "stream": True}
        body |= {"max_tokens": ask.max_tokens, "temperature": 0}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answered = connection.getresponse()
        if answered.status != 200:
            answered.read()
            raise http.client.HTTPException(str(answered.status))
        heard = 0
        while line := answered.readline():
            if line.startswith(b"data: [DONE]"):
                return
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise http.client.HTTPException("error")
            piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
            if piece:
                heard += 1
                yield piece
                if heard == leave_after:
                    return
        raise http.client.HTTPException("cut off")
    finally:
        connection.close()


def one(port: int, model: str, ask: Ask, leave_after: int | None, outcome: Outcome, lock: threading.Lock) -> str:
    """Ask once; the text that came. What became of it is counted, unless it has to be compared."""
    text, pieces, first = "", 0, None
    began = time.perf_counter()
    word = ""
    try:
        for piece in stream(port, model, ask, leave_after):
            first = time.perf_counter() - began if first is None else first
            text, pieces = text + piece, pieces + 1
    except (OSError, http.client.HTTPException) as problem:
        word = str(problem) if str(problem) in ("429", "cut off") else "error"
    with lock:
        outcome.tokens += pieces
        if first is not None:
            outcome.first_token_s.append(first)
        if word:
            outcome.counts[word] += 1
    if word == "429":
        time.sleep(0.2)
    return text if not word else ""


def compared(text: str, own: str, others: Sequence[str], *, left: bool) -> str:
    """What an answer is, beside its reference and those of other requests."""
    if text == own or (left and own.startswith(text)):
        return "left" if left else "whole"
    place = next((place for place, (a, b) in enumerate(zip(text, own, strict=False)) if a != b), 0)
    rest = text[max(0, place - 4) : place + SAME]
    if len(rest) > SAME and any(rest in other for other in others if other != own):
        return "mixed up"
    return "differs"


def alone(port: int, model: str, requests: Sequence[Ask]) -> tuple[Outcome, dict[Ask, str]]:
    """Every request by itself, twice; the second time is measured and compared with the first."""
    lock, references = threading.Lock(), dict[Ask, str]()
    for ask in requests:
        references[ask] = one(port, model, ask, None, Outcome(), lock)
    outcome, began = Outcome(), time.perf_counter()
    for ask in requests:
        text = one(port, model, ask, None, outcome, lock)
        outcome.counts[compared(text, references[ask], (), left=False)] += 1
    outcome.seconds = time.perf_counter() - began
    return outcome, references


def together(port: int, model: str, references: Mapping[Ask, str], clients: int, seconds: float) -> Outcome:
    """Several clients for some time; a third of the requests are left midway."""
    outcome, lock = Outcome(), threading.Lock()
    end = time.perf_counter() + seconds

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while time.perf_counter() < end:
            ask = rng.choice(list(references))
            leave_after = rng.randrange(1, ask.max_tokens) if rng.random() < 1 / 3 else None
            text = one(port, model, ask, leave_after, outcome, lock)
            if text:
                left = leave_after is not None and text != references[ask]
                word = compared(text, references[ask], list(references.values()), left=left)
                with lock:
                    outcome.counts[word] += 1

    began = time.perf_counter()
    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcome.seconds = time.perf_counter() - began
    return outcome


@contextmanager
def process(command: Sequence[str], *, tells: bool) -> Iterator[tuple[psutil.Process, str]]:
    """A server, until the block ends, and the first line it prints if it `tells` one."""
    pipe = subprocess.PIPE if tells else subprocess.DEVNULL
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as child:
        try:
            yield psutil.Process(child.pid), child.stdout.readline() if child.stdout is not None else ""
        finally:
            child.terminate()
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                child.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    """Until something listens there.

    Raises:
        EngineError: nothing does, for two minutes.
    """
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise EngineError("the other server does not start", remedy="Start it by hand to see why")


def measure(name: str, port: int, model: str, seen: psutil.Process, clients: int, seconds: float) -> list[list[str]]:
    """The two rows of a server."""
    requests = asks()
    lone, references = alone(port, model, requests)
    rows = [lone.row(f"{name}, 1", resident(seen))]
    shared = together(port, model, references, clients, seconds)
    print(f"{name}: {json.dumps(shared.counts)}, {shared.tokens} pieces", file=sys.stderr)
    return [*rows, shared.row(f"{name}, {clients}", resident(seen))]


def resident(seen: psutil.Process) -> float:
    """Bytes of a server and its children."""
    return sum(one.memory_info().rss for one in (seen, *seen.children(recursive=True)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="edgephi.benchmarks.studies.server_load", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="a bundle whose model has a chat template")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--parallel", type=int, default=4, help="answers that edgephi computes at the same time")
    parser.add_argument("--queue", type=int, default=32)
    parser.add_argument("--prefix-cache", type=int, default=0, metavar="MIB")
    parser.add_argument("--llama-python", metavar="INTERPRETER", help="one that has llama-cpp-python[server]")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same weights for llama.cpp")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    if (given.llama_python is None) != (given.gguf is None):
        parser.error("--llama-python and --gguf go together")
    load_before = psutil.getloadavg()
    command = [sys.executable, "-m", "edgephi", "serve", f"m={given.folder}", "--port", "0", "--idle", "0"]
    command += ["--parallel", str(given.parallel), "--queue", str(given.queue)]
    command += ["--prefix-cache", str(given.prefix_cache)]
    with process(command, tells=True) as (seen, line):
        found = re.match(r"http://127\.0\.0\.1:(\d+)/", line)
        if found is None:
            raise EngineError("edgephi serve does not start", remedy="Start it by hand to see why")
        rows = measure("edgephi", int(found[1]), "m", seen, given.clients, given.seconds)
    if given.llama_python is not None:
        port = free_port()
        command = [given.llama_python, "-m", "llama_cpp.server", "--model", str(given.gguf), "--port", str(port)]
        command += ["--n_ctx", "2048", "--interrupt_requests", "False"]
        with process(command, tells=False) as (seen, _):
            wait_for(port)
            rows += measure("llama.cpp", port, "m", seen, given.clients, given.seconds)
    facts = circumstances("onnxruntime", "starlette", "uvicorn")
    facts["load"] = f"{load_before[0]:.1f} before, {psutil.getloadavg()[0]:.1f} at the end"
    print(markdown_table(HEADER, rows))
    print(in_one_line(facts))
    if given.json is not None:
        write_json(given.json, {"machine": facts, "header": list(HEADER), "rows": rows})


if __name__ == "__main__":
    run(main)
