"""Evaluation at scale: several workers, a server, a killed worker, and resuming in each."""

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from processes import Run

from redi.engine.cli import main
from redi.engine.errors import InputError
from redi.engine.generation.generate import Request, Sampling, generate_batches
from redi.engine.generation.server import find_server
from redi.engine.quickstart.task import make_problems, solve

OPTIONS = ["--samples", "4", "--max_new_tokens", "7", "--answer_pattern", "(.)$", "--seed", "3"]
OPTIONS += ["--batch_size", "8"]
SAMPLES = 96


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "test.jsonl"
    drawn = make_problems(SAMPLES // 4, random.Random(1))
    prompts = [p if i % 2 else p[3:] for i, p in enumerate(drawn)]
    rows = [{"prompt": p, "answer": solve(d)[-1]} for p, d in zip(prompts, drawn, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def alone(world: Path, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation by one process that was never interrupted."""
    folder = tmp_path_factory.mktemp("evaluations") / "alone"
    assert main(line(world, problems, folder)) == 0
    return folder


def line(world: Path, problems: Path, out: Path, *more: str) -> list[str]:
    model, data = str(world / "model"), str(problems)
    return ["evaluate", model, "--data", data, "--out", str(out), *OPTIONS, *more]


def lines_in(out: Path) -> int:
    path = out / "samples.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def workers(pid: int) -> list[int]:
    """Processes that generate for a command; another process forks them."""
    return [worker for child in children(pid) for worker in children(child)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_two_workers_yield_the_bits_of_one(
    world: Path, problems: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(line(world, problems, out, "--gpus", "2")) == 0
    assert (out / "samples.jsonl").read_bytes() == (alone / "samples.jsonl").read_bytes()
    scores = [json.loads((f / "summary.json").read_text())["benchmarks"] for f in (out, alone)]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_a_killed_worker_is_one_line_and_the_command_resumes(
    world: Path, problems: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = line(world, problems, out, "--gpus", "2")
    run = Run(*argv, log=tmp_path / "log")
    run.wait_for(lambda: lines_in(out) > 0)
    os.kill(workers(run.pid)[0], signal.SIGKILL)
    assert run.end() == 1
    [last] = run.stderr.splitlines()[-1:]
    assert "was ended by SIGKILL (out of memory?); the same command resumes" in last
    assert "Traceback" not in run.stderr
    assert 0 < lines_in(out) < SAMPLES
    assert main(argv) == 0
    assert "resuming after" in capsys.readouterr().err
    assert (out / "samples.jsonl").read_bytes() == (alone / "samples.jsonl").read_bytes()


@pytest.mark.slow
def test_a_killed_command_leaves_no_worker_and_resumes_to_the_same_bits(
    world: Path, problems: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv = line(world, problems, out, "--gpus", "2")
    run = Run(*argv, log=tmp_path / "log")
    run.wait_for(lambda: lines_in(out) > 0)
    started = workers(run.pid)
    assert len(started) == 2
    run.kill()
    deadline = time.monotonic() + 20
    while any(map(is_alive, started)):
        assert time.monotonic() < deadline, "workers outlive the command"
        time.sleep(0.05)
    with (out / "samples.jsonl").open("ab") as file:
        file.write((alone / "samples.jsonl").read_bytes()[:100])  # killed within a line
    assert 0 < lines_in(out) < SAMPLES
    # Another number of workers finishes it.
    assert main(line(world, problems, out)) == 0
    assert (out / "samples.jsonl").read_bytes() == (alone / "samples.jsonl").read_bytes()


@pytest.mark.slow
def test_an_interrupted_command_keeps_what_its_workers_finished(
    world: Path, problems: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = Run(*line(world, problems, out, "--gpus", "2"), log=tmp_path / "log")
    run.wait_for(lambda: lines_in(out) > 0)
    started = workers(run.pid)
    run.send(signal.SIGINT)
    assert run.end() == 75
    assert "the same command resumes" in run.stderr
    assert not any(map(is_alive, started))


def test_a_worker_that_cannot_load_the_model_is_one_line(
    world: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(world / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    for out, more in (("one", []), ("two", ["--gpus", "2"])):
        argv = line(world, problems, tmp_path / out, *more)
        argv[1] = str(model)
        assert main(argv) == 2
        [shown] = capsys.readouterr().err.splitlines()
        assert shown.startswith(f"redi: MODEL: {model}")


@dataclass
class ModelServer:
    """OpenAI's completions API of a real small model, on a local port."""

    model: Any
    tokenizer: Any
    faults: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Status and headers of the next answers, instead of completions."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    open_now: int = 0
    most_open: int = 0
    url: str = ""

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        sampling = Sampling(body["max_tokens"], body["temperature"], body["top_p"], body["seed"])
        requests = [Request(tuple(body["prompt"]), 0)]
        [[made]] = generate_batches(self.model, self.tokenizer, requests, sampling, 1)
        reason = "stop" if made.ended else "length"
        return {
            "choices": [{"text": made.text, "finish_reason": reason}],
            "usage": {
                "prompt_tokens": len(body["prompt"]),
                "completion_tokens": made.tokens,
            },
        }


@pytest.fixture
def server(world: Path) -> Iterator[ModelServer]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(world / "model")
    served = ModelServer(model, AutoTokenizer.from_pretrained(world / "model"))
    lock, counted = threading.Lock(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self.answer(200, {"data": [{"id": "tiny", "owned_by": "vllm"}]}, {})

        def do_POST(self) -> None:
            assert self.path == "/v1/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with counted:
                served.open_now += 1
                served.most_open = max(served.most_open, served.open_now)
                fault = served.faults.pop(0) if served.faults else None
            if not fault:
                with lock:
                    served.bodies.append(body)
                    found = served.complete(body)
            with counted:
                served.open_now -= 1
            if fault:
                self.answer(fault[0], {"error": {"message": "too\nmuch"}}, fault[1])
            else:
                self.answer(200, found, {})

        def answer(self, status: int, value: dict[str, Any], headers: dict[str, str]) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            for name, text in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    served.url = f"http://127.0.0.1:{http.server_port}"
    yield served
    http.shutdown()
    http.server_close()


def test_a_server_generates_what_the_model_does_here(
    world: Path, problems: Path, server: ModelServer, tmp_path: Path
) -> None:
    def evaluate(out: str, *more: str) -> list[dict[str, Any]]:
        argv = [*line(world, problems, tmp_path / out, *more), "--samples", "1"]
        assert main([*argv, "--temperature", "0"]) == 0
        return [json.loads(text) for text in (tmp_path / out / "samples.jsonl").open()]

    # overloaded, then restarting
    server.faults = [(429, {"Retry-After": "0"}), (503, {"Retry-After": "0"})]
    found = evaluate("served", "--server", server.url, "--concurrency", "6")
    assert found == evaluate("here")
    assert not server.faults
    assert 1 < server.most_open <= 6
    ends = [server.tokenizer.eos_token_id]
    assert {body["model"] for body in server.bodies} == {"tiny"}
    assert all(body["stop_token_ids"] == ends and body["top_k"] == -1 for body in server.bodies)
    prompts = {server.tokenizer.decode(body["prompt"]) for body in server.bodies}
    assert prompts == {each["rendered_prompt"] for each in found}


@pytest.mark.slow
def test_samples_from_a_server_differ_and_only_missing_ones_are_asked_for_again(
    world: Path, problems: Path, server: ModelServer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv = line(world, problems, out, "--server", f"{server.url}/v1/", "--temperature", "1")
    argv += ["--samples", "2", "--limit", "10"]
    assert main(argv) == 0
    samples = out / "samples.jsonl"
    whole = samples.read_bytes()
    assert len({body["seed"] for body in server.bodies}) == len(server.bodies) == 20
    lines = whole.splitlines(keepends=True)
    samples.write_bytes(b"".join(lines[3:9]) + lines[16] + lines[17][:40])
    server.bodies.clear()
    assert main(argv) == 0
    assert len(server.bodies) == 20 - 7
    assert samples.read_bytes() == whole


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ((400, {}), 2, "status 400: too much"),
        ((401, {}), 2, "status 401: too much"),
        pytest.param(
            (503, {"Retry-After": "1"}),
            1,
            "status 503: too much; the same command resumes",
            marks=pytest.mark.slow,  # eight retries
        ),
    ],
)
def test_an_error_of_the_server_is_one_line(
    fault: tuple[int, dict[str, str]],
    code: int,
    said: str,
    world: Path,
    problems: Path,
    server: ModelServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.faults = [fault] * 300
    options = ["--server", server.url, "--concurrency", "2"]
    assert main(line(world, problems, tmp_path / "out", *options)) == code
    [shown] = capsys.readouterr().err.splitlines()
    assert said in shown


def test_a_page_of_another_server_is_not_an_api(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1/models").write_text("<html>")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        with pytest.raises(InputError, match="/models is not OpenAI's API"):
            find_server(f"http://127.0.0.1:{served.server_port}", 1)
        served.shutdown()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--server", "http://127.0.0.1:9"], "cannot be used: "),
        (["--server", "localhost:8000"], "is not a URL such as"),
        (["--server", "http://[x"], "is not a URL such as"),
        (["--server", "http://h", "--gpus", "2"], "server generates elsewhere"),
        (["--served_model", "m"], "not used without server"),
        (["--gpus", "3", "--tensor_parallel", "2"], "gpus = 3 is not a multiple of"),
        (["--gpus", "2", "--tensor_parallel", "2"], "tensor_parallel needs vLLM"),
    ],
)
def test_wrong_options_for_workers_are_one_line(
    options: list[str],
    said: str,
    world: Path,
    problems: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main(line(world, problems, out, *options)) == 2
    [shown] = capsys.readouterr().err.splitlines()
    assert said in shown
    assert not out.exists()
