// How are the plots and tables of the page drawn from the embedded record?

const byId = (id) => document.getElementById(id);
const NON_FINITE = ["NaN", "Infinity", "-Infinity"]; // as the embedding spells them
const { record, profiles } = JSON.parse(byId("payload").textContent, (_, value) =>
  NON_FINITE.includes(value) ? Number(value) : value
);
const figures = record.figures ?? {};
const scaling = record.scaling ?? { points: [] };
const solved = (result) => result.seconds !== null && Number.isFinite(result.seconds);
const unique = (values) => [...new Set(values)];

// --- words, numbers and elements --------------------------------------------------------------

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}
const html = (tag, attributes = {}, ...children) =>
  build(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "∞" : "−∞";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e5) return size >= 1000 ? value.toFixed(0) : value.toPrecision(3);
  return value.toExponential(1).replace("e+", "e");
}

function tickText(value) {
  if (value === 0 || (value > 0.9e-2 && value < 0.9e4)) return String(Number(value.toPrecision(3)));
  const exponent = Math.floor(Math.log10(value) + 1e-9);
  const mantissa = Number((value / 10 ** exponent).toPrecision(2));
  const raised = String(exponent).replace(/./g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
  return (mantissa === 1 ? "" : `${mantissa}·`) + "10" + raised;
}

// --- methods: one colour and dash each, the same everywhere ------------------------------------

const METHODS = unique([
  ...record.cells.flatMap((cell) => cell.results.map((result) => result.method)),
  ...record.curves.map((curve) => curve.method),
]);
const DASHES = ["", "7 3", "2 3"];
function look(method) {
  const index = METHODS.indexOf(method);
  const dash = DASHES[Math.floor(index / 5) % DASHES.length]; // a second sign for those who see few colours
  return { style: `--c: var(--c${index % 10})`, "stroke-dasharray": dash };
}
const swatch = (method) =>
  svg("svg", { width: 26, height: 10, class: "swatch", "aria-hidden": true },
    svg("path", { d: "M0 5H26", class: "curve", ...look(method) }));

// --- state: what is shown, kept in the address so that a view can be linked ---------------------

const problems = unique(record.curves.map((curve) => curve.problem));
const state = { axis: "iterations", log: false, problem: problems[0], hidden: new Set() };

function readAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (!["axis", "log", "problem", "hide"].some((key) => wanted.has(key))) return; // a section
  state.axis = wanted.get("axis") === "time" ? "time" : "iterations";
  state.log = wanted.get("log") === "1";
  state.problem = problems.includes(wanted.get("problem")) ? wanted.get("problem") : problems[0];
  state.hidden = new Set(wanted.getAll("hide"));
}

function writeAddress() {
  const shown = new URLSearchParams({ axis: state.axis, problem: state.problem ?? "" });
  if (state.log) shown.set("log", "1");
  for (const method of state.hidden) shown.append("hide", method);
  history.replaceState(null, "", `#${shown}`);
}

function change(update) {
  update();
  writeAddress();
  drawMethodPlots();
}

// --- one plot -----------------------------------------------------------------------------------

// Note [scales]: an axis is {label, log, low, high}; low and high, where given, widen the range.
// Points that a logarithmic axis cannot hold (zero, negative, not finite) are left out.
const fits = (value, axis) =>
  value !== null && Number.isFinite(value) && (!axis.log || value > 0);

function makeScale(values, axis, from, to) {
  const all = [...values, axis.low, axis.high].filter((v) => v !== undefined);
  let low = Math.min(...all), high = Math.max(...all);
  if (low === high) [low, high] = axis.log ? [low / 2, high * 2] : [low - 0.5, high + 0.5];
  const measure = axis.log ? Math.log10 : (v) => v;
  const place = (v) =>
    from + ((measure(v) - measure(low)) / (measure(high) - measure(low))) * (to - from);
  return { place, ticks: axis.log ? logTicks(low, high) : linearTicks(low, high) };
}

function linearTicks(low, high) {
  const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function logTicks(low, high) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const stride = Math.ceil((last - first) / 10);
  const parts = Math.log10(high / low) < 2.5 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let e = first; e <= last; e += stride) ticks.push(...parts.map((p) => Number(`${p}e${e}`)));
  return ticks.filter((t) => t >= low * (1 - 1e-9) && t <= high * (1 + 1e-9));
}

// Draw series of {name, attributes, points: [{x, y, text}]}; stepped: constant up to the next x.
function plot(holder, { title, series, x, y, stepped, dots, labelled, width = 590, height = 370 }) {
  const kept = series
    .map((s) => ({ ...s, points: s.points.filter((p) => fits(p.x, x) && fits(p.y, y)) }))
    .filter((s) => s.points.length);
  if (!kept.length) return holder.replaceChildren(html("p", {}, `${title}: nothing to show`));
  const edge = { left: 66, right: labelled ? 84 : 16, top: 34, bottom: 48 };
  const [right, bottom] = [width - edge.right, height - edge.bottom];
  const every = kept.flatMap((s) => s.points);
  const across = makeScale(every.map((p) => p.x), x, edge.left, right);
  const up = makeScale(every.map((p) => p.y), y, bottom, edge.top);

  const middle = (edge.top + bottom) / 2;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img",
    "aria-label": `${title}: ${y.label} over ${x.label}. Arrow keys read the points.` });
  for (const t of across.ticks) picture.append(
    svg("path", { class: "grid", d: `M${across.place(t)} ${edge.top}V${bottom}` }),
    svg("text", { x: across.place(t), y: bottom + 18, "text-anchor": "middle" }, tickText(t)));
  for (const t of up.ticks) picture.append(
    svg("path", { class: "grid", d: `M${edge.left} ${up.place(t)}H${right}` }),
    svg("text", { x: edge.left - 8, y: up.place(t) + 4, "text-anchor": "end" }, tickText(t)));
  picture.append(
    svg("path", { class: "axis", fill: "none", d: `M${edge.left} ${edge.top}V${bottom}H${right}` }),
    svg("text", { class: "title", x: edge.left, y: 20 }, title),
    svg("text", { class: "x-label", x: (edge.left + right) / 2, y: height - 10, "text-anchor": "middle" }, x.label),
    svg("text", { class: "y-label", "text-anchor": "middle", transform: `translate(16 ${middle}) rotate(-90)` }, y.label));

  for (const s of kept) {
    s.places = s.points.map((p) => [across.place(p.x), up.place(p.y)]);
    const corner = ([px, py]) => `${px.toFixed(1)} ${py.toFixed(1)}`;
    const path = s.places.map((q, i) => (stepped && i ? `H${q[0].toFixed(1)}L` : i ? "L" : "M") + corner(q)).join("")
      + (stepped ? `H${right}` : "");
    picture.append(svg("path", { class: "curve", d: path, "data-series": s.name, "data-points": s.points.length, ...s.attributes }));
    if (dots) picture.append(...s.places.map(([cx, cy]) => svg("circle", { class: "dot", cx, cy, r: 4 })));
    const [ex, ey] = s.places.at(-1);
    if (labelled) picture.append(svg("text", { x: ex + 9, y: ey + 4 }, s.name));
  }
  const tip = html("div", { class: "tip", role: "status", hidden: "" });
  picture.append(svg("circle", { class: "cursor", r: 5, visibility: "hidden" }));
  holder.replaceChildren(picture, tip);
  makeReadable(holder, picture, tip, kept, [width, height]);
}

// Let pointer and arrow keys read single points of a plot.
function makeReadable(holder, picture, tip, series, [width, height]) {
  const cursor = picture.querySelector(".cursor");
  let at = [0, -1];
  function show(s, i) {
    at = [s, i];
    const [px, py] = series[s].places[i], style = series[s].attributes?.style ?? "";
    for (const [name, value] of [["cx", px], ["cy", py], ["style", style], ["visibility", "visible"]])
      cursor.setAttribute(name, value);
    tip.textContent = series[s].points[i].text;
    const [fx, fy] = [px / width, py / height];
    tip.style = `${style}; ${fx > 0.6 ? `right: ${102 - 100 * fx}%` : `left: ${100 * fx + 2}%`}; `
      + (fy > 0.6 ? `bottom: ${102 - 100 * fy}%` : `top: ${100 * fy + 2}%`);
    tip.hidden = false;
  }
  function hide() {
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  }
  picture.onpointermove = (event) => {
    const box = picture.getBoundingClientRect();
    const [px, py] = [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
    let best = [40, -1, -1]; // nothing is shown further than this from a point
    series.forEach((s, si) => s.places.forEach(([x, y], i) => {
      const distance = Math.hypot(x - px, y - py);
      if (distance < best[0]) best = [distance, si, i];
    }));
    if (best[1] < 0) hide();
    else show(best[1], best[2]);
  };
  picture.onpointerleave = picture.onblur = hide;
  picture.onkeydown = (event) => {
    const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Escape") hide();
    if (!move) return;
    event.preventDefault();
    const s = (at[0] + move[0] + series.length) % series.length;
    show(s, Math.max(0, Math.min(series[s].points.length - 1, at[1] + move[1])));
  };
}

// --- the plots of this page ---------------------------------------------------------------------

function drawMethodPlots() {
  for (const button of document.querySelectorAll(".methods button"))
    button.setAttribute("aria-pressed", !state.hidden.has(button.dataset.method));
  for (const input of document.querySelectorAll("[name=axis]")) input.checked = input.value === state.axis;
  byId("log").checked = state.log;
  byId("problem").value = state.problem ?? "";
  const visible = (method) => !state.hidden.has(method);

  const timed = state.axis === "time";
  const curves = record.curves.filter((c) => c.problem === state.problem && visible(c.method));
  plot(byId("plot-convergence"), {
    title: state.problem ?? "convergence", width: 1200, height: 460,
    x: { label: timed ? "time (ms)" : "iterations", log: state.log, low: state.log ? undefined : 0 },
    y: { label: "relative residual", log: true },
    series: curves.map((c) => ({
      name: c.method, attributes: look(c.method),
      points: c.residual.map((residual, i) => ({
        x: (timed ? c.milliseconds : c.steps)[i], y: residual,
        text: `${c.method}\niteration ${c.steps[i]}, ${number(c.milliseconds[i])} ms\nresidual ${number(residual)}`,
      })),
    })),
  });

  const pair = byId("plot-profiles");
  const widest = Math.max(2, ...Object.values(profiles).flatMap((p) => Object.values(p.methods).flat().map((c) => c[0])));
  pair.replaceChildren(...Object.entries(profiles).map(([direction, { cells, methods }]) => {
    const holder = html("div", { class: "plot", "data-direction": direction });
    plot(holder, {
      title: `${direction}, ${cells} cells`, stepped: true,
      x: { label: "τ (time ÷ fastest time in the cell)", log: true, low: 1, high: widest },
      y: { label: "share of cells solved within τ", low: 0, high: 1 },
      series: Object.entries(methods).filter(([method]) => visible(method)).map(([method, corners]) => ({
        name: method, attributes: look(method),
        points: corners.map(([tau, share]) => ({
          x: tau, y: share, text: `${method}\n${(100 * share).toFixed(0)} % of cells within ${number(tau)} ×`,
        })),
      })),
    });
    return holder;
  }));
  if (!record.cells.length) pair.append(html("p", {}, "no cells measured"));
}

function drawScaling() {
  const exponent = (value) => (value === null || value === undefined ? "not measured" : value.toFixed(2));
  byId("slopes").textContent =
    `Time of a solve on doubly logarithmic axes. Fitted slope over n: ${exponent(scaling.slope_n)}; `
    + `over the batch: ${exponent(scaling.slope_batch)}. A slope of p means seconds ∝ size^p.`;
  for (const [key, other, label] of [["n", "batch", "n (units)"], ["batch", "n", "batch (samples)"]]) {
    const series = unique(scaling.points.map((p) => p[other])).sort((a, b) => a - b).map((value) => ({
      name: `${other} ${value}`,
      points: scaling.points.filter((p) => p[other] === value).sort((a, b) => a[key] - b[key]).map((p) => ({
        x: p[key], y: p.seconds, text: `n ${p.n}, batch ${p.batch}\n${number(1e3 * p.seconds)} ms`,
      })),
    }));
    plot(byId(`plot-${key}`), {
      title: `over ${key}, slope ${exponent(scaling[`slope_${key}`])}`, dots: true, labelled: true,
      series: series.filter((s) => s.points.length > 1),
      x: { label, log: true }, y: { label: "seconds", log: true },
    });
  }
}

// --- headline, failures, cells, provenance ------------------------------------------------------

function fillFigures() {
  for (const holder of document.querySelectorAll("[data-figure]")) {
    const name = holder.dataset.figure, value = figures[name] ?? null, unit = holder.dataset.unit ?? "";
    const shown = (v) => (unit ? `${number(v)} ${unit}` : number(v));
    const counts = ["failures", "bound_violations"].includes(name);
    holder.classList.toggle("unmeasured", value === null);
    holder.classList.toggle("bad", value !== null && counts && value !== 0);
    if (value === null) holder.textContent = "not measured";
    else if (typeof value !== "object") holder.textContent = shown(value);
    else holder.replaceChildren(...Object.entries(value).map(([n, v]) =>
      html("span", {}, `${shown(v)} `, html("small", {}, `n ${n}`))));
  }
  byId("subtitle").textContent =
    `Seed ${number(record.seed)}, commit ${record.commit}, ${record.date}`
    + (record.quick ? ". A quick run: a subset of the cells." : ".");
}

const cellName = (cell) =>
  `${cell.problem}, n ${number(cell.n)}, batch ${number(cell.batch)}, ${cell.dtype}, `
  + `tol ${number(cell.tol)}, threads ${number(cell.threads)}, ${cell.direction}`;

function fillFailures() {
  const rows = METHODS.map((method) => {
    const runs = record.cells.flatMap((cell) =>
      cell.results.filter((r) => r.method === method).map((result) => ({ cell, result })));
    return { method, runs, failed: runs.filter(({ result }) => !solved(result)) };
  }).sort((a, b) => b.failed.length - a.failed.length);
  byId("failure-rows").append(...rows.map(({ method, runs, failed }) => {
    const items = failed.map(({ cell, result }) =>
      html("li", {}, `${cellName(cell)}: `, html("span", { class: "failed" }, number(result.status))));
    const list = html("ul", {}, ...items);
    const folded = html("details", {}, html("summary", {}, `${items.length} cells`), list);
    return html("tr", { "data-method": method },
      html("td", {}, swatch(method), method),
      html("td", { class: `number${failed.length ? " failed" : ""}` }, String(failed.length)),
      html("td", { class: "number" }, String(runs.length)),
      html("td", {}, items.length > 4 ? folded : items.length ? list : "none"));
  }));
}

const COLUMNS = [ // key, heading, numeric
  ["problem", "problem"], ["family", "family"], ["n", "n", true], ["batch", "batch", true],
  ["m", "m", true], ["skew", "skew", true], ["threads", "threads", true], ["tol", "tol", true],
  ["dtype", "dtype"], ["direction", "direction"], ["method", "method"],
  ["milliseconds", "time (ms)", true], ["relative", "÷ fastest", true],
  ["products", "÷ product", true], ["steps", "steps", true], ["status", "status"],
  ["residual", "residual", true], ["detail", "detail"],
];

function makeCells() {
  const rows = record.cells.flatMap((cell) => {
    const fastest = Math.min(...cell.results.filter(solved).map((r) => r.seconds));
    return cell.results.map((result) => {
      const seconds = solved(result) ? result.seconds : null;
      const row = { ...cell, ...result, failed: seconds === null,
        milliseconds: seconds && 1e3 * seconds, relative: seconds && seconds / fastest,
        products: seconds && cell.product_seconds ? seconds / cell.product_seconds : null };
      row.text = COLUMNS.map(([key]) => number(row[key])).join(" ").toLowerCase();
      return row;
    });
  });
  const order = { key: null, sign: 1 };
  const heads = COLUMNS.map(([key, heading, numeric]) => {
    const button = html("button", { type: "button" }, heading);
    button.onclick = () => {
      order.sign = order.key === key ? -order.sign : 1;
      order.key = key;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order.sign > 0 ? "ascending" : "descending");
      draw();
    };
    const head = html("th", { scope: "col", class: numeric ? "number" : "" }, button);
    return head;
  });
  function compare(a, b) { // what is missing stands last in both orders
    const [p, q] = [a[order.key] ?? null, b[order.key] ?? null];
    if (p === null || q === null) return (p === null) - (q === null);
    return order.sign * (typeof p === "number" && typeof q === "number" ? p - q : String(p).localeCompare(q));
  }
  function draw() {
    const words = byId("words").value.toLowerCase().split(/\s+/);
    const [method, direction] = [byId("method").value, byId("direction").value];
    const kept = rows.filter((row) => (!method || row.method === method)
      && (!direction || row.direction === direction) && (!byId("failed").checked || row.failed)
      && words.every((word) => row.text.includes(word)));
    if (order.key) kept.sort(compare);
    byId("cell-rows").replaceChildren(...kept.map((row) => html("tr", {}, ...COLUMNS.map(([key, , numeric]) =>
      html("td", { class: `${numeric ? "number" : ""}${key === "status" && row.failed ? "failed" : ""}` },
        key === "method" ? swatch(row.method) : null, number(row[key]))))));
    byId("count").textContent = `${kept.length} of ${rows.length} results`;
  }
  const choose = (id, all, values) => byId(id).append(
    html("option", { value: "" }, all), ...unique(values).map((v) => html("option", { value: v }, v)));
  choose("method", "all", METHODS);
  choose("direction", "all", record.cells.map((cell) => cell.direction));
  byId("cell-heads").append(...heads);
  for (const id of ["words", "method", "direction", "failed"]) byId(id).oninput = draw;
  draw();
}

function fillFacts() {
  const facts = { seed: record.seed, commit: record.commit, date: record.date,
    extent: record.quick ? "quick run" : "full run", ...record.environment };
  byId("facts").append(...Object.entries(facts).flatMap(([name, value]) =>
    [html("dt", {}, name.replaceAll("_", " ")), html("dd", {}, number(value))]));
}

// --- begin --------------------------------------------------------------------------------------

byId("problem").append(...problems.map((problem) => html("option", { value: problem }, problem)));
byId("problem").onchange = (event) => change(() => (state.problem = event.target.value));
byId("log").onchange = (event) => change(() => (state.log = event.target.checked));
for (const input of document.querySelectorAll("[name=axis]"))
  input.onchange = () => change(() => (state.axis = input.value));
for (const group of document.querySelectorAll(".methods"))
  group.append(...METHODS.map((method) => {
    const button = html("button", { type: "button", "data-method": method }, swatch(method), method);
    button.onclick = () => change(() => state.hidden.delete(method) || state.hidden.add(method));
    return button;
  }));
window.onhashchange = () => {
  readAddress();
  drawMethodPlots();
};
readAddress();
drawMethodPlots();
drawScaling();
fillFigures();
fillFailures();
makeCells();
fillFacts();
