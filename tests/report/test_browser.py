"""The pages in a real browser: they open, ask for nothing, log nothing, and answer the pointer and the keys."""

import json
import re
import statistics

import pytest

import browser
import pages
from open_r1_capo.report.__main__ import main
from open_r1_capo.report.compare import main as compare

pytestmark = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)"
)
COLOUR = "getComputedStyle(document.querySelector('.text .token.rejected')).backgroundColor"
READOUTS = "[...document.querySelectorAll('.legend b')].map(b => b.textContent)"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A browser with the report of a run whose prompts and tokens are hostile."""
    root = tmp_path_factory.mktemp("run")
    folder = pages.make_run(root / "capo_aggressive" / "lab" / "seed0")
    pages.write_record(folder, "first", pages.make_record(1, evil=pages.EVIL))
    pages.write_record(folder, "largest_kl", pages.make_record(39, completions=40))
    assert main([str(folder)]) == 0
    with browser.Browser(root / "profile") as opened:
        opened.path = folder / "report.html"
        opened.seconds = min(opened.open(opened.path) for _ in range(3))  # the machine may be busy with other things
        yield opened
        assert opened.errors == []
        assert set(opened.requests) == {opened.path.as_uri()}


def test_it_opens_at_once_and_nothing_of_the_run_is_executed(page):
    assert page.seconds < 2
    page.js("document.getElementById('tokens-1').click()")
    assert page.js("typeof window.broken") == "undefined"
    assert page.js("document.querySelectorAll('img').length") == 0
    assert page.js("document.querySelectorAll('.panel').length") > 8
    assert page.js(f"document.querySelector('.text').textContent.includes({json.dumps(pages.EVIL)})")


def test_a_crosshair_reads_every_line_of_every_panel(page):
    x, y = page.centre(".panel svg", 0.9)
    page.mouse(x, y)
    step = page.js("document.querySelector('#readout b').textContent")
    assert 30 < int(step) < 40
    values = page.js(READOUTS)
    assert len(values) > 20
    assert "–" not in values
    assert "" not in values
    assert page.js("document.querySelectorAll('.cross line').length") == page.js(
        "document.querySelectorAll('.panel').length"
    )
    rows = [json.loads(line) for line in (page.path.parent / "metrics.jsonl").read_text().splitlines()]
    measured = page.js(
        "[...document.querySelectorAll('.panel')].find(p => p.textContent.startsWith('KL of the update'))"
        ".querySelector('.legend b').textContent"
    )
    assert float(measured) == pytest.approx(rows[int(step) - 1]["capo/measured_kl"], rel=1e-2)
    page.mouse(2, 2)
    assert set(page.js(READOUTS)) == {""}


def test_keys_move_keep_and_release_the_crosshair(page):
    page.js("document.querySelector('.panel svg').focus()")
    step = "document.querySelector('#readout b')?.textContent"
    for key, found in (("Home", "1"), ("ArrowRight", "2"), ("End", "40"), ("ArrowLeft", "39"), ("Escape", None)):
        page.key(key)
        assert page.js(step) == found
    page.key("Home")
    page.key("Enter")
    page.mouse(*page.centre(".panel svg", 0.8))
    assert page.js(step) == "1"  # kept
    page.key("Escape")


def test_dragging_zooms(page):
    ticks = (
        "[...document.querySelector('.panel svg').querySelectorAll('[text-anchor=middle]')].map(t => t.textContent)"
    )
    before = page.js(ticks)
    x, y = page.centre(".panel svg", 0.4)
    page.mouse(x, y, "mousePressed")
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=x + 60, y=y, button="left", buttons=1)
    page.send("Input.dispatchMouseEvent", type="mouseReleased", x=x + 60, y=y, button="left", clickCount=1)
    assert page.js(ticks) != before
    page.js("[...document.querySelectorAll('#toolbar button')].find(b => b.textContent === 'show everything').click()")
    assert page.js(ticks) == before


def test_another_axis_keeps_the_step(page):
    page.js("location.hash = '#step-20'")
    page.js("document.querySelector('[name=axis][value=step]').click()")
    assert page.js("document.querySelector('#readout b').textContent") == "20"
    page.js("document.querySelector('[name=axis][value=completions]').click()")


def test_a_step_links_to_its_tokens(page):
    page.js("document.querySelector('a[href=\"#tokens-39\"]').click()")
    page.js("1")
    assert page.js("document.getElementById('tokens-39').getAttribute('aria-pressed')") == "true"
    assert page.js("document.querySelector('#readout b').textContent") == "39"


def test_tokens_show_their_numbers_by_pointer_and_by_key(page):
    page.js("document.getElementById('tokens-39').click()")
    page.mouse(*page.centre(".text .token.rejected"))
    tip = page.js("document.getElementById('tip').innerText")
    assert not page.js("document.getElementById('tip').hidden")
    for word in (
        "before → after",
        "m_F\t1.7",
        "m_H",
        "gradient norm",
        "entropy",
        "true KL",
        "weight\t0",
        "rejected: m_F",
    ):
        assert word in tip, word
    page.mouse(2, 2)
    assert page.js("document.getElementById('tip').hidden")
    page.js("document.querySelector('.text .token').focus()")
    page.key("ArrowRight")
    assert "token 2 of 20" in page.js("document.getElementById('tip').innerText")
    page.key("ArrowDown")
    assert page.js("document.activeElement.classList.contains('rejected')")


def test_the_colouring_is_switched(page):
    page.js("document.getElementById('tokens-39').click()")
    policy = page.js(COLOUR)
    page.js("document.querySelector('[name=colour][value=objective_shift]').click()")
    assert page.js(COLOUR) != policy
    assert "m_H" in page.js("document.getElementById('ramp').innerText")
    page.js("document.querySelector('[name=colour][value=policy_shift]').click()")
    assert page.js(COLOUR) == policy


def rank_correlation(x, y):
    def ranks(values):
        return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]

    return statistics.correlation(ranks(x), ranks(y))


def test_shifts_against_the_true_kl(page):
    page.js("document.getElementById('tokens-39').click()")
    completions = pages.make_record(39, completions=40)["completions"]
    shifts, kl = ([v for c in completions for v in c[key]] for key in ("policy_shift", "kl"))
    words = page.js("document.querySelector('.scatter .facts').innerText")
    found = re.search(r"true KL: ([\d.]+) over 800 tokens", words)
    assert float(found.group(1)) == pytest.approx(rank_correlation(shifts, kl), abs=1e-4)
    share = sum(v for shift, v in zip(shifts, kl, strict=True) if shift == 1.7) / sum(kl)
    assert float(re.search(r"carry ([\d.]+) %", words).group(1)) == pytest.approx(100 * share, rel=1e-2)
    x, y = page.centre(".scatter .cloud.out")
    page.mouse(x, y, "mousePressed", "mouseReleased")
    assert page.js("document.activeElement.classList.contains('rejected')")


def test_completions_are_filtered_and_continued(page):
    page.js("document.getElementById('tokens-39').click()")
    count = "document.querySelectorAll('.completion').length"
    rejected = "document.querySelectorAll('.completion:has(.rejected)').length"
    assert page.js(count) == 12
    page.js("document.querySelector('#microscope > button').click()")
    assert page.js(count) == 24
    assert 12 < page.js(rejected) < 24
    page.js("document.getElementById('only-rejected').click()")
    page.js("document.querySelector('#microscope > button').click()")
    assert page.js(count) == page.js(rejected) == 14  # every third of forty
    page.js("document.getElementById('only-rejected').click()")


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(page, width):
    page.resize(width, 900)
    page.js("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
    assert page.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.resize(1280, 900)


def test_a_comparison_shows_all_runs_under_the_pointer(tmp_path):
    runs = [
        pages.make_run(tmp_path / "capo_aggressive" / "lab" / "seed0"),
        pages.make_run(tmp_path / "grpo_aggressive" / "lab" / "seed0", steps=30, seed=1),
    ]
    out = tmp_path / "compare.html"
    assert compare(["--out", str(out), *map(str, runs)]) == 0
    with browser.Browser(tmp_path / "profile") as page:
        page.open(out)
        page.mouse(*page.centre(".panel svg", 0.5))
        first = page.js("[...document.querySelector('.legend').children].map(item => item.innerText)")
        assert [item.split()[0] for item in first] == ["capo_aggressive", "grpo_aggressive"]
        values = page.js(READOUTS)
        assert len(values) > 20
        assert "" not in values
        page.js("document.querySelector('.legend button').click()")  # hidden everywhere
        assert page.js("document.querySelectorAll('.panel .line').length") * 2 == len(values)
        assert page.errors == []
        assert set(page.requests) == {out.as_uri()}


def test_seeds_are_thin_lines_of_one_colour_under_their_mean(tmp_path):
    runs = [pages.make_run(tmp_path / "capo_aggressive" / "lab" / f"seed{seed}", seed=seed) for seed in range(2)]
    runs.append(pages.make_run(tmp_path / "grpo_aggressive" / "lab" / "seed0", steps=30))
    out = tmp_path / "compare.html"
    assert compare(["--out", str(out), *map(str, runs)]) == 0
    with browser.Browser(tmp_path / "profile") as page:
        page.open(out)
        for panel in ("firstElementChild", "lastElementChild"):  # the last one is of any other metric
            lines = page.js(
                f"[...document.getElementById('panels').{panel}.querySelectorAll('.line')]"
                ".map(line => [line.getAttribute('class').trim(), getComputedStyle(line.firstChild).stroke])"
            )
            names, colours = zip(*lines, strict=True)
            assert names == ("line thin", "line thin", "line thick", "line")
            assert len({*colours[:3]}) == 1 < len({*colours})
        assert page.errors == []


def test_a_run_without_anything(tmp_path):
    folder = pages.make_run(tmp_path / "grpo_aggressive" / "lab" / "seed0")
    for name in ("metrics.jsonl", "eval.jsonl"):
        (folder / name).unlink()
    assert main([str(folder)]) == 0
    with browser.Browser(tmp_path / "profile") as page:
        page.open(folder / "report.html")
        assert "has not finished a step yet" in page.js("document.body.innerText")
        assert page.errors == []
