"""Calls of reward functions: their names, arguments and numbers, async ones beside each other, and
none waited for too long."""

import asyncio
import functools
import inspect
import math
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

# Cancelled coroutines end within this time, or their loop is blocked and is not used again.
_CANCEL_SECONDS = 1.0


class Call:
    """One call of one function, in whatever thread it runs.

    Attributes:
        is_done: set when the function has returned or raised, late or not.
        result: what it returned.
        error: what it raised, KeyboardInterrupt included; or None.
        is_late: True where it took longer than allowed; it has neither result nor error then.
        was_busy: True where the function was not called, as a call of an earlier step still ran.
    """

    def __init__(self) -> None:
        self.is_done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self.is_late = False
        self.was_busy = False
        self._task: asyncio.Task[None] | None = None

    def run(self, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        """Call the function here and keep what comes of it."""
        try:
            self.result = function(**arguments)
        except BaseException as error:  # raised again in the thread that asked
            self.error = error
        finally:
            self.is_done.set()

    def start(self, loop: asyncio.AbstractEventLoop, awaitable: Awaitable[Any]) -> None:
        """The same for what an async function returned; called in the loop's thread."""
        self._task = loop.create_task(self._wait_for(awaitable))
        # Not at the end of the coroutine: one that is cancelled early never begins.
        self._task.add_done_callback(lambda _: self.is_done.set())

    def cancel(self) -> None:
        """End what `start` began; called in the loop's thread."""
        assert self._task is not None
        self._task.cancel()

    async def _wait_for(self, awaitable: Awaitable[Any]) -> None:
        try:
            self.result = await awaitable
        except BaseException as error:  # would end the loop's thread, and with it all the others
            self.error = error


class Caller:
    """Calls functions with one timeout for each.

    Functions that are not async run one after the other; with a timeout each in a daemon thread,
    which holds up nothing, not even the end of the process, if it hangs. Then all async ones run
    in one event loop, which has a thread of its own: a caller may run in a loop itself. The loop
    is the same in each step, so that what belongs to it, such as connections, can be kept. A
    function that is late is not called while its old call runs.

    Args:
        functions: async is one that is declared so, or returns an awaitable.
        timeout: seconds, or None.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]], timeout: float | None) -> None:
        self.functions = list(functions)
        self.timeout = timeout
        self._latest: dict[int, Call] = {}  # of each function
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, arguments: Sequence[dict[str, Any]]) -> list[Call]:
        """Call each function with its arguments; one Call for each, in their order."""
        calls: dict[int, Call] = {}
        # Async ones last: where another is interrupted, no coroutine is left that nobody awaits.
        for i in sorted(range(len(self.functions)), key=lambda i: is_async(self.functions[i])):
            calls[i] = self._call(i, arguments[i])
            _raise_interrupt(calls[i])
        awaitables = {
            i: call.result
            for i, call in calls.items()
            if not call.is_late and inspect.isawaitable(call.result)
        }
        if awaitables:
            for i in awaitables:
                calls[i] = self._latest[i] = Call()
            self._await([(calls[i], awaitable) for i, awaitable in awaitables.items()])
            for i in awaitables:
                _raise_interrupt(calls[i])
        return [calls[i] for i in range(len(self.functions))]

    def _call(self, index: int, arguments: dict[str, Any]) -> Call:
        call, latest = Call(), self._latest.get(index)
        if self.timeout is not None and latest is not None and not latest.is_done.is_set():
            call.is_late = call.was_busy = True
            return call
        self._latest[index] = call
        function = self.functions[index]
        if self.timeout is None or is_async(function):  # calling the latter only makes a coroutine
            call.run(function, arguments)
        else:
            target = threading.Thread(target=call.run, args=(function, arguments), daemon=True)
            target.start()
            call.is_late = not call.is_done.wait(self.timeout)
        return call

    def _await(self, started: list[tuple[Call, Awaitable[Any]]]) -> None:
        loop = self._running_loop()
        for call, awaitable in started:
            loop.call_soon_threadsafe(call.start, loop, awaitable)
        end = None if self.timeout is None else time.monotonic() + self.timeout
        try:
            for call, _ in started:
                call.is_late = not call.is_done.wait(_seconds_until(end))
        finally:  # also when the wait is interrupted
            for call, _ in started:
                if not call.is_done.is_set():
                    loop.call_soon_threadsafe(call.cancel)
            end = time.monotonic() + _CANCEL_SECONDS
            if not all(call.is_done.wait(_seconds_until(end)) for call, _ in started):
                self._loop = None

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_run, args=(self._loop,), daemon=True).start()
            weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
        return self._loop


def unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """What functools.partial was made of."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def is_async(function: Callable[..., Any]) -> bool:
    """Whether it is declared `async def`, it or its __call__."""
    function = unwrapped(function)
    declared = inspect.iscoroutinefunction(function)
    return declared or inspect.iscoroutinefunction(type(function).__call__)


def parameters_of(function: Callable[..., Any]) -> set[str] | None:
    """The names that it may be called with; None: any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some that are written in C do not say
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name for parameter in parameters if parameter.kind in kinds}


def required_by(function: Callable[..., Any]) -> list[str]:
    """The names of the keyword arguments that it cannot be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty]


def accepted(arguments: dict[str, Any], names: set[str] | None) -> dict[str, Any]:
    """Those of the arguments that have one of the names."""
    if names is None:
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in names}


def own_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """With lists and dicts of its own: what a function changes is another's too, or the dataset's.

    Tensors, arrays and other objects in columns are not copied, nor are lists and dicts of a class
    of their own: they would come back without it.
    """
    return {name: _copied(value) for name, value in arguments.items()}


def _copied(value: Any) -> Any:
    if type(value) is dict:
        return {key: _copied(each) for key, each in value.items()}
    if type(value) is not list:
        return value
    is_plain = bool(value) and isinstance(value[0], int)  # token ids: many, and nothing in them
    return value.copy() if is_plain else [_copied(each) for each in value]


def as_float(entry: Any) -> Any:
    """As given, but for a whole number: infinite where no float can be it, so masked, counted."""
    if not isinstance(entry, int):
        return entry
    try:
        return float(entry)
    except OverflowError:
        return math.inf if entry > 0 else -math.inf


def distinct_names(functions: Sequence[Callable[..., Any]]) -> list[str]:
    """What a function is called, or its class; numbered where several are called the same."""
    plain = [unwrapped(function) for function in functions]
    names = [getattr(f, "__name__", type(f).__name__).strip("<>") for f in plain]
    distinct: list[str] = []
    for name in names:
        number = 1
        new = name
        while new in distinct or (names.count(name) > 1 and new in names):
            new, number = f"{name}_{number}", number + 1
        distinct.append(new)
    return distinct


def _raise_interrupt(call: Call) -> None:
    """Raise what the function is not to blame for: KeyboardInterrupt, SystemExit."""
    is_failure = isinstance(call.error, Exception | asyncio.CancelledError)
    if not call.is_late and call.error is not None and not is_failure:
        raise call.error


def _seconds_until(end: float | None) -> float | None:
    return None if end is None else max(0.0, end - time.monotonic())


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()
