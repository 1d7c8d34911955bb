"""How reports look: charts and their values, size, light and dark, and a phone's width in a real browser."""

import itertools
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from reported import make_run, make_vqa, png, write_lines

from nanovision_jax.reporting import charts
from nanovision_jax.reporting import family as report
from nanovision_jax.reporting.charts import Chart, Line

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


def chart(train, validation=(), **fields):
    lines = [Line('training', train), *([Line('held-out', list(validation), 1, dots=True)] if validation else [])]
    return Chart('sft', 'loss', lines, **fields)


@pytest.mark.parametrize('small', [False, True])
@pytest.mark.parametrize('losses', [[3.0], [3.0, 3.0], [0.0, 0.0], [9.0, 0.5, 0.02], [2.0, -1.0], [4e9, 3e9], [1e-9]])
def test_charts_of_any_losses(losses, small):
    train = [(10 * (i + 1), loss) for i, loss in enumerate(losses)]
    svg = charts.draw(chart(train, train[-1:], small=small))
    assert svg.count('<circle') == (2 if len(losses) == 1 else 1)  # one point is no line
    for numbers in re.findall(r'points="([^"]*)"', svg):
        assert all(0 <= float(x) <= 360 for x in numbers.replace(',', ' ').split())
    assert ('(log)' in svg) == (losses == [9.0, 0.5, 0.02])
    assert 'nan' not in svg and 'inf' not in svg


def test_every_place_of_a_chart_tells_its_values():
    train = [(10, 4.0), (20, 2.0), (40, 1.0)]
    svg = charts.draw(chart(train, [(20, 2.5)]))
    titles = re.findall('<title>(.*?)</title>', svg, re.S)
    assert titles == ['step 10\ntraining 4.000', 'step 20\ntraining 2.000\nheld-out 2.500', 'step 40\ntraining 1.000']
    strips = [tuple(map(float, s)) for s in re.findall(r'<rect x="([\d.]+)" y="0" width="([\d.]+)"', svg)]
    assert strips[0][0] == 40 and sum(strips[-1]) == pytest.approx(352, abs=0.1)
    for (start, width), (following, _) in itertools.pairwise(strips):
        assert start + width == pytest.approx(following, abs=0.11)


def test_long_curves_keep_their_peaks_and_stay_small():
    losses = np.linspace(4, 3, 100_000)
    losses[54_321] = 9.5
    points = list(enumerate(losses.tolist()))
    kept = charts.thin(points, 400)
    assert len(kept) <= 402 and points[54_321] in kept and kept[-1] == points[-1] and kept == sorted(kept)
    assert len(charts.draw(chart(points))) < 60_000
    assert charts.thin(points[:400], 400) == points[:400]


def test_axes_have_few_round_numbers():
    assert charts.ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert [charts.short(x) for x in (0.25, 2500, 12_000, 2_500_000, 3e9)] == ['0.25', '2,500', '12k', '2.5M', '3G']
    for log in (False, True):
        for low, high in ((1e-9, 1.0), (0.02, 9.0), (1.0, 1.1), (3.0, 4000.0)):
            assert len(charts.ticks(low, high, log)) <= 11 or log


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    """The report of a family with long names, many stages and pictures of noise: as large and wide as they come."""
    family = tmp_path_factory.mktemp('family') / ('a-long-name' * 6)
    rng = np.random.default_rng(0)
    for stage in ('clip', 'pretrain', 'sft', 'vision_pretrain', 'vision_instruct'):
        folder = make_run(family, stage)
        lines = [
            {'step': i, 'loss': 4 / i, 'grad_norm/decoder': 1 / i, 'grad_norm/projector': 2.0, 'grad_norm': 3.0}
            | {'update_norm/decoder': 1e-3, 'learning_rate': 1e-3, 'tokens_per_second': 10.0 * i, 'memory': 2**30}
            | {'tokens': i, 'seconds': i}
            for i in range(1, 5000)
        ]
        write_lines(folder / 'metrics.jsonl', lines)
    make_vqa(folder)
    chats = []
    for i in range(60):
        Image.fromarray(rng.integers(0, 256, (300, 300, 3), np.uint8)).save(family / f'{i}.png')
        (family / f'small{i}.png').write_bytes(png(128, i))
        chats.append({'image': f'{i}.png', 'question': 'What? ' * 2000, 'answer': 'So.'})
    write_lines(family / 'chat.jsonl', chats)
    return report.write(family)


def test_no_page_is_above_5_mb(page):
    assert 500_000 < page.stat().st_size < 5_000_000
    assert 'the first 24 of 60 pictures' in page.read_text()


def test_it_needs_nothing_from_elsewhere_and_follows_light_and_dark(page):
    html = page.read_text()
    assert not re.search(r'(src|href)\s*=\s*(?!"data:)|url\(|@import|https?:|<script|<link', html)
    style = html.split('<style>')[1].split('</style>')[0]
    assert '@media screen and (prefers-color-scheme: dark)' in style  # on paper it stays light
    light, dark = (set(re.findall(r'(--\w+):', part)) for part in re.findall(r':root \{[^}]*}', style))
    assert light == dark
    body = html.split('</head>')[1]
    assert not re.search(r'(fill|stroke|color|background)="?[:=]?#', body)  # colours are the style sheet's alone


@pytest.fixture(scope='module')
def browser():
    if CHROMIUM is None:
        pytest.skip('there is no Chromium: apt-get install chromium')
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield opened
        opened.close()


@pytest.mark.parametrize('width', [360, 1280])
def test_nothing_is_wider_than_the_window(browser, page, width):
    shown = browser.new_page(viewport={'width': width, 'height': 800})
    shown.goto(page.as_uri())
    assert shown.evaluate('document.documentElement.scrollWidth') == width
    sizes = shown.evaluate("[...document.querySelectorAll('p, td, pre')].map(e => getComputedStyle(e).fontSize)")
    assert min(float(size.removesuffix('px')) for size in sizes) >= 11.9
    shown.close()


def test_values_come_with_the_pointer_without_scripts(browser, page):
    context = browser.new_context(java_script_enabled=False)
    shown = context.new_page()
    shown.goto(page.as_uri())
    told = shown.locator('.at text').nth(40)
    assert not told.is_visible()
    shown.locator('.at rect').nth(40).hover()
    assert told.is_visible() and told.text_content().startswith('step ')
    context.close()


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_stands_out_from_the_page(browser, page, scheme):
    shown = browser.new_page(color_scheme=scheme)
    shown.goto(page.as_uri())

    def lightness(expression):
        numbers = re.findall(r'[\d.]+', shown.evaluate(expression))[:3]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (int(n) / 255 for n in numbers)]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    behind = lightness('getComputedStyle(document.body).backgroundColor')
    assert (behind > 0.5) == (scheme == 'light')
    for selector, kind in (('p', 'color'), ('.note', 'color'), ('.wrong', 'color'), ('.chart text', 'fill')):
        ink = lightness(f"getComputedStyle(document.querySelector('{selector}')).{kind}")
        low, high = sorted((ink, behind))
        assert (high + 0.05) / (low + 0.05) >= 4.5, selector  # WCAG 2, AA
    shown.emulate_media(media='print')
    assert lightness('getComputedStyle(document.body).backgroundColor') == pytest.approx(1)
    shown.close()
