"""A language model behind an OpenAI-compatible endpoint: asked, and asked again where that helps.

The endpoint is not trusted: an answer may take --timeout seconds and MOST_BYTES, it is not decompressed, no redirect is
followed, and of what it says only numbers and texts that make sense are taken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from evaluation.predictions import problem
from runtime.exits import UserError

if TYPE_CHECKING:
    import httpx2

API_KEY_ENV = "OPENAI_API_KEY"  # where the key of judge.py is looked for

USAGE = ("prompt_tokens", "completion_tokens")
ASKS = 3  # times that a row is asked for a reply that can be read
CONNECT_TIMEOUT = 10  # seconds
MOST_BYTES = 8 << 20  # of an answer
MOST_ERROR_BYTES = 1 << 16  # of an error's: what is behind is left where it is
MOST_REPLY = 100_000  # characters of a text that is read; a model's is some hundreds
MOST_TOKENS = 10**9  # of one answer
# Headers of an answer that are heeded: the client's, on new tries, and where a redirect leads.
HEEDED = ("retry-after", "retry-after-ms", "x-should-retry", "location")
PATH = "/chat/completions"  # behind the address
LEAST_SECRET = 8  # characters: a shorter key is a word such as EMPTY, for servers that want none
GO_ON = "run the same command again, which asks only for what is missing"
LATER = f"when that is fixed, {GO_ON}"


class UnusableAnswerError(Exception):
    """An answer that is not read to its end. The message says what it is."""


class Deadline:
    """Breaks off the connection of one request when its time is up, wherever the request is then.

    The client's own time-outs are for one read each: a byte now and then keeps them from passing.
    """

    def __init__(self, seconds: float) -> None:
        self.is_over = False
        self.sockets: list[socket.socket] = []
        self.timer = threading.Timer(seconds, self.end)
        self.timer.daemon = True

    def __enter__(self) -> Deadline:
        self.timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.timer.cancel()
        for connection in self.sockets:
            connection.close()

    def trace(self, name: str, info: dict) -> None:
        """Told by the client of each event of the request; keeps another handle of its connection."""
        if name.endswith("connect_tcp.complete"):
            self.sockets.append(info["return_value"].get_extra_info("socket").dup())
            if self.is_over:  # it took that long
                self.end()

    def end(self) -> None:
        """Time is up: what is being read or written ends, whoever waits for it."""
        self.is_over = True
        for connection in self.sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def bounded_client(timeout: float) -> httpx2.Client:
    """An HTTP client for untrusted servers; its `send` raises UnusableAnswerError.

    timeout: seconds for a whole answer.
    """
    import httpx2

    class Client(httpx2.Client):
        def send(self, request: httpx2.Request, **settings: Any) -> httpx2.Response:
            """The response to a request, read whole, with the headers that are heeded."""
            with Deadline(timeout) as deadline:
                request.extensions["trace"] = deadline.trace
                try:
                    response = super().send(request, **{**settings, "stream": True, "follow_redirects": False})
                    with contextlib.closing(response):
                        content = read_content(response)
                except (httpx2.TransportError, OSError) as error:  # TLS has errors of its own
                    if not deadline.is_over:
                        raise
                    raise httpx2.ReadTimeout("time is up", request=request) from error
                finally:
                    self.cookies.clear()
            if deadline.is_over:  # an end of the connection may look like the end of the answer
                raise httpx2.ReadTimeout("time is up", request=request)
            # It is JSON, and so UTF-8: the server does not choose how its bytes are decoded.
            headers = {name: response.headers[name] for name in HEEDED if name in response.headers}
            headers["content-type"] = "application/json; charset=utf-8"
            return httpx2.Response(response.status_code, headers=headers, content=content, request=request)

    return Client(
        headers={"Accept-Encoding": "identity"},
        # A connection for each request, or its deadline would not know it.
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
    )


def read_content(response: httpx2.Response) -> bytes:
    """The bytes of a streamed response as they come; of an error its first ones.

    UnusableAnswerError where that is no answer.
    """
    is_error = response.status_code >= 300
    coding = response.headers.get("content-encoding", "identity")
    if coding.strip().lower() not in ("", "identity"):
        if is_error:
            return b""
        raise UnusableAnswerError(f"is compressed ({coding[:20]}), which was not asked for")
    content = bytearray()
    for part in response.iter_raw():
        content += part
        if is_error and len(content) >= MOST_ERROR_BYTES:
            break
        if len(content) > MOST_BYTES:
            raise UnusableAnswerError(f"is larger than {MOST_BYTES >> 20} MB")
    return bytes(content)


class Endpoint:
    """Asks the model of --model at --base_url; UserError, one line, for what does not pass."""

    def __init__(self, args: argparse.Namespace) -> None:
        import openai

        self.args = args
        self.key = read_key(args)
        self.openai = openai
        self.client = openai.OpenAI(
            api_key=self.key or "EMPTY",  # the client wants one, a server of one's own seldom does
            base_url=args.base_url,
            # New tries after 408, 409, 429, 5xx, a time-out or no connection, with pauses that double and vary, or
            # that Retry-After asks for.
            max_retries=args.max_retries,
            timeout=openai.Timeout(args.timeout, connect=min(args.timeout, CONNECT_TIMEOUT)),
            http_client=bounded_client(args.timeout),
        )
        self.url = str(self.client.base_url)
        self.settings = {"temperature": 0}

    def ask_until(
        self, prompt: str, again: str, read: Callable[[str], tuple[str, dict | None]], place: str
    ) -> tuple[str, dict | None, dict]:
        """(reasons, what was found or None, usage): asked until `read(reply)` finds something, ASKS times at most.

        again: what is said of a reply in which nothing was found.
        """
        first, repeat = ({"role": "user", "content": text} for text in (prompt, again))
        messages, usage = [first], dict.fromkeys(USAGE, 0)
        for _ in range(ASKS):
            reply, used = self.ask(messages, place)
            usage = {name: usage[name] + used[name] for name in USAGE}
            # One that is too long is not searched, and not kept or sent back whole.
            reasons, found = read(reply) if len(reply) <= MOST_REPLY else (reply[:MOST_REPLY], None)
            if found is not None:
                break
            reply = sendable(reply[:MOST_REPLY])
            messages = [first, {"role": "assistant", "content": reply}, repeat] if reply.strip() else [first]
        return reasons, found, usage

    def ask(self, messages: list[dict], place: str) -> tuple[str, dict]:
        """(text, usage) of the model's reply; UserError if there is none."""
        create: Callable = self.client.chat.completions.with_raw_response.create
        settings = self.settings
        try:
            content = create(model=self.args.model, messages=messages, **settings).text
        except self.openai.APIError as error:
            response = getattr(error, "response", None)
            said = response.text if response is not None and response.status_code == 400 else ""
            if settings and "temperature" in said:
                self.settings = {}  # some models, those that reason, have one temperature only
                return self.ask(messages, place)
            raise self.explain(error, place) from None
        except UnusableAnswerError as error:
            raise problem("--base_url", self.url, f"the answer to {place} {error}", LATER) from None
        try:
            body = json.loads(content)
            text = body["choices"][0]["message"]["content"]
            return self.hide("" if text is None else text), read_usage(body.get("usage"))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):  # the last: brackets too deep
            rule = f"the answer to {place} is no chat completion ({self.cut(content)})"
            raise problem("--base_url", self.url, rule, "the address usually ends in /v1") from None

    def explain(self, error: Any, place: str) -> UserError:
        """The line for an error of the endpoint or of the way to it."""
        status = getattr(error, "status_code", None)
        if status is None:
            timed_out = isinstance(error, self.openai.APITimeoutError)
            within = f"no answer within {self.args.timeout} s"
            cause = within if timed_out else self.cut(str(error.__cause__ or error))
            return problem("--base_url", self.url, f"cannot be reached ({cause})", f"is it up? {GO_ON}")
        if status < 400:
            return self.explain_redirect(status, error.response.headers.get("location", ""), place)
        said = error.body.get("message") if isinstance(error.body, dict) else None
        said = said if said and isinstance(said, str) else error.response.text
        rule = f"answered {status} to {place} ({self.cut(said)})"
        if status in (401, 403):
            return problem("--api_key_env", self.args.api_key_env, f"{self.url} {rule}", "export a key that it takes")
        fix = {404: f"check the address and --model {self.args.model}", 400: "change what it does not take"}
        return problem("--base_url", self.url, rule, fix.get(status, LATER))

    def explain_redirect(self, status: int, location: str, place: str) -> UserError:
        """The line for an answer that sends the rows elsewhere. location: the header, "" without one."""
        try:
            parts = urlsplit(urljoin(f"{self.url.rstrip('/')}{PATH}", location))
            host = parts.hostname if parts.scheme in ("http", "https") else None
            address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.removesuffix(PATH)}"
        except ValueError:  # brackets or a port that are none
            host = None
        if not location or not host:
            return problem("--base_url", self.url, f"answered {status} to {place}", "check the address")
        rule = f"answered {status} to {place}, a redirect to {self.cut(host)}, to which nothing is sent"
        return problem("--base_url", self.url, rule, f"if you trust it, give --base_url {self.cut(address)}")

    def hide(self, text: str) -> str:
        """A text of the endpoint without the key, should it be in it."""
        return text.replace(self.key, "***") if len(self.key) >= LEAST_SECRET else text

    def cut(self, text: str) -> str:
        """The first words of a text of the endpoint, on one line."""
        return " ".join(self.hide(text).split())[:200] or "without a word"


def sendable(text: str) -> str:
    """A text without halves of surrogate pairs, which cannot be sent."""
    return text.encode("utf-8", "replace").decode()


def read_usage(usage: object) -> dict[str, int]:
    """{name: number} of an answer's "usage", 0 for what is no number of tokens."""
    counts = {name: usage.get(name) if isinstance(usage, dict) else None for name in USAGE}
    return {name: n if type(n) is int and 0 <= n <= MOST_TOKENS else 0 for name, n in counts.items()}


def read_key(args: argparse.Namespace) -> str:
    """The endpoint's key, or "" for one that is named by --base_url and may want none."""
    key = os.environ.get(args.api_key_env, "").strip()
    if not key and (args.base_url is None or args.api_key_env != API_KEY_ENV):
        raise problem("--api_key_env", args.api_key_env, "is not set in the environment", "export it with the key")
    if not (key.isascii() and key.isprintable()):
        raise problem("--api_key_env", args.api_key_env, "holds characters that no key has", "export the key alone")
    return key
