"""Reports of map stores, and what a browser without a network makes of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from rdd_pipeline.config import parse_config
from rdd_pipeline.errors import ConfigError
from rdd_pipeline.report import write_report
from rdd_storage import MapReader, MapWriter, StoreIncompleteError, StoreMismatchError
from report_pages import CONFIG, Page, build_store, external_references, hardest_panels, train_set

SECTIONS = ("store", "quality", "distributions", "viewer", "hardest", "suspicious")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "synthetic.zarr"
    build_store(path, train_set())
    return path


@pytest.fixture(scope="module")
def report(store: Path) -> Path:
    out = store.parent / "report.html"
    return write_report(store, out=out, data=parse_config(CONFIG).data, images=6)


def read(path: Path) -> Page:
    html = path.read_text(encoding="utf-8")
    assert list(external_references(html)) == []
    page = Page(html)
    assert page.open == []
    return page


def test_a_store_has_everything_but_training(store: Path, report: Path) -> None:
    page = read(report)
    ids = [section["id"] for section in page.all("section")]
    assert [name for name in ids if name in SECTIONS] == list(SECTIONS)
    assert MapReader(store).fingerprint in page.words
    assert "1 − confidence baseline" in page.words
    assert "nearness to a label's boundary baseline, uses the labels" in page.words
    assert "What is missing" not in page.words


def test_hardest_and_most_suspicious_images_share_the_number(report: Path) -> None:
    page = read(report)
    close = [image["alt"] for image in page.all("img") if image["alt"].startswith("close-up")]
    assert len(hardest_panels(page)) == 5 * (6 - len(close))
    assert len(close) == 3 or "None was found" in page.words


def test_without_data_maps_are_shown_and_no_image_is_an_empty_page(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = read(write_report(f"{store}/", images=2))
    assert (tmp_path / "synthetic.html").exists()
    assert len(hardest_panels(page)) == 2 * 3
    assert "no data set was given, see --data" in page.words
    assert "Nearness to a boundary is left out: it needs the labels" in page.words

    page = read(write_report(store, out=tmp_path / "none.html", images=0))
    assert page.all("img") == []


def test_changed_images_are_named_and_their_maps_shown(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    build_store(store, train_set(), changed=(9, 3))
    data = parse_config(CONFIG).data
    page = read(write_report(store, out=tmp_path / "r.html", data=data, images=2))
    assert "2 of the 10 images that were checked" in page.words
    assert "train-000003, train-000009" in page.words
    assert hardest_panels(page)[:3] == [
        f"{title} of train-000009"
        for title in ("teacher's prediction", "weight exp(−D)", "hardness")
    ]
    assert "expected digest 000000000000…" in page.words
    assert "some labels are not those of the maps" in page.words


def test_errors_say_what_to_do(store: Path, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "gone", "a path that does not exist"),
        (tmp_path, "a folder that is neither"),
        (Path(__file__), "a file"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_report(path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"the same 'rdd run' or 'rdd students' finishes"):
        write_report(tmp_path)
    other = parse_config(CONFIG | {"data": CONFIG["data"] | {"seed": 1}}).data  # type: ignore[operator]
    with pytest.raises(StoreMismatchError, match="seed"):
        write_report(store, data=other, out=tmp_path / "r.html")

    reader = MapReader(store)
    MapWriter.create(
        tmp_path / "new.zarr",
        schema=reader.schema,
        images=reader.records,
        identity=reader.identity,
    )
    with pytest.raises(StoreIncompleteError, match="got 0 of 10 images; 'rdd maps build'"):
        write_report(tmp_path / "new.zarr", out=tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_browser_shows_it_without_a_network(report: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    assert browser, "expected Chromium, got none; install it with: scripts/install-system-packages"
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000",
         f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--dump-dom", report.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert all(f'<section id="{name}">' in done.stdout for name in SECTIONS)
    assert "<canvas" in done.stdout  # the viewer has started
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []  # neither errors nor what the page's policy refused
