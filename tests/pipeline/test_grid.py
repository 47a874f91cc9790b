from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rdd_pipeline.config import RunConfig, parse_config
from rdd_pipeline.errors import ConfigError
from tiny import tiny_tree

NETWORK = tiny_tree(Path())["student"]["network"]


def parsed(students: Any = None, **grid: Any) -> RunConfig:
    tree = tiny_tree(Path("runs")) | {"grid": grid}
    tree["students"] = students or []
    return parse_config(tree)


def test_methods_and_seeds_become_students_with_readable_names() -> None:
    config = parsed(
        methods=[
            "supervised",
            "rdd+cwd",
            {"name": "or", "method": "rdd", "rdd": {"relation": "or"}},
        ],
        seeds=[0, 3],
    )
    assert [student.name for student in config.students] == [
        "supervised-s0", "rdd+cwd-s0", "or-s0", "supervised-s3", "rdd+cwd-s3", "or-s3",
    ]  # fmt: skip
    both, last = config.students[1], config.students[-1]
    assert both.method == ("rdd", "cwd")
    assert (last.rdd.relation, config.student_seed(last)) == ("or", 3)
    assert config.student_network(last) == config.student.network


def test_several_networks_stand_in_the_names_and_one_does_not() -> None:
    other = NETWORK | {"encoder": "resnet18"}
    config = parsed(networks={"small": NETWORK, "r18": other}, methods=["kd"], seeds=[0])
    assert [student.name for student in config.students] == ["small-kd-s0", "r18-kd-s0"]
    assert config.student_network(config.students[1]) == config.students[1].network
    assert config.student_network(config.students[1]) != config.student.network
    one = parsed(networks={"r18": other}, methods=["kd"], seeds=[0])
    assert [student.name for student in one.students] == ["kd-s0"]
    assert one.students[0].network == config.students[1].network


def test_a_grid_is_added_to_listed_students_and_survives_json() -> None:
    config = parsed(["supervised"], methods=["rdd"], seeds=[0, 1])
    assert [student.name for student in config.students] == ["supervised", "rdd-s0", "rdd-s1"]
    again = RunConfig.model_validate_json(config.model_dump_json())
    assert again == config


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ({"methods": ["rddd"]}, r"grid.methods.0.method.0: .*'rddd'"),
        ({"methods": []}, "grid.methods: expected at least one method"),
        ({"methods": ["kd", {"method": "kd"}]}, r"grid.methods: expected a name of its own .*'kd'"),
        (
            {"methods": ["kd", {"name": "again", "method": "kd"}]},
            "expected different methods, got 'kd' and 'again' with equal settings",
        ),
        (
            {"methods": [{"method": "rdd", "rdd": {"treshold": 0.5}}]},
            "grid.methods.0.rdd.treshold: unknown key; did you mean 'threshold'",
        ),
        ({"methods": [{"method": "kd", "seed": 1}]}, "grid.methods.0.seed: unknown key"),
        ({"seeds": [1, 1]}, r"grid.seeds: expected at least one seed and none twice, got \[1, 1\]"),
        ({"seeds": []}, "grid.seeds: expected at least one seed"),
        ({"seeds": [-1]}, "grid.seeds.0: .*-1"),
        ({"baseline": "nothing"}, r"baseline: expected one of \['kd'\], got 'nothing'"),
        (
            # Names that are also those of a network's type and of one of its keys.
            {"networks": {"smp": NETWORK, "auxiliary": NETWORK | {"encodr": "x"}}},
            "grid.networks.auxiliary.encodr: unknown key; did you mean 'encoder'",
        ),
        ({"networks": {"smp": NETWORK | {"encodr": "x"}}}, "grid.networks.smp.encodr: unknown key"),
        ({"networks": {"a b": NETWORK}}, "grid.networks.a b: .*'a b'"),
        ({"sedes": [0]}, "grid.sedes: unknown key; did you mean 'seeds'"),
    ],
)
def test_errors_name_the_key(grid: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parsed(**({"methods": ["kd"], "seeds": [0]} | grid))


def test_names_must_not_collide() -> None:
    with pytest.raises(ConfigError, match=r"students: expected other names .* got 'kd-s0'"):
        parsed([{"name": "kd-s0", "method": "rdd"}], methods=["kd"], seeds=[0])
    with pytest.raises(ConfigError, match=r"the names \['a-at-kd-s0'\] are used twice"):
        parsed(
            networks={"a": NETWORK, "a-at": NETWORK},
            methods=["kd", {"name": "at-kd", "method": ["at", "kd"]}],
            seeds=[0],
        )


def test_a_run_needs_students_from_somewhere() -> None:
    tree = tiny_tree(Path("runs"))
    del tree["students"]
    with pytest.raises(ConfigError, match="students: expected at least one, listed or by grid"):
        parse_config(tree)
