"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edgephi.runtime.answer import Answer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The numbers of one server; several in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        to = self.registry
        self.requests = Counter("edgephi_requests", "Requests answered.", ["path", "status"], registry=to)
        self.prompt_tokens = Counter("edgephi_prompt_tokens", "Tokens of prompts.", ["model"], registry=to)
        self.cached_tokens = Counter(
            "edgephi_cached_tokens", "Of those, found in the KV cache and not computed.", ["model"], registry=to
        )
        self.new_tokens = Counter("edgephi_generated_tokens", "Tokens of answers.", ["model"], registry=to)
        self.answers = Counter("edgephi_answers", "Answers by how they ended.", ["model", "finish"], registry=to)
        self.first_token = Histogram(
            "edgephi_time_to_first_token_seconds", "Prompt and first token.", buckets=_SECONDS, registry=to
        )
        self.answer_seconds = Histogram("edgephi_answer_seconds", "Whole answers.", buckets=_SECONDS, registry=to)
        self.loads = Counter("edgephi_model_loads", "Models loaded.", ["model"], registry=to)
        self.load_seconds = Histogram("edgephi_model_load_seconds", "Loading a model.", buckets=_SECONDS, registry=to)
        self.unloads = Counter("edgephi_model_unloads", "Models unloaded, and why.", ["model", "reason"], registry=to)
        self.loaded = Gauge("edgephi_model_loaded", "Whether a model is in memory.", ["model"], registry=to)
        self.running = Gauge("edgephi_requests_running", "Answers being computed.", registry=to)
        self.waiting = Gauge("edgephi_requests_waiting", "Requests in the queue.", registry=to)

    def watch(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Where the two gauges of requests are read."""
        self.running.set_function(running)
        self.waiting.set_function(waiting)

    def count(self, model: str, answer: Answer | None) -> None:
        """An answer that ended; None: by an error."""
        self.answers.labels(model, "error" if answer is None else answer.finish).inc()
        if answer is None:
            return
        self.prompt_tokens.labels(model).inc(answer.prompt_tokens)
        self.cached_tokens.labels(model).inc(answer.reused_tokens)
        self.new_tokens.labels(model).inc(answer.new_tokens)
        self.answer_seconds.observe(answer.total_s)
        if answer.time_to_first_token_s is not None:
            self.first_token.observe(answer.time_to_first_token_s)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)
