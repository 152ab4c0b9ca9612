"""A workload is data: a TOML file, and the texts it names, beside it.

Built-in ones lie in `workloads/`; `--workload FILE` takes another. Unknown keys, paths that leave the file's folder and
numbers out of range are errors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from edgephi.benchmarks.bench.results import StrictData
from edgephi.errors import UsageError
from edgephi.files import parse_toml, read_file
from edgephi.records import RelativePath, first_problem

BUILT_IN = Path(__file__).parent / "workloads"
FILE_LIMIT = 4 * 2**20

Tokens = Annotated[int, Field(ge=1, le=2**20)]
Depth = Annotated[int, Field(ge=0, le=2**20)]
Name = Annotated[str, Field(min_length=1, max_length=80)]


class Method(StrictData):
    """How often, in which order, and what counts as disturbed."""

    warmups: int = Field(default=1, ge=1, le=100, description="uncounted runs of every case; the first sets the tokens")
    repetitions: int = Field(default=5, ge=1, le=200)
    pause_s: float = Field(default=0.0, ge=0, le=600, description="after every run")
    seed: int = Field(default=1, ge=0, le=2**63, description="of the order of cases")
    others_cpu_limit: float = Field(
        default=0.1, ge=0, le=1, description="share of all processors beyond which a run is done again"
    )
    noisy_repeats: int = Field(default=2, ge=0, le=100, description="times a disturbed run is done again at most")
    idle_s: float = Field(
        default=5.0, ge=0, le=600, description="idle power is measured that long, if there is a meter"
    )


class Prefill(StrictData):
    """Prompts of the given lengths, cut from a repeated text, after the given depths of KV cache."""

    text: RelativePath
    lengths: tuple[Tokens, ...] = Field(min_length=1)
    depths: tuple[Depth, ...] = Field(default=(0,), min_length=1)


class Decode(StrictData):
    """Greedy tokens after the given depths of KV cache; stop tokens do not stop."""

    text: RelativePath
    tokens: Annotated[int, Field(ge=2, le=2**16)]
    depths: tuple[Depth, ...] = Field(min_length=1)


class Answer(StrictData):
    """A prompt as a person would send it: the instruction, then the documents, through the chat template if any."""

    name: Name
    category: Name
    instruction: str = Field(min_length=1, max_length=20_000)
    documents: tuple[RelativePath, ...] = ()
    max_new_tokens: Annotated[int, Field(ge=2, le=2**16)]
    stop: bool = Field(default=True, description="whether a stop token ends the answer")


class Loading(StrictData):
    """Loading the bundle in a process of its own, its first token included."""

    warm: bool = True
    cold: bool = True
    repetitions: int = Field(default=5, ge=1, le=100)


class Speculation(StrictData):
    """An answer with n-gram speculation off and on."""

    name: Name
    instruction: str = Field(min_length=1, max_length=20_000)
    documents: tuple[RelativePath, ...] = ()
    tokens: Annotated[int, Field(ge=2, le=2**16)]
    ngram_size: int = Field(default=3, ge=1, le=64)
    max_draft_tokens: int = Field(default=4, ge=1, le=64)


class Score(StrictData):
    """sqrt(a / mean time to first token (s) × 5000 × mean tokens/s / b) over the answers.

    UL publishes 1250 and 244 for Phi-3.5-mini in the Procyon AI text generation benchmark. Prompts differ here, so a
    score compares runs of this workload and is not UL's.
    """

    ttft_numerator: float = Field(gt=0)
    rate_of_5000: float = Field(gt=0)


class Content(StrictData):
    """The TOML file."""

    description: str
    method: Method = Method()
    prefill: tuple[Prefill, ...] = ()
    decode: tuple[Decode, ...] = ()
    answer: tuple[Answer, ...] = ()
    load: Loading | None = None
    speculation: tuple[Speculation, ...] = ()
    score: Score | None = None

    @model_validator(mode="after")
    def _asks_something(self) -> Content:
        if not (self.prefill or self.decode or self.answer or self.load or self.speculation):
            raise ValueError("the workload has no case")
        if self.score and not self.answer:
            raise ValueError("a score needs answers")
        return self


@dataclass(frozen=True)
class Workload:
    """A workload with its texts read."""

    name: str
    content: Content
    texts: dict[str, str]
    """By the path the TOML file gives."""
    sha256: str
    """Of the TOML file and its texts, in the order of their paths."""


def built_in() -> list[str]:
    """Names of the workloads that come along."""
    return sorted(path.stem for path in BUILT_IN.glob("*.toml"))


def read_workload(name_or_file: str) -> Workload:
    """Read a built-in workload, or a file.

    Raises:
        UsageError: no such workload, or it cannot be used; the key is named.
    """
    known = built_in()
    path = BUILT_IN / f"{name_or_file}.toml" if name_or_file in known else Path(name_or_file)
    if not path.is_file():
        raise UsageError(
            f"there is no workload {name_or_file!r}", remedy=f"Name a TOML file, or one of {', '.join(known)}"
        )
    source = _read(path)
    try:
        written = parse_toml(source.decode("utf-8"))
    except ValueError as error:
        raise UsageError(f"the workload is not TOML: {error}", where=path, remedy="Correct the file") from error
    try:
        content = Content.model_validate(written)
    except ValidationError as error:
        raise UsageError(f"{first_problem(error)}", where=path, remedy="Correct this key of the workload") from error
    digest = hashlib.sha256(source)
    texts = {}
    for name in sorted(_text_names(content)):
        data = _read(path.parent / name)
        digest.update(data)
        try:
            texts[name] = data.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise UsageError("the text is not UTF-8", where=path.parent / name, remedy="Save it as UTF-8") from error
        if not texts[name].strip():
            raise UsageError("the text is empty", where=path.parent / name, remedy="Name a text with words in it")
    return Workload(path.stem, content, texts, digest.hexdigest())


def workload_files(name_or_file: str) -> dict[str, bytes]:
    """A workload's files, by their paths from its folder: its TOML file first, then the texts that it names.

    Raises:
        UsageError: as for `read_workload`.
    """
    texts = read_workload(name_or_file).texts
    path = BUILT_IN / f"{name_or_file}.toml" if name_or_file in built_in() else Path(name_or_file)
    return {path.name: _read(path)} | {name: _read(path.parent / name) for name in texts}


def of_lists(prompts: Sequence[int], new: Sequence[int], depths: Sequence[int]) -> Workload:
    """A workload of value lists, as llama-bench takes them: prompts of these lengths, and decoding of so many tokens,
    each after these depths of KV cache. Its hash is that of its content, so that equal lists are the same workload.

    Raises:
        UsageError: there is neither a prompt nor a number of new tokens, or a value is out of range.
    """
    if not prompts and not new:
        raise UsageError("there is no case to measure", remedy="Pass -p, -n or both")
    text = "texts/lighthouse.txt"
    record = {
        "description": f"Prompts of {list(prompts)} and decoding of {list(new)} tokens after {list(depths)} tokens.",
        "prefill": [{"text": text, "lengths": list(prompts), "depths": list(depths)}] if prompts else [],
        "decode": [{"text": text, "tokens": tokens, "depths": list(depths)} for tokens in new],
    }
    try:
        content = Content.model_validate_json(json.dumps(record))
    except ValidationError as error:
        raise UsageError(
            f"the lists cannot be measured: {first_problem(error)}",
            remedy="Give prompts of 1 token or more, 2 new tokens or more, and depths of 0 or more",
        ) from error
    words = _read(BUILT_IN / text)
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode() + words).hexdigest()
    return Workload("lists", content, {text: words.decode("utf-8").replace("\r\n", "\n")}, digest)


def with_repetitions(workload: Workload, repetitions: int) -> Workload:
    """The same cases, repeated so often; loads as well. The hash stays, because the questions are the same."""
    content = workload.content
    method = content.method.model_copy(update={"repetitions": repetitions})
    load = content.load and content.load.model_copy(update={"repetitions": min(repetitions, 100)})
    return replace(workload, content=content.model_copy(update={"method": method, "load": load}))


def _text_names(content: Content) -> set[str]:
    named = {part.text for part in content.prefill} | {part.text for part in content.decode}
    named.update(name for answer in content.answer for name in answer.documents)
    return named.union(name for part in content.speculation for name in part.documents)


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > FILE_LIMIT:
            raise UsageError("the file is implausibly large", where=path, remedy="Use one of at most 4 MB")
        return read_file(path, limit=FILE_LIMIT, error=UsageError, remedy="Put the file itself beside the workload")
    except OSError as error:
        raise UsageError(
            f"the file cannot be read: {error.strerror or error}", where=path, remedy="Put it beside the workload"
        ) from error
