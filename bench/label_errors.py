"""Label errors that were put in, found by us and by cleanlab: precision, recall, time, memory.

    python bench/label_errors.py                           # drawn scenes; trains two teachers
    python bench/label_errors.py --camvid PATH             # and CamVid's val images; two more
    python bench/label_errors.py --clean-only              # no teachers of the changed labels
    python bench/label_errors.py --tune --camvid PATH      # other images; how scores were chosen
    python bench/label_errors.py --quick                   # a smoke test; figures mean little

In every second image one to three regions of the label are given another class (see
bench/_label_faults.py), and the maps are built on the changed labels, by a teacher that was trained
on other images with clean labels, and by one that was trained on the changed labels themselves.
cleanlab gets the same probabilities: the stored logits at full resolution. It ranks
images and pixels; its regions are made from its mask of issues as ours are made, the connected
pixels of one label and one prediction, at least as large. A region is a hit if it has an
intersection over union of 0.3 with a changed region, or more than half of it lies in one.
Every method runs in a process of its own, imports done; memory is what it gained after them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from _faulty_data import FaultyData
from rdd_pipeline.config import CamVidData, RunConfig, SyntheticData, load_config, parse_config
from rdd_pipeline.data import SegmentationDataset, build_dataset
from rdd_pipeline.files import readable_bytes
from rdd_pipeline.inspection import LabelError, Maps, find_label_errors
from rdd_pipeline.inspection._regions import connected_regions
from rdd_pipeline.progress import Reporter
from rdd_pipeline.stages import run_teacher

CONFIGS = Path(__file__).parent.parent / "configs"
MIN_AREA = 20
VERSIONS = ("cleanlab", "scipy", "numpy", "torch", "zarr")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A region that a method suspects, or a pixel set of cleanlab's."""

    image_id: str
    pixels: NDArray[np.intp]
    score: float
    suggestion: int
    source: LabelError | None = None


def main() -> None:
    """Run everything and print the tables, or one step when called by that run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--camvid", type=Path, help="folder of CamVid in the SegNet layout")
    parser.add_argument("--camvid-weights", type=Path, help="of configs/camvid-cpu.yaml's teacher")
    parser.add_argument("--synthetic-weights", type=Path, help="of configs/quickstart.yaml's")
    parser.add_argument("--changed-weights", type=Path, help="of one of the changed scenes")
    parser.add_argument("--camvid-changed-weights", type=Path, help="of one of the changed CamVid")
    parser.add_argument("--images", type=int, default=200, help="of each data set at most (200)")
    parser.add_argument("--iterations", type=int, help="of teachers trained here, else as configs/")
    parser.add_argument("--clean-only", action="store_true", help="no teacher of changed labels")
    parser.add_argument("--tune", action="store_true", help="other images; ways of scoring")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(STEPS[args.step](args.folder)))
        return
    with tempfile.TemporaryDirectory(prefix="rdd-bench-") as folder:
        text = run(args, Path(folder))
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


def run(args: argparse.Namespace, root: Path) -> str:
    """The tables."""
    options = []
    if args.iterations:
        options = [f"teacher.training.iterations={args.iterations}"]
    if args.quick:
        options = ["teacher.training.iterations=20", "teacher.training.warmup_iterations=2"]
    count = min(args.images, 12) if args.quick else args.images
    scenes = load_config(CONFIGS / "quickstart.yaml", [*options, f"output={root}"])
    seed = 1 if args.tune else 2
    clean = SyntheticData(train_images=count, height=128, width=192, seed=1000 * seed + seed)
    weights = args.synthetic_weights or run_teacher(scenes, Reporter()).weights
    data = FaultyData.write(
        root / "scenes", build_dataset(clean, "train"), seed=10 + seed, images=count
    )
    network = scenes.teacher.network
    jobs = [("Drawn scenes, teacher trained on clean labels", data, network, weights)]
    themselves = not (args.tune or args.clean_only)
    if themselves:
        own = args.changed_weights or trained_on(data, scenes, root / "own")
        title = "Drawn scenes, teacher trained on the changed labels"
        jobs.append((title, data, network, own))
    if args.camvid:
        config = load_config(
            CONFIGS / "camvid-cpu.yaml",
            [*options, f"output={root}", f"data.root={args.camvid}"],
        )
        weights = args.camvid_weights or run_teacher(config, Reporter()).weights
        split = "train" if args.tune else "val"
        images = build_dataset(CamVidData(root=args.camvid), split)  # type: ignore[arg-type]
        camvid = FaultyData.write(root / "camvid", images, seed=20 + seed, images=count)
        title = f"CamVid {split}, teacher trained on the clean labels of train"
        network = config.teacher.network
        jobs.append((title, camvid, network, weights))
        if themselves:
            own = args.camvid_changed_weights or trained_on(camvid, config, root / "own-camvid")
            title = f"CamVid {split}, teacher trained on the changed labels"
            jobs.append((title, camvid, network, own))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    lines = [
        f"{datetime.date.today()}, {os.cpu_count()} cores, {os.getloadavg()[0]:.0f} processes "
        f"competing. Python {platform.python_version()}, {versions}",
    ]
    for title, faulty, net, path in jobs:
        work = Path(tempfile.mkdtemp(dir=root))
        (work / "store").write_text(str(faulty.build_store(net, path)))
        (work / "data").write_text(str(faulty.folder))
        lines += ["", f"## {title}", "", *(tuning if args.tune else report)(faulty, work)]
    return "\n".join(lines) + "\n"


def trained_on(data: FaultyData, config: RunConfig, output: Path) -> Path:
    """Weights of a teacher that learned from the changed labels."""
    tree = config.model_dump(mode="json") | {"data": data.section, "output": str(output)}
    return run_teacher(parse_config(tree), Reporter()).weights


def report(data: FaultyData, work: Path) -> list[str]:
    """Ours beside cleanlab's."""
    measured = {name: run_step(name, work) for name in STEPS}
    ours, by_class = (load(work, name) for name in ("ours", "by_class"))
    peer = load(work, "cleanlab")
    dataset = data.dataset()
    names = dataset.image_ids
    regions = peer_regions(dataset, peer)
    lists = {
        "ours": regions_of(ours, dataset),
        "ours, thresholds of confident learning": regions_of(by_class, dataset),
        "cleanlab's mask, by the regions' mean score": regions["mean"],
        "cleanlab's mask, by the sum of 1 - score": regions["sum"],
    }
    lines = [summary_line(data, len(names)), "", *region_table(data, lists)]
    image_scores = {
        "ours, by the most suspicious region": best_of_images(lists["ours"], names),
        "cleanlab softmin": dict(zip(names, (-peer["softmin"]).tolist(), strict=True)),
        "cleanlab num_pixel_issues": dict(
            zip(names, peer["mask"].mean(axis=(1, 2)).tolist(), strict=True)
        ),
    }
    lines += ["", *image_table(data, image_scores), "", *pixel_table(data, dataset, ours, peer)]
    lines += ["", *kind_table(data, lists["ours"])]
    lines += ["", "| work | seconds | memory |", "|---|---:|---:|"]
    for name, title in (
        ("ours", "ours: read maps and labels, find and rank regions"),
        ("probs", "cleanlab's input: stored logits to probabilities"),
        ("cleanlab", "cleanlab: scores of images and pixels"),
        ("mask", "cleanlab: mask of issues"),
    ):
        found = measured["cleanlab"][name] if name in ("probs", "mask") else None
        seconds = measured[name]["seconds"] if found is None else found
        memory = "" if found is not None else readable_bytes(measured[name]["memory"])
        lines.append(f"| {title} | {seconds:.1f} | {memory} |")
    return lines


def tuning(data: FaultyData, work: Path) -> list[str]:
    """Ways of scoring the same regions, and thresholds of their pixels."""
    dataset = data.dataset()
    maps = Maps((work / "store").read_text(), dataset)
    lists = {}
    for low in (0.1, 0.2, 0.5):
        for sure in (0.0, 0.5, None):
            found = find_label_errors(maps, max_true_prob=low, min_confidence=sure)
            name = "class" if sure is None else f"{sure}"
            lists[f"p(label) <= {low}, p(teacher) >= {name}"] = regions_of(list(found), dataset)
    default = regions_of(list(find_label_errors(maps)), dataset)
    for name, score in SCORES.items():
        scored = [
            Found(image_id=r.image_id, pixels=r.pixels, suggestion=r.suggestion,
                  score=score(r.source))
            for r in default if r.source is not None
        ]  # fmt: skip
        lists[f"default, by {name}"] = scored
    return [summary_line(data, len(dataset)), "", *region_table(data, lists)]


def _margin(error: LabelError) -> float:
    return error.confidence - error.true_prob


def _ratio(error: LabelError) -> float:
    return float(np.log(error.confidence / (error.true_prob + 1e-3)))


SCORES: dict[str, Callable[[LabelError], float]] = {
    "ratio x ln(1 + depth) (ours)": lambda e: _ratio(e) * float(np.log1p(e.depth)),
    "ratio": _ratio,
    "ratio x ln(area)": lambda e: _ratio(e) * float(np.log(e.area)),
    "ratio x depth": lambda e: _ratio(e) * e.depth,
    "ratio x sqrt(area)": lambda e: _ratio(e) * e.area**0.5,
    "margin": _margin,
    "margin x ln(1 + depth)": lambda e: _margin(e) * float(np.log1p(e.depth)),
    "margin x sqrt(area)": lambda e: _margin(e) * e.area**0.5,
    "margin x area": lambda e: _margin(e) * e.area,
}


def run_step(name: str, work: Path) -> dict[str, float]:
    """One method in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--step", name, "--folder", str(work)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _ours(work: Path, name: str, **settings: Any) -> dict[str, float]:
    dataset = FaultyData(folder=Path((work / "data").read_text())).dataset()
    before, start = _peak_memory(), time.perf_counter()
    maps = Maps((work / "store").read_text(), dataset)
    found = find_label_errors(maps, min_area=MIN_AREA, **settings)
    measured = {"seconds": time.perf_counter() - start, "memory": _peak_memory() - before}
    (work / f"{name}.pkl").write_bytes(pickle.dumps(list(found)))
    return measured


def _cleanlab(work: Path) -> dict[str, float]:
    import torch
    from cleanlab.segmentation.filter import find_label_issues
    from cleanlab.segmentation.rank import get_label_quality_scores

    dataset = FaultyData(folder=Path((work / "data").read_text())).dataset()
    before, start = _peak_memory(), time.perf_counter()
    maps = Maps((work / "store").read_text(), dataset)
    height, width = dataset.size(0)
    labels = np.empty((len(dataset), height, width), np.int64)
    probs = np.empty((len(dataset), dataset.num_classes, height, width), np.float32)
    for index, name in enumerate(dataset.image_ids):
        logits = torch.from_numpy(maps.reader.read("logits", name).astype(np.float32))
        full = torch.nn.functional.interpolate(
            logits[None], size=(height, width), mode="bilinear", align_corners=True
        )[0]
        probs[index] = full.softmax(0).numpy()
        labels[index] = dataset[index].label
    # cleanlab knows no ignored pixels: they are given a class that is certain.
    ignored = labels == 255
    labels[ignored] = 0
    for number in range(dataset.num_classes):
        probs[:, number][ignored] = float(number == 0)
    ready = time.perf_counter()
    softmin, pixels = get_label_quality_scores(labels, probs, verbose=False)
    scored = time.perf_counter()
    mask = find_label_issues(labels, probs, n_jobs=1, verbose=False)
    done = time.perf_counter()
    memory = _peak_memory() - before
    result = {
        "softmin": softmin, "pixels": pixels.astype(np.float32), "mask": mask,
        "prediction": probs.argmax(axis=1).astype(np.uint8),
    }  # fmt: skip
    (work / "cleanlab.pkl").write_bytes(pickle.dumps(result))
    return {
        "probs": ready - start, "seconds": scored - ready, "mask": done - scored, "memory": memory
    }  # fmt: skip


STEPS: dict[str, Callable[[Path], dict[str, float]]] = {
    "ours": lambda work: _ours(work, "ours"),
    "by_class": lambda work: _ours(work, "by_class", min_confidence=None),
    "cleanlab": _cleanlab,
}


def load(work: Path, name: str) -> Any:
    """What a step of this run left."""
    return pickle.loads((work / f"{name}.pkl").read_bytes())


def regions_of(errors: Sequence[LabelError], dataset: SegmentationDataset) -> list[Found]:
    """Our errors, in their order."""
    return [
        Found(
            image_id=error.image_id,
            pixels=np.flatnonzero(error.mask),
            score=error.score,
            suggestion=dataset.class_names.index(error.suggestion),
            source=error,
        )
        for error in errors
    ]


def peer_regions(dataset: SegmentationDataset, peer: dict[str, Any]) -> dict[str, list[Found]]:
    """Connected pixels of cleanlab's mask, ranked in two ways."""
    found: dict[str, list[Found]] = {"mean": [], "sum": []}
    for index, name in enumerate(dataset.image_ids):
        prediction = peer["prediction"][index]
        pair = dataset[index].label.astype(np.uint16) << 8 | prediction
        places, members, count = connected_regions(pair, peer["mask"][index])
        order = np.argsort(members, kind="stable")
        ends = np.cumsum(np.bincount(members, minlength=count))
        doubt = 1 - peer["pixels"][index].reshape(-1)
        for pixels in np.split(places[order], ends[:-1]):
            if len(pixels) >= MIN_AREA:
                of_it = doubt[pixels]
                suggestion = int(prediction.reshape(-1)[pixels[0]])
                for how, score in (("mean", of_it.mean()), ("sum", of_it.sum())):
                    found[how].append(
                        Found(image_id=name, pixels=pixels, score=float(score),
                              suggestion=suggestion)
                    )  # fmt: skip
    return found


def hits(data: FaultyData, regions: Sequence[Found]) -> tuple[list[Found], list[int]]:
    """The regions by falling score, and the number of the fault that each hits; 0 for none."""
    ordered = sorted(regions, key=lambda region: -region.score)
    kept: dict[str, NDArray[np.uint8]] = {}
    found = []
    for region in ordered:
        if region.image_id not in kept:
            kept[region.image_id] = data.numbers(region.image_id).reshape(-1)
        numbers = kept[region.image_id]
        inside = np.bincount(numbers[region.pixels], minlength=1)
        inside[0] = 0
        number = int(inside.argmax())
        both = int(inside[number])
        union = len(region.pixels) + int((numbers == number).sum()) - both if number else 1
        is_hit = number and (both / union >= 0.3 or both / len(region.pixels) > 0.5)
        found.append(number if is_hit else 0)
    return ordered, found


def region_table(data: FaultyData, lists: dict[str, list[Found]]) -> list[str]:
    """Precision of the first regions, recall, average precision, right suggestions."""
    lines = [
        "| regions | count | precision at 10 | at 50 | at 100 | recall at 100 | of all | "
        "average precision | right class |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    faults = {(fault["image"], fault["number"]): fault for fault in data.faults()}
    for name, regions in lists.items():
        ordered, found = hits(data, regions)
        hit = np.array(found) > 0
        seen: set[tuple[str, int]] = set()
        area, at_100, right = 0.0, 0, 0
        for place, (region, number) in enumerate(zip(ordered, found, strict=True), start=1):
            key = (region.image_id, number)
            if number:
                right += faults[key]["true"] == region.suggestion
                if key not in seen:
                    seen.add(key)
                    area += hit[:place].mean()
            if place <= 100:
                at_100 = len(seen)
        cells = [f"{hit[:k].mean():.2f}" if len(hit) else "-" for k in (10, 50, 100)]
        cells += [f"{n / len(faults):.2f}" for n in (at_100, len(seen))]
        cells += [f"{area / len(faults):.3f}", f"{right / max(1, hit.sum()):.2f}"]
        lines.append(f"| {name} | {len(regions)} | {' | '.join(cells)} |")
    return lines


def best_of_images(regions: Sequence[Found], names: Sequence[str]) -> dict[str, float]:
    """Highest score of each image; low where it has no region."""
    best = dict.fromkeys(names, -np.inf)
    for region in regions:
        best[region.image_id] = max(best[region.image_id], region.score)
    return best


def image_table(data: FaultyData, scores: dict[str, dict[str, float]]) -> list[str]:
    """How many of the first images have a changed region."""
    faulty = {fault["image"] for fault in data.faults()}
    lines = [
        "| images | precision at 10 | at 50 | recall at 50 | average precision |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, by_image in scores.items():
        order = sorted(by_image, key=lambda image, by=by_image: -by[image])  # type: ignore[misc]
        hit = np.array([image in faulty for image in order])
        precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
        lines.append(
            f"| {name} | {hit[:10].mean():.2f} | {hit[:50].mean():.2f} | "
            f"{hit[:50].sum() / hit.sum():.2f} | {precision[hit].mean():.3f} |"
        )
    return lines


def pixel_table(
    data: FaultyData, dataset: SegmentationDataset, ours: Sequence[LabelError],
    peer: dict[str, Any],
) -> list[str]:  # fmt: skip
    """Pixels that are marked, against those that were changed."""
    changed = np.stack([data.numbers(name) > 0 for name in dataset.image_ids])
    first = np.zeros(changed.shape, bool)
    everything = np.zeros(changed.shape, bool)
    place = {name: index for index, name in enumerate(dataset.image_ids)}
    for rank, error in enumerate(ours):
        everything[place[error.image_id]] |= error.mask
        if rank < 100:
            first[place[error.image_id]] |= error.mask
    # As many pixels of the lowest scores as our first regions have.
    least = np.zeros(changed.shape, bool)
    count = int(first.sum())
    least.reshape(-1)[np.argpartition(peer["pixels"].reshape(-1), count)[:count]] = True
    lines = ["| pixels | marked | precision | recall |", "|---|---:|---:|---:|"]
    for name, marked in (
        ("ours, first 100 regions", first),
        ("cleanlab, as many pixels of lowest score", least),
        ("ours, all regions", everything),
        ("cleanlab, mask of issues", peer["mask"]),
    ):
        both, of = (marked & changed).sum(), max(1, marked.sum())
        lines.append(f"| {name} | {of} | {both / of:.2f} | {both / changed.sum():.2f} |")
    return lines


def kind_table(data: FaultyData, regions: Sequence[Found]) -> list[str]:
    """Which kinds of faults we find."""
    ordered, found = hits(data, regions)
    keys = [(r.image_id, n) for r, n in zip(ordered, found, strict=True)]
    first, everything = set(keys[:100]), set(keys)
    lines = [
        "| kind of fault (ours) | put in | found by the first 100 | by all |",
        "|---|---:|---:|---:|",
    ]
    faults = data.faults()
    for kind in sorted({fault["kind"] for fault in faults}):
        of_kind = {(f["image"], f["number"]) for f in faults if f["kind"] == kind}
        lines.append(
            f"| {kind} | {len(of_kind)} | {len(of_kind & first)} | {len(of_kind & everything)} |"
        )
    return lines


def summary_line(data: FaultyData, images: int) -> str:
    """How many images and faults."""
    faults = data.faults()
    with_some = len({fault["image"] for fault in faults})
    return f"{images} images, {len(faults)} changed regions in {with_some} of them."


def _peak_memory() -> int:
    """Most bytes that this process had in memory since it started; Linux."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status: expected a line VmHWM, got none; run this on Linux")


if __name__ == "__main__":
    main()
