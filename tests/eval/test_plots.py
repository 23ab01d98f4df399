"""The pictures of results: what stands in them, and that all are redrawn from their files."""

import json
import shutil
from pathlib import Path

import pytest

from modeling_rebased.eval import plot_style, plots


RESULTS = Path(__file__).resolve().parents[2] / "eval" / "results"


def tick_labels(figure) -> list[str]:
    """The labels of a figure that has been saved, and so drawn."""
    lines = [line for axis in figure.axes for line in (axis.xaxis, axis.yaxis)]
    return [label.get_text() for line in lines for label in line.get_ticklabels(which="both") if label.get_text()]


def texts(axis) -> dict[str, str]:
    """The names beside the lines, and their colours."""
    return {text.get_text(): text.get_color() for text in axis.texts}


def test_all_pictures_are_drawn_again_from_their_files(tmp_path, figures):
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder, ignore=shutil.ignore_patterns("*.png"))
    plots.main([str(folder)])
    drawn = {path.relative_to(folder) for path in folder.glob("**/*.png")}
    assert drawn == {path.relative_to(RESULTS) for path in RESULTS.glob("**/*.png")}
    for figure in figures:
        assert all(axis.has_data() for axis in figure.axes)  # no empty panels
        assert not any("mathdefault" in label or "^" in label for label in tick_labels(figure))


def test_the_picture_of_several_gpus_has_shares_of_the_fewest(tmp_path, figures):
    rows = [
        {"gpu": "H200", "launch": launch, "gpus": gpus, "parameters": size, "tokens_per_s": speed, "tflops_per_gpu": 9}
        for launch, gpus, size, speed in (
            ("fsdp2", 4, 2_000_000_000, 360),
            ("fsdp2", 2, 2_000_000_000, 200),
            ("one", 1, 150_000_000, 50),
            ("ddp", 4, 150_000_000, 150),
        )
    ]
    plots.plot_several_gpus(rows, tmp_path / "several_gpus.png")
    share, _ = figures[0].axes
    assert [label.get_text() for label in share.texts] == ["1.00", "0.75", "1.00", "0.90"]
    names = [tick.get_text().replace("\n", " ") for tick in share.get_xticklabels()]
    assert names == ["150M 1 GPU", "150M DDP 4 GPUs", "2,000M FSDP2 2 GPUs", "2,000M FSDP2 4 GPUs"]


@pytest.mark.parametrize("features", [16, 64])
def test_the_kernels_picture_says_its_sizes_and_names_its_lines(tmp_path, figures, features):
    row = {"F": features, "B": 4, "H": 12, "forward_ms": 0.2, "training_ms": 2.0}
    floors = {"floor_forward_ms": 0.1, "floor_training_ms": 0.4}
    methods = ("rebased", "softmax", "retention power_retention, chunks of 1024")
    rows = [{"method": method, "T": length, **row, **floors} for method in methods for length in (512, 2048)]
    title = plots.kernels_title(rows, {"gpu": "NVIDIA H100"}, 32, 65536)
    plots.plot_kernels(rows, title, tmp_path / "kernels.png")
    title = figures[0]._suptitle.get_text()
    assert f"F = {features} " in title and "D = 32 " in title and "65,536 tokens" in title
    for axis in figures[0].axes:
        named = texts(axis)
        assert named["ReBased"] == plot_style.color_of("rebased") and named["softmax"] == plot_style.color_of(
            "softmax"
        )
        assert "retention" in named
        colors = {line.get_color() for line in axis.get_lines()}
        assert set(named.values()) - {"#777777"} <= colors
    assert {"512", "2,048"} <= set(tick_labels(figures[0]))


def test_a_folder_without_results_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        plots.main([str(tmp_path)])
    assert f"{tmp_path} holds no files of results" in capsys.readouterr().err


def test_a_model_without_a_style_keeps_its_name_and_gets_a_colour_of_its_own():
    models = ["rebased", "mine", "yours"]
    colors = [plot_style.color_of(model, models) for model in models]
    assert len(set(colors)) == 3 and plot_style.label_of("mine") == "mine"


def test_colours_and_names_are_each_used_once():
    names, colors = zip(*plot_style.STYLES.values())
    assert len(set(names)) == len(names) and len(set(colors)) == len(colors)


def test_the_slices_picture_has_the_losses_of_the_file(tmp_path, figures):
    found = json.loads((RESULTS / "recall_slices" / "slices.json").read_text())
    plots.plot_slices(found, tmp_path / "slices.png")
    left, right = figures[0].axes
    heights = [bar.get_height() for bar in left.patches]
    assert heights == pytest.approx([row["loss"] for model in found.values() for row in model["slices"]])
    assert set(texts(right)) == {"ReBased", "Based", "softmax"}
