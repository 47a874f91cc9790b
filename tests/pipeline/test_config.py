from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rdd_pipeline.config import RunConfig, load_config, parse_config
from rdd_pipeline.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def tree(**changes: Any) -> dict[str, Any]:
    network = {"architecture": "FPN", "encoder": "resnet18", "auxiliary": {}}
    return {
        "name": "test",
        "data": {"type": "synthetic"},
        "teacher": {"network": network, "training": {"iterations": 10}},
        "student": {"network": network},
        "students": ["supervised", "rdd"],
    } | changes


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    assert isinstance(load_config(path), RunConfig)


def test_all_problems_are_reported_together_with_path_and_nearest_name() -> None:
    bad = tree(data={"type": "synthetic", "hight": 64})
    bad["teacher"]["training"]["iterations"] = "many"
    bad["students"] = [{"name": "a", "method": "rdd", "rdd": {"treshold": 0.5}}]
    with pytest.raises(ConfigError) as caught:
        parse_config(bad, source="run.yaml")
    message = str(caught.value)
    assert message.startswith("run.yaml: 3 problem(s)")
    assert "data.hight: unknown key; did you mean 'height'?" in message
    assert "teacher.training.iterations" in message
    assert "'many'" in message
    assert "students.0.rdd.treshold: unknown key; did you mean 'threshold'?" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"students": ["supervised", "supervised"]}, "used twice"),
        ({"students": []}, "at least one"),
        ({"students": ["rddd"]}, "rddd"),
        ({"maps": {"soft_labels": False}}, "maps.soft_labels: true"),
        ({"data": {"type": "camvid"}}, "data.root: required, but missing"),
        ({"data": {"type": "camvidd"}}, "camvid"),
        ({"name": "a/b"}, "name"),
    ],
)
def test_contradictions_say_what_to_do(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_config(tree(**change))


def test_a_teacher_with_one_head_needs_a_discrepancy_of_one_head() -> None:
    network = {"architecture": "FPN", "encoder": "resnet18"}
    teacher = {"network": network, "training": {"iterations": 10}}
    for students in (["supervised", "rdd"], ["kd"]):
        with pytest.raises(ConfigError) as caught:
            parse_config(tree(teacher=teacher, students=students))
        assert "add 'auxiliary: true'" in str(caught.value)
        assert "maps.discrepancy: flip, scales, entropy, margin or module:NAME" in str(caught.value)
    for discrepancy in ("flip", "scales", "entropy", "margin", "module:decoder.head"):
        maps = {"discrepancy": discrepancy}
        config = parse_config(tree(teacher=teacher, maps=maps))
        assert config.maps.stores_aux_hardness == discrepancy.startswith("module:")
    assert parse_config(tree()).maps.stores_aux_hardness
    assert not parse_config(tree(maps={"aux_hardness": False})).maps.stores_aux_hardness


@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        (
            {"discrepancy": "mirror"},
            "maps.discrepancy: .*heads, flip, scales, entropy, margin or module:NAME.*'mirror'",
        ),
        ({"discrepancy": "module:"}, "module:NAME with the name of a submodule"),
        ({"scales": [1.0]}, r"maps.scales: .*at least two different scales, got \[1.0\]"),
        ({"scales": [0.5, 0.5]}, "at least two different scales"),
        ({"scales": [0.0, 1.0]}, r"maps.scales.0: .*greater than 0"),
        ({"scales": [1.0, float("inf")]}, r"maps.scales.1: .*finite"),
        (
            {"discrepancy": "flip", "aux_hardness": True},
            "aux_hardness: there are no auxiliary logits with discrepancy: flip; leave it out",
        ),
    ],
)
def test_settings_of_the_discrepancy(maps: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_config(tree(maps=maps))


def test_teacher_needs_a_checkpoint_or_training() -> None:
    network = {"architecture": "FPN", "encoder": "resnet18", "auxiliary": {}}
    with pytest.raises(ConfigError, match=r"give checkpoint \(ready weights\), training"):
        parse_config(tree(teacher={"network": network}))


def test_overrides_reach_nested_keys_lists_and_values(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree()))
    config = load_config(
        file,
        [
            "student.training.iterations=7",
            "student.training.crop_size=[32, 64]",
            "students=[supervised, {name: soft, method: kd}]",
            "students.1.kd.temperature=2",
            "maps.root=/tmp/somewhere",
        ],
    )
    assert config.student.training.iterations == 7
    assert config.student.training.crop_size == (32, 64)
    assert [student.name for student in config.students] == ["supervised", "soft"]
    assert config.students[1].kd.temperature == 2.0
    assert config.maps_root == "/tmp/somewhere"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("nothing", "expected key.path=value"),
        ("students.9.name=x", "expected an index from 0 to 1"),
        ("name.inner=x", "holds a value"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, expected: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree()))
    with pytest.raises(ConfigError, match=expected):
        load_config(file, [override])


def test_file_problems_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not valid YAML"):
        load_config(bad)


def test_variables_in_paths_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_FOLDER", "/data")
    config = parse_config(tree(data={"type": "camvid", "root": "$DATA_FOLDER/camvid"}))
    assert config.data.type == "camvid"
    assert config.data.root == Path("/data/camvid")


def test_configuration_survives_json() -> None:
    config = parse_config(tree())
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
