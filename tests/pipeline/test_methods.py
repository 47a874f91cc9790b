"""Every method through the real trainer: alone, with RDD, from stored maps and a live teacher."""

from __future__ import annotations

import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rdd_pipeline.build import BuildResult
from rdd_pipeline.config import (
    FEATURE_METHODS,
    Method,
    RunConfig,
    StudentConfig,
    load_config,
    parse_config,
)
from rdd_pipeline.data import build_dataset
from rdd_pipeline.difficulty import prediction_discrepancy, tfe_weight, true_class_probability
from rdd_pipeline.errors import ConfigError, NetworkError
from rdd_pipeline.features import FeatureTaps, StudentOutputs, TappedStudent
from rdd_pipeline.live_teacher import LiveTeacher
from rdd_pipeline.loader import make_loader
from rdd_pipeline.losses import TeacherSignals, tse_loss
from rdd_pipeline.methods import build_loss, tapped
from rdd_pipeline.networks import build_network, load_state, load_weights
from rdd_pipeline.progress import Reporter
from rdd_pipeline.stages import run_maps, run_student, run_teacher
from rdd_pipeline.stream import MapStream
from rdd_pipeline.student import PreparedStudent, check_networks, prepare_student
from rdd_pipeline.teacher_views import TeacherViews
from rdd_storage import MapReader, StoreMismatchError
from tiny import tiny_config, tiny_tree, write_tiny

QUIET = Reporter(quiet=True)
TERMS = {
    "supervised": {"ce", "ce_aux"},
    "rdd": {"tfe", "tse", "kd"},
    "kd": {"kd"},
    "cwd": {"cwd"},
    "dist": {"dist"},
    "skd": {"skd"},
    "cwd_features": {"cwd_features"},
    "skd_features": {"skd_features"},
    "at": {"at"},
    "ifvd": {"ifvd"},
    "dsd": {"dsd_pixel", "dsd_category"},
    "cirkd": {"cirkd_minibatch", "cirkd_pixel", "cirkd_region"},
}
STORED = sorted(set(TERMS) - FEATURE_METHODS - {"supervised"})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, BuildResult, Path]:
    """A teacher with a wider decoder than the students', its store, and its weights."""
    tree = tiny_tree(tmp_path_factory.mktemp("built"))
    tree["teacher"]["network"]["options"]["decoder_segmentation_channels"] = 64
    config = parse_config(tree)
    teacher = run_teacher(config, QUIET)
    return config, run_maps(config, teacher, QUIET), teacher.weights


def student(name: str, method: list[str], **settings: Any) -> StudentConfig:
    rdd = {"rdd": {"min_kept": 0.05, "switch": 0.5}} if "rdd" in method else {}
    return StudentConfig.model_validate({"name": name, "method": method} | rdd | settings)


def test_every_method_is_covered() -> None:
    assert set(TERMS) == set(typing.get_args(Method))


@pytest.mark.parametrize("with_rdd", [False, True], ids=["alone", "with rdd"])
@pytest.mark.parametrize("method", sorted(set(TERMS) - {"supervised", "rdd"}))
def test_method_trains_alone_and_with_rdd(
    built: tuple[RunConfig, BuildResult, Path], tmp_path: Path, method: str, with_rdd: bool
) -> None:
    config, maps, weights = built
    methods = ["rdd", method] if with_rdd else [method]
    chosen = student("s", methods)
    assert chosen.needs_teacher == (method in FEATURE_METHODS)
    trained = run_student(
        config.model_copy(update={"output": tmp_path}),
        chosen,
        maps.path if chosen.needs_maps else None,
        QUIET,
        weights if chosen.needs_teacher else None,
    )
    history = trained.result["history"]
    expected = TERMS[method] | (TERMS["rdd"] if with_rdd else TERMS["supervised"])
    seen = {key for entry in history for key in entry}
    assert expected <= seen
    assert not (set().union(*TERMS.values()) - expected) & seen
    assert np.isfinite([entry["loss"] for entry in history]).all()
    assert all(entry[term] >= 0.0 for entry in history for term in expected & set(entry))
    assert trained.result["settings"]["methods"].keys() == set(methods) | (
        {"kd"} if with_rdd else set()
    )
    # What is saved is the student alone: it loads into the plain network.
    plain = build_network(config.student.network, 8)
    load_weights(plain, trained.weights)


def prepared(
    built: tuple[RunConfig, BuildResult, Path], chosen: StudentConfig
) -> tuple[PreparedStudent, dict[str, torch.Tensor]]:
    """A student ready to train and its first batch."""
    config, maps, weights = built
    dataset = build_dataset(config.data, "train")
    teacher = None
    if chosen.needs_teacher:
        teacher = build_network(config.teacher.network, dataset.num_classes)
        load_weights(teacher, weights)
    reader = MapReader(maps.path) if chosen.needs_maps else None
    ready = prepare_student(config, chosen, dataset, reader=reader, teacher=teacher)
    ready.stream.spans = {}  # one batch for both stages
    return ready, next(iter(make_loader(ready.stream, batch_size=2)))


@pytest.mark.parametrize("method", ["cwd", "dist", "skd", "at", "ifvd", "dsd", "cirkd"])
def test_pixel_weights_of_rdd_are_kept_in_a_combination(
    built: tuple[RunConfig, BuildResult, Path], method: str
) -> None:
    """The combined loss is that of RDD, unchanged, plus the other method's terms."""
    combined, batch = prepared(built, student("s", ["rdd", method]))
    alone, _ = prepared(built, student("s", ["rdd"]))
    outputs = combined.model.eval()(batch["image"])
    signals = combined.signals(batch)
    for iteration in (0, 5):  # one in each stage
        whole = combined.loss(outputs, batch["label"], signals, iteration)
        base = alone.loss(outputs, batch["label"], signals, iteration)
        section = student("s", [method]).sections[method]
        weights = {
            term: getattr(section, f"{term.partition('_')[2]}_weight", None) or section.weight
            for term in TERMS[method]
        }
        added = sum(weights[term] * whole.terms[term] for term in TERMS[method])
        torch.testing.assert_close(whole.total, base.total + added)
        assert whole.diagnostics == base.diagnostics or torch.allclose(
            torch.stack(list(whole.diagnostics.as_tensors().values())).nan_to_num(-1),
            torch.stack(list(base.diagnostics.as_tensors().values())).nan_to_num(-1),
        )
        assert min(whole.terms[term].item() for term in TERMS[method]) >= 0.0


@pytest.mark.parametrize("method", sorted(set(TERMS) - {"supervised"}))
def test_every_method_reaches_the_student_and_leaves_the_teacher(
    built: tuple[RunConfig, BuildResult, Path], method: str
) -> None:
    ready, batch = prepared(built, student("s", [method]))
    before = None
    if isinstance(ready.signals, LiveTeacher):
        before = {k: v.clone() for k, v in ready.signals.network.state_dict().items()}
    model = ready.model.train()
    for _ in range(2):  # the second step of CIRKD has something to remember
        result = ready.loss(model(batch["image"]), batch["label"], ready.signals(batch), 5)
    names = [name for name in result.terms if name in TERMS[method] and name != "tfe"]
    assert names
    result.total.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    if before is not None:
        after = ready.signals.network.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert not any(p.requires_grad for p in ready.signals.network.parameters())


@pytest.mark.parametrize("blend", ["hard", "linear"])
def test_each_stage_reads_its_own_maps(
    built: tuple[RunConfig, BuildResult, Path], blend: str
) -> None:
    config, maps, _ = built
    training = config.student.training.model_copy(update={"accumulate": 2})
    config = config.model_copy(
        update={"student": config.student.model_copy(update={"training": training})}
    )
    stream = prepare_student(
        config,
        student("s", ["rdd"], rdd={"switch": 0.5, "blend": blend}),
        build_dataset(config.data, "train"),
        reader=MapReader(maps.path),
        teacher=None,
    ).stream
    first, second = {"weight_field"}, {"true_prob_code", "aux_true_prob_code"}
    after = first | second if blend == "linear" else second
    # 6 iterations of 2 batches of 2; the second stage begins with the fourth.
    assert [stream[k].keys() & (first | second) for k in range(len(stream))] == (
        [first] * 12 + [after] * 12
    )
    assert all("logits" in stream[k] for k in (0, 11, 12, 23))


def test_live_signals_are_those_of_the_teacher_on_the_crop(
    built: tuple[RunConfig, BuildResult, Path],
) -> None:
    """Against a direct computation, with crops larger than the image."""
    config, _, weights = built
    dataset = build_dataset(config.data, "train")
    teacher = build_network(config.teacher.network, dataset.num_classes)
    load_weights(teacher, weights)
    stream = MapStream(
        dataset=dataset, reader=None, crop_size=(64, 96), scale=(0.5, 0.6), flip=0.5, seed=2,
        length=4, grid_size=(8, 12), mark_padding=True,
    )  # fmt: skip
    batch = next(iter(make_loader(stream, batch_size=4)))
    live = LiveTeacher(
        TeacherViews(teacher),
        needs={"weight", "true_prob", "aux_true_prob", "logits"},
        grid_size=(8, 12),
        taps=("encoder[-1]", "decoder"),
    )
    signals = live(batch)
    with torch.no_grad():
        main, aux = teacher.eval()(batch["image"])
    size = batch["label"].shape[1:]
    torch.testing.assert_close(
        signals.weight, tfe_weight(prediction_discrepancy(main, aux), tuple(size))
    )
    torch.testing.assert_close(signals.true_prob, true_class_probability(main, batch["label"]))
    torch.testing.assert_close(signals.aux_true_prob, true_class_probability(aux, batch["label"]))
    torch.testing.assert_close(
        signals.logits, F.interpolate(main, (8, 12), mode="bilinear", align_corners=True)
    )
    assert not signals.logits_valid.all()
    assert torch.equal(signals.logits_valid, batch["logits_valid"])
    assert [feature.shape[1] for feature in signals.features] == list(
        FeatureTaps(teacher, ("encoder[-1]", "decoder")).channels()
    )


def test_online_equals_stored_where_the_crop_is_the_whole_image(
    built: tuple[RunConfig, BuildResult, Path], tmp_path: Path
) -> None:
    """Without augmentation the signals differ by their quantisation alone."""
    config, maps, weights = built
    tree = config.model_dump(mode="json")
    tree["output"] = str(tmp_path)
    tree["student"]["training"] |= {"crop_size": [48, 80], "scale": [1.0, 1.0], "flip": 0.0}
    config = parse_config(tree)
    chosen = student("stored", ["rdd", "cwd"])
    live = chosen.model_copy(update={"name": "online", "teacher": "online"})
    (stored, batch), (online, other) = (
        prepared((config, maps, weights), item) for item in (chosen, live)
    )
    a, b = stored.signals(batch), online.signals(other)
    torch.testing.assert_close(a.weight, b.weight, atol=5e-4, rtol=0)
    for name in ("true_prob", "aux_true_prob"):
        first, second = getattr(a, name), getattr(b, name)
        torch.testing.assert_close(first, second, atol=0.0081, rtol=0)
        assert torch.equal(first <= 0.7, second <= 0.7)  # an edge of the codes
    torch.testing.assert_close(a.logits.float().softmax(1), b.logits.softmax(1), atol=1e-3, rtol=0)
    assert torch.equal(a.logits_valid, b.logits_valid)

    first = run_student(config, chosen, maps.path, QUIET).result
    second = run_student(config, live, None, QUIET, weights).result
    assert second["settings"]["store"] is None
    assert first["history"][0].keys() == second["history"][0].keys()
    for key, value in first["history"][0].items():
        assert value == pytest.approx(second["history"][0][key], rel=5e-3, abs=1e-4), key


def test_online_crops_differ_from_stored_ones(
    built: tuple[RunConfig, BuildResult, Path],
) -> None:
    chosen = student("s", ["rdd"])
    stored, batch = prepared(built, chosen)
    online, other = prepared(built, chosen.model_copy(update={"teacher": "online"}))
    assert torch.equal(batch["image"], other["image"])
    a, b = stored.signals(batch), online.signals(other)
    assert a.weight.shape == b.weight.shape
    assert not torch.allclose(a.weight, b.weight)


def test_teacher_is_asked_for_only_where_it_is_needed(
    built: tuple[RunConfig, BuildResult, Path], tmp_path: Path
) -> None:
    config, maps, _ = built
    config = config.model_copy(update={"output": tmp_path})
    with pytest.raises(ConfigError, match="'s' needs the teacher's weights"):
        run_student(config, student("s", ["at"]), maps.path, QUIET)
    with pytest.raises(ConfigError, match="'s' needs the teacher's weights"):
        run_student(config, student("s", ["kd"], teacher="online"), maps.path, QUIET)
    assert not student("s", ["supervised"], teacher="online").needs_teacher
    for name in STORED:
        assert not student("s", [name]).needs_teacher
        assert student("s", [name]).needs_maps
    missing = tmp_path / "missing.safetensors"
    trained = run_student(config, student("kd", ["kd"]), maps.path, QUIET, missing)
    assert trained.result["settings"]["teacher"] is None


def test_store_of_another_teacher_is_refused_beside_a_live_one(
    built: tuple[RunConfig, BuildResult, Path], tmp_path: Path
) -> None:
    config, maps, weights = built
    other = tmp_path / "other.safetensors"
    state = {key: value + 0.5 for key, value in load_state(weights).items()}
    import safetensors.torch

    safetensors.torch.save_file(state, other)
    config = config.model_copy(update={"output": tmp_path})
    with pytest.raises(StoreMismatchError, match="the one loaded beside it"):
        run_student(config, student("s", ["rdd", "at"]), maps.path, QUIET, other)


def test_projection_is_learned_where_channels_differ_and_absent_where_not() -> None:
    config = tiny_config(Path("unused"))
    network = build_network(config.student.network, 8, seed=0)
    channels = FeatureTaps(network, ("decoder",)).channels()
    wider = TappedStudent(network, ("decoder",), {"a": channels[0] + 3, "b": channels[0]}, seed=1)
    assert isinstance(wider.projections["b"], torch.nn.Identity)
    outputs = wider(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert outputs.projected["a"].shape[1] == channels[0] + 3
    assert outputs.projected["b"] is outputs.features[-1]
    again = TappedStudent(network, ("decoder",), {"a": channels[0] + 3}, seed=1)
    torch.testing.assert_close(
        wider.projections["a"].weight, again.projections["a"].weight, rtol=0, atol=0
    )
    assert {name for name, _ in wider.named_parameters() if "projections" in name} == {
        "projections.a.weight",
        "projections.a.bias",
    }


def test_student_without_feature_methods_is_the_plain_network() -> None:
    config = tiny_config(Path("unused"))
    network = build_network(config.student.network, 8, seed=0)
    assert tapped(network, student("s", ["rdd", "cwd"]), (), seed=0) is network


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decodr", "no module 'decodr'; there is decoder"),
        ("nonsense_at_all!", "no module 'nonsense_at_all!'; there is"),
        ("encoder", r"'encoder' gives a list, expected a tensor; there are \d, .*encoder\[-1\]"),
        ("encoder[99]", r"asks for an item that is not there; there are \d"),
        ("encoder[x]", "asks for an item that is not there"),
        ("encoder[", "expected NAME, NAME"),
    ],
)
def test_wrong_taps_say_what_is_there(name: str, message: str) -> None:
    config = tiny_config(Path("unused"))
    network = build_network(config.student.network, 8, seed=0)
    with pytest.raises(NetworkError, match=message):
        FeatureTaps(network, (name,)).channels()


def test_items_of_a_dictionary_are_taken_by_their_keys() -> None:
    described = {"type": "torchvision", "architecture": "lraspp_mobilenet_v3_large"}
    tree = tiny_tree(Path("unused"))
    tree["teacher"]["network"] = described
    config = parse_config(tree | {"maps": tree["maps"] | {"discrepancy": "flip"}})
    network = build_network(config.teacher.network, 8, seed=0)
    assert FeatureTaps(network, ("backbone[low]", "backbone[high]")).channels() == (40, 960)
    assert FeatureTaps(network, ("backbone[0]", "backbone[-1]")).channels() == (40, 960)
    with pytest.raises(NetworkError, match=r"there is backbone\[low\], backbone\[high\]"):
        FeatureTaps(network, ("backbone",)).channels()


def test_a_prepared_student_has_the_class_weights_of_its_data_set(
    built: tuple[RunConfig, BuildResult, Path],
) -> None:
    config, maps, _ = built
    chosen = student("s", ["rdd"])
    weighted = chosen.rdd.model_copy(update={"class_weights": True})
    chosen = chosen.model_copy(update={"rdd": weighted})
    dataset = build_dataset(config.data, "train")
    dataset.class_weights = tuple(float(index + 1) for index in range(dataset.num_classes))
    check_networks(config, dataset, [chosen])
    ready = prepare_student(config, chosen, dataset, reader=MapReader(maps.path), teacher=None)
    assert ready.loss.task.class_weight.tolist() == list(dataset.class_weights)


def test_networks_and_taps_are_checked_before_long_work() -> None:
    tree = tiny_tree(Path("unused"))
    at = {"name": "a", "method": "at"}
    pair = {"student": "decoder", "teacher": "decoder"}

    def check(changes: dict[str, Any], **student: Any) -> None:
        config = parse_config(tree | changes | {"students": [at | student]})
        check_networks(config, build_dataset(config.data, "train"), config.students)

    check({})
    with pytest.raises(NetworkError, match=r"students: 'a': features: .* no module 'decodr'"):
        check({}, features=[pair, {"student": "decoder", "teacher": "decodr"}])
    with pytest.raises(NetworkError, match=r"maps\.discrepancy: the teacher has no module 'aux'"):
        check({"maps": tree["maps"] | {"discrepancy": "module:aux"}})


def test_logit_methods_ask_for_soft_labels() -> None:
    config = tiny_config(Path("unused"))
    loss = build_loss(student("s", ["cwd"]), config.student.training, num_classes=8)
    outputs = StudentOutputs(torch.zeros(1, 8, 2, 2), None, (), {})
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(KeyError, match="soft_labels: true"):
        loss(outputs, target, replace(TeacherSignals()), 0)


def test_class_weights_of_the_data_set_weight_the_second_stage() -> None:
    training = tiny_config(Path("unused")).student.training
    chosen = StudentConfig.model_validate(
        {
            "name": "s",
            "method": "rdd",
            "rdd": {"class_weights": True, "min_kept": 0},
            "kd": {"weight": 0},
        }
    )
    with pytest.raises(ConfigError, match="this data set gives no class weights"):
        build_loss(chosen, training, num_classes=3)
    weights = (1.0, 2.0, 0.5)
    loss = build_loss(chosen, training, num_classes=3, class_weights=weights)
    torch.manual_seed(0)
    outputs = StudentOutputs(torch.randn(1, 3, 4, 4), None, (), {})
    target, prob = torch.randint(0, 3, (1, 8, 8)), torch.rand(1, 8, 8)
    expected = tse_loss(outputs.main, target, prob, min_kept=0, class_weight=torch.tensor(weights))
    signals = TeacherSignals(true_prob=prob)
    torch.testing.assert_close(loss(outputs, target, signals, 5).total, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "rdd", "cwd": {"weight": 1}}, r"expected settings of \['rdd'\] alone"),
        ({"method": ["rdd", "nonsense"]}, "students.0.method.1"),
        ({"method": "cwd", "cwd": {"weight": 0}}, "greater than 0"),
        ({"method": "cwd", "cwd": {"temprature": 1}}, "did you mean 'temperature'"),
        (
            {"method": "dsd", "features": [{"student": "decoder", "teacher": "decoder"}]},
            "at least two taps",
        ),
        ({"method": "rdd", "teacher": "live"}, "'stored' or 'online'"),
    ],
)
def test_wrong_method_settings_are_explained(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    tree = tiny_tree(tmp_path) | {"students": [{"name": "a"} | settings]}
    with pytest.raises(ConfigError, match=message):
        parse_config(tree)


def test_methods_combine_in_one_line_of_yaml(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "run.yaml", tmp_path)
    config = load_config(path, ["students=[{name: both, method: [rdd, cwd]}, cirkd]"])
    assert config.students[0].method == ("rdd", "cwd")
    assert config.students[1].needs_teacher
