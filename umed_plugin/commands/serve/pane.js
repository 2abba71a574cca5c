// ---- A pane: one slice with the boxes and the heat of one checkpoint over it, the patient's sides, and zoom. All panes show the
// same part of the same slice.

const MOST_ZOOM = 16;

class Pane {
  // lit: called with the index of the box under the pointer, or null.
  constructor(figure, lit) {
    Object.assign(this, {figure, name: figure.dataset.name, lit});
    this.stage = figure.querySelector(".stage");
    this.layers = figure.querySelector(".layers");
    this.picture = figure.querySelector("img");
    this.heat = figure.querySelector("canvas");
    this.boxes = figure.querySelector("svg");
    this.boxes.addEventListener("pointerover", event => {
      const box = event.target.closest("g[data-box]");
      this.lit(box ? Number(box.dataset.box) : null);
    });
    this.boxes.addEventListener("pointerleave", () => this.lit(null));
  }

  // The letters at the left, right, top and bottom edge; null: not known.
  showSides(edges) {
    ["left", "right", "top", "bottom"].forEach((side, i) => {
      this.stage.querySelector(".side." + side).textContent = edges ? edges[i] : "";
    });
  }

  // zoom: 1 for the whole picture. x, y: the point of it, in 0-1, that stands in the middle.
  place({zoom, x, y}, width, height) {
    Object.assign(this.stage.style, {width: `${width}px`, height: `${height}px`});
    Object.assign(this.layers.style, {width: `${width * zoom}px`, height: `${height * zoom}px`,
                                      left: `${width / 2 - x * width * zoom}px`, top: `${height / 2 - y * height * zoom}px`});
    this.stage.classList.toggle("zoomed", zoom > 1);
  }

  showBoxes(answer) {
    const parts = [];
    if (answer) {
      const [width, height] = answer.size, size = Math.max(width, height) / 28;
      this.boxes.setAttribute("viewBox", `0 0 ${width} ${height}`);
      answer.boxes.forEach((box, index) => {
        if (!box) return;
        const [x1, y1, x2, y2] = box, group = svg("g", {"data-box": index});
        for (const kind of ["edge", "line"]) {
          group.append(svg("rect", {class: kind, x: x1, y: y1, width: x2 - x1, height: y2 - y1}));
        }
        if (answer.boxes.length > 1) {
          group.append(svg("text", {x: x1, y: y1 > size * 1.3 ? y1 - size * .3 : y2 + size, "font-size": size,
                                    "stroke-width": size / 6}, index + 1));
        }
        parts.push(group);
      });
    }
    this.boxes.replaceChildren(...parts);
  }

  light(index) {
    for (const box of this.boxes.children) {
      box.classList.toggle("lit", Number(box.dataset.box) === index);
      box.classList.toggle("dim", index !== null && Number(box.dataset.box) !== index);
    }
  }

  // times: of each patch, in multiples of an even share; null: no map.
  showHeat(attention, times, [width, height], opacity) {
    this.heat.hidden = !times;
    if (!times) return;
    const [x1, y1, x2, y2] = attention.place;
    drawHeat(this.heat, attention.grid, attention.grid, times, opacity);
    Object.assign(this.heat.style, {left: `${x1 / width * 100}%`, top: `${y1 / height * 100}%`,
                                    width: `${(x2 - x1) / width * 100}%`, height: `${(y2 - y1) / height * 100}%`});
  }
}

// ---- Zoom and pan, by wheel, fingers, drag and keys, the same in all panes; and whatever else a drag changes.

class Zoom {
  // panes; changed: called after each change; dragged: called with the pixels of a drag that does not move the picture, or null at
  // its start; slices: called with the number of slices to go on by.
  constructor(panes, {changed, dragged, slices}) {
    Object.assign(this, {panes, changed, dragged, slices, zoom: 1, x: .5, y: .5, pointers: new Map()});
    for (const {stage} of panes) {
      stage.addEventListener("wheel", event => this.wheel(event, stage), {passive: false});
      stage.addEventListener("pointerdown", event => this.down(event, stage));
      stage.addEventListener("pointermove", event => this.move(event, stage));
      for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, event => this.pointers.delete(event.pointerId));
    }
  }

  // Zoom so that the point stays where it is; without one, the middle does. In 0-1 of the stage.
  to(zoom, [px, py] = [.5, .5]) {
    const next = Math.min(Math.max(zoom, 1), MOST_ZOOM);
    this.x += (px - .5) * (1 / this.zoom - 1 / next);
    this.y += (py - .5) * (1 / this.zoom - 1 / next);
    this.zoom = next;
    this.pan(0, 0);
  }

  // By parts of the stage; the picture keeps filling it.
  pan(dx, dy) {
    const half = .5 / this.zoom, within = value => Math.min(Math.max(value, half), 1 - half);
    this.x = within(this.x - dx / this.zoom);
    this.y = within(this.y - dy / this.zoom);
    this.changed();
  }

  whole() { Object.assign(this, {zoom: 1, x: .5, y: .5}); this.changed(); }

  point(event, stage) {
    const box = stage.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }

  wheel(event, stage) {
    if (!event.ctrlKey && this.slices.exist()) {
      event.preventDefault();
      return this.slices.by(Math.sign(event.deltaY));
    }
    event.preventDefault();
    this.to(this.zoom * Math.exp(-event.deltaY / (event.ctrlKey ? 100 : 300)), this.point(event, stage));
  }

  down(event, stage) {
    if (event.button !== 0) return;
    stage.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, this.point(event, stage));
    if (this.pointers.size === 1) this.dragged(null);
  }

  move(event, stage) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return;
    const now = this.point(event, stage), dx = now[0] - before[0], dy = now[1] - before[1];
    const other = [...this.pointers].find(([id]) => id !== event.pointerId)?.[1];
    this.pointers.set(event.pointerId, now);
    if (other) {
      const apart = ([x, y]) => Math.hypot((x - other[0]) * stage.clientWidth, (y - other[1]) * stage.clientHeight);
      this.to(this.zoom * apart(now) / Math.max(apart(before), 1), [(now[0] + other[0]) / 2, (now[1] + other[1]) / 2]);
      this.pan(dx / 2, dy / 2);
    } else if (!this.dragged([dx * stage.clientWidth, dy * stage.clientHeight])) {
      this.pan(dx, dy);
    }
  }
}
