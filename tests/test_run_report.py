"""The report of a run: its numbers are those of the lines, and the page stands alone."""

import base64
import importlib.util
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rcm_mcore.evaluation.run_report import run_report

TOOL = Path(__file__).parent.parent / "tools" / "report_run.py"
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
HOSTILE = '<script>alert("x")</script> & "q"'


class Page(HTMLParser):
    """Tags with their attributes, the cells of each table by its id, figures by caption."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.figures, self._open = [], {}, {}, []
        self.feed(text)
        assert self._open == [], "every tag is closed"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in ("meta", "img", "line", "circle", "polyline"):
            self._open.append(tag)
        if tag == "table":
            self._rows = self.tables.setdefault(attributes["id"], [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag == "figure":
            self._figure = {"legend": "", "lines": [], "text": []}
        elif tag in ("polyline", "circle"):
            self._figure["lines"].append(attributes.get("points") or f"{attributes['cx']},{attributes['cy']}")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in ("td", "th"):
            self._rows[-1][-1] += data
        elif self._open and self._open[-1] == "figcaption":
            self.figures[data] = self._figure
        elif self._open and self._open[-1] in ("span", "text"):
            self._figure["legend" if self._open[-1] == "span" else "text"] += [data] if self._open[-1] == "text" else data

    @property
    def summary(self):
        return dict(self.tables["summary"])


def steps(count):
    """Lines of a run whose numbers are easy to sum: every fifth step is the student's."""
    for step in range(1, count + 1):
        student = step % 5 == 1
        line = {
            "step": step, "phase": "student" if student else "critic", "loss": 100.0 / step, "seconds": 4.0 if student else 2.0,
            "loss_scm": 90.0 if student else None, "loss_critic": None if student else 1000.0 / step**2, "grad_norm": 3.0,
            "data_seconds": 0.6, "tokens_per_second": 120.0 if student else 240.0, "memory_gib": 50.0 + step / 8, "lr": 1e-5,
            "tflops_per_rank": 300.0 if student else 150.0, "mfu": None, "nonfinite_output": int(step == 7),
            "nonfinite_target": 2 * int(step in (3, 4)), "bad_samples": float(step // 4),
            "save_seconds": 30.0 if step == 6 else None, "g_norm": 5.0 if student else None,
        }  # fmt: skip
        yield line


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run <b>1"
    (folder / "sheets").mkdir(parents=True)
    lines = [json.dumps(line) for line in steps(10)]
    lines.insert(2, json.dumps({"step": 2, "phase": "critic", "seconds": 1e6}))  # of a step that was done again
    lines.insert(3, lines.pop(1))
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 11, "phase": "stu')
    told = [
        {"time": 1.8e9, "step": 0, "event": "started", "of": 40, "ranks": 8},
        {"time": 1.8e9 + 60, "step": 5, "event": "saved", "seconds": 30.25},
        {"time": 1.8e9 + 61, "step": 5, "event": "wandb_failed", "error": HOSTILE},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in told) + '{"time": 1')
    for i in range(8):
        (folder / "sheets" / f"step_{i}.png").write_bytes(PNG)
        os.utime(folder / "sheets" / f"step_{i}.png", (i, i))
    return folder


def test_the_numbers_are_those_of_the_lines(folder):
    found = Page(run_report(folder)).summary
    # Two student steps of 4 s, eight critic steps of 2 s, a save; 480 tokens a step.
    assert found["Steps"] == "10 of 40"
    assert found["Time in steps"] == "24.0 s" and found["Time of saves"] == "30.0 s"
    assert found["Time left"] == "0 h 03 min, as the last 10 steps took"  # 30 of 5.4 s
    assert found["Mean seconds of a student step"] == "4" and found["Mean seconds of a critic step"] == "2"
    assert found["Tokens per second"] == "200" and found["TFLOP/s of a rank, mean over time"] == "200"
    assert found["MFU, mean over time"] == "-" and found["Share of time waiting for data"] == "25.0%"
    assert found["Peak memory, GiB"] == "51.2" and found["Bad samples of the data"] == "2"
    assert found["Samples with non-finite outputs"] == "1" and found["Samples with non-finite targets"] == "4"


def test_curves_go_through_the_values(folder):
    figures = Page(run_report(folder)).figures
    loss = figures["Loss, weighted sum of the terms"]
    assert loss["legend"] == "studentcritic" and len(loss["lines"]) == 2
    student, critic = ([tuple(map(float, p.split(","))) for p in points.split()] for points in loss["lines"])
    assert len(student) == 2 and len(critic) == 8
    # From step 1, 100, in the upper left corner to step 10, 10, in the lower right.
    assert student[0] == (64.0, 8.0) and critic[-1] == (548.0, 196.0)
    middle = figures["Loss of the fake score"]["lines"][0].split()
    # 1000 / step^2 from step 2 to step 10, in logarithms.
    heights = [float(p.split(",")[1]) for p in middle]
    assert (heights[0], heights[-1]) == (8.0, 196.0)
    fall = (heights[2] - heights[0]) / (heights[-1] - heights[0])  # to step 4
    assert fall == pytest.approx(math.log(4 / 2) / math.log(10 / 2), abs=0.001)
    assert figures["Norm of the gradient"]["lines"] and "Gaps to the teacher" not in figures  # nothing was logged of these


def test_events_and_the_newest_sheets_are_shown(folder):
    text = run_report(folder)
    page = Page(text)
    head, failed, saved, started = page.tables["events"]
    assert head == ["time, UTC", "after step", "event", ""]
    assert failed[1:] == ["5", "wandb_failed", f"error {HOSTILE}"]
    assert saved == ["2027-01-15 08:01:00", "5", "saved", "seconds 30.25"] and started[3] == "of 40, ranks 8"
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == [f"step_{i}" for i in (7, 6, 5, 4, 3, 2)]
    assert all(base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == PNG for image in images)


def test_the_page_stands_alone_and_holds_text_as_text(folder):
    text = run_report(folder)
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]", re.sub(r"base64,[^\"]*", "", text))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "b"})
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<h1>run &lt;b&gt;1</h1>" in text


def test_long_runs_have_curves_of_means(tmp_path):
    lines = ({"step": i, "phase": "pretrain", "loss": float(i % 2), "seconds": 1.0} for i in range(1, 50_001))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(run_report(tmp_path))
    (points,) = page.figures["Loss, weighted sum of the terms"]["lines"]
    assert 500 < len(points.split()) <= 600 and page.summary["Time in steps"] == "13 h 53 min"
    assert page.summary["Steps"] == "50000" and "Time left" not in page.summary and "events" not in page.tables


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("report_run", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_line(tool, folder, tmp_path, capsys):
    assert tool.main([str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert Page((tmp_path / "page.html").read_text()).summary["Steps"] == "10 of 40"
    assert tool.main([str(folder)]) == 0 and (folder / "report.html").is_file()
    capsys.readouterr()
    for content, message in (
        (None, "no such file"),
        ("", "no line of a step"),
        ('{"step": \n[1]\n3\n{}\n', "no line of a step"),
    ):
        run = tmp_path / "other"
        run.mkdir(exist_ok=True)
        if content is not None:
            (run / "log.jsonl").write_text(content)
        assert tool.main([str(run)]) == 2 and not (run / "report.html").exists()
        assert re.fullmatch(rf"error: \S*other/log.jsonl: {message}.*\n", capsys.readouterr().err)
    assert tool.main([str(folder), "--out", str(tmp_path / "nowhere" / "page.html")]) == 2
    assert "nowhere/page.html: No such file" in capsys.readouterr().err
