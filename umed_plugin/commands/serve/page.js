// The page of `umed serve`. Pictures and coordinates come from the server; this script only draws one over the other.

const $ = id => document.getElementById(id);
const WINDOWS = {file: "the file's own", full: "whole range", soft_tissue: "soft tissue"};
const state = {study: null, items: [], view: null, turns: [], chosen: null, uploads: 0, stop: null, wanted: false};

// ---- Requests to the server -------------------------------------------------------------------------------------------

const GONE = "The server does not respond. Check that umed serve is still running.";

async function send(method, path, body) {
  let reply;
  try { reply = await fetch(path, {method, body}); } catch { throw new Error(GONE); }
  const content = await reply.json().catch(() => ({error: GONE}));
  if (!reply.ok) throw new Error(content.error || GONE);
  return content;
}

function sendFile(path, file, onProgress) {  // XMLHttpRequest, because fetch reports no upload progress
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    request.open("PUT", path + "?name=" + encodeURIComponent(file.name));
    request.upload.onprogress = event => onProgress(event.loaded);
    request.onerror = () => failed(new Error(GONE));
    request.onload = () => {
      if (request.status === 200) return done();
      let message = GONE;
      try { message = JSON.parse(request.responseText).error; } catch { /* not a response of our server */ }
      failed(new Error(message));
    };
    request.send(file);
  });
}

// Reads lines of JSON, one object each, and returns the value of the first one with the key `wanted`.
async function follow(path, body, wanted, signal, onLine) {
  let reply;
  try { reply = await fetch(path, {method: "POST", body: JSON.stringify(body), signal}); }
  catch (error) { throw error.name === "AbortError" ? error : new Error(GONE); }
  if (!reply.ok) throw new Error((await reply.json().catch(() => ({}))).error || GONE);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) throw new Error("The connection to the server was lost. Ask again.");
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      const message = JSON.parse(line);
      if (message.error) throw new Error(message.error);
      if (wanted in message) return message[wanted];
      onLine(message);
    }
  }
}

function fault(text) { $("fault").textContent = text; }
function status(text) { $("status").textContent = text; }
function waiting(before) {
  return before ? `Waiting: ${before} ${before === 1 ? "request is" : "requests are"} before this one.` : "The model is reading the image.";
}

// ---- Choosing images --------------------------------------------------------------------------------------------------

async function choose(list) {
  const files = [...list].filter(file => file.size > 0 && !file.name.startsWith("."));
  if (!files.length) return;
  const mine = ++state.uploads;
  const total = files.reduce((sum, file) => sum + file.size, 0), most = Number(document.body.dataset.uploadMb);
  fault("");
  if (total > most * 1e6) {
    return fault(`${files.length === 1 ? files[0].name : "These files"}: ${(total / 1e6).toFixed(0)} MB. Allowed: ${most} MB. `
      + "Restart the server with a larger --upload-mb to send more.");
  }
  forget();
  $("progress").hidden = false;
  status(files.length === 1 ? "Uploading the file." : `Uploading ${files.length} files.`);
  const refused = [];
  try {
    const study = (await send("POST", "/studies")).study;
    let sent = 0;
    for (const file of files) {
      if (mine !== state.uploads) return void send("POST", `/studies/${study}/forget`);
      try { await sendFile(`/studies/${study}/files`, file, loaded => { $("progress").value = (sent + loaded) / total; }); }
      catch (error) { if (files.length === 1 || error.message === GONE) throw error; refused.push(error.message); }
      sent += file.size;
    }
    status("Reading the images.");
    if (refused.length === files.length) throw new Error(refused.slice(0, 3).join(" "));
    const opened = await send("POST", `/studies/${study}/open`);
    if (mine !== state.uploads) return void send("POST", `/studies/${study}/forget`);
    begin(study, opened.items, [...refused, ...opened.left_out]);
    status("");
  } catch (error) {
    if (mine === state.uploads) { status(""); fault(error.message); }
  } finally {
    if (mine === state.uploads) $("progress").hidden = true;
  }
}

// The dropped files, including those in folders. All entries must be read from the event before the first await.
async function dropped(transfer) {
  const entries = [...transfer.items].map(item => item.webkitGetAsEntry()).filter(entry => entry), files = [...transfer.files];
  if (!entries.some(entry => entry.isDirectory)) return files;
  const inFolders = [];
  const walk = async entry => {
    if (entry.isFile) return void inFolders.push(await new Promise((take, fail) => entry.file(take, fail)));
    const reader = entry.createReader();
    for (let part; (part = await new Promise((take, fail) => reader.readEntries(take, fail))).length;) {
      for (const inner of part) await walk(inner);
    }
  };
  for (const entry of entries) await walk(entry);
  return inFolders;
}

function forget() {
  if (state.study) navigator.sendBeacon(`/studies/${state.study}/forget`);
  if (state.stop) state.stop.abort();
  Object.assign(state, {study: null, items: [], view: null, turns: [], chosen: null});
  $("talk").replaceChildren();
  $("picture").removeAttribute("src");
  delete $("picture").dataset.address;
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
    ? `Left out: ${leftOut.slice(0, 3).join("; ")}${leftOut.length > 3 ? `; and ${leftOut.length - 3} more` : ""}` : "";
  document.body.classList.remove("empty");
  $("shown").hidden = false;
  show({item: 0});
  $("question").focus({preventScroll: true});
}

// ---- The view ---------------------------------------------------------------------------------------------------------

const same = (a, b) => a && b && JSON.stringify(a) === JSON.stringify(b);
const wordsOf = window => WINDOWS[window] || window;

// Change parts of the view. Values that the new item or plane lacks fall back to its first, or to the middle slice.
function show(change) {
  const before = state.view || {}, item = state.items[change.item ?? before.item];
  const sameItem = (change.item ?? before.item) === before.item;
  const axis = change.axis ?? (sameItem ? before.axis : item.planes[0].axis);
  const plane = item.planes.find(plane => plane.axis === axis) || item.planes[0];
  const samePlane = sameItem && plane.axis === before.axis;
  const window = change.window ?? before.window;
  state.view = {
    item: change.item ?? before.item,
    axis: plane.axis,
    slice: Math.min(change.slice ?? (samePlane ? before.slice : Math.floor(plane.slices / 2)), plane.slices - 1),
    volume: Math.min(change.volume ?? (sameItem ? before.volume : 0), item.volumes - 1),
    window: item.windows.includes(window) ? window : item.windows[0] || "file",
  };
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
  $("window-label").hidden = item.windows.length < 2;
  $("window").replaceChildren(...item.windows.map(name => new Option(wordsOf(name), name)));
  $("window").value = view.window;
  for (const [name, count] of [["slice", plane.slices], ["volume", item.volumes]]) {
    $(name + "-label").hidden = count < 2;
    $(name).max = count - 1;
    $(name).value = view[name];
    $(name + "-shown").textContent = `${view[name] + 1} of ${count}`;
    $(name).setAttribute("aria-valuetext", `${view[name] + 1} of ${count}`);
  }
  $("picture").alt = describe(view);
}

function describe(view) {
  const item = state.items[view.item], plane = item.planes.find(plane => plane.axis === view.axis), parts = [];
  if (state.items.length > 1) parts.push(item.label);
  if (item.planes.length > 1) parts.push(plane.name);
  if (plane.slices > 1) parts.push(`slice ${view.slice + 1} of ${plane.slices}`);
  if (item.volumes > 1) parts.push(`volume ${view.volume + 1}`);
  if (item.windows.length > 1) parts.push(`window ${wordsOf(view.window)}`);
  return parts.join(", ") || item.label;
}

// One picture at a time: while one loads, only the latest request is remembered.
function loadPicture() {
  if ($("stage").classList.contains("loading")) { state.wanted = true; return; }
  const address = `/studies/${state.study}/picture?${new URLSearchParams(state.view)}`;
  if ($("picture").dataset.address === address) return;
  $("stage").classList.add("loading");
  const picture = new Image();
  const done = async worked => {
    $("stage").classList.remove("loading");
    if (worked) {
      $("picture").src = picture.src;
      $("picture").dataset.address = address;
      fit();
      fault("");
    } else {
      const reply = await fetch(address).catch(() => null);
      const content = reply && !reply.ok ? await reply.json().catch(() => ({})) : {};
      fault(content.error || GONE);
    }
    if (state.wanted) { state.wanted = false; if (state.view) loadPicture(); }
  };
  picture.onload = () => done(true);
  picture.onerror = () => done(false);
  picture.src = address;
}

// As large as the space allows; on a phone as wide as the page.
function fit() {
  const {naturalWidth: width, naturalHeight: height} = $("picture");
  if (!width || $("shown").hidden) return;
  const room = $("viewer").clientWidth - 2 * parseFloat(getComputedStyle($("viewer")).paddingLeft);
  let most = innerHeight * 0.62;
  if (innerWidth > 860) {
    const others = [...$("shown").children].filter(part => part !== $("stage") && !part.hidden);
    most = $("viewer").clientHeight - $("choose").offsetHeight - others.reduce((sum, part) => sum + part.offsetHeight + 10, 0) - 48;
  }
  const scale = Math.min(room / width, Math.max(most, 240) / height);
  $("stage").style.width = `${Math.floor(width * scale)}px`;
  $("stage").style.height = `${Math.floor(height * scale)}px`;
}

// ---- Boxes and heat ---------------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

function showOverlays() {
  const turn = state.chosen, here = turn && turn.answer && same(turn.view, state.view);
  showBoxes(here && $("with-boxes").checked ? turn.answer : null);
  showWords(here && $("with-heat").checked ? turn : null);
  const away = turn && turn.answer && !here;
  $("elsewhere").hidden = !away;
  if (away) $("elsewhere").firstElementChild.textContent = `The answer refers to another view (${describe(turn.view)}).`;
  for (const other of state.turns) other.entry.classList.toggle("chosen", other === turn && state.turns.length > 1);
}

function showBoxes(answer) {
  const parts = [];
  if (answer) {
    const [width, height] = answer.size, boxes = answer.boxes.map((box, index) => ({box, index})).filter(({box}) => box);
    $("boxes").setAttribute("viewBox", `0 0 ${width} ${height}`);
    const size = Math.max(width, height) / 28;
    for (const {box: [x1, y1, x2, y2], index} of boxes) {
      for (const kind of ["edge", "line"]) {
        parts.push(shape("rect", {class: kind, x: x1, y: y1, width: x2 - x1, height: y2 - y1}));
      }
      if (answer.boxes.length > 1) {
        const label = shape("text", {x: x1, y: y1 > size * 1.3 ? y1 - size * .3 : y2 + size, "font-size": size,
                                     "stroke-width": size / 6});
        label.textContent = index + 1;
        parts.push(label);
      }
    }
  }
  $("boxes").replaceChildren(...parts);
}

function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function showWords(turn) {
  const attention = turn && turn.attention;
  $("word-label").hidden = !attention || !attention.words.length;
  $("heat").hidden = true;
  if (turn && !attention && !turn.looking) look(turn);
  if (!attention) return;
  const names = attention.words.filter(word => word.is_name).length;
  const group = (label, from, to) => {
    const made = document.createElement("optgroup");
    made.label = label;
    made.append(...attention.words.slice(from, to).map((word, index) => new Option(word.text, from + index)));
    return to > from ? [made] : [];
  };
  $("word").replaceChildren(
    ...(names ? [] : [new Option("choose a word", -1)]),
    ...group("abnormality", 0, names), ...group("other words", names, attention.words.length));
  $("word").value = turn.word;
  $("peak").textContent = turn.word >= 0
    ? `strongest patch: ${(attention.words[turn.word].peak * attention.grid ** 2).toFixed(1)} times the mean` : "";
  if (turn.word >= 0) drawHeat(attention, attention.words[turn.word], turn.answer.size);
}

function drawHeat({grid, place: [x1, y1, x2, y2]}, word, [width, height]) {
  const values = Uint8Array.from(atob(word.map), letter => letter.charCodeAt(0));
  const canvas = $("heat"), pen = canvas.getContext("2d");
  canvas.width = canvas.height = grid;
  const pixels = pen.createImageData(grid, grid);
  values.forEach((value, index) => {  // from transparent via red to yellow
    pixels.data.set([255, Math.max(0, value - 100) * 1.6, 0, Math.min(255, value * 1.3)], 4 * index);
  });
  pen.putImageData(pixels, 0, 0);
  Object.assign(canvas.style, {left: `${x1 / width * 100}%`, top: `${y1 / height * 100}%`,
                               width: `${(x2 - x1) / width * 100}%`, height: `${(y2 - y1) / height * 100}%`});
  canvas.hidden = false;
}

async function look(turn) {
  turn.looking = true;
  try {
    const path = `/studies/${state.study}/answers/${turn.answer.number}/attention`;
    const attention = await follow(path, {}, "attention", turn.signal, message => status(message.waiting ? waiting(message.waiting)
      : "Computing the attention maps."));
    turn.attention = attention;
    turn.word = attention.words.some(word => word.is_name) ? 0 : -1;
    status(!attention.words.length || turn.word === 0 ? ""
      : "No known abnormality is named in the answer. Choose a word for the heat map.");
  } catch (error) {
    if (error.name !== "AbortError") { status(""); fault(error.message); }
    return;
  }
  if (turn === state.chosen) showOverlays();
}

// ---- Asking -----------------------------------------------------------------------------------------------------------

async function ask(question) {
  question = question.trim();
  if (!state.view) return fault("Choose an image first.");
  if (!question || state.stop) return;
  fault("");
  const view = {...state.view};
  const turns = $("with-turns").checked
    ? state.turns.filter(turn => turn.answer && same(turn.view, view)).map(turn => [turn.question, turn.answer.text]) : [];
  const turn = {question, view, ...entry(question)};
  state.turns.push(turn);
  state.chosen = null;
  document.body.classList.add("asked");
  showOverlays();
  const control = new AbortController();
  state.stop = control;
  busy(true);
  $("question").value = "";
  $("talk").setAttribute("aria-busy", "true");  // screen readers read the whole answer, not each word
  try {
    turn.answer = await follow(`/studies/${state.study}/questions`, {...view, turns: turns.slice(-50), question}, "answer",
      control.signal, message => {
        if ("waiting" in message) status(waiting(message.waiting));
        if ("text" in message) { turn.reply.textContent = message.text; status("Answering."); scroll(); }
      });
    status("");
    answered(turn);
  } catch (error) {
    state.turns = state.turns.filter(other => other !== turn);
    turn.reply.classList.add("wrong");
    turn.reply.textContent = error.name === "AbortError" ? "Stopped." : error.message;
    status("");
  } finally {
    $("talk").removeAttribute("aria-busy");
    if (state.stop === control) { state.stop = null; busy(false); }
    scroll();
  }
}

function entry(question) {
  const entry = document.createElement("li"), asked = document.createElement("p"), reply = document.createElement("p");
  asked.className = "question";
  asked.textContent = question;
  reply.className = "answer";
  reply.textContent = "…";
  entry.append(asked, reply);
  $("talk").append(entry);
  scroll();
  return {entry, reply};
}

function answered(turn) {
  const {text, boxes, unread, forgotten} = turn.answer, about = document.createElement("p"), button = document.createElement("button");
  turn.reply.textContent = text || "(no text)";
  const good = boxes.filter(box => box).length, parts = [describe(turn.view), `${good} ${good === 1 ? "box" : "boxes"}`];
  if (good < boxes.length) parts.push(`${boxes.length - good} malformed, without area or outside the picture`);
  if (unread) parts.push(`${unread} ${unread === 1 ? "attempt" : "attempts"} at a box could not be read`);
  if (forgotten) parts.push(`${forgotten} of the earliest questions did not fit into the context and were left out`);
  about.className = "about";
  about.textContent = parts.join(" · ");
  button.type = "button";
  button.textContent = "Show on the image";
  button.addEventListener("click", () => { state.chosen = turn; show(turn.view); });
  about.append(button);
  turn.entry.append(about);
  state.chosen = turn;
  showOverlays();
}

function busy(is) {
  $("send").disabled = is;
  $("stop").hidden = !is;
  for (const button of $("suggestions").children) button.disabled = is;
}

function scroll() { $("talk").lastElementChild?.scrollIntoView({block: "nearest"}); }

// ---- User input -------------------------------------------------------------------------------------------------------

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
$("stage").addEventListener("wheel", event => {
  if ($("slice-label").hidden || event.ctrlKey) return;
  event.preventDefault();
  show({slice: Math.max(0, state.view.slice + Math.sign(event.deltaY))});
}, {passive: false});
$("with-boxes").addEventListener("change", showOverlays);
$("with-heat").addEventListener("change", showOverlays);
$("word").addEventListener("change", event => { state.chosen.word = Number(event.target.value); showOverlays(); });
$("back").addEventListener("click", () => show(state.chosen.view));
$("ask").addEventListener("submit", event => { event.preventDefault(); ask($("question").value); });
$("question").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask($("question").value); }
});
for (const button of $("suggestions").children) button.addEventListener("click", () => ask(button.textContent));
$("stop").addEventListener("click", () => state.stop?.abort());
addEventListener("resize", fit);
addEventListener("pagehide", event => { if (!event.persisted && state.study) navigator.sendBeacon(`/studies/${state.study}/forget`); });
document.body.classList.add("empty");
