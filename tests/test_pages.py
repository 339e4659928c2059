"""The pages of reports, driven in headless Chromium where one is installed.

One browser is started, with DevTools on two pipes; messages are JSON with a zero byte at the end.
"""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import ROOT, read_rows, write_jsonl
from matplotlib.figure import Figure
from test_report import SUMMARY, change_config, evaluated_rows, make_evaluation, make_run

from preflab.reports.charts import chart_of
from preflab.reports.markdown_page import write_markdown_page
from preflab.reports.page import write_page
from preflab.reports.plot_style import COLOR_CYCLE, LINE_STYLES, marker, style
from preflab.reports.run import write_report
from preflab.reports.runs import Group, Run, find_runs
from preflab.reports.sweep import write_comparison
from preflab.reports.sweep_plots import frontier_figure
from preflab.reports.tables import Table
from utils import mean_and_error

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--remote-debugging-pipe"),
)


class Browser:
    """A tab of Chromium: what its pages request, and the errors of their scripts."""

    def __init__(self, profile):
        (reads, self._out), (self._in, writes) = os.pipe(), os.pipe()
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        shell = f'exec "$@" 3<&{reads} 4>&{writes}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(reads, writes),
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self._buffer, self._number, self._session = b"", 0, None
        self.requests, self.errors, self.events = [], [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self):
        while b"\0" not in self._buffer:
            piece = os.read(self._in, 1 << 20)
            assert piece, "the browser has ended"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        method, values = event.get("method"), event.get("params", {})
        self.events.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(values["exceptionDetails"]["exception"].get("description"))
        elif method == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.errors.append(values["entry"]["text"])

    def open(self, path, *, width=1400, scheme="light"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.requests, self.errors, self.events = [], [], []
        self.call("Page.navigate", url=f"file://{path}")
        while "Page.loadEventFired" not in self.events:
            self._note(self._next())

    def js(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def move(self, x, y):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        self._process.wait(timeout=20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


# --------------------------------------------------------------------------------------- the pages

LOSSES = [
    *("dpo", "ipo", "odpo", "cal-dpo", "tdpo2", "simpo"),
    *("orpo", "cpo", "kto", "robust", "a-rather-long-name-of-a-loss-of-a-user"),
]
WORDS = [
    "the",
    "soup",
    "was",
    "cold",
    "and",
    "we",
    "loved",
    "every",
    "dish",
    "that",
    "they",
    "served",
    "on",
    "a",
    "warm",
    "evening",
]


def samples_of(rng, n, **more):
    return [
        {
            "examples": 128,
            "prompt": f"We went to restaurant {i}.",
            "policy": " ".join(WORDS[:3] + rng.choices(WORDS, k=6)),
            "reference": " ".join(WORDS[:9]),
            "chosen": " ".join(WORDS),
            "policy_reward": {"lexicon": rng.random()},
            "reference_reward": {"lexicon": 0.5},
            "kl": 3 * rng.random(),
            "policy_tokens": rng.randint(5, 40),
            "temperature": 1.0,
        }
        | more
        for i in range(n)
    ]


def make_sweep(folder, rng):
    for i, loss in enumerate(LOSSES):
        for seed in (0, 1):
            summary = SUMMARY | {"policy_reward": 1 + i / 10 + seed / 5}
            run = make_run(folder / f"{loss}-{seed}", loss=loss, seed=seed, summary=summary)
            write_jsonl(run / "samples.jsonl", samples_of(rng, 45))


def make_online(folder):
    make_run(folder, summary=SUMMARY | {"labels_bought": 60, "rounds": 20}, sampled=False)
    rounds = [
        {
            "examples": r,
            "split": "online",
            "round": r,
            "online/gold_reward": r % 3 + r / 20,
            "online/kl": r / 5,
            "online/labels_bought": 3 * r,
            "online/label_accuracy": None if r == 7 else 0.5,  # one round of ties
        }
        for r in range(1, 21)
    ]
    steps = [row for row in read_rows(folder / "metrics.jsonl") if row["split"] == "eval"]
    write_jsonl(folder / "metrics.jsonl", steps + rounds)


def make_checkpoints(folder, rng):
    make_evaluation(folder, {("a", 1.0): 1.0})
    rows = evaluated_rows()
    write_jsonl(folder / "eval.jsonl", rows)
    keys = ("checkpoint", "temperature")
    samples = [samples_of(rng, 4, **{key: row[key] for key in keys}) for row in rows]
    write_jsonl(folder / "samples.jsonl", [sample for of_row in samples for sample in of_row])
    rates = [
        {key: row[key] for key in keys}
        | {"against": "reference", "by": "reward lexicon", "win_rate": 0.5, "low": 0.4}
        | {"high": 0.6, "wins": 2}
        for row in rows
    ]
    (folder / "winrates.json").write_text(json.dumps(rates))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of a run, of an online run, of an evaluation and of a sweep, without the other files of
    the pictures, which take most of the time."""
    folder = tmp_path_factory.mktemp("pages")
    rng = random.Random(0)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("png", "svg"):
            patch.setattr(f"preflab.reports.page.{name}", lambda figure: b"")
        make_run(folder / "run")
        write_jsonl(folder / "run" / "samples.jsonl", samples_of(rng, 45))
        change_config(folder / "run", exp_name="a-name_without-an-end" * 8)
        make_online(folder / "online")
        make_checkpoints(folder / "evaluation", rng)
        for name in ("run", "online", "evaluation"):
            write_report(folder / name)
        runs = [Run(folder / "run")]
        study = (ROOT / "experiments" / "results" / "study-quick" / "study.md").read_text()
        (folder / "study").mkdir()
        charts = [chart_of("Frontier", frontier_figure([Group({"loss.name": "dpo"}, runs)]))]
        write_markdown_page(folder / "study", study, charts)
        make_sweep(folder / "sweep", rng)
        write_comparison(folder / "sweep", find_runs(folder / "sweep")[0])
    return folder


KINDS = ("run", "online", "evaluation", "sweep", "study")

# ----------------------------------------------------------------------- errors, widths and colors

CUT_OFF = """(() => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  const width = document.documentElement.clientWidth;
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    if (element.closest("pre") || element.closest("[hidden]")) continue;
    const box = element.getBoundingClientRect();
    const isText = element instanceof SVGTextElement;
    const frame = isText && element.ownerSVGElement.getBoundingClientRect();
    const isOut = box.right > width + 1 || box.left < -1
      || isText && (box.right > frame.right + 1 || box.left < frame.left - 1
        || box.bottom > frame.bottom + 1 || box.top < frame.top - 1)
      || !element.closest("svg") && element.scrollWidth > element.clientWidth + 1
        && element.clientWidth && getComputedStyle(element).display !== "inline";
    if (isOut) found.push(element.outerHTML.slice(0, 200));
  }
  return found;
})()"""


@needs_chromium
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_cut_off_fails_or_is_loaded(browser, pages, kind):
    page = pages / kind / "report.html"
    for width in (1400, 400):
        browser.open(page, width=width)
        assert browser.js("innerWidth") == width
        assert browser.js(CUT_OFF) == []
        assert browser.errors == []
        assert browser.requests == [f"file://{page}"]
        assert browser.js("document.querySelectorAll('figure svg').length") > 0
        small = "[...document.querySelectorAll('figure text')].map((text) => text"
        assert min(browser.js(f"{small}.getBoundingClientRect().height)")) >= 11


@needs_chromium
def test_the_checks_see_what_is_wrong(browser, pages, tmp_path):
    """A page that is too wide, throws and loads a picture."""
    wrong = (
        "<div style='width: 3000px'>x</div><img src='other.png'><script>throw Error('no')</script>"
    )
    page = (pages / "run" / "report.html").read_text().replace("</h1>", f"</h1>{wrong}")
    (tmp_path / "wrong.html").write_text(page)
    browser.open(tmp_path / "wrong.html", width=400)
    assert any("3000px" in element for element in browser.js(CUT_OFF))
    assert any("Error: no" in error for error in browser.errors)
    assert f"file://{tmp_path}/other.png" in browser.requests


COLORS_OF = """(() => {
  const color = (element, name) =>
    getComputedStyle(element)[name].match(/[0-9.]+/g).slice(0, 3).map(Number);
  const lines = document.querySelectorAll(".series .line, .series .dots");
  return [color(document.body, "color"), color(document.body, "backgroundColor"),
    color(document.querySelector("figure"), "backgroundColor"),
    [...lines].map((line) => color(line, line.matches(".line") ? "stroke" : "fill"))];
})()"""


def luminance(rgb):
    c = np.array(rgb, float) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a, b):
    """Of WCAG 2: from 1 to 21."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@needs_chromium
def test_a_dark_page_has_light_text_and_lines(browser, pages):
    for scheme, least in (("light", 2.0), ("dark", 4.0)):
        browser.open(pages / "sweep" / "report.html", scheme=scheme)
        text, page, figure, lines = browser.js(COLORS_OF)
        assert (luminance(page) < 0.1) == (scheme == "dark")
        assert contrast(text, page) > 10
        assert len(lines) > 20 and min(contrast(line, figure) for line in lines) > least


# ------------------------------------------------------------------------------- hover and legends


def center_of(browser, expression):
    """Where the middle of an element is in the window, after scrolling to it."""
    return browser.js(
        f"(() => {{ const e = {expression}; e.scrollIntoView({{block: 'center'}});"
        " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()"
    )


def place_of(browser, series, i):
    """Where the i-th point of a series is in the window."""
    return browser.js(
        f"(() => {{ const s = {series}; s.closest('svg').scrollIntoView({{block: 'center'}});"
        f" const p = s.querySelector('polyline').points.getItem({i});"
        " const at = new DOMPoint(p.x, p.y).matrixTransform(s.getScreenCTM());"
        " return [at.x, at.y] })()"
    )


@needs_chromium
def test_values_are_shown_on_hover(browser, pages):
    browser.open(pages / "run" / "report.html", width=400)
    series = "document.querySelector('[data-label=\"policy\"]')"
    browser.move(*place_of(browser, series, 2))
    examples, rewards = Run(pages / "run").series("eval", "samples_eval/policy_reward")
    assert browser.js("tip.textContent") == f"policy: {rewards[2]:g}\nexamples: {examples[2]}"
    assert browser.js("tip.getBoundingClientRect().right") <= 400
    browser.move(1, 1)
    assert browser.js("tip.hidden")


@needs_chromium
def test_series_are_switched_off_and_on(browser, pages):
    browser.open(pages / "sweep" / "report.html")
    off = "document.querySelectorAll('.series.off').length"
    button = "document.querySelector('.keys button[data-series=\"ipo\"]')"
    chart = f"{button}.closest('.chart')"
    n = browser.js(f"{chart}.querySelectorAll('[data-series=\"ipo\"]:not(button)').length")
    browser.js(f"{button}.click()")
    assert n >= 2 and browser.js(off) == n and browser.js(f"{button}.ariaPressed") == "false"
    hidden = f"{chart}.querySelector('g[data-label=\"ipo\"]')"
    assert browser.js(f"getComputedStyle({hidden}).display") == "none"
    browser.js(f"{button}.click()")
    assert browser.js(off) == 0
    browser.js(f"{button}.dispatchEvent(new MouseEvent('dblclick'))")
    shown = f"[...{chart}.querySelectorAll('.series:not(.off)')].map((s) => s.dataset.series)"
    assert set(browser.js(shown)) == {"ipo"}


@needs_chromium
def test_online_pages_show_raw_and_smoothed_rounds_and_no_alarm(browser, pages):
    browser.open(pages / "online" / "report.html")
    assert browser.js("document.querySelectorAll('.problem').length") == 0
    first = "document.querySelector('.chart figure svg')"
    labels = f"[...{first}.querySelectorAll('.series')].map((s) => [s.dataset.label, s.dataset.y])"
    (raw_label, raw), (label, smoothed) = browser.js(labels)
    assert (raw_label, label) == ("dpo · raw", "dpo")
    raw, smoothed = ([float(y) for y in text.split()] for text in (raw, smoothed))
    rows = [row for row in Run(pages / "online").rows if row["split"] == "online"]
    assert raw == pytest.approx([row["online/gold_reward"] for row in rows])
    assert np.std(np.diff(smoothed)) < np.std(np.diff(raw)) / 5


# ---------------------------------------------------------------------------------- tables, samples


@needs_chromium
def test_a_table_is_sorted_by_a_click(browser, pages):
    browser.open(pages / "sweep" / "report.html")
    head = "[...document.querySelectorAll('th')].find((th) => th.textContent === 'policy_reward')"
    names = "[...document.querySelector('tbody').rows].map((row) => row.cells[0].textContent)"
    browser.js(f"{head}.click()")
    assert browser.js(names) == LOSSES  # their rewards are in this order
    browser.js(f"{head}.click()")
    assert browser.js(names) == LOSSES[::-1]


SHOWN = """[...document.querySelectorAll("#cards article:not([hidden])")].map((card) =>
  [card.querySelector("b").textContent,
   [...card.querySelectorAll(".policy:not([hidden]) b")].map((name) => name.textContent)])"""


def choose(browser, control, value):
    browser.js(
        f"(() => {{ const c = document.querySelector('{control}'); c.value = {json.dumps(value)};"
        " c.dispatchEvent(new Event(c.type === 'search' ? 'input' : 'change')) })()"
    )


@needs_chromium
def test_samples_are_sorted_and_paged(browser, pages):
    browser.open(pages / "run" / "report.html")
    rows = Run(pages / "run").samples()
    gains = {row["prompt"]: row["policy_reward"]["lexicon"] - 0.5 for row in rows}
    kls = {row["prompt"]: row["kl"] for row in rows}
    assert [prompt for prompt, _ in browser.js(SHOWN)] == [row["prompt"] for row in rows[:20]]
    for order, values, reverse in (("gain -1", gains, True), ("kl 1", kls, False)):
        choose(browser, "#order", order)
        expected = sorted(values, key=values.get, reverse=reverse)
        assert [prompt for prompt, _ in browser.js(SHOWN)] == expected[:20]
        browser.js("byId('next').click(), byId('next').click()")
        assert [prompt for prompt, _ in browser.js(SHOWN)] == expected[40:]
    assert browser.js("byId('place').textContent") == "41 to 45 of 45"
    choose(browser, "#search", "RESTAURANT 44")
    assert [prompt for prompt, _ in browser.js(SHOWN)] == ["We went to restaurant 44."]


@needs_chromium
def test_samples_are_filtered_by_loss_seed_and_temperature(browser, pages):
    browser.open(pages / "sweep" / "report.html")
    assert sorted(browser.js(SHOWN)[0][1]) == sorted(LOSSES)  # of seed 0
    first = Run(pages / "sweep" / "ipo-1").samples()[0]
    choose(browser, "[data-filter=seed]", "1")
    choose(browser, "[data-filter=loss]", "ipo")
    assert browser.js(SHOWN)[0] == [first["prompt"], ["ipo"]]
    text = "document.querySelector('article:not([hidden]) .policy:not([hidden]) .text').textContent"
    assert browser.js(text) == first["policy"]
    browser.open(pages / "evaluation" / "report.html")
    assert len(browser.js(SHOWN)) == 8  # four prompts at two temperatures
    choose(browser, "[data-filter=temperature]", "temperature 0.5")
    assert len(browser.js(SHOWN)) == 4
    assert browser.js("document.querySelectorAll('article:not([hidden]) .policy').length") == 24


@needs_chromium
def test_differences_from_the_reference_are_marked(browser, pages):
    browser.open(pages / "run" / "report.html")
    nodes = "[...document.querySelector('.policy .text').childNodes]"
    parts = f"{nodes}.map((node) => [node.nodeName, node.textContent])"
    ours = browser.js(parts)
    sample = Run(pages / "run").samples()[0]
    assert "".join(text for _, text in ours) == sample["policy"]
    kept = " ".join(text for name, text in ours if name == "#text").split()
    theirs = sample["reference"].split()
    assert kept[:3] == theirs[:3]  # the words that both begin with
    remaining = iter(theirs)
    assert all(word in remaining for word in kept)  # a subsequence of the reference's
    assert len(kept) == longest_common(sample["policy"].split(), theirs)
    browser.js("byId('marks').click()")
    assert browser.js(parts) == [["#text", sample["policy"]]]


def longest_common(a, b):
    """The length of a longest common subsequence, by recursion over the first words."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common(a[1:], b[1:])
    return max(longest_common(a[1:], b), longest_common(a, b[1:]))


# ------------------------------------------------------------------------------ without a browser


def test_names_in_charts_are_text(tmp_path):
    evil = "\"><img src=x onerror='throw 1'>"
    figure = Figure()
    ax = figure.subplots()
    ax.plot([1, 2], [1, 2], label=evil)
    ax.plot([1, 2], [2, 1], label="other")
    ax.annotate(evil, (1, 1))
    ax.set_title(evil, loc="left")
    ax.set_xlabel(evil)
    write_page(
        tmp_path, evil, evil, [evil], [Table([[evil]], title=evil)], [chart_of(evil, figure)]
    )
    page = (tmp_path / "report.html").read_text()
    assert "<img" not in page and page.count("&lt;img src=x") >= 10


def test_a_page_in_markdown_has_its_tables_and_texts(pages):
    page = (pages / "study" / "report.html").read_text().partition("<script>")[0]
    text = (ROOT / "experiments" / "results" / "study-quick" / "study.md").read_text()
    tables = re.findall(r"(?m)^\|[^|]*---", text)
    rows = re.findall(r"(?m)^\|", text)
    assert page.count("<table") == len(tables) and len(rows) - len(tables) == page.count("<tr>")
    assert page.count("<h2>") == text.count("\n## ") + 1  # and that of the picture
    word = re.search(r"\*\*([a-z]+)\*\*", text)[1]
    assert f">{word}</td>" in page and "**" not in page and "![" not in page


def test_what_is_on_a_page_needs_no_browser(pages):
    page = (pages / "sweep" / "report.html").read_text()
    for text in ("http:", "https:", "src=", "@import", "url("):
        assert text not in page
    for run in find_runs(pages / "sweep")[0]:
        assert run.samples()[0]["policy"] in page  # before a script has run
    mean, error = mean_and_error([1.0, 1.2])
    assert f">{mean:.3f} ± {error:.3f}</td>" in page  # dpo


def seen_with(rgb, deficiency):
    """What somebody without one kind of cones sees, in linear RGB (Machado et al. 2009, table 1,
    severity 1)."""
    rows = {  # row after row
        "protan": "0.152286 1.052583 -0.204868"
        " 0.114503 0.786281 0.099216"
        " -0.003882 -0.048116 1.051998",
        "deutan": "0.367322 0.860646 -0.227968"
        " 0.280085 0.672501 0.047413"
        " -0.011820 0.042940 0.968881",
        "tritan": "1.255528 -0.076749 -0.178779"
        " -0.078411 0.930809 0.147602"
        " 0.004733 0.691367 0.303900",
        "none": "1 0 0 0 1 0 0 0 1",
    }
    matrix = np.array(rows[deficiency].split(), float).reshape(3, 3)
    return np.clip(matrix @ rgb, 0, 1)


def lab(linear):
    """CIELAB under D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    t = np.array(to_xyz) @ linear / [0.9505, 1.0, 1.089]
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def least_distance(colors, deficiency):
    """The smallest Euclidean distance in CIELAB between two of the colors."""
    seen = []
    for color in colors:
        c = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        seen.append(lab(seen_with(linear, deficiency)))
    return min(np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i])


def test_series_differ_for_the_color_blind():
    looks = [(*style(i).values(), marker(i)) for i in range(len(COLOR_CYCLE) * len(LINE_STYLES))]
    assert len(set(looks)) == len(looks)
    for deficiency in ("none", "protan", "deutan", "tritan"):
        assert least_distance(COLOR_CYCLE, deficiency) > 10, deficiency
    red_and_green = ["#d62728", "#2ca02c", "#8c564b"]  # of matplotlib's own colors
    assert least_distance(red_and_green, "deutan") < 10
    for i in range(len(looks) - 1):  # neighbors differ in color and marker
        assert looks[i][0] != looks[i + 1][0] and looks[i][-1] != looks[i + 1][-1]
