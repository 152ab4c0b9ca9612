"""A beginning that conversations share is computed once: in one process, and from a file in later ones."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgephi.errors import EngineError, UsageError
from edgephi.runtime import prefix as prefix_module
from edgephi.runtime.loading import load
from edgephi.runtime.model import Model
from edgephi.runtime.prefix import Prefix

SYSTEM = "Answer in one short sentence, and be kind to everybody who asks you something, whatever it may be."
QUESTION = "What is the capital of Japan?"
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPHI_CACHE", str(tmp_path))
    return tmp_path / "prefixes"


@pytest.fixture
def model(smollm2_bundle: Path, cache: Path) -> Iterator[Model]:
    with load(smollm2_bundle, prepacked="never") as loaded:
        yield loaded


def ask(model: Model) -> int:
    """Tokens of a prompt that were found; its answer has no near ties, so it is the same whatever was."""
    answer = model.chat(MESSAGES, max_new_tokens=24).result()
    assert answer.text == "The capital of Japan is Tokyo."
    return answer.reused_tokens


def saved(model: Model) -> Prefix:
    return model.prefix(SYSTEM, saved=True)


def test_answers_and_sessions_compute_what_comes_behind_it(model: Model) -> None:
    assert ask(model) == 0
    with model.prefix(SYSTEM) as prefix:
        assert prefix.cost.tokens == len(prefix.tokens) > 24
        assert prefix.cost.computed_tokens == 0, "the earlier answer left it in the prefix cache"
        assert ask(model) == len(model.encode_chat(MESSAGES)) - 2, "all but the last two, which are computed anew"
        session = model.session(system=SYSTEM, max_new_tokens=8)
        assert session.say("Where are the toilets?").result().reused_tokens >= len(prefix.tokens)
        session.close()


def test_what_is_kept_stays_when_the_cache_is_full(smollm2_bundle: Path, cache: Path) -> None:
    with load(smollm2_bundle, prepacked="never", max_parallel=1, prefix_cache_bytes=1) as model:
        with model.prefix(SYSTEM) as prefix:
            for question in ("Count to ten in words.", "Name the seas of Europe."):
                model.chat(question, max_new_tokens=8).result()
            assert ask(model) == len(prefix.tokens)
        model.chat("Count to ten in words.", max_new_tokens=8).result()
        assert model.chat(MESSAGES, max_new_tokens=1).result().reused_tokens < len(prefix.tokens), "it was let go"


def test_it_is_saved_for_the_next_process(smollm2_bundle: Path, cache: Path, model: Model) -> None:
    with saved(model) as prefix:
        assert not prefix.cost.restored
    (file,) = cache.iterdir()
    assert file.stat().st_size > 1000 * len(prefix.tokens)
    if os.name == "posix":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(cache.stat().st_mode) == 0o700
    with load(smollm2_bundle, prepacked="never") as later, saved(later) as again:
        assert again.cost.restored and again.cost.computed_tokens == 0 and again.tokens == prefix.tokens
        assert ask(later) == len(prefix.tokens)


def test_a_damaged_file_is_computed_and_written_again(cache: Path, model: Model) -> None:
    saved(model).close()
    (file,) = cache.iterdir()
    sound = file.read_bytes()
    file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with saved(model) as prefix:
        assert not prefix.cost.restored
    assert file.read_bytes() == sound


def test_those_used_longest_ago_make_room(cache: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(model).close()
    (first,) = cache.iterdir()
    monkeypatch.setattr(prefix_module, "SAVED_BYTES", first.stat().st_size + 1)
    model.prefix("Another beginning, which is about as long as the one before it was.", saved=True).close()
    assert len(list(cache.iterdir())) == 1 and not first.exists()


def test_who_keeps_none_says_so(smollm2_bundle: Path, cache: Path) -> None:
    with (
        load(smollm2_bundle, engine="genai", prepacked="never") as genai,
        pytest.raises(EngineError, match="keeps no prefix"),
    ):
        genai.prefix(SYSTEM)
    with load(smollm2_bundle, prefix_cache_bytes=0, prepacked="never") as without:
        assert ask(without) == ask(without) == 0
        with pytest.raises(UsageError, match="prefix_cache_bytes=0"):
            without.prefix(SYSTEM)
