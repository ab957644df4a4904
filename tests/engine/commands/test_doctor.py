"""`redi doctor` tells the truth about this machine, and fails when the loss is wrong."""

import platform
from typing import Any

import pytest
import torch
import transformers

from redi.engine.cli import main
from redi.engine.commands import doctor
from redi.kernels import redi_loss


def test_it_names_versions_devices_choices_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for text in (
        platform.python_version(),
        torch.__version__,
        transformers.__version__,
        "loss backend",
        "attention",
        "liger-kernel layers",
    ):
        assert text in printed
    if not torch.cuda.is_available():
        assert "sdpa: document by document: flash attention needs CUDA" in printed
        assert "off: the device is cpu" in printed


def test_an_extra_that_is_missing_is_named_with_its_pip_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert main(["doctor"]) == 0
    assert "pip install 'redi-engine[vllm]'" in capsys.readouterr().out


def test_a_wrong_gradient_fails_the_self_test(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forgets_alpha(*args: Any, **options: Any) -> Any:
        return redi_loss(*args, **(options | {"alpha": 0.79}))

    monkeypatch.setattr(doctor, "redi_loss", forgets_alpha)
    assert main(["doctor"]) == 1
    out = capsys.readouterr()
    assert "WRONG" in out.out
    assert "self-test of the loss failed" in out.err
