"""Prompts of the skills: TOML files with named places, and how texts of users are put there.

A file has `system` and `user`, the two messages; `piece_tokens`, how much of a long text is given at once;
`answer_share` and `most_answer_tokens`, how long an answer should be, as a share of the text and at most;
and a table `[sampling]` with arguments of `Model.chat`.

A place is a name in braces, such as `{text}`. What stands there is put in once: braces in it mean nothing. A user's
text stands between an opening and a closing tag whose name does not occur as a tag in any of the texts, so that no text
can close its place. Control tokens in texts are read as text (`Model.encode_chat`).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

from edgephi.arguments import require_integer, require_number, require_text, wrong
from edgephi.errors import EdgephiError, UsageError
from edgephi.files import no_system_errors, parse_toml, read_argument, said
from edgephi.runtime.sampling import SamplingOptions, make_sampling
from edgephi.runtime.text.templates import Message

FOLDER = Path(__file__).parent / "prompts"
_SUMMARY, _TONE = ("text", "words"), ("text",)
PLACES: dict[str, tuple[str, ...]] = {
    "summarize-text": _SUMMARY,
    "summarize-paragraph": _SUMMARY,
    "summarize-conversation": _SUMMARY,
    "summarize-email": _SUMMARY,
    "combine-summaries": _SUMMARY,
    "rewrite-default": _TONE,
    "rewrite-general": _TONE,
    "rewrite-casual": _TONE,
    "rewrite-concise": _TONE,
    "rewrite-formal": _TONE,
    "rewrite-custom": ("text", "instruction"),
    "table-columns": ("text",),
    "table-rows": ("text", "columns"),
}
"""The places that each prompt may have; `{text}` has to be there."""
FENCED = ("text", "instruction")
"""Places that get tags around them."""
LEAST_PIECE = 32
"""Tokens of text that are given at once, and that a context has to hold beside the prompt and the answer. Half of them
and the break between two summaries are fewer: summaries of summaries become shorter, and so come to an end."""
LONGEST_PIECE = 8_000
"""Tokens; the format of an answer is made of its piece, and formats have a longest length."""
_PLACE = re.compile(r"\{([a-z_]+)\}")

Prompts = str | os.PathLike[str] | Mapping[str, Mapping[str, object]]
"""A folder with some of the files, or a mapping from their names without `.toml` to what is other in them."""


@dataclass(frozen=True)
class SkillPrompt:
    """One file of prompts, checked."""

    system: str
    user: str
    piece_tokens: int
    answer_share: float
    most_answer_tokens: int
    sampling: SamplingOptions

    def messages(self, **values: object) -> list[Message]:
        """The two messages with the places filled in."""
        texts = {name: str(value) for name, value in values.items()}
        tags = _tags(texts)

        def put(found: re.Match[str]) -> str:
            name = found[1]
            return f"<{tags[name]}>\n{texts[name]}\n</{tags[name]}>" if name in tags else texts[name]

        user: Message = {"role": "user", "content": _PLACE.sub(put, self.user)}
        system: Message = {"role": "system", "content": self.system}
        return [system, user] if self.system else [user]


def _tags(texts: Mapping[str, str]) -> dict[str, str]:
    """For each place that has tags a name that is no tag in any text, whatever stands between `<` and it.

    Letters that look like others (`＜Ｔｅｘｔ＞`) are compared by what they stand for (NFKC).
    """
    plain = [unicodedata.normalize("NFKC", text).lower() for text in texts.values()]
    tags: dict[str, str] = {}
    for name in FENCED:
        if name in texts:
            taken = {number for text in plain for number in re.findall(rf"<[^<>\w]*{name}([0-9]*)", text)}
            free = (number for number in ("", *map(str, range(2, len(taken) + 3))) if number not in taken)
            tags[name] = name + next(free)
    return tags


@no_system_errors(UsageError)
def read_prompts(given: Prompts | None = None) -> dict[str, SkillPrompt]:
    """All prompts: edgephi's, with what is given in their place.

    Raises:
        UsageError: a prompt, key or place of another name, a value of another type, or a file that cannot be read.
    """
    files = {name: _read(FOLDER / f"{name}.toml") for name in PLACES}
    others, where = _given(given)
    for name, other in others.items():
        if name not in PLACES:
            raise UsageError(f"there is no prompt {name!r}", where=where, remedy=f"Choose from {', '.join(PLACES)}")
        if not isinstance(other, Mapping):
            raise wrong(f"the prompt {name}", other, "a mapping with system, user and so on")
        files[name] = {**files[name], **other}
    return {name: _checked(name, values, where) for name, values in files.items()}


def _given(given: Prompts | None) -> tuple[Mapping[str, Mapping[str, object]], Path | None]:
    if given is None:
        return {}, None
    if isinstance(given, Mapping):
        return given, None
    if not isinstance(given, (str, os.PathLike)):
        raise wrong("prompts", given, "a folder, or a mapping from names of prompts to what is other in them")
    folder = Path(given)
    if not folder.is_dir():
        raise UsageError("there is no folder of prompts", where=folder, remedy="Name a folder with .toml files")
    found = sorted(folder.glob("*.toml"))
    if not found:
        raise UsageError("no .toml file is in the folder of prompts", where=folder, remedy=f"Add one of {[*PLACES]}")
    return {file.stem: _read(file) for file in found}, folder


def _read(file: Path) -> dict[str, object]:
    text = read_argument(file, "the prompt", error=UsageError)
    try:
        return parse_toml(text)
    except ValueError as problem:
        raise UsageError(f"the prompt is no TOML: {said(problem)}", where=file, remedy="Mend it") from problem


def _checked(name: str, values: Mapping[str, object], where: Path | None) -> SkillPrompt:
    known = [field.name for field in fields(SkillPrompt)]
    try:
        if unknown := sorted(set(values) - set(known)):
            raise UsageError(f"there is no key {unknown[0]!r}", remedy=f"Choose from {', '.join(known)}")
        system, user = values.get("system", ""), values.get("user")
        require_text("system", system, "the system message as one text, or an empty one")
        require_text("user", user, "the user's message as one text")
        used = set(_PLACE.findall(str(user)))
        if unknown := sorted(used - set(PLACES[name])):
            raise UsageError(f"user has a place {{{unknown[0]}}}", remedy=f"Choose from {', '.join(PLACES[name])}")
        if "text" not in used:
            raise UsageError("user has no place {text}", remedy="Write {text} where the text belongs")
        sampling = values.get("sampling", {})
        if not isinstance(sampling, Mapping) or not all(isinstance(key, str) for key in sampling):
            raise wrong("sampling", sampling, "a table of arguments of Model.chat")
        make_sampling(cast(SamplingOptions, sampling))
        return SkillPrompt(
            str(system).strip(),
            str(user).strip(),
            _count("piece_tokens", values.get("piece_tokens"), LEAST_PIECE),
            _share(values.get("answer_share")),
            _count("most_answer_tokens", values.get("most_answer_tokens"), 1),
            cast(SamplingOptions, dict(sampling)),
        )
    except EdgephiError as problem:
        raise UsageError(f"prompt {name}: {problem.what}", where=where, remedy=problem.remedy) from problem


def _count(name: str, value: object, least: int) -> int:
    number = require_integer(name, value)
    if not least <= number <= LONGEST_PIECE:
        raise wrong(name, value, f"a number from {least} to {LONGEST_PIECE:,}")
    return number


def _share(value: object) -> float:
    share = require_number("answer_share", value)
    if not 0 < share <= 10:
        raise wrong("answer_share", value, "a number above 0 and at most 10")
    return share
