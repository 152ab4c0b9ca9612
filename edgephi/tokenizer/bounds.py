"""What the `tokenizers` library may be given of a stranger's tokenizer, and how it is called.

The library is Rust. Where it meets what it did not expect it panics, and its `PanicException` is no `Exception`: it
passes every ordinary handler and ends a server. Where it is asked for too much memory it ends the process, and that
nothing can catch. So what is asked for is bounded here before a text is encoded, and calls go through `guarded`.

The regular expressions are Oniguruma's. A search that goes back too often ends in a panic after 0.1 s; what is left
is the pattern that takes time in proportion to a power of the text's length. The bounds below keep the power low, and
patterns that are not known to take time in proportion to the text run in a child (`edgephi/tokenizer/encoder.py`).
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress

from edgephi.errors import EdgephiError, one_line
from edgephi.tokenizer.known_patterns import KNOWN_PATTERNS, regexes

MOST_STEPS = 64
"""Of normalizer, pre-tokenizer, decoder or post-processor; the longest published one has 8."""
LONGEST_PATTERN = 4_096
"""Characters of a regular expression; the longest published one, o200k's, has 400."""
MOST_GROWTH = 256
"""How many times longer replacements one after the other may make a text; "▁" for a space is one character for one."""
MOST_ENDLESS = 4
"""Repetitions without an end in one alternative: each adds a power to the time a search may take; o200k's has 2."""
MOST_REPEATS = 1_000
"""The largest number in a repetition such as `{1,3}`."""
LONGEST_TOKEN = 1_024
"""Characters of an added token; onnxruntime-genai goes one call deeper for each."""
MOST_ADDED = 2_000_000
"""Characters of all added tokens: the automaton that finds them takes about 100 bytes for each."""
MOST_ADDED_TOKENS = 300_000
"""Added tokens; speech models add 65,536 codes to a language model's, and each takes 1 kB."""
MOST_VALUES = 10_000
"""Objects, lists and values of normalizer, pre-tokenizer, post-processor or decoder; published ones have some hundreds.
A post-processor's list of ids is written around every text."""
MOST_PIECES = 3_000_000
"""Bytes of all pieces of a Unigram model, which takes 340 in memory for each; 250,000 published ones have 1,800,000."""

_STEPS = ("normalizers", "pretokenizers", "decoders", "processors")
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
# an escape or a class of characters: neither is a group or a repetition
_ATOM = re.compile(r"\\[pPx]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]", re.DOTALL)


_alone = False
_turned_away = threading.Lock()


def hide_panics() -> None:
    """From now on keep the lines that Rust writes to standard error about a panic, of which an error is made here.

    For a command, whose standard error is its own: it has one sentence to say. In a program that uses the package the
    descriptor is not ours to turn away.
    """
    global _alone
    _alone = True


@contextmanager
def _without_panics() -> Iterator[None]:
    """Keep what is written to the descriptor of standard error meanwhile, unless the library panics."""
    import tempfile

    # another thread, or a call around this one, has turned it away already
    if not _turned_away.acquire(blocking=False):
        yield
        return
    try:
        with ExitStack() as stack:
            kept = stack.enter_context(tempfile.TemporaryFile())
            shown = os.dup(2)
            stack.callback(os.close, shown)
            os.dup2(kept.fileno(), 2)
            try:
                yield
            except BaseException as problem:
                if _is_panic(problem):
                    kept.truncate(0)
                raise
            finally:
                os.dup2(shown, 2)
                kept.seek(0)
                with suppress(OSError):
                    os.write(2, kept.read())
    finally:
        _turned_away.release()


def _is_panic(problem: BaseException) -> bool:
    return type(problem).__name__ == "PanicException"


@contextmanager
def guarded(error: Callable[[str], EdgephiError]) -> Iterator[None]:
    """Turn whatever the library raises, a panic included, into what `error` makes of its text."""
    try:
        with _without_panics() if _alone else nullcontext():
            yield
    except EdgephiError:
        raise
    except Exception as problem:  # the library raises plain Exception
        raise error(one_line(problem)) from problem
    except BaseException as problem:
        if not _is_panic(problem):
            raise
        raise error(one_line(problem)) from problem


def bound_parts(parts: Mapping[str, object], refuse: Callable[[str], EdgephiError]) -> None:
    """Check the parts of a parsed tokenizer.json before the library reads it.

    Args:
        parts: normalizer, pre_tokenizer, post_processor, decoder and added_tokens by name, as far as there are any, and
            the model where its vocabulary is a list.
        refuse: makes the error.

    Raises:
        EdgephiError: made by `refuse` from what exceeds which bound.
    """
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if _more_than(MOST_VALUES, parts.get(name)):
            raise refuse(f"the {name} has more than {MOST_VALUES:,} values")
        steps = _steps(parts.get(name))
        if steps is None:
            raise refuse(f"the {name}, or a step of it, is no object")
        if len(steps) > MOST_STEPS:
            raise refuse(f"the {name} has {len(steps):,} steps, more than {MOST_STEPS}")
        growth = 1
        for step in steps:
            pattern = step.get("pattern")
            regex, text = (pattern.get("Regex"), pattern.get("String")) if isinstance(pattern, dict) else (None, None)
            if isinstance(regex, str) and (fault := _fault(regex)):
                raise refuse(f"a regular expression of the {name} {fault}")
            if isinstance(text, str) and len(text) > LONGEST_PATTERN:
                raise refuse(f"a pattern of the {name} has {len(text):,} characters, more than {LONGEST_PATTERN:,}")
            growth *= _growth(step, text)
        if growth > MOST_GROWTH:
            raise refuse(f"the {name} could make a text more than {MOST_GROWTH} times longer")
    # answers are decoded token by token in the process that asks; no published tokenizer has one
    for regex in regexes(parts.get("decoder")):
        if regex not in KNOWN_PATTERNS:
            raise refuse(f"the decoder has a regular expression of its own, {str(regex)[:60]!r}")
    _bound_added(parts.get("added_tokens"), refuse)
    _bound_pieces(parts.get("model"), refuse)


def _bound_pieces(model: object, refuse: Callable[[str], EdgephiError]) -> None:
    """Check a Unigram model, whose pieces the library keeps letter by letter, each with a table of what may follow."""
    pieces = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(pieces, list):
        return
    texts = (piece[0] for piece in pieces if isinstance(piece, list) and piece)
    # surrogates are refused elsewhere, and counted here
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts if isinstance(text, str))
    if size > MOST_PIECES:
        raise refuse(f"the model's pieces have {size:,} bytes, more than {MOST_PIECES:,}")


def _more_than(most: int, part: object) -> bool:
    """Whether a part holds more values than that, however deep."""
    left, count = [part], 0
    while left and count <= most:
        one = left.pop()
        inner = list(one.values()) if isinstance(one, dict) else one if isinstance(one, list) else []
        count += len(inner)
        left += inner if count <= most else []
    return count > most


def _bound_added(tokens: object, refuse: Callable[[str], EdgephiError]) -> None:
    if isinstance(tokens, list) and len(tokens) > MOST_ADDED_TOKENS:
        raise refuse(f"there are {len(tokens):,} added tokens, more than {MOST_ADDED_TOKENS:,}")
    characters = 0
    for token in tokens if isinstance(tokens, list) else []:
        text = token.get("content") if isinstance(token, dict) else None
        if token is not None and not isinstance(token, dict):
            raise refuse("an added token is no object")
        if isinstance(text, str):
            characters += len(text)
            if len(text) > LONGEST_TOKEN:
                raise refuse(f"an added token has {len(text):,} characters, more than {LONGEST_TOKEN:,}")
    if characters > MOST_ADDED:
        raise refuse(f"the added tokens have {characters:,} characters, more than {MOST_ADDED:,}")


def _steps(part: object) -> list[dict[str, object]] | None:
    """Every step of a part, those inside sequences too.

    None: the part or a step is no object. The library takes a list of values for one as well, which nobody writes.
    """
    found: list[dict[str, object]] = []
    left = [] if part is None else [part]
    while left and len(found) <= MOST_STEPS:
        step = left.pop()
        if not isinstance(step, dict):
            return None
        inner = [entry for key in _STEPS if isinstance(entries := step.get(key), list) for entry in entries]
        left += inner
        if not inner:
            found.append(step)
        # a post-processor's own steps: each writes tokens around every text
        found += [
            entry for key in ("single", "pair") if isinstance(entries := step.get(key), list) for entry in entries
        ]
    return found


def _growth(step: Mapping[str, object], replaced: object) -> int:
    """How many times longer a step may make a text of a few characters."""
    texts = [step.get("content") if "pattern" in step else None, step.get("prepend")]
    longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
    return max(1, longest // (len(replaced) if isinstance(replaced, str) and replaced else 1))


def _fault(pattern: str) -> str | None:
    """What makes a regular expression one that could take for ever, in words."""
    if len(pattern) > LONGEST_PATTERN:
        return f"has {len(pattern):,} characters, more than {LONGEST_PATTERN:,}"
    if re.search(r"\\[1-9kg]", re.sub(r"\\\\", "", pattern)):
        return "refers back to what it matched"
    plain = _ATOM.sub("a", pattern)
    for low, high in _COUNT.findall(plain):
        # a number of more digits is one of more than MOST_REPEATS
        if any(len(count) > 9 or int(count or 0) > MOST_REPEATS for count in (low, high)):
            return f"repeats more than {MOST_REPEATS:,} times"
    # whether the group that is open holds a repetition without end, for each level
    repeats = [False]
    endless = 0
    for place, character in enumerate(plain):
        if character == "|":
            endless = 0
        elif _endless(plain, place):
            endless += 1
            if endless > MOST_ENDLESS:
                return f"has more than {MOST_ENDLESS} repetitions without end in a row"
        if character == "(":
            repeats.append(False)
        elif character == ")" and len(repeats) > 1:
            inside = repeats.pop()
            if inside and _endless(plain, place + 1):
                return "repeats without end what repeats without end"
            repeats[-1] = repeats[-1] or inside
        elif _endless(plain, place):
            repeats[-1] = True
    return None


def _endless(pattern: str, place: int) -> bool:
    """Whether a repetition without an upper end stands here."""
    return bool(re.compile(r"[*+]|\{\d*,\}").match(pattern, place))
