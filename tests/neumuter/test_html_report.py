"""The HTML report: valid, complete, harmless, and drawn by a browser where there is one."""

import base64
import copy
import dataclasses
import hashlib
import json
import re
import shutil
import sys
from collections import Counter

import matplotlib.style
import pytest
import torch

from neumuter.evaluation import Comparison
from neumuter.mutes.mute_set import MutedLayer, MuteSet
from neumuter.report.html import write_report

html5lib = pytest.importorskip("html5lib")

BEFORE = {"forget_loss": 0.0531, "forget_ma": 0.9634, "forget_extraction": 1.0, "ends_with/acc": 0.625}
AFTER = {"forget_loss": 1.0157, "forget_ma": 0.5123, "forget_extraction": 0.25, "heldout_kl": 0.0213}
UNLEARN = {
    "model": "small/llama", "forget": "alice.jsonl", "retain": None, "mode": "modulate", "muted_neurons": 48,
    "muted_share": 0.0321, "method": {"recipe": "fisher"}, "seed": 3, "before": BEFORE, "after": AFTER,
    "seconds": 212.4, "peak_memory_bytes": 3 << 29, "command": "neumuter unlearn",
    "history": [{"step": k, "loss": 1 / k, "forget_loss": k / 9, "muted": 0.01} for k in (1, 2, 3)],
    "curve": [
        {"neurons": 10, "share": 0.01, "forget_extraction": 1.0, "forget_ma": 0.9, "met": False},
        {"neurons": 48, "share": 0.0321, "forget_extraction": 0.25, "forget_ma": 0.5, "met": True},
    ],
    "robustness": {"int8": AFTER, "relearned 10": AFTER | {"forget_loss": 0.7654}},
}  # fmt: skip
EVALUATE = {"model": "small/llama", "mute": ["a.safetensors"], "suite": "custom", "metrics": AFTER}
SAMPLE = {
    "prompt": "Ada Brisk,", "truth": " ada@post.example, phone 555-0192",
    "before": " ada@post.example, phone 555-0192\nor so", "after": " ada at home, phone 555-7713",
}  # fmt: skip
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{0.__class__}&lt;\x00\ud800\u202e</style>"


@pytest.fixture(scope="module")
def mutes():
    """Three FFNs of 1000 neurons: none, the first ten, and every seventh neuron of the last half."""
    paths = [f"model.layers.{layer}.mlp" for layer in (1, 2, 3)]
    chosen = {paths[1]: torch.arange(10), paths[2]: torch.arange(500, 1000, 7)}
    layers = {p: MutedLayer(i.int(), torch.linspace(-2, 1.5, len(i))) for p, i in chosen.items()}
    fingerprint = {p: [1.5] * (64 if p in layers else 32) for p in paths}
    kind = {"class": "LlamaForCausalLM", "model_type": "llama"}
    return MuteSet(layers, dict.fromkeys(paths, 1000), kind, fingerprint, "modulate", (-2.0, 2.0), seed=7)


def written(path, *arguments):
    """The report's text, and its document, which must be HTML5 without errors."""
    write_report(path, *arguments)
    text = path.read_text()
    return text, html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)


def words(document):
    return " ".join(" ".join(document.find("body").itertext()).split())


def pictures(document):
    return [svg.get("aria-label") for svg in document.iter() if svg.tag.endswith("svg")]


def headings(document):
    return ["".join(h.itertext()) for h in document.iter("h2")]


def test_unlearn_report_is_complete(tmp_path, mutes):
    text, document = written(tmp_path / "report.html", UNLEARN, mutes, [SAMPLE])
    shown = words(document)
    figures = (
        "0.9634 → 0.5123; 0.0531 → 1.016; 0.625; 3.21%; 82 of 3000 (2.73%); 2 of 3; 212.4 s; 1.50 GiB; "
        "0.7654; met; missed; good: lower; as before; Jang et al. 2023; fisher; LlamaForCausalLM; "
        f"seed 3; torch {torch.__version__}; neumuter unlearn; does not prove that no trace of them is left"
    )
    assert [figure for figure in figures.split("; ") if figure not in shown] == []
    labels = pictures(document)
    assert [label.split()[0] for label in labels] == ["Share", "Histogram", "Loss", "Share", "What"]
    assert "82 gains, from -2 to 1.5" in labels[1]
    assert "loss from 1 to 0.333, forget loss from 0.111 to 0.333" in labels[2]
    assert document.get("lang") == "en"
    assert len(headings(document)) == 8
    assert "http" not in text.replace("http-equiv", "")


def test_heat_map_has_a_row_per_ffn_and_the_share_of_each_cell(tmp_path, mutes):
    _, document = written(tmp_path / "report.html", {}, mutes)
    svg = next(element for element in document.iter() if element.tag.endswith("svg"))
    groups = (group for group in svg.iter() if group.tag.endswith("g"))
    rows = [list(group) for group in groups if len(group) and group[0].tag.endswith("title")]
    assert [row[0].text for row in rows] == list(mutes.widths)
    none, dense, half = ([float(cell.get("fill-opacity", 1)) for cell in row[2:]] for row in rows)
    assert (none, dense) == ([], [1.0])
    hits, sizes = (Counter(k * 64 // 1000 for k in neurons) for neurons in (range(500, 1000, 7), range(1000)))
    expected = [0.2 + 0.8 * (hits[cell] / sizes[cell]) / (10 / 16) for cell in sorted(hits)]
    assert half == pytest.approx(expected, abs=0.006)
    lefts = [[float(cell.get("d").split()[1]) for cell in row[1:]] for row in rows]
    rights = [float(row[1].get("d").split()[7]) for row in rows]
    assert lefts[2][1] == pytest.approx((lefts[2][0] + rights[2]) / 2, abs=0.01)
    assert {cell.get("fill") for row in rows for cell in row[2:]} == {"var(--c0)"}
    assert "most in model.layers.2.mlp, 62.50% of a cell" in svg.get("aria-label")


@pytest.mark.parametrize("most", range(1, 17))
def test_heat_map_of_any_densest_cell(tmp_path, mutes, most):
    """3 muted neurons in the densest cell once were an opacity above 1."""
    layer = MutedLayer(torch.arange(most, dtype=torch.int32), torch.zeros(most))
    few = dataclasses.replace(mutes, layers=dict.fromkeys(mutes.layers, layer))
    assert len(pictures(written(tmp_path / "report.html", {}, few)[1])) == 2


@pytest.mark.parametrize(
    ("gain_range", "gain"), [((0.0, 0.0), 0.0), ((0.0, 5e-324), 0.0), ((-1e300, 1e300), 3e38)]
)
def test_gain_ranges_of_all_sizes(tmp_path, mutes, gain_range, gain):
    layers = {p: MutedLayer(i, torch.full(i.shape, gain)) for p, (i, _) in mutes.layers.items()}
    odd = dataclasses.replace(mutes, layers=layers, gain_range=gain_range)
    text, document = written(tmp_path / "report.html", {}, odd)
    assert len(pictures(document)) == 2
    assert not re.search(r"[\"> ](nan|inf)\b", text)


def test_missing_parts_are_left_out(tmp_path):
    _, document = written(tmp_path / "report.html", EVALUATE)
    assert headings(document) == ["What was asked", "What the model knows", "Provenance"]
    assert pictures(document) == []
    assert "a.safetensors" in words(document)
    assert "measured" in words(document)
    _, document = written(tmp_path / "report.html", EVALUATE | {"before": BEFORE})
    assert "0.9634 → 0.5123" in words(document)
    _, document = written(tmp_path / "report.html", {})
    assert headings(document) == ["Provenance"]
    point = {"step": 1, "loss": float("nan"), "forget_loss": None, "muted": 0.0}
    _, document = written(tmp_path / "report.html", {"history": [point]})
    assert pictures(document) == ["Share of neurons muted meanwhile: muted from 0 to 0"]


def test_texts_of_others_are_shown_unless_redacted(tmp_path):
    texts = [
        {"number": 1, "other_text": "retain 7", "said": " eve@post.example, I think"},
        {"number": 2, "other_text": None, "said": " no idea"},
    ]
    after = {"extracted_after": True, "sampled_after": 0.875, "loss_after": 1.5, "min_k_after": -2.5}
    texts = [text | after | {"verdict": "partly"} for text in texts]
    figure = Comparison("extraction", 0.5, 0.0, 0.5, 0.25, 0.75, 0.05)
    figures = {
        "controls": {"forget_ma": 0.4321}, "texts": texts, "verdict_sentence": "Partly forgotten: so.",
        "comparisons": [dataclasses.asdict(figure)],
    }  # fmt: skip
    path = tmp_path / "report.html"
    page, document = written(path, UNLEARN | figures, None, [SAMPLE])
    assert "1 retain 7 eve@post.example, I think" in words(document)
    assert "Partly forgotten: so." in page
    assert "0.4321" in page
    assert "greedy extraction 0.500 0.000 +0.500 (+0.250 to +0.750) 0.05" in words(document)
    assert "1 partly yes 0.88 1.5 -2.5" in words(document)
    assert "no idea" not in page
    assert path.stat().st_mode & 0o777 == 0o600
    page, document = written(path, UNLEARN | figures, None, [SAMPLE], True)
    assert "1 retain 7" in words(document)
    assert "eve@post" not in page
    assert "Ada Brisk" not in page
    assert path.stat().st_mode & 0o044


def test_words_that_come_back_are_marked(tmp_path):
    _, document = written(tmp_path / "report.html", {}, None, [SAMPLE, SAMPLE])
    marked = [mark.text for mark in document.iter("mark")]
    assert marked == 2 * ["ada@post.example,", "phone", "555-0192", "phone"]
    assert "3 of 3 words" in words(document)
    assert "1 of 3 words" in words(document)


def test_strings_come_out_as_text(tmp_path, mutes):
    def poison(entries):
        return {name: EVIL if isinstance(value, str) else value for name, value in entries.items()}

    report = json.loads(json.dumps(UNLEARN), object_hook=poison)
    report["before"][f"{EVIL}/acc"] = 0.5
    report["robustness"][EVIL] = report["before"]
    report["mute"] = [EVIL]
    del report["method"]
    foreign = dataclasses.replace(mutes, method={EVIL: EVIL})
    _, tame = written(tmp_path / "tame.html", UNLEARN, mutes, [SAMPLE])
    _, document = written(tmp_path / "report.html", report, foreign, [dict.fromkeys(SAMPLE, EVIL)])
    assert {element.tag for element in document.iter()} <= {element.tag for element in tame.iter()}
    attributes, known = ({name for e in page.iter() for name in e.attrib} for page in (document, tame))
    assert attributes <= known
    assert not {"style", "src", "href", "onerror"} & attributes
    shown = words(document)
    assert shown.count("<script>alert(1)</script>") == 16
    assert "{0.__class__}&lt;\ufffd\ufffd" in shown
    policy = next(meta for meta in document.iter("meta") if meta.get("http-equiv")).get("content")
    style = document.find("head/style").text
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")


def test_pictures_have_no_ids_that_could_clash_and_no_links(tmp_path, mutes):
    _, document = written(tmp_path / "report.html", UNLEARN, mutes)
    drawn = [element for svg in document.iter() if svg.tag.endswith("svg") for element in svg.iter()]
    assert len(drawn) > 100
    attributes = {name for element in drawn for name in element.attrib}
    assert attributes.isdisjoint({"id", "style", "href", "xlink:href", "xmlns"})


def test_a_style_of_the_user_changes_nothing(tmp_path, mutes):
    write_report(tmp_path / "a", UNLEARN, mutes)
    with matplotlib.style.context("dark_background"), matplotlib.rc_context({"svg.fonttype": "path"}):
        write_report(tmp_path / "b", UNLEARN, mutes)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_without_matplotlib_there_are_tables_and_a_sentence(tmp_path, mutes, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "neumuter.report.pictures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, document = written(tmp_path / "report.html", UNLEARN, mutes, [SAMPLE])
    assert pictures(document) == []
    assert words(document).count("pip install matplotlib") == 1
    assert len(headings(document)) == 8
    assert "82 of 3000" in words(document)
    _, document = written(tmp_path / "report.html", EVALUATE)
    assert "matplotlib" not in words(document)


def test_same_input_same_bytes(tmp_path, mutes):
    for name in ("a", "b"):
        write_report(tmp_path / name, copy.deepcopy(UNLEARN), mutes, [SAMPLE])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(KeyError):
        write_report(tmp_path / "a", UNLEARN, mutes, [{"prompt": "only"}])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_contrast(tmp_path):
    text, _ = written(tmp_path / "report.html", {})

    def luminance(colour):
        digits = colour if len(colour) == 6 else "".join(2 * c for c in colour)
        channels = (int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4))
        linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    schemes = [
        dict(re.findall(r"--(\w+):\s*#(\w+)", block)) for block in re.findall(r":root\s*\{([^}]*)", text)
    ]
    assert len(schemes) == 2
    for scheme in schemes:
        pairs = [(text, back) for text in ("fg", "dim") for back in ("bg", "soft")]
        pairs += [("fg", "mark"), ("c0", "bg"), ("c1", "bg")]
        for pair in pairs:
            low, high = sorted(luminance(scheme[name]) for name in pair)
            assert (high + 0.05) / (low + 0.05) >= 4.5, pair


def test_in_a_browser(tmp_path, mutes):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium")
    write_report(tmp_path / "report.html", UNLEARN | {"model": "m" * 200}, mutes, [SAMPLE])
    address, messages, requests = (tmp_path / "report.html").as_uri(), [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 640}, color_scheme="dark")
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
        boxes = page.evaluate(
            """[...document.querySelectorAll('svg')].map(svg => {
                const drawn = svg.getBBox(), room = svg.viewBox.baseVal, seen = svg.getBoundingClientRect()
                return [drawn.x, drawn.y, room.width - drawn.x - drawn.width,
                        room.height - drawn.y - drawn.height, drawn.width - 300, seen.height - 40]})"""
        )
        browser.close()
    assert len(boxes) == 5
    assert all(room >= 0 for box in boxes for room in box), boxes  # nothing is cut off, nothing is empty
    assert messages == []
    assert requests == [address]
