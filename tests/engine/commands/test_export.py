"""`redi export`: the model card, and uploads by the real client of the hub to a local server."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from processes import free_port

from redi.engine.cli import main
from redi.engine.commands.model_card import write_card


class Hub(ThreadingHTTPServer):
    """The part of the hub's interface that an upload uses, with one token and one owner."""

    def __init__(self) -> None:
        super().__init__(("localhost", 0), Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}
        self.url = f"http://localhost:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Requests of huggingface_hub."""

    server: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, value: Any, code: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_PUT(self) -> None:
        self.server.large[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_GET(self) -> None:
        self.answer({"error": "nothing"}, 404)

    def do_POST(self) -> None:
        body, hub = self.body(), self.server
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if wanted["organization"] != "me":
                self.answer({"error": "Forbidden: you don't have the rights"}, 403)
                return
            known = hub.repositories.setdefault(name, {"wanted": wanted, "files": {}})
            self.answer({"url": f"{hub.url}/{name}"}, 200 if known["wanted"] is wanted else 409)
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{hub.url}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        else:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            files = hub.repositories[name]["files"]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.repositories[name]["message"] = value["summary"]
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
                else:
                    files[value["path"]] = base64.b64decode(value["content"])
            commit = {"commitOid": "0" * 40, "commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}"}
            self.answer({"success": True, **commit})


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def run(
    write_recipe: Callable[..., Path], world: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run with a system prompt that Markdown must not read."""
    folder = tmp_path_factory.mktemp("export")
    changes = {
        "data.system_prompt": "Be | `brief`.\n```\n<b>\x1b[31m",
        "eval.path": str(world / "traces.jsonl"),
        "train.max_steps": 2,
        "run.save_every": 1,
    }
    assert main(["train", str(write_recipe(folder, "run", changes)), "--quiet"]) == 0
    return folder / "run"


def test_the_card_is_read_by_the_hubs_library_and_names_no_folder(run: Path, world: Path) -> None:
    folder = run / "evaluate-step-2-p"
    folder.mkdir()
    benchmark = {"name": "/secret/a|b.jsonl", "problems": 3, "samples": 16, "pass_at_1": 0.25}
    summary = {"settings": {"temperature": 0.6}, "benchmarks": [benchmark]}
    (folder / "summary.json").write_text(json.dumps(summary))
    write_card(run, folder, 2)
    card = ModelCard.load(folder / "README.md")
    assert card.data.tags == ["redi-engine", "redi"]
    assert card.data.base_model is None
    assert "| a/b.jsonl | 3 | 16 | T = 0.6 | 25.0 % |" in card.text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    held_out = [line["margin_accuracy"] for line in lines if "margin_accuracy" in line]
    assert f"| margin accuracy | {held_out[0]:.4f} to {held_out[-1]:.4f} |" in card.text
    assert "- `traces.jsonl`" in card.text
    assert r"<b>\x1b[31m" in card.text
    assert str(world) not in card.content
    assert str(run.parent) not in card.content
    assert "/secret" not in card.content


def test_the_base_model_is_that_of_the_first_run_of_a_chain(run: Path, tmp_path: Path) -> None:
    for name, model in (("sft", "owner/base"), ("redi", str(tmp_path / "sft" / "export"))):
        (tmp_path / name / "export").mkdir(parents=True)
        recipe = f'[model]\npath = "{model}"\n[data]\npath = ["a/b:main:train", "/x/y.jsonl"]\n'
        (tmp_path / name / "recipe.toml").write_text(recipe)
    write_card(tmp_path / "redi", tmp_path, 7)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "owner/base"
    assert card.data.datasets == ["a/b"]
    assert "Figures" not in card.text


@pytest.mark.parametrize("name", ["tiny", "me/a b", "me/../x", "me/a/b"])
def test_a_name_that_the_hub_would_refuse_is_an_input_error(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--push_to_hub", name]) == 2
    said = capsys.readouterr().err
    assert said.startswith("redi: push_to_hub: ")
    assert said.count("\n") == 1
    assert not (run / "export-step-2").exists()


def push(run: Path, name: str, endpoint: str, token: str, *more: str) -> Any:
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN_PATH": os.devnull,
    }
    line = [sys.executable, "-m", "redi.engine.cli", "export", str(run), "--push_to_hub", name]
    return subprocess.run(
        [*line, *more], env=environment, text=True, capture_output=True, timeout=300
    )


@pytest.mark.slow
def test_an_export_is_uploaded_whole_and_again(run: Path, hub: Hub) -> None:
    for step in (1, 2):
        done = push(run, "me/tiny", hub.url, "hf_right", "--private", "--step", str(step))
        assert done.returncode == 0, done.stderr
        folder = run / f"export-step-{step}"
        assert done.stdout.splitlines() == [str(folder), f"{hub.url}/me/tiny"]
        uploaded = hub.repositories["me/tiny"]
        assert uploaded["wanted"]["visibility"] == "private"
        assert uploaded["message"] == f"Add run, export-step-{step}"
        local = {file.name: file.read_bytes() for file in folder.iterdir()}
        assert uploaded["files"] == local
        assert "README.md" in local
        digest = hashlib.sha256(local["model.safetensors"]).hexdigest()
        assert digest in hub.large


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "token", "code", "said"),
    [
        ("me/tiny", "", 2, "push_to_hub: no token; run `hf auth login`, or set HF_TOKEN"),
        ("me/tiny", "hf_wrong", 2, "push_to_hub: the hub does not accept the token"),
        ("other/tiny", "hf_right", 2, "push_to_hub: the token may not write to other/tiny"),
        ("me/tiny", "hf_right", 1, "cannot be reached: "),
    ],
)
def test_what_keeps_an_upload_from_working_is_one_line_before_the_export(
    name: str, token: str, code: int, said: str, run: Path, hub: Hub
) -> None:
    step = run / "export-step-1"
    before = step.stat().st_mtime_ns if step.exists() else None
    url = hub.url if code == 2 else f"http://localhost:{free_port()}"
    done = push(run, name, url, token, "--step", "1")
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("redi: push_to_hub")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not hub.repositories
    assert (step.stat().st_mtime_ns if step.exists() else None) == before
