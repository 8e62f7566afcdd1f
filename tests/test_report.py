"""Pictures and tables: sizes and pixels of what is written, logs with holes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from rcm_mcore.evaluation.report import contact_sheet, metrics_table, training_curves, write_gif


def videos(n: int, seed: int = 0) -> torch.Tensor:
    """[n, 3, 4, 6] in [0, 1]."""
    return torch.rand(n, 3, 4, 6, generator=torch.Generator().manual_seed(seed))


def as_bytes(image: torch.Tensor) -> np.ndarray:
    return np.round(image.numpy().clip(0, 1) * 255).astype(np.uint8)


def enlarged(image: torch.Tensor, scale: int) -> np.ndarray:
    return np.kron(as_bytes(image), np.ones((scale, scale), np.uint8))


def test_contact_sheet_shows_every_frame(tmp_path: Path) -> None:
    rows = {"data": videos(3) * 1.4 - 0.2, "a longer label": videos(2, seed=1).numpy()}
    contact_sheet(rows, tmp_path / "plain.png", scale=5)
    contact_sheet(rows, tmp_path / "captions.png", captions=["one", "two", "three"], scale=5)
    plain, captions = (np.array(Image.open(tmp_path / name)) for name in ("plain.png", "captions.png"))
    assert (captions.shape[0] - plain.shape[0], captions.shape[1]) == (24, plain.shape[1])
    assert (captions[24:] == plain).mean() > 0.99, "captions move the rest down"
    assert captions[:24].min() == 0, "captions are drawn"
    column = 3 * 6 * 5 + 2 * 2 + 10
    assert plain.shape[0] == 10 + 2 * (4 * 5 + 10)
    label_width = plain.shape[1] - 3 * column
    assert 100 < label_width < 140, "the longer label at 14 points"
    assert plain[10:30, :label_width].min() == 0 and plain[40:60, :label_width].min() == 0, "labels are drawn"
    for row, values in enumerate(rows.values()):
        for i, video in enumerate(values):
            for j, frame in enumerate(video):
                y, x = 10 + row * 30, label_width + i * column + j * (6 * 5 + 2)
                assert (plain[y : y + 20, x : x + 30] == enlarged(torch.as_tensor(frame), 5)).all()
    assert (plain[40:60, label_width + 2 * column :] == 255).all(), "a shorter row is left blank"


def test_gif_plays_every_frame(tmp_path: Path) -> None:
    clips = videos(5)
    write_gif(clips, tmp_path / "a.gif", columns=3, scale=2, frames_per_second=8)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size == (3 * 14 - 2, 2 * 10 - 2)
        assert gif.n_frames == 3 and gif.info["loop"] == 0
        for frame in range(3):
            gif.seek(frame)
            assert gif.info["duration"] in (120, 125, 130)  # GIF counts in hundredths
            shown = np.array(gif.convert("L"))
            assert (shown[0:8, 14:26] == enlarged(clips[1, frame], 2)).all()
            assert (shown[10:18, 14:26] == enlarged(clips[4, frame], 2)).all()
            assert (shown[10:, 28:] == 255).all()
    write_gif(clips[:2], tmp_path / "b.gif")
    with Image.open(tmp_path / "b.gif") as gif:
        assert gif.size == (2 * 26 - 2, 16), "no wider than the videos"


def test_training_curves_read_logs_with_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, tuple[list[int], list[float]]] = {}
    plot = Axes.plot

    def record(self, x, y, **kwargs):
        if "label" in kwargs:
            drawn[f"{self.get_title()}/{kwargs['label']}"] = (list(x), list(y))
        return plot(self, x, y, **kwargs)

    monkeypatch.setattr(Axes, "plot", record)
    for name in ("teacher", "student"):
        (tmp_path / name).mkdir()
    lines = [json.dumps({"step": step, "phase": "pretrain", "loss": 1.0 / step, "lr": 1.0}) for step in range(1, 4)]
    (tmp_path / "teacher" / "log.jsonl").write_text("\n".join(lines))
    records = [
        {"step": 1, "loss": 3.0, "loss_scm": 1.0, "g_norm": 20.0},
        {"step": 2, "loss": 2.0, "loss_scm": None, "loss_critic": 5.0, "g_norm": None},
        {"step": 3, "loss": 9.0, "loss_scm": 9.0, "g_norm": 90.0},
        {"step": 3, "loss": 4.0, "loss_scm": 4.0, "g_norm": 30.0},
        {"step": 4, "loss": float("nan")},
    ]
    text = "\n".join(json.dumps(record) for record in records) + '\n{"step": 5, "lo'
    (tmp_path / "student" / "log.jsonl").write_text(text)
    training_curves([tmp_path / "teacher" / "log.jsonl", tmp_path / "student" / "log.jsonl"], tmp_path / "curves.png")
    assert drawn == {
        "teacher: loss/loss": ([1, 2, 3], [1.0, 0.5, 1.0 / 3]),
        "student: loss/loss_scm": ([1, 3], [1.0, 4.0]),
        "student: loss/loss_critic": ([2], [5.0]),
        "student: tangent norm before normalisation/g_norm": ([1, 3], [20.0, 30.0]),
    }
    picture = np.array(Image.open(tmp_path / "curves.png").convert("L"))
    assert picture.shape == (704, 1210) and picture.min() < 50 and picture.std() > 10


def test_curves_get_a_running_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, titles = [], set()
    plot = Axes.plot

    def record(self, x, y, **kwargs):
        titles.add(self.get_title())
        drawn.append((list(x), list(y)))
        return plot(self, x, y, **kwargs)

    monkeypatch.setattr(Axes, "plot", record)
    rows = [{"step": step, "loss": float(step % 2)} for step in range(100)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    training_curves({"named": tmp_path / "log.jsonl"}, tmp_path / "curves.png")
    assert titles == {"named: loss"} and [len(x) for x, _ in drawn] == [100, 99]
    assert drawn[1][0][0] == 1 and all(abs(value - 0.5) <= 1e-12 for value in drawn[1][1])


def test_metrics_table() -> None:
    rows = [
        {"sampler": "real | data", "evaluations": None, "Frechet": 1.0449, "n": 400},
        {"sampler": "student, 4", "evaluations": 4, "Frechet": 123.456, "speed": 12345.6},
    ]
    assert metrics_table(rows) == (
        "| sampler | evaluations | Frechet | n | speed |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| real \\| data | - | 1.04 | 400 | - |\n"
        "| student, 4 | 4 | 123 | - | 12346 |\n"
    )
    assert "| nan | 0.00100 |" in metrics_table([{"a": float("nan"), "b": 0.001}])


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda path: contact_sheet({}, path), "rows: nothing to show"),
        (lambda path: contact_sheet({"a": videos(2)[0]}, path), r"rows\['a'\]: shape \[3, 4, 6\]"),
        (lambda path: contact_sheet({"a": videos(2)[:0]}, path), r"rows\['a'\]: shape \[0, 3, 4, 6\]"),
        (lambda path: contact_sheet({"a": videos(2) / 0}, path), r"rows\['a'\]: has NaN or infinite"),
        (lambda path: contact_sheet({"a": videos(2), "b": videos(2)[:, :2]}, path), "all rows must have the same"),
        (lambda path: contact_sheet({"a": videos(2)}, path, captions=["x"]), "captions: 1 for 2 columns"),
        (lambda path: write_gif(videos(2)[0], path), r"videos: shape \[3, 4, 6\]"),
        (lambda path: write_gif(videos(2) * torch.nan, path), "videos: has NaN"),
        (lambda path: training_curves([], path), "logs: nothing to plot"),
        (lambda path: training_curves([path.with_name("log.jsonl")], path), "log.jsonl: no line with a step"),
        (lambda path: metrics_table([]), "rows: nothing to tabulate"),
    ],
)
def test_bad_input(call, text: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("{}\nnothing\n[1]\n")
    with pytest.raises(ValueError, match=text):
        call(tmp_path / "out")
    assert not (tmp_path / "out").exists()
