// The page of `signet ui`. It has no dependencies and asks nobody but the command that serves it.
// Whatever comes from agents becomes text, never markup.
"use strict";

const $ = (id) => document.getElementById(id);
const make = (tag, text, attributes = {}) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};

const state = {
  graph: { workloads: [], edges: [], namespaces: [], isComplete: true },
  byId: new Map(),
  touching: new Map(),
  shown: new Set(["mtls", "kernel", "plaintext", "denied", "audit"]),
  search: "",
  selected: null,
  hovered: null,
  view: { x: 0, y: 0, scale: 1, touched: false },
  pulses: new Map(),
  missed: 0,
};

// How an edge is drawn: what became of it first, then how it travelled.
const kindOf = (edge) =>
  edge.verdict === "DROPPED" ? "denied" : edge.verdict === "AUDIT" ? "audit" : edge.via;
const words = { mtls: "tunnelled", kernel: "in the kernel", plaintext: "in clear", denied: "denied", audit: "would be denied" };
const dashes = { mtls: [], kernel: [2, 3], plaintext: [7, 5], denied: [3, 3], audit: [10, 4, 2, 4] };

/* ---- layout: a box a namespace, its workloads in columns; the same data is always the same picture */
const CELL = { width: 156, height: 44 };
const PAD = { side: 16, top: 34, gap: 56 };

function layout(graph) {
  const groups = new Map();
  for (const workload of graph.workloads) {
    const group = workload.namespace || "outside";
    if (!groups.has(group)) groups.set(group, []);
    groups.get(group).push(workload);
  }
  const boxes = [...groups].map(([name, workloads]) => {
    const columns = Math.max(1, Math.ceil(Math.sqrt(workloads.length / 3)));
    const rows = Math.ceil(workloads.length / columns);
    return {
      name, workloads, columns,
      width: columns * CELL.width + 2 * PAD.side,
      height: rows * CELL.height + PAD.top + PAD.side,
    };
  });
  boxes.sort((a, b) => b.height - a.height || a.name.localeCompare(b.name));
  const area = boxes.reduce((sum, box) => sum + (box.width + PAD.gap) * (box.height + PAD.gap), 0);
  const limit = Math.max(Math.sqrt(area * 1.7), ...boxes.map((box) => box.width));
  let x = 0, y = 0, row = 0;
  for (const box of boxes) {
    if (x > 0 && x + box.width > limit) { x = 0; y += row + PAD.gap; row = 0; }
    Object.assign(box, { x, y });
    x += box.width + PAD.gap;
    row = Math.max(row, box.height);
    box.workloads.forEach((workload, index) => {
      workload.x = box.x + PAD.side + (index % box.columns) * CELL.width + CELL.width / 2;
      workload.y = box.y + PAD.top + Math.floor(index / box.columns) * CELL.height + CELL.height / 2;
    });
  }
  return boxes;
}

/* ---- drawing: the picture is painted once, and only copied while nothing but a pulse moves */
const canvas = $("canvas");
const context = canvas.getContext("2d", { alpha: false });
const still = document.createElement("canvas");
let boxes = [], colours = {}, stale = true, asked = false;
// The view that the still picture shows; while a hand moves, it is only shifted and scaled.
let painted = null, resting = 0;

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["paper", "panel", "ink", "faint", "line", "focus", "mtls", "kernel", "plaintext", "denied", "audit"])
    colours[name] = style.getPropertyValue(`--${name}`).trim();
}

function repaint() { stale = true; schedule(); }
function move() {
  schedule();
  clearTimeout(resting);
  resting = setTimeout(repaint, 120);
}
function schedule() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(frame);
}

function fit() {
  const ratio = window.devicePixelRatio || 1;
  const { clientWidth, clientHeight } = canvas;
  canvas.width = still.width = Math.max(1, clientWidth * ratio);
  canvas.height = still.height = Math.max(1, clientHeight * ratio);
  if (!state.view.touched && boxes.length) {
    const right = Math.max(...boxes.map((b) => b.x + b.width)), bottom = Math.max(...boxes.map((b) => b.y + b.height));
    const scale = Math.min(1.2, (clientWidth - 60) / right, (clientHeight - 70) / bottom);
    state.view.scale = Math.max(0.05, scale);
    state.view.x = (clientWidth - right * state.view.scale) / 2;
    state.view.y = (clientHeight - bottom * state.view.scale) / 2;
  }
  repaint();
}

function toScreen(on) {
  const ratio = window.devicePixelRatio || 1, { x, y, scale } = state.view;
  on.setTransform(ratio * scale, 0, 0, ratio * scale, ratio * x, ratio * y);
}

const isFound = (workload) => !state.search || workload.id.toLowerCase().includes(state.search);

function curve(on, from, to) {
  const bend = Math.min(60, Math.hypot(to.x - from.x, to.y - from.y) / 4);
  on.moveTo(from.x, from.y);
  if (from === to) { on.bezierCurveTo(from.x + 70, from.y - 40, from.x + 70, from.y + 40, to.x, to.y); return; }
  const middle = { x: (from.x + to.x) / 2 + (to.y > from.y ? bend : -bend), y: (from.y + to.y) / 2 };
  on.quadraticCurveTo(middle.x, middle.y, to.x, to.y);
}

function paint() {
  const on = still.getContext("2d", { alpha: false });
  on.setTransform(1, 0, 0, 1, 0, 0);
  on.fillStyle = colours.paper;
  on.fillRect(0, 0, still.width, still.height);
  toScreen(on);
  const detailed = state.view.scale > 0.35;
  for (const box of boxes) {
    on.fillStyle = colours.panel; on.strokeStyle = colours.line; on.lineWidth = 1;
    on.beginPath(); on.roundRect(box.x, box.y, box.width, box.height, 12); on.fill(); on.stroke();
    on.fillStyle = colours.faint; on.font = `600 ${detailed ? 13 : 20}px system-ui, sans-serif`;
    on.fillText(box.name, box.x + PAD.side, box.y + 22, box.width - 2 * PAD.side);
  }
  const focus = state.selected || state.hovered;
  // One stroke for all edges that look alike: five hundred workloads have thousands.
  const groups = new Map();
  for (const edge of state.graph.edges) {
    const kind = kindOf(edge);
    if (!state.shown.has(kind)) continue;
    const from = state.byId.get(edge.from), to = state.byId.get(edge.to);
    if (!from || !to) continue;
    const near = !focus || edge.from === focus || edge.to === focus;
    const key = `${kind} ${near ? 1 : 0} ${Math.min(4, Math.floor(Math.log10(edge.count + 1)))}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push([from, to]);
  }
  const sorted = [...groups].sort(([a], [b]) => a.split(" ")[1] - b.split(" ")[1]);
  for (const [key, pairs] of sorted) {
    const [kind, near, weight] = key.split(" ");
    on.strokeStyle = colours[kind];
    on.globalAlpha = near === "1" ? 0.75 : 0.07;
    on.lineWidth = (0.8 + 0.6 * weight) / Math.max(0.5, Math.min(1, state.view.scale));
    // Dashes are slow, and thousands of them are a grey anyway.
    on.setLineDash(pairs.length > 300 ? [] : dashes[kind]);
    on.beginPath();
    for (const [from, to] of pairs) curve(on, from, to);
    on.stroke();
  }
  on.setLineDash([]);
  on.textAlign = "center"; on.textBaseline = "middle";
  const neighbours = new Set((state.touching.get(focus) || []).flatMap((edge) => [edge.from, edge.to]));
  for (const workload of state.graph.workloads) {
    const dim = (focus && workload.id !== focus && !neighbours.has(workload.id)) || !isFound(workload);
    on.globalAlpha = dim ? 0.25 : 1;
    const width = CELL.width - 20, height = CELL.height - 18;
    on.fillStyle = colours.paper;
    on.strokeStyle = workload.id === state.selected ? colours.focus
      : workload.problem ? colours.denied : workload.mode === "strict" ? colours.mtls
      : workload.mode === "permissive" ? colours.plaintext : workload.mode === "observe" ? colours.audit : colours.line;
    on.lineWidth = workload.id === state.selected ? 3 : 1.5;
    on.beginPath(); on.roundRect(workload.x - width / 2, workload.y - height / 2, width, height, 7); on.fill(); on.stroke();
    if (detailed) {
      on.fillStyle = colours.ink; on.font = "12px system-ui, sans-serif";
      on.fillText(workload.name, workload.x, workload.y, width - 12);
    }
  }
  on.globalAlpha = 1; on.textAlign = "start"; on.textBaseline = "alphabetic";
}

const painting = []; // milliseconds of the last frames
function frame(now) {
  asked = false;
  const start = performance.now();
  if (stale || !painted) { paint(); stale = false; painted = { ...state.view }; }
  const ratio = window.devicePixelRatio || 1, zoom = state.view.scale / painted.scale;
  const dx = (state.view.x - painted.x * zoom) * ratio, dy = (state.view.y - painted.y * zoom) * ratio;
  context.setTransform(1, 0, 0, 1, 0, 0);
  if (dx || dy || zoom !== 1) { context.fillStyle = colours.paper; context.fillRect(0, 0, canvas.width, canvas.height); }
  context.drawImage(still, dx, dy, still.width * zoom, still.height * zoom);
  toScreen(context);
  for (const [key, pulse] of state.pulses) {
    const age = (now - pulse.start) / 900;
    if (age >= 1) { state.pulses.delete(key); continue; }
    context.strokeStyle = colours[pulse.kind];
    context.globalAlpha = 1 - Math.max(0, age);
    context.lineWidth = 4;
    context.beginPath(); curve(context, pulse.from, pulse.to); context.stroke();
  }
  context.globalAlpha = 1;
  const took = performance.now() - start;
  painting.push(took);
  if (painting.length > 240) painting.shift();
  if (state.pulses.size) schedule();
}

/* ---- what is told */
function take(graph) {
  const before = state.graph.workloads.map((w) => w.id).join("\n");
  state.graph = graph;
  state.byId = new Map(graph.workloads.map((workload) => [workload.id, workload]));
  state.touching = new Map();
  for (const edge of graph.edges)
    for (const id of new Set([edge.from, edge.to])) {
      if (!state.touching.has(id)) state.touching.set(id, []);
      state.touching.get(id).push(edge);
    }
  boxes = layout(graph);
  if (state.selected && !state.byId.has(state.selected)) choose(null);
  if (before !== graph.workloads.map((w) => w.id).join("\n")) { list(); fit(); }
  summarise(); namespaces(); repaint();
  if (state.selected) details();
}

function summarise() {
  const counts = {};
  for (const edge of state.graph.edges) counts[kindOf(edge)] = (counts[kindOf(edge)] || 0) + edge.count;
  const parts = [`${state.graph.workloads.length} workloads`];
  for (const kind of Object.keys(words)) if (counts[kind]) parts.push(`${counts[kind].toLocaleString("en")} flows ${words[kind]}`);
  if (!state.graph.isComplete) parts.push("some nodes or edges are missing");
  if (state.missed) parts.push(`${state.missed.toLocaleString("en")} live flows were not shown`);
  const text = parts.join(" · ");
  if ($("summary").textContent !== text) $("summary").textContent = text;
}

const nameOf = (party) =>
  party.namespace && party.serviceAccount ? `${party.namespace}/${party.serviceAccount}` : party.identity || "";

function pulse(flow) {
  const from = state.byId.get(nameOf(flow.source)), to = state.byId.get(nameOf(flow.destination));
  if (!from || !to || state.pulses.size > 200) return;
  const kind = kindOf(flow);
  if (!state.shown.has(kind)) return;
  state.pulses.set(`${from.id} ${to.id} ${kind}`, { from, to, kind, start: performance.now() });
  schedule();
}

/* ---- the list and the details */
function list() {
  const found = state.graph.workloads.filter(isFound);
  $("workloads").replaceChildren(...found.map((workload) => {
    const item = make("li", workload.id, {
      role: "option", id: `w-${state.graph.workloads.indexOf(workload)}`, "aria-selected": String(workload.id === state.selected),
    });
    item.dataset.id = workload.id;
    if (workload.mode) item.append(" ", make("small", workload.mode));
    return item;
  }));
}

function choose(id) {
  state.selected = id;
  for (const item of $("workloads").children) {
    const is = item.dataset.id === id;
    item.setAttribute("aria-selected", String(is));
    if (is) { $("workloads").setAttribute("aria-activedescendant", item.id); item.scrollIntoView({ block: "nearest" }); }
  }
  if (!id) { $("workloads").removeAttribute("aria-activedescendant"); $("details").hidden = true; }
  else { $("flows").replaceChildren(); details(); }
  repaint();
}

function details() {
  const workload = state.byId.get(state.selected);
  if (!workload) return;
  const wasHidden = $("details").hidden;
  $("details").hidden = false;
  $("details").querySelector("h2").textContent = workload.id;
  const facts = make("dl");
  const fact = (name, value) => value && facts.append(make("dt", name), make("dd", value));
  fact("mode", workload.mode); fact("pods", workload.pods ? String(workload.pods) : ""); fact("problem", workload.problem);
  $("facts").replaceChildren(facts);
  const edges = (state.touching.get(workload.id) || []).slice(0, 200);
  const open = $("edges").querySelector("[aria-expanded=true]")?.dataset.key;
  $("edges").replaceChildren(...edges.map((edge) => {
    const kind = kindOf(edge);
    const key = [edge.from, edge.to, edge.port, kind, edge.reason].join(" ");
    const reason = edge.reason === "allowed" ? "" : `, ${edge.reason}`;
    const button = make("button", `${edge.from} → ${edge.to}${edge.port ? ":" + edge.port : ""} `, { "aria-expanded": String(key === open) });
    button.dataset.key = key;
    button.append(make("span", `${words[kind]}${reason}`, { class: kind }), ` ×${edge.count.toLocaleString("en")}`);
    button.addEventListener("click", () => flowsOf(edge, button));
    const item = make("li"); item.append(button); return item;
  }));
  if (wasHidden) fit();
}

async function ask(path, parameters) {
  const answer = await fetch(`${path}?${new URLSearchParams(parameters)}`);
  if (!answer.ok) throw new Error((await answer.text()).trim() || `${answer.status}`);
  return answer.json();
}

async function flowsOf(edge, button) {
  for (const other of $("edges").querySelectorAll("button")) other.setAttribute("aria-expanded", "false");
  button.setAttribute("aria-expanded", "true");
  const place = $("flows");
  place.replaceChildren(make("p", "asking…"));
  try {
    const [flows, nodes] = await Promise.all([ask("/api/flows", { from: edge.from, to: edge.to }), ask("/api/policies", {})]);
    const wanted = flows.filter((flow) => kindOf(flow) === kindOf(edge) && (!edge.port || flow.destination.port === edge.port));
    place.replaceChildren(make("h3", `Recent flows (${wanted.length})`));
    const deciding = new Map();
    for (const flow of wanted) {
      const policy = flow.policy && [flow.policy.kind, flow.policy.namespace, flow.policy.name].filter(Boolean).join("/");
      if (policy) deciding.set(policy, flow.policy);
      const line = make("div", `${flow.time.slice(11, 23)} ${flow.source.pod || flow.source.ip} → ${flow.destination.pod || flow.destination.ip}:${flow.destination.port} `, { class: "flow" });
      line.append(make("span", `${flow.event === "end" ? "END" : flow.verdict} ${flow.reason}`, { class: kindOf(flow) }), policy ? ` ${policy}` : "");
      place.append(line);
    }
    if (!wanted.length) place.append(make("p", "None of them is among the agents' recent flows any more."));
    for (const [name, policy] of deciding) {
      const known = nodes.flatMap((node) => node.policies)
        .find((p) => p.kind === policy.kind && p.name === policy.name && (p.namespace || "") === (policy.namespace || ""));
      place.append(make("h3", `Decided by ${name}`));
      if (!known) { place.append(make("p", "It is not in force any more.")); continue; }
      const facts = make("dl");
      const fact = (term, value) => facts.append(make("dt", term), make("dd", value));
      fact("action", known.action); fact("direction", known.directions.join(", ")); fact("selects", known.selects);
      for (const condition of known.conditions) fact(condition.type, `${condition.status}: ${condition.message}`);
      place.append(facts);
    }
  } catch (error) {
    place.replaceChildren(make("p", String(error.message || error), { class: "denied" }));
  }
}

/* ---- the roll-out */
const nextMode = (modes) => (modes.permissive ? "strict" : modes.observe ? "permissive" : modes.off ? "permissive" : null);

function namespaces() {
  const body = $("namespaces").tBodies[0];
  const had = document.activeElement?.dataset?.namespace;
  body.replaceChildren(...state.graph.namespaces.map((namespace) => {
    const row = make("tr");
    const modes = Object.entries(namespace.modes).map(([mode, pods]) => `${pods} ${mode}`).join(", ");
    row.append(make("th", namespace.name, { scope: "row" }), make("td", modes), make("td", namespace.problems ? String(namespace.problems) : "none"));
    const cell = make("td");
    const next = nextMode(namespace.modes);
    for (const mode of next === "permissive" ? ["permissive", "strict"] : next ? [next] : []) {
      const button = make("button", `What would ${mode} break?`);
      button.dataset.namespace = `${namespace.name} ${mode}`;
      button.addEventListener("click", () => findings(namespace.name, mode));
      cell.append(button, " ");
    }
    if (!next) cell.textContent = "strict: done";
    row.append(cell);
    return row;
  }));
  if (had) body.querySelector(`[data-namespace="${CSS.escape(had)}"]`)?.focus();
}

async function findings(namespace, mode) {
  const place = $("findings");
  place.replaceChildren(make("p", "asking…"));
  try {
    const found = await ask("/api/rollout", { namespace, to: mode });
    const list = make("ul");
    for (const finding of found.findings) {
      const item = make("li");
      item.append(make("strong", finding.subject), ` ${finding.text}${finding.count ? ` (${finding.count} flows)` : ""}`, make("p", finding.remedy));
      list.append(item);
    }
    if (!found.findings.length) list.append(make("li", `Nothing: none of ${found.seen} kinds of flows that were seen would break.`, { class: "ok" }));
    if (!found.isComplete) list.append(make("li", "Some nodes did not answer: this is not everything."));
    place.replaceChildren(make("h2", `${namespace} to ${mode}`), list);
  } catch (error) {
    place.replaceChildren(make("p", String(error.message || error), { class: "denied" }));
  }
}

/* ---- hands */
function workloadAt(event) {
  const { left, top } = canvas.getBoundingClientRect();
  const x = (event.clientX - left - state.view.x) / state.view.scale, y = (event.clientY - top - state.view.y) / state.view.scale;
  return state.graph.workloads.find((w) => Math.abs(w.x - x) < CELL.width / 2 - 10 && Math.abs(w.y - y) < CELL.height / 2 - 9);
}

let drag = null;
canvas.addEventListener("pointerdown", (event) => { drag = { x: event.clientX, y: event.clientY, moved: false }; canvas.setPointerCapture(event.pointerId); });
canvas.addEventListener("pointermove", (event) => {
  if (drag) {
    const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
    if (!drag.moved && Math.hypot(dx, dy) < 4) return;
    Object.assign(drag, { x: event.clientX, y: event.clientY, moved: true });
    state.view.x += dx; state.view.y += dy; state.view.touched = true;
    move();
    return;
  }
  const hovered = workloadAt(event)?.id ?? null;
  if (hovered !== state.hovered) { state.hovered = hovered; canvas.style.cursor = hovered ? "pointer" : "grab"; repaint(); }
});
canvas.addEventListener("pointerup", (event) => { if (drag && !drag.moved) choose(workloadAt(event)?.id ?? null); drag = null; });
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const { left, top } = canvas.getBoundingClientRect();
  const factor = Math.exp(-event.deltaY / 500), scale = Math.min(4, Math.max(0.05, state.view.scale * factor));
  const x = event.clientX - left, y = event.clientY - top;
  state.view.x = x - ((x - state.view.x) * scale) / state.view.scale;
  state.view.y = y - ((y - state.view.y) * scale) / state.view.scale;
  Object.assign(state.view, { scale, touched: true });
  move();
}, { passive: false });

$("workloads").addEventListener("click", (event) => { const item = event.target.closest("li"); if (item) choose(item.dataset.id); });
$("workloads").addEventListener("keydown", (event) => {
  const items = [...$("workloads").children];
  const at = items.findIndex((item) => item.dataset.id === state.selected);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: items.length - 1 }[event.key];
  if (to !== undefined && items.length) { event.preventDefault(); choose(items[Math.min(items.length - 1, Math.max(0, to))].dataset.id); }
  if (event.key === "Enter" && state.selected) $("edges").querySelector("button")?.focus();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") { choose(null); $("workloads").focus(); } });
$("close").addEventListener("click", () => { choose(null); $("workloads").focus(); });
$("search").addEventListener("input", (event) => { state.search = event.target.value.trim().toLowerCase(); list(); repaint(); });
for (const box of document.querySelectorAll("[data-kind]"))
  box.addEventListener("change", () => { box.checked ? state.shown.add(box.dataset.kind) : state.shown.delete(box.dataset.kind); repaint(); });

const tabs = [...document.querySelectorAll("[role=tab]")];
function show(tab) {
  for (const other of tabs) {
    const is = other === tab;
    other.setAttribute("aria-selected", String(is));
    other.tabIndex = is ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !is;
  }
  tab.focus();
  fit();
}
for (const tab of tabs) {
  tab.addEventListener("click", () => show(tab));
  tab.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") show(tabs[(tabs.indexOf(tab) + 1) % tabs.length]);
  });
}

const dark = window.matchMedia("(prefers-color-scheme: dark)");
function theme(name) { document.documentElement.dataset.theme = name; readColours(); repaint(); }
$("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
new ResizeObserver(fit).observe($("stage"));
theme(dark.matches ? "dark" : "light");

const live = new EventSource("/api/live");
live.addEventListener("graph", (event) => take(JSON.parse(event.data)));
live.addEventListener("flow", (event) => pulse(JSON.parse(event.data)));
live.addEventListener("missed", (event) => { state.missed += Number(event.data); summarise(); });
live.onerror = () => { $("summary").textContent = "signet ui does not answer any more; trying again…"; };
live.onopen = () => summarise();
