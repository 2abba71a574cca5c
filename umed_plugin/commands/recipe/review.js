// ---- The review: decisions are kept in this browser, record by record.

const {name: NAME, settles: SETTLES, cards: CARDS} = JSON.parse(byId("data").textContent);
const KEY = "umed-review:" + NAME + ":" + CARDS.map(card => card.shown).join("");
const WORDS = {accept: "accepted", edit: "accepted with your changes", reject: "rejected"};
const kept = {made: {}, boxes: {}, reviewer: "", ...JSON.parse(localStorage.getItem(KEY) || "{}")};
const articles = [...document.querySelectorAll("article")];
const cardOf = article => CARDS[article.dataset.index];

function save() { localStorage.setItem(KEY, JSON.stringify(kept)); }

// The boxes of a text, with their digits as written. The build checks them again, in every box format that it reads.
function boxesIn(text) {
  return (text.match(/\[\s*-?[\d.]+(?:\s*[,;\s]\s*-?[\d.]+){3}\s*\]/g) || [])
    .map(box => "[" + box.slice(1, -1).trim().split(/[,;\s]+/).join(", ") + "]");
}

function faultOf(boxes, text) {
  if (!text.trim()) return "There is no text.";
  const left = boxesIn(text);
  for (const box of boxes) {
    const index = left.indexOf(box);
    if (index < 0) return "The box " + box + " is missing.";
    left.splice(index, 1);
  }
  return left.length ? "The box " + left[0] + " is not one of the image's boxes, or is repeated." : "";
}

// ---- A record: its boxes, text and decision.

class Record {
  constructor(article) {
    Object.assign(this, {article, card: cardOf(article), text: article.querySelector("textarea"), note: article.querySelector(".note")});
    this.listed = [...article.querySelectorAll("ol.lesions li")];
    this.boxes = new Boxes(article.querySelector("svg"), this.card, (i, before, now) => this.boxMoved(before, now));
    const made = kept.made[this.card.id], boxes = kept.boxes[this.card.id] || [];
    boxes.forEach((box, i) => {
      this.text.value = this.text.value.replace(this.boxes.now[i], () => box);
      this.boxes.now[i] = box;
      this.boxes.draw(i);
    });
    if (made && made.text) this.text.value = made.text;
    if (made) this.note.value = made.note;
    this.text.addEventListener("input", () => this.changed());
    this.note.addEventListener("change", () => { if (this.made) { this.made.note = this.note.value; save(); } });
    const on = (name, act) => article.querySelector(name).addEventListener("click", act);
    on(".do-accept", () => this.decide("accept"));
    on(".do-reject", () => this.decide("reject"));
    on(".do-undo", () => this.decide(null));
    on(".do-back", () => this.card.lesions.forEach((lesion, i) => this.boxes.set(i, lesion.box)));
    article.addEventListener("focusin", () => makeCurrent(this));
    this.show();
  }

  get made() { return kept.made[this.card.id]; }

  boxMoved(before, now) {
    this.text.value = this.text.value.replace(before, () => now);
    if (this.boxes.moved) kept.boxes[this.card.id] = this.boxes.now; else delete kept.boxes[this.card.id];
    this.changed();
  }

  // What was decided was about another text, or about other boxes.
  changed() {
    delete kept.made[this.card.id];
    save();
    this.show();
    showAll();
  }

  decide(decision) {
    const text = this.text.value.trim(), changed = this.boxes.moved || text !== this.card.text.trim();
    if (decision === "accept" && faultOf(this.boxes.now, text)) return false;
    if (decision === "accept" && changed) decision = "edit";
    if (decision === null) delete kept.made[this.card.id];
    else {
      kept.made[this.card.id] = {decision, text: decision === "edit" ? text : "", note: this.note.value};
      if (decision === "edit" && this.boxes.moved) this.made.boxes = this.boxes.now.map((_, i) => this.boxes.at(i));
    }
    save();
    this.show();
    showAll();
    return true;
  }

  show() {
    const {article, made} = this, fault = faultOf(this.boxes.now, this.text.value);
    article.classList.remove("accept", "edit", "reject");
    if (made) article.classList.add(made.decision);
    article.querySelector(".wrong").textContent = fault;
    article.querySelector(".do-accept").disabled = Boolean(fault);
    article.querySelector(".do-undo").disabled = !made;
    article.querySelector(".do-back").hidden = !this.boxes.moved;
    article.querySelector(".state").textContent = made ? WORDS[made.decision] : "";
    this.listed.forEach((line, i) => {
      line.querySelector("code").textContent = this.boxes.now[i];
      line.classList.toggle("moved", this.boxes.isMoved(i));
    });
  }
}

// ---- The page: filter, progress, keys.

function showAll() {
  const wanted = byId("filter").value, counts = {accept: 0, edit: 0, reject: 0};
  for (const article of articles) {
    const card = cardOf(article), made = kept.made[card.id];
    if (made) counts[made.decision] += 1;
    const fits = {all: true, open: !made, aside: card.aside}[wanted] ?? (made && made.decision === wanted);
    article.classList.toggle("hidden", !fits);
  }
  const done = counts.accept + counts.edit + counts.reject;
  byId("progress").value = done;
  byId("counts").textContent = counts.accept + " accepted, " + counts.edit + " edited, " + counts.reject + " rejected, "
    + (CARDS.length - done) + " left";
}

let current = null;
function makeCurrent(record) {
  if (current) current.article.classList.remove("current");
  current = record;
  record.article.classList.add("current");
}

function go(record) {
  if (!record) return;
  makeCurrent(record);
  record.article.focus({preventScroll: true});
  record.article.scrollIntoView({block: "start"});
}

// The next one that is shown, in this direction; a decision may just have hidden the current one.
function beside(way) {
  if (!current) return records.find(record => !record.article.classList.contains("hidden"));
  for (let at = records.indexOf(current) + way; at >= 0 && at < records.length; at += way) {
    if (!records[at].article.classList.contains("hidden")) return records[at];
  }
  return null;
}

const decideAndGoOn = decision => { if (current && current.decide(decision)) go(beside(1)); };
const KEYS = {
  j: () => go(beside(1)), k: () => go(beside(-1)), a: () => decideAndGoOn("accept"), r: () => decideAndGoOn("reject"),
  u: () => current && current.decide(null), e: () => current && current.text.focus(),
};
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
  if (event.target.closest("input:not([type=checkbox]), textarea, select")) return;
  event.preventDefault();
  KEYS[event.key]();
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && current && event.target.closest("textarea, .note")) current.article.focus();
});

const records = articles.map(article => new Record(article));
byId("reviewer").value = kept.reviewer;
byId("reviewer").addEventListener("input", event => { kept.reviewer = event.target.value; save(); });
byId("filter").addEventListener("change", showAll);
byId("marks").addEventListener("change", event => document.body.classList.toggle("unmarked", !event.target.checked));
byId("download").addEventListener("click", () => {
  const decisions = CARDS.filter(card => kept.made[card.id]).map(card => ({id: card.id, shown: card.shown, ...kept.made[card.id]}));
  const content = JSON.stringify({reviewed: NAME, reviewer: kept.reviewer, ...(SETTLES ? {settles: true} : {}), decisions}, null, 1);
  const url = URL.createObjectURL(new Blob([content], {type: "application/json"}));
  const reviewer = kept.reviewer ? "." + kept.reviewer.replace(/[^\w-]+/g, "_") : "";
  el("a", {href: url, download: NAME + reviewer + ".decisions.json"}).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
});
showAll();
