// ---- Boxes of a record that can be moved and resized, by mouse, finger and keys. Coordinates are 0-1 of the padded square.

const UNITS = 1000;  // of the drawing, for the side of the square
const CORNERS = {nw: [0, 1], ne: [2, 1], sw: [0, 3], se: [2, 3]};  // which of x1, y1, x2, y2 a corner changes

class Boxes {
  // space: the drawing. card: its lesions, decimals, and the part of the square that holds the picture. changed: called with the
  // index of a moved box, its text before, and its text now.
  constructor(space, card, changed) {
    Object.assign(this, {space, card, changed, step: 10 ** -card.decimals});
    this.now = card.lesions.map(lesion => lesion.box);
    this.groups = card.lesions.map((lesion, i) => this.group(i));
    space.append(...this.groups);
    this.groups.forEach((_, i) => this.draw(i));
  }

  at(i) { return this.isMoved(i) ? JSON.parse(this.now[i]) : this.card.lesions[i].at; }
  isMoved(i) { return this.now[i] !== this.card.lesions[i].box; }
  get moved() { return this.now.some((_, i) => this.isMoved(i)); }

  group(i) {
    const group = svg("g", {class: "box", tabindex: 0, role: "button"});
    group.append(svg("rect", {class: "casing"}), svg("rect", {class: "line"}),
      ...Object.keys(CORNERS).map(name => svg("rect", {class: "corner " + name, "data-corner": name, width: 34, height: 34})),
      svg("text", {}, String(i + 1)));
    group.addEventListener("pointerdown", event => this.grab(event, i));
    group.addEventListener("keydown", event => this.press(event, i));
    return group;
  }

  draw(i) {
    const [x1, y1, x2, y2] = this.at(i).map(value => value * UNITS), group = this.groups[i];
    for (const rect of group.querySelectorAll(".casing, .line")) {
      for (const [name, value] of Object.entries({x: x1, y: y1, width: x2 - x1, height: y2 - y1})) rect.setAttribute(name, value);
    }
    for (const corner of group.querySelectorAll(".corner")) {
      const [h, v] = CORNERS[corner.dataset.corner];
      corner.setAttribute("x", [x1, y1, x2, y2][h] - 17);
      corner.setAttribute("y", [x1, y1, x2, y2][v] - 17);
    }
    const number = group.querySelector("text");
    number.setAttribute("x", Math.min(x1, UNITS - 40));
    number.setAttribute("y", y1 > 65 ? y1 - 22 : Math.min(y2 + 58, UNITS - 8));  // clear of the corners
    group.setAttribute("aria-label", `Box ${i + 1}, ${this.card.lesions[i].name}, at ${this.now[i]}: arrows move it`);
  }

  // Put a box where it is wanted: in whole steps, within the picture, and with an area.
  put(i, wanted) {
    const {inside, decimals} = this.card, up = 10 ** decimals;
    const low = [Math.ceil(inside[0] * up - 1e-6), Math.ceil(inside[1] * up - 1e-6)];
    const high = [Math.floor(inside[2] * up + 1e-6), Math.floor(inside[3] * up + 1e-6)];
    const within = (value, axis) => Math.min(Math.max(Math.round(value * up), low[axis]), high[axis]);
    let [x1, y1, x2, y2] = [within(wanted[0], 0), within(wanted[1], 1), within(wanted[2], 0), within(wanted[3], 1)];
    if (x2 <= x1) [x1, x2] = x1 < high[0] ? [x1, x1 + 1] : [x1 - 1, x1];
    if (y2 <= y1) [y1, y2] = y1 < high[1] ? [y1, y1 + 1] : [y1 - 1, y1];
    this.set(i, "[" + [x1, y1, x2, y2].map(value => (value / up).toFixed(decimals)).join(", ") + "]");
  }

  set(i, text) {
    const before = this.now[i];
    if (before === text) return;
    this.now[i] = text;
    this.draw(i);
    this.changed(i, before, text);
  }

  // The whole box, kept at its size when it reaches the edge of the picture.
  shift(i, box, dx, dy) {
    const {inside} = this.card, [x1, y1, x2, y2] = box;
    dx = Math.min(Math.max(dx, inside[0] - x1), inside[2] - x2);
    dy = Math.min(Math.max(dy, inside[1] - y1), inside[3] - y2);
    this.put(i, [x1 + dx, y1 + dy, x2 + dx, y2 + dy]);
  }

  grab(event, i) {
    if (event.button !== 0) return;
    event.preventDefault();
    const group = this.groups[i], corner = event.target.dataset.corner, box = this.at(i), from = this.point(event);
    group.focus({preventScroll: true});
    group.setPointerCapture(event.pointerId);
    const move = now => {
      const [x, y] = this.point(now), dx = x - from[0], dy = y - from[1];
      if (!corner) return this.shift(i, box, dx, dy);
      const wanted = [...box], [h, v] = CORNERS[corner];
      wanted[h] = h ? Math.max(box[h] + dx, box[0] + this.step) : Math.min(box[h] + dx, box[2] - this.step);
      wanted[v] = v > 1 ? Math.max(box[v] + dy, box[1] + this.step) : Math.min(box[v] + dy, box[3] - this.step);
      this.put(i, wanted);
    };
    const end = () => {
      group.removeEventListener("pointermove", move);
      for (const name of ["pointerup", "pointercancel"]) group.removeEventListener(name, end);
    };
    group.addEventListener("pointermove", move);
    for (const name of ["pointerup", "pointercancel"]) group.addEventListener(name, end);
  }

  point(event) {
    const place = this.space.getBoundingClientRect();
    return [(event.clientX - place.left) / place.width, (event.clientY - place.top) / place.height];
  }

  press(event, i) {
    const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!way || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    const [x1, y1, x2, y2] = this.at(i), dx = way[0] * this.step, dy = way[1] * this.step;
    if (!event.shiftKey) this.shift(i, [x1, y1, x2, y2], dx, dy);
    else this.put(i, [x1, y1, Math.max(x2 + dx, x1 + this.step), Math.max(y2 + dy, y1 + this.step)]);
  }
}
