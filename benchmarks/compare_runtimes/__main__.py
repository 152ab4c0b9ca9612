"""edgephi and its peers on the same weights, in one run: speed, quality, load time and memory side by side.

    python -m edgephi.benchmarks.compare_runtimes MODEL.gguf --text test.txt --folder made --output report \\
        --llama-python llama/bin/python --builder-python builder/bin/python --openvino-python openvino/bin/python \\
        --transformers-python builder/bin/python
    python -m edgephi.benchmarks.compare_runtimes --shape microsoft/Phi-4-mini-instruct --layers 4 --folder made-phi ...

What is asked and how: `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from edgephi.benchmarks import arguments
from edgephi.benchmarks.bench.results import figure
from edgephi.benchmarks.compare_runtimes.goals import goals, ratios
from edgephi.benchmarks.compare_runtimes.measure import (
    FIRST_PROMPT,
    Case,
    Tally,
    measure_loading,
    measure_quality,
    measure_rounds,
)
from edgephi.benchmarks.compare_runtimes.picture import picture
from edgephi.benchmarks.compare_runtimes.prepare import claim_folder, prepare, reference, start, stored_bytes
from edgephi.benchmarks.compare_runtimes.results import ComparisonReport, ContenderResult, Settings, Speed
from edgephi.benchmarks.compare_runtimes.shape import require_shape, write_shape
from edgephi.benchmarks.compare_runtimes.table import markdown
from edgephi.benchmarks.compare_runtimes.variants import PEERS, contenders
from edgephi.benchmarks.evaluate.graph_logits import GraphLogits
from edgephi.benchmarks.report import machine, progress, run, write_json
from edgephi.benchmarks.studies.quality import tokenize
from edgephi.devices.cpu import decode_threads

QUESTION = "What is the capital of France?"


def main() -> None:
    """Parse the command line, prepare, measure, write, print."""
    given = _arguments()
    folder, output = given.folder, given.output
    source = given.source or folder / "source.gguf"
    if given.shape:
        require_shape(given.shape)
    output.mkdir(parents=True, exist_ok=True)
    if given.shape and not source.exists():
        write_shape(given.shape, given.layers, source)
    claim_folder(folder, source)
    settings = Settings(
        threads=given.threads or decode_threads(),
        prompts=tuple(given.prompts),
        depths=tuple(given.depths),
        new_tokens=given.new_tokens,
        rounds=given.rounds,
        loads=given.loads,
        pause_s=given.pause,
        seed=given.seed,
        windows=given.windows if given.text else 0,
        window_length=given.window_length,
        text=given.text.name if given.text else None,
    )
    longest = max(*settings.prompts, *settings.depths, settings.window_length) + settings.new_tokens
    pythons = {peer: value for peer in PEERS if (value := getattr(given, _option(peer))) is not None}
    everybody = contenders(
        source,
        folder,
        variants=given.edgephi,
        peers=given.peers,
        pythons=pythons,
        threads=settings.threads,
        capacity=-(-longest // 256) * 256,
        file_type=_file_type(source),
        types=given.transformers_types,
    )
    tallies = [Tally(one) for one in everybody]
    with progress("preparing", len(tallies) + 1) as advance:
        # nothing is compared with random weights' float32 model, and everybody's tokenizer is the same
        float_model = reference(source, folder) if given.text else everybody[0].made
        advance()
        for tally in tallies:
            with tally.attempt():
                prepare(tally.contender, source, folder)
            advance()
    ids = _ids(float_model, given.text, max(longest, settings.windows * settings.window_length), settings.seed)
    begin = partial(start, folder=folder)
    with progress("loading", len(tallies) * settings.loads) as advance:
        measure_loading(tallies, begin, ids[:FIRST_PROMPT], settings.loads, advance)
    cases = _cases(settings, ids)
    with progress("rounds", len(tallies) * len(cases) * (settings.rounds + 1)) as advance:
        measure_rounds(
            tallies,
            begin,
            cases,
            rounds=settings.rounds,
            seed=settings.seed,
            pause_s=settings.pause_s,
            question=_question(float_model) if given.text else None,
            advance=advance,
        )
    if settings.windows:
        windows = np.array(ids[: settings.windows * settings.window_length]).reshape(settings.windows, -1)
        with progress("scoring", len(tallies) * settings.windows) as advance, tempfile.TemporaryDirectory() as scratch:
            graph = GraphLogits(float_model, settings.window_length)
            expected = [graph.logits(window) for window in windows]
            del graph
            measure_quality(tallies, begin, windows, expected, Path(scratch), advance)
    results = tuple(_result(tally, settings, float_model) for tally in tallies)
    found = ratios(results)
    weights = f"{given.shape}, {given.layers} layers, random" if given.shape else source.name
    report = ComparisonReport(
        machine=machine(),
        weights=weights,
        settings=settings,
        contenders=results,
        ratios=tuple(found),
        goals=tuple(goals(results, found)),
    )
    write_json(output / "peers.json", report.model_dump(mode="json"))
    (output / "peers.md").write_text(markdown(report), encoding="utf-8", newline="\n")
    if (drawn := picture(report)) is not None:
        (output / "peers.svg").write_text(drawn, encoding="utf-8", newline="\n")
    print(markdown(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="edgephi.benchmarks.compare_runtimes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", nargs="?", type=arguments.file, metavar="MODEL.gguf", help="weights")
    parser.add_argument("--shape", metavar="NAME", help="instead: random weights of a published phi3 model's shape")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="of that shape (4)")
    parser.add_argument(
        "--text", type=arguments.file, metavar="FILE", help="UTF-8 text: prompts and windows come from it"
    )
    parser.add_argument(
        "--folder", type=arguments.new_folder, required=True, metavar="DIR", help="what is made from the weights"
    )
    parser.add_argument(
        "--output", type=arguments.new_folder, required=True, metavar="DIR", help="peers.json, peers.md, peers.svg"
    )
    parser.add_argument("--peers", type=_words, default=list(PEERS), metavar="A,B", help="who takes part (all)")
    parser.add_argument("--edgephi", type=_words, default=["auto", "gptq-128"], metavar="A,B", help="auto, rtn-32, …")
    for peer in PEERS:
        parser.add_argument(
            f"--{_option(peer).replace('_', '-')}",
            type=arguments.interpreter,
            metavar="PY",
            help=f"interpreter with {peer}",
        )
    parser.add_argument("--transformers-types", type=_words, default=["float32", "bfloat16"], metavar="A,B")
    parser.add_argument("--threads", type=int, metavar="N", help="of everybody (one a physical core)")
    parser.add_argument("--prompts", type=_numbers, default=[128, 512], metavar="N,N", help="prefill (128,512)")
    parser.add_argument("--depths", type=_numbers, default=[0, 512], metavar="N,N", help="decode (0,512)")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="decoded in a run (32)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="counted (7)")
    parser.add_argument("--loads", type=int, default=3, metavar="N", help="of each, in new processes (3)")
    parser.add_argument("--pause", type=float, default=0.25, metavar="S", help="before each run (0.25)")
    parser.add_argument("--windows", type=int, default=4, metavar="N", help="to score (4)")
    parser.add_argument("--window-length", type=int, default=512, metavar="N", help="tokens of a window (512)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order, and of random ids")
    given = parser.parse_args()
    if (given.source is None) == (given.shape is None):
        parser.error("name MODEL.gguf or --shape")
    if given.source is not None and given.text is None:
        parser.error("prompts of MODEL.gguf need --text")
    if given.shape and given.text:
        parser.error("random weights have no --text")
    unknown = set(given.peers) - set(PEERS)
    if unknown:
        parser.error(f"there is no peer {', '.join(sorted(unknown))}; choose from {', '.join(PEERS)}")
    if min(given.rounds, given.loads, given.windows, *given.prompts) < 1 or given.new_tokens < 2:
        parser.error("counts are at least 1, --new-tokens at least 2")
    return given


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def _option(peer: str) -> str:
    return f"{peer.partition('.')[0]}_python"


def _file_type(source: Path) -> int | None:
    from edgephi.export.checkpoint.gguf import open_gguf

    metadata = open_gguf(source).gguf_metadata or {}
    found = metadata.get("general.file_type")
    return found if isinstance(found, int) else None


def _ids(bundle: Path, text: Path | None, count: int, seed: int) -> list[int]:
    if text is not None:
        return [int(token) for token in tokenize([bundle], text, count)]
    from edgephi.bundle import read_manifest

    draw = random.Random(seed)
    return [draw.randrange(read_manifest(bundle).model.vocabulary_size) for _ in range(count)]


def _cases(settings: Settings, ids: Sequence[int]) -> list[Case]:
    """One for each length: its prefill, and decode behind it where that was asked for. Depth 0 has one token."""
    lengths = sorted({*settings.prompts, *(max(1, depth) for depth in settings.depths)})
    deep = {max(1, depth) for depth in settings.depths}
    return [Case(tuple(ids[:length]), settings.new_tokens if length in deep else 1) for length in lengths]


def _question(bundle: Path) -> list[int] | None:
    from edgephi.runtime.text.templates import read_template, user_message
    from edgephi.runtime.text.tokenizer import Tokenizer

    template = read_template(bundle)
    return Tokenizer(bundle).encode(template.render([user_message(QUESTION)])) if template else None


def _result(tally: Tally, settings: Settings, bundle: Path) -> ContenderResult:
    one = tally.contender
    return ContenderResult(
        name=one.name,
        peer=one.peer,
        libraries=tally.libraries,
        bytes=stored_bytes(one) if one.made.exists() else None,
        note=one.note,
        reason=tally.reason,
        answer=None if tally.answer is None else _answer(bundle, tally.answer),
        prefill=_speeds(tally, "prefill", settings.prompts),
        decode=_speeds(tally, "decode", [max(1, depth) for depth in settings.depths]),
        loading=tally.loading,
        quality=tally.quality,
        others_cpu_share=figure(tally.others).median if tally.others else None,
    )


def _speeds(tally: Tally, metric: str, lengths: Sequence[int]) -> tuple[Speed, ...]:
    return tuple(
        Speed(tokens=length, figure=figure(values)) for length in lengths if (values := tally.speeds(length, metric))
    )


def _answer(bundle: Path, tokens: Sequence[int]) -> str:
    """As text, to the first end token, which stays to be seen."""
    from tokenizers import Tokenizer

    from edgephi.bundle import GENAI_CONFIG, read_manifest
    from edgephi.runtime.placement.config import read_genai_config

    assert (bundle / GENAI_CONFIG).is_file()
    stops = set(read_genai_config(bundle, read_manifest(bundle)).stop_ids)
    end = next((index + 1 for index, token in enumerate(tokens) if token in stops), len(tokens))
    text: str = Tokenizer.from_file(str(bundle / "tokenizer.json")).decode(
        list(tokens[:end]), skip_special_tokens=False
    )
    return text


if __name__ == "__main__":
    run(main)
