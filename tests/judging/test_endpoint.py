"""What an endpoint may do: refuse, be slow, send what is no answer, send on, go away."""

import gzip
import json
import socket
import time
from types import SimpleNamespace

import pytest
from judge_stand_in import KEY, MODEL, SIXTEEN, body, completion, once_each, refusal, say

from judging import endpoint


def test_a_server_that_begins_to_refuse(serve, sandbox):
    sandbox.rows(SIXTEEN)
    server = serve()

    def answer(request):
        with server.lock:
            num_judged = sum(server.judged.values())
        return refusal(503, "overloaded") if num_judged >= 14 else completion(say(request["messages"][0]["content"]))

    server.answer = answer
    sandbox.fails("answered 503 to", server.url, "--max_retries", "0")
    # Those under way when the first one failed are there as well.
    assert len(sandbox.verdicts()) == sum(server.judged.values()) >= 14
    server.answer = lambda request: completion(say(request["messages"][0]["content"]))
    report, _ = sandbox.run(server.url)
    assert once_each(server) and report["wins"] == 7 and report["num_left_out"] == 0


def test_temporary_refusals_are_tried_again(serve, sandbox):
    sandbox.rows([("c 8", "b 6")])
    good = completion("评分：A=8 B=6")
    server = serve(faults=[refusal(429, Retry_After=1), good, refusal(500), None])
    report, _ = sandbox.run(server.url, "--concurrency", "1")
    assert report["num_unparsed"] == 0 and len(server.requests) == 5 and sum(server.judged.values()) == 2
    waits = [later - earlier for earlier, later in zip(server.times, server.times[1:])]
    assert waits[0] >= 1 and waits[2] > 0.3 and waits[3] > 0.6  # as asked for; half a second, then twice as long


def test_time_out(serve, sandbox):
    sandbox.rows([("c 8", "b 6")])

    def late(request):
        time.sleep(1.5)
        return None

    server = serve(faults=[late])
    more = ("--concurrency", "1", "--timeout", "1")
    sandbox.fails("no answer within 1 s): is it up?", server.url, *more, "--max_retries", "0")
    server.faults = [late]
    report, _ = sandbox.run(server.url, *more)
    assert report["wins"] == 1


@pytest.mark.parametrize(
    "result, says",
    [
        (refusal(401, f"Incorrect key: {KEY}"), "--api_key_env: OPENAI_API_KEY: http"),
        (refusal(401, f"Incorrect key: {KEY}"), "answered 401 to {place} (Incorrect key: ***): export a key"),
        (refusal(403), "answered 403"),
        (refusal(404, "no such model"), "(no such model): check the address and --model stand-in"),
        (refusal(400, "too\nlong"), "answered 400 to {place} (too long): change what it does not take"),
        (refusal(429, "quota", Retry_After=9999), "answered 429 to {place} (quota): when that is fixed, run the same"),
        ((200, {"Content_Type": "text/html"}, b"<html>\nHi"), "is no chat completion (<html> Hi): the address usually"),
        ((200, {}, b'{"choices": ['), "is no chat completion"),
        ((200, {}, {"error": {"message": "x"}}), "is no chat completion"),
        ((200, {}, {"choices": [{"message": {"content": 5}}]}), "is no chat completion"),
    ],
)
def test_permanent_refusals_end_the_run(serve, sandbox, result, says):
    sandbox.rows(SIXTEEN)
    server = serve(lambda request: result)
    sandbox.fails(says.format(place=f"{sandbox.folder / 'candidate.jsonl'}:1"), server.url, "--concurrency", "1")
    assert len(server.requests) == 1 and sandbox.verdicts() == []


def test_a_model_with_one_temperature(serve, sandbox):
    """Some refuse any temperature but their own: they are asked without one from then on."""
    sandbox.rows(SIXTEEN)

    def answer(request):
        if "temperature" in request:
            return refusal(400, "Unsupported value: 'temperature' does not support 0 with this model.")
        return completion(say(request["messages"][0]["content"]))

    server = serve(answer)
    report, _ = sandbox.run(server.url)
    assert report["wins"] == 7 and once_each(server)
    assert 33 <= len(server.requests) <= 36  # those that were under way when the first was refused


def test_a_server_that_is_gone_is_one_line(serve, sandbox):
    sandbox.rows(SIXTEEN)
    server = serve(faults=[None])
    sandbox.fails("cannot be reached (", server.url, "--max_retries", "0")
    server.shutdown()
    server.server_close()
    sandbox.fails("is it up? run the same command again", server.url, "--max_retries", "0")


# An endpoint that means no good, or is broken: what it may cost is bounded, and what cannot be used is one line.


def ask(server, timeout=1.0, max_retries=0, times=1):
    """[(reply, usage), ...], asked as judge.py asks."""
    args = SimpleNamespace(base_url=server.url, api_key_env="OPENAI_API_KEY", model=MODEL, timeout=timeout)
    args.max_retries = max_retries
    model = endpoint.Endpoint(args)
    return [model.ask([{"role": "user", "content": "?"}], "rows.jsonl:1") for _ in range(times)]


def raw(*parts, drip=b"", pause=0.05, seconds=5):
    """A function that writes these bytes as they are, then `drip` again and again."""

    def write(file):
        for part in parts:
            file.write(part)
        end = time.monotonic() + seconds
        while drip and time.monotonic() < end:
            file.write(drip)
            time.sleep(pause)

    return lambda request: write


def message(content):
    return body({"choices": [{"message": {"content": content}}]})


START = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = START + b"Transfer-Encoding: chunked\r\n\r\n"
NONE, LATE, LARGE = (
    "is no chat completion (",
    "no answer within 0.4 s)",
    "the answer to rows.jsonl:1 is larger than 8 MB",
)
HOSTILE = {
    "nested": (body(b"[" * 200_000), NONE),
    "nested objects": (body(b'{"choices":' * 100_000), NONE),
    "a long number": (body(b"1" * 100_000), NONE),
    "not a number": (body(b"NaN"), NONE),
    "null": (body(None), NONE),
    "a list": (body([1]), NONE),
    "bytes": (body(b"\xff\x00\x1b[2J"), NONE),
    "nothing": (body(b""), "is no chat completion (without a word)"),
    "no choices": (body({}), NONE),
    **{f"choices {value}": (body({"choices": value}), NONE) for value in ([], {}, None, "x", 7, [None], [[]], [{}])},
    **{f"message {value}": (body({"choices": [{"message": value}]}), NONE) for value in (None, [], "x", {})},
    **{f"content {value}": (message(value), NONE) for value in ([{"type": "text", "text": "x"}], {}, 0, False, 1e3)},
    "ten megabytes": (message("x" * (10 << 20)), LARGE),
    "a bomb": (body(gzip.compress(bytes(20 << 20)), Content_Encoding="gzip"), "is compressed (gzip), which was not a"),
    "an unknown coding": (body({}, Content_Encoding="\x1b[2Jx"), "is compressed ("),
    "without end": (raw(START, b"\r\n", drip=bytes(1 << 20), pause=0), LARGE),
    "chunks without end": (raw(CHUNKED, drip=b"100000\r\n" + b" " * (1 << 20) + b"\r\n", pause=0), LARGE),
    "dripping body": (raw(START, b"\r\n", drip=b" "), LATE),
    "dripping chunks": (raw(CHUNKED, drip=b"1\r\n \r\n"), LATE),
    "dripping headers": (raw(START, drip=b"a"), LATE),
    "dripping status": (raw(b"HTTP/1.1 2", drip=b"0"), LATE),
    "wait, wait": (raw(drip=b"HTTP/1.1 100 Continue\r\n\r\n"), LATE),
    "an end at once": (raw(CHUNKED, b"5\r\n{"), "cannot be reached ("),
    "headers without end": (raw(START, drip=b"a: b\r\n" * 10_000, pause=0), "cannot be reached ("),
    "another protocol": (raw(b"\x1b[2J\x00 220 mail\r\n\r\n"), "cannot be reached ("),
    "an error nested": ((500, {}, b"[" * 200_000), "answered 500 to rows.jsonl:1 ([["),
    "an error without words": ((500, {}, {"error": {"message": {"a": 1e999}}}), "answered 500 to rows.jsonl:1 ("),
    "an error without end": (
        raw(START.replace(b"200 OK", b"503 No"), b"\r\n", drip=b"x" * (1 << 20), pause=0),
        "answered 503 to rows.jsonl:1 (xxx",
    ),
    "an error's bomb": ((400, {"Content-Encoding": "gzip"}, gzip.compress(bytes(20 << 20))), "answered 400 to"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_answer_that_cannot_be_used_is_one_line(serve, name):
    """Of the kind: the server decides how long it takes, how much it sends, and what stands in each field."""
    answer, says = HOSTILE[name]
    server, started = serve(lambda request: answer(request) if callable(answer) else answer), time.monotonic()
    with pytest.raises(ValueError) as found:
        ask(server, timeout=0.4)
    line = str(found.value)
    assert line.startswith(f"--base_url: {server.url}/: ") and says in line and "\n" not in line, line
    assert time.monotonic() - started < 3 and len(server.requests) == 1 and len(line) < 600


@pytest.mark.parametrize("is_error", [False, True])
def test_bytes_that_are_kept_of_an_answer(is_error):
    """What is taken from an endless answer, counted: the limit, and one part more at most."""
    taken, part = [], bytes(1 << 16)

    def parts():
        while True:
            taken.append(len(part))
            yield part

    response = SimpleNamespace(status_code=500 if is_error else 200, headers={}, iter_raw=parts)
    if is_error:
        assert len(endpoint.read_content(response)) == sum(taken) == endpoint.MOST_ERROR_BYTES
        return
    with pytest.raises(endpoint.UnusableAnswerError, match="larger than 8 MB"):
        endpoint.read_content(response)
    assert sum(taken) == endpoint.MOST_BYTES + len(part)


def test_time_is_that_of_each_try(serve):
    """A time-out is tried again, a deadline that passed too; and an answer that comes in parts is waited for."""
    good = json.dumps(completion("ok")[2]).encode()
    slow = raw(START, b"\r\n" + good[:9], drip=good[9:], pause=0.3, seconds=0.1)
    server = serve(faults=[raw(START, drip=b"a"), slow])
    assert ask(server, timeout=0.8, max_retries=1) == [("ok", {"prompt_tokens": 100, "completion_tokens": 20})]
    assert len(server.requests) == 2


def test_a_connection_that_comes_too_late_ends_at_once():
    """The time may be up while the connection is still being made."""
    mine, other = socket.socketpair()
    deadline = endpoint.Deadline(60)
    deadline.end()
    with mine, other, deadline:
        stream = SimpleNamespace(get_extra_info={"socket": mine}.get)
        deadline.trace("connection.connect_tcp.complete", {"return_value": stream})
        other.settimeout(5)
        assert other.recv(1) == b""


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(serve, sandbox, status):
    """It would send the rows to whomever the server names."""
    sandbox.rows([("c 8", "b 6")])
    other = serve()
    server = serve(lambda request: (status, {"Location": f"{other.url}/chat/completions"}, {}))
    says = f"a redirect to 127.0.0.1, to which nothing is sent: if you trust it, give --base_url {other.url}"
    sandbox.fails(says, server.url)
    assert other.requests == [] and sandbox.verdicts() == []


@pytest.mark.parametrize(
    "location, says",
    [
        ("https://me:pw@evil.example/v1/chat/completions?a=b#c", "give --base_url https://evil.example/v1"),
        ("//evil.example/v2/", "a redirect to evil.example, to which nothing is sent"),
        ("/v2/chat/completions", "/v2"),
        ("", "check the address"),
        ("javascript:alert(1)", "check the address"),
        ("http://[::1", "check the address"),
        ("http://a:99999999/", "a redirect to a"),
        ("http://" + "a" * 60_000, "a redirect to aaa"),
        ("http://\x1b[2J\x00/", ""),
    ],
)
def test_where_a_redirect_leads(serve, location, says):
    server = serve(lambda request: raw(f"HTTP/1.1 307 No\r\nLocation: {location}\r\n\r\n".encode())(request))
    with pytest.raises(ValueError) as found:
        ask(server)
    assert says in str(found.value) and "pw" not in str(found.value) and len(str(found.value)) < 900
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "value", ["1e999", "-1", "1.5", "NaN", "-Infinity", "true", '"7"', "null", "[]", "{}", "1" + "0" * 40]
)
def test_counts_that_are_no_counts(serve, value):
    """Each is a 0, beside one that is right; so is what stands in place of both."""
    usage = '{"prompt_tokens": %s, "completion_tokens": 20}' % value
    text = '{"choices": [{"message": {"content": "x"}}], "usage": %s}'
    server = serve(faults=[body((text % usage).encode())], answer=body((text % value).encode()))
    assert ask(server, times=2) == [("x", {"prompt_tokens": 0, "completion_tokens": number}) for number in (20, 0)]


def test_how_an_answer_is_decoded_is_not_the_server_s_choice(serve):
    """A charset may be a decompressor, too; and no other coding is asked for."""
    status, _, answer = completion("好")
    content = json.dumps(answer, ensure_ascii=False).encode()
    server = serve((status, {"Content-Type": "application/json; charset=zlib_codec", "Set-Cookie": "a=b"}, content))
    assert [reply for reply, _ in ask(server, times=2)] == ["好", "好"]
    assert all(h["Accept-Encoding"] == "identity" and "Cookie" not in h for h in server.headers)


def test_waits_that_a_server_asks_for_are_bounded(serve, sandbox):
    """One that makes no sense is not kept to; where it is too long, that is the end."""
    waits = ["-5", "nan", "-inf", "Fri, 01 Jan 1999 00:00:00 GMT", "Fri, 99 Jan 99999 00:00:00 GMT", "x", ""]
    sandbox.rows([("c 8", "b 6")] * 4, questions=range(4))
    server = serve(faults=[refusal(429, Retry_After=wait) for wait in waits])
    started = time.monotonic()
    report, _ = sandbox.run(server.url, "--concurrency", "8", "--max_retries", "2")
    assert report["num_rows"] == 4 and len(server.requests) == 8 + len(waits) and time.monotonic() - started < 5
    for wait in ("1e9", "1e999", "Fri, 01 Jan 2999 00:00:00 GMT"):
        server.faults = [refusal(429, Retry_After=wait)]
        with pytest.raises(ValueError, match="answered 429 to rows.jsonl:1"):
            ask(server, max_retries=3)


def test_a_key_in_a_reply_is_not_stored(serve, sandbox):
    sandbox.rows([("c 8", "b 6")])
    sandbox.run(serve(lambda request: completion(f"{KEY} \ud800\n评分：A=5 B=5")).url)
    assert [verdict["reasons"] for verdict in sandbox.verdicts()] == ["*** \ud800"] * 2
    assert KEY not in sandbox.output.read_text(encoding="utf-8")


def test_where_the_endpoint_is_and_its_key(serve, sandbox, monkeypatch):
    sandbox.rows([("c 8", "b 6")])
    server = serve()
    monkeypatch.delenv("OPENAI_API_KEY")
    sandbox.fails("--api_key_env: OPENAI_API_KEY: is not set in the environment")
    sandbox.fails("--api_key_env: OTHER: is not set", server.url, "--api_key_env", "OTHER")
    monkeypatch.setenv("OTHER", "schlüssel")
    sandbox.fails("--api_key_env: OTHER: holds characters that no key has", server.url, "--api_key_env", "OTHER")
    monkeypatch.setenv("OTHER", "other-key\n")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    sandbox.run(None, "--api_key_env", "OTHER")
    sandbox.output.unlink()
    sandbox.run(server.url)  # a server of one's own wants none
    assert server.keys == {"Bearer other-key", "Bearer EMPTY"}
