"""Package definition: the folder X of the checkout is imported as `redi.X`.

A top-level module called `kernels` would shadow the Hugging Face package that transformers
imports, hence the mapping. `redi` itself is a namespace package without `__init__`.
"""

from setuptools import find_packages, setup

FOLDERS = ("engine", "kernels", "bench")

# `redi.kernels` alone is what a plain install is for; the command `redi` needs the extra `engine`.
KERNELS = ["numpy", "torch>=2.11"]
ENGINE = [
    "datasets>=4.0",
    "fsspec>=2024.2",
    "jinja2>=3.1",
    "jsonargparse[signatures,toml]>=4.45",
    "math-verify>=0.8",
    "matplotlib>=3.9",
    "pyarrow>=18",
    "pyyaml>=6.0",
    "rapidfuzz>=3.10",
    "requests>=2.32",
    "rich>=13",
    "safetensors>=0.5",
    "tomli-w>=1.0",
    "tqdm>=4.66",
    "transformers>=5.17",
    "xxhash>=3.4",
]
# Those for Linux only are imported late: a CPU or macOS machine works without them.
EXTRAS = {
    "engine": ENGINE,
    "triton": ["triton>=3.6; sys_platform == 'linux'"],
    "torchao": ["torchao>=0.18"],  # optim.name = "adamw-8bit", train.fp8
    "lora": ["peft>=0.18"],
    "bitsandbytes": ["bitsandbytes>=0.49", "peft>=0.18"],  # adapter.base = "nf4"
    "liger": ["liger-kernel>=0.8; sys_platform == 'linux'"],
    "flash": ["flash-attn>=2.7; sys_platform == 'linux'"],
    "storage": ["gcsfs>=2024.2", "s3fs>=2024.2"],  # run.dir = "s3://..." or "gs://..."
    "tensorboard": ["tensorboard>=2.16"],
    "trackio": ["trackio>=0.30"],
    "mlflow": ["alembic>=1.10", "mlflow-skinny>=3.1", "sqlalchemy>=2"],  # its client, and sqlite
    "trl": ["trl>=1.16"],  # tests/engine/loss/test_trl.py compares with its losses
    "vllm": ["vllm>=0.30; sys_platform == 'linux'"],  # 0.30.0 is for torch 2.13.0
    "wandb": ["wandb>=0.18"],
    "gguf": ["accelerate>=1.0", "gguf>=0.17"],
    "test": [
        *ENGINE,
        "accelerate>=1.1",  # transformers' Trainer, in docs/kernels.md
        "flask>=3.0",  # a local S3 server, with moto
        "flask-cors>=5.0",
        "hypothesis>=6.100",
        "moto[s3]>=5.0",
        "mypy>=1.15",
        "peft>=0.18",
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
        "s3fs>=2024.2",
        "tensorboard>=2.16",
        "triton>=3.6; sys_platform == 'linux'",
    ],
}

packages = [
    name
    for folder in FOLDERS
    for name in (f"redi.{folder}", *(f"redi.{folder}.{sub}" for sub in find_packages(folder)))
]

setup(
    name="redi-engine",
    version="0.1.0",
    description="Training on correct and incorrect reasoning traces: fused loss, packing, FSDP2",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=packages,
    package_dir={f"redi.{folder}": folder for folder in FOLDERS},
    package_data={
        **{f"redi.{folder}": ["py.typed"] for folder in FOLDERS},
        "redi.kernels": ["py.typed"],
        "redi.kernels.experimental": ["launches.json"],
        "redi.engine": ["py.typed", "commands/*.jinja", "recipes/*.toml"],
        "redi.bench": ["py.typed", "smollm2_hidden.json"],
    },
    install_requires=KERNELS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["redi = redi.engine.cli:main"]},
)
