"""A stranger's template takes neither time nor memory of the process that loads it, and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from edgephi import bounded
from edgephi.bounded import BoundedChild, ChildDied
from edgephi.errors import DeviceError, PromptError, TokenizerError
from edgephi.templates import chat_template, jinja_child
from edgephi.templates.chat_template import ChatTemplate, render
from tests.processes import children_that_run, gone_within

HELLO = [{"role": "user", "content": "Hello"}]
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
NEVER = "{% if false %}{{ EXPRESSION }}{% endif %}"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "TIME_LIMIT", 1.0)


@pytest.fixture
def template() -> Iterator[ChatTemplate]:
    with ChatTemplate(PLAIN, {}) as made:
        yield made


def children() -> list[psutil.Process]:
    gc.collect()  # templates of earlier tests
    return children_that_run("edgephi.templates.jinja_child")


def pid_of(template: ChatTemplate) -> int:
    process = template._child._process
    assert process is not None
    return process.pid


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "expression", ["(10 ** (10 ** 8)) % 7", "'a' * 10 ** 6 * 10 ** 6", "10 ** (10 ** 8) // 3 ** (10 ** 8)"]
)
def test_constants_that_jinja_computes_while_it_compiles_hang_and_fill_nothing(expression: str) -> None:
    before, started = psutil.Process().memory_info().rss, time.monotonic()
    try:
        with ChatTemplate(NEVER.replace("EXPRESSION", expression) + PLAIN, {}) as made:
            assert made.render(HELLO) == "Hello", "Jinja may leave a constant it cannot compute"
    except TokenizerError as error:
        assert "1 s" in error.what or "512 MB" in error.what
        assert "while it is compiled" in error.what
    assert time.monotonic() - started < 30
    assert psutil.Process().memory_info().rss - before < 50e6
    assert not children()


@pytest.mark.usefixtures("short")
def test_compiling_that_takes_too_long_is_a_tokenizer_error_at_once_the_second_time() -> None:
    source = NEVER.replace("EXPRESSION", "(10 ** (10 ** 8)) % 7")
    with pytest.raises(TokenizerError, match=r"takes more than 1 s while it is compiled"):
        ChatTemplate(source, {})
    later = ChatTemplate(source, {}, wait=False)
    with pytest.raises(TokenizerError, match="takes more than 1 s"):
        later.check()
    started = time.monotonic()
    with pytest.raises(TokenizerError, match="takes more than 1 s"):
        later.render(HELLO)
    assert time.monotonic() - started < 0.9, "it was compiled again"
    later.close()


@pytest.mark.parametrize(
    ("source", "bound"),
    [
        (ENDLESS, "1 s"),
        ("{% for i in range(9) %}{{ 10 ** (messages|length * 10 ** 8) }}{% endfor %}", "1 s"),
        ("{{ [messages] * 10 ** 9 }}", "512 MB of memory"),
        (
            "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
            "512 MB of memory",
        ),
        ("{% for i in range(9999) %}{{ 'abcdefghij' * 10000 }}{% endfor %}", "16,777,216 characters"),
    ],
)
def test_a_bomb_is_a_prompt_error_that_names_the_bound_and_the_next_render_works(
    source: str, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "TIME_LIMIT", 1.0 if bound == "1 s" else 30.0)
    source = f"{{% if messages[0].content == 'bomb' %}}{source}{{% endif %}}{PLAIN}"
    with ChatTemplate(source, {}) as made:
        with pytest.raises(PromptError, match=bound) as refused:
            made.render([{"role": "user", "content": "bomb"}])
        assert refused.value.where == "user"
        assert made.render(HELLO) == "Hello"


@pytest.mark.usefixtures("short")
def test_the_bound_holds_for_all_that_one_call_renders() -> None:
    slow = "{% for i in range(300) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    with ChatTemplate(slow + "{{ messages[0].content|length }}", {}) as made:
        started = time.monotonic()
        with pytest.raises(PromptError):
            made.render(HELLO * 50)
        assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 400 + "1" + ")" * 400 + " }}",
        "{{ " + "[" * 50_000 + " }}",
        "{% if true %}" * 500 + "{% endif %}" * 500,
        "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "9" * 5_000 + " }}",
        "{{ " + "not " * 20_000 + "1 }}",
    ],
)
def test_what_the_compilers_cannot_take_is_a_tokenizer_error(source: str) -> None:
    with pytest.raises(TokenizerError, match="not valid Jinja"):
        ChatTemplate(source, {})
    assert not children()


@pytest.mark.parametrize(("source", "match"), [("x" * (10 * 2**20), "10,485,760 characters"), ("a\ud800", "surrogate")])
def test_a_template_too_large_or_no_text_starts_nothing(source: str, match: str) -> None:
    with pytest.raises(TokenizerError, match=match):
        ChatTemplate(source, {})
    assert not children()


def test_messages_of_16_mb_take_seconds_at_most(template: ChatTemplate) -> None:
    started = time.monotonic()
    text = "é😀 x" * (4 * 2**20 - 8)
    assert template.render([{"role": "user", "content": text}]) == text
    assert time.monotonic() - started < 30


def test_the_child_knows_no_secrets_and_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with ChatTemplate(PLAIN, {}) as made:
        child = psutil.Process(pid_of(made))
        assert "HF_TOKEN" not in child.environ()
        assert child.memory_info().rss < 40e6


@pytest.mark.skipif(sys.platform == "win32", reason="limits of processes are POSIX")
@pytest.mark.parametrize(
    "attempt", ["open('/etc/hostname')", "__import__('socket').socket()", "__import__('os').listdir('/')"]
)
def test_the_child_gives_up_files_and_sockets(attempt: str) -> None:
    code = f"import os, socket; from edgephi import serving; serving.give_up_rights(); {attempt}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Too many open files" in done.stderr


def test_what_is_imported_late_is_imported_before_files_are_given_up() -> None:
    jinja = jinja_child.environment(jinja_child.Clock())
    assert jinja_child.rendered(jinja_child.compiled(jinja, jinja_child.WARM_UP[0]), {}, 10**6)
    late = (
        "{{ lipsum(2, html=false)|length > 0 }}{{ [1]|random }}{{ {'a': 1}|pprint }}{{ 'é'|urlencode }}"
        "{{ 'a b'|wordwrap(1) }}"
        "{{ '<a>'|striptags }}{{ '<a>'|escape }}{{ 'http://x.y'|urlize }}{{ 3|filesizeformat }}{{ {'a': 1}|xmlattr }}"
        "{{ strftime_now('%c %x %X %Z %j') }}{{ '\\u00e9\\N{BULLET}' }}{{ cycler(1, 2).next() }}{{ joiner(',')() }}"
        "{{ '%s' % 1 }}{{ '{}'.format(1) }}{{ [messages]|sort|groupby(0)|list|length }}"
    )
    assert render(late + PLAIN, {}, HELLO).endswith("Hello")


@pytest.mark.parametrize("busy", [False, True])
def test_the_child_ends_with_its_parent_however_that_ends(busy: bool, tmp_path: Path) -> None:
    code = f"""
import pathlib, sys, threading, time
from edgephi.templates.chat_template import ChatTemplate
made = ChatTemplate({(ENDLESS if busy else "") + PLAIN!r}, {{}})
if {busy}:
    threading.Thread(target=made.render, args=({HELLO!r},), daemon=True).start()
    time.sleep(0.5)
print(made._child._process.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
        assert gone_within(pid, 30)


@pytest.mark.skipif(sys.platform == "win32", reason="the timer of the system is POSIX")
def test_a_child_without_a_parent_ends_even_where_python_gives_no_turn_to_its_threads() -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "edgephi.templates.jinja_child", str(2**29), "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()
    source = b"{% if false %}{{ (10 ** (10 ** 8)) % 7 }}{% endif %}"
    process.stdin.write(b'{"source": "%s", "now": "2024-01-01", "output": 1}\n' % source)
    process.stdin.flush()
    time.sleep(0.3)
    process.stdin.close()
    assert process.wait(10) == -signal.SIGALRM
    process.stdout.close()


def test_closing_and_dropping_leave_no_process_and_no_handle() -> None:
    def handles() -> int:
        process = psutil.Process()
        return process.num_handles() if sys.platform == "win32" else process.num_fds()

    render(PLAIN, {}, HELLO)
    before = handles()
    for _ in range(20):
        made = ChatTemplate(PLAIN, {})
        made.render(HELLO)
        made.close()
        made.close()
    for _ in range(5):
        dropped = ChatTemplate(PLAIN, {})
        alive = weakref.ref(dropped)
        del dropped
        gc.collect()
        assert alive() is None
    assert not children()
    assert handles() <= before + 1


def test_a_template_closed_before_it_was_compiled_leaves_nothing() -> None:
    for _ in range(5):
        ChatTemplate(PLAIN, {}, wait=False).close()
    time.sleep(0.5)
    gc.collect()
    assert not children()


def test_threads_take_turns_and_get_their_own_answers(template: ChatTemplate) -> None:
    wrong: list[str] = []

    def ask(number: int) -> None:
        for turn in range(30):
            text = f"{number}-{turn}" * (1 + turn * 200)
            if template.render([{"role": "user", "content": text}]) != text:
                wrong.append(text[:20])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(children()) == 1


def test_a_killed_child_is_replaced(template: ChatTemplate) -> None:
    psutil.Process(pid_of(template)).kill()
    assert gone_within(pid_of(template), 30)
    assert template.render(HELLO) == "Hello"


def test_a_child_that_dies_at_work_is_a_prompt_error_with_its_reason(template: ChatTemplate) -> None:
    with ChatTemplate(f"{{% if messages[0].content == 'Hello' %}}{ENDLESS}{{% endif %}}{PLAIN}", {}) as made:
        threading.Timer(0.5, lambda: psutil.Process(pid_of(made)).kill()).start()
        with pytest.raises(PromptError, match="ends the process that runs it"):
            made.render(HELLO)


def interrupt_main_thread() -> None:
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)


def test_an_interrupted_render_does_not_answer_the_next_one() -> None:
    slow = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    with ChatTemplate(f"{{% if messages[0].content == 'slow' %}}{slow}{{% endif %}}{PLAIN}", {}) as made:
        # a shell's background job ignores the signal until it is told otherwise
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, interrupt_main_thread).start()
        try:
            with pytest.raises(KeyboardInterrupt):
                made.render([{"role": "user", "content": "slow"}])
        finally:
            signal.signal(signal.SIGINT, before)
        assert made.render(HELLO) == "Hello"
    assert not children()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_a_child_of_its_own(template: ChatTemplate) -> None:
    template.render(HELLO)
    mine = pid_of(template)
    forked = os.fork()
    if forked == 0:
        status = 1
        try:
            right = template.render([{"role": "user", "content": "forked"}]) == "forked" and pid_of(template) != mine
            template.close()
            status = 0 if right else 2
        finally:
            os._exit(status)
    assert os.waitpid(forked, 0)[1] == 0
    assert template.render(HELLO) == "Hello"
    assert pid_of(template) == mine


def test_a_frozen_application_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(DeviceError, match="holds no Python") as refused:
        ChatTemplate(PLAIN, {})
    assert refused.value.step == "process"
    later = ChatTemplate(PLAIN, {}, wait=False)
    with pytest.raises(DeviceError, match="holds no Python"):
        later.render(HELLO)


@pytest.mark.parametrize("module", ["edgephi.no_such_module", "this"])
def test_a_child_that_does_not_start_says_its_last_words(module: str) -> None:
    child = BoundedChild(module, memory=2**29, seconds=1.0)
    with pytest.raises(DeviceError, match="does not start") as refused:
        child.call({}, seconds=1.0)
    assert refused.value.step == "process"
    assert not children_that_run(module)


def test_what_cannot_be_run_as_python_is_a_device_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(DeviceError, match="Python does not start"):
        ChatTemplate(PLAIN, {})


def test_the_reason_of_a_death_is_named() -> None:
    child = BoundedChild("edgephi.templates.jinja_child", memory=2**29, seconds=5.0)
    with pytest.raises(ChildDied):
        child.call({"source": None}, seconds=1.0)  # no request that it understands
    child.close()


def test_where_the_system_bounds_no_memory_the_parent_watches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    grow = "import time; time.sleep(0.5); held = [bytes(1) * 2**20 for _ in range(200)]; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", grow]) as process:
        monkeypatch.setattr(bounded, "sys", SimpleNamespace(platform="darwin"))
        with bounded._Watch(process, 30, 100 * 2**20) as watch:
            assert process.wait(20)
    assert watch.exceeded == "memory"
