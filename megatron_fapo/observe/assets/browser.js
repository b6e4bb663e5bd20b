/* The rollout browser. Text of models enters as text nodes only. */
(() => {
  const runs = JSON.parse(document.getElementById("rollouts-data").textContent);
  const root = document.getElementById("browser");
  const LONG = 900; // characters from which a rollout takes the whole width and is folded

  const isFlagged = (r) => r.right && r.verdict === "flawed";
  const isFlawed = (r) => r.right && r.oracle !== null && r.oracle !== -1;
  const isClean = (r) => r.right && !isFlagged(r) && !isFlawed(r) && (r.verdict === "clean" || r.oracle === -1);
  const differ = (r) => r.right && r.judge !== null && r.oracle !== null && (r.judge === -1) !== (r.oracle === -1);
  const FILTERS = [
    ["all", "All", () => true],
    ["flagged", "⚑ Flagged by the judge", isFlagged],
    ["flawed", "◆ Flawed by the oracle", isFlawed],
    ["differ", "≠ Judge and oracle differ", differ],
    ["wrong", "✗ Wrong", (r) => !r.right],
    ["clean", "✓ Clean", isClean],
    ["failed", "Verdict failed", (r) => r.verdict === "failed"],
    ["cut", "Cut off", (r) => r.finish === "length"],
  ];
  const state = { run: 0, step: 0, filter: "all", search: "" };
  const HASH = "#rollouts?";

  /* What is shown stands in the address, so that a view can be sent to somebody and survives loading again. */
  function remember() {
    const step = runs[state.run].steps[state.step].step;
    const words = new URLSearchParams({ run: runs[state.run].label, step, filter: state.filter, search: state.search });
    history.replaceState(null, "", HASH + words);
  }

  function recall() {
    if (!location.hash.startsWith(HASH)) return false;
    const words = new URLSearchParams(location.hash.slice(HASH.length));
    const run = runs.findIndex((one) => one.label === words.get("run"));
    if (run < 0) return false;
    const step = runs[run].steps.findIndex((one) => String(one.step) === words.get("step"));
    state.run = run;
    state.step = step < 0 ? runs[run].steps.length - 1 : step;
    state.filter = FILTERS.some(([name]) => name === words.get("filter")) ? words.get("filter") : "all";
    state.search = words.get("search") ?? "";
    view.run.value = state.run;
    view.search.value = state.search;
    return true;
  }

  function make(tag, { className = "", text = "", ...attributes } = {}, ...children) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  const signed = (value) => (value === null ? "–" : (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(2));

  function chips(r) {
    const found = [make("span", { className: `chip ${r.right ? "right" : "wrong"}`, text: r.right ? "✓ right" : "✗ wrong" })];
    if (!r.right) return found;
    const judge = {
      clean: "judge: clean", flawed: `⚑ judge: step ${r.judge}`, failed: `judge failed: ${r.verdictWhy}`,
      skipped: "judge not asked: changes nothing", off: "no judge",
    }[r.verdict];
    found.push(make("span", { className: r.verdict === "flawed" ? "chip judge" : "chip", text: judge }));
    if (r.probe !== null) found.push(make("span", { className: "chip", text: r.probe === -1 ? "probe: clean" : `probe: step ${r.probe}` }));
    if (r.oracle !== null) {
      found.push(make("span", { className: r.oracle === -1 ? "chip" : "chip oracle", text: r.oracle === -1 ? "oracle: clean" : `◆ oracle: step ${r.oracle}` }));
    }
    return found;
  }

  function paragraphs(r) {
    const list = make("ol", { className: "steps" });
    r.paragraphs.forEach((words, index) => {
      const byJudge = isFlagged(r) && r.judge === index, byOracle = isFlawed(r) && r.oracle === index;
      const item = make("li", { className: `${byJudge ? "by-judge" : ""} ${byOracle ? "by-oracle" : ""}`.trim(), "data-index": index },
        make("span", { className: "index", text: String(index) }), make("span", { className: "words", text: words }));
      if (byJudge || byOracle) {
        const marks = make("span", { className: "marks", text: "first wrong step " });
        if (byJudge) marks.append(make("span", { className: "chip judge", text: "⚑ judge" }));
        if (byOracle) marks.append(make("span", { className: "chip oracle", text: "◆ oracle" }));
        item.append(marks);
      }
      list.append(item);
    });
    return list;
  }

  function rollout(r, long) {
    const facts = make("p", { className: "facts" });
    for (const [name, value] of [["answer", r.answer ?? "none"], ["reward", signed(r.reward)], ["advantage", signed(r.advantage)]]) {
      facts.append(make("span", {}, `${name} `, make("b", { text: value })));
    }
    if (r.reward === null) facts.append(make("span", { text: "group left out of the update" }));
    const length = `${r.tokens} tokens${r.finish === "length" ? ", cut off" : ""}`;
    const card = make("article", { className: `rollout${isFlagged(r) || isFlawed(r) ? " flawed" : ""}`, tabindex: "-1", "aria-label": `Rollout ${r.id}`, "data-id": r.id },
      make("h4", {}, make("span", { text: r.id }), make("span", { text: length })), make("div", { className: "status" }, ...chips(r)));
    const solution = paragraphs(r);
    if (long) {
      const fold = make("details", {}, make("summary", { text: `${r.paragraphs.length} paragraphs` }), solution);
      fold.open = isFlagged(r) || isFlawed(r);
      card.append(fold);
    } else card.append(solution);
    card.append(facts);
    if (r.judgeText) card.append(make("details", {}, make("summary", { text: "The judge's words" }), make("pre", { text: r.judgeText })));
    return card;
  }

  const glyph = (r) => (!r.right ? "✗" : isFlagged(r) ? "⚑" : isFlawed(r) ? "◆" : "✓");

  function group(g, shown) {
    const long = g.rollouts.some((r) => r.paragraphs.join("").length > LONG);
    return make("section", { className: "group", "aria-label": `Prompt ${g.prompt}` },
      make("header", {}, make("h3", { text: g.question }), make("span", { className: "soft", text: `reference answer ${g.reference}` }),
        make("span", { className: "strip", role: "img", text: g.rollouts.map(glyph).join(""), "aria-label": `${g.rollouts.filter((r) => r.right).length} of ${g.rollouts.length} right` }),
        make("small", { text: g.prompt })),
      make("div", { className: long ? "rollouts long" : "rollouts" }, ...shown.map((r) => rollout(r, long))));
  }

  function matches(g, r) {
    const words = state.search.toLowerCase();
    return !words || [g.question, r.id, r.answer ?? "", r.judgeText ?? "", ...r.paragraphs].some((text) => text.toLowerCase().includes(words));
  }

  function show() {
    const step = runs[state.run].steps[state.step];
    const test = FILTERS.find(([name]) => name === state.filter)[2];
    const all = step.groups.flatMap((g) => g.rollouts);
    let count = 0;
    const cards = [];
    for (const g of step.groups) {
      const shown = g.rollouts.filter((r) => test(r) && matches(g, r));
      count += shown.length;
      if (shown.length) cards.push(group(g, shown));
    }
    const left = step.total - step.groups.length;
    view.count.textContent = `${count} of ${all.length} rollouts shown. This page holds ${step.groups.length} of the step's ${step.total} groups` +
      (left ? `, those with a flawed right answer first; ${left} are left out.` : ".");
    view.list.replaceChildren(...cards);
    view.filters.forEach((button, i) => {
      button.setAttribute("aria-pressed", FILTERS[i][0] === state.filter);
      button.querySelector("small").textContent = all.filter(FILTERS[i][2]).length;
    });
    view.steps.replaceChildren(...runs[state.run].steps.map((s, i) => {
      const button = make("button", { type: "button", text: String(s.step), "aria-pressed": i === state.step, "data-step": s.step });
      button.addEventListener("click", () => { state.step = i; remember(); show(); view.steps.children[i].focus(); });
      return button;
    }));
  }

  function walk(by) {
    const cards = [...view.list.querySelectorAll(".rollout")];
    const at = cards.indexOf(document.activeElement.closest?.(".rollout"));
    const next = cards[Math.max(0, Math.min(cards.length - 1, at + by))];
    if (next) { next.focus(); next.scrollIntoView({ block: "center" }); }
  }

  function keys(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
    if (event.key === "/") { event.preventDefault(); view.search.focus(); }
    if (event.key === "j") walk(1);
    if (event.key === "k") walk(-1);
  }

  if (!runs.length) {
    root.append(make("p", { className: "soft", text: "The runs kept no rollouts (observe.rollouts)." }));
    return;
  }
  const view = {
    run: make("select", { id: "run" }, ...runs.map((run, i) => make("option", { value: i, text: run.label }))),
    steps: make("div", { className: "row", id: "steps" }),
    filters: FILTERS.map(([name, words]) => make("button", { type: "button", "data-filter": name }, words, make("small"))),
    search: make("input", { type: "search", id: "search", placeholder: "text, id or answer" }),
    count: make("p", { className: "count", role: "status" }),
    list: make("div"),
  };
  view.run.addEventListener("change", () => { state.run = Number(view.run.value); state.step = Math.min(state.step, runs[state.run].steps.length - 1); remember(); show(); });
  view.search.addEventListener("input", () => { state.search = view.search.value; remember(); show(); });
  view.filters.forEach((button, i) => button.addEventListener("click", () => { state.filter = FILTERS[i][0]; remember(); show(); }));
  document.addEventListener("keydown", keys);
  root.append(
    make("div", { className: "tools" }, make("label", { text: "Run" }, view.run),
      make("fieldset", {}, make("legend", { text: "Step" }), view.steps),
      make("label", { text: "Search (key /)" }, view.search),
      make("fieldset", {}, make("legend", { text: "Show (keys j and k walk through the rollouts)" }), make("div", { className: "row" }, ...view.filters))),
    view.count, view.list);
  state.step = runs[0].steps.length - 1;
  const asked = recall();
  show();
  const reloaded = performance.getEntriesByType("navigation")[0]?.type === "reload";
  if (asked && !reloaded) document.getElementById("rollouts").scrollIntoView();
  window.addEventListener("hashchange", () => { if (recall()) show(); });
})();
