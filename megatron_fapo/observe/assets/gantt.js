/* Phases of single steps on a time axis: a row each, as many steps as fit the chosen window. */
(() => {
  const runs = JSON.parse(document.getElementById("gantt-data").textContent);
  const root = document.getElementById("gantt");
  if (!runs.length) return;
  const NS = "http://www.w3.org/2000/svg";
  const ROWS = ["publish", "evaluate", "generate", "judge", "judge_exposed", "update"];
  const NAMES = { judge_exposed: "judge, not hidden" };
  const COLOURS = { publish: "p0", generate: "p1", judge: "p2", judge_exposed: "p2", update: "p3", evaluate: "p4" };
  const state = { run: 0, first: 0, steps: 3 };

  function make(space, tag, attributes = {}, text = "", ...children) {
    const made = space ? document.createElementNS(NS, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text) made.textContent = text;
    made.append(...children);
    return made;
  }
  const html = (tag, attributes, text, ...children) => make(false, tag, attributes, text, ...children);
  const svg = (tag, attributes, text) => make(true, tag, attributes, text);
  const seconds = (value) => (value >= 100 ? value.toFixed(0) : value >= 1 ? value.toFixed(1) : value.toFixed(2)) + " s";
  const sum = (step, name) => step.spans.filter((span) => span[0] === name).reduce((all, [, a, b]) => all + b - a, 0);

  function size(span) {
    const raw = span / 5, power = 10 ** Math.floor(Math.log10(raw));
    return [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  }

  function draw() {
    const all = runs[state.run].steps;
    state.first = Math.max(0, Math.min(all.length - state.steps, state.first));
    const shown = all.slice(state.first, state.first + state.steps);
    const used = ROWS.filter((name) => shown.some((step) => sum(step, name) > 0));
    const begin = shown[0].start, end = Math.max(...shown.map((step) => step.start + step.seconds));
    const narrow = root.clientWidth < 560, left = narrow ? 8 : 124, row = narrow ? 40 : 30, top = 22;
    const width = Math.max(root.clientWidth - 34, 240), height = top + used.length * row + 22;
    const x = (time) => left + ((time - begin) / Math.max(end - begin, 1e-9)) * (width - left - 12);
    const spoken = shown.map((step) => `step ${step.step} takes ${seconds(step.seconds)}: ` + used.map((name) => `${NAMES[name] ?? name} ${seconds(sum(step, name))}`).join(", "));
    const canvas = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: 0, "aria-label": spoken.join("; ") + ". Arrow keys move through the steps." });
    const tick = size(end - begin);
    for (let at = 0; at <= end - begin; at += tick) {
      canvas.append(svg("line", { class: "grid", x1: x(begin + at), x2: x(begin + at), y1: top, y2: height - 20 }));
      canvas.append(svg("text", { x: x(begin + at), y: height - 6, "text-anchor": at ? "middle" : "start" }, at ? seconds(at) : "0"));
    }
    shown.forEach((step, i) => {
      if (i) canvas.append(svg("line", { class: "cross", x1: x(step.start), x2: x(step.start), y1: 4, y2: height - 20 }));
      canvas.append(svg("text", { class: "step", x: x(step.start) + 4, y: 15 }, `step ${step.step}`));
    });
    used.forEach((name, i) => {
      const y = top + i * row, bar = narrow ? y + 16 : y + 5;
      canvas.append(svg("text", narrow ? { x: left, y: y + 12 } : { x: left - 10, y: y + 20, "text-anchor": "end" }, NAMES[name] ?? name));
      for (const step of shown) {
        for (const [which, from, to] of step.spans) {
          if (which !== name) continue;
          const block = svg("rect", { class: COLOURS[name], x: x(step.start + from), y: bar, width: Math.max(x(step.start + to) - x(step.start + from), 1), height: 20, rx: 3, "data-name": name });
          block.append(svg("title", {}, `step ${step.step}, ${NAMES[name] ?? name}: ${seconds(to - from)}`));
          canvas.append(block);
        }
      }
    });
    canvas.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: state.first - 1, ArrowRight: state.first + 1, Home: 0, End: all.length };
      if (!(event.key in moves)) return;
      event.preventDefault();
      state.first = moves[event.key];
      draw();
      view.chart.querySelector("svg").focus();
    });
    view.chart.replaceChildren(canvas);
    view.where.textContent = shown.length > 1 ? `steps ${shown[0].step} to ${shown.at(-1).step}` : `step ${shown[0].step}`;
    view.back.disabled = state.first === 0;
    view.on.disabled = state.first + state.steps >= all.length;
    for (const button of view.sizes) button.setAttribute("aria-pressed", Number(button.dataset.steps) === state.steps);
  }

  function button(text, label, click, attributes = {}) {
    const made = html("button", { type: "button", "aria-label": label, ...attributes }, text);
    made.addEventListener("click", () => { click(); draw(); });
    return made;
  }

  const last = () => { state.first = runs[state.run].steps.length - state.steps; };
  const view = {
    run: html("select", { id: "gantt-run" }, "", ...runs.map((run, i) => html("option", { value: i }, run.label))),
    sizes: [1, 3, 8].map((steps) => button(String(steps), `${steps} at a time`, () => { state.steps = steps; last(); }, { "data-steps": steps })),
    back: button("←", "Earlier steps", () => { state.first -= state.steps; }, { id: "earlier" }),
    on: button("→", "Later steps", () => { state.first += state.steps; }, { id: "later" }),
    where: html("span", { role: "status", class: "soft" }),
    chart: html("div", { class: "gantt" }),
  };
  view.run.addEventListener("change", () => { state.run = Number(view.run.value); last(); draw(); });
  root.append(
    html("h3", {}, "Step by step"),
    html("div", { class: "tools still" }, "", html("label", {}, "Run", view.run),
      html("fieldset", {}, "", html("legend", {}, "Steps at a time"), html("div", { class: "row" }, "", ...view.sizes)),
      html("div", { class: "row" }, "", view.back, view.on, view.where)),
    view.chart);
  last();
  draw();
  let width = window.innerWidth;
  window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; draw(); } });
})();
