// ---- Boxes and heat.

function showOverlays() {
  const turn = state.chosen, here = turn && turn.done && samePlace(turn.view, state.view);
  panes.forEach((pane, k) => pane.showBoxes(here && $("with-boxes").checked ? turn.answers[k] : null));
  showWords(here && $("with-heat").checked ? turn : null);
  const away = turn && turn.done && !(here && same(turn.view, state.view));
  $("elsewhere").hidden = !away;
  if (away) {
    $("elsewhere").firstElementChild.textContent = here ? `The model saw another window (${wordsOf(turn.view.window)}).`
      : `The answer refers to another view (${describe(turn.view)}).`;
  }
  for (const other of state.turns) other.entry.classList.toggle("chosen", other === turn && state.turns.length > 1);
  place();  // the controls below the picture have changed
}

// A box and its sentence, in both directions.
function light(k, box) {
  const turn = state.chosen;
  if (!turn || !turn.sentences[k]) return;
  panes[k].light(box);
  for (const [of, sentences] of turn.sentences[k]) for (const sentence of sentences) sentence.classList.toggle("lit", of === box);
}

const attentionOf = (turn, k) => turn.attention[k]?.[$("sinks").checked ? "masked" : "plain"];

// Which word of the k-th answer is shown: the chosen one of the first answer, or the one that reads the same, or an abnormality.
function wordOf(turn, k) {
  const words = attentionOf(turn, k)?.words || [], wanted = (attentionOf(turn, turn.first)?.words || [])[turn.word];
  if (k === turn.first) return wanted;
  return words.find(word => wanted && word.text.toLowerCase() === wanted.text.toLowerCase()) || words.find(word => word.is_name);
}

function showWords(turn) {
  const attention = turn && attentionOf(turn, turn.first), words = attention ? attention.words : [];
  // While maps without sinks are computed, the controls stay.
  const known = turn ? Object.values(turn.attention[turn.first] || {}) : [];
  for (const id of ["word-label", "opacity-label", "sinks-label", "scale"]) $(id).hidden = !known.some(one => one.words.length);
  $("peak").textContent = "";
  $("anyway").hidden = true;
  for (const pane of panes) pane.showHeat(null, null, [1, 1]);
  if (turn && turn.answers.some((answer, k) => answer && !attentionOf(turn, k)) && !turn.looking && !turn.failed) look(turn);
  if (!words.length) return;
  const names = words.filter(word => word.is_name).length;
  const group = (label, from, to) => {
    const made = el("optgroup", {label}, ...words.slice(from, to).map((word, index) => new Option(word.text, from + index)));
    return to > from ? [made] : [];
  };
  $("word").replaceChildren(
    ...(names ? [] : [new Option("choose a word", -1)]),
    ...group("abnormality", 0, names), ...group("other words", names, words.length));
  $("word").value = turn.word;
  showHeat(turn);
}

function showHeat(turn) {
  const said = [];
  let flat = false;
  panes.forEach((pane, k) => {
    const attention = attentionOf(turn, k), word = wordOf(turn, k), who = panes.length > 1 ? `${pane.name}: the` : "The";
    if (!word) return;
    const times = heatTimes(word.map, word.peak), highest = word.peak * times.length;
    const off = highest < HEAT_LEAST && !turn.anyway;
    flat ||= off;
    pane.showHeat(attention, off ? null : times, turn.answers[k].size, Number($("opacity").value));
    said.push(`${who} strongest patch has ${highest.toFixed(1)} times an even share${off ? `, which is below ${HEAT_LEAST}: no map` : ""}`
      + (attention.sinks === null ? "" : `, ${attention.sinks} of ${times.length} patches left out as sinks`) + ".");
  });
  $("peak").textContent = said.join(" ");
  $("anyway").hidden = !flat;
  drawHeat($("bar"), 1, 120, [...Array(120).keys()].map(at => at / 119 * HEAT_MOST), Number($("opacity").value));
}

async function look(turn) {
  turn.looking = true;
  const {study} = state, mask_sinks = $("sinks").checked;
  try {
    for (const [k, answer] of turn.answers.entries()) {
      if (!answer || attentionOf(turn, k)) continue;
      const path = `/studies/${study}/answers/${answer.number}/attention`;
      const attention = await follow(path, {mask_sinks}, "attention", turn.signal, message => {
        if (!isGone(turn)) status(message.waiting ? waiting(message.waiting) : "Computing the attention maps.");
      });
      if (isGone(turn)) return;
      turn.attention[k] = {...turn.attention[k], [mask_sinks ? "masked" : "plain"]: attention};
    }
    const {words} = attentionOf(turn, turn.first);
    if (turn.word === undefined) turn.word = words.some(word => word.is_name) ? 0 : -1;
    status(!words.length || turn.word >= 0 ? "" : "No known abnormality is named in the answer. Choose a word for the heat map.");
  } catch (error) {
    turn.failed = true;
    if (isGone(turn)) return;
    status("");
    fault(error.message);
    return;
  } finally { turn.looking = false; }
  if (turn !== state.chosen) return;
  showOverlays();
  // The controls of the map have pushed the answer down; follow it, unless the person has gone elsewhere.
  if (turn.scrolled === scrollY) scroll();
  turn.scrolled = null;
}
