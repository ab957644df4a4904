"""Completions from a server with OpenAI's API (vLLM, SGLang and others).

Prompts are sent as token ids to `/completions`, so that the model gets exactly these: a server
renders no template and adds no token.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from redi.engine.errors import InputError, RunError
from redi.engine.generation.engines import Finished, Item
from redi.engine.generation.generate import Completion, Request, Sampling, request_seed

_CONNECT_SECONDS = 10.0
_ANSWER_SECONDS = 2 * 3600.0
"""The longest time without an answer. A long completion in a full batch takes an hour."""
_RETRIES = 8
"""With pauses of 0, 2, 4, ... seconds, at most 120: a server may restart within 4 minutes."""
# Without these values such servers use the sampling defaults of the model, such as top_k.
_NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
_KNOWN_SERVERS = ("vllm", "sglang")


@dataclass(frozen=True)
class Server:
    """A server and the model that it serves."""

    url: str
    """Base of its API, such as http://localhost:8000/v1."""
    model: str
    takes_neutral: bool
    """Whether it takes the parameters that OpenAI's API lacks."""
    concurrency: int
    """Requests that it has to do at the same time."""


def find_server(url: str, concurrency: int, model: str | None = None) -> Server:
    """Ask a server for its models.

    Args:
        url: with or without /v1 at the end.
        concurrency: of `complete`.
        model: one of them; needed if there are several.

    Raises:
        InputError: it cannot be reached, or does not serve the model.
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # such as "http://[x"
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"server: {url!r} is not a URL such as http://localhost:8000/v1")
    url = url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
    with _session(1, retries=0) as session:
        try:
            response = session.get(f"{url}/models", timeout=_CONNECT_SECONDS)
            response.raise_for_status()
            served = {one["id"]: one.get("owned_by") for one in response.json()["data"]}
        # JSONDecodeError is a RequestException: a page of another server is not a lost connection.
        except (requests.JSONDecodeError, KeyError, TypeError):
            raise InputError(f"server: {url}/models is not OpenAI's API") from None
        except requests.RequestException as error:
            raise InputError(f"server: {url} cannot be used: {_line(error)}") from None
    names = ", ".join(served) or "none"
    if model is None and len(served) != 1:
        raise InputError(f"server: {url} serves {names}; choose one by served_model")
    if model is not None and model not in served:
        raise InputError(f"served_model: {url} does not serve {model!r}; it serves: {names}")
    name = model or next(iter(served))
    return Server(url, name, served[name] in _KNOWN_SERVERS, concurrency)


def complete(
    server: Server, items: Sequence[Item], sampling: Sampling, ends: Sequence[int]
) -> Iterator[list[Finished]]:
    """Complete all requests, `concurrency` at a time, and yield completions as they finish.

    A request is repeated if the connection fails or the server is overloaded or restarts (status
    429 or 5xx). Servers have their own sampling: the seed makes samples differ, not reproducible.

    Args:
        server: from `find_server`.
        items: requests with numbers.
        sampling: sampling settings.
        ends: token ids that end a completion, besides those that the server knows.

    Raises:
        InputError: the server refuses a request.
        RunError: it fails or does not answer, after all retries.
    """
    todo: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for item in items:
        todo.put(item)
    done: queue.SimpleQueue[Finished | Exception] = queue.SimpleQueue()
    stopped = threading.Event()

    def work(session: requests.Session) -> None:
        while not stopped.is_set():
            try:
                number, request = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((number, _completion(session, server, request, sampling, ends)))
            except Exception as error:
                done.put(error)
                return

    threads = min(server.concurrency, len(items))
    with _session(threads, _RETRIES) as session:
        for _ in range(threads):
            # Daemons: at an interruption nobody waits for answers that take an hour.
            threading.Thread(target=work, args=(session,), daemon=True).start()
        try:
            for _ in items:
                found = done.get()
                if isinstance(found, Exception):
                    raise found
                yield [found]
        finally:
            stopped.set()


def _completion(
    session: requests.Session,
    server: Server,
    request: Request,
    sampling: Sampling,
    ends: Sequence[int],
) -> Completion:
    body: dict[str, Any] = {
        "model": server.model,
        "prompt": list(request.prompt),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": request_seed(sampling.seed, request),
    }
    if server.takes_neutral:
        body |= {**_NEUTRAL, "stop_token_ids": list(ends)}
    url = f"{server.url}/completions"
    try:
        response = session.post(url, json=body, timeout=(_CONNECT_SECONDS, _ANSWER_SECONDS))
    except requests.RequestException as error:
        raise RunError(f"server: {url}: {_line(error)}; the same command resumes") from None
    if not response.ok:
        problem = f"server: {url}: status {response.status_code}: {_detail(response)}"
        if response.status_code == 429 or response.status_code >= 500:
            raise RunError(f"{problem}; the same command resumes")
        raise InputError(problem)
    try:
        answer = response.json()
        choice, usage = answer["choices"][0], answer["usage"]
        text, reason = str(choice["text"]), choice["finish_reason"]
        made, read = int(usage["completion_tokens"]), int(usage["prompt_tokens"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise RunError(
            f"server: {url}: not an answer of OpenAI's API: {response.text[:200]!r}"
        ) from None
    if read != len(request.prompt):
        raise InputError(
            f"server: {url}: read {read} prompt tokens instead of {len(request.prompt)}: it does "
            "not take token ids as they are"
        )
    return Completion(text, made, reason == "stop")


def _session(connections: int, retries: int) -> requests.Session:
    session = requests.Session()
    if key := os.environ.get("OPENAI_API_KEY"):
        session.headers["Authorization"] = f"Bearer {key}"
    retry = Retry(
        total=retries,
        backoff_factor=1,
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods=None,  # POST too: a completion changes nothing on the server
        raise_on_status=False,
    )
    adapter = HTTPAdapter(pool_maxsize=connections, max_retries=retry)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def _line(error: requests.RequestException) -> str:
    """The cause of an error, as one line."""
    cause: BaseException = error
    while cause.args and isinstance(cause.args[0], BaseException):
        cause = cause.args[0]
    cause = getattr(cause, "reason", None) or cause
    return " ".join(str(cause).split())[-300:]


def _detail(response: requests.Response) -> str:
    """The message of an error, as one line."""
    try:
        body = response.json()
        error = body.get("error", body)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(text.split())[:300]
