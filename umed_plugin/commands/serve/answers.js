// ---- An answer as text: sentences that hold boxes can be pointed at, and what could not be read as a box is marked.

const END_OF_SENTENCE = /[.!?]["')\]]*(?=\s)/g;

// The text in parts of at most one sentence: {text, boxes: indices, marks: [[start, end], ...]}. Places count code points.
function sentencesOf(text, places) {
  const letters = Array.from(text), ends = [];
  const inside = at => places.some(([start, end]) => start < at && at < end);
  for (const match of text.matchAll(END_OF_SENTENCE)) {
    const at = Array.from(text.slice(0, match.index + match[0].length)).length;
    if (!inside(at)) ends.push(at);
  }
  ends.push(letters.length);
  const parts = [];
  let start = 0;
  for (const end of ends) {
    const own = places.filter(([from]) => from >= start && from < end);
    parts.push({
      text: letters.slice(start, end).join(""),
      boxes: own.map(([, , box]) => box).filter(box => box !== null),
      marks: own.filter(([, , box]) => box === null).map(([from, to]) => [from - start, Math.min(to, end) - start]),
    });
    start = end;
  }
  return parts.filter(part => part.text);
}

function marked(text, marks) {
  const letters = Array.from(text), parts = [];
  let at = 0;
  for (const [start, end] of marks) {
    parts.push(letters.slice(at, start).join(""),
      el("mark", {title: "This could not be read as a box.", textContent: letters.slice(start, end).join("")}));
    at = end;
  }
  return [...parts, letters.slice(at).join("")];
}

// lit: called with the index of a box to highlight, or null. Returns the sentences of each box.
function fillAnswer(paragraph, answer, lit) {
  const ofBox = new Map();
  const parts = sentencesOf(answer.text, answer.places).map(part => {
    const good = part.boxes.filter(box => answer.boxes[box]);
    if (!good.length) return marked(part.text, part.marks);
    const sentence = el("span", {className: "sentence", tabIndex: 0, role: "button", "aria-label":
      `${part.text.trim()} Highlight ${good.length === 1 ? "its box" : "its boxes"}`}, ...marked(part.text, part.marks));
    sentence.addEventListener("pointerenter", () => lit(good[0]));
    sentence.addEventListener("pointerleave", () => lit(null));
    sentence.addEventListener("focus", () => lit(good[0]));
    sentence.addEventListener("blur", () => lit(null));
    sentence.addEventListener("click", () => lit(good[0]));
    sentence.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); lit(good[0]); }
    });
    good.forEach(box => ofBox.set(box, [...(ofBox.get(box) || []), sentence]));
    return [sentence];
  }).flat();
  paragraph.replaceChildren(...(parts.length ? parts : ["(no text)"]));
  return ofBox;
}

// What is to be known of an answer's boxes and of its end, in words. cut: the tokens at which --max-new-tokens ended it, or null.
function aboutAnswer({boxes, places, cut}) {
  const good = boxes.filter(box => box).length, unread = places.filter(([, , box]) => box === null).length;
  const parts = [`${good} ${good === 1 ? "box" : "boxes"}`];
  if (good < boxes.length) parts.push(`${boxes.length - good} malformed, without area or outside the picture`);
  if (unread) parts.push(`${unread} ${unread === 1 ? "place" : "places"} in the text could not be read as a box, such as half a box`);
  if (cut) parts.push(`cut off at ${cut} tokens, which is --max-new-tokens`);
  return parts.join(" · ");
}
