"""A client of OpenAI-compatible servers: chat completions, several at once, asked again where that can help.

What a server says is text to be stored, and nothing more: none of it is run, followed or, beyond a line of printable
characters, shown. The key comes from an environment variable and goes into the request's header alone.
"""

from __future__ import annotations

import json
import os
import queue
import random
import threading
import time
import urllib.request
from collections.abc import Collection
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from tokenmill.data.journal import Answer, Request

KEY_VARIABLE = "TOKENMILL_API_KEY"
AGAIN = {408, 409, 425, 429}  # and from 500 on: passing trouble
OWN = {400, 413, 422}  # the request's own: too long, or filtered
REFUSED = 10  # so many at first, and the settings are wrong rather than the requests
LONGEST_WAIT = 60.0  # seconds between attempts
LARGEST = 1 << 24  # bytes of an answer
SETTINGS = ("max_tokens", "temperature", "seed")  # fields of a body, beside the model and the messages


class EndpointError(OSError):
    """An endpoint that cannot be used, or does not answer."""


class _Passing(Exception):
    """Trouble that may be over at the next attempt."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait  # seconds that the server asks for


class Endpoint:
    """A model behind `{base_url}/chat/completions`; a Generator (data/journal.py)."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str | None = None,
        concurrency: int = 8,
        timeout: float = 600.0,
        attempts: int = 8,
        backoff: float = 1.0,
        omit: Collection[str] = (),
        max_tokens_field: str = "max_tokens",
    ) -> None:
        """`key_variable` names the environment variable that holds the key; None takes TOKENMILL_API_KEY, and no key
        where that is not set. A request may take `timeout` seconds, and is made `attempts` times, with waits that
        double from `backoff` seconds on, or as long as the server asks for. It is sent without the fields in `omit`
        (of SETTINGS), and with its most tokens under the name `max_tokens_field`, for servers that refuse ours.

        Raises EndpointError where the address, the key, a number or a field cannot be used.
        """
        if unknown := set(omit) - set(SETTINGS):
            raise EndpointError(f"omit: {', '.join(sorted(unknown))}: expected some of {', '.join(SETTINGS)}")
        if not max_tokens_field or max_tokens_field in ("model", "messages", *SETTINGS[1:]):
            raise EndpointError(f"max_tokens_field is {max_tokens_field!r}: expected one such as max_completion_tokens")
        for name, value in dict(concurrency=concurrency, timeout=timeout, attempts=attempts).items():
            if not 0 < value < 1e6:
                raise EndpointError(f"{name} is {value}: expected more than 0")
        self.width = concurrency
        self._url = _completions(base_url)
        self._model = model
        self._fields = {s: max_tokens_field if s == "max_tokens" else s for s in SETTINGS if s not in omit}
        self.identity = json.dumps([self._url, model, self._fields])
        self._key = _read_key(key_variable)
        self._timeout = timeout
        self._attempts = attempts
        self._backoff = backoff
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._reached = False  # whether the server ever was there
        self._answered = False
        self._refused = 0
        self._flying = 0
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._results: queue.SimpleQueue[tuple[Request, Answer | BaseException]] = queue.SimpleQueue()

    @property
    def free(self) -> bool:
        return self._flying < self.width and not self._error

    def submit(self, request: Request) -> None:
        # A thread a request, which ends with the process: an interrupt need not wait for an answer.
        self._flying += 1
        threading.Thread(target=self._work, args=(request,), daemon=True).start()

    def collect(self) -> list[tuple[Request, Answer]]:
        """Raises EndpointError, after all the answers under way were collected."""
        found: list[tuple[Request, Answer]] = []
        while self._flying and (not found or self._error or not self._results.empty()):
            request, result = self._results.get()
            self._flying -= 1
            if isinstance(result, Answer):
                found.append((request, result))
            else:
                self._error = self._error or result
                self._stop.set()
        if self._error and not found:
            raise self._error
        return found

    def _work(self, request: Request) -> None:
        try:
            self._results.put((request, self.ask(request)))
        except BaseException as error:
            self._results.put((request, error))

    def ask(self, request: Request) -> Answer:
        """One request's answer. Raises EndpointError where there is none after all attempts, or never can be."""
        body = {"model": self._model, "messages": list(map(dict, request.messages))}
        body |= {name: getattr(request, setting) for setting, name in self._fields.items()}
        content = json.dumps(body).encode()
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._post(content, request.name)
            except _Passing as passing:
                wait = min(self._backoff * 2 ** (attempt - 1), LONGEST_WAIT) * random.uniform(0.5, 1.0)
                wait = max(wait, min(passing.wait, LONGEST_WAIT))
                if attempt == self._attempts or self._stop.wait(wait):
                    raise EndpointError(
                        f"{self._url}: {request.name}: no answer in {attempt} attempts ({passing}); what was answered "
                        "is kept: the same command goes on from there"
                    ) from None

    def _post(self, content: bytes, name: str) -> Answer:
        headers = {"Content-Type": "application/json", "User-Agent": "tokenmill"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        posted = urllib.request.Request(self._url, content, headers)
        try:
            with self._opener.open(posted, timeout=self._timeout) as response:
                self._reached = True
                return self._read(response)
        except HTTPError as error:
            self._reached = True
            return self._refusal(error, name)
        except URLError as error:
            if not self._reached:
                raise EndpointError(
                    f"{self._url}: cannot be reached ({error.reason}): is the server running, and the address right?"
                ) from None
            raise _Passing(str(error.reason)) from None
        except (OSError, HTTPException) as error:
            raise _Passing(str(error) or type(error).__name__) from None

    def _read(self, response: HTTPResponse) -> Answer:
        end = time.monotonic() + self._timeout  # the socket's own limit is on each wait, not on all
        content = b""
        while part := response.read1(1 << 16):
            content += part
            if time.monotonic() > end:
                raise _Passing("timed out")
            if len(content) > LARGEST:
                raise _Passing(f"an answer of more than {LARGEST:,} bytes")
        try:
            choice = json.loads(content)["choices"][0]
            text, reason = choice["message"]["content"] or "", choice.get("finish_reason")
            # Half of a surrogate pair, which JSON can hold, is no text.
            text = text.encode("utf-8", "replace").decode()
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            raise _Passing(f"not a chat completion: {self._line(content)}") from None
        self._answered = True
        return Answer(text, whole=reason != "length")

    def _refusal(self, error: HTTPError, name: str) -> Answer:
        """The answer that a status stands for."""
        try:
            said = self._line(error.read(1 << 16))
        except (OSError, HTTPException):
            said = "''"
        reason = f"status {error.code}, {said}"
        if error.code in AGAIN or error.code >= 500:
            wait = error.headers.get("Retry-After", "")
            raise _Passing(reason, float(wait) if wait.isdecimal() else 0.0)
        if error.code in OWN:
            self._refused += 1
            if self._answered or self._refused < REFUSED:
                return Answer("", refused=reason)
            reason = f"the first {self._refused} requests were refused, {reason}"
        advice = {
            401: f"give the key in {KEY_VARIABLE}, or the variable that --key-variable names",
            403: "the key does not allow it",
            404: f"is the address right, and {self._model!r} a model of the server's?",
            **dict.fromkeys(OWN, "leave a field that the server does not know out (--omit, --max-tokens-field)"),
        }.get(error.code, "the server does not take these requests")
        if 300 <= error.code < 400:
            advice = f"give the address that it redirects to, {self._line(error.headers.get('Location', '').encode())}"
        raise EndpointError(f"{self._url}: {name}: {reason}: {advice}")

    def _line(self, content: bytes) -> str:
        """What a server said, fit to be shown."""
        text = content.decode("utf-8", "replace")
        if self._key:
            text = text.replace(self._key, "***")
        return repr(" ".join(text.split())[:200])


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: followed, it would take the key with it."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def _completions(base_url: str) -> str:
    if "@" in base_url:
        raise EndpointError(f"the endpoint's address holds a password: give the key in {KEY_VARIABLE}")
    try:
        parts = urlsplit(base_url)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        right = False
    if not right or not base_url.isascii() or not base_url.isprintable() or set(" ?#") & set(base_url):
        raise EndpointError(f"{base_url!r}: expected an endpoint's address such as http://localhost:8000/v1")
    return base_url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"


def _read_key(variable: str | None) -> str:
    key = os.environ.get(variable or KEY_VARIABLE, "").strip()
    if variable and not key:
        raise EndpointError(f"the environment variable {variable}, which should hold the key, is not set")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise EndpointError(f"the key in {variable or KEY_VARIABLE} holds characters that no key has: set it again")
    return key
