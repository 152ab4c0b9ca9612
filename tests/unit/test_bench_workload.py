"""Workloads: data that is checked, and cases that follow from it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from edgephi.benchmarks.bench.cases import Prompts, plan
from edgephi.benchmarks.bench.derive import derive, procyon_style
from edgephi.benchmarks.bench.workload import Score, Workload, built_in, read_workload
from edgephi.errors import UsageError
from tests.bench_reports import case

PROMPTS = Prompts(
    plain=lambda text: [1, *(ord(letter) for letter in text)],
    chat=lambda text: [2, *(ord(letter) for letter in text), 3],
    stop_ids=frozenset({3}),
    context_length=100,
)


def workload(tmp_path: Path, text: str) -> Workload:
    (tmp_path / "text.txt").write_text("abc")
    (tmp_path / "own.toml").write_text('description = "d"\n' + text)
    return read_workload(str(tmp_path / "own.toml"))


def test_the_workloads_that_come_along_can_be_read() -> None:
    assert set(built_in()) >= {
        "quick",
        "sweep",
        "mlperf-client",
        "procyon-style",
        "load",
        "long-context",
        "growth",
        "speculation",
    }
    for name in built_in():
        assert read_workload(name).content.description


def test_the_client_workload_is_as_published() -> None:
    content = read_workload("mlperf-client").content
    assert (content.method.warmups, content.method.repetitions, content.method.pause_s) == (1, 3, 5)
    assert {answer.name for answer in content.answer} == {
        "content generation",
        "creative writing",
        "structured text",
        "code analysis",
        "intermediate",
    }
    assert read_workload("procyon-style").content.answer == content.answer


def test_its_prompts_have_the_lengths_their_names_promise(shared_data: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared_data / "tokenizers" / "phi-3-mini" / "tokenizer.json"))
    prompts = Prompts(lambda text: list(tokenizer.encode(text).ids), None, frozenset(), 8192)
    lengths = {one.name: len(one.prompt_ids) for one in plan(read_workload("mlperf-client"), prompts)[0]}
    assert lengths["code analysis"] == pytest.approx(2048, rel=0.1)
    assert lengths["intermediate"] == pytest.approx(4096, rel=0.1)
    assert lengths["content generation"] < lengths["creative writing"] < lengths["structured text"] < 1200


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no case"),
        ("[load]\nspeed = 1", "load.speed"),
        ('[[prefill]]\ntext = "../secret"\nlengths = [4]', "prefill.0.text"),
        ('[[prefill]]\ntext = "text.txt"\nlengths = [0]', "prefill.0.lengths.0"),
        ('[[prefill]]\ntext = "text.txt"\nlengths = [4000000000]', "prefill.0.lengths.0"),
        ('[[prefill]]\ntext = "missing.txt"\nlengths = [4]', "missing.txt"),
        ("[load]\n[method]\nrepetitions = 0", "method.repetitions"),
        ("[load]\n[score]\nttft_numerator = 1\nrate_of_5000 = 1", "a score needs answers"),
        ("[load", "not TOML"),
    ],
)
def test_a_workload_that_cannot_be_used_is_refused_with_its_key(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        workload(tmp_path, text)
    assert named in str(caught.value)


def test_lengths_are_cut_from_the_repeated_text_and_the_context_bounds_them(tmp_path: Path) -> None:
    text = '[[prefill]]\ntext = "text.txt"\nlengths = [6, 90]\ndepths = [0, 20]\n'
    cases, refused = plan(workload(tmp_path, text), PROMPTS)
    assert [one.name for one in cases] == ["prefill 6", "prefill 90", "prefill 6 at depth 20"]
    unit = [1, *b"abc"]
    assert list(cases[0].prompt_ids) == [*unit, *unit[:2]]
    assert list(cases[2].depth_ids) == unit * 5
    assert cases[2].prompt_ids == cases[0].prompt_ids  # 20 is five times the text's four tokens
    assert [(one.name, reason) for one, reason in refused] == [
        ("prefill 90 at depth 20", "needs 111 tokens of context, the model has 100")
    ]


def test_decoding_starts_at_its_depth_and_no_token_stops_it(tmp_path: Path) -> None:
    (one,), _ = plan(workload(tmp_path, '[[decode]]\ntext = "text.txt"\ntokens = 7\ndepths = [9]'), PROMPTS)
    assert (len(one.depth_ids), len(one.prompt_ids), one.new_tokens, one.stop_ids) == (9, 1, 7, frozenset())
    assert one.length == 17


ANSWER = '[[answer]]\nname = "a"\ncategory = "c"\ninstruction = "i"\ndocuments = ["text.txt"]\nmax_new_tokens = 5\n'


def test_an_answer_goes_through_the_template_if_there_is_one(tmp_path: Path) -> None:
    (one,), _ = plan(workload(tmp_path, ANSWER), PROMPTS)
    assert one.prompt_ids == (2, *b"i\n\nabc", 3)
    assert one.templated and one.stop_ids == {3}
    bare = Prompts(PROMPTS.plain, None, PROMPTS.stop_ids, 100)
    (one,), _ = plan(workload(tmp_path, ANSWER + "stop = false"), bare)
    assert one.prompt_ids == (1, *b"i\n\nabc")
    assert not one.templated and not one.stop_ids


def test_two_cases_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two cases are called 'a'"):
        plan(workload(tmp_path, ANSWER + ANSWER), PROMPTS)


def test_speculation_is_off_and_on_with_the_same_prompt_and_stays_within_one_rope(tmp_path: Path) -> None:
    text = '[[speculation]]\nname = "s"\ninstruction = "i"\ntokens = 50\nngram_size = 2\nmax_draft_tokens = 3'
    (off, on), _ = plan(workload(tmp_path, text), PROMPTS)
    assert off.drafts is None and on.drafts is not None and (on.drafts.ngram_size, on.drafts.max_draft_tokens) == (2, 3)
    assert off.prompt_ids == on.prompt_ids and off.by_og and on.by_og
    short = Prompts(PROMPTS.plain, None, frozenset(), 100, rope_switch=20)
    cases, refused = plan(workload(tmp_path, text), short)
    assert not cases and "change of rope at 20" in refused[0][1]


def test_a_changed_text_is_another_workload(tmp_path: Path) -> None:
    one = workload(tmp_path, ANSWER)
    assert workload(tmp_path, ANSWER).sha256 == one.sha256
    (tmp_path / "text.txt").write_text("abd")
    assert read_workload(str(tmp_path / "own.toml")).sha256 != one.sha256


def test_the_score_is_the_published_formula() -> None:
    """A device that decodes 24.4 tokens/s after 2 s: S_ots = 24.4 × 5000/244 = 500, S_ttft = 1250/2 = 625."""
    score = Score(ttft_numerator=1250, rate_of_5000=244)
    assert procyon_style(score, [1.0, 3.0], [20.0, 28.8]) == pytest.approx(math.sqrt(500 * 625))


def test_derived_numbers_follow_from_medians_and_are_left_out_where_one_is_missing() -> None:
    cases = [
        case("a", "answer", {"time_to_first_token_s": [1, 1, 9], "decode_tokens_per_s": [10]}),
        case("d0", "decode", {"decode_tokens_per_s": [100, 100, 7]}),
        case("d9", "decode", {"decode_tokens_per_s": [80]}, depth=9),
        case("s, speculation off", "speculation", {"decode_tokens_per_s": [100]}, category="s"),
        case("s, speculation on", "speculation", {"decode_tokens_per_s": [190]}, category="s"),
    ]
    score = Score(ttft_numerator=1250, rate_of_5000=244)
    found = {one.name: one.value for one in derive(cases, score)}
    assert found == pytest.approx(
        {
            "Procyon-style score": math.sqrt(1250 * 10 * 5000 / 244),
            "decode speed kept at depth 9": 0.8,
            "speculation, s": 1.9,
        }
    )
    assert not derive([case("a", "answer", {"time_to_first_token_s": [1]}), cases[3]], score)


def test_growth_leaves_out_what_the_context_cannot_hold_and_says_why() -> None:
    prompts = Prompts(PROMPTS.plain, None, frozenset(), 8192)
    cases, refused = plan(read_workload("growth"), prompts)
    assert max(one.length for one in cases if one.group == "decode") > 8000
    assert [one.name for one, _ in refused] == ["prefill 16384", "decode 32 at depth 16384"]
    assert all("the model has 8,192" in reason for _, reason in refused)


def test_growth_is_the_line_through_what_a_token_costs() -> None:
    """8 ms and 2 ms more per 1,000 tokens of depth; prompts: 1 ms and 0.5 ms more, the shortest not counted."""
    decode = [
        case(f"d{depth}", "decode", {"decode_tokens_per_s": [1e3 / (8 + 2 * depth / 1e3)]}, depth=depth)
        for depth in (0, 1000, 4000)
    ]
    prefill = [
        case(f"p{n}", "prefill", {"prefill_tokens_per_s": [1e3 / (1 + n / 2e3)]}, prompt_tokens=n)
        for n in (256, 1024, 4096)
    ]
    short = case("p16", "prefill", {"prefill_tokens_per_s": [3.0]}, prompt_tokens=16)
    found = {one.name: one.value for one in derive([*decode, *prefill, short], None) if "ms" in one.name}
    assert found == pytest.approx(
        {
            "decode, ms a token to begin with": 8,
            "decode, ms more per 1,000 tokens in the cache": 2,
            "prefill, ms a token to begin with": 1,
            "prefill, ms more per 1,000 tokens of prompt": 0.5,
        }
    )
    assert not [one for one in derive(decode[:2], None) if "ms" in one.name]
