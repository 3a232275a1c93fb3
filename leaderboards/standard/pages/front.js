"use strict";
// The board in a browser: TanStack Table sorts, filters and pages the rows, Plot draws the figures, the address keeps the view.
(() => {
  const {el, name, number, range, place, ticks, page, chart} = klbench;
  const data = klbench.taken.get("board");
  const row = klbench.rows(data);
  const board = document.querySelector("table.board");
  const columns = board.dataset.columns.split(" "), against = board.dataset.against.split(" ");
  const form = document.getElementById("filters"), count = document.getElementById("count"), paging = document.getElementById("paging");
  const PAGE = 100, PLACES = 120;
  const OF_TABLE = ["family", "task", "prior", "beta"], OF_ROW = ["method", "status"];
  const HIGH = ["reward", "gold"]; // better high: the first click sorts downwards
  const TRUST = ["exact", "certified", "wide", "lower", "upper", "infeasible", "uncertified"];

  // --- the view, as the address has it ---

  const KEYS = ["family", "task", "method", "prior", "beta", "status", "rows", "q", "sort", "page", "figures"];
  const read = () => {
    const given = location.hash.includes("=") ? new URLSearchParams(location.hash.slice(1)) : new URLSearchParams();
    return Object.fromEntries(KEYS.map((key) => [key, given.get(key) || ""]));
  };
  let view = read();
  const change = (changes, keepPage) => {
    view = {...view, ...(keepPage ? {} : {page: ""}), ...changes};
    const said = new URLSearchParams(KEYS.filter((key) => view[key]).map((key) => [key, view[key]]));
    history.replaceState(null, "", said.size ? `#${said}` : location.pathname + location.search);
    show();
  };

  // --- rows ---

  // Rows to be beaten or to be reached stay beside whatever a filter finds in their table.
  const reference = (i) => !row.methods(i) && !row.later(i) && (row.role(i) === "null" || row.role(i) === "target" || row.method(i).startsWith("best_of_n"));
  const kept = () => {
    const search = view.q.trim().toLowerCase();
    const tables = data.tables.map((t) => OF_TABLE.every((key) => !view[key] || t[key] === view[key]));
    const own = (i) => OF_ROW.every((key) => !view[key] || row[key](i) === view[key])
      && (!search || `${row.label(i)} ${data.tables[row.table(i)].heading}`.toLowerCase().includes(search));
    const wanted = (i) => tables[row.table(i)]
      && (view.rows === "methods" ? row.methods(i) : view.rows === "policies" ? !row.methods(i) : !row.later(i));
    const found = new Uint8Array(row.count), alive = new Set();
    for (let i = 0; i < row.count; i++) if (wanted(i) && own(i)) { found[i] = 1; alive.add(row.table(i)); }
    for (let i = 0; i < row.count; i++) if (!found[i] && alive.has(row.table(i)) && wanted(i) && reference(i)) found[i] = 2;
    return found;
  };

  const some = (x) => (x === null ? undefined : x);
  const KEY = {
    part: (i) => 2 * row.table(i) + (row.methods(i) ? 0 : 1),
    rank: (i) => (row.rank(i) ? row.rank(i)[0] + row.rank(i)[1] / 1e6 : 0),
    label: (i) => row.label(i),
    status: (i) => TRUST.indexOf(row.status(i)),
    ...Object.fromEntries(Object.keys(data.figures).map((key) => [key, (i) => some(row.value(key, i))])),
    ...Object.fromEntries(against.map((key) => [key, (i) => some(row.single(key, i))])),
  };
  const compare = (a, b, id) => {
    const x = a.getValue(id), y = b.getValue(id);
    return x < y ? -1 : x > y ? 1 : 0;
  };
  const table = TableCore.createTable({
    data: Array.from({length: row.count}, (_, i) => i),
    columns: [
      ...Object.entries(KEY).map(([id, accessorFn]) => ({id, accessorFn, sortingFn: compare, sortUndefined: "last"})),
      {id: "kept", accessorFn: (i) => i, filterFn: (r, _, found) => found[r.original] > 0},
    ],
    state: {}, onStateChange: () => {}, renderFallbackValue: null, autoResetPageIndex: false,
    getCoreRowModel: TableCore.getCoreRowModel(), getFilteredRowModel: TableCore.getFilteredRowModel(),
    getSortedRowModel: TableCore.getSortedRowModel(), getPaginationRowModel: TableCore.getPaginationRowModel(),
  });

  const bar = (i, end, marks) => {
    const value = row.value("reverse_kl", i);
    const track = el("span.track", {"aria-hidden": "true"}, marks.map(([, at]) => el("i.tick", {style: `left:${at}%`})));
    if (value === null) return track;
    let low = row.low("reverse_kl", i), high = row.high("reverse_kl", i);
    if ((low === null || high === null) && row.bracket(i)) [low, high] = [row.bracket(i)[0], row.bracket(i)[1] ?? end];
    if (low !== null && high !== null) {
      const left = place(low, end);
      track.append(el("i.line", {style: `left:${left.toFixed(2)}%;width:${(place(high, end) - left).toFixed(2)}%`}));
    }
    track.append(el(value > end ? "i.dot.beyond" : "i.dot", {style: `left:${place(value, end).toFixed(2)}%`}));
    return track;
  };
  const bracket = (i) => {
    const ends = row.bracket(i);
    return !ends ? "" : ends[1] === null ? `at least ${number(ends[0])}` : `in ${number(ends[0])} … ${number(ends[1])}`;
  };
  const UNDER = {target: "the posterior", null: "null", sampler: "sampler"};
  const digits = (x) => (x === null ? "–" : Number.isFinite(x) ? (Math.abs(x) >= 1000 ? x.toFixed(0) : x.toPrecision(3)).replace("-", "−") : "∞");
  const guarded = new Set([...board.querySelectorAll("th[data-column]")].map((th) => th.dataset.column)
    .filter((key) => document.getElementById(`help-${key}`)?.textContent.includes("holds p*")));

  const line = (i, state) => {
    const t = data.tables[row.table(i)], doubt = row.status(i) === "uncertified", rank = row.rank(i);
    const text = row.id(i) ? el("a", {href: page(row.id(i))}, name(row.label(i)))
      : el("a", {href: `#rows=policies&method=${encodeURIComponent(row.method(i))}`, title: "every checkpoint of this method"}, name(row.label(i)));
    const under = row.methods(i) ? `${row.seed(i)} seeds` : UNDER[row.role(i)];
    const pick = row.id(i) ? el("input.pick", {type: "checkbox", value: i, "aria-label": `compare ${row.label(i)} on ${t.title}`}) : null;
    if (pick) pick.checked = picked.includes(i);
    const ends = range(row.low("reverse_kl", i), row.high("reverse_kl", i)) || bracket(i);
    return el(`tr.${row.role(i)}.is-${row.status(i)}${state === 2 ? ".stays" : ""}`, null,
      el("td.rank", null, pick, rank ? (rank[0] === rank[1] ? `${rank[0]}` : `${rank[0]}–${rank[1]}`) : "p*"),
      el("th.name", {scope: "row"}, text, under ? el("small", null, under) : null),
      el("td.figure.main", null, number(row.value("reverse_kl", i)), doubt ? el("span.doubt", null, "?") : null, ends ? el("small", null, ends) : null),
      el("td.axis", null, bar(i, t.top, t.ticks)),
      el("td.word", null, el(`span.status.${row.status(i)}`, {title: row.reason(i) || null}, row.status(i)),
        row.provenance(i) ? el("small", null, row.provenance(i)) : null),
      columns.map((key) => {
        const shaky = doubt && guarded.has(key), ends = range(row.low(key, i), row.high(key, i));
        return el("td.figure", null, shaky ? el("i.doubtful", null, number(row.value(key, i))) : number(row.value(key, i)),
          shaky ? el("span.doubt", null, "?") : null, ends ? el("small", null, ends) : null);
      }),
      against.map((key) => el("td.figure", null, digits(row.single(key, i)), el("span.of", null, ` / ${digits(row.single(`${key}_target`, i))}`))));
  };
  const heading = (i) => {
    const t = data.tables[row.table(i)], two = data.rows.methods.includes(1);
    return el("tr.group", null,
      el("th", {scope: "rowgroup", colspan: 3}, el("span.stay", null, el("b", null, t.title),
        two ? (row.methods(i) ? " · methods, mean over training seeds" : " · checkpoints") : "", el("small", null, t.setting))),
      el("td.axis", null, el("span.ticks", {"aria-hidden": "true"}, t.ticks.map(([text, at]) => el("span", {style: `left:${at}%`}, text)))),
      el("td", {colspan: columns.length + against.length + 1}));
  };

  // --- two picked policies ---

  let picked = [];
  const tray = el("div.tray", {role: "status", hidden: ""});
  document.body.append(tray);
  const offer = () => {
    tray.hidden = !picked.length;
    const said = picked.map((i) => row.label(i)).join(" and ");
    tray.replaceChildren(...(picked.length === 2
      ? [el("span", null, said), el("a", {href: `pages/compare.html#a=${encodeURIComponent(row.id(picked[0]))}&b=${encodeURIComponent(row.id(picked[1]))}`}, "Compare prompt by prompt")]
      : [el("span", null, `${said}: pick another of ${data.tables[row.table(picked[0] ?? 0)].title} to compare`)]));
  };
  board.addEventListener("change", (event) => {
    if (!event.target.matches(".pick")) return;
    const i = Number(event.target.value);
    picked = event.target.checked ? [...picked.filter((j) => row.table(j) === row.table(i)).slice(-1), i] : picked.filter((j) => j !== i);
    for (const box of board.querySelectorAll(".pick")) box.checked = picked.includes(Number(box.value));
    offer();
  });

  // --- what is on the screen ---

  const show = () => {
    const found = kept();
    const [key, down] = [view.sort.replace(/^-/, ""), view.sort.startsWith("-")];
    const state = {
      ...table.initialState, columnFilters: [{id: "kept", value: found}],
      sorting: KEY[key] ? [{id: "part", desc: false}, {id: key, desc: down}] : [],
      pagination: {pageSize: PAGE, pageIndex: Math.max(0, (Number.parseInt(view.page, 10) || 1) - 1)},
    };
    const pages = () => Math.max(1, Math.ceil(table.getFilteredRowModel().rows.length / PAGE));
    table.setOptions((before) => ({...before, state}));
    state.pagination.pageIndex = Math.min(state.pagination.pageIndex, pages() - 1);
    const bodies = [];
    let part = null;
    for (const {original: i} of table.getRowModel().rows) {
      if (KEY.part(i) !== part) { bodies.push(el("tbody", null, heading(i))); part = KEY.part(i); }
      bodies.at(-1).append(line(i, found[i]));
    }
    if (!bodies.length) bodies.push(el("tbody", null, el("tr", null, el("td.none", {colspan: columns.length + against.length + 5}, "Nothing fits these filters."))));
    for (const body of board.querySelectorAll("tbody")) body.remove();
    board.append(...bodies);

    for (const th of board.querySelectorAll("th[data-column]")) {
      if (th.dataset.column === key) th.setAttribute("aria-sort", down ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    }
    for (const field of form.elements) if (field.name && field.value !== view[field.name]) field.value = view[field.name];
    const all = table.getFilteredRowModel().rows.length, at = state.pagination.pageIndex;
    const extra = found.reduce((n, x) => n + (x === 2), 0);
    count.textContent = `${all - extra} of ${row.count} rows${extra ? `, and ${extra} of reference that always stay` : ""}`;
    const go = (to, text, off) => el("button", {type: "button", "data-page": to, disabled: off ? "" : null}, text);
    paging.hidden = pages() < 2;
    paging.replaceChildren(go(at, "‹ previous", at === 0), el("span", null, `page ${at + 1} of ${pages()}`), go(at + 2, "next ›", at + 1 === pages()));
    drawn(found);
  };

  for (const th of board.querySelectorAll("th[data-column]")) {
    const label = th.querySelector(".label");
    const button = el("button.sort", {type: "button"}, label.textContent);
    label.replaceWith(button);
    button.addEventListener("click", () => {
      const key = th.dataset.column, first = HIGH.includes(key) ? `-${key}` : key, second = HIGH.includes(key) ? key : `-${key}`;
      change({sort: view.sort === first ? second : view.sort === second ? "" : first});
    });
  }
  form.addEventListener("input", (event) => change({[event.target.name]: event.target.value}));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => { event.preventDefault(); change(Object.fromEntries(KEYS.map((key) => [key, ""]))); });
  paging.addEventListener("click", (event) => {
    if (!event.target.dataset.page) return;
    change({page: event.target.dataset.page}, true);
    document.getElementById("board").scrollIntoView();
  });
  window.addEventListener("hashchange", () => { if (location.hash.includes("=") || !location.hash) { view = read(); show(); } });

  // --- figures of one table at a time ---

  const live = document.getElementById("live");
  const choice = el("select", {name: "figures"});
  const boxes = {plane: el("div.chart"), learning: el("div.charts"), diversity: el("div.charts")};
  let ready = false, current = null;

  const drawn = (found) => {
    if (!ready) return;
    const visible = [...new Set(Array.from(found.keys()).filter((i) => found[i]).map((i) => row.table(i)))];
    const chosen = visible.includes(Number(view.figures)) && view.figures !== "" ? Number(view.figures) : visible[0] ?? 0;
    if (choice.dataset.of !== visible.join()) {
      choice.replaceChildren(...visible.map((t) => el("option", {value: t}, data.tables[t].heading)));
      choice.dataset.of = visible.join();
    }
    choice.value = chosen;
    if (chosen !== current) { current = chosen; draw(chosen); }
  };

  const draw = async (at) => {
    const some = klbench.standing(row, at), rows = some.slice(0, PLACES);
    plane(data.tables[at], rows, some.length);
    diversity(data.tables[at], rows.filter((i) => row.role(i) !== "target").slice(0, 45));
    const curves = await klbench.load(`pages/curves-${at}.js`, "curves");
    if (current === at) learning(data.tables[at], curves);
  };

  const plane = (t, rows, all) => {
    const points = rows.map((i) => ({
      i, label: row.label(i), role: row.role(i), x: row.value("reward", i), x1: row.low("reward", i), x2: row.high("reward", i),
      y: row.value("kl_prior", i), y1: row.low("kl_prior", i), y2: row.high("kl_prior", i), wasted: row.value("wasted_nats", i),
    })).filter((p) => Number.isFinite(p.x) && Number.isFinite(p.y) && p.x !== null && p.y !== null);
    const up = (y) => Math.max(y, 0);
    const curve = t.frontier.map(([x, y, low, high, reach]) => ({x, y: up(y), low: up(low), high: up(high), reach})).sort((a, b) => a.x - b.x);
    const solid = curve.filter((p) => p.reach >= 30), thin = curve.filter((p) => p.reach >= 1 && p.reach < 30);
    const dashed = solid.length && thin.length ? [solid.at(-1), ...thin] : thin, known = [...solid, ...thin];
    const foot = (x) => {
      if (!known.length || x > known.at(-1).x) return null;
      if (x <= known[0].x) return 0;
      const k = known.findIndex((p) => p.x >= x), [a, b] = [known[k - 1], known[k]];
      return a.y + (b.y - a.y) * (x - a.x) / (b.x - a.x || 1);
    };
    const top = 1.08 * Math.max(1e-3, ...points.map((p) => p.y2 ?? p.y), ...known.map((p) => p.high));
    const colour = (p) => (p.role === "objective" || p.role === "policy" ? "var(--accent)" : "var(--reference)");
    const symbol = {target: d3.symbolDiamond, null: d3.symbolSquare, sampler: d3.symbolTriangle};
    const width = Math.max(320, boxes.plane.clientWidth), height = Math.min(440, 240 + width / 5);
    const made = chart(`Reward against KL to the prior on ${t.heading}, with the optimal frontier`, {
      width, height, marginLeft: 44, marginRight: 24, marginBottom: 40,
      x: {label: "reward E_q[r] →", nice: true, insetLeft: 12, insetRight: 12},
      y: {type: "sqrt", domain: [0, top], ticks: ticks(top, 0.12), tickFormat: String, label: "↑ KL to the prior, nats (square-root axis)", grid: true},
      marks: [
        Plot.areaY(solid, {x: "x", y1: "low", y2: "high", fill: "var(--accent)", fillOpacity: 0.16}),
        Plot.areaY(dashed, {x: "x", y1: "low", y2: "high", fill: "var(--accent)", fillOpacity: 0.09}),
        Plot.line(solid, {x: "x", y: "y", stroke: "var(--accent)", strokeWidth: 1.8}),
        Plot.line(dashed, {x: "x", y: "y", stroke: "var(--accent)", strokeWidth: 1.5, strokeDasharray: "5,4"}),
        Plot.ruleX(points.filter((p) => foot(p.x) !== null), {x: "x", y1: (p) => foot(p.x), y2: (p) => up(p.y), stroke: "var(--muted)", strokeDasharray: "1,3"}),
        Plot.ruleY(points.filter((p) => p.x1 !== null), {y: (p) => up(p.y), x1: "x1", x2: "x2", stroke: colour}),
        Plot.ruleX(points.filter((p) => p.y1 !== null), {x: "x", y1: (p) => up(p.y1), y2: (p) => up(p.y2), stroke: colour}),
        Plot.dot(points, {
          x: "x", y: (p) => up(p.y), r: 4.5, symbol: {value: (p) => symbol[p.role] ?? d3.symbolCircle, scale: null}, stroke: colour, strokeWidth: 1.6,
          fill: (p) => (p.role === "target" || p.role === "null" ? "var(--paper)" : colour(p)), href: (p) => (row.id(p.i) ? page(row.id(p.i)) : null),
          ariaLabel: (p) => `${p.label}: reward ${number(p.x)}, KL ${number(p.y)} nats`,
        }),
        Plot.tip(points, Plot.pointer({x: "x", y: (p) => up(p.y), fill: "var(--raised)", stroke: "var(--line)",
          title: (p) => `${p.label}\nreward ${number(p.x)}\nKL to the prior ${number(p.y)} nats\nwasted ${number(p.wasted)} nats`})),
      ],
    });
    boxes.plane.replaceChildren(made, ...(all > rows.length ? [el("p.note", null, `The ${rows.length} nearest to the posterior of ${all}.`)] : []));
    label(made, points.map((p) => [p.label, made.scale("x").apply(p.x), made.scale("y").apply(up(p.y))]), width, height);
  };

  // Names beside their points where there is room for them; the others are a hover or a tab away.
  const label = (svg, spots, width, height) => {
    const taken = spots.map(([, x, y]) => [x - 6, y - 6, x + 6, y + 6]);
    const free = (box) => box[0] > 44 && box[2] < width && box[1] > 8 && box[3] < height - 34
      && taken.every((t) => box[2] < t[0] || box[0] > t[2] || box[3] < t[1] || box[1] > t[3]);
    for (const [text, x, y] of spots) {
      const wide = 6.7 * text.length;
      for (const [dx, dy] of [[9, 0], [-9 - wide, 0], [-wide / 2, -14], [-wide / 2, 14], [9, -13], [9, 13], [-9 - wide, -13], [-9 - wide, 13], [-wide / 2, -30], [-wide - 8, -30], [8, -30], [-wide / 2, -46], [-wide - 8, -46], [8, -46], [-wide / 2, -62], [8, -62], [-wide - 8, -62], [-wide / 2, -78], [8, -78]]) {
        const box = [x + dx, y + dy - 7, x + dx + wide, y + dy + 7];
        if (!free(box)) continue;
        taken.push(box);
        const node = (tag, set) => {
          const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
          for (const [key, value] of Object.entries({...set, "aria-hidden": "true", "pointer-events": "none"})) made.setAttribute(key, value);
          svg.append(made);
          return made;
        };
        if (Math.abs(dy) > 20) node("line", {x1: x, y1: y + Math.sign(dy) * 6, x2: x + dx + wide / 2, y2: y + dy - Math.sign(dy) * 7, stroke: "var(--muted)", "stroke-width": 0.6});
        node("text", {x: x + dx, y: y + dy + 4, fill: "var(--ink)", "text-anchor": "start"}).textContent = text;
        break;
      }
    }
  };

  const half = (box) => Math.max(300, box.clientWidth < 700 ? box.clientWidth : (box.clientWidth - 32) / 2);
  const learning = (t, curves) => {
    const methods = curves.methods.length > 0, series = methods ? curves.methods : curves.policies;
    const unit = series.some((s) => s.samples) ? "samples" : "step";
    const named = series.slice(0, 8).map((s) => s.label);
    const width = half(boxes.learning);
    const panel = (key, title, root) => {
      const points = series.filter((s) => s[unit] && s[key]).flatMap((s) => s[unit].map((x, k) => ({label: s.label, x, y: s[key][k]}))).filter((p) => p.y !== null);
      if (!points.length) return null;
      const starts = series.filter((s) => s[key]).map((s) => Math.max(...s[key].slice(0, 3)));
      const ends = points.map((p) => p.y), cap = methods ? 1.3 * Math.max(...starts) : Math.max(...ends);
      const top = Math.min(Math.max(...ends), cap) * 1.05 || 1;
      return el("figure", null, el("figcaption", null, title), chart(`${title} while training on ${t.heading}`, {
        width, height: 264, marginLeft: 44, marginBottom: 40, clip: true,
        x: {label: unit === "samples" ? "draws seen in training →" : "step →", ticks: 5},
        y: root ? {type: "sqrt", domain: [0, top], ticks: ticks(top, 0.16), tickFormat: String, label: null, grid: true} : {label: null, grid: true, nice: true},
        color: {domain: named, scheme: "observable10"},
        marks: [
          Plot.line(points.filter((p) => !named.includes(p.label)), {x: "x", y: "y", z: "label", stroke: "var(--muted)", strokeWidth: 0.7, strokeOpacity: 0.55, clip: true}),
          Plot.line(points.filter((p) => named.includes(p.label)), {x: "x", y: "y", z: "label", stroke: "label", strokeWidth: 1.7, clip: true}),
          Plot.tip(points, Plot.pointer({x: "x", y: "y", fill: "var(--raised)", stroke: "var(--line)", title: (p) => `${p.label}\n${number(p.y)}`})),
        ],
      }));
    };
    const panels = methods
      ? [panel("reverse_kl", "reverse KL, nats", true), panel("wasted_nats", "wasted nats", true)]
      : [panel("reward", "reward", false), panel("kl_prior", "KL to the prior, nats", true)];
    const there = panels.filter(Boolean);
    boxes.learning.hidden = !there.length;
    boxes.learning.replaceChildren(...(there.length ? [el("h3", null, "Learning curves"),
      Plot.legend({color: {domain: named, scheme: "observable10", type: "ordinal"}}), ...there] : []));
    if (series.length > 8) boxes.learning.append(el("p.note", null, `The nearest eight in colour, ${series.length - 8} more in grey.`));
  };

  const diversity = (t, rows) => {
    const width = half(boxes.diversity);
    const panel = (key, title) => {
      const points = rows.map((i) => ({i, label: row.label(i), x: row.single(key, i), goal: row.single(`${key}_target`, i)})).filter((p) => p.x !== null && p.goal !== null);
      if (!points.length) return null;
      const colour = (p) => (p.x < p.goal ? "var(--warn)" : "var(--accent)");
      return el("figure", null, el("figcaption", null, title), chart(`${title} of each policy beside the posterior's own, ${t.heading}`, {
        width, height: 46 + 17 * points.length, marginLeft: Math.min(150, 14 + 7 * Math.max(...points.map((p) => p.label.length))), marginTop: 6,
        x: {label: null, ticks: 5, grid: true, zero: true}, y: {domain: points.map((p) => p.label), label: null, tickSize: 0},
        marks: [
          Plot.ruleX([points[0].goal], {stroke: "var(--good)", strokeWidth: 2}),
          Plot.ruleY(points, {y: "label", x1: "goal", x2: "x", stroke: colour, strokeWidth: 1.4}),
          Plot.dot(points, {x: "x", y: "label", fill: colour, r: 3.5, ariaLabel: (p) => `${p.label}: ${digits(p.x)}, the posterior ${digits(p.goal)}`}),
        ],
      }));
    };
    const there = [panel("entropy", "entropy, nats"), panel("distinct_2", "distinct-2")].filter(Boolean);
    boxes.diversity.replaceChildren(...(there.length ? [el("h3", null, "Diversity beside the posterior's own"),
      el("p.note", null, "The green line is the posterior's. Collapse is diversity below the posterior's, not below the prior's."), ...there] : []));
  };

  form.hidden = false;
  count.hidden = false;
  show();
  document.documentElement.dataset.ready = "board"; // the table can be used: benchmarks and tests wait for this, and read when it was
  performance.mark("board");

  klbench.load("pages/d3.min.js").then(() => klbench.load("pages/plot.umd.min.js")).then(() => {
    ready = true;
    document.getElementById("drawn").remove();
    live.append(el("div.filters", null, el("label", null, "figures of", choice)), boxes.plane, boxes.learning, boxes.diversity);
    choice.addEventListener("change", () => change({figures: choice.value}, true));
    drawn(kept());
    document.documentElement.dataset.ready = "figures";
    let wide = live.clientWidth, waiting = 0;
    new ResizeObserver(() => {
      if (live.clientWidth === wide) return;
      wide = live.clientWidth;
      clearTimeout(waiting);
      waiting = setTimeout(() => draw(current), 150);
    }).observe(live);
  });
})();
