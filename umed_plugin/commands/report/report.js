"use strict";
// Texts of models and files enter the page as text only: no element is ever created from a string.
const DATA = JSON.parse(document.getElementById("data").textContent);
const PAGE = 24;
const byId = id => document.getElementById(id);

function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made && !name.startsWith("aria")) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter(child => child !== null && child !== undefined));
  return made;
}

const number = (value, digits = 2) => value === null || value === undefined ? "–" : value.toFixed(digits);
const classesOf = card => card.classes.length ? card.classes.join(", ") : "no abnormality";

// ---- A picture with boxes and heat over it; boxes are in 0-1 of the square that the picture shows.

function boxLayer(boxes, name) {
  const space = "http://www.w3.org/2000/svg";
  const layer = document.createElementNS(space, "svg");
  layer.setAttribute("viewBox", "0 0 1 1");
  layer.setAttribute("preserveAspectRatio", "none");
  layer.setAttribute("aria-hidden", "true");
  layer.setAttribute("class", "boxes " + name);
  for (const [x1, y1, x2, y2] of boxes) {
    for (const part of ["casing", "edge"]) {
      const shape = document.createElementNS(space, "rect");
      const place = {x: x1, y: y1, width: x2 - x1, height: y2 - y1, class: part};
      for (const [key, value] of Object.entries(place)) shape.setAttribute(key, value);
      layer.append(shape);
    }
  }
  return layer;
}

// Dark violet to yellow, as matplotlib's plasma: even steps of brightness, safe for colour blindness. All maps share one scale;
// otherwise a uniform map would look like a sharp one. No attention is transparent, MOST times a uniform share or more is yellow.
const MOST = 4;
const RAMP = [[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]];

function heatLayer(heat) {
  const [rows, columns] = heat.grid;
  const values = Uint8Array.from(atob(heat.values), byte => byte.charCodeAt(0));
  const canvas = el("canvas", {width: columns, height: rows, className: "heat", "aria-hidden": "true"});
  canvas.style.width = canvas.style.height = 100 * heat.covers + "%";
  const image = new ImageData(columns, rows);
  values.forEach((value, patch) => {
    const share = Math.min(value / 255 * heat.peak * rows * columns / MOST, 1);
    const at = share * (RAMP.length - 1), low = Math.min(Math.floor(at), RAMP.length - 2);
    const mixed = RAMP[low].map((from, i) => from + (RAMP[low + 1][i] - from) * (at - low));
    image.data.set([...mixed, 190 * share], 4 * patch);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function picture(card, alt, ...layers) {
  if (!card.picture) return el("div", {className: "picture gone"}, el("p", {}, "No picture: " + card.fault));
  return el("div", {className: "picture"}, el("img", {src: card.picture, alt, decoding: "async"}), ...layers);
}

// ---- A gallery: a list of cards, sorted, filtered, drawn a page at a time; the arrow keys move through it.

class Gallery {
  constructor(name, cards, orders, draw, open) {
    Object.assign(this, {name, cards, orders, draw, open, shown: [], drawn: 0});
    this.list = byId(name + "-list");
    this.more = byId(name + "-more");
    this.fields = {};
    for (const field of ["sort", "source", "class", "from", "to"]) {
      this.fields[field] = byId(name + "-" + field);
      if (this.fields[field]) this.fields[field].addEventListener("change", () => this.show());
    }
    this.fill("source", [...new Set(cards.map(card => card.source))].sort());
    this.fill("class", [...new Set(cards.flatMap(card => card.classes.length ? card.classes : ["no abnormality"]))].sort());
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
    const source = this.value("source"), wanted = this.value("class");
    const fits = card => (!source || card.source === source)
      && (!wanted || (card.classes.length ? card.classes : ["no abnormality"]).includes(wanted));
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
    byId("viewer-body").replaceChildren(...this.gallery.open(card));
  },
};
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

function facts(card) {
  const pairs = [["True", classesOf(card)], ["Source", card.source], ["Modality", card.modality], ["Question", card.question]];
  if (card.step !== undefined) pairs.push(["Step", String(card.step)]);
  const missing = card.picture ? card.true_count - card.true.length : 0;
  if (missing) pairs.push(["Note", missing + " true box(es) lie outside the part that the model sees."]);
  return el("dl", {className: "facts"}, ...pairs.filter(([, value]) => value)
    .map(([name, value]) => el("div", {}, el("dt", {textContent: name}), el("dd", {textContent: value}))));
}

// ---- Held-out studies.

const studyOrders = {
  gain: (card, from, to) => [gainOf(card, "iou", from, to), gainOf(card, "accuracy", from, to)],
  loss: (card, from, to) => [-gainOf(card, "iou", from, to), -gainOf(card, "accuracy", from, to)],
  failure: (card, from, to) => { const a = card.answers[to]; return a ? [a.accuracy, a.iou, gainOf(card, "iou", from, to) * -1] : [9]; },
  asked: () => [0],
};

// Negative, since the smallest key comes first; a study that a stage was not asked about comes last.
function gainOf(card, what, from, to) {
  return card.answers[from] && card.answers[to] ? card.answers[from][what] - card.answers[to][what] : 9;
}

function drawStudy(card) {
  const layers = [boxLayer(card.true, "true")];
  card.answers.forEach((answer, stage) => { if (answer) layers.push(boxLayer(answer.boxes, "stage-" + stage)); });
  const heated = byId("heat").value, answer = heated === "" ? null : card.answers[heated];
  if (answer && answer.heat) layers.unshift(heatLayer(answer.heat));
  const overlaps = card.answers.map(answer => answer ? number(answer.iou) : "–").join(" → ");
  const last = card.answers[card.answers.length - 1];
  const verdict = last ? (last.accuracy === 1 ? "right class" : "wrong class") : "not asked";
  const alt = "Study " + card.id + ", true: " + classesOf(card);
  return [
    picture(card, alt, ...layers),
    el("span", {className: "name", textContent: classesOf(card)}),
    el("span", {className: "scores"}, "IoU " + overlaps, el("span", {className: last && last.accuracy === 1 ? "right" : "wrong", textContent: verdict})),
  ];
}

function openStudy(card) {
  const panels = card.answers.map((answer, stage) => answer && el("section", {className: "panel"},
    el("h3", {}, el("span", {className: "swatch stage-" + stage}), DATA.stages[stage]),
    picture(card, "Boxes of " + DATA.stages[stage] + ": " + answer.boxes.length + ", true: " + card.true_count,
      boxLayer(card.true, "true"), boxLayer(answer.boxes, "stage-" + stage)),
    el("p", {className: "answer", textContent: answer.text || "(an empty answer)"}),
    el("dl", {className: "facts"},
      ...[["Diagnosis", answer.accuracy === 1 ? "right" : "wrong"], ["IoU", number(answer.iou)],
          ["Vision relevance", number(answer.relevance, 3)],
          ["Malformed boxes", answer.malformed ? String(answer.malformed) : ""]]
        .filter(([, value]) => value).map(([name, value]) => el("div", {}, el("dt", {textContent: name}), el("dd", {textContent: value})))),
    heatFigure(card, answer)));
  return [facts(card), legend(), el("div", {className: "panels"}, ...panels)];
}

function heatFigure(card, answer) {
  if (!card.picture) return null;
  const why = answer.relevance ? "this evaluation did not store it." : "the answer names no abnormality.";
  if (!answer.heat) return el("p", {className: "soft", textContent: "No attention map: " + why});
  const of = answer.heat.of_true_name ? "the abnormality's name" : "the name in the answer, which is wrong";
  return el("figure", {className: "attention"},
    picture(card, "Attention of " + of + " over the image", heatLayer(answer.heat), boxLayer(card.true, "true")),
    el("figcaption", {}, "Attention of " + of + ". Yellow: at least " + MOST + " times a uniform share; the highest patch has "
      + (answer.heat.peak * answer.heat.grid[0] * answer.heat.grid[1]).toFixed(1) + " times."));
}

function legend() {
  return el("p", {className: "legend"}, ...["true", ...DATA.stages].map((name, i) =>
    el("span", {}, el("span", {className: "swatch " + (i ? "stage-" + (i - 1) : "true")}), i ? name : "true box")));
}

// ---- Sampled answers of stage 2.

const rewardsOf = card => card.rows.map(row => row.reward).filter(value => value !== null);
const bestOf = card => Math.max(...rewardsOf(card));
const meanOf = card => rewardsOf(card).reduce((a, b) => a + b, 0) / rewardsOf(card).length;
const candidateOrders = {
  step: card => [card.step],
  gain: card => [meanOf(card) - bestOf(card)],
  failure: card => [bestOf(card)],
};

function drawCandidates(card) {
  const best = card.rows.find(row => row.reward === bestOf(card));
  const others = card.rows.filter(row => row !== best).flatMap(row => row.boxes);
  return [
    picture(card, "Question " + card.id + " at step " + card.step, boxLayer(others, "other"), boxLayer(card.true, "true"), boxLayer(best.boxes, "best")),
    el("span", {className: "name", textContent: classesOf(card)}),
    el("span", {className: "scores", textContent: "step " + card.step + ": reward " + number(meanOf(card)) + ", best " + number(bestOf(card))}),
  ];
}

function openCandidates(card) {
  const best = bestOf(card), frame = el("div", {className: "panel"});
  const show = chosen => {
    const others = card.rows.filter(row => row !== chosen).flatMap(row => row.boxes);
    frame.replaceChildren(picture(card, "Boxes of the answers", boxLayer(others, "other"), boxLayer(card.true, "true"), boxLayer(chosen.boxes, "best")));
  };
  const names = ["answer", ...card.terms, "reward"];
  const table = el("table", {className: "stacked"}, el("caption", {textContent: "The score of each reward; the last column is their weighted sum after normalisation."}),
    el("thead", {}, el("tr", {}, el("th", {scope: "col", textContent: "box"}),
      ...names.map(name => el("th", {scope: "col", textContent: name.replaceAll("_", " ")})))));
  const body = el("tbody");
  const choices = card.rows.map((row, place) => {
    const choice = el("button", {type: "button", textContent: String(place + 1), "aria-label": "show the boxes of answer " + (place + 1)});
    const values = row.terms.map((value, i) => el("td", {textContent: number(value, 3), "data-label": card.terms[i].replaceAll("_", " ")}));
    const isBest = row.reward === best;
    body.append(el("tr", {className: isBest ? "is-best" : ""}, el("td", {"data-label": "box"}, choice),
      el("td", {textContent: row.text + (row.malformed ? " (" + row.malformed + " malformed box(es))" : ""), "data-label": "answer"}),
      ...values, el("td", {textContent: number(row.reward, 3) + (isBest ? " (best)" : ""), "data-label": "reward"})));
    return choice;
  });
  const choose = place => {
    choices.forEach((choice, i) => choice.setAttribute("aria-pressed", String(i === place)));
    show(card.rows[place]);
  };
  choices.forEach((choice, place) => choice.addEventListener("click", () => choose(place)));
  choose(card.rows.findIndex(row => row.reward === best));
  table.append(body);
  const words = el("p", {className: "legend"}, ...[["true", "true box"], ["best", "the chosen answer"], ["other", "the other answers"]]
    .map(([name, text]) => el("span", {}, el("span", {className: "swatch " + name}), text)));
  return [facts(card), words, el("div", {className: "candidates"}, frame, el("div", {className: "scroll"}, table))];
}

// ---- The page.

let studies = null;
if (DATA.studies.length) {
  studies = new Gallery("studies", DATA.studies, studyOrders, drawStudy, openStudy);
  byId("heat").addEventListener("change", () => studies.show());
  for (const box of document.querySelectorAll("input[data-layer]")) {
    box.addEventListener("change", () => byId("studies").classList.toggle("without-" + box.dataset.layer, !box.checked));
  }
}
if (DATA.candidates.length) new Gallery("candidates", DATA.candidates, candidateOrders, drawCandidates, openCandidates);
