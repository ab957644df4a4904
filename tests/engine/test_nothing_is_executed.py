"""Files of a model or data folder are data: no command runs code that they hold."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest

from redi.engine.cli import main

MODULE = """\
open({canary!r}, "w").close()
class Payload:
    from_pretrained = classmethod(lambda *a, **k: open({canary!r}, "w").close())
Config = Model = Tokenizer = Payload
"""


class Payload:
    """What runs a command of the shell when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def custom_code(model: Path, data: Path, canary: Path) -> dict[str, Any]:
    (model / "payload.py").write_text(MODULE.format(canary=str(canary)))
    for file, classes in {
        "config.json": {"AutoConfig": "Config", "AutoModelForCausalLM": "Model"},
        "tokenizer_config.json": {"AutoTokenizer": "Tokenizer"},
    }.items():
        content = json.loads((model / file).read_text())
        content["auto_map"] = {auto: f"payload.{name}" for auto, name in classes.items()}
        (model / file).write_text(json.dumps(content))
    return {}


def pickled_weights(model: Path, data: Path, canary: Path) -> dict[str, Any]:
    content = pickle.dumps(Payload(f"touch {canary}"))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (model / name).write_bytes(content)
    (model / "model.safetensors").unlink()
    return {}


def pickled_data(model: Path, data: Path, canary: Path) -> dict[str, Any]:
    content = pickle.dumps(Payload(f"touch {canary}"))
    for name in ("traces.pkl", "cache.pkl", "traces.arrow"):
        (data / name).write_bytes(content)
    (data / f"{data.name}.py").write_text(MODULE.format(canary=str(canary)))
    return {"data.path": str(data)}


def expression(model: Path, data: Path, canary: Path) -> dict[str, Any]:
    return {"data.where": f"__import__('os').system('touch {canary}') == 0"}


TEMPLATES = [
    "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ messages.__class__.__init__.__globals__['os'].system('touch CANARY') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__()[0].__init__ }}{{ raise_exception.__globals__"
    "['__builtins__']['__import__']('os').system('touch CANARY') }}",
]


def template(text: str) -> Callable[..., dict[str, Any]]:
    def write(model: Path, data: Path, canary: Path) -> dict[str, Any]:
        (model / "chat_template.jinja").write_text(text.replace("CANARY", str(canary)))
        return {"data.template": "chat"}

    return write


SLOW = [pickled_data, expression, pickled_weights, *map(template, TEMPLATES[1:])]
PAYLOADS = [
    custom_code,
    template(TEMPLATES[0]),
    *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW),
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_file_of_a_model_or_data_folder_is_executed(
    payload: Callable[[Path, Path, Path], dict[str, Any]],
    world: Path,
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, data, canary = tmp_path / "model", tmp_path / "data", tmp_path / "canary"
    shutil.copytree(world / "model", model)
    data.mkdir()
    shutil.copy(world / "traces.jsonl", data)
    monkeypatch.chdir(data)
    changes = {"model.path": str(model), "data.cache": str(tmp_path / "cache")}
    path = recipe("run", changes | {"train.max_steps": 1} | payload(model, data, canary))
    code = main(["train", str(path)])
    assert not canary.exists()
    err = capsys.readouterr().err
    assert code in (0, 2), err
    assert "Traceback" not in err


def test_the_payloads_work_where_they_are_executed(tmp_path: Path) -> None:
    """Without this the test above might pass because of a mistake in a payload."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Payload(f"touch {canary}")))
    assert canary.exists()
    canary.unlink()
    jinja2.Template(TEMPLATES[0].replace("CANARY", str(canary))).render(messages=[])
    assert canary.exists()
    canary.unlink()
    exec(MODULE.format(canary=str(canary)), {})
    assert canary.exists()
