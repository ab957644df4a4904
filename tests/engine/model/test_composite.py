"""A composite's text model is trained; the rest is in the export, bit by bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_cases import draw_weights, tiny_config
from first_step import plain_first_step
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from redi.engine.cli import main
from redi.engine.model import weights
from redi.engine.model.composite import TESTED, text_name
from redi.engine.model.load import find_config, load_weights

QWEN = {"depth": 1, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
MROPE = {"rope_type": "default", "rope_theta": 1e4}
# Type -> type of its text model among causal ones, changes to that, sizes of the vision model.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {}, {"image_size": 8, "patch_size": 4}),
    "mistral3": ("mistral", {}, {"image_size": 8, "patch_size": 4, "head_dim": 8}),
    "qwen2_vl": (
        "qwen2",
        {"rope_parameters": {**MROPE, "mrope_section": [2, 1, 1]}},
        {"depth": 1, "num_heads": 2, "patch_size": 4, "embed_dim": 16, "hidden_size": 32},
    ),
    "qwen2_5_vl": (
        "qwen2",
        {"rope_parameters": {**MROPE, "mrope_section": [2, 1, 1]}},
        {**QWEN, "fullatt_block_indexes": [0]},
    ),
    "qwen3_vl": (
        "qwen3",
        {"rope_parameters": {**MROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}},
        {**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "qwen3_5": ("qwen3_5_text", {}, {**QWEN, "num_position_embeddings": 16}),
}


def write_composite(folder: Path, kind: str, tokenizer: Any, legacy: bool = False) -> None:
    """A tiny composite; `legacy`: with the names of transformers 4."""
    torch.manual_seed(0)
    causal, changes, vision = KINDS[kind]
    text = tiny_config(causal)
    for name, value in changes.items():
        setattr(text, name, value)
    text.vocab_size = len(tokenizer)
    text.max_position_embeddings = 128
    if kind == "gemma3":
        text.final_logit_softcapping = None
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    default = AutoConfig.for_model(kind)
    found = default.vision_config
    vision_type = found.model_type if found else f"{kind}_vision"
    config = AutoConfig.for_model(
        kind,
        text_config={**text.to_dict(), "model_type": default.get_text_config().model_type},
        vision_config={**sizes, "num_attention_heads": 2, **vision, "model_type": vision_type},
        tie_word_embeddings=text.tie_word_embeddings,
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    draw_weights(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 8}')
    file = folder / "model.safetensors"
    names = {
        name: name.replace("model.language_model.", "language_model.model.")
        .replace("model.vision_tower", "vision_tower")
        .replace("model.multi_modal", "multi_modal")
        for name in load_file(file)
    }
    assert any(map(text_name, names))
    if legacy:
        renamed = {names[name]: tensor for name, tensor in load_file(file).items()}
        save_file(renamed, file, metadata={"format": "pt"})


@pytest.fixture
def tokenizer(world: Path) -> Any:
    return AutoTokenizer.from_pretrained(world / "model")


CASES = [
    ("gemma3", 0, False),
    pytest.param("gemma3", 2, True, marks=pytest.mark.slow),
    pytest.param("mistral3", 0, False, marks=pytest.mark.slow),
    *(
        pytest.param(kind, 0, False, marks=pytest.mark.slow)
        for kind in KINDS
        if kind not in ("gemma3", "mistral3")
    ),
]


@pytest.mark.parametrize(("kind", "ranks", "legacy"), CASES)
def test_the_text_model_is_trained_and_the_rest_is_exported_untouched(
    kind: str,
    ranks: int,
    legacy: bool,
    tokenizer: Any,
    recipe: Callable[..., Path],
    redi: Callable[..., Any],
    steps: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    source, run = tmp_path / kind, tmp_path / "run"
    write_composite(source, kind, tokenizer, legacy)
    changes = {"model.path": str(source), "train.max_steps": 2, "optim.warmup": 0.0}
    path = recipe("run", changes)
    if ranks:
        done = redi("train", path, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert main(["train", str(path)]) == 0
    # The composite itself, on text, is the oracle.
    expected = plain_first_step(path, AutoModelForImageTextToText, trained=text_name)
    line = steps(run)[0]
    for name, value in expected._asdict().items():
        assert line[name] == pytest.approx(value, rel=2e-5), name

    before, after = (load_file(one / "model.safetensors") for one in (source, run / "export"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(text_name(name) for name in changed)
    assert len(changed) > len([name for name in before if text_name(name)]) // 2
    for name in ("config.json", "preprocessor_config.json"):
        assert (run / "export" / name).read_bytes() == (source / name).read_bytes()
    model, info = AutoModelForImageTextToText.from_pretrained(
        run / "export", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = model.state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values())
    # `redi evaluate` loads it as it is.
    config = find_config(str(run / "export"), "model")
    loaded = load_weights(str(run / "export"), "model", config, torch.float32).eval()
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)

    # A checkpoint's export is the same.
    assert main(["export", str(run)]) == 0
    again = load_file(run / "export-step-2" / "model.safetensors")
    assert all(torch.equal(again[name], after[name]) for name in after)


def test_a_composite_s_config_is_not_changed_and_its_adapter_is_merged(
    tokenizer: Any, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert KINDS.keys() == TESTED
    write_composite(tmp_path / "gemma3", "gemma3", tokenizer)
    changes = {"model.path": str(tmp_path / "gemma3"), "model.rope_theta": 1e5}
    assert main(["train", str(recipe("run", changes))]) == 2
    assert "is a composite model" in capsys.readouterr().err
    changes = {"model.path": str(tmp_path / "gemma3"), "adapter.rank": 4}
    assert main(["train", str(recipe("adapted", changes))]) == 2
    assert "set adapter.merge = true" in capsys.readouterr().err
    content = json.loads((tmp_path / "gemma3" / "config.json").read_text())
    assert "text_config" in content


def test_a_composite_of_the_hub_is_fetched_with_its_processor(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export copies it from the files that were fetched with the weights."""
    write_composite(tmp_path / "source", "gemma3", tokenizer)
    (tmp_path / "snapshot").mkdir()

    def snapshot_download(_: str, **patterns: Any) -> str:
        names = [file.name for file in (tmp_path / "source").iterdir()]
        for name in filter_repo_objects(names, **patterns):
            shutil.copyfile(tmp_path / "source" / name, tmp_path / "snapshot" / name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(weights, "snapshot_download", snapshot_download)
    (file,) = weights.weight_files("owner/gemma")
    assert (file.parent / "preprocessor_config.json").is_file()
