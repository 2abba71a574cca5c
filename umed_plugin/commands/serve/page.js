// ---- The page of `umed serve`. Pictures and coordinates come from the server; this script only draws one over the other.

const $ = byId;
const WINDOWS = {file: "the file's own", full: "whole range", soft_tissue: "soft tissue"};
// view: what is shown. range: the values that are black and white there, null until known. turns: the questions and their answers;
// chosen: the one whose boxes are shown. coming: the study that is being uploaded.
const state = {study: null, items: [], view: null, range: null, turns: [], count: 0, chosen: null, uploads: 0, coming: null, stop: null, loading: null,
               wanted: false, asking: false};
const panes = [...document.querySelectorAll(".pane")].map((figure, k) => new Pane(figure, box => light(k, box)));
const zoom = new Zoom(panes, {changed: place, dragged, slices: {exist: () => !$("slice-label").hidden, by: count => bySlices(count)}});

function fault(text) { $("fault").textContent = text; }
function status(text) { $("status").textContent = text; }
function waiting(before) {
  return before ? `Waiting: ${before} ${before === 1 ? "request is" : "requests are"} before this one.` : "The model is reading the image.";
}

function forget() {
  if (state.loading) {  // its picture would be shown, or missed, beside the next study
    state.loading.onload = state.loading.onerror = null;
    state.loading.removeAttribute("src");
    document.body.classList.remove("loading");
  }
  if (state.study) navigator.sendBeacon(`/studies/${state.study}/forget`);
  if (state.stop) state.stop.abort();
  Object.assign(state, {study: null, loading: null, wanted: false, items: [], view: null, range: null, turns: [], count: 0, chosen: null});
  $("talk").replaceChildren();
  for (const {picture} of panes) {
    picture.removeAttribute("src");
    delete picture.dataset.address;
  }
  $("shown").hidden = true;
  document.body.classList.add("empty");
  document.body.classList.remove("asked");
}

function begin(study, items, leftOut) {
  Object.assign(state, {study, items});
  $("item").replaceChildren(...items.map((item, index) => new Option(item.label, index)));
  $("item-label").hidden = items.length < 2;
  $("left-out").hidden = !leftOut.length;
  $("left-out").textContent = leftOut.length
    ? `Note: ${leftOut.slice(0, 3).join("; ")}${leftOut.length > 3 ? `; and ${leftOut.length - 3} more` : ""}` : "";
  document.body.classList.remove("empty");
  $("shown").hidden = false;
  // A finger on the picture scrolls the page, so it does not change the window unless it is asked to.
  $("drag").value = items[0].windows.length && !matchMedia("(pointer: coarse)").matches ? "window" : "move";
  zoom.whole();
  show({item: 0});
  $("question").focus({preventScroll: true});
}

// ---- The view.

const samePlace = (a, b) => a && b && ["item", "axis", "slice", "volume"].every(part => a[part] === b[part]);
const same = (a, b) => samePlace(a, b) && a.window === b.window;
const byHand = window => window.includes(",");
const rangeOf = window => window.split(",").map(Number);
const short = value => String(Number(value.toPrecision(5)));
const wordsOf = window => byHand(window) ? `${rangeOf(window).map(short).join(" to ")}` : WINDOWS[window] || window;
const itemOf = view => state.items[view.item];
const planeOf = view => itemOf(view).planes.find(plane => plane.axis === view.axis);

// Change parts of the view. Values that the new item or plane lacks fall back to its first, or to the middle slice. A window by hand
// belongs to its item, unless the change brings it along: an answer is shown in the window that the model saw.
function show(change) {
  const before = state.view || {}, item = state.items[change.item ?? before.item];
  const sameItem = (change.item ?? before.item) === before.item;
  const axis = change.axis ?? (sameItem ? before.axis : item.planes[0].axis);
  const plane = item.planes.find(plane => plane.axis === axis) || item.planes[0];
  const samePlane = sameItem && plane.axis === before.axis;
  const window = change.window ?? before.window;
  const fits = item.windows.includes(window) || (item.windows.length && window && byHand(window) && (sameItem || change.window));
  state.view = {
    item: change.item ?? before.item,
    axis: plane.axis,
    slice: Math.min(change.slice ?? (samePlane ? before.slice : Math.floor(plane.slices / 2)), plane.slices - 1),
    volume: Math.min(change.volume ?? (sameItem ? before.volume : 0), item.volumes - 1),
    window: fits ? window : item.windows[0] || "file",
  };
  if (!samePlane) zoom.whole();
  state.range = byHand(state.view.window) ? rangeOf(state.view.window) : null;
  showControls(item, plane);
  loadPicture();
  showOverlays();
}

function showControls(item, plane) {
  const view = state.view;
  $("item").value = view.item;
  $("plane-label").hidden = item.planes.length < 2;
  $("plane").replaceChildren(...item.planes.map(each => new Option(each.name, each.axis)));
  $("plane").value = view.axis;
  $("windows").hidden = !item.windows.length;
  $("window").replaceChildren(...item.windows.map(name => new Option(wordsOf(name), name)),
    ...(byHand(view.window) ? [new Option("by hand", view.window)] : []));
  $("window").value = view.window;
  for (const [name, count] of [["slice", plane.slices], ["volume", item.volumes]]) {
    $(name + "-label").hidden = count < 2;
    $(name).max = count - 1;
    $(name).value = view[name];
    $(name + "-shown").textContent = `${view[name] + 1} of ${count}`;
    $(name).setAttribute("aria-valuetext", `${view[name] + 1} of ${count}`);
  }
  $("sides").textContent = plane.edges
    ? `Letters: ${plane.edges[0]} at the left edge and ${plane.edges[1]} at the right, ${plane.edges[2]} at the top and ${plane.edges[3]} at the bottom.`
    : "No letters of side: the file does not say how the picture lies.";
  for (const pane of panes) {
    pane.showSides(plane.edges);
    pane.picture.alt = describe(view);
  }
  showRange();
}

function describe(view) {
  const item = itemOf(view), plane = planeOf(view), parts = [];
  if (state.items.length > 1) parts.push(item.label);
  if (item.planes.length > 1) parts.push(plane.name);
  if (plane.slices > 1) parts.push(`slice ${view.slice + 1} of ${plane.slices}`);
  if (item.volumes > 1) parts.push(`volume ${view.volume + 1}`);
  if (item.windows.length > 1) parts.push(`window: ${wordsOf(view.window)}`);
  return parts.join(", ") || item.label;
}

const bySlices = count => show({slice: Math.max(0, state.view.slice + count)});

// One picture at a time: while one loads, only the latest request is remembered.
function loadPicture() {
  if (document.body.classList.contains("loading")) { state.wanted = true; return; }
  const address = `/studies/${state.study}/picture?${new URLSearchParams(state.view)}`;
  if (panes[0].picture.dataset.address === address) return;
  document.body.classList.add("loading");
  const {study} = state, picture = new Image();
  state.loading = picture;
  const done = async worked => {
    document.body.classList.remove("loading");
    state.loading = null;
    if (worked) {
      for (const pane of panes) {
        pane.picture.src = picture.src;
        pane.picture.dataset.address = address;
      }
      place();
      fault("");
    } else {
      const reply = await fetch(address).catch(() => null);
      const content = reply && !reply.ok ? await reply.json().catch(() => ({})) : {};
      if (state.study === study) fault(content.error || GONE);
    }
    if (state.wanted) { state.wanted = false; if (state.view) loadPicture(); }
  };
  picture.onload = () => done(true);
  picture.onerror = () => done(false);
  picture.src = address;
}

// The panes as large as the space allows, side by side; on a phone as wide as the page, one above the other.
function place() {
  const {naturalWidth: width, naturalHeight: height} = panes[0].picture;
  if (!width || $("shown").hidden) return;
  const wide = innerWidth > 860, columns = wide ? panes.length : 1;
  const space = $("viewer").clientWidth - 2 * parseFloat(getComputedStyle($("viewer")).paddingLeft);
  let most = innerHeight * 0.62;
  if (wide) {
    const others = [...$("shown").children].filter(part => part !== $("panes") && !part.hidden);
    const names = panes.length > 1 ? 30 : 0;
    most = $("viewer").clientHeight - $("choose").offsetHeight - others.reduce((sum, part) => sum + part.offsetHeight + 10, 0) - 48 - names;
  }
  const scale = Math.min((space - 12 * (columns - 1)) / columns / width, Math.max(most, 240) / height);
  for (const pane of panes) pane.place(zoom, Math.floor(width * scale), Math.floor(height * scale));
  $("zoom-whole").textContent = `${Math.round(zoom.zoom * 100)} %`;
  $("zoom-whole").setAttribute("aria-label", `${$("zoom-whole").textContent}: show the whole picture`);
  document.body.classList.toggle("moving", $("drag").value === "move" || $("windows").hidden);
}

// ---- Level and width.

const levelAndWidth = ([low, high]) => [(low + high) / 2, high - low];

// Show the range of the current window, which for a named one the server knows.
function showRange() {
  if ($("windows").hidden) return;
  if (!state.range) return void askRange();
  const [level, width] = levelAndWidth(state.range);
  if (document.activeElement !== $("level")) $("level").value = short(level);
  if (document.activeElement !== $("width")) $("width").value = short(width);
}

// One request at a time: of the views that follow meanwhile, only the latest is asked for.
async function askRange() {
  if (state.asking) return;
  state.asking = true;
  let view = null;
  while (state.view && view !== state.view && !state.range && !$("windows").hidden) {
    view = state.view;
    const found = await send("GET", `/studies/${state.study}/window?${new URLSearchParams(view)}`).catch(() => null);
    if (found && view === state.view && !state.range) state.range = [found.low, found.high];
  }
  state.asking = false;
  if (state.view && state.range) showRange();
}

function setRange(level, width) {
  if (!Number.isFinite(level) || !Number.isFinite(width)) return;
  const least = Math.max(Math.abs(level) * 1e-4, 1e-3), half = Math.max(width, least) / 2;
  const range = [level - half, level + half].map(value => Math.min(Math.max(value, -1e8), 1e8));
  show({window: range.map(value => value.toFixed(half < 5 ? 4 : 0)).join(",")});
  state.range = range;  // as it is: the next pixel of a slow drag starts from it
}

// A drag: to the right widens the window, up lowers its level. Returns whether it was for the window.
function dragged(pixels) {
  if ($("windows").hidden || $("drag").value !== "window") return false;
  if (!pixels || !state.range) { showRange(); return true; }
  const [level, width] = levelAndWidth(state.range), step = Math.max(width, 1e-3) / 250;
  setRange(level + pixels[1] * step, width + pixels[0] * step);
  return true;
}

// ---- User input.

for (const id of ["files", "folder"]) {
  $(id).addEventListener("change", event => { choose(event.target.files); event.target.value = ""; });
}
addEventListener("dragover", event => { event.preventDefault(); document.body.classList.add("dropping"); });
addEventListener("dragleave", event => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
addEventListener("drop", event => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  dropped(event.dataTransfer).then(choose, error => fault(error.message));
});
for (const name of ["slice", "volume"]) $(name).addEventListener("input", event => show({[name]: Number(event.target.value)}));
$("item").addEventListener("change", event => show({item: Number(event.target.value)}));
$("plane").addEventListener("change", event => show({axis: Number(event.target.value)}));
$("window").addEventListener("change", event => show({window: event.target.value}));
for (const id of ["level", "width"]) {
  $(id).addEventListener("change", () => setRange($("level").valueAsNumber, $("width").valueAsNumber));
}
$("drag").addEventListener("change", place);
$("zoom-in").addEventListener("click", () => zoom.to(zoom.zoom * 1.4));
$("zoom-out").addEventListener("click", () => zoom.to(zoom.zoom / 1.4));
$("zoom-whole").addEventListener("click", () => zoom.whole());

const KEYS = {
  "+": () => zoom.to(zoom.zoom * 1.4), "=": () => zoom.to(zoom.zoom * 1.4), "-": () => zoom.to(zoom.zoom / 1.4), "0": () => zoom.whole(),
};
function arrow(key, shift) {
  const [dx, dy] = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[key];
  if (shift) {
    if (!state.range || $("windows").hidden) return false;
    const [level, width] = levelAndWidth(state.range);
    setRange(level + dy * width / 20, width * (1 + dx / 10));
  } else if (zoom.zoom > 1) zoom.pan(-dx * .1, -dy * .1);
  else if (!$("slice-label").hidden) bySlices(dx + dy);
  else return false;
  return true;
}
for (const {stage} of panes) {
  stage.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key.startsWith("Arrow") ? arrow(event.key, event.shiftKey) : KEYS[event.key]) {
      event.preventDefault();
      KEYS[event.key]?.();
    }
  });
}
for (const id of ["with-boxes", "with-heat", "sinks"]) $(id).addEventListener("change", showOverlays);
$("opacity").value = HEAT_OPACITY;
$("opacity").addEventListener("input", () => { if (state.chosen) showHeat(state.chosen); });
$("word").addEventListener("change", event => { state.chosen.word = Number(event.target.value); showOverlays(); });
$("anyway").addEventListener("click", () => { state.chosen.anyway = true; showOverlays(); $("with-heat").focus(); });
$("back").addEventListener("click", () => show(state.chosen.view));
$("ask").addEventListener("submit", event => { event.preventDefault(); ask($("question").value); });
$("question").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask($("question").value); }
});
for (const button of $("suggestions").children) button.addEventListener("click", () => ask(button.textContent.trim()));
$("stop").addEventListener("click", () => state.stop?.abort());
addEventListener("resize", place);
addEventListener("pagehide", event => {
  for (const study of [state.study, state.coming]) if (!event.persisted && study) navigator.sendBeacon(`/studies/${study}/forget`);
});
document.body.classList.add("empty");
