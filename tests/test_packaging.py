"""What an installation brings: the kernels alone, or the engine too."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
SDIST = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
BENCHMARKS = {
    "engine": ("step", "packing", "data", "learning", "models qwen2 model --tokenizer t"),
    "triton": ("tune", "build"),
}


def test_importing_the_kernels_imports_nothing_else_of_the_project() -> None:
    program = "import sys, redi.kernels; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.split()
    ours = {name for name in modules if name.split(".")[0] == "redi"}
    assert {name for name in ours if not name.startswith("redi.kernels")} == {"redi"}
    others = {"datasets", "jsonargparse", "pyarrow", "safetensors", "transformers", "xxhash"}
    assert not others & set(modules)


def test_the_version_is_the_same_everywhere() -> None:
    (version,) = re.findall(r'version="(.+)"', (ROOT / "setup.py").read_text())
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} (" in (ROOT / "CHANGELOG.md").read_text()


class Environment:
    """A virtual environment that begins empty; its programs run in `folder`, not in the checkout.

    Args:
        folder: of the environment and of what its programs write.
        wheels: folder in which pip finds redi-engine.
    """

    def __init__(self, folder: Path, wheels: Path) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=True)
        self._variables = {
            **{k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
            "PATH": f"{folder / 'venv' / 'bin'}:{os.environ['PATH']}",
            "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
            "PIP_FIND_LINKS": f"{wheels} {os.environ.get('PIP_FIND_LINKS', '')}",
            "OMP_NUM_THREADS": "2",
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, *line: object, fails: int = 0) -> str:
        """Output of a program: only stderr if it must fail."""
        done = subprocess.run(
            [str(word) for word in line],
            cwd=self.folder,
            env=self._variables,
            text=True,
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == fails, f"{line}\n{done.stdout}{done.stderr}"
        return done.stderr if fails else done.stdout + done.stderr  # tables go to stderr


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the wheel of a clean checkout: git's files, as they are now."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("clean")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in listing.stdout.decode().split("\0")[:-1]:
        if (ROOT / name).exists():
            (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "checkout" / name)
    build_wheel(folder / "checkout", folder / "wheels")
    return folder / "wheels"


def build_wheel(source: Path, to: Path) -> Path:
    line = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", to, source]
    subprocess.run(line, check=True, timeout=300)
    (wheel,) = to.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_a_wheel_has_the_three_folders_and_an_sdist_builds_the_same(
    wheels: Path, tmp_path: Path
) -> None:
    (wheel,) = wheels.glob("*.whl")
    found = contents(wheel)
    packaged = {name.removeprefix("redi/") for name in found if name.startswith("redi/")}
    wanted = {
        str(path.relative_to(wheels.parent / "checkout"))
        for folder in ("engine", "kernels", "bench")
        for path in (wheels.parent / "checkout" / folder).rglob("*")
        if path.suffix in (".py", ".toml", ".typed") or path.name == "launches.json"
    }
    assert wanted <= packaged
    assert {name.split("/")[0] for name in packaged} == {"engine", "kernels", "bench"}

    tools = tmp_path / "tools"
    install = ["-m", "pip", "install", "--quiet", "--target", tools, "setuptools>=77"]
    subprocess.run([sys.executable, *install], check=True, timeout=300)
    subprocess.run(
        [sys.executable, "-c", SDIST, tmp_path],
        cwd=wheels.parent / "checkout",
        env={**os.environ, "PYTHONPATH": str(tools)},
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=300,
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert contents(build_wheel(sdist, tmp_path / "from-sdist")) == found


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment(wheels: Path, tmp_path: Path) -> None:
    """The kernels alone first; then the command that `redi` names brings the engine."""
    environment = Environment(tmp_path, wheels)
    run = environment.run
    run("pip", "install", "redi-engine")
    run("pip", "check")
    run("python", "-c", only_the_loss())
    sizes = ("--tokens", 64, "--vocab", 500, "--hidden", 32, "--repeats", 1)
    run("python", "-m", "redi.bench.loss", *sizes, "--out", tmp_path)
    for extra, programs in BENCHMARKS.items():
        for program in programs:
            (line,) = run(*f"python -m redi.bench.{program}".split(), fails=2).splitlines()
            assert line.endswith(f" is not installed: pip install 'redi-engine[{extra}]'")

    for command in ("redi", "python -m redi.engine.cli"):
        for arguments in ("", "--help", "train redi.toml", "doctor"):
            (line,) = run(*command.split(), *arguments.split(), fails=2).splitlines()
            assert line.startswith("redi: not installed: datasets, ")
    install = line.partition("; ")[2]
    assert install == "pip install 'redi-engine[engine]'"
    run(*shlex.split(install))
    run("pip", "check")
    assert "usage: redi COMMAND" in run("redi", "--help")
    assert "redi-engine 0.1.0" in run("redi", "--version")
    assert "loss" in run("redi", "doctor")
    for command in ("train", "plan"):
        assert f"usage: redi {command}" in run("redi", command, "--help")
    run("python", "-m", "redi.engine.quickstart", "make", "runs/quickstart")
    recipe = tmp_path / "venv/lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    recipe /= "site-packages/redi/engine/recipes/quickstart-sft.toml"
    assert "steps" in run("redi", "plan", recipe)
    run("redi", "train", recipe, "--train.max_steps", 2)


def only_the_loss() -> str:
    """README's program with the loss alone."""
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (program,) = (text for text in programs if "redi_loss" in text)
    return program
