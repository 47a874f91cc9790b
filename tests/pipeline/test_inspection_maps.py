"""Looking at stores: every figure against the pixels it was counted from."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inspection_stores import build_store, many_images, tiny_dataset
from rdd_pipeline.data import Sample, SyntheticDataset
from rdd_pipeline.inspection import (
    MEASURES,
    CircularScoreError,
    DataNeededError,
    EmptySelectionError,
    InspectionError,
    Maps,
    UnknownClassError,
    picture,
    write_csv,
)
from rdd_pipeline.inspection.measures import HARDNESS
from rdd_storage import (
    MapReader,
    MapWriter,
    StoreIncompleteError,
    StoreMismatchError,
    UnknownArrayError,
    UnknownImageError,
    confidence_table,
    hardness_table,
    label_boundary,
)


@pytest.fixture(scope="module")
def maps(two_stores: Path) -> Maps:
    return Maps(two_stores / "a.zarr", two_stores / "tiny.yaml")


@pytest.fixture(scope="module")
def other(two_stores: Path) -> Maps:
    return Maps(two_stores / "b.zarr")


def test_one_image_is_arrays_in_physical_units(maps: Maps, other: Maps) -> None:
    view = maps[0]
    sample = tiny_dataset()[0]
    assert view.problem == ""
    assert np.array_equal(view.image, sample.image)
    assert np.array_equal(view.label, sample.label)
    codes = maps.reader.read("hardness", view.image_id)
    void = sample.label == 255
    assert np.array_equal(np.isnan(view.hardness), void)
    assert np.array_equal(view.hardness[~void], hardness_table(8)[codes[~void]])
    assert view.true_prob[~void] == pytest.approx(1 - view.hardness[~void] ** 2, abs=0.01)
    assert np.array_equal(
        view.confidence, confidence_table()[maps.reader.read("confidence", view.image_id)]
    )
    assert view.confidence.max() <= 1.0
    # Corners are aligned: the grid's corners are the image's.
    assert view.weight.shape == view.size == sample.label.shape
    assert view.weight[0, -1] == pytest.approx(np.exp(-view.discrepancy[0, -1]), rel=1e-6)
    assert view.logits.max(axis=0) == pytest.approx(np.zeros(view.discrepancy.shape))
    with pytest.raises(ValueError, match="read-only"):
        view.hardness[0, 0] = 0.0
    fine = other[view.image_id]  # 16 bits
    assert np.nanmax(fine.hardness) <= 1.0
    assert np.array_equal(fine.valid, view.valid)


def test_what_is_missing_is_said_with_its_remedy(maps: Maps, other: Maps, two_stores: Path) -> None:
    view = other[0]
    assert view.prediction.shape == view.size
    for name, option in (("logits", "maps.soft_labels"), ("aux_hardness", "maps.aux_hardness")):
        with pytest.raises(UnknownArrayError, match=rf"rdd maps build CONFIG --set {option}=true"):
            getattr(view, name)
    with pytest.raises(DataNeededError, match="data="):
        _ = view.label
    with pytest.raises(DataNeededError, match="labels"):
        other.confusion(hardness=True)
    with pytest.raises(UnknownImageError, match=r"did you mean 'train-000003'"):
        _ = maps["train-00003"]
    with pytest.raises(UnknownClassError, match="did you mean 'pedestrian'"):
        maps.hardest(class_name="pedestrain")
    with pytest.raises(InspectionError, match="expected one of mean"):
        maps.hardest(by="median")
    with pytest.raises(InspectionError, match="without labels"):
        maps.overview("discrepancy")
    with pytest.raises(StoreMismatchError, match=r"seed: expected 0, found 3"):
        Maps(two_stores / "a.zarr", data=many_images(3))
    assert "nosuch" not in maps
    assert list(maps) == list(maps.image_ids)


@pytest.mark.parametrize("call", [
    lambda maps: maps.hardest(0), lambda maps: maps.quality(images=[]),
    lambda maps: maps.compare(maps, images=[]), lambda maps: maps.overview(n=0),
    lambda maps: maps.hardest(min_pixels=10**6), lambda maps: maps.confusion(images=[]),
    lambda maps: maps.export_overlays("unused", []), lambda maps: maps.hardest(1).figure(0),
])  # fmt: skip
def test_an_empty_selection_is_refused(maps: Maps, call: object) -> None:
    with pytest.raises(EmptySelectionError, match="expected"):
        call(maps)  # type: ignore[operator]


class _Moved(SyntheticDataset):
    """The data set after someone has touched an image and lost another."""

    def digest(self, index: int) -> str:
        return super().digest(index if index else 1)


def test_images_that_changed_since_the_build_are_noticed(two_stores: Path) -> None:
    moved = _Moved(split="train", images=7, height=48, width=80, seed=0)
    moved.image_ids = moved.image_ids[:-1]
    maps = Maps(two_stores / "a.zarr", moved)
    view = maps[0]
    assert "expected digest" in view.problem
    assert view.hardness.shape == view.size
    assert len(view._repr_png_()) > 1000
    with pytest.raises(DataNeededError, match="has changed since"):
        _ = view.image
    assert "no image of this name" in maps[-1].problem
    with pytest.raises(DataNeededError, match=r"train-000000.*has changed since"):
        maps.quality(["predicted_boundary"])
    assert maps.quality(["predicted_boundary"], images=[maps.image_ids[1]]).images == 1


def test_rankings_are_those_of_the_pixels(maps: Maps) -> None:
    samples = {sample.image_id: sample for sample in tiny_dataset()}
    expected: dict[str, tuple[float, ...]] = {}
    for name in maps:
        view, label = maps[name], samples[name].label
        known = label == maps.class_index("road")
        hardness, p = view.hardness[known], view.true_prob[known].astype(np.float64)
        weights = np.exp((1 - p) / 0.1)
        expected[name] = (
            known.sum(), hardness.mean(), np.quantile(hardness, 0.95, method="inverted_cdf"),
            (p * weights).sum() / weights.sum(), (p <= np.float32(0.7)).mean(),
            (view.prediction != label)[known].mean(), view.discrepancy.mean(),
            np.exp(-view.discrepancy).mean(),
        )  # fmt: skip
    for column, by in enumerate(MEASURES, 1):
        if by == "discrepancy":
            continue
        ranking = maps.hardest(4, by, class_name="road")
        order = sorted(expected, key=lambda name: expected[name][column], reverse=by != "soft_min")
        assert list(ranking.image_ids) == order[:4], by
        for image in ranking:
            found = [getattr(image, name) for name in image.__slots__ if name != "image_id"]
            assert found == pytest.approx(expected[image.image_id], rel=1e-5), by
    last = maps.hardest(1, class_name="road", easiest=True)[0]
    assert last.mean == pytest.approx(min(row[1] for row in expected.values()))
    by_d = maps.hardest(7, "discrepancy")
    assert [image.discrepancy for image in by_d] == pytest.approx(
        sorted((row[6] for row in expected.values()), reverse=True), rel=1e-5
    )


def test_other_thresholds_come_from_the_counts(maps: Maps) -> None:
    found = maps.measures(threshold=0.3, temperature=0.5)
    for index, name in enumerate(maps):
        p = maps[name].true_prob[maps[name].valid].astype(np.float64)
        weights = np.exp((1 - p) / 0.5)
        assert found["soft_min"][index] == pytest.approx((p * weights).sum() / weights.sum())
        assert found["hard_share"][index] == (p <= np.float32(0.3)).mean()


def test_distributions_confusion_and_overview_are_those_of_the_pixels(maps: Maps) -> None:
    samples = list(tiny_dataset())
    label = np.stack([sample.label for sample in samples])
    border = np.stack([label_boundary(sample.label) for sample in samples])
    views = [maps[sample.image_id] for sample in samples]
    hardness = np.stack([view.hardness for view in views])
    prediction = np.stack([view.prediction for view in views])

    rows = {(row["class"], row["region"]): row for row in maps.distributions().table()}
    quantiles = maps.distributions().quantile(0.25)
    for index, name in enumerate(maps.class_names):
        inside = (label == index) & ~border
        row = rows[name, "interior"]
        assert row["pixels"] == inside.sum()
        assert row["mean"] == pytest.approx(hardness[inside].mean(), rel=1e-5)
        assert quantiles[index, 2] == np.float32(
            np.quantile(hardness[label == index], 0.25, method="inverted_cdf")
        )
    confusion = maps.confusion(hardness=True)
    assert np.array_equal(confusion.counts, maps.confusion().counts)
    assert confusion.mean_hardness is not None
    cell = (label == 3) & (prediction == 4)
    assert confusion.counts[3, 4] == cell.sum() > 0
    assert confusion.mean_hardness[3, 4] == pytest.approx(hardness[cell].mean(), rel=1e-5)
    some = maps.confusion(images=[samples[2].image_id])
    assert some.counts.sum() == (label[2] != 255).sum()

    overview = maps.overview()
    assert overview.image_ids == maps.hardest(7).image_ids
    place = overview.image_ids.index(samples[1].image_id)
    for index in range(len(maps.class_names)):
        known = label[1] == index
        expected = hardness[1][known].mean() if known.any() else np.nan
        assert overview.values[place, index] == pytest.approx(expected, rel=1e-5, nan_ok=True)
        assert overview.pixels[place, index] == known.sum()


def test_a_large_summary_is_kept_and_noticed_when_it_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RDD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rdd_pipeline.inspection.summary.FEWEST_CACHED", 5)
    store = build_store(tmp_path / "s.zarr")
    seen: list[int] = []
    published = Maps(store, progress=seen.append)
    assert published.summary_is_ready
    expected = [published.hardest(3, class_name=name).table() for name in (None, "sky")]
    shutil.rmtree(store / "versions/000001/summary")  # as in stores of earlier versions
    first = Maps(store, progress=seen.append)
    assert not first.summary_is_ready
    ranking = first.hardest(3).table()
    assert ranking == expected[0]
    assert first.hardest(3, class_name="sky").table() == expected[1]
    assert sum(seen) == 7
    again = Maps(store, progress=seen.append)
    assert again.summary_is_ready
    assert again.hardest(3).table() == ranking
    assert sum(seen) == 7
    (mean,) = (tmp_path / "cache").rglob("mean.npy")
    mean.write_bytes(mean.read_bytes()[:-4])
    assert Maps(store).hardest(3).table() == ranking
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RDD_CACHE", str(tmp_path / "file"))  # where nothing can be written
    assert Maps(store).hardest(3).table() == ranking


def test_quality_from_stored_counts_is_that_of_the_pixels(maps: Maps) -> None:
    stored = maps.quality(["discrepancy"], resamples=50)
    counted = maps.quality(["discrepancy", "predicted_boundary", "label_boundary"], resamples=50)
    for name in ("discrepancy", "confidence", "random"):
        for figure, found in stored[name].figures.items():
            assert found.value == counted[name].figures[figure].value
    assert stored["confidence"].ece is not None
    assert counted["confidence"].ece is not None
    assert stored["confidence"].ece.value == counted["confidence"].ece.value
    assert [row.name for row in counted.rows if row.uses_labels] == ["label_boundary"]
    auroc = counted["confidence"].figures["auroc"]
    assert auroc.low is not None
    assert auroc.value is not None
    assert auroc.high is not None
    assert 0.5 < auroc.low < auroc.value < auroc.high < 1.0
    assert counted["random"].figures["auroc"].value == 0.5
    gain = counted["discrepancy"].auroc_gain.value
    own = counted["discrepancy"].figures["auroc"].value
    assert own is not None
    assert gain == pytest.approx(own - auroc.value)
    few = maps.quality(images=maps.image_ids[:2])
    assert few.resamples == 0
    assert few["discrepancy"].figures["auroc"].low is None


def test_circular_uses_are_refused_or_marked(maps: Maps, other: Maps, two_stores: Path) -> None:
    with pytest.raises(CircularScoreError, match="allow_circular"):
        maps.quality(["hardness"])
    with pytest.raises(CircularScoreError):  # the same teacher under another name
        maps.quality(["hardness"], errors=Maps(two_stores / "a.zarr"))
    marked = maps.quality(["hardness"], allow_circular=True, resamples=0)
    assert [row.name for row in marked.rows if row.circular] == ["hardness"]
    assert "circular" in marked._repr_html_()
    fair = maps.quality(["hardness"], errors=other, resamples=0)
    assert not any(row.circular for row in fair.rows)
    sample = tiny_dataset()[0]
    given = maps.quality(
        ["hardness"], errors=lambda image: np.zeros(image.shape[:2], np.uint8), resamples=0,
        images=[sample.image_id],
    )  # fmt: skip
    valid = sample.label != 255
    rate = given["hardness"].figures["error_rate"].value
    assert rate == pytest.approx((sample.label[valid] != 0).mean())


def test_two_stores_are_compared_pixel_by_pixel(maps: Maps, other: Maps) -> None:
    from scipy import stats

    found = maps.compare(other)
    a, b = (
        np.concatenate([each[name].hardness_codes[each[name].valid].astype(int) for name in maps])
        for each in (maps, other)
    )
    assert found.spearman == pytest.approx(stats.spearmanr(a, b >> 8).statistic, abs=1e-12)
    assert found.kendall == pytest.approx(stats.kendalltau(a, b >> 8).statistic, abs=1e-12)
    gap = HARDNESS[b >> 8] - HARDNESS[a]
    assert found.bias == pytest.approx(gap.mean())
    assert found.mean_absolute == pytest.approx(np.abs(gap).mean())
    changes = [image.mean_absolute for image in found.images]
    assert changes == sorted(changes, reverse=True)
    first = found.images[0]
    difference = found.difference(first.image_id)
    assert np.array_equal(np.isfinite(difference), maps[first.image_id].valid)
    assert np.nanmean(np.abs(difference)) == pytest.approx(first.mean_absolute, rel=1e-5)
    same = maps.compare(maps, quantity="discrepancy", images=maps.image_ids[:2])
    assert (same.spearman, same.kendall, same.mean_absolute) == (1.0, 1.0, 0.0)
    with pytest.raises(InspectionError, match="quantity"):
        maps.compare(other, quantity="logits")  # type: ignore[arg-type]


def test_stores_without_common_images_are_not_compared(maps: Maps, tmp_path: Path) -> None:
    store = build_store(tmp_path / "s.zarr", many_images(3))  # other files of the same names
    with pytest.raises(EmptySelectionError, match="3 of the same name"):
        maps.compare(store)


def test_everything_is_shown_in_notebooks_and_figures(maps: Maps, other: Maps) -> None:
    report = maps.quality(resamples=20)
    comparison = maps.compare(other)
    shown = maps._repr_html_()
    for text in ("7, version 1", "imagined, weights 00-1.0", "bytes", "train-000006"):
        assert text in shown
    assert shown.count("data:image/png;base64,") == 4
    for html in (maps.hardest(3), report, comparison):
        assert "<table>" in html._repr_html_()
    lines = repr(maps.hardest(5)).splitlines()
    assert lines[0] == "Ranking: 5 hardest of 7 images, by mean hardness"
    assert [line.split()[0] for line in lines[1:]] == ["image_id", *maps.hardest(5).image_ids]
    for result, start in (
        (report, "QualityReport: "), (comparison, "StoreComparison: hardness, 7 images; a is "),
        (maps.distributions(), "ClassDistributions: "), (maps.confusion(), "Confusion: 7 images"),
        (maps.overview(), "Overview: mean hardness, 7 images"), (maps.summary, "Summary(7 images"),
        (report["confidence"], "ScoreQuality("),
    ):  # fmt: skip
        assert repr(result).startswith(start)
        assert len(repr(result).splitlines()) <= 14
        assert "array(" not in repr(result)
    assert "… 54 more" in repr(maps.confusion())
    assert maps.view(n=2).images == maps.hardest(2)
    figures = [
        maps[0].figure(), other[0].figure(), maps.hardest(2).figure(),
        maps.distributions().figure(), maps.confusion().figure(), maps.overview().figure(),
        report.figure(), comparison.figure(1),
    ]  # fmt: skip
    for figure in figures:
        assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_exports(maps: Maps, other: Maps, tmp_path: Path) -> None:
    names = maps.image_ids[:2]
    files = maps.export_overlays(tmp_path / "pictures", names, opacity=1.0)
    assert [file.name for file in files] == [f"{name}.png" for name in names]
    written = np.asarray(Image.open(files[0]))
    assert np.array_equal(written, picture(maps[0], opacity=1.0))
    assert (written[~maps[0].valid] == 224).all()
    assert np.array_equal(picture(maps[0], opacity=0.0), maps[0].image)
    wrong = (picture(maps[0], "error", opacity=1.0) == (230, 30, 30)).all(axis=-1)
    assert np.array_equal(wrong, (maps[0].prediction != maps[0].label) & maps[0].valid)
    with pytest.raises(InspectionError, match="layer"):
        picture(maps[0], "depth")  # type: ignore[arg-type]

    for result in (maps.hardest(3), maps.quality(resamples=0), maps.compare(other),
                   maps.overview(), maps.confusion(), maps.distributions()):  # fmt: skip
        path = write_csv(result, tmp_path / "table.csv")
        with path.open(newline="") as file:
            assert len(list(csv.DictReader(file))) == len(result.table())
    with pytest.raises(EmptySelectionError):
        write_csv([], tmp_path / "table.csv")

    whole = maps.to_xarray()
    one = maps[1].to_xarray()
    assert whole.sizes["image"] == 7
    assert whole.hardness.sel(image=maps.image_ids[1]).values == pytest.approx(
        one.hardness.values, abs=1e-6, nan_ok=True
    )
    assert set(one.data_vars) == set(maps[1].to_numpy())
    assert maps.overview().to_xarray().sel(image=maps.image_ids[0]).shape == (8,)
    assert list(maps.hardest(2).to_numpy()["image_id"]) == list(maps.hardest(2).image_ids)


def test_an_unfinished_store_can_be_looked_at(maps: Maps, tmp_path: Path) -> None:
    source = MapReader(maps.path)
    writer = MapWriter.create(
        tmp_path / "s.zarr", schema=source.schema, images=source.records, identity=source.identity
    )
    assert writer.pending_shards()
    unfinished = Maps(tmp_path / "s.zarr")
    assert "0 of 7 done" in unfinished._repr_html_()
    with pytest.raises(StoreIncompleteError, match="still being built"):
        unfinished.hardest()


def test_samples_come_from_the_split_that_the_store_was_built_from(two_stores: Path) -> None:
    maps = Maps(two_stores / "a.zarr", two_stores / "tiny.yaml")
    assert maps.source.dataset is not None
    assert maps.source.dataset.split == "train"
    sample = maps.source.sample(maps.image_ids[3])
    assert isinstance(sample, Sample)
    assert sample.image_id == maps.image_ids[3]
