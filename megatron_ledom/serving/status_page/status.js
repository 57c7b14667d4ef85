// The runs, read again every few seconds while the page is visible.

import { curveOf } from "./curve.js";
import { byId, make } from "./dom.js";
import { startTheme } from "./theme.js";

const REFRESH_SECONDS = 5;
const LONGEST_SECONDS = 60;
const GIB = 2 ** 30;
const UNITS = [[86400, "d"], [3600, "h"], [60, "m"]];

/** Return a time such as `3d 04h`, `12m 05s` or `7s`. */
export function duration(seconds) {
  if (seconds === null) return "–";
  let left = Math.floor(seconds);
  const parts = [];
  for (const [size, unit] of UNITS) {
    if (parts.length === 0 && left < size) continue;
    parts.push(`${String(Math.floor(left / size)).padStart(parts.length ? 2 : 1, "0")}${unit}`);
    left %= size;
  }
  parts.push(`${String(left).padStart(parts.length ? 2 : 1, "0")}s`);
  return parts.slice(0, 2).join(" ");
}

const whole = (value) => (value === null ? "–" : Math.round(value).toLocaleString("en"));
const fixed = (value, digits) => (value === null ? "–" : value.toFixed(digits));
const ago = (seconds) => (seconds === null ? "–" : `${duration(seconds)} ago`);

function facts(run) {
  const slow = run.slowest_ratio === null ? "" : ` (× ${run.slowest_ratio.toFixed(2)})`;
  const slowest = run.slowest_ranks.map(([rank]) => rank).join(", ");
  const sets = Object.entries(run.validation);
  const validation = sets.map(([name, loss]) => (sets.length > 1 ? `${name} ${loss.toFixed(4)}` : loss.toFixed(4))).join(", ");
  const saved = run.checkpoint_iteration === null ? "–" : `${whole(run.checkpoint_iteration)}, ${ago(run.checkpoint_age_seconds)}`;
  const found = {
    "loss, mean of 20": fixed(run.lm_loss, 4),
    "validation loss": validation ? `${validation} at ${whole(run.validation_iteration)}` : "–",
    "tokens/s": whole(run.tokens_per_second),
    "s/iteration": fixed(run.seconds_per_iteration, 3),
    MFU: run.mfu === null ? "–" : `${(100 * run.mfu).toFixed(1)} %`,
    "bad steps": whole(run.bad_steps),
    "last checkpoint": saved,
    "slowest rank": slowest ? `${slowest}${slow}` : "–",
    heartbeat: ago(run.heartbeat_age_seconds),
    "SLURM job": run.slurm_job_id === null ? "–" : `${run.slurm_job_id} ${run.slurm_state ?? "(state unknown)"}`,
    host: run.host || "–",
    ranks: whole(run.world_size),
    "free disk": run.disk_free_bytes === null ? "–" : `${whole(run.disk_free_bytes / GIB)} GiB`,
  };
  const list = make("dl", { class: "facts" });
  for (const [name, value] of Object.entries(found)) list.append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  return list;
}

function notes(run) {
  const found = run.problems.map(({ kind, text }) => (text ? `${kind}: ${text}` : kind));
  if (run.reason && !run.problems.some(({ text }) => text === run.reason)) found.unshift(run.reason);
  return found.length ? make("ul", { class: "notes" }, ...found.map((text) => make("li", {}, text))) : "";
}

function card(run) {
  const { iteration, train_iters: last } = run;
  const left = run.eta_seconds === null ? "" : `, ${duration(run.eta_seconds)} left`;
  const position = iteration === null ? "" : `${whole(iteration)}${last ? ` of ${whole(last)}` : ""}${left}`;
  const bar = last && iteration !== null ? make("progress", { max: last, value: iteration, "aria-label": `progress of ${run.run}` }) : "";
  const activity = run.state === "running" && run.activity ? ` · ${run.activity}` : "";
  const name = run.stage ? `${run.run} · ${run.stage}` : run.run;
  return make(
    "article",
    { class: "run", "data-state": run.state, "data-healthy": String(run.is_healthy) },
    make("header", {}, make("h2", {}, name), make("span", { class: "state" }, `${run.state}${activity}`), make("span", { class: "left" }, position)),
    bar,
    make("div", { class: "body" }, facts(run), curveOf(run)),
    notes(run),
  );
}

function show({ at, runs }) {
  byId("runs").replaceChildren(...runs.map(card));
  const wrong = runs.filter((run) => !run.is_healthy).length;
  document.title = wrong ? `(${wrong}) ledom status` : "ledom status";
  const count = `${runs.length} run${runs.length === 1 ? "" : "s"}, ${wrong ? `${wrong} with problems` : "all healthy"}`;
  byId("updated").textContent = `${count} · read at ${new Date(1000 * at).toLocaleTimeString()}`;
}

async function refresh() {
  const trouble = byId("trouble");
  try {
    const response = await fetch("/api/status", { signal: AbortSignal.timeout(1000 * LONGEST_SECONDS) });
    if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error ?? `The server answers with status ${response.status}.`);
    show(await response.json());
    trouble.hidden = true;
  } catch (error) {
    const known = error instanceof TypeError || error.name === "TimeoutError";
    const reason = known ? "The server does not answer: start `ledom status --serve` again." : error.message;
    trouble.textContent = `${reason} What is shown below may be out of date.`;
    trouble.hidden = false;
  }
}

async function follow() {
  for (;;) {
    if (!document.hidden) await refresh();
    await new Promise((resolve) => {
      setTimeout(resolve, 1000 * REFRESH_SECONDS);
      document.addEventListener("visibilitychange", resolve, { once: true });
    });
  }
}

startTheme();
follow();
