"""The client and its journal against servers on this machine that fail, stall, lie or leave."""

from __future__ import annotations

import json
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tokenmill.data.endpoint import REFUSED, Endpoint, EndpointError
from tokenmill.data.errors import DataError
from tokenmill.data.journal import Answer, Journal, Request

Reply = Callable[["Handler", dict[str, Any], int], None]


class Handler(BaseHTTPRequestHandler):
    """Asks the server's `reply` what to do with a body and the number of times that it came."""

    server: Server  # type: ignore[assignment]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.seen[text] += 1
            time_seen = self.server.seen[text]
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            self.server.reply(self, body, time_seen)
        finally:
            with self.server.lock:
                self.server.now -= 1

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def say(self, text: Any, reason: str = "stop") -> None:
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
        self.send(200, json.dumps({"choices": [choice]}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.seen: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.now = self.most = 0  # requests at once

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client left


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], tuple[Server, str]]]:
    """A function from what a server does to it and its address."""
    servers = []

    def start(reply: Reply) -> tuple[Server, str]:
        server = Server(reply)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server, f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def echo(handler: Handler, body: dict[str, Any], _: int) -> None:
    assert handler.path == "/v1/chat/completions"
    handler.say(f"{body['model']} {body['messages'][-1]['content']} {body['seed']}")


def asked(i: int, **options: Any) -> Request:
    return Request(f"request {i}", ({"role": "user", "content": f"text {i}"},), 100, **options)


def test_what_is_sent_and_what_comes_back(serve, monkeypatch):
    got: list[Any] = []

    def reply(handler: Handler, body: dict[str, Any], _: int) -> None:
        got.append((body, handler.headers["Authorization"]))
        handler.say("Ω \ud800 yes", "length" if len(got) > 1 else "stop")

    monkeypatch.delenv("TOKENMILL_API_KEY", raising=False)
    _, url = serve(reply)
    endpoint = Endpoint(url + "/", "m")
    assert endpoint.ask(asked(3, temperature=0.5, seed=7)) == Answer("Ω ? yes", whole=True)
    assert endpoint.ask(asked(3)) == Answer("Ω ? yes", whole=False)
    body, key = got[0]
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "text 3"}],
        "max_tokens": 100,
        "temperature": 0.5,
        "seed": 7,
    }
    assert key is None
    monkeypatch.setenv("TOKENMILL_API_KEY", " secret\n")
    Endpoint(url, "m").ask(asked(0))
    monkeypatch.setenv("MINE", "other")
    Endpoint(url, "m", key_variable="MINE").ask(asked(0))
    assert [key for _, key in got[2:]] == ["Bearer secret", "Bearer other"]


def test_fields_are_left_out_and_named_as_a_server_wants_them(serve, tmp_path):
    got: list[dict[str, Any]] = []

    def reply(handler: Handler, body: dict[str, Any], _: int) -> None:
        got.append(body)
        handler.say("yes")

    _, url = serve(reply)
    one = {"model": "m", "messages": [{"role": "user", "content": "text 3"}]}
    renamed = Endpoint(url, "m", omit=["seed"], max_tokens_field="max_completion_tokens")
    with Journal(tmp_path / "journal") as journal:
        for endpoint, fields in (
            (renamed, {"max_completion_tokens", "temperature"}),
            (Endpoint(url, "m", omit=["max_tokens", "temperature"]), {"seed"}),
            (Endpoint(url, "m"), {"max_tokens", "temperature", "seed"}),
        ):
            list(journal.answers(endpoint, [asked(3)]))
            assert {key: got[-1].pop(key) for key in one} == one
            assert set(got[-1]) == fields
    assert len(got) == 3  # each is asked: it may answer otherwise
    with pytest.raises(EndpointError, match="omit: model, top_p: expected some of max_tokens, temperature, seed"):
        Endpoint(url, "m", omit=["top_p", "seed", "model"])
    for wrong in ("", "seed", "messages"):
        with pytest.raises(EndpointError, match=f"max_tokens_field is '{wrong}': expected one such as"):
            Endpoint(url, "m", max_tokens_field=wrong)


def trouble(kind: str) -> Reply:
    def reply(handler: Handler, body: dict[str, Any], time_seen: int) -> None:
        if time_seen > 2:
            return echo(handler, body, time_seen)
        if kind.isdecimal():
            return handler.send(int(kind), b"busy", Retry_After="0")
        if kind == "garbage":
            return handler.send(200, b"\xff<html>")
        if kind == "shape":
            return handler.send(200, b'{"choices": [{"message": null}]}')
        if kind == "short":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{")
        if kind == "slow":
            time.sleep(0.5)
        return handler.connection.close()  # "drop"

    return reply


KINDS = ["408", "429", "500", "503", "garbage", "shape", "short", "slow", "drop"]


@pytest.mark.parametrize("kind", KINDS)
def test_passing_trouble_is_waited_for(serve, kind):
    server, url = serve(trouble(kind))
    assert Endpoint(url, "m", timeout=0.2, backoff=0.01).ask(asked(5)).text == "m text 5 0"
    assert server.seen == {"text 5": 3}
    with pytest.raises(EndpointError, match="request 6: no answer in 2 attempts"):
        Endpoint(url, "m", timeout=0.2, backoff=0.01, attempts=2).ask(asked(6))


def test_a_trickle_is_not_waited_for(serve):
    """A whole answer, which takes longer than a request may, though no byte of it does."""
    choice = b'{"choices": [{"message": {"content": "yes"}}]}'

    def reply(handler: Handler, body: dict[str, Any], _: int) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(choice) + 40))
        for _ in range(40):
            time.sleep(0.01)
            handler.wfile.write(b" ")
        handler.wfile.write(choice)

    _, url = serve(reply)
    assert Endpoint(url, "m").ask(asked(0)).text == "yes"
    with pytest.raises(EndpointError, match="no answer in 1 attempts \\(timed out\\)"):
        Endpoint(url, "m", timeout=0.2, attempts=1).ask(asked(0))


def test_the_server_says_how_long_to_wait(serve):
    def reply(handler: Handler, body: dict[str, Any], time_seen: int) -> None:
        if time_seen == 1:
            return handler.send(429, b"", Retry_After="1")
        return echo(handler, body, time_seen)

    _, url = serve(reply)
    begin = time.monotonic()
    Endpoint(url, "m", backoff=0.01).ask(asked(0))
    assert time.monotonic() - begin >= 1


FINAL = {
    401: "give the key in TOKENMILL_API_KEY",
    403: "the key does not allow it",
    404: "'m' a model of the server's",
    302: "give the address that it redirects to, 'http://elsewhere/'",
    405: "does not take these requests",
}


@pytest.mark.parametrize("status", FINAL)
def test_what_no_waiting_helps_is_an_error_at_once(serve, monkeypatch, status):
    monkeypatch.setenv("TOKENMILL_API_KEY", "sk-secret")

    def reply(handler: Handler, body: dict[str, Any], _: int) -> None:
        handler.send(status, f"no \x1b[31m{handler.headers['Authorization']}".encode(), Location="http://elsewhere/")

    server, url = serve(reply)
    with pytest.raises(EndpointError) as error:
        Endpoint(url, "m").ask(asked(1))
    message = str(error.value)
    assert f"{url}/chat/completions: request 1: status {status}" in message
    assert FINAL[status] in message
    assert message.isprintable()
    assert "secret" not in message
    assert server.seen == {"text 1": 1}


def test_a_refused_request_stops_nothing_unless_all_are(serve):
    def reply(handler: Handler, body: dict[str, Any], time_seen: int) -> None:
        if body["messages"][-1]["content"] == "text 0":
            return echo(handler, body, time_seen)
        return handler.send(400, b"too long")

    _, url = serve(reply)
    endpoint = Endpoint(url, "m")
    assert endpoint.ask(asked(1)) == Answer("", refused="status 400, 'too long'")
    assert endpoint.ask(asked(0)).text
    for _ in range(REFUSED):
        assert endpoint.ask(asked(1)).refused
    other = Endpoint(url, "m")
    assert all(other.ask(asked(1)).refused for _ in range(REFUSED - 1))
    with pytest.raises(EndpointError, match=rf"the first {REFUSED} requests were refused, status 400.*\(--omit"):
        other.ask(asked(1))


WRONG = {
    "localhost:8000/v1": "expected an endpoint's address",
    "file:///etc/passwd": "expected an endpoint's address",
    "http://": "expected an endpoint's address",
    "http://a:b/v1": "expected an endpoint's address",
    "http://a/v1?key=b": "expected an endpoint's address",
    "http://a b/v1": "expected an endpoint's address",
    "http://me:secret@a:x/v1": "holds a password",
}


@pytest.mark.parametrize("url", WRONG)
def test_wrong_addresses(url):
    with pytest.raises(EndpointError, match=WRONG[url]) as error:
        Endpoint(url, "m")
    assert "secret" not in str(error.value)


def test_wrong_numbers():
    with pytest.raises(EndpointError, match="timeout is -1: expected more than 0"):
        Endpoint("http://a", "m", timeout=-1)
    with pytest.raises(DataError, match="temperature is nan: expected 0"):
        asked(0, temperature=float("nan"))


def test_wrong_keys_are_not_shown(monkeypatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(EndpointError, match="NO_SUCH, which should hold the key, is not set"):
        Endpoint("http://a", "m", key_variable="NO_SUCH")
    monkeypatch.setenv("TOKENMILL_API_KEY", "sec\nret")
    with pytest.raises(EndpointError, match="TOKENMILL_API_KEY holds characters") as error:
        Endpoint("http://a", "m")
    assert "ret" not in str(error.value).replace("characters", "")


def test_no_server(serve):
    server, url = serve(echo)
    endpoint = Endpoint(url, "m", attempts=2, backoff=0.01)
    endpoint.ask(asked(0))
    server.shutdown()
    server.server_close()
    with pytest.raises(EndpointError, match="no answer in 2 attempts"):  # it was there: it may come back
        endpoint.ask(asked(1))
    with pytest.raises(EndpointError, match="cannot be reached"):
        Endpoint(url, "m").ask(asked(1))


def test_answers_come_in_order_from_several_requests_at_once(serve, tmp_path):
    def reply(handler: Handler, body: dict[str, Any], time_seen: int) -> None:
        number = int(body["messages"][-1]["content"].split()[1])
        time.sleep(0.05 * (number % 3 == 0))
        if time_seen == 1 and number % 5 == 1:
            return handler.send(500, b"")
        return echo(handler, body, time_seen)

    server, url = serve(reply)
    with Journal(tmp_path / "journal") as journal:
        endpoint = Endpoint(url, "m", concurrency=4, backoff=0.01)
        answers = [answer.text for answer in journal.answers(endpoint, map(asked, range(40)))]
        assert answers == [f"m text {i} 0" for i in range(40)]
        assert 2 <= server.most <= 8  # of 4 at once: the server counts one until after its reply has gone
        assert (journal.asked, journal.known) == (40, 0)
    with Journal(tmp_path / "journal") as journal:  # nothing is asked again, but of another model or server
        again = Endpoint(url + "/", "m")
        assert [answer.text for answer in journal.answers(again, map(asked, range(40)))] == answers
        assert (journal.asked, journal.known) == (0, 40)
        _, elsewhere = serve(echo)
        for server, model in ((url, "other"), (elsewhere, "m")):
            assert next(journal.answers(Endpoint(server, model), [asked(0)])).text == f"{model} text 0 0"
        assert next(journal.answers(again, [asked(0)])).text == "m text 0 0"
        assert (journal.asked, journal.known) == (2, 41)


class Slow:
    """A generator of one's own: answers the last of those that it was given first."""

    identity, width = "slow", 3

    def __init__(self) -> None:
        self.pending: list[Request] = []
        self.given: list[str] = []

    @property
    def free(self) -> bool:
        return len(self.pending) < self.width

    def submit(self, request: Request) -> None:
        self.pending.append(request)
        self.given.append(request.name)

    def collect(self) -> list[tuple[Request, Answer]]:
        request = self.pending.pop()
        return [(request, Answer(request.name, refused="never" if request.name == "request 2" else ""))]


def test_requests_run_a_little_ahead_and_equal_ones_are_made_once(tmp_path):
    slow = Slow()
    drawn = []

    def requests() -> Iterator[Request]:
        for i in range(1000):
            drawn.append(i)
            yield asked(i // 2)

    with Journal(tmp_path / "journal") as journal:
        answers = journal.answers(slow, requests())
        assert next(answers).text == "request 0"
        assert len(drawn) <= 2 * Slow.width + 1
        assert slow.given == [f"request {i}" for i in range(len(slow.given))]
        with pytest.raises(DataError, match="in use by another process"):
            Journal(tmp_path / "journal")
    with Journal(tmp_path / "journal") as journal:
        again = Slow()
        answers = journal.answers(again, requests())
        assert next(answers).text == "request 0"
        assert not again.given  # what is known is given before anything is asked


def test_a_refusal_is_asked_for_again(tmp_path):
    for given in (["request 1", "request 2", "request 3"], ["request 2"]):
        slow = Slow()
        with Journal(tmp_path / "journal") as journal:
            answers = list(journal.answers(slow, map(asked, [1, 2, 3])))
        assert [answer.refused for answer in answers] == ["", "never", ""]
        assert slow.given == given


def test_a_journal_cut_short_or_damaged(tmp_path):
    path = tmp_path / "journal"
    with Journal(path) as journal:
        list(journal.answers(Slow(), map(asked, [3, 4, 5])))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(whole[:-9])
    slow = Slow()
    with Journal(path) as journal:
        assert len(list(journal.answers(slow, map(asked, [3, 4, 5])))) == 3
    assert len(slow.given) == 1
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)
    for damage in (b"{}\n", b"[1]\n", b"\xff\n"):
        path.write_bytes(lines[0] + damage + lines[1])
        with pytest.raises(DataError, match="journal:2: not an answer of a journal: remove the line"):
            Journal(path)
    empty = tmp_path / "empty"
    with Journal(empty):
        pass
    assert not empty.exists()


def test_a_full_disk(tmp_path):
    path = tmp_path / "journal"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (250, hard))
    try:
        with Journal(path) as journal, pytest.raises(OSError, match=f"File too large: '{path}'"):
            list(journal.answers(Slow(), map(asked, range(3, 9))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == 250
    with Journal(path) as journal:
        assert len(list(journal.answers(Slow(), map(asked, range(3, 9))))) == 6
        assert 0 < journal.known < 6


def test_what_was_answered_is_kept_when_one_fails(serve, tmp_path):
    def reply(handler: Handler, body: dict[str, Any], time_seen: int) -> None:
        if body["messages"][-1]["content"] == "text 2":
            return handler.send(401, b"")
        time.sleep(0.1)
        return echo(handler, body, time_seen)

    _, url = serve(reply)
    with (
        Journal(tmp_path / "journal") as journal,
        pytest.raises(EndpointError, match="request 2: status 401"),
    ):
        list(journal.answers(Endpoint(url, "m", concurrency=4), map(asked, range(9))))
    assert len((tmp_path / "journal").read_text().splitlines()) == 3  # those that were under way
