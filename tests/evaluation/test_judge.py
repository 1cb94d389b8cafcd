"""The judge against a real HTTP server that speaks /v1/chat/completions, well and badly."""

import gzip
import json
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from diffx.config import RunError, UserError
from diffx.config.eval import EndpointJudge
from diffx.config.launch import compose
from diffx.console import Reporter
from diffx.evaluation.hallucination import figures, judge
from diffx.evaluation.judge import Verdict, ask, judge_prompt, parse
from diffx.evaluation.run import evaluate

KEY = "sk-very-secret-0123456789"
YES, NO = '{"faithful": true}', '{"faithful": false}'


class Endpoint:
    """A server of a judge.

    ``reply(number, prompt)`` returns the text of a completion, (status, body), or a function that
    writes to the socket; it may wait.
    """

    def __init__(self):
        self.requests, self.keys, self.active, self.most = [], [], 0, 0
        self.reply = lambda number, prompt: YES
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    self.requests.append(body)
                    self.keys.append(handler.headers["Authorization"])
                    number = len(self.requests)
                    self.active += 1
                    self.most = max(self.most, self.active)
                if handler.path != "/v1/chat/completions":
                    said = (404, {"error": {"message": "no such path"}})
                else:
                    said = self.reply(number, body["messages"][0]["content"])
                with lock:
                    self.active -= 1
                if callable(said):
                    said(handler.wfile)
                    handler.close_connection = True
                    return
                status, answer = (200, completion(said)) if isinstance(said, str) else said
                handler.send_response(status)
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                handler.send_header(
                    "Content-Type", "text/html" if isinstance(answer, str) else "application/json"
                )
                handler.send_header("Content-Length", str(len(data)))
                handler.send_header("retry-after-ms", "1")
                handler.end_headers()
                handler.wfile.write(data)

            def log_message(handler, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def judge(self, **settings):
        return EndpointJudge(
            **(
                {"base_url": self.url, "model": "org/judge-1", "retries": 3, "concurrency": 4}
                | settings
            )
        )


def completion(said):
    message = {"role": "assistant", "content": said}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


@pytest.fixture
def cache(tmp_path):
    yield tmp_path / "verdicts.jsonl"
    assert not any(
        KEY in path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()
    )


def test_a_verdict_for_each_prompt(endpoint, cache):
    endpoint.reply = lambda number, prompt: (
        NO if "bad" in prompt else YES if "good" in prompt else "I cannot say."
    )
    assert ask(endpoint.judge(), ["good", "bad", "hm", "good"], cache) == [
        Verdict(True, YES),
        Verdict(False, NO),
        Verdict(None, "I cannot say."),
        Verdict(True, YES),
    ]
    assert sorted(request["messages"][0]["content"] for request in endpoint.requests) == [
        "bad",
        "good",
        "hm",
    ]
    assert all(
        request["model"] == "org/judge-1" and request["temperature"] == 0
        for request in endpoint.requests
    )
    assert set(endpoint.keys) == {f"Bearer {KEY}"}


def test_without_a_key_and_a_temperature(endpoint, cache, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert ask(endpoint.judge(temperature=None), ["a"], cache) == [Verdict(True, YES)]
    assert endpoint.keys == ["Bearer none"] and "temperature" not in endpoint.requests[0]


def test_what_may_pass_is_tried_again(endpoint, cache):
    failures = {
        1: (500, {"error": {"message": "oops"}}),
        2: (429, {"error": {"message": "slow down"}}),
        3: (503, "busy"),
    }
    endpoint.reply = lambda number, prompt: failures.get(number, NO)
    assert ask(endpoint.judge(concurrency=1), ["a"], cache) == [Verdict(False, NO)]
    assert len(endpoint.requests) == 4


def test_several_at_once_and_no_more(endpoint, cache):
    together = threading.Barrier(4)  # nobody is answered before four have asked
    endpoint.reply = lambda number, prompt: YES if together.wait(timeout=20) >= 0 else NO
    assert len(ask(endpoint.judge(), [f"prompt {n}" for n in range(8)], cache)) == 8
    assert endpoint.most == 4


def test_the_cache(endpoint, cache):
    prompts = [f"prompt {n}" for n in range(5)]
    first, told = ask(endpoint.judge(), prompts, cache), []
    assert ask(endpoint.judge(), prompts[::-1], cache, told.append) == first[::-1]
    assert len(endpoint.requests) == 5
    ask(endpoint.judge(), ["prompt 0", "another"], cache, told.append)
    assert len(endpoint.requests) == 6 and told == [2]
    ask(endpoint.judge(model="judge-2"), prompts, cache)  # another judge has a mind of its own
    assert len(endpoint.requests) == 11


def test_an_interrupted_judge_goes_on(endpoint, cache):
    endpoint.reply = lambda number, prompt: (
        YES if number <= 3 else (500, {"error": {"message": f"out of order for {KEY}"}})
    )
    prompts = [f"prompt {n}" for n in range(20)]
    with pytest.raises(RunError, match="HTTP 500") as error:
        ask(endpoint.judge(concurrency=1, retries=1), prompts, cache)
    assert KEY not in str(error.value) and "\n" not in str(error.value)
    assert len(endpoint.requests) < 15, "the rest was not asked"
    cache.write_text(cache.read_text() + '{"key": "tor')  # killed while writing
    endpoint.reply = lambda number, prompt: NO
    assert [verdict.faithful for verdict in ask(endpoint.judge(), prompts, cache)] == [True] * 3 + [
        False
    ] * 17
    before = len(endpoint.requests)
    assert [verdict.faithful for verdict in ask(endpoint.judge(), prompts, cache)] == [True] * 3 + [
        False
    ] * 17
    assert len(endpoint.requests) == before


@pytest.mark.parametrize(
    ("reply", "key", "words"),
    [
        (
            (401, {"error": {"message": f"Incorrect API key provided: {KEY[:8]}***"}}),
            KEY,
            ["refuses the key", "OPENAI_API_KEY", "401"],
        ),
        ((403, {"error": {"message": KEY}}), KEY, ["refuses the key", "403"]),
        ((401, {"error": {"message": "key?"}}), "", ["asks for a key", "OPENAI_API_KEY"]),
        (
            (404, {"error": {"message": "The model `org/judge-1` does not exist"}}),
            KEY,
            ["judge.model=org/judge-1", "404"],
        ),
        (
            (400, {"error": {"message": f"temperature is not\nsupported {KEY}"}}),
            KEY,
            ["refuses every request", "temperature is not supported"],
        ),
        ((200, "<html>a page</html>"), KEY, ["not with a chat completion", "/v1"]),
        ((200, {"detail": "hello"}), KEY, ["not with a chat completion"]),
        ((418, {"error": {"message": f"a teapot, {KEY}"}}), KEY, ["HTTP 418", "a teapot"]),
    ],
)
def test_an_endpoint_that_cannot_judge(endpoint, cache, monkeypatch, reply, key, words):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    endpoint.reply = lambda number, prompt: reply
    with pytest.raises(RunError) as error:
        ask(endpoint.judge(), ["a", "b"], cache)
    message = str(error.value)
    assert all(word in message for word in [*words, endpoint.url]) and "\n" not in message
    assert KEY[:8] not in message


def test_nobody_there(endpoint, cache):
    endpoint.server.server_close()
    with pytest.raises(
        RunError, match=r"judge\.base_url=http://127\.0\.0\.1:\d+/v1 .*cannot be reached: .+"
    ):
        ask(endpoint.judge(retries=0), ["a"], cache)


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-clé"])
def test_a_damaged_key(endpoint, cache, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY cannot be used") as error:
        ask(endpoint.judge(), ["a"], cache)
    assert "sk-" not in str(error.value) and not endpoint.requests


@pytest.mark.parametrize(
    "content", [5, None, True, {"a": 1}, ["no", "parts"], [{"type": "text"}, 3], "[" * 100_000]
)
def test_content_of_any_type_is_no_verdict_and_stops_nothing(endpoint, cache, content):
    endpoint.reply = lambda number, prompt: (200, completion(content)) if prompt == "odd" else YES
    verdicts = ask(endpoint.judge(), ["odd", "even"], cache)
    assert [verdict.faithful for verdict in verdicts] == [True if content is True else None, True]
    assert isinstance(verdicts[0].said, str)
    assert len(cache.read_text().splitlines()) == (2 if content is True else 1)


def test_content_as_deep_as_json_can_be_read(endpoint, cache):
    for depth in range(600, 1000, 20):
        reply = (
            json.dumps(completion("x"))
            .replace('"x"', "[" * depth + "{}" + "]" * depth)
            .replace("[{}]", '{"a": {}}', 1)
        )
        endpoint.reply = lambda number, prompt, reply=reply: (
            (200, reply) if prompt == "deep" else YES
        )
        try:
            assert ask(endpoint.judge(), ["deep", "even"], cache)[0].faithful is None
        except RunError as error:
            assert "not with a chat completion" in str(error)


def test_the_parts_of_a_content_are_one_text(endpoint, cache):
    parts = [{"type": "text", "text": '{"faithful"'}, {"type": "text", "text": ": false}"}]
    endpoint.reply = lambda number, prompt: (200, completion(parts))
    assert ask(endpoint.judge(), ["a"], cache) == [Verdict(False, NO)]


@pytest.mark.parametrize(
    "reply",
    [
        '{"choices":' * 90_000,
        "[" * 100_000,
        "5",
        "null",
        '{"choices": []}',
        '{"choices": [3]}',
        '{"choices": [{"message": []}]}',
    ],
)
def test_a_reply_that_is_no_completion_is_one_line(endpoint, cache, reply):
    endpoint.reply = lambda number, prompt: (200, reply)
    with pytest.raises(RunError, match="not with a chat completion"):
        ask(endpoint.judge(retries=0), ["a"], cache)


def test_only_understood_replies_are_kept(endpoint, cache):
    endpoint.reply = lambda number, prompt: "perhaps" if prompt == "b" else NO
    assert [verdict.faithful for verdict in ask(endpoint.judge(), ["a", "b"], cache)] == [
        False,
        None,
    ]
    assert [json.loads(line)["said"] for line in cache.read_text().splitlines()] == [NO]
    endpoint.reply = lambda number, prompt: YES
    assert [verdict.faithful for verdict in ask(endpoint.judge(), ["a", "b"], cache)] == [
        False,
        True,
    ]
    assert len(endpoint.requests) == 3, "what was not understood is asked again, what was is not"


def test_lines_of_the_cache_that_are_no_verdicts_are_passed_over(endpoint, cache):
    ask(endpoint.judge(), ["a"], cache)
    kept = json.loads(cache.read_text())
    odd = [
        5,
        [],
        {},
        "x",
        {"key": 1, "said": YES},
        kept | {"said": 5},
        kept | {"said": ["no"]},
        kept | {"said": "perhaps"},
    ]
    lines = [*map(json.dumps, odd), "[" * 100_000, "\xff", '{"key": "torn']
    cache.write_bytes("\n".join(lines).encode("latin-1"))
    assert ask(endpoint.judge(), ["a"], cache) == [Verdict(True, YES)]
    assert len(endpoint.requests) == 2
    ask(endpoint.judge(), ["a"], cache)
    assert len(endpoint.requests) == 2


def test_the_cache_is_of_endpoint_model_and_temperature(endpoint, cache):
    for number, settings in enumerate(
        ({}, {"temperature": None}, {"temperature": 1.0}, {"base_url": f"{endpoint.url}/"}), 1
    ):
        ask(endpoint.judge(**settings), ["a"], cache)
        assert len(endpoint.requests) == number


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def dripping(start):
    def write(socket):
        socket.write(start)
        for _ in range(100):
            socket.write(b" ")
            time.sleep(0.05)

    return write


@pytest.mark.parametrize(
    "start", [HEAD + b"X: ", HEAD + b"Content-Length: 100\r\n\r\n"], ids=["head", "body"]
)
def test_the_timeout_is_of_the_whole_request(endpoint, cache, start):
    endpoint.reply = lambda number, prompt: dripping(start)
    began = time.monotonic()
    with pytest.raises(
        RunError, match=r"cannot be reached: no whole reply within judge\.timeout=0\.4 seconds"
    ):
        ask(endpoint.judge(timeout=0.4, retries=0), ["a"], cache)
    assert time.monotonic() - began < 2


def test_a_timeout_is_tried_again(endpoint, cache):
    endpoint.reply = lambda number, prompt: dripping(HEAD) if number == 1 else YES
    assert ask(endpoint.judge(timeout=0.4, retries=1), ["a"], cache) == [Verdict(True, YES)]


def zipped(content):
    body = gzip.compress(content)
    return lambda socket: socket.write(
        HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )


def test_a_reply_that_is_too_large_is_no_verdict(endpoint, cache):
    bomb = zipped(b" " * (32 << 20))  # 32 MiB in 32 KB
    endpoint.reply = lambda number, prompt: {"bomb": bomb, "large": YES + " " * (2 << 20)}.get(
        prompt, YES
    )
    tracemalloc.start()
    verdicts = ask(endpoint.judge(concurrency=1), ["bomb", "large", "small"], cache)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [verdict.faithful for verdict in verdicts] == [
        None,
        None,
        True,
    ] and "larger than 1 MiB" in verdicts[0].said
    assert len(endpoint.requests) == 3 and peak < 12 << 20
    with pytest.raises(RunError, match="larger than 1 MiB"):
        ask(endpoint.judge(), ["bomb"], cache)


def test_a_zipped_reply_is_read(endpoint, cache):
    endpoint.reply = lambda number, prompt: zipped(json.dumps(completion(NO)).encode())
    assert ask(endpoint.judge(), ["a"], cache) == [Verdict(False, NO)]


def test_a_prompt_that_is_refused(endpoint, cache):
    endpoint.reply = lambda number, prompt: (
        (400, {"error": {"message": "too long"}}) if prompt == "long" else YES
    )
    assert ask(endpoint.judge(), ["short", "long"], cache) == [
        Verdict(True, YES),
        Verdict(None, "too long"),
    ]
    ask(endpoint.judge(), ["short", "long"], cache)
    assert [request["messages"][0]["content"] for request in endpoint.requests].count(
        "long"
    ) == 2, "it may be taken another time"


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ('{"faithful": true}', True),
        (' {"faithful": false, "why": "wrong year"}\n', False),
        ('```json\n{"faithful": true}\n```', True),
        ('<think>Is it? "no"\nPerhaps.</think>\n\n{"faithful": false}', False),
        ("Yes", True),
        ("no.", False),
        ("**No**", False),
        ("**Verdict:** Yes", True),
        ("Final answer: unfaithful", False),
        ("```\nno\n```", False),
        ("<answer>Yes</answer>", True),
        ("true", True),
        ("not faithful", False),
        ("{'faithful': True}", True),
        ('{"faithful": "no"}', False),
        ('{"Faithful": "true"}', True),
        ('[{"faithful": true}]', True),
        ('{"why": {"year": "wrong"}, "faithful": false}', False),
        ('{"faithful": true, "why": "it is not {\\"faithful\\": false}"}', True),
        (
            'I would say {"faithful": true} at first, but the year is wrong.\n```json\n{\n'
            '  "faithful": false\n}\n```\nDone.',
            False,
        ),
        ("Perhaps.</think>no", False),
        ('<think>Say {"faithful": true}? Hm, the year', None),
        (
            '<|channel|>analysis<|message|>{"faithful": true}?<|end|>'
            "<|start|>assistant<|channel|>final<|message|>No<|return|>",
            False,
        ),
        ('<|channel|>analysis<|message|>Perhaps {"faithful": true} or', None),
        ("Yes, it is faithful.", None),
        ("Yes and no", None),
        ('{"faithful": 1}', None),
        ('{"faithful": null}', None),
        ('{"faithful": true or false}', None),
        ('{"verdict": true}', None),
        ('{"faithful": true', None),
        ("", None),
    ],
)
def test_strict_reading(said, verdict):
    assert parse(said) is verdict


@pytest.mark.parametrize(
    "unit",
    [
        " ",
        "{",
        "[",
        "`",
        "\n",
        ",",
        "<think>",
        "</think>",
        "<",
        "<|channel|>",
        "```json\n",
        '{"faithful": ',
        '"faithful"',
        "{ ",
        "{'faithful' : ",
    ],
)
def test_reading_is_linear(unit):
    said = unit * (1_000_000 // len(unit))
    for text in (said, said + NO, "a" + said + "b"):
        began = time.monotonic()
        parse(text)
        assert time.monotonic() - began < 0.5


def test_the_question_holds_all_that_is_judged():
    prompt = judge_prompt("Text: {braces} stay\nQuestion: who?", ["Ada", "Ada L."], "Bob {x}")
    assert all(
        part in prompt
        for part in (
            "Text: {braces} stay\nQuestion: who?",
            "Ada\nor: Ada L.",
            "Bob {x}",
            '{"faithful": true}',
        )
    )


def record(name, answer, **scores):
    return {
        "id": f"task/{name}",
        "by": {"task": "task"},
        "prompt": f"the text of {name}",
        "references": ["r"],
        "answer": answer,
        "scores": scores,
        "kind": "question",
        "question": "q",
    }


def test_records_get_their_verdicts(endpoint, tmp_path, cache):
    endpoint.reply = lambda number, prompt: (
        NO if "of b" in prompt else "perhaps" if "of c" in prompt else YES
    )
    job = SimpleNamespace(judge=endpoint.judge())
    context = SimpleNamespace(
        job=job, folder=tmp_path, reporter=Reporter(quiet=True), lm=None
    )  # needs no model
    records = [
        record("a", "Ada", f1=1.0, faithful=0.0),
        record("b", "Bob", f1=0.0),
        record("c", "Cid", f1=0.5),
        record("d", "", f1=0.0),
    ]
    judged = judge(context, records)
    assert [one["scores"] for one in judged] == [
        {"faithful": 1, "f1": 1},
        {"faithful": 0, "f1": 0},
        {"f1": 0.5},
        {"faithful": 0, "f1": 0},
    ]
    assert [one["verdict"]["faithful"] for one in judged] == [True, False, None, False]
    assert judged[2]["verdict"] == {"judge": "org/judge-1", "faithful": None, "said": "perhaps"}
    assert len(endpoint.requests) == 3 and (tmp_path / "verdicts_org-judge-1.jsonl").exists()
    assert records[0]["scores"] == {"f1": 1.0, "faithful": 0.0}, (
        "the records given stay as they were"
    )
    assert [one["scores"].get("faithful") for one in judged] == [1, 0, None, 0]
    (unusable,) = [row for row in figures(context, judged) if row["metric"] == "unusable_verdicts"]
    assert (unusable["value"], unusable["n"], unusable["task"]) == (1 / 4, 4, "task")


@pytest.mark.parametrize(("unusable", "warned"), [(1, False), (2, True)])
def test_many_unusable_verdicts_are_warned_of(unusable, warned, tmp_path, capfd):
    told = [
        {"judge": "j", "faithful": None if n < unusable else True, "said": ""} for n in range(10)
    ]
    records = [record(str(n), "Ada") | {"verdict": verdict} for n, verdict in enumerate(told)]
    list(figures(SimpleNamespace(reporter=Reporter(), job=None), records))
    assert (f"{unusable}0% of the judge's 10 replies" in capfd.readouterr().out) is warned


def test_another_judge_is_another_evaluation_and_force_asks_again(
    endpoint, tmp_path, hf_folder, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = (
        {"context": f"Box {n} is red.", "question": f"Which colour is box {n}?", "answers": ["red"]}
        for n in range(2)
    )
    (tmp_path / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        f"checkpoint={hf_folder} suite=hallucination suite.tasks=[boxes.jsonl] suite.max_tokens=3 "
        "wandb.mode=disabled device=cpu"
    )

    def run(*more):
        folder = evaluate(compose("eval", [*words.split(), *more]), [])
        return folder.name, len(endpoint.requests)

    judged = ["judge=endpoint", f"judge.base_url={endpoint.url}", "judge.model=a"]
    names = [
        run(),
        run(*judged),
        run(*judged),
        run(*judged[:2], "judge.model=b"),
        run(*judged, "force=true"),
    ]
    assert [asked for _, asked in names] == [0, 2, 2, 4, 6]
    assert len({name for name, _ in names}) == 3 and names[1][0] == names[2][0] == names[4][0]
    assert run(*judged, "judge.timeout=9") == names[4], "how it is asked is not what it says"


def test_no_judge(tmp_path):
    context = SimpleNamespace(
        job=SimpleNamespace(judge=SimpleNamespace(kind="none")), folder=tmp_path
    )
    records = [record("a", "Ada")]
    assert judge(context, records) == records and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "ftp://x/v1",
        "http://",
        "http://me:pw@x/v1",
        "http://x/v1?api-key=secret",
    ],
)
def test_an_address_that_is_none(url):
    with pytest.raises(UserError, match=r"judge\.base_url") as error:
        EndpointJudge(base_url=url, model="m")
    assert "pw" not in str(error.value) and "secret" not in str(error.value)
