from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from rdd_pipeline.build import BuildResult, build_maps
from rdd_pipeline.config import RunConfig, parse_config
from rdd_pipeline.data import build_dataset, dataset_digests
from rdd_pipeline.difficulty import prediction_discrepancy, true_class_probability
from rdd_pipeline.errors import ImageReadError, NonFiniteError
from rdd_pipeline.networks import build_network, load_weights, save_weights
from rdd_pipeline.progress import Reporter
from rdd_pipeline.reuse import TrainedNetwork
from rdd_pipeline.run_images import check_data
from rdd_pipeline.stages import run_maps, run_student, run_teacher
from rdd_pipeline.teacher_pass import hardness_codes
from rdd_storage import (
    MapReader,
    MapWriter,
    StoreWriteError,
    encode_hardness,
    hardness_edges,
    store_status,
    true_prob_table,
)
from tiny import tiny_tree

QUIET = Reporter(quiet=True)


def untrained(output: Path, **maps: object) -> tuple[RunConfig, TrainedNetwork]:
    """A configuration and a teacher with random weights: enough for the teacher pass."""
    tree = tiny_tree(output)
    tree["maps"] |= maps
    tree["data"]["seed"] = 1
    config = parse_config(tree)
    weights = output / "teacher.safetensors"
    if not weights.exists():
        save_weights(build_network(config.teacher.network, 8, seed=3), weights)
    return config, TrainedNetwork(name="teacher", weights=weights, reused=True, result={})


def content(store: str) -> dict[str, str]:
    """Digest of every file of a store, apart from the note of who holds it."""
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(store).rglob("*"))
        if path.is_file() and path.relative_to(store).parts[0] != "lease"
    }


def test_maps_hold_what_the_teacher_says(tmp_path: Path) -> None:
    """Every array against a direct, unbatched computation with the same network."""
    config, teacher = untrained(tmp_path)
    built = run_maps(config, teacher, QUIET)
    assert (built.images, built.images_built) == (7, 7)
    reader = MapReader(built.path)
    dataset = build_dataset(config.data, "train")
    network = build_network(config.teacher.network, dataset.num_classes)
    load_weights(network, teacher.weights)
    network.eval()
    for index in (0, 6):
        sample = dataset[index]
        image = torch.from_numpy(np.array(sample.image)).permute(2, 0, 1)[None]
        label = torch.from_numpy(np.array(sample.label))[None].long()
        with torch.no_grad():
            main, aux = network(image)
        discrepancy = prediction_discrepancy(main, aux)[0].numpy()
        stored = reader.read("discrepancy", sample.image_id)
        np.testing.assert_allclose(np.exp(-stored.astype(np.float32)), np.exp(-discrepancy),
                                   atol=2e-4)  # fmt: skip
        full = F.interpolate(main, label.shape[-2:], mode="bilinear", align_corners=True)
        prob = true_class_probability(full, label)[0].numpy()
        codes = reader.read("hardness", sample.image_id)
        ignored = sample.label == 255
        assert np.array_equal(codes == 255, ignored)
        decoded = true_prob_table(8)[codes]
        assert np.array_equal((decoded <= 0.7)[~ignored], (prob <= 0.7)[~ignored])
        assert np.abs(decoded - prob)[~ignored].max() < 0.0081
        assert np.array_equal(reader.read("prediction", sample.image_id), full[0].argmax(0).numpy())
        logits = torch.from_numpy(reader.read("logits", sample.image_id).astype(np.float32))
        torch.testing.assert_close(logits.softmax(dim=0), main[0].softmax(dim=0), atol=2e-3, rtol=0)


def test_device_quantisation_equals_the_stores_bit_for_bit() -> None:
    edges = hardness_edges(8)
    around = np.concatenate([edges, np.nextafter(edges, 2), np.nextafter(edges, -1)])
    random = np.random.default_rng(0).random(100_000, dtype=np.float32)
    prob = np.concatenate([around, random, [0.0, 1.0]]).astype(np.float32).clip(0, 1)
    valid = np.random.default_rng(1).random(len(prob)) < 0.9
    expected = encode_hardness(prob[None], valid[None], 8)
    got = hardness_codes(torch.from_numpy(prob)[None, None], torch.from_numpy(valid)[None, None])
    assert np.array_equal(got[0].numpy(), expected)


def test_dask_workers_write_the_same_bytes_as_one_process(tmp_path: Path) -> None:
    config, teacher = untrained(tmp_path / "a")
    alone = run_maps(config, teacher, QUIET)
    config, _ = untrained(tmp_path / "b", workers=2)
    spread = run_maps(config, teacher, QUIET)
    assert spread.fingerprint == alone.fingerprint
    assert content(spread.path) == content(alone.path)


def test_second_build_runs_the_teacher_on_nothing(tmp_path: Path) -> None:
    config, teacher = untrained(tmp_path)
    first = run_maps(config, teacher, QUIET)
    before = content(first.path)
    second = run_maps(config, teacher, QUIET)
    assert second.images_built == 0
    assert content(second.path) == before


def test_build_killed_with_all_its_workers_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    config, teacher = untrained(tmp_path / "whole")
    expected = run_maps(config, teacher, QUIET)

    script = tmp_path / "build.py"
    tree = tiny_tree(tmp_path / "killed")
    tree["maps"] |= {"workers": 1}
    tree["data"]["seed"] = 1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from rdd_pipeline.config import load_config\n"
        "from rdd_pipeline.progress import Reporter\n"
        "from rdd_pipeline.reuse import TrainedNetwork\n"
        "from rdd_pipeline.stages import run_maps\n"
        "if __name__ == '__main__':\n"
        "    weights = Path(sys.argv[2])\n"
        "    teacher = TrainedNetwork(name='t', weights=weights, reused=True, result={})\n"
        "    run_maps(load_config(Path(sys.argv[1])), teacher, Reporter(quiet=True))\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "run.yaml"), str(teacher.weights)],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    marks = tmp_path / "killed" / "tiny" / "maps"
    deadline = time.monotonic() + 120
    # Digits alone: a mark is written under a temporary name first.
    while not any(mark.name.isdigit() for mark in marks.glob("*.zarr/done/c/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    store = next(marks.glob("*.zarr"))
    finished = store_status(store).images_done
    assert 0 < finished < 7, "the kill came too early or too late to test anything"

    resumed = run_maps(parse_config(tree | {"maps": tree["maps"] | {"workers": 0}}), teacher, QUIET)
    assert resumed.images_built == 7 - finished
    assert content(resumed.path) == content(expected.path)


def test_disk_full_names_the_shard_and_keeps_what_is_finished(tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk: the operating system refuses the write."""
    config, teacher = untrained(tmp_path / "whole", shard_images=1)
    whole = run_maps(config, teacher, QUIET)
    largest: dict[int, int] = {}
    for path in Path(whole.path).rglob("c/*"):
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        if path.parent.parent.name in ("logits", "hardness", "prediction", "confidence"):
            shard = int(path.name)
            largest[shard] = max([largest.get(shard, 0), *(p.stat().st_size for p in files)])
    sizes = [largest[shard] for shard in range(7)]
    # The first shard that is larger than all before it will not fit.
    failing = next(i for i in range(1, 7) if sizes[i] > max(sizes[:i]))
    limit = max(sizes[:failing])

    config, _ = untrained(tmp_path / "full", shard_images=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(StoreWriteError) as caught:
            run_maps(config, teacher, QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"shard {failing}" in "\n".join([str(caught.value), *caught.value.__notes__])
    store = next((tmp_path / "full" / "tiny" / "maps").glob("*.zarr"))
    assert store_status(store).images_done == failing
    assert not store_status(store).complete
    resumed = run_maps(config, teacher, QUIET)
    assert resumed.images_built == 7 - failing
    assert content(resumed.path) == content(whole.path)


def test_nan_from_the_teacher_names_the_image_and_marks_nothing(tmp_path: Path) -> None:
    config, _ = untrained(tmp_path)
    network = build_network(config.teacher.network, 8, seed=3)
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    save_weights(network, tmp_path / "nan.safetensors")
    broken = TrainedNetwork(name="t", weights=tmp_path / "nan.safetensors", reused=True, result={})
    with pytest.raises(NonFiniteError, match="train-000000"):
        run_maps(config, broken, QUIET)
    store = next((tmp_path / "tiny" / "maps").glob("*.zarr"))
    assert store_status(store).images_done == 0


def test_error_on_a_dask_worker_reaches_the_user_with_the_shard(tmp_path: Path) -> None:
    config, _ = untrained(tmp_path, workers=1)
    network = build_network(config.teacher.network, 8, seed=3)
    with torch.no_grad():
        next(network.parameters()).fill_(float("inf"))
    save_weights(network, tmp_path / "inf.safetensors")
    broken = TrainedNetwork(name="t", weights=tmp_path / "inf.safetensors", reused=True, result={})
    with pytest.raises(NonFiniteError, match="image 'train-0"):
        run_maps(config, broken, QUIET)


def test_soft_labels_and_aux_hardness_are_optional(tmp_path: Path) -> None:
    config, teacher = untrained(tmp_path)
    lean = config.maps.model_copy(update={"soft_labels": False, "aux_hardness": False})
    built = build_maps(
        build_dataset(config.data, "train"),
        config.teacher.network,
        teacher.weights,
        maps=lean,
        root=tmp_path / "lean",
        device="cpu",
        reporter=QUIET,
    )
    arrays = set(MapReader(built.path).arrays)
    assert {"discrepancy", "hardness", "prediction", "confidence"} <= arrays
    assert not {"logits", "aux_hardness"} & arrays
    writer = MapWriter.open(built.path)
    assert writer.pending_shards() == []


def test_image_that_vanishes_in_mid_run_is_named_and_finished_shards_stay(tmp_path: Path) -> None:
    root = tmp_path / "camvid"
    for kind, mode, colour in (("train", "RGB", (90, 120, 60)), ("trainannot", "L", 3)):
        (root / kind).mkdir(parents=True)
        for i in range(4):
            Image.new(mode, (80, 48), colour).save(root / kind / f"{i:03d}.png")
    tree = tiny_tree(tmp_path) | {"data": {"type": "camvid", "root": str(root)}}
    config = parse_config(tree)
    dataset = build_dataset(config.data, "train")
    weights = tmp_path / "teacher.safetensors"
    save_weights(build_network(config.teacher.network, dataset.num_classes, seed=3), weights)
    digests = dataset_digests(dataset)
    content_of_last = (root / "train" / "003.png").read_bytes()
    (root / "train" / "003.png").write_bytes(content_of_last[:50])  # size() still reads the header

    def build() -> BuildResult:
        return build_maps(
            dataset, config.teacher.network, weights, maps=config.maps, root=tmp_path / "maps",
            device="cpu", reporter=QUIET, digests=digests,
        )  # fmt: skip

    with pytest.raises(ImageReadError, match=r"003\.png"):
        build()
    store = next((tmp_path / "maps").glob("*.zarr"))
    assert store_status(store).images_done == 2
    (root / "train" / "003.png").write_bytes(content_of_last)
    assert build().images_built == 2


def test_real_images_go_the_whole_way(camvid: Path, tmp_path: Path) -> None:
    """Six real CamVid frames: teacher pass, then a few steps of a student from the store."""
    root = tmp_path / "camvid"
    for split, count in (("train", 4), ("val", 2)):
        images = sorted((camvid / split).iterdir())[:count]
        for source in images:
            for folder, suffix in ((split, source.suffix), (f"{split}annot", ".png")):
                (root / folder).mkdir(parents=True, exist_ok=True)
                link = root / folder / f"{source.stem}{suffix}"
                link.symlink_to(camvid / folder / link.name)
    tree = tiny_tree(tmp_path) | {"data": {"type": "camvid", "root": str(root)}}
    config = parse_config(tree)
    check_data(config, QUIET)
    teacher = run_teacher(config, QUIET)
    maps = run_maps(config, teacher, QUIET)
    reader = MapReader(maps.path)
    assert reader.read("hardness", reader.image_ids[0]).shape == (360, 480)
    student = run_student(config, config.students[2], maps.path, QUIET)
    losses = [entry["loss"] for entry in student.result["history"]]
    assert np.isfinite(losses).all()
    assert 0.0 < student.result["metrics"]["pixel_accuracy"] <= 1.0
