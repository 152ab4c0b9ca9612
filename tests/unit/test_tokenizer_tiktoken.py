"""Phi-3-small's rank file becomes a tokenizer.json with the ids that joining by rank gives."""

from __future__ import annotations

import base64
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from edgephi.errors import TokenizerError
from edgephi.export.tokenizer.huggingface import tokenizer_from_folder
from edgephi.export.tokenizer.pre_tokenizers import WORD_SPLITS, byte_level
from edgephi.export.tokenizer.tiktoken import RANK_FILE, read_ranks, special_tokens, tokenizer_json
from tests.unit.tokenizer_cases import HARD_TEXTS, genai_tokenizer

WHERE = Path("ranks.tiktoken")
Ranks = dict[bytes, int]


def joined(word: bytes, ranks: Ranks) -> list[int]:
    """tiktoken's algorithm (openai/tiktoken, src/lib.rs) in its plainest form."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        unions = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not unions:
            return [ranks[part] for part in parts]
        _, i = min(unions)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def trained(text: str, tokens: int) -> Ranks:
    """Ranks as training gives them: the bytes in an order of their own, then the commonest union, again and again."""
    rng = random.Random(0)
    single = [bytes([byte]) for byte in range(256)]
    rng.shuffle(single)
    ranks = {token: rank for rank, token in enumerate(single)}
    words = [[word[i : i + 1] for i in range(len(word))] for word in (w.encode() for w in text.split(" "))]
    while len(ranks) < tokens:
        unions: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in pairwise(word):
                unions[pair] = unions.get(pair, 0) + 1
        best = max(unions, key=lambda pair: (unions[pair], pair))
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
                i += 1
        ranks.setdefault(best[0] + best[1], len(ranks))
    return ranks


def written(ranks: Ranks) -> str:
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    rng = random.Random(1)
    letters = "aab" * 40 + "cdeé漢 "
    return trained("".join(rng.choice(letters) for _ in range(4000)) + "aaaaaaaa " * 30, 420)


def tokenizer_of(ranks: Ranks, special: dict[str, int]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_json(ranks, special, WHERE)))


def words_of(text: str) -> list[str]:
    """cl100k's split, by the tokenizers library; only the joining is under test."""
    steps: Any = byte_level(WORD_SPLITS["dbrx"])["pretokenizers"]
    pattern = steps[0]["pattern"]["Regex"]
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return [word for word, _ in split.pre_tokenize_str(text)]


def test_ids_equal_joining_by_rank(ranks: Ranks) -> None:
    tokenizer = tokenizer_of(ranks, {})
    rng = random.Random(2)
    texts = [*HARD_TEXTS, *("".join(rng.choice("aaabcdeé漢 1.\n") for _ in range(40)) for _ in range(300))]
    for text in texts:
        expected = [token for word in words_of(text) for token in joined(word.encode(), ranks)]
        assert tokenizer.encode(text).ids == expected, text
        assert tokenizer.decode(expected, skip_special_tokens=False) == text


def test_a_rank_file_reads_as_it_was_written(ranks: Ranks) -> None:
    assert read_ranks(written(ranks) + "\n", WHERE) == ranks


def test_special_tokens_are_cut_out_whole(ranks: Ranks) -> None:
    tokenizer = tokenizer_of(ranks, {"<|end|>": len(ranks), "<|user|>": len(ranks) + 1})
    ids = tokenizer.encode("a<|user|>b<|end|>").ids
    assert ids == [ranks[b"a"], len(ranks) + 1, ranks[b"b"], len(ranks)]


def test_phi3_small_has_a_special_token_for_every_id_behind_the_ranks() -> None:
    special = special_tokens()
    assert sorted(special.values()) == list(range(100256, 100352))
    # microsoft/Phi-3-small-8k-instruct, tokenization_phi3_small.py
    published = {
        "<|endoftext|>": 100257,
        "<|assistant|>": 100263,
        "<|end|>": 100266,
        "<|dummy_id_0|>": 100264,
        "<|dummy_id_2|>": 100256,
        "<|dummy_id_3|>": 100267,
        "<|dummy_id_11|>": 100275,
        "<|endofprompt|>": 100276,
        "<|dummy_id_12|>": 100277,
        "<|dummy_id_86|>": 100351,
    }
    assert published.items() <= special.items()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda lines: [*lines[:5], "no/base64!! 5", *lines[6:]], "line 6 is no token with the rank 5"),
        (lambda lines: [*lines[:5], "AAAA five", *lines[6:]], "line 6 is no token with the rank 5"),
        (lambda lines: [*lines[:5], *lines[6:]], "line 6 is no token with the rank 5"),
        (lambda lines: [*lines, f"{lines[0].split()[0]} {len(lines)}"], "repeats the token of rank 0"),
        (lambda lines: [f"{base64.b64encode(b'xyz').decode()} 0", *lines[1:]], "is no token"),
    ],
)
def test_a_damaged_rank_file_is_refused(ranks: Ranks, change: Any, reason: str) -> None:
    text = "\n".join(change(written(ranks).splitlines()))
    with pytest.raises(TokenizerError, match=reason):
        read_ranks(text, WHERE)


def test_a_token_that_no_join_makes_is_refused(ranks: Ranks) -> None:
    with pytest.raises(TokenizerError, match=f"no join of two tokens makes the token of rank {len(ranks)}"):
        tokenizer_json({**ranks, b"zzzz": len(ranks)}, {}, WHERE)


@pytest.fixture(scope="module")
def phi3_small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Phi-3-small publishes, with as many ranks: all bytes, all pairs, and triples."""
    folder = tmp_path_factory.mktemp("phi3small")
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes([a, b]) for a in range(256) for b in range(256)]
    tokens += [bytes([97 + a % 26, b, c]) for a in range(26) for b in range(32, 127) for c in range(256)]
    ranks = {token: rank for rank, token in enumerate(tokens[:100256])}
    (folder / RANK_FILE).write_text(written(ranks), encoding="ascii")
    (folder / "config.json").write_text('{"model_type": "phi3small", "eos_token_id": 100257}', encoding="utf-8")
    template = "{% for m in messages %}{{'<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n'}}{% endfor %}"
    template += "{% if add_generation_prompt %}{{'<|assistant|>\n'}}{% endif %}"
    config = {
        "tokenizer_class": "Phi3SmallTokenizer",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_folder_without_tokenizer_json_is_read_from_its_ranks(phi3_small_folder: Path) -> None:
    files = tokenizer_from_folder(phi3_small_folder)
    tokenizer = Tokenizer.from_str(files.tokenizer_json)
    assert files.vocabulary_size == 100352
    assert files.eos_token_ids == (100257, 100266)
    assert tokenizer.encode("<|user|>\nab<|end|>").ids == [100262, 10, 256 + 256 * 97 + 98, 100266]


def test_onnxruntime_genai_reads_the_same_ids(phi3_small_folder: Path, tmp_path: Path) -> None:
    from edgephi.export.tokenizer.files import write

    files = tokenizer_from_folder(phi3_small_folder)
    write(files, tmp_path)
    ours, genai = Tokenizer.from_str(files.tokenizer_json), genai_tokenizer(tmp_path)
    for text in HARD_TEXTS:
        if text:
            assert [int(token) for token in genai.encode(text)] == ours.encode(text).ids, text


def test_the_same_file_in_another_model_is_not_guessed_at(phi3_small_folder: Path, tmp_path: Path) -> None:
    (tmp_path / RANK_FILE).write_bytes((phi3_small_folder / RANK_FILE).read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "dbrx"}', encoding="utf-8")
    with pytest.raises(TokenizerError, match=RANK_FILE):
        tokenizer_from_folder(tmp_path)


def test_a_shorter_rank_file_is_refused(ranks: Ranks, phi3_small_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((phi3_small_folder / "config.json").read_bytes())
    (tmp_path / RANK_FILE).write_text(written(ranks), encoding="ascii")
    with pytest.raises(TokenizerError, match="420 tokens where Phi-3-small's has 100,256"):
        tokenizer_from_folder(tmp_path)
