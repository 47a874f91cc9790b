from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdd_storage import (
    ImageRecord,
    LocationError,
    MapSchema,
    StoreFormatError,
    fingerprint,
    identity_difference,
    store_path,
)
from rdd_storage.location import locate
from rdd_storage.schema import check_images, record_differences

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
identities = st.dictionaries(st.text(max_size=3), json_values, max_size=4)


@given(identity=identities)
def test_fingerprint_ignores_the_order_of_keys(identity: dict[str, object]) -> None:
    backwards = dict(reversed(list(identity.items())))
    assert fingerprint(identity) == fingerprint(backwards)
    assert identity_difference(identity, backwards) == []


@given(one=identities, two=identities)
def test_different_fingerprints_have_a_readable_difference(
    one: dict[str, object], two: dict[str, object]
) -> None:
    assert (fingerprint(one) == fingerprint(two)) == (identity_difference(one, two) == [])


def test_fingerprint_stays_what_it_was() -> None:
    """Paths of existing stores depend on it."""
    identity = {"b": [1, 2.5, None], "a": {"ü": True}}
    assert fingerprint(identity) == (
        "d9ba9780a1213ee62f98306a9e67e4d9e92aa808723325cd0d580727f96980cb"
    )
    assert fingerprint(identity) == fingerprint({"a": {"ü": True}, "b": (1, 2.5, None)})


def test_difference_names_the_key_and_both_values() -> None:
    expected = {"teacher": {"weights": "abc", "size": [512, 1024]}, "seed": 1}
    found = {"teacher": {"weights": "def", "size": [512, 512]}, "extra": "x" * 100}
    assert identity_difference(expected, found) == [
        f"extra: expected nothing, found {'x' * 59}…",
        "seed: expected 1, found nothing",
        "teacher.size.1: expected 1024, found 512",
        "teacher.weights: expected abc, found def",
    ]


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
def test_identity_must_be_json(value: object) -> None:
    with pytest.raises(StoreFormatError, match="identity: expected JSON"):
        fingerprint({"key": value})


def test_store_path() -> None:
    identity = {"teacher": "t"}
    name = f"camvid-train-{fingerprint(identity)[:12]}.zarr"
    assert store_path(Path("/maps"), "camvid", "train", identity) == f"/maps/{name}"
    assert store_path("file:///maps/", "camvid", "train", identity) == f"file:///maps/{name}"
    with pytest.raises(StoreFormatError, match="dataset"):
        store_path("/maps", "cam/vid", "train", identity)


def test_locations(tmp_path: Path) -> None:
    assert locate(f"file://{tmp_path}/a%20b").url == f"{tmp_path}/a b"
    for url in ("ftp://host/x", "file://host/x"):
        with pytest.raises(LocationError, match="expected"):
            locate(url)


def schema(**changes: object) -> MapSchema:
    values: dict[str, object] = {
        "num_classes": 2,
        "class_names": ("a", "b"),
        "height": 8,
        "width": 8,
        "grid_height": 1,
        "grid_width": 1,
        "output_stride": 8,
    }
    return MapSchema(**(values | changes))  # type: ignore[arg-type]


def test_schema_round_trip_skips_unknown_keys() -> None:
    one = schema(hardness_bits=16, logits=True)
    assert MapSchema.from_json(one.to_json() | {"added_later": 1}) == one
    with pytest.raises(StoreFormatError, match="height"):
        MapSchema.from_json({k: v for k, v in one.to_json().items() if k != "height"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 3}, "class_names: expected 3"),
        ({"num_classes": 256, "class_names": ("x",) * 256}, "at most 255, got 256"),
        ({"hardness_bits": 12}, "8 or 16, got 12"),
        ({"height": 0}, "height: expected an integer of at least 1, got 0"),
        ({"shard_images": 1.5}, "shard_images"),
    ],
)
def test_bad_schemas_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(StoreFormatError, match=message):
        schema(**changes)


def record(**changes: object) -> ImageRecord:
    values: dict[str, object] = {
        "image_id": "a",
        "height": 8,
        "width": 8,
        "grid_height": 1,
        "grid_width": 1,
        "digest": "d",
    }
    return ImageRecord(**(values | changes))  # type: ignore[arg-type]


def test_bad_image_lists_are_refused() -> None:
    for images, message in [
        ((), "at least one"),
        ((record(), record()), "'a' is used twice"),
        ((record(image_id=""),), "is empty"),
        ((record(height=9),), "image a: height: expected 1 to 8"),
    ]:
        with pytest.raises(StoreFormatError, match=message):
            check_images(schema(), images)


def test_record_differences() -> None:
    a, b = record(), record(image_id="b")
    assert record_differences([a, b], [a, b]) == []
    assert record_differences([a, b], [b, a]) == ["images: expected another order than the store's"]
    assert record_differences([a, b], [record(digest="e"), record(image_id="c")]) == [
        "image a: digest: expected d, found e",
        "image b: expected in the store, found nothing",
        "image c: expected nothing, found it in the store",
    ]
