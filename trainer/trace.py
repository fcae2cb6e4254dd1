"""A profiler's trace split by kind: every nanosecond of the profiled steps goes to exactly one.

- On a CPU it is the time of the main thread: an operator's own, without that of the operators it calls. What is left,
  in no operator, is Python's, and counts as idle.
- On a GPU it is the time of the device: a kernel has the kind of the operator that launched it. Where kernels overlap,
  the time counts once, as computation if one of them computes: communication is what nothing hides. What is left, the
  gaps, is idle.

An operator has the kind of the scope it runs in (`tokenmill.trainer.profile` opens them), a backward operator that of
the forward one that it differentiates. What activation checkpointing computes again has the kind that it had before.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SCOPE = "tokenmill.profile::"  # begins the name of a scope; its kind follows
WINDOW = "tokenmill.profile"  # the scope of the profiled steps


@dataclass(frozen=True)
class Gemm:
    """A matrix product (m, k) x (k, n), `batch` of them in a call; a grouped one counts as all its groups together."""

    kind: str
    m: int
    n: int
    k: int
    batch: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k


@dataclass(frozen=True)
class Account:
    times: Counter[str]  # ns by kind, idle included: all of the window
    gemm_times: Counter[Gemm]  # ns, parts of the times of their kinds
    gemm_calls: Counter[Gemm]
    peak_bytes: Counter[str]  # by kind, allocated in the window and alive when most is


@dataclass(eq=False)
class _Span:
    """What a host thread does from start to end, ns: an operator, a scope, a launch; or at an instant an allocation."""

    event: dict[str, Any]
    thread: Any
    start: int
    end: int
    kind: str = "other"
    gemm: Gemm | None = None  # the outermost product that it is part of
    begins_gemm: bool = False  # it is that product
    own: int = 0  # ns that no span inside it takes

    @property
    def name(self) -> str:
        return self.event["name"]


_HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver", "cpu_instant_event")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_MODE = "PythonDispatchMode"  # of selective checkpointing: it computes a product anew, further in, or has kept it
_HOST_WORK = ("data", "communication")  # whose time in no operator is theirs, in C++ or waiting for others
# Names that tell the kind, wherever they occur.
_NAMED = re.compile(
    f"{SCOPE}(?P<scope>[a-z]+)|(?P<swiglu>_SwiGLU|tokenmill::swiglu)|(?P<optimizer>Optimizer\\.|.*AccumulateGrad)"
    "|(?P<communication>FSDP::|fsdp::|c10d::|RegisterPostBackward)"
)
_FIRST_FACTOR = {  # operators that multiply two matrices, and the place of the first among their inputs
    "aten::mm": 0, "aten::bmm": 0, "aten::_grouped_mm": 0,
    "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1, "aten::baddbmm_": 1,
}  # fmt: skip


def account(trace: dict[str, Any], device: str) -> Account:
    """Split the window of a Chrome trace by kind; `device`, whose time is split, is "cpu" or "cuda".

    Raises ValueError where the trace has no window.
    """
    spans = _host_spans(trace["traceEvents"])
    window = next((span for span in spans if span.name == WINDOW), None)
    if window is None:
        raise ValueError(f"profile: the trace has no scope called {WINDOW}; write it again with `tokenmill profile`")
    spans = [span for span in spans if window.start <= span.start and span.end <= window.end]
    times: Counter[str] = Counter()
    gemm_times: Counter[Gemm] = Counter()
    used = _device_times(trace["traceEvents"], spans, window) if device == "cuda" else _cpu_times(spans, window)
    for span, ns in used:
        times[span.kind] += ns
        if span.gemm is not None:
            gemm_times[span.gemm] += ns
    times["idle"] = window.end - window.start - times.total()
    calls = Counter(span.gemm for span in spans if span.gemm is not None and span.begins_gemm)
    return Account(times, gemm_times, calls, _peak(spans, device))


def _host_spans(events: list[dict[str, Any]]) -> list[_Span]:
    """The spans of the host's threads, in order of time. A span's kind is the one that its name tells, else that of
    the forward operator whose backward it is, else that of the span around it."""

    def place(event: dict[str, Any]) -> tuple[Any, int]:
        return event["tid"], round(event["ts"] * 1000)  # from microseconds, with decimals

    forward = {e["id"]: place(e) for e in events if e.get("cat") == "fwdbwd" and e["ph"] == "s"}
    forward_of = {place(e): forward[e["id"]] for e in events if e.get("cat") == "fwdbwd" and e["ph"] == "f"}
    spans = []
    for event in events:
        if event.get("cat") in _HOST:
            thread, start = place(event)
            spans.append(_Span(event, thread, start, start + round(event.get("dur", 0) * 1000)))
    spans.sort(key=lambda span: (span.start, -span.end))

    operators: dict[tuple[Any, int], _Span] = {}
    around: dict[Any, list[_Span]] = defaultdict(list)
    for span in spans:
        stack = around[span.thread]
        while stack and stack[-1].end < span.end:
            # It has ended, or is about to: the operator in which a scope was opened. What both cover is the scope's.
            ended = stack.pop()
            if (both := ended.end - span.start) > 0:
                ended.own -= both
                if stack:
                    stack[-1].own += both
        parent = stack[-1] if stack else None
        span.own = span.end - span.start
        if parent is not None:
            parent.own -= span.own
            span.kind, span.gemm = parent.kind, parent.gemm
        key = span.thread, span.start
        differentiated = operators.get(forward_of[key]) if key in forward_of else None
        if named := _NAMED.match(span.name):
            span.kind = named["scope"] or str(named.lastgroup)
        elif differentiated is not None:
            span.kind = differentiated.kind
            if parent is not None and parent.name.startswith("autograd::engine"):
                parent.kind = span.kind  # the engine's call of this function
        if span.name == _MODE:
            for outer in [*stack, span]:
                outer.gemm, outer.begins_gemm = None, False
        elif span.gemm is None and span.name in _FIRST_FACTOR:
            span.gemm = _gemm(span)
            span.begins_gemm = True
        if span.event["cat"] == "cpu_op":
            operators[key] = span
        stack.append(span)
    return spans


def _gemm(span: _Span) -> Gemm:
    first = _FIRST_FACTOR[span.name]
    a, b = span.event["args"]["Input Dims"][first : first + 2]
    return Gemm(span.kind, a[-2], b[-1], a[-1], a[0] if len(a) == len(b) == 3 else 1)


def _cpu_times(spans: list[_Span], window: _Span) -> Iterator[tuple[_Span, int]]:
    """The main thread's operators with their own times; between them, Python."""
    for span in spans:
        is_operator = span.event["cat"] != "user_annotation"
        if span.thread == window.thread and (is_operator or span.kind in _HOST_WORK):
            yield span, span.own


def _device_times(events: list[dict[str, Any]], spans: list[_Span], window: _Span) -> Iterator[tuple[_Span, int]]:
    """The spans that launched what ran on the device, with the times in which it did: each moment once."""
    launches = {s.event["args"].get("correlation"): s for s in spans if s.event["cat"].startswith("cuda")}
    launchers: list[_Span] = []
    edges: list[tuple[int, bool, int]] = []
    for event in events:
        if event.get("cat") in _DEVICE:
            start = round(event["ts"] * 1000)
            end = min(start + round(event["dur"] * 1000), window.end)
            start = max(start, window.start)
            if start < end:
                edges += [(start, True, len(launchers)), (end, False, len(launchers))]
                launchers.append(launches.get(event["args"].get("correlation"), window))
    active: set[int] = set()
    last = 0
    for now, begins, index in sorted(edges):
        if active and now > last:
            yield launchers[min(active, key=lambda i: (launchers[i].kind == "communication", i))], now - last
        last = now
        if begins:
            active.add(index)
        else:
            active.remove(index)


def _peak(spans: list[_Span], device: str) -> Counter[str]:
    """Bytes alive by the kind that allocated them, at the moment when most are."""
    alive: dict[int, tuple[str, int]] = {}
    now: Counter[str] = Counter()
    total = most = 0
    peak: Counter[str] = Counter()
    for span in spans:
        args = span.event.get("args", {})
        if span.name != "[memory]" or (args["Device Type"] == 0) != (device == "cpu"):
            continue
        if args["Bytes"] > 0:
            kind, size = span.kind, args["Bytes"]
            alive[args["Addr"]] = kind, size
        else:
            kind, size = alive.pop(args["Addr"], ("other", 0))  # what was there before counts nowhere
            size = -size
        now[kind] += size
        total += size
        if total > most:
            most, peak = total, now.copy()
    return +peak  # without the kinds of which nothing is alive
