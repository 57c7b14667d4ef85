// The loss of a run as a small line chart.

import { make } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300;
const HEIGHT = 100;
const LEAST_POINTS = 3;

function element(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Return the range that shows the curve: its highest value is left out if the first losses are far above the others. */
function range(losses) {
  const sorted = [...losses].sort((one, other) => one - other);
  const low = sorted[0];
  const high = sorted[Math.floor(0.95 * (sorted.length - 1))];
  return high > low ? [low, high] : [low - 0.5, low + 0.5];
}

/** Return the chart of a run, with its range in words; nothing without enough records. */
export function curveOf({ curve }) {
  if (curve.length < LEAST_POINTS) return "";
  const [low, high] = range(curve.map(([, loss]) => loss));
  const [first, last] = [curve[0][0], curve.at(-1)[0]];
  const points = curve.map(([iteration, loss]) => {
    const x = (WIDTH * (iteration - first)) / Math.max(1, last - first);
    const y = HEIGHT * (1 - (Math.min(loss, high) - low) / (high - low));
    return `${x.toFixed(1)},${y.toFixed(1)}`;
  });
  const words = `loss from ${curve[0][1].toFixed(3)} at iteration ${first} to ${curve.at(-1)[1].toFixed(3)} at iteration ${last}`;
  const chart = element("svg", { class: "curve", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": words });
  chart.append(element("line", { x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT }), element("line", { x1: 0, x2: WIDTH, y1: 0, y2: 0 }));
  chart.append(element("path", { d: `M${points.join("L")}` }));
  const above = curve.some(([, loss]) => loss > high) ? " and above" : "";
  const ends = [`${high.toFixed(3)}${above} top, ${low.toFixed(3)} bottom`, `loss, ${first.toLocaleString("en")} to ${last.toLocaleString("en")}`];
  return make("figure", { class: "chart" }, chart, make("figcaption", { class: "range hint" }, ...ends.map((text) => make("span", {}, text))));
}
