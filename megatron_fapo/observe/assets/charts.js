"use strict";
/* Curves: hand-drawn SVG. Text enters as text nodes only. */
(() => {
  const data = JSON.parse(document.getElementById("curves-data").textContent);
  const NS = "http://www.w3.org/2000/svg";
  const LONGEST = 16; // characters of an arm's name beside its line
  const brief = (name) => (name.length > LONGEST ? name.slice(0, LONGEST - 1) + "…" : name);
  const names = data.flatMap((panel) => (panel.arms ?? []).map((arm) => brief(arm.name).length));
  const MARGIN = { top: 12, right: Math.max(50, 14 + 7.2 * Math.max(0, ...names)), bottom: 24, left: 48 };

  function svg(tag, attributes = {}, text = "") {
    const made = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text) made.textContent = text;
    return made;
  }

  function html(tag, className, text = "") {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text) made.textContent = text;
    return made;
  }

  function format(panel, value, digits = 1) {
    if (panel.share) return (100 * value).toFixed(digits) + " %";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(1);
    return (value || 0).toLocaleString("en", { maximumSignificantDigits: 3 });
  }

  /* About four round numbers inside [low, high]; whole powers of ten on a logarithmic scale. */
  function ticks(low, high, log) {
    if (log) {
      const first = Math.ceil(low), last = Math.floor(high);
      return first < last ? Array.from({ length: last - first + 1 }, (_, i) => first + i) : [low, high];
    }
    const raw = (high - low) / 4, power = 10 ** Math.floor(Math.log10(raw));
    const size = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw) * power;
    const found = [];
    for (let at = Math.ceil(low / size - 1e-9); at * size <= high + size * 1e-9; at++) found.push(at * size);
    return found;
  }

  function domain(panel, values) {
    let low = Math.min(...values), high = Math.max(...values);
    if (panel.share && low < 0.5) low = 0;
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    return [panel.share && low === 0 ? 0 : low - room, panel.share ? Math.min(1, high + room) : high + room];
  }

  /* Areas that fill the whole: each lies on those before it. */
  function drawStack(canvas, panel, scale) {
    const at = panel.stack.map((layer) => new Map(layer.mean));
    const steps = panel.stack[0].mean.map((point) => point[0]).filter((step) => at.every((layer) => layer.has(step)));
    let below = steps.map(() => 0);
    panel.stack.forEach((layer, i) => {
      const above = steps.map((step, k) => below[k] + at[i].get(step));
      const edge = (values, order) => order.map((k) => `${scale.x(steps[k]).toFixed(1)} ${scale.y(Math.min(values[k], 1)).toFixed(1)}`);
      const forth = steps.map((_, k) => k), back = [...forth].reverse();
      canvas.append(svg("path", { class: `area ${layer.colour}`, d: `M${[...edge(above, forth), ...edge(below, back)].join("L")}Z` }));
      const last = steps.length - 1, middle = (above[last] + below[last]) / 2;
      if (above[last] - below[last] > 0.13) {
        canvas.append(svg("text", { class: "class", x: scale.x(steps[last]) - 6, y: scale.y(middle) + 4, "text-anchor": "end" }, layer.name));
      }
      below = above;
    });
  }

  function scales(panel, width, height) {
    const onAxis = (value) => (panel.log ? Math.log10(Math.max(value, 1e-12)) : value);
    const lines = panel.stack ? panel.stack.map((layer) => layer.mean) : panel.arms.flatMap((arm) => arm.lines);
    const steps = lines.flatMap((line) => line.map((point) => point[0]));
    const [low, high] = panel.stack ? [0, 1] : domain(panel, lines.flatMap((line) => line.map((point) => onAxis(point[1]))));
    const first = Math.min(...steps), last = Math.max(...steps);
    const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
    return {
      first, last, low, high,
      x: (step) => MARGIN.left + (last > first ? ((step - first) / (last - first)) * inner.width : inner.width / 2),
      axisY: (value) => MARGIN.top + (1 - (value - low) / (high - low)) * inner.height,
      y(value) { return this.axisY(onAxis(value)); },
      step: (x) => first + ((x - MARGIN.left) / inner.width) * (last - first),
    };
  }

  function drawAxes(canvas, panel, scale, width, height) {
    const values = ticks(scale.low, scale.high, panel.log);
    const digits = panel.share && values.length > 1 && values[1] - values[0] < 0.0099 ? 1 : 0;
    for (const value of values) {
      const y = scale.axisY(value);
      canvas.append(svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }));
      const words = format(panel, panel.log ? 10 ** value : value, digits);
      canvas.append(svg("text", { x: MARGIN.left - 7, y: y + 4, "text-anchor": "end" }, words));
    }
    const whole = ticks(scale.first, Math.max(scale.last, scale.first + 1), false).filter(Number.isInteger);
    for (const step of whole) {
      if (step > scale.last) continue;
      canvas.append(svg("text", { x: scale.x(step), y: height - 6, "text-anchor": "middle" }, String(step)));
    }
    canvas.append(svg("text", { x: width - 4, y: height - 6, "text-anchor": "end" }, "step"));
  }

  function drawLines(canvas, panel, scale) {
    const path = (line) => line.map(([s, v], i) => `${i ? "L" : "M"}${scale.x(s).toFixed(1)} ${scale.y(v).toFixed(1)}`).join("");
    const names = [];
    for (const arm of [...panel.arms].reverse()) {
      const layer = svg("g", { class: arm.colour });
      for (const line of arm.lines) layer.append(svg("path", { class: "line", d: path(line) }));
      layer.append(svg("path", { class: "bold", d: path(arm.mean) }));
      const [step, value] = arm.mean[arm.mean.length - 1];
      if (arm.mean.length < 3) layer.append(svg("circle", { class: "dot", cx: scale.x(step), cy: scale.y(value), r: 4 }));
      names.push({ arm, layer, x: scale.x(step) + 7, y: scale.y(value) + 4 });
      canvas.append(layer);
    }
    names.sort((a, b) => a.y - b.y);
    for (let i = 1; i < names.length; i++) names[i].y = Math.max(names[i].y, names[i - 1].y + 14);
    const lowest = scale.axisY(scale.low) + 4, last = names.length - 1;
    if (last >= 0) names[last].y = Math.min(names[last].y, lowest);
    for (let i = last - 1; i >= 0; i--) names[i].y = Math.min(names[i].y, names[i + 1].y - 14);
    for (const { arm, layer, x, y } of names) layer.append(svg("text", { class: "arm", x, y }, brief(arm.name)));
  }

  function nearest(line, step) {
    return line.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
  }

  /* The cross hair: by pointer, or by arrow keys when the chart has the focus. */
  function addReading(canvas, readout, panel, scale, height) {
    const cross = svg("line", { class: "cross", y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" });
    canvas.append(cross);
    const shown = panel.stack ?? panel.arms;
    const steps = [...new Set(shown.flatMap((arm) => arm.mean.map((point) => point[0])))].sort((a, b) => a - b);
    let at = steps.length - 1;
    const show = (index) => {
      at = Math.max(0, Math.min(steps.length - 1, index));
      cross.setAttribute("x1", scale.x(steps[at]));
      cross.setAttribute("x2", scale.x(steps[at]));
      cross.setAttribute("visibility", "visible");
      readout.replaceChildren(`step ${steps[at]}: `);
      shown.forEach((arm, i) => {
        const name = html("b", arm.colour, arm.name);
        readout.append(i ? " · " : "", name, " " + format(panel, nearest(arm.mean, steps[at])[1]));
      });
    };
    canvas.addEventListener("pointermove", (event) => {
      const step = scale.step(event.clientX - canvas.getBoundingClientRect().left);
      show(steps.indexOf(nearest(steps.map((s) => [s]), step)[0]));
    });
    canvas.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 };
      if (event.key in moves) { event.preventDefault(); show(moves[event.key]); }
    });
    canvas.addEventListener("focus", () => show(at));
    for (const leave of ["pointerleave", "blur"]) {
      canvas.addEventListener(leave, () => { cross.setAttribute("visibility", "hidden"); readout.replaceChildren(); });
    }
  }

  function spoken(panel) {
    const ends = (panel.stack ?? panel.arms).map((arm) => `${arm.name} from ${format(panel, arm.mean[0][1])} to ${format(panel, arm.mean[arm.mean.length - 1][1])}`);
    return `${panel.title}: ${ends.join("; ")}. Arrow keys read single steps.`;
  }

  function draw(panel, figure, tall) {
    figure.querySelector("svg")?.remove();
    const readout = figure.querySelector(".readout");
    const width = Math.max(figure.clientWidth - 34, 200), height = !tall ? 190 : window.innerWidth > 760 ? 390 : 260;
    const canvas = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: 0, "aria-label": spoken(panel) });
    const scale = scales(panel, width, height);
    drawAxes(canvas, panel, scale, width, height);
    (panel.stack ? drawStack : drawLines)(canvas, panel, scale);
    addReading(canvas, readout, panel, scale, height);
    figure.insertBefore(canvas, readout);
  }

  function chart(panel, tall) {
    const figure = html("figure", "chart");
    figure.dataset.metric = panel.metric;
    const caption = html("figcaption");
    caption.append(html("b", "", panel.title));
    const readout = html("p", "readout");
    readout.setAttribute("aria-live", "polite");
    figure.append(caption, readout, html("p", "about", panel.about));
    return { panel, figure, tall };
  }

  const charts = data.map((panel, i) => chart(panel, i === 0));
  const topics = new Map();
  charts.forEach(({ panel, figure }, i) => {
    if (i === 0) { document.getElementById("first-chart").append(figure); return; }
    if (!topics.has(panel.topic)) {
      const fold = html("details", "topic"), grid = html("div", "charts");
      fold.append(html("summary", "", panel.topic), grid);
      fold.open = window.innerWidth > 760 || topics.size === 0;
      fold.addEventListener("toggle", () => { if (fold.open) drawAll(); });
      topics.set(panel.topic, grid);
      document.getElementById("charts").append(fold);
    }
    topics.get(panel.topic).append(figure);
  });
  const drawAll = () => charts.forEach(({ panel, figure, tall }) => { if (figure.clientWidth) draw(panel, figure, tall); });
  drawAll();
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) { width = window.innerWidth; drawAll(); }
  });
})();
