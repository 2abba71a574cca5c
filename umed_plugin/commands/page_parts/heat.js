// ---- The scale of every heat map: dark violet to yellow, as matplotlib's plasma. Its steps of brightness are even, and it is safe
// for colour blindness. All maps share it; otherwise a uniform map would look like a sharp one. No attention is transparent, and
// HEAT_MOST times an even share or more is yellow.

const HEAT_MOST = 4;
const HEAT_LEAST = 2;  // times an even share: a map whose highest patch has less shows nothing
const HEAT_OPACITY = .75;
const RAMP = [[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]];

// The colour of a patch with so many times an even share: red, green, blue, and alpha in 0-255.
function heatColour(times, opacity = HEAT_OPACITY) {
  const share = Math.min(Math.max(times / HEAT_MOST, 0), 1);
  const at = share * (RAMP.length - 1), low = Math.min(Math.floor(at), RAMP.length - 2);
  return [...RAMP[low].map((from, i) => from + (RAMP[low + 1][i] - from) * (at - low)), 255 * opacity * share];
}

// Shares of the attention, base64 of one byte per patch with 255 for `peak`, as multiples of an even share.
function heatTimes(values, peak) {
  const bytes = Uint8Array.from(atob(values), byte => byte.charCodeAt(0));
  return [...bytes].map(value => value / 255 * peak * bytes.length);
}

function drawHeat(canvas, rows, columns, times, opacity) {
  Object.assign(canvas, {width: columns, height: rows});
  const image = new ImageData(columns, rows);
  times.forEach((value, patch) => image.data.set(heatColour(value, opacity), 4 * patch));
  canvas.getContext("2d").putImageData(image, 0, 0);
}
