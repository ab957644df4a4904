"""Tiny models of every causal architecture of transformers, through the engine's own construction.

`python tests/architecture_cases.py --write` writes what was seen into docs/models.md;
`python tests/architecture_cases.py llama qwen2` prints it for these types.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from redi.bench.traces import InMemoryTraces
from redi.engine.config.sections import ModelConfig, ObjectiveConfig, Recipe
from redi.engine.console import Console
from redi.engine.data.packing import build_batch
from redi.engine.distributed import join_world
from redi.engine.errors import InputError
from redi.engine.loss.packed_loss import StepTotals
from redi.engine.model import composite
from redi.engine.model.build import build_student, model_config
from redi.engine.model.flops import model_size
from redi.engine.model.load import empty_model
from redi.engine.quickstart.task import write_model
from redi.engine.train.step import clip

TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - composite.TESTED))
PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
SECONDS = 100
"""A type that takes longer than this is a failure."""
MOST_PARAMETERS = 5_000_000

LAYERS = 4
LENGTHS = (5, 21, 9)
SIGNS = (1, -1, 1)
ALPHA = 0.8

# Sizes by the names that configurations have for them; those that a type lacks are left out.
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    # Mixtures of experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": LAYERS - 1,
    "zero_expert_num": 2,
    # Layers of state spaces.
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    # Linear attention.
    "linear_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # Latent attention.
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,
    "v_head_dim": 8,
    # Lengths that documents exceed: what happens beyond them must show.
    "index_topk": 4,
    "index_block_size": 4,
    "index_topk_blocks": 1,
    "keep_window_size": 4,
    "sliding_window": 4,
    "attention_chunk_size": 4,
    "floor_scale": 4,
    "log_scaling_n_floor": 4,
    # Scales and caps of logits, strong enough to show.
    "logits_scaling": 4.0,
    "logit_scale": 0.25,
    "final_logit_softcapping": 1.5,
    "attn_logit_softcapping": 1.5,
    # Layers without rotary positions.
    "no_rope_layer_interval": 2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": None,
}

# What a type needs besides.
OWN: dict[str, dict[str, Any]] = {
    "dots1": {"n_shared_experts": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2)},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}


@dataclass(frozen=True)
class Seen:
    """What came of a type."""

    kind: str
    variant: str
    """"" for the type's default, "full" with full attention in every layer."""
    outcome: str
    """works, refused, wrong (other values than transformers' own), failed (no InputError)."""
    text: str
    """Why it is refused; the differences; the error."""
    seconds: float = 0.0


def _traces() -> InMemoryTraces:
    """Traces of LENGTHS; the first and the last have the same prompt."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(2, 60, length) for length in LENGTHS]
    ids[2][:4] = ids[0][:4]
    return InMemoryTraces(ids, np.array([4, 3, 4]), np.array(SIGNS, np.int8))


def tiny_config(kind: str, variant: str = "") -> Any:
    """A small configuration of a type: its defaults but for sizes and dropout."""
    default = AutoConfig.for_model(kind)
    known = default.to_dict()
    sizes = {name: value for name, value in TINY.items() if name in known}
    off = {n: 0.0 for n, v in known.items() if "drop" in n and isinstance(v, float)}
    if known.get("sliding_window") is None:
        sizes.pop("sliding_window", None)
    if "kv_lora_rank" in known:  # latent attention has as many key heads as query heads
        sizes.update(num_key_value_heads=4, head_dim=sizes["qk_rope_head_dim"])
    types = known.get("layer_types") or []
    if "full_attention" in types and "full_attention" not in types[:LAYERS]:
        sizes["layer_types"] = [*types[: LAYERS - 1], "full_attention"]
    full: dict[str, Any] = {}
    if variant:
        known_types = "layer_types" in known
        full = (
            {"layer_types": ["full_attention"] * LAYERS}
            if known_types
            else {"sliding_window": None}
        )
    try:
        return AutoConfig.for_model(kind, **{**off, **sizes, **OWN.get(kind, {}), **full})
    except Exception:  # sizes that do not fit the type: it is refused without them, or not tiny
        if variant:
            raise
        return default


def try_type(kind: str, variant: str = "") -> Seen:
    """Build a tiny model of a type as a run would, and compare it with transformers' own."""
    try:
        config = tiny_config(kind, variant)
    except Exception:
        return Seen(kind, variant, "refused", "transformers makes no such configuration")
    with tempfile.TemporaryDirectory() as folder:
        try:
            return _try(kind, variant, config, folder)
        except InputError as error:
            text = str(error).removeprefix(f"model.path: {folder}: ")
            outcome = "failed" if "\n" in text else "refused"
            return Seen(kind, variant, outcome, text.replace(folder, "MODEL"))
        except BaseException:
            return Seen(kind, variant, "failed", traceback.format_exc())


def _try(kind: str, variant: str, config: Any, folder: str) -> Seen:
    torch.manual_seed(0)
    write_model(Path(folder), seed=0)  # for its tokenizer
    config.save_pretrained(folder)
    recipe = Recipe(
        model=ModelConfig(path=folder, liger="off"),
        objective=ObjectiveConfig(name="redi", alpha=ALPHA),
    )
    config = model_config(recipe)  # refuses most that cannot be trained
    size = sum(p.numel() for p in empty_model(config).parameters())
    assert size <= MOST_PARAMETERS, f"not tiny: {size} parameters"
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    draw_weights(plain)
    plain.save_pretrained(folder)
    plain.train()
    traces: Any = _traces()
    pack: Any = partial(build_batch, traces, np.arange(len(LENGTHS)), np.array(LENGTHS))
    batch = pack()
    totals = StepTotals(units=2, targets=int(batch.num_targets.sum()))

    with join_world() as world:
        student, _ = build_student(recipe, model_config(recipe), torch.float32, world, QUIET)
        scores = student(batch, None)
        out = student(pack(share_prompts=model_size(config).shares_prompts(recipe)), totals)
        out.loss.backward()
        norm = float(clip(student, 0))
        loss = float(out.loss.detach())

    logps, expected, gradient = _plain(plain, batch)
    differences = {
        "log-probs": float((scores.sequence_logps - logps).abs().max() / logps.abs().max()),
        "log-probs in training": float(
            (out.sequence_logps - logps).abs().max() / logps.abs().max()
        ),
        "loss": abs(loss - expected) / abs(expected),
        "gradient norm": abs(norm - gradient) / gradient,
    }
    text = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    beyond = [name for name, value in differences.items() if value > 1e-5]
    right = not beyond
    if beyond == ["gradient norm"]:
        # The model may be so steep that float32 gives no more: then transformers' own is as far
        # from float64 as ours.
        plain.zero_grad()
        exact = _plain(plain.double(), batch)[2]
        right = abs(norm - exact) <= 3 * abs(gradient - exact) <= 3e-4 * exact
        ours, theirs = (abs(value - exact) / exact for value in (norm, gradient))
        text += f"; from float64 {ours:.1e}, transformers {theirs:.1e}"
    return Seen(kind, variant, "works" if right else "wrong", text)


def draw_weights(model: torch.nn.Module) -> None:
    """Weights large enough that every part of the model shows in its logits."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                noise = torch.randn_like(tensor)
                tensor.copy_(0.2 * noise if tensor.dim() > 1 else tensor + 0.1 * noise)


def _plain(model: Any, batch: Any) -> tuple[torch.Tensor, float, float]:
    """Log-probs [S], loss and gradient norm, document by document by transformers alone."""
    logps = []
    for (start, end), sign in zip(pairwise(batch.cu_seqlens.tolist()), SIGNS, strict=True):
        ids, targets = batch.input_ids[None, start:end], batch.targets[start:end]
        logits = model(input_ids=ids, use_cache=False).logits[0]
        valid = targets >= 0
        tokens = logits.float().log_softmax(-1)[valid].gather(1, targets[valid, None])
        factor = -1 if sign > 0 else ALPHA
        (factor * tokens.mean() / 2).backward()
        logps.append((tokens.sum().detach(), factor * tokens.mean().item() / 2))
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return torch.stack([total for total, _ in logps]), sum(part for _, part in logps), float(norm)


QUIET = Console(active=False)


def sweep(kinds: Iterable[str] = TYPES, workers: int = 2) -> list[Seen]:
    """Try types, each in a process of its own with a limit to its time; progress on stderr.

    A type whose layers are refused is tried again with full attention in every layer.
    """
    waiting = [(kind, "") for kind in reversed(list(kinds))]
    running: dict[Any, tuple[Any, str, str, float]] = {}
    seen: list[Seen] = []
    fork = multiprocessing.get_context("fork")  # imports are shared
    while waiting or running:
        while waiting and len(running) < workers:
            kind, variant = waiting.pop()
            here, there = fork.Pipe(duplex=False)
            process = fork.Process(target=_child, args=(there, kind, variant))
            process.start()
            there.close()
            running[here] = (process, kind, variant, time.monotonic())
        ready = wait(list(running), timeout=1.0)
        for pipe in list(running):
            process, kind, variant, began = running[pipe]
            late = time.monotonic() - began > SECONDS
            if pipe not in ready and not late:
                continue
            try:
                one = pipe.recv() if pipe in ready else None
            except EOFError:
                one = None
            if one is None:
                how = f"took longer than {SECONDS} s" if late else "its process died"
                one = Seen(kind, variant, "failed", how)
            process.kill()
            process.join()
            del running[pipe]
            one = replace(one, seconds=time.monotonic() - began)
            seen.append(one)
            print(f"{len(seen)} {_line(one)}", file=sys.stderr, flush=True)
            layers = "layers of type" in one.text or "mixer" in one.text
            if not variant and one.outcome == "refused" and layers:
                waiting.append((kind, "full"))
    return sorted(seen, key=lambda one: (one.kind, one.variant))


def _child(pipe: Any, kind: str, variant: str) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    with open(os.devnull, "w") as null:  # transformers' warnings of what a tiny model has
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    torch.set_num_threads(1)
    pipe.send(try_type(kind, variant))


def _line(one: Seen) -> str:
    return f"{one.kind} {one.variant} {one.outcome} ({one.seconds:.1f} s): {one.text}"


INTRODUCTION = """# Models

The transformers causal language models that `redi train` supports. Packing needs attention that can
be replaced in every layer; the fused loss needs logits that are a scaled or soft-capped product
with lm_head. A model without either would be trained wrongly, so it is refused in one line, before
data is read.

| your model | its type | trains |
|---|---|---|
| Qwen2.5, Qwen2.5-Math, DeepSeek-R1-Distill-Qwen | `qwen2` | yes |
| Qwen3, Qwen3 mixtures of experts | `qwen3`, `qwen3_moe` | yes |
| Llama 3.x, DeepSeek-R1-Distill-Llama, SmolLM2 | `llama` | yes |
| SmolLM3 | `smollm3` | yes |
| OLMo 2, OLMo 3, OLMoE | `olmo2`, `olmo3`, `olmoe` | yes |
| Phi-4, Phi-4-mini | `phi3` | yes |
| Mistral, Mistral Nemo, Ministral 8B, Mixtral | `mistral`, `ministral`, `mixtral` | yes |
| Gemma, Gemma 2, text models of Gemma 3 | `gemma`, `gemma2`, `gemma3_text` | yes |
| Granite 3 | `granite`, `granitemoe` | yes |
| Cohere Command R, Command R7B | `cohere`, `cohere2` | yes |
| MiniCPM 3 | `minicpm3` | yes |
| EXAONE 4, Apertus | `exaone4`, `apertus` | yes |
| Nemotron (dense), StableLM 2 | `nemotron`, `stablelm` | yes |
| gpt-oss | `gpt_oss` | yes; weights in bfloat16, as those in MXFP4 cannot be trained |
| Gemma 3 from 4B on, Mistral Small 3.1 | `gemma3`, `mistral3` | their text model |
| Qwen2-VL, Qwen2.5-VL | `qwen2_vl`, `qwen2_5_vl` | their text model |
| Qwen3-VL, Qwen3.5 (dense) | `qwen3_vl`, `qwen3_5` | their text model |
| Other composite models | `gemma4`, `llama4`, `qwen3_5_moe`, `qwen3_vl_moe`, ... | no |
| Qwen3-Next, text models of Qwen3.5 | `qwen3_next`, `qwen3_5_text`, `qwen3_5_moe_text` | yes |
| LFM2, OLMo Hybrid | `lfm2`, `lfm2_moe`, `olmo_hybrid` | yes |
| Granite 4, Bamba | `granitemoehybrid`, `bamba` | yes |
| Falcon-H1, Mamba, Mamba 2, Jamba, Nemotron-H, Zamba 2 | `falcon_h1`, ... | no |

Sliding windows are exact in each attention, and count in packing, MFU and the plan as the pairs of
tokens within them. Soft-capped attention (Gemma 2) runs in flash-attn 2 and 3, and sinks (gpt-oss)
in none. Otherwise both run document by document in plain PyTorch, which is exact and much slower;
a run on a GPU warns of it.

Linear attentions, state spaces and convolutions (Qwen3-Next, LFM2, Granite 4) run once for each
document of a pack, since transformers' own code for them does not keep documents apart. It costs
time where documents are short, and the model cannot be compiled (`[shard] compile`).

Of a composite model (text with vision) in this table the text model is trained, in packs of text.
The export is the composite: the other tensors, config.json and the processor are the source's,
bit by bit. So the source must still be there when a run ends.

The type is `model_type` in the model's config.json. A checkpoint's configuration may differ from
the type's default: `redi plan` with your recipe checks yours.

A test makes the table below. For each type it builds a model of four small layers with the type's
default features, saves and loads it as a run does, and trains it on a pack of three documents, two
of which share a prompt, in float32 on a CPU. "works" means that log-probs, REDI's loss and the
gradient norm equal those of transformers' eager attention, document by document, to 1e-5 (if
float32 is not that exact for a gradient norm: as close to float64 as transformers is). If the
default has sliding or other layers, the type is tried again with full attention in every layer,
which some of its checkpoints have. `python tests/architecture_cases.py --write` makes the table
again (transformers {version}).

| types | default configuration | full attention in every layer |
|---|---|---|
"""


def page(seen: Iterable[Seen]) -> str:
    """docs/models.md: types with the same outcome share a row."""
    outcomes: dict[str, dict[str, str]] = {}
    for one in seen:
        text = one.outcome
        if one.outcome != "works":
            # The class's name differs where the reason does not.
            reason = re.sub(
                rf"^(\w+(ForCausalLM|Model|Decoder|LMHead)\w*:?|{one.kind}) ", "", one.text
            )
            text = f"{one.outcome}: {reason}"
        outcomes.setdefault(one.kind, {})[one.variant] = text
    rows: dict[tuple[str, str], list[str]] = {}
    for kind, texts in sorted(outcomes.items()):
        rows.setdefault((texts[""], texts.get("full", "")), []).append(f"`{kind}`")
    ordered = sorted(rows.items(), key=lambda row: (row[0][0] != "works", row[0][1] != "works"))
    lines = [f"| {', '.join(kinds)} | {a} | {b} |" for (a, b), kinds in ordered]
    return INTRODUCTION.format(version=transformers.__version__) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(sweep()))
    else:
        for one in sweep(sys.argv[1:] or TYPES):
            print(_line(one))
