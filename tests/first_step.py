"""The first step of a recipe by plain transformers in float64, one sequence at a time."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from redi.engine.config.parse import load_recipe, train_parser
from redi.engine.console import Console
from redi.engine.data.loader import StepLoader
from redi.engine.data.packing import Cost
from redi.engine.distributed import join_world
from redi.engine.train.prepare_data import prepare_data


class FirstStep(NamedTuple):
    """What the first line of metrics.jsonl has to be."""

    loss: float
    grad_norm: float
    positive_logp: float
    negative_logp: float | None


def plain_first_step(
    path: Path,
    auto: Any = AutoModelForCausalLM,
    trained: Callable[[str], Any] = lambda name: True,
) -> FirstStep:
    """Of a recipe of `sft` or `redi`, with eager attention and without packing.

    Args:
        path: the recipe.
        auto: the auto class of its model.
        trained: whether a parameter is trained, by name.
    """
    recipe = load_recipe(train_parser(), str(path), [str(path)])
    with join_world() as alone:
        data = prepare_data(recipe, alone, Console(active=False))
    loader = StepLoader(
        data.tokens,
        data.examples,
        data.schedule,
        row_tokens=4096,
        rank=0,
        world_size=1,
        cost=Cost(1.0, 0.0),
    )
    batches = next(iter(loader.steps(0)))
    model = auto.from_pretrained(
        recipe.model.path, dtype=torch.float64, attn_implementation="eager"
    )
    model.config._experts_implementation = "eager"  # the grouped products have no float64
    loss = torch.zeros((), dtype=torch.float64)
    means: dict[int, list[float]] = {1: [], -1: []}
    routers: list[Any] = []
    coefficient = recipe.train.router_aux_loss
    for index in data.examples.units[batches.units].flatten().tolist():
        ids = torch.from_numpy(data.tokens.ids(index).astype("int64"))
        prompt = int(data.tokens.prompt_lengths[index])
        sign = int(data.tokens.signs[index])
        options = {"output_router_logits": True} if coefficient else {}
        out = model(input_ids=ids[None], **options)
        if coefficient:
            routers.append(out.router_logits)
        logp = out.logits[0, :-1].log_softmax(-1)
        logps = logp.gather(1, ids[1:, None])[prompt - 1 :, 0]
        means[sign].append(logps.mean().item())
        if recipe.objective.normalisation == "token":
            loss = loss - logps.sum() / batches.num_targets
        else:
            alpha = recipe.objective.alpha
            loss = loss + (-1.0 if sign > 0 else alpha) * logps.mean() / len(batches.units)
    if coefficient:
        layers = tuple(torch.cat(layer) for layer in zip(*routers, strict=True))
        balance = sys.modules[type(model).__module__].load_balancing_loss_func
        loss = loss + coefficient * balance(layers, model.num_experts, model.num_experts_per_tok)
    loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if trained(name) and p.grad is not None]
    norm = math.sqrt(sum(grad.square().sum().item() for grad in grads))
    positive, negative = (sum(part) / len(part) if part else None for part in means.values())
    assert positive is not None
    return FirstStep(loss.item(), norm, positive, negative)
