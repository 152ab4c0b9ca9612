"""Windows' asynchronous operations as Python has them: awaitable, iterable, cancellable.

An operation starts when it is made, in a thread of its own. What its owner sees happens on the event loop it was made
on: `progress` is called there, and neither awaiting nor iterating blocks the loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator
from typing import Generic, TypeVar

from edgephi.errors import EngineError, UsageError, one_line

Result = TypeVar("Result")
Delta = TypeVar("Delta")


class Cancellation:
    """Whether an operation should end, for the thread that does its work. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._calls: list[Callable[[], None]] = []

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def on_cancel(self, call: Callable[[], None]) -> None:
        """Call a function when the operation is cancelled; now if it is already. It must not block."""
        with self._lock:
            if not self._cancelled:
                self._calls.append(call)
                return
        call()

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            calls, self._calls = self._calls, []
        for call in calls:
            call()


Work = Callable[[Callable[[Delta], None], Cancellation], Result]
"""What an operation does in its thread: it hands deltas to the first argument and looks at the second one."""


class AsyncOperation(Generic[Result, Delta]):
    """What methods that end in `_async` return: Windows' IAsyncOperation and IAsyncOperationWithProgress.

        operation = model.generate_response_async("Why is the sky blue?")
        operation.progress = lambda operation, delta: print(delta, end="")
        result = await operation

    or, in the place of `progress`, `async for delta in operation`, before `await operation` or without it.

    A task that is cancelled while it awaits or iterates cancels the operation. A cancelled operation raises
    `asyncio.CancelledError` where it is awaited, once its work has ended.

    Args:
        name: of the method, for a person.
        work: runs in the operation's thread.
        discard: what to do with the result of an operation that was cancelled too late.

    Raises (where it is made):
        UsageError: no event loop runs in this thread. Also where it is used on another one.
        EngineError: the system gives no thread.
    """

    def __init__(
        self, name: str, work: Work[Delta, Result], discard: Callable[[Result], None] = lambda result: None
    ) -> None:
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            raise UsageError(
                f"{name} was called where no event loop runs", remedy="Call it in an `async def` function, and await it"
            ) from None
        self._done: asyncio.Future[Result] = self._loop.create_future()
        self._deltas: list[Delta] = []
        self._news = asyncio.Event()
        self._progress: Callable[[AsyncOperation[Result, Delta], Delta], object] | None = None
        self._reported = 0
        self._lock = threading.Lock()
        self._ended = False
        self._at_end: list[Callable[[], None]] = []
        self._cancellation, self._discard = Cancellation(), discard
        try:
            threading.Thread(target=self._run, args=(work,), name=f"edgephi {name}").start()
        except RuntimeError as problem:
            raise EngineError(
                f"no thread can be started for {name}: {one_line(problem)}", remedy="Await operations that run first"
            ) from problem

    @property
    def progress(self) -> Callable[[AsyncOperation[Result, Delta], Delta], object] | None:
        """Called with this operation and each delta, on the event loop; those that came before it was set, too. What it
        raises goes to the loop's exception handler, and the operation goes on."""
        return self._progress

    @progress.setter
    def progress(self, call: Callable[[AsyncOperation[Result, Delta], Delta], object] | None) -> None:
        self._require_loop()
        self._progress = call
        self._loop.call_soon(self._report)

    def cancel(self) -> None:
        """End the work after the token, or the piece of prompt, that is being computed. Any thread may call it."""
        self._cancellation.cancel()

    def done(self) -> bool:
        """Whether the work has ended. Not in Windows, which has `Status`."""
        return self._done.done()

    def on_done(self, call: Callable[[], None]) -> None:
        """Call a function in the operation's thread when the work has ended, before anyone who awaits it goes on; here
        and at once, if it has."""
        with self._lock:
            if not self._ended:
                self._at_end.append(call)
                return
        call()

    def __await__(self) -> Generator[object, None, Result]:
        return self._result().__await__()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        self._require_loop()
        seen = 0
        while True:
            while seen < len(self._deltas):
                seen += 1
                yield self._deltas[seen - 1]
            if self._done.done():
                break
            self._news.clear()
            try:
                await self._news.wait()
            except asyncio.CancelledError:
                self.cancel()
                raise
        await self._result()

    async def _result(self) -> Result:
        self._require_loop()
        try:
            result = await asyncio.shield(self._done)
        except asyncio.CancelledError:
            self.cancel()
            raise
        self._report()
        return result

    def _require_loop(self) -> None:
        """Raises UsageError on another event loop than the operation's."""
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is not self._loop:
            raise UsageError(
                "an operation is used outside of the event loop that it was made on",
                remedy="Make it, await it and set its progress in one asyncio.run(...)",
            )

    def _run(self, work: Work[Delta, Result]) -> None:
        """In the operation's thread."""
        try:
            result = work(self._emit, self._cancellation)
        except BaseException as problem:  # handed on to where it is awaited
            self._end()
            self._on_loop(self._fail, problem)
        else:
            self._end()
            if not self._on_loop(self._finish, result):
                self._discard(result)

    def _emit(self, delta: Delta) -> None:
        self._on_loop(self._receive, delta)

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> bool:
        """Whether the loop takes it."""
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed: nobody can ask for the result any more
            self._cancellation.cancel()
            return False
        return True

    def _receive(self, delta: Delta) -> None:
        self._deltas.append(delta)
        self._news.set()
        self._report()

    def _finish(self, result: Result) -> None:
        self._news.set()
        if self._cancellation.cancelled:
            self._discard(result)
            self._done.cancel()
        else:
            self._done.set_result(result)

    def _fail(self, problem: BaseException) -> None:
        self._news.set()
        if self._cancellation.cancelled or isinstance(problem, asyncio.CancelledError):
            self._done.cancel()
        else:
            self._done.set_exception(problem)

    def _end(self) -> None:
        with self._lock:
            self._ended = True
        for call in self._at_end:
            call()

    def _report(self) -> None:
        while self._progress is not None and self._reported < len(self._deltas):
            self._reported += 1
            try:
                self._progress(self, self._deltas[self._reported - 1])
            except Exception as problem:  # the caller's own code
                self._loop.call_exception_handler(
                    {"message": "progress of an operation of edgephi.windows failed", "exception": problem}
                )
