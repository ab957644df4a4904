"""Greedy accuracy on held-out problems during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from redi.engine.config.sections import Recipe
from redi.engine.data.problems import read_problems
from redi.engine.data.text import Encoder, TokenSettings
from redi.engine.distributed import World
from redi.engine.errors import InputError
from redi.engine.generation.checkers import open_checker
from redi.engine.generation.generate import (
    Completion,
    Request,
    Sampling,
    encode_prompts,
    generate_batches,
    longest_first,
)
from redi.engine.model.sharding import gather_once
from redi.engine.model.student import Student
from redi.engine.train.signals import StopRequest


@dataclass(frozen=True)
class HeldOutProblems:
    """Held-out problems whose answers can be checked, and how to generate and check."""

    prompts: Sequence[str]
    """Rendered prompts, as the model gets them."""
    prompt_ids: Sequence[tuple[int, ...]]
    """Their tokens, including the start of a document."""
    answers: Sequence[str]
    tokenizer: PreTrainedTokenizerBase
    checker: str
    """"math" or "exact"."""
    answer_pattern: str | None
    max_new_tokens: int
    batch_size: int
    """Completions that a rank generates at a time."""

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompt_ids))

    def new_tokens(self, config: Any) -> int:
        """Maximum tokens of a completion, limited by the context of a model's configuration."""
        positions = getattr(config, "max_position_embeddings", None)
        room = self.max_new_tokens if positions is None else positions - self.longest_prompt
        return max(1, min(self.max_new_tokens, room))


def held_out_problems(recipe: Recipe) -> HeldOutProblems | None:
    """The problems of `[eval] path`; None without a checker.

    Raises:
        InputError: a row has no answer, or a prompt cannot be rendered.
    """
    section = recipe.eval
    if section.checker == "none" or not section.paths:
        return None
    problems = read_problems(section.paths)
    encoder = Encoder(
        TokenSettings(
            paths=section.paths,
            format="problem",
            template=recipe.data.template,
            system_prompt=recipe.data.system_prompt,
            tokenizer_path=recipe.model.tokenizer or recipe.model.path or "",
            template_variables=recipe.data.template_variables,
        )
    )
    prompts = [encoder.prompt_text(problem.prompt, problem.where) for problem in problems]
    try:
        ids = [encoder.with_start(one) for one in encode_prompts(encoder.tokenizer, prompts)]
    except ValueError as error:
        raise InputError(f"eval.path: {error}") from None
    return HeldOutProblems(
        prompts=prompts,
        prompt_ids=ids,
        answers=[problem.answer for problem in problems],
        tokenizer=encoder.tokenizer,
        checker=section.checker,
        answer_pattern=section.answer_pattern,
        max_new_tokens=section.max_new_tokens,
        batch_size=section.batch_size,
    )


def greedy_accuracy(
    student: Student, problems: HeldOutProblems, world: World, stop: StopRequest
) -> dict[str, float] | None:
    """Fraction of the problems that greedy decoding solves. Collective.

    Each rank takes a part of the problems. The weights are gathered once, not for each token: every
    rank holds all of them in the compute dtype meanwhile. The student must have run a forward
    before: in it FSDP determines that the student, and not a block, is the root.

    Returns:
        None if a stop request interrupted it, else greedy_accuracy and greedy_truncated, the
        fraction of completions that reached the maximum length.
    """
    assert isinstance(student, FSDPModule)
    mine = list(range(world.rank, len(problems.prompts), world.size))
    # Every rank must run the same number of batches (`any_rank`), so at least one. Problems added
    # for this are not counted.
    share = -(-len(problems.prompts) // world.size)
    prompts = [problems.prompt_ids[index] for index in mine]
    prompts += [problems.prompt_ids[0]] * (share - len(mine))
    requests = [Request(ids, sample=0) for ids in prompts]
    order = longest_first(requests)
    batches = generate_batches(
        student.model,
        problems.tokenizer,
        [requests[place] for place in order],
        Sampling(problems.new_tokens(student.model.config)),
        problems.batch_size,
        should_stop=lambda: stop.requested,
    )
    completions: list[Completion] = []
    # Compiled blocks were never traced with a key-value cache.
    with gather_once(student), torch.compiler.set_stance("force_eager"):
        student.unshard()  # embeddings and norm; `generate` does not pass through the root
        for batch in batches:
            if world.any_rank(stop.requested):
                return None
            completions += batch
    sums = torch.zeros(2, dtype=torch.float64)
    with open_checker(problems.checker, problems.answer_pattern) as check:
        for place, completion in zip(order, completions, strict=True):
            if place >= len(mine):
                continue
            index = mine[place]
            result = check(problems.prompts[index], completion.text, problems.answers[index])
            sums += torch.tensor([result.correct, not completion.ended])
    dist.all_reduce(sums)
    correct, truncated = (sums / len(problems.prompts)).tolist()
    return {"greedy_accuracy": correct, "greedy_truncated": truncated}
