"""Requests to whatever writes text, an endpoint (data/endpoint.py) or a checkpoint, and a journal of their answers.

The journal is a file of JSON lines beside what is made of the answers. A request is known by the hash of all that goes
into its answer, so however often the work is killed and begun again, and where a later run wants more, no answer that
came is asked for again. What a run makes of the answers is a function of them alone, in the order of the requests: the
same whatever the number of requests at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tokenmill.data.chat import Message
from tokenmill.data.errors import DataError
from tokenmill.data.files import lock

AHEAD = 2  # times a generator's width: how far requests run ahead of an answer that is late


@dataclass(frozen=True)
class Request:
    """A conversation that ends with a user's message, to be answered."""

    name: str  # such as "task 12", for messages
    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float = 0.0  # 0: the likeliest
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise DataError(f"temperature is {self.temperature}: expected 0 (the likeliest answer) or more")


@dataclass(frozen=True)
class Answer:
    text: str
    whole: bool = True  # not ended by `max_tokens`
    refused: str = ""  # why there is none to this very request, as of a text too long


class Generator(Protocol):
    """What answers requests, several at once."""

    identity: str  # of whatever its answers come from: with the same one, a request has the same answer
    width: int  # how many requests are worked on at once

    @property
    def free(self) -> bool:
        """Whether it takes another request now."""
        ...

    def submit(self, request: Request) -> None:
        """Take a request."""
        ...

    def collect(self) -> list[tuple[Request, Answer]]:
        """Wait for one or more of the requests taken; those that are done."""
        ...


class Journal:
    """Answers kept in a file, for one process at a time."""

    def __init__(self, path: str | Path) -> None:
        """Read the answers that are there. Raises DataError where another process has the file, or it is damaged."""
        self.path = Path(path)
        self.asked = 0  # requests that a generator was given
        self.known = 0  # answers of earlier runs that were used
        self._answers: dict[str, Answer] = {}
        self._earlier: set[str] = set()
        self._flying: set[str] = set()
        self._file = self.path.open("a+b")
        try:
            if not lock(self._file.fileno()):
                raise DataError(f"{self.path}: is in use by another process")
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._file.fileno())
        if not self.path.stat().st_size:
            self.path.unlink()
        self._file.close()

    def answers(self, generator: Generator, requests: Iterable[Request]) -> Iterator[Answer]:
        """The answers to requests, in order. Requests are drawn no earlier than they can be worked on, and none while
        an answer can be given: a caller that has enough stops, and has asked for little more."""
        source = iter(requests)
        more = True
        waiting: deque[str] = deque()
        while more or waiting:
            if waiting and waiting[0] in self._answers:
                key = waiting.popleft()
                self.known += key in self._earlier
                yield self._answers[key]
            elif more and generator.free and len(waiting) < AHEAD * generator.width:
                request = next(source, None)
                if request is None:
                    more = False
                    continue
                waiting.append(key := _key(generator, request))
                if key not in self._answers and key not in self._flying:
                    generator.submit(request)
                    self.asked += 1
                    self._flying.add(key)
            else:
                for request, answer in generator.collect():
                    self._record(_key(generator, request), request, answer)

    def _record(self, key: str, request: Request, answer: Answer) -> None:
        """A refusal is not written: the next run asks again, as it may be of another mind."""
        self._flying.remove(key)
        self._answers[key] = answer
        if not answer.refused:
            entry = {"key": key, "request": request.name, "text": answer.text, "whole": answer.whole}
            line = json.dumps(entry).encode() + b"\n"
            try:
                while line:
                    line = line[os.write(self._file.fileno(), line) :]
            except OSError as error:  # the disk is full, say: what is cut short the next run leaves out
                raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _read(self) -> None:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):  # the process was killed as it wrote
                self._file.truncate(end)
                break
            end += len(line)
            try:
                entry: dict[str, Any] = json.loads(line)
                self._answers[entry["key"]] = Answer(entry["text"], entry["whole"])
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{self.path}:{number}: not an answer of a journal: remove the line, and it is asked for again"
                ) from None
        self._earlier = set(self._answers)


def _key(generator: Generator, request: Request) -> str:
    messages = list(map(dict, request.messages))
    values = [generator.identity, messages, request.max_tokens, request.temperature, request.seed]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
