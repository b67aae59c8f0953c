"""The command, and the pages that are made from its results."""

import re

import pytest
import torch

from bench import ROOT, picture, report, rows, stub_gpu, tables
from bench import __main__ as command
from bench.models import scale, step
from bench.unlearning import cells, page, synth

MACHINE = {"gpu": None, "cpu": "some CPU", "threads": 2, "date": "2026-01-01"}


@pytest.fixture
def pages(monkeypatch, tmp_path):
    """Pages, templates and results of the test's own; a function writes a template."""
    for name in ("DOCS", "TEMPLATES"):
        monkeypatch.setattr(report, name, tmp_path / name.lower())
        (tmp_path / name.lower()).mkdir()
    results = tmp_path / "results"
    monkeypatch.setattr(command, "RESULTS", results)
    found = {name: (results / name, *rest) for name, (_, *rest) in report.PAGES.items()}
    monkeypatch.setattr(report, "PAGES", found)
    for name in found:
        (report.TEMPLATES / f"{name}.md").write_text("# Nothing\n")
    return lambda name, text: (report.TEMPLATES / f"{name}.md").write_text(text)


@pytest.fixture
def run(monkeypatch):
    """Runs ``python -m bench ...``, with as many threads afterwards as before."""
    threads = torch.get_num_threads()

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["bench", *arguments])
        return command.main()

    yield run
    torch.set_num_threads(threads)


TEMPLATE = """# Performance
{{machines FILE}}
{{checks FILE}}
{{activations FILE forward+backward}}
{{projections FILE}}
{{losses FILE}}
{{steps FILE}}
{{decoding FILE}}
{{serving FILE}}
{{selection FILE}}
{{launching nvidia-card}}
"""


def test_every_benchmark_gives_rows_and_the_page_shows_them(run, pages, tmp_path, monkeypatch, capsys):
    # tests/bench/test_step.py and test_scale.py have these.
    monkeypatch.setattr(step, "peak_mib", lambda *about: 1.0)
    monkeypatch.setattr(scale, "SMALL_CASES", {("read", "demo"): (8,)})
    folder = tmp_path / "results/performance"
    for name in command.BENCHMARKS:
        assert run(name, "--quick", "--out", str(folder)) == 0
    (file,) = folder.glob("*.jsonl")
    found = rows.read(file)
    launching = torch.cuda.is_available() or stub_gpu.why_not() is None
    measured = set(command.BENCHMARKS) - (set() if launching else {"launch"})
    assert {row["benchmark"] for row in found} == measured
    for row in found:
        assert torch.__version__.startswith(row["machine"]["versions"]["torch"].split("+")[0])
        assert all(c["median_us"] > 0 for c in row.get("contenders", ()))
    assert run("select", "--quick", "--out", str(folder)) == 0
    assert rows.read(file) == found  # what is known is not measured again
    assert run("select", "--quick", "--fresh", "--out", str(folder)) == 0
    renewed = rows.read(file)
    for old, new in zip(found, renewed, strict=True):
        assert (old == new) == (old["benchmark"] != "select")

    assert run("report") == 0
    capsys.readouterr()
    assert run("report", "--check") == 1  # the template does not show that file
    assert f"does not show {file.stem}" in capsys.readouterr().out
    pages("performance", TEMPLATE.replace("FILE", file.stem))
    assert run("report", "--check") == 1
    assert run("report") == 0
    assert run("report", "--check") == 0
    text = (report.DOCS / "performance.md").read_text()
    assert text.count("\n| --- |") == 8
    assert "torch.compile" in text
    assert "| `select_muted` | right |" in text
    assert text.count("measured this yet") == 1
    assert "*No GPU has measured this yet.*" in text
    file.write_text(file.read_text().replace('"q1_us": ', '"q1_us": 1'))
    assert run("report", "--check") == 1


def test_quick_times_are_no_results(run):
    with pytest.raises(SystemExit):
        run("kernels", "--quick")


def test_results_show_means_and_extremes(run, pages, tmp_path):
    found = []
    for seed, extraction in ((0, 0.1), (1, 0.3)):
        about = {
            "seed": seed, "model": "small", "forget": 4, "neighbours": "retain", "heldout_perplexity": 50.0,
            "machine": MACHINE,
        }  # fmt: skip
        found.append(about | {"method": "before", "forget_extraction": 1.0, "same_extraction": 1.0})
        ours = {"budget": 0.05, "share": 0.05, "forget_extraction": extraction, "same_extraction": 1.0}
        found += [about | ours | {"method": m, "heldout_perplexity": 51.0} for m in synth.OURS]
    file = tmp_path / "results/results/synth.jsonl"
    rows.write(file, found)
    pages("results", "{{seeds synth}} on {{machine synth}}\n{{models synth}}\n{{people real}}\n")
    assert run("report") == 0
    text = (report.DOCS / "results.md").read_text()
    assert "0.20 (0.10 … 0.30)" in text
    assert "+2.0%" in text
    assert "2 seeds (0, 1) on some CPU, 2 threads, 2026-01-01" in text
    assert "*Not measured yet.*" in text
    assert (report.DOCS / "results-budgets.png").stat().st_size > 1000
    assert run("report", "--check") == 0
    rows.write(file, found[:4])
    assert run("report", "--check") == 1


def test_a_row_is_compared_with_its_own_original():
    found = [
        {"seed": 0, "forget": count, "method": method, "heldout_perplexity": original * times}
        for count, original in ((24, 50.0), (960, 40.0))
        for method, times in (("before", 1.0), ("npo", 1.1))
    ]
    related = cells.relate(found, ("seed", "forget"))
    assert [row["original_perplexity"] for row in related] == [50.0, 50.0, 40.0, 40.0]
    with pytest.raises(ValueError, match=r"two originals of \('seed',\) = \(0,\) differ"):
        cells.relate(found, ("seed",))


def test_the_picture_is_that_of_the_results(run, pages, tmp_path):
    """A change in a row that the picture does not show leaves it as it is."""
    file = tmp_path / "results/performance/card.jsonl"
    entry = {"name": "ours", "median_us": 1.0, "q1_us": 1.0, "q3_us": 1.0, "share_of_limit": 0.5}
    shown = {
        "benchmark": "kernels", "op": "masked_glu", "pass": "forward", "shape": [1, 2], "dtype": "float32",
        "mask_rows": 1, "activation": "silu", "contenders": [entry], "machine": MACHINE,
    }  # fmt: skip
    pages("performance", "{{count card}}")
    rows.write(file, [shown, {"benchmark": "queue"}])
    assert run("report") == 0
    image = report.DOCS / "performance.png"
    before = picture.digest_of(image)
    assert before is not None
    rows.write(file, [shown, {"benchmark": "queue", "status": "done"}])
    assert run("report") == 0
    assert picture.digest_of(image) == before
    rows.write(file, [shown | {"shape": [1, 3]}])
    assert run("report", "--check") == 1
    assert run("report") == 0
    assert picture.digest_of(image) != before


@pytest.mark.parametrize("name", report.PAGES)
def test_templates_name_parts_that_there_are_and_every_part_is_used(name):
    parts = {
        part for part, *_ in report.PLACEHOLDER.findall((ROOT / f"bench/templates/{name}.md").read_text())
    }
    assert parts == set({"performance": tables, "results": page}[name].PARTS)
    assert "{{" not in re.sub(r"`[^`]*`", "", report.render(name))
