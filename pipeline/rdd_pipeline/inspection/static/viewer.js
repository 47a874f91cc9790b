// Linked pictures of one image's maps. One module for notebooks (anywidget calls `render`) and for
// pages that hold their data (`mountEmbedded`); both hand `mount` a source:
//   { meta, load(index) -> Promise<{ header, buffers: Uint8Array[] }> }
// as rdd_pipeline/inspection/viewer.py describes them. Nothing is requested from a network.

const QUANTITIES = {
  hardness: { title: "Hardness √(1 − p)", short: "hardness", hardAbove: true, of: "labelled pixels" },
  uncertainty: { title: "1 − confidence", short: "1 − confidence", hardAbove: true, of: "pixels" },
  discrepancy: { title: "Discrepancy D", short: "discrepancy", hardAbove: true, of: "pixels", unit: "nats" },
  weight: { title: "Weight exp(−D)", short: "weight", hardAbove: false, of: "pixels" },
};
const CLASS_VIEWS = { label: "Label", prediction: "Prediction", errors: "Wrong predictions" };
const VOID = 255;
const MOST_KEPT = 4; // decoded images
const KEYS = [
  ["← →, p n", "previous, next image"],
  ["Home End", "first, last image"],
  ["+ − 0", "zoom in, out, fit; also wheel and drag"],
  ["Shift + arrows", "move the crosshair"],
  ["o O", "more, less opacity"],
  ["t T", "threshold towards fewer, more pixels"],
  ["h", "hardness at the usual threshold p ≤ 0.7"],
  ["q", "next quantity"],
  ["?", "this list"],
  ["Esc", "close the list, unpin, leave the viewer"],
];

export function mount(element, source, start = 0) {
  const meta = source.meta;
  const names = meta.classes.map((each) => each.name);
  const scale = bytesOfHex(meta.cividis);
  const state = {
    index: -1, record: null, quantity: "hardness", opacity: 0.6, thresholds: {},
    pinned: -1, highlight: -1, cursor: null, view: null, help: false,
  };
  const cache = new Map();
  const listeners = new Set();
  let turn = 0, frame = 0, layers = new Map(), direction = 1, panels = [], laidOut = "";

  // ---- elements

  const root = make("div", { class: "rddv", tabindex: "0", role: "group",
    "aria-label": "Viewer of difficulty maps; press question mark for the keys" });
  const previous = button("‹", "Previous image (p)", () => go(state.index - 1));
  const next = button("›", "Next image (n)", () => go(state.index + 1));
  const place = make("span", { class: "rddv-place" });
  const name = make("span", { class: "rddv-name" });
  const caption = make("span", { class: "rddv-quiet" });
  const opacity = slider("Opacity", 0, 1, 0.05, (value) => set({ opacity: value }));
  const threshold = slider("Threshold", 0, 1, 0.005, (value) => set({ threshold: value }));
  const shown = make("output", { class: "rddv-shown" });
  const helpButton = button("?", "Keys (?)", () => toggleHelp());
  const help = make("dl", { class: "rddv-help", hidden: "" });
  for (const [keys, what] of KEYS) help.append(make("dt", {}, keys), make("dd", {}, what));
  const grid = make("div", { class: "rddv-panels" });
  const bar = make("div", { class: "rddv-bar" });
  const legend = make("div", { class: "rddv-legend", role: "group", "aria-label": "Classes" });
  const note = make("p", { class: "rddv-note", role: "status" });
  const tip = make("div", { class: "rddv-tip", hidden: "", "aria-hidden": "true" });
  const live = make("div", { class: "rddv-live", "aria-live": "polite" });
  root.append(
    make("div", { class: "rddv-tools" },
      make("span", { class: "rddv-steps" }, previous, next, place), name, caption, helpButton),
    make("div", { class: "rddv-tools" }, opacity.label, threshold.label, shown),
    help, grid, make("div", { class: "rddv-legends" }, bar, legend), note, tip, live);
  element.replaceChildren(root);

  const swatches = meta.classes.map((each, index) => {
    const item = make("button", { type: "button", class: "rddv-class", "aria-pressed": "false",
      title: `${each.name}: hover to see it alone, click to keep it` },
      swatch(each.color), each.name);
    item.addEventListener("pointerenter", () => highlight(index));
    item.addEventListener("pointerleave", () => highlight(-1));
    item.addEventListener("focus", () => { if (item.matches(":focus-visible")) highlight(index); });
    item.addEventListener("blur", () => highlight(-1));
    item.addEventListener("click", () => pin(state.pinned === index ? -1 : index));
    return item;
  });
  legend.append(...swatches);

  // ---- images

  function record(index) {
    if (!cache.has(index)) {
      const loading = source.load(index).then((loaded) => decode(loaded, meta));
      loading.catch(() => cache.delete(index)); // asked again the next time
      cache.set(index, loading);
    }
    const found = cache.get(index);
    cache.delete(index); // the latest last
    cache.set(index, found);
    for (const old of [...cache.keys()].slice(0, -MOST_KEPT)) cache.delete(old);
    return found;
  }

  async function go(index) {
    const last = meta.images.length - 1;
    const wanted = Math.max(0, Math.min(last, index));
    if (wanted === state.index || last < 0) return;
    direction = wanted < state.index ? -1 : 1;
    state.index = wanted;
    const mine = ++turn;
    root.setAttribute("aria-busy", "true");
    place.textContent = `${wanted + 1} / ${meta.images.length}`;
    name.textContent = meta.images[wanted].id;
    caption.textContent = meta.images[wanted].note;
    previous.disabled = wanted === 0;
    next.disabled = wanted === last;
    changed();
    const late = setTimeout(() => {
      if (mine === turn) note.textContent = "Waiting for Python. If its kernel has ended, run the cell again.";
    }, 5000);
    try {
      const found = await record(wanted);
      if (mine !== turn) return;
      state.record = found;
      state.cursor = null;
      state.view = null;
      layers = new Map();
      const { label, prediction } = found.arrays;
      const present = new Set([...new Set(prediction), ...new Set(label ?? [])]);
      swatches.forEach((item, index) => { item.hidden = !present.has(index); });
      note.textContent = [found.header.problem, meta.note].filter(Boolean).join(" ");
      layOut();
      draw();
      say(`${wanted + 1} of ${meta.images.length}: ${meta.images[wanted].id}. ${shown.textContent}`);
      const ahead = wanted + direction;
      if (meta.images[ahead]) record(ahead).catch(() => {}); // told when it is shown
    } catch (error) {
      if (mine !== turn) return;
      state.record = null;
      layOut();
      note.textContent = `${meta.images[wanted].id} cannot be shown: ${error.message}`;
    } finally {
      clearTimeout(late);
      if (mine === turn) root.removeAttribute("aria-busy");
    }
  }

  // ---- panels

  function kinds() {
    const has = state.record.arrays;
    return [...(has.image ? ["image"] : []), ...(has.label ? ["label"] : []), "prediction",
      ...(has.label ? ["errors"] : []), ...Object.keys(QUANTITIES)];
  }

  function layOut() {
    const available = state.record ? kinds().join() : "";
    if (available !== laidOut) {
      laidOut = available;
      panels = ["image", "label", "prediction", state.quantity]
        .filter((kind) => available.split(",").includes(kind))
        .map((kind, index) => makePanel(kind, index, available.split(",")));
      grid.replaceChildren(...panels.map((panel) => panel.figure));
      for (const panel of panels) sizes.observe(panel.canvas);
    }
    if (!state.record) return;
    const { width, height } = state.record.header;
    for (const panel of panels) panel.canvas.style.aspectRatio = `${width} / ${height}`;
  }

  function makePanel(kind, index, available) {
    const choice = make("select", { "aria-label": `Panel ${index + 1} shows` });
    for (const each of available) choice.append(make("option", { value: each }, titleOf(each)));
    choice.value = kind;
    const canvas = make("canvas", { role: "img" });
    const panel = { kind, choice, canvas, figure: make("figure", { class: "rddv-panel" }, choice, canvas) };
    choice.addEventListener("change", () => {
      panel.kind = choice.value;
      if (QUANTITIES[panel.kind]) state.quantity = panel.kind;
      changed();
      draw();
    });
    canvas.addEventListener("pointerdown", (event) => {
      root.focus({ preventScroll: true });
      if (event.button !== 0) return;
      panel.drag = { x: event.clientX, y: event.clientY };
      if (event.pointerType !== "mouse" && state.view.zoom === 1) return; // a finger scrolls the page
      canvas.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!state.record) return;
      if (panel.drag && state.view.zoom > 1) {
        const { scale: factor } = placing(canvas);
        state.view.x -= (event.clientX - panel.drag.x) / factor;
        state.view.y -= (event.clientY - panel.drag.y) / factor;
        panel.drag = { x: event.clientX, y: event.clientY };
        tip.hidden = true;
      } else point(event, canvas);
      draw();
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { panel.drag = null; });
    canvas.addEventListener("pointerleave", () => { state.cursor = null; tip.hidden = true; draw(); });
    canvas.addEventListener("dblclick", () => zoomBy(0));
    canvas.addEventListener("wheel", (event) => {
      if (!state.record) return;
      // The page scrolls as ever until someone has clicked here.
      if (!root.matches(":focus-within") && !event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      point(event, canvas);
      zoomBy(2 ** (-Math.sign(event.deltaY) / 4));
    }, { passive: false });
    return panel;
  }

  function placing(canvas) {
    const { width, height } = state.record.header;
    const box = { width: canvas.clientWidth, height: canvas.clientHeight };
    const fit = Math.min(box.width / width, box.height / height) || 1;
    state.view ??= { zoom: 1, x: width / 2, y: height / 2 };
    const view = state.view;
    const factor = fit * view.zoom;
    for (const [axis, full, seen] of [["x", width, box.width / factor], ["y", height, box.height / factor]])
      view[axis] = seen >= full ? full / 2 : Math.max(seen / 2, Math.min(full - seen / 2, view[axis]));
    return { scale: factor, left: box.width / 2 - view.x * factor, top: box.height / 2 - view.y * factor };
  }

  function point(event, canvas) {
    const { width, height } = state.record.header;
    const box = canvas.getBoundingClientRect();
    const at = placing(canvas);
    const x = Math.floor((event.clientX - box.left - at.left) / at.scale);
    const y = Math.floor((event.clientY - box.top - at.top) / at.scale);
    state.cursor = x >= 0 && y >= 0 && x < width && y < height ? [x, y] : null;
    showTip(event.clientX, event.clientY);
  }

  function showTip(clientX, clientY) {
    tip.hidden = !state.cursor;
    if (!state.cursor) return;
    tip.replaceChildren(...values().map(([what, value, color]) => make("div", {},
      make("span", { class: "rddv-quiet" }, what),
      make("b", {}, ...(color ? [swatch(color)] : []), value))));
    const box = root.getBoundingClientRect();
    const right = clientX - box.left + 18;
    const below = clientY - box.top + 18;
    tip.style.left = `${right + tip.offsetWidth > box.width ? Math.max(0, right - 36 - tip.offsetWidth) : right}px`;
    // Outputs of notebooks cut off what is beyond their last line.
    tip.style.top = `${Math.max(0, Math.min(below, box.height - tip.offsetHeight - 2))}px`;
  }

  function values() {
    const { record: shownRecord, cursor } = state;
    const { header, arrays } = shownRecord;
    const at = cursor[1] * header.width + cursor[0];
    const rows = [["pixel", `x ${cursor[0] * header.step}, y ${cursor[1] * header.step}`]];
    if (arrays.label) rows.push(["label", ...classAt(arrays.label[at])]);
    rows.push(["prediction", ...classAt(arrays.prediction[at])]);
    const hardness = shownRecord.values("hardness")[at];
    const known = !Number.isNaN(hardness);
    rows.push(["p of the label", known ? number(1 - hardness * hardness) : "no label"]);
    rows.push(["confidence", number(1 - shownRecord.values("uncertainty")[at])]);
    rows.push(["hardness √(1 − p)", known ? number(hardness) : "no label"]);
    rows.push(["discrepancy D", `${number(shownRecord.values("discrepancy")[at])} nats`]);
    rows.push(["weight exp(−D)", number(shownRecord.values("weight")[at])]);
    return rows;
  }

  function classAt(code) {
    return code < names.length ? [names[code], meta.classes[code].color] : ["ignored"];
  }

  // ---- drawing

  function limits(quantity) {
    return { low: 0, high: quantity === "discrepancy" && state.record ? state.record.most : 1 };
  }

  function thresholdOf(quantity) {
    const { low, high } = limits(quantity);
    return Math.fround(state.thresholds[quantity] ?? (QUANTITIES[quantity].hardAbove ? low : high));
  }

  function layer(kind) {
    const chosen = state.pinned >= 0 ? state.pinned : state.highlight;
    const key = `${kind} ${QUANTITIES[kind] ? thresholdOf(kind) : chosen}`;
    for (const old of layers.keys())
      if (old !== key && old.startsWith(`${kind} `)) layers.delete(old);
    if (!layers.has(key)) {
      const { width, height } = state.record.header;
      const canvas = make("canvas", {});
      canvas.width = width;
      canvas.height = height;
      const context = canvas.getContext("2d");
      const pixels = context.createImageData(width, height);
      const words = new Uint32Array(pixels.data.buffer);
      const counts = QUANTITIES[kind] ? paintQuantity(words, kind) : paintClasses(words, kind, chosen);
      context.putImageData(pixels, 0, 0);
      layers.set(key, { canvas, ...counts });
    }
    return layers.get(key);
  }

  function paintQuantity(words, kind) {
    const data = state.record.values(kind);
    const limit = thresholdOf(kind);
    const { low, high } = limits(kind);
    const { hardAbove } = QUANTITIES[kind];
    const colors = new Uint32Array(256);
    for (let i = 0; i < 256; i++) colors[i] = opaque(scale[3 * i], scale[3 * i + 1], scale[3 * i + 2]);
    let count = 0, total = 0;
    for (let i = 0; i < data.length; i++) {
      const value = data[i];
      if (value !== value) continue; // NaN: no label
      total++;
      if (hardAbove ? value < limit : value > limit) continue;
      count++;
      const shade = Math.round((255 * (value - low)) / (high - low));
      words[i] = colors[shade < 0 ? 0 : shade > 255 ? 255 : shade];
    }
    return { count, total };
  }

  function paintClasses(words, kind, chosen) {
    const { label, prediction } = state.record.arrays;
    const codes = kind === "label" ? label : prediction;
    const colors = new Uint32Array(256); // what has no class stays clear
    meta.classes.forEach(({ color }, index) => {
      if (chosen < 0 || chosen === index) colors[index] = opaque(...color);
    });
    if (kind === "errors") {
      for (let i = 0; i < codes.length; i++)
        if (label[i] !== VOID && label[i] !== codes[i]) words[i] = colors[codes[i]];
    } else for (let i = 0; i < codes.length; i++) words[i] = colors[codes[i]];
    return {};
  }

  function draw() {
    if (!frame) frame = requestAnimationFrame(() => { frame = 0; drawNow(); });
  }

  function drawNow() {
    if (!state.record) return;
    const ratio = window.devicePixelRatio || 1;
    for (const panel of panels) {
      const { canvas, kind } = panel;
      const size = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)];
      if (!size[0] || !size[1]) continue; // hidden
      if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
      const at = placing(canvas);
      const context = canvas.getContext("2d");
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.clearRect(0, 0, canvas.width, canvas.height);
      context.setTransform(ratio * at.scale, 0, 0, ratio * at.scale, ratio * at.left, ratio * at.top);
      const { width, height } = state.record.header;
      const photograph = state.record.arrays.image;
      context.imageSmoothingEnabled = at.scale * ratio < 4; // pixels show as squares when near
      if (photograph) context.drawImage(photograph, 0, 0, width, height);
      if (photograph && QUANTITIES[kind]) { // grey, so that all colour is the map's
        context.globalCompositeOperation = "saturation";
        context.fillStyle = "#808080";
        context.fillRect(0, 0, width, height);
        context.globalCompositeOperation = "source-over";
      }
      if (kind !== "image") {
        context.imageSmoothingEnabled = at.scale * ratio < 1;
        context.globalAlpha = photograph ? state.opacity : 1;
        context.drawImage(layer(kind).canvas, 0, 0);
        context.globalAlpha = 1;
      }
      if (state.cursor) cross(context, at, ratio, canvas);
      canvas.style.touchAction = state.view.zoom > 1 ? "none" : "pan-y";
      canvas.setAttribute("aria-label", `${titleOf(kind)} of ${meta.images[state.index].id}`);
    }
    showControls();
  }

  function cross(context, at, ratio, canvas) {
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    // In the middle of a pixel of the screen a thin line is not blurred.
    const sharp = (value) => (Math.floor(value * ratio) + 0.5) / ratio;
    const x = sharp(at.left + (state.cursor[0] + 0.5) * at.scale);
    const y = sharp(at.top + (state.cursor[1] + 0.5) * at.scale);
    const gap = Math.max(6, at.scale);
    context.beginPath();
    for (const [x0, y0, x1, y1] of [[0, y, x - gap, y], [x + gap, y, canvas.clientWidth, y],
      [x, 0, x, y - gap], [x, y + gap, x, canvas.clientHeight]]) {
      context.moveTo(x0, y0);
      context.lineTo(x1, y1);
    }
    // A light line on a dark one is seen on any photograph.
    for (const [color, width] of [["rgba(0,0,0,0.75)", 3], ["#fff", 1]]) {
      context.strokeStyle = color;
      context.lineWidth = width;
      context.stroke();
    }
  }

  function showControls() {
    const quantity = state.quantity;
    const about = QUANTITIES[quantity];
    const { low, high } = limits(quantity);
    const limit = thresholdOf(quantity);
    const { count, total } = layer(quantity);
    const sign = about.hardAbove ? "≥" : "≤";
    const unit = about.unit ? ` ${about.unit}` : "";
    const probability = quantity === "hardness" ? ` (p ≤ ${number(1 - limit * limit)})` : "";
    const share = total ? `${((100 * count) / total).toFixed(1)}%` : "none";
    shown.textContent = `${about.short} ${sign} ${number(limit)}${unit}${probability}: ${count} of ${total} ${about.of}, ${share}`;
    Object.assign(threshold.input, { min: low, max: high, step: (high - low) / 200, value: limit });
    threshold.input.setAttribute("aria-valuetext", shown.textContent);
    opacity.input.value = state.opacity;
    const stops = [];
    for (let i = 0; i <= 16; i++) {
      const k = 3 * Math.min(255, 16 * i);
      stops.push(`rgb(${scale[k]},${scale[k + 1]},${scale[k + 2]})`);
    }
    const strip = make("div", { class: "rddv-strip" }, make("i", {}));
    strip.style.background = `linear-gradient(to right, ${stops.join()})`;
    strip.firstChild.style.left = `${(100 * (limit - low)) / (high - low)}%`;
    const ticks = make("div", { class: "rddv-ticks" });
    for (const part of [0, 0.25, 0.5, 0.75, 1])
      ticks.append(make("span", {}, `${part === 1 && quantity === "discrepancy" ? "≥ " : ""}${short(low + part * (high - low))}`));
    bar.setAttribute("role", "img");
    bar.setAttribute("aria-label", `Colours of ${about.title} from ${low} to ${short(high)}${unit}`);
    bar.replaceChildren(
      make("div", {}, make("b", {}, about.title), unit,
        make("span", { class: "rddv-quiet" }, about.hardAbove ? "  bright is hard" : "  dark is hard")),
      strip, ticks);
    swatches.forEach((item, index) => {
      item.setAttribute("aria-pressed", String(state.pinned === index));
    });
  }

  // ---- what changes

  function set(wanted) {
    if (wanted.index !== undefined) go(wanted.index);
    if (wanted.opacity !== undefined) state.opacity = Math.round(100 * Math.max(0, Math.min(1, wanted.opacity))) / 100;
    if (QUANTITIES[wanted.quantity] && wanted.quantity !== state.quantity) {
      const panel = panels.find((each) => each.kind === state.quantity) ?? panels.at(-1);
      if (panel) panel.kind = panel.choice.value = wanted.quantity;
      state.quantity = wanted.quantity;
    }
    if (wanted.threshold !== undefined) {
      if (wanted.threshold === null) delete state.thresholds[state.quantity];
      else state.thresholds[state.quantity] = wanted.threshold;
    }
    changed();
    draw();
  }

  function changed() {
    const { index, quantity, thresholds } = state;
    const now = { index, quantity, opacity: state.opacity, threshold: thresholds[quantity] ?? null };
    for (const listener of listeners) listener(now);
  }

  function highlight(index) {
    state.highlight = index;
    draw();
  }

  function pin(index) {
    state.pinned = index;
    draw();
  }

  function zoomBy(factor) {
    if (!state.record || !panels.length) return;
    placing(panels[0].canvas);
    const view = state.view;
    const zoom = factor ? Math.max(1, Math.min(64, view.zoom * factor)) : 1;
    if (state.cursor) { // what is under the crosshair stays there
      const kept = view.zoom / zoom;
      view.x = state.cursor[0] + 0.5 + (view.x - state.cursor[0] - 0.5) * kept;
      view.y = state.cursor[1] + 0.5 + (view.y - state.cursor[1] - 0.5) * kept;
    }
    view.zoom = zoom;
    draw();
  }

  function moveCursor(dx, dy) {
    if (!state.record || !panels.length) return;
    const { width, height } = state.record.header;
    placing(panels[0].canvas);
    const from = state.cursor ?? [Math.floor(state.view.x) - dx, Math.floor(state.view.y) - dy];
    state.cursor = [Math.max(0, Math.min(width - 1, from[0] + dx)), Math.max(0, Math.min(height - 1, from[1] + dy))];
    const { canvas } = panels[0];
    let at = placing(canvas);
    const x = at.left + (state.cursor[0] + 0.5) * at.scale;
    const y = at.top + (state.cursor[1] + 0.5) * at.scale;
    if (x < 0 || x > canvas.clientWidth) state.view.x = state.cursor[0];
    if (y < 0 || y > canvas.clientHeight) state.view.y = state.cursor[1];
    at = placing(canvas);
    const box = canvas.getBoundingClientRect();
    showTip(box.left + at.left + (state.cursor[0] + 0.5) * at.scale, box.top + at.top + (state.cursor[1] + 0.5) * at.scale);
    say(values().map(([what, value]) => `${what} ${value}`).join(", "));
    draw();
  }

  function stepThreshold(steps) {
    const { low, high } = limits(state.quantity);
    const sign = QUANTITIES[state.quantity].hardAbove ? 1 : -1;
    const to = thresholdOf(state.quantity) + (sign * steps * (high - low)) / 20;
    set({ threshold: Math.max(low, Math.min(high, to)) });
  }

  function toggleHelp(open = help.hidden) {
    help.hidden = !open;
    helpButton.setAttribute("aria-expanded", String(open));
  }

  function escape() {
    if (!help.hidden) toggleHelp(false);
    else if (state.pinned >= 0) pin(-1);
    else document.activeElement?.blur();
  }

  function say(text) {
    live.textContent = text;
  }

  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const commands = {
    n: () => go(state.index + 1), ArrowRight: () => go(state.index + 1),
    p: () => go(state.index - 1), ArrowLeft: () => go(state.index - 1),
    Home: () => go(0), End: () => go(meta.images.length - 1),
    "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5), 0: () => zoomBy(0),
    o: () => set({ opacity: state.opacity + 0.1 }), O: () => set({ opacity: state.opacity - 0.1 }),
    t: () => stepThreshold(1), T: () => stepThreshold(-1),
    h: () => set({ quantity: "hardness", threshold: meta.usual }),
    q: () => {
      const all = Object.keys(QUANTITIES);
      set({ quantity: all[(all.indexOf(state.quantity) + 1) % all.length] });
    },
    "?": () => toggleHelp(),
    Escape: escape,
  };

  root.addEventListener("keydown", (event) => {
    if (withModifier(event)) return;
    event.stopPropagation(); // what is typed here is no shortcut of the page around
    const field = event.target.closest("select, input");
    const ours = event.shiftKey && arrows[event.key] ? () => moveCursor(...arrows[event.key]) : commands[event.key];
    if (!ours) return;
    if (field && event.key !== "Escape" && (field.tagName === "SELECT" || /^(Arrow|Home|End)/.test(event.key))) return;
    event.preventDefault();
    ours();
  });

  // JupyterLab looks at keys before they come here, and leaves alone what is so marked; without it
  // a plain letter would edit the notebook. Its own combinations such as Ctrl-S go on working.
  function mark(event) {
    if (root.contains(event.target))
      root.toggleAttribute("data-lm-suppress-shortcuts", !withModifier(event));
  }
  window.addEventListener("keydown", mark, true);

  const sizes = new ResizeObserver(() => draw());
  const ready = go(start);
  if (!meta.images.length) note.textContent = "There are no images to show.";

  const viewer = {
    ready, root, state, go, set, layer, drawNow, values, limits, thresholdOf,
    onChange(listener) { listeners.add(listener); },
    destroy() {
      turn++;
      sizes.disconnect();
      window.removeEventListener("keydown", mark, true);
      cancelAnimationFrame(frame);
      root.remove();
    },
  };
  return viewer;
}

// ---- data

async function decode({ header, buffers }, meta) {
  const arrays = {};
  await Promise.all(header.arrays.map(async ({ name, type }, index) => {
    if (type.startsWith("image/")) {
      arrays[name] = await createImageBitmap(new Blob([buffers[index]], { type }));
      return;
    }
    const packed = new Blob([buffers[index]]).stream();
    const bytes = await new Response(packed.pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
    arrays[name] = new { uint8: Uint8Array, uint16: Uint16Array, float32: Float32Array }[type](bytes);
  }));
  const kept = {};
  const record = {
    header, arrays,
    most: tidyMaximum(arrays.discrepancy),
    values(quantity) {
      kept[quantity] ??= COMPUTE[quantity](header, arrays, meta);
      return kept[quantity];
    },
  };
  return record;
}

const COMPUTE = {
  hardness: (header, arrays, meta) => lookUp(arrays.hardness, meta.hardness, (value) => value),
  uncertainty: (header, arrays, meta) => lookUp(arrays.confidence, meta.confidence, (value) => 1 - value),
  // The stored value of the nearest grid point.
  discrepancy: (header, { discrepancy }) => sample(header, (rows, columns) => {
    const nearest = ({ first, part }) => (part < 0.5 ? first : first + 1);
    return discrepancy[nearest(rows) * header.grid[1] + nearest(columns)];
  }),
  // As in training: the exponential first, then bilinear with aligned corners.
  weight: (header, { discrepancy }) => {
    const weights = discrepancy.map((value) => Math.exp(-value));
    const [height, width] = header.grid;
    return sample(header, (row, column) => {
      const along = (r) => {
        const left = weights[r * width + column.first];
        const right = weights[r * width + Math.min(width - 1, column.first + 1)];
        return left + (right - left) * column.part;
      };
      const above = along(row.first);
      return above + (along(Math.min(height - 1, row.first + 1)) - above) * row.part;
    });
  },
};

function lookUp(codes, { scale, highest }, change) {
  const table = new Float32Array(codes.BYTES_PER_ELEMENT === 1 ? 256 : 65536).fill(NaN);
  for (let code = 0; code <= highest; code++) table[code] = change(Math.fround(code * scale));
  const values = new Float32Array(codes.length);
  for (let i = 0; i < codes.length; i++) values[i] = table[codes[i]];
  return values;
}

function sample({ width, height, step, size, grid }, at) {
  const places = (count, full, points) => Array.from({ length: count }, (_, index) => {
    const exact = full > 1 ? (index * step * (points - 1)) / (full - 1) : 0;
    const first = Math.min(Math.floor(exact), Math.max(0, points - 1));
    return { first, part: exact - first };
  });
  const rows = places(height, size[0], grid[0]);
  const columns = places(width, size[1], grid[1]);
  const values = new Float32Array(width * height);
  for (let y = 0, i = 0; y < height; y++) for (let x = 0; x < width; x++, i++) values[i] = at(rows[y], columns[x]);
  return values;
}

// 1, 2 or 5 times a power of ten, so that neighbouring images mostly share a scale.
function tidyMaximum(values) {
  const sorted = Float32Array.from(values).sort();
  const high = Math.max(0.01, sorted[Math.floor(0.995 * (sorted.length - 1))]);
  const power = 10 ** Math.floor(Math.log10(high));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= high * 0.999);
}

function bytesOfHex(text) {
  return Uint8Array.from(text.match(/../g), (pair) => parseInt(pair, 16));
}

function opaque(red, green, blue) {
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0; // little-endian RGBA
}

// ---- elements

function make(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function button(text, title, action) {
  const made = make("button", { type: "button", title, "aria-label": title }, text);
  made.addEventListener("click", action);
  return made;
}

function slider(text, min, max, step, change) {
  const input = make("input", { type: "range", min, max, step });
  input.addEventListener("input", () => change(Number(input.value)));
  return { input, label: make("label", {}, text, input) };
}

function swatch(color) {
  const made = make("i", { class: "rddv-swatch" });
  made.style.background = `rgb(${color.join()})`;
  return made;
}

function titleOf(kind) {
  return kind === "image" ? "Image" : (CLASS_VIEWS[kind] ?? QUANTITIES[kind].title);
}

function withModifier(event) {
  return event.ctrlKey || event.metaKey || event.altKey;
}

function number(value) {
  return value.toFixed(3);
}

function short(value) {
  return String(Number(value.toPrecision(3)));
}

// ---- where the data come from

// The data beside the element, as viewer_fragment of viewer.py writes them.
export function embedded(element) {
  const { meta, records } = JSON.parse(element.querySelector('script[type="application/json"]').textContent);
  const unpack = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return {
    meta,
    async load(index) {
      const { header, buffers } = records[index];
      return { header, buffers: buffers.map(unpack) };
    },
  };
}

// Every fragment of a page brings this module; each element is taken by one of them.
export function mountEmbedded() {
  for (const element of document.querySelectorAll(".rddv-embedded:not([data-mounted])")) {
    element.dataset.mounted = "";
    element.rddViewer = mount(element, embedded(element));
  }
}

function asked(model) {
  const waiting = new Map();
  const answer = (message, buffers) => {
    const settle = waiting.get(message.index);
    if (!settle) return;
    waiting.delete(message.index);
    if (message.type === "image") {
      const views = buffers.map((each) => new Uint8Array(each.buffer ?? each, each.byteOffset ?? 0, each.byteLength));
      settle.resolve({ header: message.header, buffers: views });
    } else settle.reject(new Error(message.message));
  };
  model.on("msg:custom", answer);
  return {
    source: {
      meta: model.get("meta"),
      load: (index) => new Promise((resolve, reject) => {
        waiting.set(index, { resolve, reject });
        model.send({ type: "load", index });
      }),
    },
    stop: () => model.off("msg:custom", answer),
  };
}

const SHARED = ["index", "quantity", "opacity", "threshold"];

function render({ model, el }) {
  const { source, stop } = asked(model);
  const viewer = mount(el, source, model.get("index"));
  viewer.set(Object.fromEntries(SHARED.map((key) => [key, model.get(key)])));
  let telling = false; // a change of ours is not followed
  viewer.onChange((now) => {
    const news = SHARED.filter((key) => model.get(key) !== now[key]);
    telling = true;
    for (const key of news) model.set(key, now[key]);
    telling = false;
    if (news.length) model.save_changes();
  });
  const follow = Object.fromEntries(SHARED.map((key) => [`change:${key}`, () => {
    if (!telling) viewer.set({ [key]: model.get(key) });
  }]));
  for (const [event, action] of Object.entries(follow)) model.on(event, action);
  return () => {
    for (const [event, action] of Object.entries(follow)) model.off(event, action);
    stop();
    viewer.destroy();
  };
}

export default { render };
