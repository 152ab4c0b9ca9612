"""An answer's text, token by token, is the text of all its tokens."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import tokenizers

from edgephi.errors import TokenizerError
from edgephi.export.checkpoint.gguf import open_gguf
from edgephi.export.tokenizer.gguf import tokenizer_from_gguf
from edgephi.runtime.text.text_stream import TextStream
from edgephi.runtime.text.tokenizer import Tokenizer

NAMES = ["phi-2", "phi-3-mini", "phi-3-medium"]


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    metadata = open_gguf(smollm2_gguf).gguf_metadata
    assert metadata is not None
    folder = tmp_path_factory.mktemp("smollm2")
    text = tokenizer_from_gguf(metadata, "smollm2.gguf").tokenizer_json
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return Tokenizer(folder)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in ids), stream.finish()]


def random_sequences(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Tokens of every kind, single bytes and new lines among them, and ids that are no tokens."""
    reference = tokenizer._reference
    size = reference.get_vocab_size()
    single = [row for row in range(size) if (reference.id_to_token(row) or "").startswith("<0x")] or list(range(300))
    newline = tokenizer.encode("\n")[-1]
    sequences = []
    for seed in range(count):
        rng = random.Random(seed)
        kinds = (range(size), single, [newline], [size + 7])
        sequences.append([rng.choice(rng.choice(kinds)) for _ in range(rng.randrange(1, 24))])
    return sequences


def check(tokenizer: Tokenizer, count: int) -> None:
    regular = tokenizer.encode("a")[-1]
    for ids in random_sequences(tokenizer, count):
        # a regular token at the end: no character is left unfinished
        whole = [*ids, regular]
        assert "".join(streamed(tokenizer, whole)) == tokenizer.decode(whole), ids
        # cut anywhere else the text is the same but for the end
        text, decoded = "".join(streamed(tokenizer, ids)), tokenizer.decode(ids)
        assert text.startswith(decoded.rstrip("\ufffd")), ids


@pytest.mark.parametrize("name", NAMES)
def test_three_thousand_random_sequences(shared_data: Path, name: str) -> None:
    check(Tokenizer(shared_data / "tokenizers" / name), 3_000)


def test_three_thousand_random_sequences_of_smollm2(smollm2: Tokenizer) -> None:
    check(smollm2, 3_000)


def test_a_broken_byte_after_a_newline_of_phi_3(shared_data: Path) -> None:
    tokenizer = Tokenizer(shared_data / "tokenizers" / "phi-3-mini")
    newline, broken = 13, 3 + 0xFF
    ids = [*tokenizer.encode("a"), newline, broken, *tokenizer.encode("b")]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", NAMES)
def test_a_character_that_is_not_whole_is_left_out_at_the_end(shared_data: Path, name: str) -> None:
    tokenizer = Tokenizer(shared_data / "tokenizers" / name)
    text = "a\né😀\n😀"
    ids = tokenizer.encode(text)
    texts = ["".join(streamed(tokenizer, ids[:end])) for end in range(len(ids) + 1)]
    assert all(text.startswith(part) and "\ufffd" not in part for part in texts)
    assert [len(part) for part in texts] == sorted(len(part) for part in texts)
    assert texts[-1] == text


@pytest.mark.parametrize("name", ["phi-2", "phi-3-mini"])
def test_a_token_costs_what_it_costs_however_long_the_answer_is(shared_data: Path, name: str) -> None:
    tokenizer = Tokenizer(shared_data / "tokenizers" / name)
    broken = 200
    stream = tokenizer.stream()
    started = time.perf_counter()
    for _ in range(20_000):
        stream.push(broken)
    stream.finish()
    assert time.perf_counter() - started < 5


def test_a_decoder_of_another_kind(shared_data: Path, tmp_path: Path) -> None:
    parsed = json.loads((shared_data / "tokenizers" / "phi-3-mini" / "tokenizer.json").read_text(encoding="utf-8"))
    steps = parsed["decoder"]["decoders"]
    parsed["decoder"]["decoders"] = [{"type": "Replace", "pattern": {"String": "\u0001"}, "content": " "}, *steps]
    (tmp_path / "tokenizer.json").write_text(json.dumps(parsed), encoding="utf-8")
    check(Tokenizer(tmp_path), 500)


SPACES = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
FALLBACK = {"type": "ByteFallback"}
FUSE = {"type": "Fuse"}
PREFIXED = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def strip(start: int, stop: int = 0) -> object:
    return {"type": "Strip", "content": " ", "start": start, "stop": stop}


def sequence(*steps: object) -> object:
    return {"type": "Sequence", "decoders": list(steps)}


DECODERS: dict[str, object] = {
    "Phi-3": sequence(SPACES, FALLBACK, FUSE, strip(1)),
    "two spaces off": sequence(SPACES, FALLBACK, FUSE, strip(2)),
    "both ends": sequence(SPACES, FALLBACK, FUSE, strip(1, 1)),
    "two off the end": sequence(SPACES, FALLBACK, FUSE, strip(0, 2)),
    "no fuse": sequence(SPACES, FALLBACK),
    "spaces last": sequence(FALLBACK, FUSE, SPACES),
    "spaces behind bytes": sequence(FALLBACK, SPACES, FUSE, strip(1)),
    "nested": sequence(sequence(SPACES, FALLBACK), sequence(FUSE, strip(1))),
    "Metaspace": PREFIXED,
    "bytes, then Metaspace": sequence(FALLBACK, PREFIXED),
    "Metaspace behind a fuse": sequence(FALLBACK, FUSE, PREFIXED),
    "only bytes": FALLBACK,
    "a letter that grows": sequence(
        SPACES, FALLBACK, FUSE, {"type": "Replace", "pattern": {"String": "b"}, "content": "bb"}
    ),
    "byte level": BYTE_LEVEL,
    "byte level, both ends": sequence(BYTE_LEVEL, strip(1, 1)),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_of_every_known_step_however_long_a_run_of_bytes_is(name: str) -> None:
    words = ["a", "▁", "▁a", "b", "▁the", " y", "é", "漢", "Ġz", "Ċ", "<0x0A", "▁▁"]
    vocabulary = {text: row for row, text in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}
    tokenizer = tokenizers.Tokenizer.from_str(
        json.dumps({"version": "1.0", "added_tokens": [], "decoder": DECODERS[name], "model": model})
    )
    rng = random.Random(3)
    sentence = list(("漢字かな交じり文" * 9).encode())  # 216 bytes
    others = range(256, len(vocabulary))
    compared = 0
    for _ in range(400):
        around = [[rng.choice(others) for _ in range(rng.randrange(4))] for _ in range(2)]
        broken = [rng.randrange(128, 256) for _ in range(rng.randrange(90))]
        ids = [*around[0], *rng.choice([sentence, broken, sentence + broken]), *around[1], 257, 256]
        try:
            decoded = tokenizer.decode(ids)
        except BaseException as problem:  # Strip panics at an empty text
            assert type(problem).__name__ == "PanicException"
            continue
        stream = TextStream(tokenizer, lambda said: TokenizerError(said, remedy=""))
        assert "".join([*(stream.push(token) for token in ids), stream.finish()]) == decoded, ids
        compared += 1
    assert compared > 300
