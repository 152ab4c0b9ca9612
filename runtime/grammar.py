"""Structured answers: what an answer may be, token by token.

A pydantic model, a JSON Schema, a regular expression or a Lark grammar becomes a grammar of the `llguidance` library,
which says before every token which ones may come. It enforces all of a schema or refuses it; what it refuses is an
error before anything is computed.

Schemas may be a stranger's. The library bounds the time and memory of compiling and of every step itself
(`LLParserLimits`); only its recursion is not bounded, so the text of a grammar is, and it is compiled in a thread whose
stack is large enough for the deepest one of that length.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from pydantic.errors import PydanticUserError

from edgephi.arguments import require_text, wrong
from edgephi.errors import EdgephiError, GrammarError, one_line

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

    from edgephi.runtime.text.tokenizer import Tokenizer

LONGEST = 2**16
"""Characters of a schema (as JSON), a regular expression or a grammar."""
MOST_REMAINDERS = 100_000
"""That all `multipleOf` of a schema have together: the library makes a state for each, 50,000 in a second and 500 bytes
each, and does not bound them."""
STACK = 2**28
"""Bytes of the stack it is compiled on; rules that name each other in a row of 5,000 took less than a tenth. Systems
give memory to the part that is used."""
JSON_OPTIONS: JsonCompileOptions = {
    # one way to write a document: white space cannot go on for ever, and what is between values needs no step
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    # a schema may not turn these on for itself (`x-guidance`)
    "lenient": False,
    "coerce_one_of": False,
}
_MARK = "\x02"
"""Before a text that is encoded: some tokenizers put a space before a text's beginning, and this is no beginning."""


@dataclass(frozen=True)
class Regex:
    """The whole answer matches a regular expression, in the syntax of Rust's: no look-around, no back references; `.`
    and the like mean letters of all scripts, and so does `\\d` with digits (`[0-9]` does not)."""

    pattern: str


@dataclass(frozen=True)
class Lark:
    """The answer is a text of a grammar in Lark's syntax, whose first rule is called `start`."""

    grammar: str


ResponseFormat: TypeAlias = type[BaseModel] | Mapping[str, object] | Regex | Lark
"""What an answer has to be: a pydantic model, a JSON Schema, `{"type": "json_object"}` for any JSON object, OpenAI's
`{"type": "json_schema", "json_schema": {"schema": ...}}`, or a text."""


class Grammar:
    """What may come next in one answer. Made by `Grammars.grammar`; one thread at a time may use it."""

    def __init__(
        self, matcher: LLMatcher, size: int, stop_ids: frozenset[int], read: Callable[[str], object] = str
    ) -> None:
        self._matcher, self._size, self._stop_ids, self._read = matcher, size, stop_ids, read

    def restrict(self, logits: NDArray[np.float32]) -> None:
        """Make tokens that may not come impossible, in place; stop tokens may come where the answer is complete.

        Raises:
            GrammarError: no token of the vocabulary may come, or the next step is more work than it may be.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_sound()
        known = min(self._size, len(logits))
        allowed = np.unpackbits(bits, bitorder="little").view(np.bool_)[:known]
        if not allowed.any():
            raise GrammarError(
                "no token of this model can go on with the answer as its format wants it",
                remedy="Allow characters that are in the model's vocabulary",
            )
        np.copyto(logits[:known], -np.inf, where=~allowed)
        logits[known:] = -np.inf

    def take(self, token: int) -> None:
        """The token that was chosen."""
        self._matcher.consume_token(token)
        self._require_sound()

    def forced(self, most: int) -> list[int]:
        """The next tokens, at most so many, as far as there is no choice; they are taken."""
        if self.finished:
            return []
        forced = [token for token in self._matcher.compute_ff_tokens() if token not in self._stop_ids][:most]
        if forced:
            self._matcher.consume_tokens(forced)
        self._require_sound()
        return forced

    @property
    def finished(self) -> bool:
        """Whether the answer is complete, and nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

    def read(self, text: str) -> object:
        """What a complete answer says: an instance of the pydantic model, what JSON holds, or the text.

        Raises:
            ValueError: validators of the pydantic model's own refuse it (JSON Schema does not know them).
        """
        return self._read(text)

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(
                f"the answer's format cannot be followed: {_words(self._matcher.get_error())}",
                remedy="Make the schema or the grammar simpler",
            )


class Grammars:
    """Makes the grammars of one model. The vocabulary is read at the first one (0.1 to 0.5 s); any thread may ask.

    Args:
        tokenizer: of the bundle.
        stop_ids: tokens that end an answer.
        vocabulary: tokens the model computes logits of.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int], vocabulary: int) -> None:
        self._tokenizer, self._stop_ids, self._size = tokenizer, stop_ids, vocabulary
        self._lock = threading.Lock()

    def grammar(self, form: ResponseFormat | None) -> Grammar | None:
        """A grammar for one answer; None: it may be anything.

        Raises:
            GrammarError: the format cannot be expressed, is malformed or too large, or nothing can satisfy it.
            UsageError: it is none of `ResponseFormat`.
        """
        if form is None:
            return None
        if isinstance(form, Regex):
            return self.text_grammar("regex", form.pattern)
        if isinstance(form, Lark):
            return self.text_grammar("lark", form.grammar)
        if isinstance(form, type) and issubclass(form, BaseModel):
            return self.schema_grammar(_model_schema(form), form.model_validate_json)
        if not isinstance(form, Mapping):
            raise wrong(
                "response_format", form, "a pydantic model, a JSON Schema as a dictionary, Regex(...) or Lark(...)"
            )
        if form.get("type") == "text":
            return None
        return self.schema_grammar(_schema(form), json.loads)

    def schema_grammar(self, schema: Mapping[str, object], read: Callable[[str], object]) -> Grammar:
        """Of JSON that a schema describes; `read` makes a value of the text."""
        from llguidance import LLMatcher

        # the library's own settings, which may say what stands between values
        schema = {key: value for key, value in schema.items() if key != "x-guidance"}
        written = _written(schema)
        require_few_remainders(schema)
        return self._compile(
            "schema", written, read, lambda: LLMatcher.grammar_from_json_schema(written, None, JSON_OPTIONS)
        )

    def text_grammar(self, kind: str, source: str, read: Callable[[str], object] = str) -> Grammar:
        """Of a text that a regular expression (`regex`) or a Lark grammar (`lark`) describes."""
        from llguidance import LLMatcher

        require_text(f"the {kind}", source, "a text")
        make = LLMatcher.grammar_from_regex if kind == "regex" else LLMatcher.grammar_from_lark
        return self._compile(kind, source, read, lambda: make(source))

    def _compile(self, kind: str, source: str, read: Callable[[str], object], write: Callable[[], str]) -> Grammar:
        from llguidance import LLMatcher

        if len(source) > LONGEST:
            raise GrammarError(
                f"the {kind} has {len(source):,} characters, more than {LONGEST:,}", remedy="Make it shorter"
            )
        with self._lock:
            vocabulary = self._vocabulary
        made: list[LLMatcher] = []
        said: list[str] = []

        def work() -> None:
            try:
                matcher = LLMatcher(vocabulary, write(), log_level=0)
                said.extend([matcher.get_error()] if matcher.is_error() else matcher.get_grammar_warnings())
                made.append(matcher)
            except BaseException as problem:  # a panic of the library's is no Exception
                said.append(one_line(problem))

        _on_large_stack(work)
        if said or not made:
            raise GrammarError(
                f"the {kind} cannot be enforced: {_words(said[0])}",
                remedy="Leave out what is named, or write it otherwise",
            )
        return Grammar(made[0], self._size, self._stop_ids, read)

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        known = self._tokenizer.vocabulary_bytes(self._size)
        if known is None:
            raise GrammarError(
                "the tokenizer is neither a byte-level nor a sentencepiece one, as structured answers need",
                remedy="Leave response_format out",
            )
        stops = sorted(token for token in self._stop_ids if token < self._size)
        special = self._tokenizer.special_ids | set(stops)
        described = _Described(self._tokenizer, known, stops, special)
        return LLTokenizer(TokenizerWrapper(described), eos_token=stops)


class _Described:
    """A vocabulary as `llguidance.TokenizerWrapper` wants it.

    Texts are encoded by edgephi's tokenizer, within its bounds, and by the longest tokens that fit where it gives other
    bytes back than it was given (it may strip spaces, or change letters).
    """

    bos_token_id = None

    def __init__(
        self, tokenizer: Tokenizer, known: Sequence[bytes], stops: Sequence[int], special: frozenset[int] | set[int]
    ) -> None:
        self.tokens = known
        self.special_token_ids = sorted(token for token in special if token < len(known))
        self.eos_token_id = stops[0]
        self._encode = tokenizer.encode
        self._special = frozenset(special)
        self._mark = self._encode(_MARK)

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("texts are given as str")
        try:
            ids = self._encode(_MARK + text)
        except EdgephiError:
            ids = []
        ids = ids[len(self._mark) :] if ids[: len(self._mark)] == self._mark else []
        data = text.encode()
        known = all(token < len(self.tokens) and token not in self._special for token in ids)
        if known and b"".join(self.tokens[token] for token in ids) == data:
            return ids
        return self._longest_first(data)

    def _longest_first(self, data: bytes) -> list[int]:
        ids: list[int] = []
        while data:
            length = next(
                (size for size in range(min(self._longest, len(data)), 0, -1) if data[:size] in self._by_bytes), 0
            )
            if not length:
                break
            ids.append(self._by_bytes[data[:length]])
            data = data[length:]
        return ids

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        return {data: token for token, data in enumerate(self.tokens) if data and token not in self._special}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._by_bytes), default=0)


def _schema(form: Mapping[str, object]) -> Mapping[str, object]:
    kind = form.get("type")
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        return form
    outer = form.get("json_schema")
    schema = outer.get("schema") if isinstance(outer, Mapping) else None
    if not isinstance(schema, Mapping):
        raise wrong("response_format", form, "the schema under 'json_schema', 'schema'")
    return schema


def _model_schema(model: type[BaseModel]) -> Mapping[str, object]:
    try:
        return model.model_json_schema()
    except PydanticUserError as problem:
        raise GrammarError(
            f"{model.__name__} has no JSON Schema: {one_line(problem)}", remedy="Use types that JSON has"
        ) from problem


def _written(schema: Mapping[str, object]) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as problem:
        raise GrammarError(
            f"the schema is no JSON: {one_line(problem)}", remedy="Give texts, finite numbers, lists and dictionaries"
        ) from problem


def require_few_remainders(schema: object) -> None:
    """Raises GrammarError for a schema, or a list of them, whose `multipleOf` take much time and memory."""
    waiting, remainders = [schema], 0
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            step = part.get("multipleOf")
            if isinstance(step, int | float) and not isinstance(step, bool):
                digits = Decimal(json.dumps(step)).normalize().as_tuple().digits
                remainders += int("".join(map(str, digits)))
            waiting += part.values()
        elif isinstance(part, list | tuple):
            waiting += part
    if remainders > MOST_REMAINDERS:
        raise GrammarError(
            "the schema cannot be enforced: numbers would have to be multiples of too large a multipleOf",
            remedy=f"Leave it out, or let all of them together be at most {MOST_REMAINDERS:,}, zeros at the end apart",
        )


_stack = threading.Lock()


def _on_large_stack(work: Callable[[], None]) -> None:
    """Run a function in a thread of its own, and wait for it."""
    thread = threading.Thread(target=work, name="grammar")
    with _stack:
        before = threading.stack_size(STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()


def _words(said: str) -> str:
    """The library's words without the state of its parser and the lines of the grammar, which it adds."""
    return " ".join(re.sub(r"(?m)^\s*(\d+ \||\^).*$", "", said.partition("<state>")[0]).split())


def why_invalid(problem: ValueError) -> str:
    """What a pydantic model's own validators said."""
    if isinstance(problem, ValidationError):
        return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'value'}: {one['msg']}" for one in problem.errors()[:3])
    return one_line(problem)
