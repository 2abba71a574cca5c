// ---- A gallery of pictures, and one of them opened. `DATA` is what the page's Python gave.
const DATA = JSON.parse(document.getElementById("data").textContent);
const PAGE = 24;

const number = (value, digits = 2) => value === null || value === undefined ? "–" : value.toFixed(digits);
const namesOf = card => card.classes.length ? card.classes : ["no abnormality"];
const classesOf = card => card.classes.length ? card.classes.join(", ") : "no abnormality";

// ---- A picture with boxes and heat over it; boxes are in 0-1 of the square that the picture shows.

function boxLayer(boxes, name) {
  const layer = svg("svg", {viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true", class: "boxes " + name});
  for (const [x1, y1, x2, y2] of boxes) {
    for (const part of ["casing", "edge"]) layer.append(svg("rect", {x: x1, y: y1, width: x2 - x1, height: y2 - y1, class: part}));
  }
  return layer;
}

function heatLayer(heat) {
  const [rows, columns] = heat.grid;
  const canvas = el("canvas", {className: "heat", "aria-hidden": "true"});
  canvas.style.width = canvas.style.height = 100 * heat.covers + "%";
  drawHeat(canvas, rows, columns, heatTimes(heat.values, heat.peak));
  return canvas;
}

function picture(card, alt, ...layers) {
  if (!card.picture) return el("div", {className: "picture gone"}, el("p", {}, "No picture: " + card.fault));
  return el("div", {className: "picture"}, el("img", {src: card.picture, alt, decoding: "async"}), ...layers);
}

// ---- A gallery: a list of cards, sorted, filtered, drawn a page at a time; the arrow keys move through it.

class Gallery {
  // filters: field -> the card's values, one of which the field must have.
  constructor(name, cards, orders, draw, open, filters = {source: card => [card.source], class: namesOf}) {
    Object.assign(this, {name, cards, orders, draw, open, filters, shown: [], drawn: 0});
    this.list = byId(name + "-list");
    this.more = byId(name + "-more");
    this.fields = {};
    for (const field of ["sort", "from", "to", ...Object.keys(filters)]) {
      this.fields[field] = byId(name + "-" + field);
      if (this.fields[field]) this.fields[field].addEventListener("change", () => this.show());
    }
    for (const [field, values] of Object.entries(filters)) this.fill(field, [...new Set(cards.flatMap(values))].sort());
    this.more.addEventListener("click", () => { const next = this.drawn; this.drawMore(); this.focus(next); });
    this.list.addEventListener("keydown", event => this.walk(event));
    this.list.addEventListener("click", event => {
      const button = event.target.closest("button");
      if (button) this.openAt(Number(button.dataset.place));
    });
    this.show();
  }

  fill(field, values) {
    for (const value of values) this.fields[field].append(el("option", {value, textContent: value}));
  }

  value(field) { return this.fields[field] ? this.fields[field].value : ""; }

  show() {
    const wanted = Object.entries(this.filters).map(([field, values]) => [this.value(field), values]).filter(([value]) => value);
    const fits = card => wanted.every(([value, values]) => values(card).includes(value));
    const key = this.orders[this.value("sort")];
    const keyed = this.cards.filter(fits).map(card => [key(card, Number(this.value("from")), Number(this.value("to"))), card]);
    keyed.sort(([a], [b]) => { const at = a.findIndex((value, i) => value !== b[i]); return at < 0 ? 0 : a[at] - b[at]; });
    this.shown = keyed.map(([, card]) => card);
    this.list.replaceChildren();
    this.drawn = 0;
    this.drawMore();
  }

  drawMore() {
    const next = this.shown.slice(this.drawn, this.drawn + PAGE);
    next.forEach((card, i) => {
      const place = this.drawn + i;
      const button = el("button", {type: "button", className: "card", tabIndex: place ? -1 : 0}, ...this.draw(card, this));
      button.dataset.place = place;
      this.list.append(el("li", {}, button));
    });
    this.drawn += next.length;
    const left = this.shown.length - this.drawn;
    this.more.hidden = left === 0;
    this.more.textContent = "Show " + Math.min(PAGE, left) + " more";
    byId(this.name + "-count").textContent = this.shown.length
      ? this.drawn + " of " + this.shown.length + " shown" + (this.shown.length < this.cards.length ? ", " + this.cards.length + " in all" : "")
      : "Nothing matches these filters.";
  }

  buttons() { return [...this.list.querySelectorAll("button")]; }

  focus(place) {
    while (place >= this.drawn && this.drawn < this.shown.length) this.drawMore();
    const buttons = this.buttons(), target = buttons[Math.max(0, Math.min(place, buttons.length - 1))];
    if (!target) return;
    buttons.forEach(button => { button.tabIndex = button === target ? 0 : -1; });
    target.focus();
  }

  walk(event) {
    const buttons = this.buttons(), here = buttons.indexOf(document.activeElement);
    if (here < 0) return;
    const columns = getComputedStyle(this.list).gridTemplateColumns.split(" ").length;
    const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns}[event.key];
    const target = {Home: 0, End: buttons.length - 1}[event.key] ?? (step === undefined ? null : here + step);
    if (target === null || target < 0) return;
    event.preventDefault();
    this.focus(target);
  }

  openAt(place) { viewer.open(this, place); }
}

// ---- One open card: previous and next by button or arrow key; Escape closes it and returns to the card.

const viewer = {
  dialog: byId("viewer"), gallery: null, place: 0,
  open(gallery, place) {
    this.gallery = gallery;
    this.fill(place);
    this.dialog.showModal();
    this.dialog.scrollTop = 0;
  },
  fill(place) {
    const cards = this.gallery.shown;
    this.place = Math.max(0, Math.min(place, cards.length - 1));
    const card = cards[this.place];
    byId("viewer-title").textContent = card.id;
    byId("viewer-place").textContent = this.place + 1 + " of " + cards.length;
    byId("viewer-previous").disabled = this.place === 0;
    byId("viewer-next").disabled = this.place === cards.length - 1;
    byId("viewer-copied").textContent = "";
    byId("viewer-link").href = "#" + linkOf(this.gallery, card);
    byId("viewer-body").replaceChildren(...this.gallery.open(card));
  },
};
// A link to one study: #studies=ID; of stage 2's answers, #candidates=STEP/ID.
const linkOf = (gallery, card) => gallery.name + "=" + encodeURIComponent(card.step === undefined ? card.id : card.step + "/" + card.id);
byId("viewer-link").addEventListener("click", event => {
  event.preventDefault();
  const link = byId("viewer-link");
  history.replaceState(null, "", link.href);
  // A browser may refuse the clipboard; the address bar has the link in any case.
  const say = text => { byId("viewer-copied").textContent = text; };
  if (!navigator.clipboard) return say("link is in the address bar");
  navigator.clipboard.writeText(location.href).then(() => say("link copied"), () => say("link is in the address bar"));
});
function openLinked(galleries) {
  let wanted = "";
  try { wanted = decodeURIComponent(location.hash.slice(1)); } catch { return; }  // not a link of this page
  for (const gallery of galleries) {
    const place = gallery ? gallery.shown.findIndex(card => decodeURIComponent(linkOf(gallery, card)) === wanted) : -1;
    if (place >= 0) viewer.open(gallery, place);
  }
}
byId("viewer-previous").addEventListener("click", () => viewer.fill(viewer.place - 1));
byId("viewer-next").addEventListener("click", () => viewer.fill(viewer.place + 1));
byId("viewer-close").addEventListener("click", () => viewer.dialog.close());
viewer.dialog.addEventListener("close", () => viewer.gallery.focus(viewer.place));
viewer.dialog.addEventListener("click", event => { if (event.target === viewer.dialog) viewer.dialog.close(); });
viewer.dialog.addEventListener("keydown", event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step || event.target.closest(".scroll")) return;
  event.preventDefault();
  viewer.fill(viewer.place + step);
});
