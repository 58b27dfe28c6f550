"""What a server does with requests that are out of all proportion: status, time in the handler, and memory.

    python benchmarks/extremes.py http://127.0.0.1:8000 --pid $(pgrep -f 'ropeway serve' | head -1)

Each case goes over a connection of its own. The time is the server's own (`openai-processing-ms`): from the request's
head to the answer's, so that a large body's way through the loopback is in it. While the cases run, a second thread
again and again asks /livez: its slowest answer is for how long a neighbour was kept waiting. Ends with 1 if a case was
not refused.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

HELLO = [{"role": "user", "content": "hello"}]
CHAT, TEXT, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


class Case(NamedTuple):
    name: str
    path: str
    body: bytes
    headers: bytes = b""


class Answer(NamedTuple):
    """`status` 0: the connection was closed without one. `error` is the error object's message or the body's start."""

    status: int
    milliseconds: float
    error: str


def cases() -> Iterator[Case]:
    """All of them are wrong: each has to be answered with a 4xx."""

    def chat(name: str, **fields: Any) -> Case:
        return Case(name, CHAT, encoded({"messages": HELLO, **fields}))

    def text(name: str, **fields: Any) -> Case:
        return Case(name, TEXT, encoded({"prompt": "hello", **fields}))

    def raw(name: str, body: bytes, path: str = CHAT) -> Case:
        return Case(name, path, body)

    def in_chat(name: str, more: bytes) -> Case:
        return raw(name, encoded({"messages": HELLO})[:-1] + b"," + more + b"}")

    many, million = list(range(100_000)), b"[" + b"1," * 999_999 + b"1]"
    deep_list, deep_object = b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    yield chat("n of a billion", n=10**9)
    yield chat("n of 31 digits", n=10**30)
    yield text("n times prompts", prompt=["a"] * 100, n=100)
    yield text("best_of of a billion", best_of=10**9)
    yield text("logprobs of a billion", logprobs=10**9)
    yield chat("top_logprobs of a billion", logprobs=True, top_logprobs=10**9)
    yield text("prompt_logprobs of a billion", prompt_logprobs=10**9)
    yield text("100,000 stop strings", stop=["stop"] * 100_000)
    yield text("a stop string of 1 MB", stop="x" * 1_000_000)
    yield text("100,000 stop tokens", stop_token_ids=many)
    yield text("100,000 biases", logit_bias={str(token): 1 for token in many})
    yield in_chat("a bias of 1e999", b'"logit_bias":{"1":1e999}')
    yield chat("a bias of a name", logit_bias={"a": 1})
    yield text("100,000 allowed tokens", allowed_token_ids=many)
    yield text("100,000 bad words", bad_words=["word"] * 100_000)
    yield chat("max_tokens of 10^300", max_tokens=10**300)
    yield in_chat("a number of a million digits", b'"max_tokens":' + b"9" * 1_000_000)
    yield in_chat("a fraction of a million digits", b'"temperature":0.' + b"9" * 1_000_000 + b"e400")
    yield in_chat("temperature 1e400", b'"temperature":1e400')
    yield in_chat("NaN", b'"temperature":NaN')
    yield raw("100,000 lists deep", b'{"messages":' + deep_list + b"}")
    yield raw("100,000 objects deep", b'{"messages":' + deep_object + b"}")
    yield in_chat("deep metadata", b'"metadata":' + deep_object)
    yield in_chat(
        "deep tool", b'"tools":[{"type":"function","function":{"name":"f","parameters":' + deep_object + b"}}]"
    )
    yield in_chat("deep schema", b'"response_format":{"type":"json_schema","json_schema":' + deep_object + b"}")
    yield in_chat("unbalanced brackets", b'"metadata":' + b"[" * 1_000_000)
    yield text("a prompt of 20 MB", prompt="a" * 20_000_000)
    yield text("a prompt of 15 MB", prompt="a" * 15_000_000)
    yield chat("a message of 15 MB", messages=[{"role": "user", "content": "a b " * 3_750_000}])
    yield text("a prompt of 15 MB of emoji", prompt="\U0001f6a1" * 3_750_000)
    yield raw("a million tokens", b'{"prompt":' + million + b"}", TEXT)
    yield text("350,000 tokens", prompt=[1] * 350_000)
    yield text("300,000 prompts", prompt=["a"] * 300_000)
    yield raw("a million prompts", b'{"prompt":[' + b'"a",' * 999_999 + b'"a"]}', TEXT)
    yield chat("100,000 messages", messages=HELLO * 100_000)
    yield chat("100,000 parts", messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 100_000}])
    yield chat("10,000 tools", tools=[{"type": "function", "function": {"name": f"f{i}"}} for i in range(10_000)])
    yield chat("100,000 unknown fields and no message", messages=[], **{f"x{number}": 1 for number in many})
    yield chat("a role of 1 MB", messages=[{"role": "r" * 1_000_000, "content": "a"}])
    yield chat("a model's name of 1 MB", model="m" * 1_000_000)
    yield chat("a label of 1 MB", cache_salt="s" * 1_000_000)
    yield raw("not UTF-8", b'{"messages":[{"role":"user","content":"\xff\xfe"}]}')
    yield raw("half a surrogate pair", b'{"prompt":"\\ud83d","n":0}', TEXT)
    yield raw("not UTF-8 in a name", b'{"\xff":1,"messages":[]}')
    yield raw("a field twice, the last wrong", b'{"n":1,"prompt":"a","n":1000000000}', TEXT)
    yield raw("300,000 times the same field", b"{" + b'"n":1,' * 300_000 + b'"prompt":"a","n":0}', TEXT)
    yield raw("nothing", b"")
    yield raw("a megabyte of blanks", b" " * 1_000_000)
    yield raw("zero bytes", b"\0" * 1_000_000)
    yield raw("a list", b"[]")
    yield Case("10,000 headers", CHAT, b"{}", b"x: 1\r\n" * 10_000)
    yield Case("a header of 1 MB", CHAT, b"{}", b"x: " + b"a" * 1_000_000 + b"\r\n")
    yield Case("a path of 1 MB", "/" + "a" * 1_000_000, b"{}")
    # Structured output: what is hard to judge has to be refused all the same.
    yield chat("a choice of 100,000", structured_outputs={"choice": [f"choice {number}" for number in many]})
    yield chat("a regex of 1 MB", structured_outputs={"regex": "(a|b)" * 200_000})
    yield chat("a grammar of 1 MB", structured_outputs={"grammar": 'start: "a"\n' * 90_000})
    yield schema("an enum of 100,000", {"enum": many})
    yield schema(
        "10,000 properties", {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(10_000)}}
    )
    yield schema("a reference to itself", {"$ref": "#"})
    yield schema("a reference elsewhere", {"$ref": "http://127.0.0.1:1/schema.json"})
    # Vectors, and the dialects of others.
    yield Case("300,000 inputs", VECTORS, encoded({"input": ["a"] * 300_000}))
    yield Case("an input of 15 MB", VECTORS, encoded({"input": "a" * 15_000_000}))
    yield Case("a billion dimensions", VECTORS, encoded({"input": "a", "dimensions": 10**9}))
    yield Case("100,000 documents", "/v1/rerank", encoded({"query": "a", "documents": ["a"] * 100_000}))
    yield Case("100,000 items", "/v1/responses", encoded({"input": HELLO * 100_000}))
    yield Case("an answer of a billion", "/v1/messages", encoded({"messages": HELLO, "max_tokens": 10**9}))
    yield Case("100,000 turns", "/v1/messages", encoded({"messages": HELLO * 100_000, "max_tokens": 1}))
    yield Case("tokens out of range", "/detokenize", encoded({"tokens": [2**31 - 1] * 1000}))
    yield Case("a tokenized 20 MB", "/tokenize", encoded({"prompt": "a" * 20_000_000}))


def schema(name: str, described: dict[str, Any]) -> Case:
    strict = {"name": "s", "strict": True, "schema": described}
    asked = {"type": "json_schema", "json_schema": strict}
    return Case(name, CHAT, encoded({"messages": HELLO, "response_format": asked}))


def encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode()


def ask(url: str, case: Case, seconds: float = 60.0) -> Answer:
    """Send one case and read its answer; a server may answer and close before it has read all of it."""
    where = urlsplit(url)
    head = (
        f"POST {case.path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
        f"content-length: {len(case.body)}\r\n"
    )
    with socket.create_connection((where.hostname, where.port), timeout=seconds) as raw:
        sender = threading.Thread(target=_send, args=(raw, head.encode() + case.headers + b"\r\n" + case.body))
        sender.start()
        found = b""
        try:
            while part := raw.recv(1 << 20):
                found += part
        except ConnectionResetError:
            pass
        sender.join()
    top, _, body = found.partition(b"\r\n\r\n")
    lines = top.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    try:
        error = str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        error = body[:200].decode("latin-1")
    status = int(lines[0].split()[1]) if found else 0
    return Answer(status, float(headers.get("openai-processing-ms", "nan")), error)


def _send(raw: socket.socket, data: bytes) -> None:
    with suppress(OSError):  # the answer may come before all of it was read
        raw.sendall(data)


@contextmanager
def neighbour(url: str) -> Iterator[list[float]]:
    """Asks /livez all the time. Yields the seconds of its answers, one for each, as they come."""
    where, taken, over = urlsplit(url), [], threading.Event()

    def run() -> None:
        with socket.create_connection((where.hostname, where.port), timeout=60) as raw:
            while not over.wait(0.002):
                begun = time.perf_counter()
                raw.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
                raw.recv(65536)
                taken.append(time.perf_counter() - begun)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield taken
    finally:
        over.set()
        thread.join()


def used(pid: int) -> tuple[float, float]:
    """Resident MB, and milliseconds of CPU so far, of a process and all below it."""
    import psutil

    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    resident = sum(process.memory_info().rss for process in family) / 1e6
    return resident, sum(sum(process.cpu_times()[:2]) for process in family) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, help="The server's process, to see its memory.")
    options = parser.parse_args()
    before = used(options.pid)[0] if options.pid else 0.0
    wrong = 0
    print(f"{'case':42} status       ms  stall ms  {'CPU ms RSS MB ' if options.pid else ''}message")
    for case in cases():
        begun = used(options.pid)[1] if options.pid else 0.0
        with neighbour(options.url) as taken:
            time.sleep(0.02)
            answer = ask(options.url, case)
        cost = ""
        if options.pid:
            resident, spent = used(options.pid)
            cost = f"{spent - begun:6.0f} {resident - before:+6.1f} "
        stall = max(taken) * 1000
        wrong += not 400 <= answer.status < 500
        print(f"{case.name:42} {answer.status:6} {answer.milliseconds:8.0f} {stall:9.1f}  {cost}{answer.error[:90]!r}")
    sys.exit(f"{wrong} were not answered with a 4xx." if wrong else 0)


if __name__ == "__main__":
    main()
