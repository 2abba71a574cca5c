// ---- Saving: a picture with its boxes, heat, letters and the answer under it; and the answer as JSON.

const SAVED_SIDE = 900;

function saveFile(name, content) {
  const url = URL.createObjectURL(content);
  el("a", {href: url, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

const fileName = (label, number, ending) => `${label.replace(/\.[a-z.]+$/i, "").replace(/[^\w-]+/g, "_")}-answer-${number}${ending}`;

function wrapped(pen, text, width) {
  const lines = [];
  for (const paragraph of text.split("\n")) {
    let line = "";
    for (const word of paragraph.split(" ")) {
      const longer = line ? line + " " + word : word;
      if (pen.measureText(longer).width > width && line) { lines.push(line); line = word; } else line = longer;
    }
    lines.push(line);
  }
  return lines;
}

// Draw a pane as it is seen, into a rectangle.
function drawPane(pen, pane, left, top, width, height) {
  pen.save();
  pen.beginPath();
  pen.rect(left, top, width, height);
  pen.clip();
  pen.fillStyle = "#000";
  pen.fillRect(left, top, width, height);
  const stage = pane.stage.getBoundingClientRect(), scale = width / stage.width;
  const place = node => {
    const box = node.getBoundingClientRect();
    return [left + (box.left - stage.left) * scale, top + (box.top - stage.top) * scale, box.width * scale, box.height * scale];
  };
  pen.drawImage(pane.picture, ...place(pane.picture));
  if (!pane.heat.hidden) {
    pen.imageSmoothingEnabled = false;
    pen.drawImage(pane.heat, ...place(pane.heat));
  }
  for (const shape of pane.boxes.querySelectorAll("rect")) {
    const style = getComputedStyle(shape), [x, y, w, h] = place(shape);
    pen.strokeStyle = style.stroke;
    pen.globalAlpha = Number(style.strokeOpacity);
    pen.lineWidth = parseFloat(style.strokeWidth) * scale;
    pen.setLineDash(style.strokeDasharray === "none" ? [] : style.strokeDasharray.split(/[ ,]+/).map(part => parseFloat(part) * scale));
    pen.strokeRect(x, y, w, h);
  }
  pen.globalAlpha = 1;
  pen.setLineDash([]);
  for (const label of [...pane.boxes.querySelectorAll("text"), ...pane.stage.querySelectorAll(".side")]) {
    const [x, y, , h] = place(label), size = Math.max(h * .8, 14);
    pen.font = `700 ${size}px system-ui, sans-serif`;
    pen.textBaseline = "top";
    pen.lineWidth = size / 5;
    pen.strokeStyle = "#000";
    pen.fillStyle = label.classList.contains("side") ? "#fff" : getComputedStyle(label).fill;
    pen.strokeText(label.textContent, x, y);
    pen.fillText(label.textContent, x, y);
  }
  pen.restore();
}

// The panes side by side, and lines of text under them, as a PNG.
async function savePicture(panes, lines, name) {
  const {clientWidth, clientHeight} = panes[0].stage, gap = 12;
  const width = SAVED_SIDE, height = Math.round(width * clientHeight / clientWidth), all = panes.length * (width + gap) - gap;
  const canvas = el("canvas"), pen = canvas.getContext("2d"), font = "20px system-ui, sans-serif";
  pen.font = font;
  const text = lines.flatMap(line => wrapped(pen, line, all - 32));
  Object.assign(canvas, {width: all, height: height + 32 + 28 * text.length});
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  panes.forEach((pane, i) => drawPane(pen, pane, i * (width + gap), 0, width, height));
  pen.font = font;
  pen.fillStyle = "#111";
  pen.textBaseline = "top";
  text.forEach((line, i) => pen.fillText(line, 16, height + 16 + 28 * i));
  const png = await new Promise(done => canvas.toBlob(done, "image/png"));
  saveFile(name, png);
}
