"""The viewer in a real browser, against the arrays that NumPy has, and its messages in Python."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import comm
import numpy as np
import pytest
from comm.base_comm import BaseComm
from numpy.typing import NDArray

from browser import run_page
from rdd_pipeline.inspection import EmptySelectionError, InspectionError, Maps
from rdd_pipeline.inspection.pictures import scale_picture
from rdd_pipeline.inspection.viewer import (
    Viewer,
    static,
    viewer_fragment,
    viewer_page,
    viewer_record,
)
from rdd_storage import UnknownImageError, hardness_table

# What the scripts below share: the viewer of an element, keys, and waiting for an image.
TOOLS = """
const plain = (values) => Array.from(values, (value) => Number.isNaN(value) ? null : value);
const settled = async (viewer) => {
  do await new Promise((done) => setTimeout(done, 5));
  while (viewer.root.hasAttribute("aria-busy"));
  viewer.drawNow();
};
const press = (viewer, key, more = {}) => {
  const event = new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...more });
  viewer.root.dispatchEvent(event);
  viewer.drawNow();
  return event.defaultPrevented;
};
const shown = (viewer) => viewer.root.querySelector(".rddv-shown").textContent;
const note = (viewer) => viewer.root.querySelector(".rddv-note").textContent;
const offered = (viewer) => Array.from(
  viewer.root.querySelector("select")?.options ?? [], (each) => each.value);
const quantities = (viewer) => Object.fromEntries(
  ["hardness", "uncertainty", "discrepancy", "weight"].map(
    (kind) => [kind, plain(viewer.state.record.values(kind))]));
"""


@pytest.fixture(scope="module")
def maps(two_stores: Path) -> Maps:
    return Maps(two_stores / "a.zarr", two_stores / "tiny.yaml")


@pytest.fixture(scope="module")
def bare(two_stores: Path) -> Maps:
    """16-bit hardness, and no data set."""
    return Maps(two_stores / "b.zarr")


def test_the_page_shows_the_values_of_the_maps(maps: Maps, tmp_path: Path) -> None:
    ranking = maps.hardest(3)
    page = viewer_page(maps, ranking, tmp_path / "page.html")
    assert not re.search(r"https?://|\bfetch\(|XMLHttpRequest|import\(", page.read_text())
    levels = [0.0, 0.25, float(hardness_table(8)[137]), 0.9, 1.0]
    found = run_page(page, TOOLS + """
      const viewer = document.querySelector(".rddv-embedded").rddViewer;
      await settled(viewer);
      const { arrays } = viewer.state.record;
      const layer = viewer.layer("hardness").canvas;
      const pixels = layer.getContext("2d").getImageData(0, 0, layer.width, layer.height).data;
      const counts = LEVELS.map((threshold) => {
        viewer.set({ threshold });
        return viewer.layer("hardness").count;
      });
      viewer.set({ quantity: "weight", threshold: 0.8 });
      return {
        ...quantities(viewer), counts, weight_count: viewer.layer("weight").count,
        label: Array.from(arrays.label), prediction: Array.from(arrays.prediction),
        pixels: Array.from(pixels), image: [arrays.image.width, arrays.image.height],
        requests: performance.getEntriesByType("resource").map((each) => each.name),
      };
    """.replace("LEVELS", json.dumps(levels)))  # fmt: skip
    view = maps[ranking.image_ids[0]]
    hardness = view.hardness
    assert np.array_equal(_array(found["hardness"], view.size), hardness, equal_nan=True)
    assert np.array_equal(_array(found["uncertainty"], view.size), 1 - view.confidence)
    assert np.array_equal(np.reshape(found["label"], view.size), view.label)
    assert np.array_equal(np.reshape(found["prediction"], view.size), view.prediction)
    assert np.allclose(_array(found["weight"], view.size), view.weight, rtol=0, atol=1e-6)
    rows, columns = (
        np.floor(np.arange(full) * (points - 1) / (full - 1) + 0.5).astype(int)
        for full, points in zip(view.size, view.discrepancy.shape, strict=True)
    )
    nearest = view.discrepancy[np.ix_(rows, columns)]
    assert np.array_equal(_array(found["discrepancy"], view.size), nearest)
    assert found["counts"] == [int((hardness >= np.float32(level)).sum()) for level in levels]
    assert found["counts"][2] == int((view.true_prob <= np.float32(0.7)).sum()) > 0
    limit = np.float32(0.8)
    assert np.abs(view.weight - limit).min() > 1e-6  # else rounding could decide
    assert found["weight_count"] == int((view.weight <= limit).sum()) > 0
    pixels = np.reshape(found["pixels"], (*view.size, 4))
    known = ~np.isnan(hardness)
    assert np.array_equal(pixels[..., :3][known], scale_picture(hardness)[known])
    assert np.array_equal(pixels[..., 3], np.where(known, 255, 0))
    assert found["image"] == [view.size[1], view.size[0]]
    assert found["requests"] == []


def test_keys_and_pointer(maps: Maps, tmp_path: Path) -> None:
    names = maps.image_ids[:3]
    page = viewer_page(maps, names, tmp_path / "keys.html")
    found = run_page(page, TOOLS + """
      const viewer = document.querySelector(".rddv-embedded").rddViewer;
      const { root, state } = viewer;
      await settled(viewer);
      const seen = [];
      document.addEventListener("keydown", (event) => seen.push(event.key));
      const visit = async (key) => { press(viewer, key); await settled(viewer);
        return root.querySelector(".rddv-name").textContent; };
      const found = { first: [] };
      for (const key of ["p", "n", "ArrowRight", "n", "ArrowLeft", "Home", "End", "Home"])
        found.first.push(await visit(key));
      press(viewer, "h");
      found.usual = shown(viewer);
      found.hidden = [viewer.layer("hardness").total, viewer.layer("hardness").count];
      press(viewer, "t");
      found.higher = viewer.thresholdOf("hardness");
      press(viewer, "T");
      press(viewer, "o");
      press(viewer, "O"); press(viewer, "O");
      found.opacity = state.opacity;
      press(viewer, "+");
      found.zoom = state.view.zoom;
      press(viewer, "0");
      found.fit = state.view.zoom;
      press(viewer, "q");
      found.quantity = [state.quantity, root.querySelectorAll("select")[3].value];
      const help = () => getComputedStyle(root.querySelector(".rddv-help")).display;
      found.help = [help()];
      press(viewer, "?");
      found.help.push(help());
      press(viewer, "Escape");
      found.help.push(help());
      state.cursor = [9, 4];
      press(viewer, "ArrowRight", { shiftKey: true });
      press(viewer, "ArrowDown", { shiftKey: true });
      found.keyCursor = [...state.cursor];
      found.said = root.querySelector(".rddv-live").textContent;
      const slider = root.querySelector("input");
      const inField = new KeyboardEvent(
        "keydown", { key: "ArrowRight", bubbles: true, cancelable: true });
      slider.dispatchEvent(inField);
      found.sliderKeepsArrows = [inField.defaultPrevented, state.index];
      found.marked = root.hasAttribute("data-lm-suppress-shortcuts");
      found.leftAlone = [press(viewer, "s", { ctrlKey: true }),
        root.hasAttribute("data-lm-suppress-shortcuts"), seen];

      const canvases = root.querySelectorAll("canvas");
      const box = canvases[1].getBoundingClientRect();
      const at = (x, y) => ({ clientX: box.left + (x + 0.5) * box.width / 80,
        clientY: box.top + (y + 0.5) * box.height / 48, bubbles: true });
      canvases[1].dispatchEvent(new PointerEvent("pointermove", at(33, 20)));
      found.cursor = [...state.cursor];
      const edges = [root, root.querySelector(".rddv-tip")].map(
        (each) => each.getBoundingClientRect().bottom);
      found.tipInside = edges[1] <= edges[0];
      found.tip = Array.from(root.querySelectorAll(".rddv-tip div"),
        (row) => Array.from(row.children, (cell) => cell.textContent));
      viewer.drawNow();
      const ratio = canvases[3].width / canvases[3].clientWidth;
      const line = canvases[3].getContext("2d").getImageData(
        2, Math.floor(ratio * 20.5 * box.height / 48), 1, 1).data;
      found.line = Math.min(line[0], line[1], line[2]); // the crosshair in another panel
      const legend = Array.from(root.querySelectorAll(".rddv-class:not([hidden])"));
      found.classes = legend.map((each) => each.textContent);
      legend[0].dispatchEvent(new PointerEvent("pointerenter"));
      const chosen = viewer.layer("prediction").canvas;
      const rgba = chosen.getContext("2d").getImageData(0, 0, 80, 48).data;
      const alpha = rgba.filter((_, i) => i % 4 === 3);
      found.alone = alpha.filter((each) => each === 255).length;
      found.labelled = Array.from(canvases, (each) => each.getAttribute("aria-label"));
      return found;
    """)  # fmt: skip
    view = maps[names[0]]
    order = [0, 1, 2, 2, 1, 0, 2, 0]
    assert found["first"] == [names[index] for index in order]
    hard = int((view.true_prob <= np.float32(0.7)).sum())
    valid = int(view.valid.sum())
    assert found["hidden"] == [valid, hard]
    assert found["usual"].startswith(
        f"hardness ≥ 0.548 (p ≤ 0.700): {hard} of {valid} labelled pixels"
    )
    assert found["higher"] == pytest.approx(hardness_table(8)[137] + 0.05)
    assert found["opacity"] == 0.5
    assert (found["zoom"], found["fit"]) == (1.5, 1)
    assert found["quantity"] == ["uncertainty", "uncertainty"]
    assert found["help"] == ["none", "grid", "none"]
    assert found["keyCursor"] == [10, 5]
    assert found["said"].startswith("pixel x 10, y 5, label ")
    assert found["sliderKeepsArrows"] == [False, 0]
    # The viewer's keys stay inside it; combinations are the notebook's.
    assert found["marked"] is True
    assert found["leftAlone"] == [False, False, ["s"]]
    assert found["cursor"] == [33, 20]
    label = view.label[20, 33]
    prob = view.true_prob[20, 33]
    rows, columns = view.discrepancy.shape
    nearest = view.discrepancy[round(20 * (rows - 1) / 47), round(33 * (columns - 1) / 79)]
    assert found["tip"] == [
        ["pixel", "x 33, y 20"],
        ["label", "ignored" if label == 255 else maps.class_names[label]],
        ["prediction", maps.class_names[view.prediction[20, 33]]],
        ["p of the label", "no label" if np.isnan(prob) else f"{prob:.3f}"],
        ["confidence", f"{view.confidence[20, 33]:.3f}"],
        ["hardness √(1 − p)", "no label" if np.isnan(prob) else f"{view.hardness[20, 33]:.3f}"],
        ["discrepancy D", f"{nearest:.3f} nats"],
        ["weight exp(−D)", f"{view.weight[20, 33]:.3f}"],
    ]
    assert found["tipInside"]  # below a cell's output nothing is shown
    assert found["line"] == 255
    present = sorted({*view.prediction.ravel(), *view.label.ravel()} - {255})
    assert found["classes"] == [maps.class_names[index] for index in present]
    assert found["alone"] == int((view.prediction == present[0]).sum())
    assert found["labelled"][0] == f"Image of {names[0]}"


def test_fragments_share_a_page_and_do_without_data(maps: Maps, bare: Maps, tmp_path: Path) -> None:
    # Every third pixel; and a store of 16-bit codes without images.
    small = viewer_fragment(maps, maps.image_ids[:2], max_side=30)
    plain = viewer_fragment(bare, [bare.image_ids[1]])
    page = tmp_path / "two.html"
    page.write_text(f"<!doctype html><html><body>{small}<h2>x</h2>{plain}</body></html>")
    found = run_page(page, TOOLS + """
      const elements = document.querySelectorAll(".rddv-embedded");
      const viewers = Array.from(elements, (each) => each.rddViewer);
      const all = [];
      for (const viewer of viewers) {
        await settled(viewer);
        all.push({ ...quantities(viewer), note: note(viewer), offered: offered(viewer),
          size: [viewer.state.record.header.height, viewer.state.record.header.width] });
      }
      press(viewers[0], "n");
      await settled(viewers[0]);
      return { all, indices: viewers.map((each) => each.state.index),
        pictures: document.querySelectorAll("img").length };
    """)  # fmt: skip
    first, second = found["all"]
    view, other = maps[0], bare[1]
    assert first["size"] == [16, 27]
    assert np.array_equal(
        _array(first["hardness"], (16, 27)), view.hardness[::3, ::3], equal_nan=True
    )
    assert np.allclose(_array(first["weight"], (16, 27)), view.weight[::3, ::3], atol=1e-6)
    assert first["note"] == ""
    assert np.array_equal(_array(second["hardness"], other.size), other.hardness, equal_nan=True)
    assert second["offered"] == ["prediction", "hardness", "uncertainty", "discrepancy", "weight"]
    assert "Maps(store, data=...)" in second["note"]
    assert found["indices"] == [1, 0]
    assert found["pictures"] == 0  # those for where no script runs have gone


def test_a_fragment_keeps_within_its_bytes(maps: Maps) -> None:
    names = maps.image_ids[:4]
    whole = viewer_fragment(maps, names)
    sizes = [
        sum(len(base64.b64encode(buffer)) for buffer in viewer_record(maps, name).buffers)
        for name in names
    ]
    part = viewer_fragment(maps, names, max_bytes=sum(sizes[:2]))
    data = json.loads(_between(part, '<script type="application/json">', "</script>"))
    assert [image["id"] for image in data["meta"]["images"]] == list(names[:2])
    assert [record["header"]["id"] for record in data["records"]] == list(names[:2])
    assert "2 more of 4 images are left out" in data["meta"]["note"]
    assert len(whole) - len(part) > sum(sizes[2:])
    # All but the data: script, style and the picture for where no script runs.
    assert len(whole) - sum(sizes) < 64_000
    assert static("viewer.js").count("</script") == 0
    with pytest.raises(InspectionError, match="max_bytes: expected at least 1"):
        viewer_fragment(maps, names, max_bytes=0)
    with pytest.raises(InspectionError, match="max_side: expected at least 1"):
        viewer_fragment(maps, names, max_side=0)
    with pytest.raises(EmptySelectionError):
        viewer_fragment(maps, [])
    with pytest.raises(UnknownImageError, match="nosuch"):
        viewer_fragment(maps, ["nosuch"])


class _Wire(BaseComm):
    """A connection to a frontend that keeps what is sent."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sent: list[tuple[dict[str, Any], list[bytes]]] = []
        super().__init__(*args, **kwargs)

    def publish_msg(self, msg_type: str, data: Any = None, metadata: Any = None,
                    buffers: Any = None, **keys: Any) -> None:  # fmt: skip
        self.sent.append((data or {}, list(buffers or [])))

    def ask(self, content: object) -> list[tuple[dict[str, Any], list[bytes]]]:
        before = len(self.sent)
        data = {"method": "custom", "content": content}
        self.handle_msg({"content": {"data": data}, "buffers": []})
        return [(data["content"], buffers) for data, buffers in self.sent[before:]]


def test_the_widget_answers_and_its_frontend_asks(
    maps: Maps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "create_comm", _Wire)
    viewer = Viewer(maps, n=4)
    assert viewer.images.image_ids == maps.hardest(4).image_ids
    widget = viewer.widget
    wire = widget.comm
    state, _ = wire.sent[0]
    assert len(json.dumps(state["state"]["meta"])) < 8_000  # names and classes, no maps

    answers = []
    for index, name in enumerate(viewer.images.image_ids):
        ((content, buffers),) = wire.ask({"type": "load", "index": index})
        assert content["type"] == "image"
        assert content["header"] == viewer_record(maps, name).header
        assert list(map(bytes, buffers)) == viewer.record(index).buffers
        packed = [base64.b64encode(buffer).decode() for buffer in buffers]
        answers.append({"content": content, "buffers": packed})
    ((beyond, _),) = wire.ask({"type": "load", "index": 4})
    assert beyond == {"type": "error", "index": 4, "message": "there is no image 4"}
    assert wire.ask({"type": "other"}) == wire.ask("noise") == []
    widget.index = 2
    with pytest.raises(Exception, match="index: expected 0 to 3, got 4"):
        widget.index = 4

    # The same messages, to the same script, from the frontend's side.
    answers[3] = {
        "content": {"type": "error", "index": 3, "message": "shard 1 is gone"},
        "buffers": [],
    }
    page = tmp_path / "widget.html"
    page.write_text(
        f"<!doctype html><html><body><div id=cell></div><script type=module>{static('viewer.js')}\n"
        "window.render = render;</script></body></html>"
    )
    given = json.dumps({"meta": viewer.meta, "answers": answers}).replace("<", "\\u003c")
    found = run_page(page, TOOLS + f"const given = {given};" + """
      const on = {}, asked = [], saved = [];
      const values = {
        meta: given.meta, index: 1, quantity: "hardness", opacity: 0.6, threshold: null };
      const model = {
        get: (key) => values[key],
        set: (key, value) => {
          values[key] = value;
          for (const each of on[`change:${key}`] ?? []) each();
        },
        save_changes: () => saved.push(values.index),
        on: (event, action) => (on[event] ??= []).push(action),
        off: (event, action) => { on[event] = on[event].filter((each) => each !== action); },
        send: ({ type, index }) => {
          asked.push([type, index]);
          const { content, buffers } = given.answers[index];
          const views = buffers.map((text) => new DataView(
            Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer));
          setTimeout(() => on["msg:custom"].forEach((each) => each(content, views)), 3);
        },
      };
      const cell = document.getElementById("cell");
      const stop = window.render({ model, el: cell });
      const busy = async () => { do await new Promise((done) => setTimeout(done, 10));
        while (cell.querySelector("[aria-busy]")); };
      await busy();
      const root = cell.firstChild;
      const name = () => root.querySelector(".rddv-name").textContent;
      const found = { name: name(), asked: [...asked].map(String) };
      root.dispatchEvent(new KeyboardEvent("keydown", { key: "n", bubbles: true }));
      await busy();
      found.second = [name(), values.index];
      model.set("quantity", "discrepancy"); // as from Python
      model.set("threshold", 0.5);
      await new Promise(requestAnimationFrame);
      found.shown = root.querySelector(".rddv-shown").textContent;
      model.set("index", 3);
      await busy();
      found.error = root.querySelector(".rddv-note").textContent;
      model.set("index", 0);
      await busy();
      found.back = name();
      found.saved = saved;
      stop();
      found.left = [cell.children.length, Object.values(on).flat().length];
      return found;
    """)  # fmt: skip
    names = viewer.images.image_ids
    assert found["name"] == names[1]
    assert found["asked"] == ["load,1", "load,2"]  # only what is shown and the next one travel
    assert found["second"] == [names[2], 2]
    assert found["shown"].startswith("discrepancy ≥ 0.500 nats: ")
    assert found["error"] == f"{names[3]} cannot be shown: shard 1 is gone"
    assert found["back"] == names[0]
    assert found["saved"] == [2]  # what Python set is not sent back to it
    assert found["left"] == [0, 0]


def test_a_notebook_keeps_a_page_beside_the_widget(bare: Maps) -> None:
    bundle, _ = Viewer(bare, bare.image_ids[:1])._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/html"].startswith('<div class="rddv-embedded"><img src="data:image/jpeg')
    assert bundle["text/plain"] == f"Viewer({bare!r}, 1 images)"


def _array(values: list[float | None], size: tuple[int, int]) -> NDArray[np.float32]:
    return np.array(values, np.float32).reshape(size)  # None becomes NaN


def _between(text: str, start: str, end: str) -> str:
    return text.split(start, 1)[1].split(end, 1)[0]
