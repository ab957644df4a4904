"""Every command and every program in README and docs/ runs, in order, as a reader would run them.

A fenced block says by its language what it is: `sh` and `python` are run, `toml` and `csv` are
written to the file that their first line names, and so is `python` whose first line names one;
`text` is output, which the block before must have printed (where it was run here). `sh fails=2`
must end with that exit code.
"""

import argparse
import json
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from redi.engine.generation.scoring import paired_difference
from redi.engine.quickstart import task as quickstart

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DISTILLATION = ROOT / "docs" / "distillation.md"

# What a test machine cannot do as it stands in the text, and what is done in its place.
INSTEAD = {
    "--nproc-per-node 8": "--nproc-per-node 2",
    "pip install": "true pip install",
}
# Commands that another test runs, or that only set up what runs the tests.
ELSEWHERE = {
    "make train": "tests/engine/quickstart/test_quickstart.py trains the quickstart in full",
    "make test": "this is part of it",
    "redi train redi.toml                        # train:": "README runs it after its recipe",
    "redi prepare openr1 open-r1/OpenR1-Math-Raw": (
        "tests/engine/commands/test_prepare.py runs it on rows of its own"
    ),
    "torchrun --nproc-per-node 8 --no-python redi train engine/recipes/paper-": (
        "tests/engine/config/test_paper_recipes.py runs two steps of each"
    ),
}


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    fails: int
    text: str


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w+)(?: fails=(\d))?\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [Block(language, int(fails or 0), text) for language, fails, text in found]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the pages say a reader has: a model, traces, held-out traces, problems with answers."""
    quickstart.make(tmp_path, problems=60, held_out=8)
    (tmp_path / "train.jsonl").rename(tmp_path / "traces.jsonl")
    (tmp_path / "test.jsonl").rename(tmp_path / "held-out.jsonl")
    rng = random.Random(0)
    problems = quickstart.make_problems(8, rng)
    rows = [{"prompt": p, "answer": quickstart.solve(p)[-1]} for p in problems]
    write(tmp_path / "problems.jsonl", rows)
    pairs = [{"prompt": p, "chosen": quickstart.solve(p), "rejected": "*****0"} for p in problems]
    write(tmp_path / "pairs.jsonl", pairs)
    return tmp_path


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(block: Block, folder: Path) -> str | None:
    """Returns what it printed, None if it was not run here but elsewhere."""
    text = block.text
    for command in ELSEWHERE:
        text = text.replace(command, f"true {command}")
    for wanted, done in INSTEAD.items():
        text = text.replace(wanted, done)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "REDI_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    line = ["bash", "-ec", text] if block.language == "sh" else [sys.executable, "-c", text]
    done_process = subprocess.run(
        line, cwd=folder, env=environment, text=True, capture_output=True, timeout=300
    )
    output = done_process.stdout + done_process.stderr
    assert done_process.returncode == block.fails, f"{block.text}\n{output}"
    return None if any(command in block.text for command in ELSEWHERE) else output


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in ("rounds.md", "paper.md")],  # tests of their own
    ids=lambda page: page.name,
)
def test_what_a_page_says_works(page: Path, folder: Path) -> None:
    if page.name == "evaluate.md":
        for block in blocks_of(ROOT / "docs" / "training.md")[:3]:
            follow(block, folder, "")
    output: str | None = ""
    for block in blocks_of(page):
        output = follow(block, folder, output)
    if page == DISTILLATION:
        check_advantages(folder)
        assert re.search(r"tokens weighted by spans +[\d,]+ \(100.0%\)", output or "")


def check_advantages(folder: Path) -> None:
    """KDRL's of real samples: larger where the teacher prefers a token, and for correct ones."""
    teacher, student = (
        iter(pq.read_table(folder / f"samples-{name}.parquet").to_pylist())
        for name in ("teacher", "student")
    )
    verdicts = []
    sampled, advantages = (
        [json.loads(line) for line in (folder / name).open()]
        for name in ("samples.jsonl", "advantages.jsonl")
    )
    for before, after in zip(sampled, advantages, strict=True):
        by_verdict: dict[bool, list[float]] = {True: [], False: []}
        for sample, trace in zip(before["traces"], after["traces"], strict=True):
            if not sample["text"]:
                continue
            spans = trace["spans"]
            assert [[a, b] for a, b, _ in spans] == [[n, n + 1] for n in range(len(trace["text"]))]
            weights = np.array([weight for _, _, weight in spans])
            of_teacher, of_student = (
                np.array(next(rows)["token_logps"][: len(spans)]) for rows in (teacher, student)
            )
            order = np.argsort(of_teacher - of_student)
            assert (np.diff(weights[order]) >= 0).all()
            by_verdict[sample["correct"]].append(weights.mean())
        if all(by_verdict.values()):
            verdicts.append(min(by_verdict[True]) > max(by_verdict[False]))
    assert next(teacher, None) is next(student, None) is None
    assert len(verdicts) > 3
    assert all(verdicts)


def test_the_advantages_of_kdrl_are_reward_and_log_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the program in the page, on samples of one problem: one of two with text is correct."""
    traces = [("ab", True), ("", False), ("é", False)]
    row = {"prompt": "?", "traces": [{"text": text, "correct": ok} for text, ok in traces]}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    places = {"token_starts": [[0, 1, 2], [0, 0, 1]], "token_ends": [[1, 2, 2], [0, 1, 1]]}
    for name, logps in (("teacher", [[-1, -3, -1], [-9, -2, -1]]), ("student", [[-2] * 3] * 2)):
        table = pa.table(places | {"token_logps": [[float(x) for x in one] for one in logps]})
        pq.write_table(table, tmp_path / f"samples-{name}.parquet")
    monkeypatch.chdir(tmp_path)
    (program,) = [one for one in blocks_of(DISTILLATION) if one.language == "python"]
    exec(compile(program.text, "distillation.md", "exec"), {})
    (written,) = map(json.loads, (tmp_path / "advantages.jsonl").open())
    first, empty, last = written["traces"]
    assert first["correct"] is last["correct"] is True
    assert empty == row["traces"][1]  # which training leaves out, as it has no tokens
    rewards = [2**0.5, -(2**-0.5)]  # (1 - 1/3) / std and (0 - 1/3) / std, of three samples
    wanted = [[[0, 1, rewards[0] + 0.1], [1, 2, rewards[0] - 0.1]], [[0, 1, rewards[1]]]]
    for trace, spans in zip((first, last), wanted, strict=True):
        assert trace["spans"] == [pytest.approx(span, rel=1e-5) for span in spans]


@pytest.mark.slow
def test_a_second_round_as_in_the_page_does_not_lose_to_one_round(tmp_path: Path) -> None:
    for block in blocks_of(ROOT / "docs" / "rounds.md"):
        follow(block, tmp_path, "")

    def shares(model: str) -> list[float]:
        """Share of correct samples of each held-out problem."""
        found: dict[int, list[bool]] = {}
        for line in (tmp_path / "rounds" / model / "evaluate-test" / "samples.jsonl").open():
            sample = json.loads(line)
            found.setdefault(sample["problem"], []).append(sample["traces"][0]["correct"])
        return [statistics.fmean(found[problem]) for problem in sorted(found)]

    sft, one, two = map(shares, ("sft", "round-1", "round-2"))
    assert len(sft) == len(one) == len(two) == 1000
    for later, earlier in ((one, sft), (two, one)):
        # On this task the rounds gain 14 and 24 points, with a standard error of about 1.
        gain, error = paired_difference(later, earlier)
        assert error < 0.015
        assert gain > 3 * error


def follow(block: Block, folder: Path, output: str | None) -> str | None:
    names_a_file = block.language == "python" and re.match(r"# \S+\.py\n", block.text)
    if block.language in ("toml", "csv") or names_a_file:
        name, _, content = block.text.removeprefix("# ").partition("\n")
        (folder / name).write_text(content)
    elif block.language in ("sh", "python"):
        return run(block, folder)
    else:
        assert block.language == "text"
        assert output is None or block.text.strip() in output
    return output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_in_a_page_is_a_recipe(page: Path, tmp_path: Path) -> None:
    from redi.engine.config.parse import load_recipe, train_parser

    recipes = [block for block in blocks_of(page) if block.language == "toml"]
    for block in recipes:
        path = tmp_path / "recipe.toml"
        path.write_text(block.text)
        load_recipe(train_parser(), str(path), [str(path)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


def arguments_of_torchrun(command: list[str]) -> argparse.Namespace:
    """What torchrun reads from a command line that runs `redi`."""
    from torch.distributed.run import get_args_parser

    assert command[0] == "torchrun"
    found: argparse.Namespace = get_args_parser().parse_args(command[1:])
    assert (found.no_python, found.training_script) == (True, "redi")
    return found


def check_command_of_redi(command: list[str], tmp_path: Path) -> None:
    """Check that `redi train` reads its arguments, with a recipe that exists in place of theirs."""
    from redi.engine.config.parse import load_recipe, train_parser

    train, _, *options = command
    assert train == "train"
    recipe = tmp_path / "redi.toml"
    recipe.write_text('[model]\npath = "model"\n[data]\npath = "traces.jsonl"\n')
    argv = [str(recipe), *options]
    assert train_parser().parse_args(argv).recipes == [str(recipe)]
    load_recipe(train_parser(), str(recipe), argv)


def test_the_kubernetes_job_is_consistent_and_its_command_is_read(tmp_path: Path) -> None:
    """The names are those of the operator's PyTorchJob, version v1."""
    job = yaml.safe_load((ROOT / "docs" / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["spec"].keys() == {"elasticPolicy", "runPolicy", "pytorchReplicaSpecs"}
    ((role, workers),) = job["spec"]["pytorchReplicaSpecs"].items()
    assert role == "Worker"
    assert workers.keys() == {"replicas", "restartPolicy", "template"}
    pod = workers["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    (port,) = container["ports"]
    assert port["name"] == "pytorchjob-port"
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes

    asked = arguments_of_torchrun(container["command"])
    assert int(asked.nnodes) == workers["replicas"]
    assert int(asked.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    first = f"{job['metadata']['name']}-worker-0"
    assert asked.rdzv_endpoint == f"{first}:{port['containerPort']}"
    assert asked.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    check_command_of_redi(asked.training_script_args, tmp_path)


def test_the_command_of_the_slurm_script_is_read(tmp_path: Path) -> None:
    (line,) = re.findall(r"^exec (.*)\Z", (ROOT / "docs" / "slurm.sh").read_text(), re.M | re.S)
    srun = line.replace('"$@"', "redi.toml --optim.lr=1e-6").replace("\\\n", " ")
    words = shlex.split(srun.replace("${SLURM_GPUS_ON_NODE:-1}", "8"))
    assert words[:2] == ["srun", "--kill-on-bad-exit=1"]
    asked = arguments_of_torchrun(words[words.index("torchrun") :])
    assert asked.nproc_per_node == "8"
    check_command_of_redi(asked.training_script_args, tmp_path)
