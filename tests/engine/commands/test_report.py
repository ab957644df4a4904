"""The page of `redi report`: what it shows and escapes, and (slow) how a browser draws it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import tomli_w

from redi.engine.cli import main
from redi.engine.commands.report_curves import MOST_POINTS, _apart, _series, _thinned
from redi.engine.commands.report_samples import LONGEST_TEXT, read_samples

HOSTILE = "<script>x</script> $a$ \x1b[31m \u202egnp \ud800"
STEP = {"tokens": 10, "seconds": 1.0, "tokens_per_s": 10.0, "peak_memory_gib": 1.0}


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "data", "action", "srcset")
        self.links += [value or "" for name, value in attrs if name in names]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def write_run(
    folder: Path, steps: int = 20, ending: str = "export", **keys: dict[str, Any]
) -> Path:
    """A run folder: with an export, or with the line of the guard that ended it."""
    folder.mkdir(parents=True)
    lines = [{"event": "eval", "step": 0, "positive_logp": -2.0, "margin_accuracy": 0.5}]
    lines += [
        {"step": n, "loss": 1 / n, "positive_logp": -1.0, "negative_logp": None, "grad_norm": 1.0}
        | STEP
        for n in range(1, steps + 1)
    ]
    if ending == "export":
        (folder / "export").mkdir()
    else:
        lines.append({"event": ending, "step": steps, "goes_on": False})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.toml").write_text(tomli_w.dumps(keys))
    lengths = {"count": 9, "total": 90, "percentiles": [1, 2, 3, 4], "longest": 1234}
    overview = {"steps": 20, "lengths": {"positive": lengths}}
    (folder / "manifest.json").write_text(json.dumps({"device": "cpu", "overview": overview}))
    return folder


def sample(step: int | None, problem: str, text: str, correct: bool) -> str:
    """A line of samples.jsonl."""
    trace = {"text": text, "correct": correct, "teacher": "m"}
    line = {"sample": 0, "prompt": problem, "traces": [trace], "answer": "7", "ended": correct}
    return json.dumps(line | ({} if step is None else {"step": step})) + "\n"


def test_the_page_shows_two_runs_escaped_and_requests_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"train": {"batch": 4}}
    first = write_run(
        tmp_path / "_<b>&$x$", data={"system_prompt": HOSTILE.replace("\ud800", "")}, **common
    )
    second = write_run(tmp_path / "b", 12, "collapse", data={"path": "x" * 500}, **common)
    for folder, texts in ((first, (HOSTILE, "after", "third")), (second, ("b0", "b1", "b2"))):
        lines = [
            sample(step, "<i>1+6</i>", text, step == 8)
            for step, text in zip((0, 4, 8), texts, strict=True)
        ]
        (folder / "samples.jsonl").write_text("".join(lines) + '{"step": 9, "sam')
    out = tmp_path / "page.html"
    assert main(["report", str(first), str(second), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [str(tmp_path / "curves.png"), str(out)]
    page = Page(out)

    assert not {"script", "b>", "i>", "img", "link", "iframe"} & {*page.tags} - {"b", "i"}
    assert all(link.startswith("#") for link in page.links), page.links
    assert "url(http" not in page.source.replace("'", "").replace('"', "")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page.source)
    assert r"<script>x</script> $a$ \x1b[31m \u202egnp \ud800" in page.text
    assert r"<script>x</script> $a$ \x1b[31m \u202egnp" in page.text.split("train.batch")[0]
    assert "_<b>&$x$ finished, 20 steps" in page.text
    assert "b collapsed at step 12, 12 of 20 steps" in page.text

    different, _, equal = page.text.partition("Keys that are equal")
    assert "data.system_prompt" in different
    assert "x" * 120 + "…" in different
    assert "train.batch 4" in equal
    assert "train.batch" not in different
    assert "positive 1" not in page.text  # the lengths, once for both runs
    assert page.text.count("1,234") == 1

    assert "<i>1+6</i>" in page.text
    shown = page.text.partition("answer 7")[2]
    for text, verdict in (("third", "right ✓"), ("b0", "wrong ✗"), ("b2", "right ✓")):
        assert re.search(f"{re.escape(verdict)} {text}", shown), shown
    assert "b1" not in shown  # between the first and the last evaluation
    assert "cut off" in shown


def test_samples_of_evaluations_are_shown_where_training_made_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert read_samples([run]) == []
    for name in ("evaluate-b", "evaluate-a"):
        (run / name).mkdir()
        damaged = [
            "[]",
            '{"traces": []}',
            "7",
            "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
        ]
        lines = "\n".join(damaged) + "\n" + sample(None, "p", "long " * 5000, True)
        (run / name / "samples.jsonl").write_text(lines + sample(None, "q", "short", False))
    first, second = read_samples([run])
    assert [one.when for one in first.samples] == ["evaluate-a", "evaluate-b"]
    assert len(first.samples[0].text) < LONGEST_TEXT + 100
    assert "19,000 characters" in first.samples[0].text
    assert [one.correct for one in second.samples] == [False, False]


def test_a_long_run_is_drawn_by_means_and_extremes_without_what_is_not_finite() -> None:
    lines = [{"step": n, "loss": None if n == 500 else float(n)} for n in range(1, 1001)]
    lines.append({"step": 1001, "loss": 5000.0})
    steps, mean, low, high = _thinned(*_series(lines, "loss"))
    assert len(steps) == MOST_POINTS
    assert steps[-1] == 1001
    assert high.max() == 5000
    assert (low <= mean).all()
    assert np.isfinite(mean).all()
    assert mean[0] == np.mean(range(1, 8))
    nothing = [{"step": 1, "loss": None}, {"step": 2}]
    assert len(_series(nothing, "loss")[0]) == 0


def test_a_damaged_manifest_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (run / "manifest.json").write_text('{"device": ')
    assert main(["report", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"redi: {run}/manifest.json: damaged (Expecting value: line 1 column 12 (char 11)); "
        "restore it, or use another run directory\n"
    )


@pytest.mark.parametrize("heights", [[0.5] * 3, [0.0, 0.99, 1.0, 1.0], [0.3] * 40])
def test_labels_stay_apart_and_inside_the_panel(heights: list[float]) -> None:
    moved = _apart(heights)
    gaps = np.diff(moved)
    assert (gaps >= min(0.085, 1 / len(heights)) - 1e-9).all()
    assert max(moved) <= 1
    assert min(moved) >= -1e-9


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("missing/page.html", "missing: no such directory"),
        ("page.txt", "page.txt: name a file that ends in .html"),
        ("folder.html", "folder.html: name a file that ends in .html"),
        ("/proc/page.html", "/proc cannot be written: No such file or directory"),
    ],
)
def test_a_page_that_cannot_be_written_is_one_line(
    out: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder.html").mkdir()
    run = write_run(tmp_path / "run")
    assert main(["report", str(run), "--out", str(tmp_path / out)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1280, 3000), (500, 6000)])
def test_a_browser_draws_twenty_runs_without_the_network_in_light_and_dark(
    size: tuple[int, int], tmp_path: Path
) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    name = "quickstart-redi-alpha-{}-with-a-name-that-is-much-too-long-for-any-column"
    runs = [
        write_run(tmp_path / name.format(n), 300 - n, data={"path": [f"/data/{n}.jsonl"] * 100})
        for n in range(20)
    ]
    (runs[0] / "samples.jsonl").write_text(sample(0, "p" * 3000, "t" * 3000, True))
    page = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--out", str(page)]) == 0
    means = []
    for theme in (1, 0):  # light, dark
        picture = tmp_path / f"{theme}.png"
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={size[0]},{size[1]}",
            f"--screenshot={picture}",
            f"--blink-settings=preferredColorScheme={theme}",
        ]
        line = [browser, *options, page.as_uri()]
        subprocess.run(line, check=True, capture_output=True, timeout=120)
        pixels = matplotlib.image.imread(picture)[..., :3]
        assert pixels.shape[1] == size[0]
        background = pixels[2, 2]
        # Nothing is wider than the page: its margin is empty.
        assert (pixels[:, -12:] == background).all()
        assert (pixels != background).any(axis=(1, 2)).mean() > 0.5
        means.append(background.mean())
    assert means[0] == 1.0
    assert means[1] < 0.15
