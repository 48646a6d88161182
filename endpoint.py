"""A language model behind an OpenAI-compatible endpoint: asked, and asked again where that helps."""

import json
import os

from arguments import API_KEY_ENV
from score import problem

USAGE = ("prompt_tokens", "completion_tokens")
ASKS = 3  # times that a row is asked for a reply that can be read
TIMEOUT, CONNECT_TIMEOUT = 600, 10  # seconds for a whole answer, for a connection
LEAST_SECRET = 8  # characters: a shorter key is a word such as EMPTY, for servers that want none
GO_ON = "run the same command again, which asks only for what is missing"


class Endpoint:
    """Asks the model of --model at --base_url; ValueError, one line, for what does not pass."""

    def __init__(self, args):
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
            timeout=openai.Timeout(TIMEOUT, connect=CONNECT_TIMEOUT),
        )
        self.url = str(self.client.base_url)
        self.settings = {"temperature": 0}

    def ask_until(self, prompt: str, again: str, read, place: str) -> tuple[str, object, dict]:
        """(reasons, what was found or None, usage): asked until `read(reply)` finds something, ASKS times at most.

        again: what is said of a reply in which nothing was found.
        """
        first, again = ({"role": "user", "content": text} for text in (prompt, again))
        messages, usage = [first], dict.fromkeys(USAGE, 0)
        for _ in range(ASKS):
            reply, used = self.ask(messages, place)
            usage = {name: usage[name] + used[name] for name in USAGE}
            reasons, found = read(reply)
            if found is not None:
                break
            messages = [first, {"role": "assistant", "content": reply}, again] if reply.strip() else [first]
        return reasons, found, usage

    def ask(self, messages: list[dict], place: str) -> tuple[str, dict]:
        """(text, usage) of the model's reply; ValueError if there is none."""
        create, settings = self.client.chat.completions.with_raw_response.create, self.settings
        try:
            content = create(model=self.args.model, messages=messages, **settings).text
        except self.openai.APIError as error:
            if getattr(error, "status_code", None) == 400 and settings and "temperature" in error.response.text:
                self.settings = {}  # some models, those that reason, have one temperature only
                return self.ask(messages, place)
            raise self.explain(error, place) from None
        try:
            body = json.loads(content)
            text, usage = body["choices"][0]["message"]["content"] or "", body.get("usage") or {}
            return self.hide(text), {name: int(usage.get(name) or 0) for name in USAGE}
        except (ValueError, TypeError, LookupError, AttributeError):
            rule = f"the answer to {place} is no chat completion ({self.cut(content)})"
            raise problem("--base_url", self.url, rule, "the address usually ends in /v1") from None

    def explain(self, error, place: str) -> ValueError:
        """The line for an error of the endpoint or of the way to it."""
        status = getattr(error, "status_code", None)
        if status is None:
            timed_out = isinstance(error, self.openai.APITimeoutError)
            cause = f"no answer within {TIMEOUT} s" if timed_out else self.cut(str(error.__cause__ or error))
            return problem("--base_url", self.url, f"cannot be reached ({cause})", f"is it up? {GO_ON}")
        said = error.body.get("message") if isinstance(error.body, dict) else None
        rule = f"answered {status} to {place} ({self.cut(str(said or error.response.text))})"
        if status in (401, 403):
            return problem("--api_key_env", self.args.api_key_env, f"{self.url} {rule}", "export a key that it takes")
        fix = {404: f"check the address and --model {self.args.model}", 400: "change what it does not take"}
        return problem("--base_url", self.url, rule, fix.get(status, f"when that is mended, {GO_ON}"))

    def hide(self, text: str) -> str:
        """A text of the endpoint without the key, should it be in it."""
        return text.replace(self.key, "***") if len(self.key) >= LEAST_SECRET else text

    def cut(self, text: str) -> str:
        """The first words of a text of the endpoint, on one line."""
        return " ".join(self.hide(text).split())[:200] or "without a word"


def read_key(args) -> str:
    """The endpoint's key, or "" for one that is named by --base_url and may want none."""
    key = os.environ.get(args.api_key_env, "").strip()
    if not key and (args.base_url is None or args.api_key_env != API_KEY_ENV):
        raise problem("--api_key_env", args.api_key_env, "is not set in the environment", "export it with the key")
    if not (key.isascii() and key.isprintable()):
        raise problem("--api_key_env", args.api_key_env, "holds characters that no key has", "export the key alone")
    return key
