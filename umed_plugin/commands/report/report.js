// ---- Curves: the value under the pointer or chosen by the arrow keys, and a moving average over them.

class Curve {
  constructor(figure) {
    this.figure = figure;
    this.plot = DATA.charts[Number(figure.dataset.chart)];
    this.points = this.plot.points.filter(([, value]) => value !== null);
    this.reading = figure.querySelector(".reading");
    this.drawn = figure.querySelector(".plot svg");
    this.over = svg("svg", {class: "over", viewBox: this.drawn.getAttribute("viewBox"), "aria-hidden": "true"});
    this.drawn.after(this.over);
    this.place = null;
    figure.addEventListener("pointermove", event => this.point(event));
    figure.addEventListener("pointerleave", () => this.show(null));
    figure.addEventListener("blur", () => this.show(null));
    figure.addEventListener("keydown", event => this.walk(event));
    // One stop of the Tab key for a group of charts; up and down go from chart to chart.
    figure.tabIndex = figure.previousElementSibling ? -1 : 0;
  }

  x(step) { return this.plot.x[0] * step + this.plot.x[1]; }
  y(value) { return this.plot.y[0] * value + this.plot.y[1]; }

  point(event) {
    const box = this.drawn.getBoundingClientRect(), width = this.drawn.viewBox.baseVal.width;
    if (!box.width) return;
    const at = (event.clientX - box.left) / box.width * width;
    let best = 0;
    this.points.forEach(([step], i) => { if (Math.abs(this.x(step) - at) < Math.abs(this.x(this.points[best][0]) - at)) best = i; });
    this.show(best);
  }

  walk(event) {
    const beside = {ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling"}[event.key];
    if (beside) {
      event.preventDefault();
      if (this.figure[beside]) this.figure[beside].focus();
      return;
    }
    const last = this.points.length - 1, here = this.place ?? -1;
    const target = {ArrowRight: Math.min(here + 1, last), ArrowLeft: Math.max(here - 1, 0), Home: 0, End: last}[event.key];
    if (target === undefined) return;
    event.preventDefault();
    this.show(target);
  }

  show(place) {
    this.place = place;
    this.over.querySelectorAll(".cursor, circle").forEach(one => one.remove());
    this.reading.textContent = "";
    if (place === null || !this.points[place]) return;
    const [step, value] = this.points[place], x = this.x(step);
    this.over.append(svg("line", {class: "cursor", x1: x, x2: x, y1: 0, y2: this.drawn.viewBox.baseVal.height - 28}),
      svg("circle", {cx: x, cy: this.y(value), r: 3}));
    const reference = this.plot.reference.find(([at]) => at === step);
    const average = this.average && this.average[place];
    this.reading.textContent = "step " + step + ": " + Number(value.toPrecision(5))
      + (average !== undefined && average !== false && average !== null ? ", smoothed " + Number(average.toPrecision(4)) : "")
      + (reference && reference[1] !== null ? ", reference " + Number(reference[1].toPrecision(4)) : "");
  }

  smooth(weight) {
    this.over.querySelectorAll(".smooth").forEach(one => one.remove());
    this.figure.classList.toggle("smoothed", weight > 0);
    this.average = null;
    if (!weight || this.points.length < 2) return;
    // Divided by the weights' sum, so that the first values are not drawn towards 0.
    let sum = 0, share = 0;
    this.average = this.points.map(([, value]) => { sum = weight * sum + value; share = weight * share + 1; return sum / share; });
    const places = this.points.map(([step], i) => this.x(step).toFixed(2) + "," + this.y(this.average[i]).toFixed(2));
    this.over.prepend(svg("polyline", {class: "smooth", points: places.join(" ")}));
  }
}

const curves = [...document.querySelectorAll("figure[data-chart]")].map(figure => new Curve(figure));
if (byId("smoothing")) {
  byId("smoothing").addEventListener("input", event => curves.forEach(curve => curve.smooth(Number(event.target.value))));
}

// ---- Downloads: what the page shows, to the last digit, as CSV and JSON.

const cell = value => {
  const text = value === null || value === undefined ? "" : Array.isArray(value) ? JSON.stringify(value) : String(value);
  // A cell that begins like a formula is text: spreadsheets would run it.
  const plain = typeof value === "string" && /^[=+@\t\r-]/.test(text) ? "'" + text : text;
  return /[",\n\r]/.test(plain) ? '"' + plain.replaceAll('"', '""') + '"' : plain;
};
const csv = rows => rows.map(row => row.map(cell).join(",")).join("\r\n") + "\r\n";

function metricRows() {
  const rows = [["checkpoint", "metric", "value", "low", "high", "n", "units", "interval"]];
  const add = (name, metrics, key) => Object.entries(metrics).forEach(([metric, entry]) =>
    rows.push([name, metric, entry[key], ...(entry.ci95 || [null, null]), entry.n, entry.units, entry.interval]));
  Object.entries(DATA.metrics.stages).forEach(([name, metrics]) => add(name, metrics, "value"));
  Object.entries(DATA.metrics.differences).forEach(([name, metrics]) => add(name, metrics, "difference"));
  return rows;
}

function curveRows() {
  return [["training", "metric", "step", "value"], ...curves.flatMap(curve => curve.plot.points.map(([step, value]) =>
    [curve.figure.dataset.training, curve.figure.getAttribute("aria-label"), step, value]))];
}

function studyRows() {
  const rows = [["id", "source", "modality", "true classes", "question", "reference", "checkpoint", "right diagnosis", "IoU", "vision relevance", "boxes (0-1)", "answer"]];
  for (const card of DATA.studies) card.answers.forEach((answer, stage) => answer && rows.push([card.id, card.source, card.modality,
    card.classes.join("; "), card.question, card.reference, DATA.stages[stage], answer.accuracy, answer.iou, answer.relevance, answer.boxes, answer.text]));
  return rows;
}

const DOWNLOADS = {
  "metrics-csv": ["metrics.csv", () => csv(metricRows())],
  "metrics-json": ["metrics.json", () => JSON.stringify(DATA.metrics, null, 1)],
  "curves-csv": ["curves.csv", () => csv(curveRows())],
  "studies-csv": ["studies.csv", () => csv(studyRows())],
  "studies-json": ["studies.json", () => JSON.stringify(DATA.studies.map(({picture, ...card}) => card), null, 1)],
};
for (const button of document.querySelectorAll("[data-download]")) {
  const [name, make] = DOWNLOADS[button.dataset.download];
  button.addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([make()], {type: name.endsWith("csv") ? "text/csv" : "application/json"}));
    el("a", {href: url, download: DATA.name + "-" + name}).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  });
}

// On a phone everything but the results and the rewards is folded: nobody scrolls through ten screens of curves.
if (matchMedia("(max-width: 720px)").matches) {
  document.querySelectorAll("details.fold").forEach(fold => { fold.open = false; });
}

function facts(card) {
  const pairs = [["True", classesOf(card)], ["Source", card.source], ["Modality", card.modality], ["Question", card.question]];
  if (card.step !== undefined) pairs.push(["Step", String(card.step)]);
  if (card.sampling) pairs.push(["Sampling", card.sampling]);
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
  // Answers with a box first; without one there is no place to look at.
  box: (card, from, to) => { const a = card.answers[to]; return a && a.iou !== null ? [a.drawn && card.true_count ? 0 : 1, a.iou] : [9]; },
  asked: () => [0],
};

// Negative, since the smallest key comes first; a study that a stage was not asked about comes last.
function gainOf(card, what, from, to) {
  return card.answers[from] && card.answers[to] ? card.answers[from][what] - card.answers[to][what] : 9;
}

const overlapOf = answer => !answer ? "–" : answer.iou !== null && !answer.drawn ? "no box" : number(answer.iou);
const verdictOf = answer => !answer ? "not asked" : answer.accuracy === null ? "phrase" : answer.accuracy === 1 ? "right class" : "wrong class";
const fileOf = id => String(id).split("/").pop();

function drawStudy(card, gallery) {
  const layers = [boxLayer(card.true, "true")];
  card.answers.forEach((answer, stage) => { if (answer) layers.push(boxLayer(answer.boxes, "stage-" + stage)); });
  const heated = byId("heat").value, answer = heated === "" ? null : card.answers[heated];
  if (answer && answer.heat) layers.unshift(heatLayer(answer.heat));
  const overlaps = card.answers.map(overlapOf).join(" → ");
  // Of the checkpoint that the order looks at.
  const to = Number(gallery.value("to")), judged = card.answers[to], verdict = verdictOf(judged);
  const tone = {"right class": "right", "wrong class": "wrong"}[verdict] || "";
  const alt = "Study " + card.id + ", true: " + classesOf(card);
  return [
    picture(card, alt, ...layers),
    el("span", {className: "name", textContent: classesOf(card)}),
    el("span", {className: "scores"}, "IoU " + overlaps, el("span", {className: tone, textContent: verdict + " (" + DATA.stages[to] + ")"}),
      el("span", {className: "file", textContent: fileOf(card.id)})),
  ];
}

function openStudy(card) {
  const panels = card.answers.map((answer, stage) => answer && el("section", {className: "panel"},
    el("h3", {}, el("span", {className: "swatch stage-" + stage}), DATA.stages[stage]),
    picture(card, "Boxes of " + DATA.stages[stage] + ": " + answer.boxes.length + ", true: " + card.true_count,
      boxLayer(card.true, "true"), boxLayer(answer.boxes, "stage-" + stage)),
    el("div", {className: "answers-beside"},
      el("div", {}, el("h4", {textContent: "answer"}), el("p", {className: "answer", textContent: answer.text || "(an empty answer)"})),
      card.reference ? el("div", {}, el("h4", {textContent: "reference"}), el("p", {className: "reference", textContent: card.reference})) : null),
    el("dl", {className: "facts"},
      ...[["Diagnosis", answer.accuracy === null ? "" : answer.accuracy === 1 ? "right" : "wrong"], ["IoU", overlapOf(answer)],
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
    picture(card, "Attention of " + of + " over the image", heatLayer(answer.heat), boxLayer(card.true, "true"),
      boxLayer(answer.boxes, "stage-" + card.answers.indexOf(answer))),
    el("figcaption", {}, "Attention of " + of + ", with the true box and the answer's. Yellow: at least " + HEAT_MOST + " times a uniform share; the highest patch has "
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
    el("span", {className: "scores", textContent: "step " + card.step + ": mean reward " + number(meanOf(card)) + " of " + card.rows.length
      + " answers, best " + number(bestOf(card)) + (card.sampling ? " (" + card.sampling + ")" : "")}),
    el("span", {className: "scores file", textContent: fileOf(card.id)}),
  ];
}

// Coordinates as answers write them, in 0-1 of the square.
const asWritten = box => "[" + box.map(value => value.toFixed(2)).join(", ") + "]";
// Small scores keep three digits, so that a division can be redone by hand.
const score = value => value && Math.abs(value) < .1 ? value.toPrecision(3) : number(value, 3);
const NORMS = {
  max: count => "Normalised: localization and vision relevance are divided by the best of the " + count
    + " answers, or by a floor if the best is smaller (--umed_reward_floor). Other rewards stay as they are.",
  zscore: count => "Normalised: standardised over the " + count + " answers.",
  none: () => "Nothing is normalised.",
};

function openCandidates(card) {
  const best = bestOf(card), frame = el("div", {className: "panel shown"});
  const tied = card.rows.length > 1 && card.rows.every(row => row.reward === best);
  const show = chosen => {
    const others = card.rows.filter(row => row !== chosen).flatMap(row => row.boxes);
    frame.replaceChildren(picture(card, "Boxes of the answers", boxLayer(others, "other"), boxLayer(card.true, "true"), boxLayer(chosen.boxes, "best")),
      el("p", {className: "truth", textContent: truth}));
  };
  // Without the picture, its size is unknown and true boxes have no coordinates.
  const truth = [card.true.length ? "True: " + card.true.map(asWritten).join(", ") : card.true_count ? "" : "True: no box",
    card.reference ? "Reference: " + card.reference : ""].filter(Boolean).join(". ");
  const names = ["answer", ...card.terms, "reward"];
  // How a term enters the reward: weight x normalised value.
  const share = (row, i) => card.weights && row.normalised ? " → " + number(card.weights[i], 1) + "\u00a0×\u00a0" + score(row.normalised[i]) : "";
  const sum = row => row.normalised.reduce((all, value, i) => all + card.weights[i] * value, 0);
  const deduction = row => card.weights && row.normalised && Math.abs(sum(row) - row.reward) > 1e-3
    ? " = " + number(sum(row), 3) + " − " + number(sum(row) - row.reward, 3) + " (cut off)" : "";
  const notes = [card.weights && NORMS[DATA.norm] ? NORMS[DATA.norm](card.rows.length) : "",
    card.rows.some(row => row.terms.includes(null)) ? "–: not scored; it counts as the mean of the question's other answers, or as 0 if none is scored." : "",
    card.rows.some(deduction) ? "Cut off: the answer had reached --umed_max_new_tokens before it ended, which is penalised (--umed_cut_off)." : "",
    tied ? "All answers have the same reward: this question gives no signal." : ""];
  const how = card.weights ? "Each reward's score → its weight × its normalised value. The reward is the sum of these products."
    : "The score of each reward; the last column is their weighted sum after normalisation.";
  const remarksOn = row => [row.malformed ? row.malformed + " malformed box(es)" : "",
    card.true_count && !row.boxes.length && !row.malformed ? "no box" : "", deduction(row) ? "cut off" : ""]
    .filter(Boolean).map(remark => " (" + remark + ")").join("");
  const table = el("table", {className: "stacked"}, el("caption", {textContent: "The answers and their scores"}),
    el("thead", {}, el("tr", {}, el("th", {scope: "col", textContent: "box"}),
      ...names.map(name => el("th", {scope: "col", textContent: name.replaceAll("_", " ")})))));
  const body = el("tbody");
  const choices = card.rows.map((row, place) => {
    const choice = el("button", {type: "button", textContent: String(place + 1), "aria-label": "show the boxes of answer " + (place + 1)});
    const values = row.terms.map((value, i) => el("td", {textContent: score(value) + share(row, i), "data-label": card.terms[i].replaceAll("_", " ")}));
    const isBest = !tied && row.reward === best;
    body.append(el("tr", {className: isBest ? "is-best" : ""}, el("td", {"data-label": "box"}, choice),
      el("td", {textContent: row.text + remarksOn(row), "data-label": "answer"}),
      ...values, el("td", {textContent: number(row.reward, 3) + deduction(row) + (isBest ? " (best)" : ""), "data-label": "reward"})));
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
  const said = el("p", {className: "soft how", textContent: [how, ...notes].filter(Boolean).join(" ")});
  return [facts(card), said, words, el("div", {className: "candidates"}, frame, el("div", {className: "scroll"}, table))];
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
const sampled = DATA.candidates.length ? new Gallery("candidates", DATA.candidates, candidateOrders, drawCandidates, openCandidates) : null;
openLinked([studies, sampled]);
addEventListener("hashchange", () => openLinked([studies, sampled]));
