// ---- Images of the check.

// COCO's limits in the square of 336 pixels that CLIP sees, as umed evaluate has them.
const SIZES = [["small", 32 / 336], ["medium", 96 / 336], ["large", Infinity]];
const sideOf = ([x1, y1, x2, y2]) => Math.sqrt(Math.max(x2 - x1, 0) * Math.max(y2 - y1, 0));
const sizesOf = card => card.boxes.map(box => SIZES.find(([, limit]) => sideOf(box) < limit)[0]);
const inTwo = new Set(DATA.pairs.flatMap(pair => pair.sides.map(side => side.id)));
const findingsOf = card => [...card.findings, ...(inTwo.has(card.id) ? ["near-duplicate"] : [])];

const imageOrders = {
  asked: () => [0],
  small: card => [card.boxes.length ? Math.min(...card.boxes.map(sideOf)) : 9],
  large: card => [card.boxes.length ? -Math.max(...card.boxes.map(sideOf)) : 9],
  many: card => [-card.boxes.length],
};

function drawImage(card) {
  const boxes = card.boxes.length === 1 ? "1 box" : card.boxes.length + " boxes";
  return [
    picture(card, "Image " + card.id + ": " + classesOf(card), boxLayer(card.boxes, "true")),
    el("span", {className: "name", textContent: classesOf(card)}),
    el("span", {className: "scores", textContent: card.split + ", " + boxes + (findingsOf(card).length ? ", " + findingsOf(card).join(", ") : "")}),
  ];
}

function openImage(card) {
  const pairs = [["File", card.file], ["Split", card.split], ["Source", card.source], ["Patient", card.patient], ["Modality", card.modality],
    ["Pixels", card.pixels.join(" x ")], ["Findings", findingsOf(card).join(", ")]];
  const rows = card.boxes.map((box, i) => el("tr", {}, el("th", {scope: "row", textContent: card.named[i]}),
    el("td", {textContent: box.map(value => value.toFixed(3)).join(", "), "data-label": "box, 0-1 of the square"})));
  const table = rows.length ? el("table", {className: "stacked"}, el("caption", {textContent: "Boxes in 0-1 of the padded square"}), el("tbody", {}, ...rows)) : null;
  return [el("div", {className: "large"}, picture(card, "Image " + card.id + " with " + card.boxes.length + " boxes", boxLayer(card.boxes, "true")),
    el("div", {}, el("dl", {className: "facts"}, ...pairs.filter(([, value]) => value)
      .map(([name, value]) => el("div", {}, el("dt", {textContent: name}), el("dd", {textContent: value})))), table))];
}

const images = DATA.cards.length ? new Gallery("images", DATA.cards, imageOrders, drawImage, openImage, {
  class: namesOf, split: card => [card.split], source: card => [card.source],
  size: card => [...new Set(sizesOf(card))], finding: findingsOf,
}) : null;
if (images) byId("boxes").addEventListener("change", event => byId("images").classList.toggle("without-true", !event.target.checked));

// Links from faults and findings: the filters are taken back, so that the picture is among those shown.
const known = new Map(DATA.cards.map(card => [card.id, card]));
for (const link of document.querySelectorAll("a[data-image]")) {
  if (!known.has(link.dataset.image)) link.replaceWith(...link.childNodes);
}
function openWanted() {
  if (!images || !location.hash.startsWith("#images=")) return;
  for (const field of Object.keys(images.filters)) images.fields[field].value = "";
  images.show();
  openLinked([images]);
}
openWanted();
addEventListener("hashchange", openWanted);
document.addEventListener("click", event => {
  const link = event.target.closest("a[data-image]");
  if (link && link.hash === location.hash) openWanted();
});

// ---- Near-duplicates side by side.

for (const pair of DATA.pairs) {
  const side = one => el("figure", {},
    one.picture ? el("div", {className: "picture"}, el("img", {src: one.picture, alt: one.id, loading: "lazy", decoding: "async"}))
      : el("div", {className: "picture gone"}, el("p", {textContent: "not among the images of this page"})),
    el("figcaption", {textContent: one.id}));
  byId("pairs").append(el("li", {}, el("div", {className: "two"}, ...pair.sides.map(side)),
    el("p", {className: "soft", textContent: "similarity " + pair.likeness.toFixed(3)})));
}

// ---- Histograms of the boxes.

function histogram(sides) {
  const most = Math.max(1, ...sides), plot = svg("svg", {viewBox: "0 0 330 160", role: "img",
    "aria-label": "Number of boxes by side: " + sides.map((count, i) => i * 10 + " to " + (i + 1) * 10 + " % " + count).join(", ")});
  sides.forEach((count, i) => {
    const height = 120 * count / most;
    plot.append(svg("rect", {class: "bar", x: 12 + 30 * i, y: 134 - height, width: 26, height}));
    plot.append(svg("text", {x: 25 + 30 * i, y: 128 - height, "text-anchor": "middle"}, String(count)));
    plot.append(svg("text", {x: 12 + 30 * i, y: 149, "text-anchor": "middle"}, String(i * 10)));
  });
  plot.append(svg("text", {x: 312, y: 149, "text-anchor": "middle"}, "100"));
  return plot;
}

function centreMap(centres) {
  const most = Math.max(1, ...centres.flat()), plot = svg("svg", {viewBox: "0 0 320 320", role: "img",
    "aria-label": "Centres of the boxes: at most " + most + " in one of 100 fields"});
  centres.forEach((row, y) => row.forEach((count, x) => {
    plot.append(svg("rect", {class: "cell", x: 32 * x, y: 32 * y, width: 32, height: 32, "fill-opacity": (.85 * count / most).toFixed(2)}));
  }));
  return plot;
}

function drawPlaces() {
  const wanted = byId("places-class").value, chosen = Object.entries(DATA.places).filter(([name]) => !wanted || name === wanted).map(([, places]) => places);
  if (!chosen.length) return;
  const sides = chosen[0].sides.map((_, i) => chosen.reduce((sum, places) => sum + places.sides[i], 0));
  const centres = chosen[0].centres.map((row, y) => row.map((_, x) => chosen.reduce((sum, places) => sum + places.centres[y][x], 0)));
  byId("plots").replaceChildren(
    el("figure", {}, histogram(sides), el("figcaption", {textContent: "Side of a box (square root of its area), in % of the square's side"})),
    el("figure", {}, centreMap(centres), el("figcaption", {textContent: "Where the centres of the boxes lie; the fullest field has " + Math.max(...centres.flat())})));
}
for (const name of Object.keys(DATA.places)) byId("places-class").append(el("option", {value: name, textContent: name}));
byId("places-class").addEventListener("change", drawPlaces);
drawPlaces();
