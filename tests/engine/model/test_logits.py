"""The scale and soft cap of a model's logits, as its own forward applies them."""

from typing import Any

import pytest
import torch
from architecture_cases import tiny_config
from torch import nn

from redi.engine.config.sections import ObjectiveConfig
from redi.engine.errors import InputError
from redi.engine.loss.packed_loss import Logits, PackedLoss
from redi.engine.model.load import empty_model
from redi.engine.model.logits import logits_of
from redi.engine.model.student import Student

EXPECTED = {
    "llama": Logits(),
    "granite": Logits(logit_scale=1 / 4),
    "cohere": Logits(logit_scale=0.25),
    "minicpm3": Logits(logit_scale=256 / 32),  # dim_model_base / hidden_size
    "hyperclovax": Logits(logit_scale=4.0),
    "gemma2": Logits(softcap=1.5),
    "nanochat": Logits(softcap=1.5),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_logits_are_read_from_the_forward_of_a_family(kind: str) -> None:
    model = empty_model(tiny_config(kind))
    assert logits_of(model) == EXPECTED[kind]
    assert "forward" not in vars(model.base_model)
    if kind == "gemma2":  # a student has another lm_head
        student = Student(model, PackedLoss(ObjectiveConfig()))
        assert student.logits == logits_of(student.model) == EXPECTED[kind]


class _Other(nn.Module):
    """An lm_head whose product is changed."""

    def __init__(self, weight: nn.Parameter, change: Any) -> None:
        super().__init__()
        self.weight, self.change = weight, change

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.change(hidden @ self.weight.t())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda z: z + 1, r"not lm_head's alone \(add\)"),
        (lambda z: z * z, r"not lm_head's alone \(mul\)"),
        (lambda z: z.tanh().tanh(), r"not lm_head's alone \(tanh\)"),
        (lambda z: z[..., :-1], "not lm_head's alone, which"),
        (lambda z: z * -2.0, "scale of its logits is not positive"),
        (lambda z: -2.0 * torch.tanh(z / -2.0), "scale of its logits is not positive"),
    ],
)
def test_other_logits_are_refused(change: Any, said: str) -> None:
    model = empty_model(tiny_config("llama"))
    model.set_output_embeddings(_Other(model.get_output_embeddings().weight, change))
    with pytest.raises(InputError, match=said):
        logits_of(model)
