// ---- Asking.

async function ask(question) {
  question = question.trim();
  if (!state.view) return fault("Choose an image first.");
  if (!question || state.stop) return;
  fault("");
  const view = {...state.view};
  const earlier = k => $("with-turns").checked
    ? state.turns.filter(turn => turn.answers[k] && same(turn.view, view)).map(turn => [turn.question, turn.answers[k].text]) : [];
  const asked = panes.map((pane, k) => ({...view, model: k, turns: earlier(k).slice(-50), question}));
  const turn = {question, view, answers: panes.map(() => null), attention: [], sentences: [], anyway: false, ...entry(question)};
  state.turns.push(turn);
  state.chosen = null;
  document.body.classList.add("asked");
  showOverlays();
  const control = new AbortController();
  state.stop = control;
  busy(true);
  $("question").value = "";
  $("talk").setAttribute("aria-busy", "true");  // screen readers read the whole answer, not each word
  const replied = asked.map(async (body, k) => {
    try {
      turn.answers[k] = await follow(`/studies/${state.study}/questions`, body, "answer", control.signal, message => {
        if ("waiting" in message && k === 0) status(waiting(message.waiting));
        if ("text" in message) { turn.replies[k].textContent = message.text; status("Answering."); scroll(); }
      });
      return null;
    } catch (error) {
      turn.replies[k].classList.add("wrong");
      turn.replies[k].textContent = error.name === "AbortError" ? "Stopped." : error.message;
      return error;
    }
  });
  try {
    const faults = await Promise.all(replied);
    if (isGone(turn)) return;
    status("");
    if (faults.every(error => error)) state.turns = state.turns.filter(other => other !== turn);
    else answered(turn);
  } finally {
    $("talk").removeAttribute("aria-busy");
    if (state.stop === control) { state.stop = null; busy(false); }
    scroll();
  }
}

// Whether other images were chosen while a turn was waited for: what it tells of is no longer shown.
const isGone = turn => !state.turns.includes(turn);

function entry(question) {
  const replies = panes.map(() => el("p", {className: "answer", textContent: "…"}));
  const names = panes.map(pane => panes.length > 1 ? el("h2", {}, el("span", {className: "swatch"}), pane.name) : null);
  const beside = replies.map((reply, k) => el("div", {className: `of-${k}`}, names[k], reply));
  const entry = el("div", {className: "turn"}, el("p", {className: "question", textContent: question}), el("div", {className: "replies"}, ...beside));
  $("talk").append(entry);
  scroll();
  return {entry, replies};
}

function answered(turn) {
  const number = turn.number = ++state.count;
  turn.done = true;
  turn.first = turn.answers.findIndex(answer => answer);
  turn.answers.forEach((answer, k) => {
    if (!answer) return;
    turn.sentences[k] = fillAnswer(turn.replies[k], answer, box => { if (turn === state.chosen) light(k, box); });
    const parts = [aboutAnswer(answer)], {forgotten} = answer;
    if (forgotten) parts.push(`${forgotten} of the earliest questions did not fit into the context and were left out`);
    turn.replies[k].after(el("p", {className: "about", textContent: parts.join(" · ")}));
  });
  const button = (text, act) => {
    const made = el("button", {type: "button", textContent: text, "aria-label": `${text}, answer ${number}`});
    made.addEventListener("click", act);
    return made;
  };
  turn.entry.append(el("p", {className: "about of-turn"}, describe(turn.view),
    button("Show on the image", () => { state.chosen = turn; show(turn.view); }),
    button("Save the picture", () => saveTurn(turn)),
    button("Save the answer", () => saveFile(fileName(itemOf(turn.view).label, number, ".json"),
      new Blob([JSON.stringify(asJson(turn), null, 1)], {type: "application/json"})))));
  state.chosen = turn;
  scroll();
  turn.scrolled = scrollY;
  showOverlays();
}

// What is saved of an answer; boxes are in pixels of the picture.
function asJson(turn) {
  return {saved: new Date().toISOString(), image: itemOf(turn.view).label, view: turn.view, shown: describe(turn.view), question: turn.question,
    answers: turn.answers.flatMap((answer, k) => answer ? [{checkpoint: panes[k].name, text: answer.text, boxes: answer.boxes,
      picture_size: answer.size, cut_off_at_tokens: answer.cut,
      not_readable_as_box: answer.places.filter(([, , box]) => box === null).map(([start, end]) =>
        Array.from(answer.text).slice(start, end).join(""))}] : [])};
}

async function saveTurn(turn) {
  state.chosen = turn;
  show(turn.view);
  while (document.body.classList.contains("loading")) await new Promise(done => setTimeout(done, 30));
  await Promise.all(panes.map(({picture}) => picture.decode().catch(() => null)));
  if (isGone(turn)) return;
  const heat = panes[0].heat.hidden ? [] : [`Heat map of "${$("word").selectedOptions[0].textContent}", 0 to ${HEAT_MOST} or more times an even share.`];
  const lines = [`${itemOf(turn.view).label}: ${describe(turn.view)}`, `Question: ${turn.question}`,
    ...turn.answers.flatMap((answer, k) => answer ? [`${panes[k].name}: ${answer.text || "(no text)"} (${aboutAnswer(answer)})`] : []),
    ...heat, `Saved ${new Date().toISOString().slice(0, 16).replace("T", " ")} UTC. Research software, not a medical device.`];
  await savePicture(panes, lines, fileName(itemOf(turn.view).label, turn.number, ".png"));
}

function busy(is) {
  $("send").disabled = is;
  $("stop").hidden = !is;
  for (const button of $("suggestions").children) button.disabled = is;
}

// On a phone the form stands over the end of the page, so the answer has to end above it.
function scroll() {
  const last = $("talk").lastElementChild;
  if (!last) return;
  last.style.scrollMarginBottom = innerWidth > 860 ? "" : `${$("ask").offsetHeight + 12}px`;
  last.scrollIntoView({block: "nearest"});
}
