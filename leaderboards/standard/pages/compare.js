"use strict";
// Two policies of one task side by side. The address keeps which: #a=ID&b=ID.
(() => {
  const {el, name, number, range, page, chart} = klbench;
  const data = klbench.taken.get("board"), row = klbench.rows(data);
  const form = document.getElementById("choose"), box = document.getElementById("compared");
  const policies = Array.from({length: row.count}, (_, i) => i).filter((i) => row.id(i));
  const at = new Map(policies.map((i) => [row.id(i), i]));
  const of = (table) => policies.filter((i) => row.table(i) === table);

  const read = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    const a = at.get(given.get("a")) ?? policies[0];
    const beside = of(row.table(a)).filter((i) => i !== a);
    const b = at.get(given.get("b"));
    return [a, b !== undefined && row.table(b) === row.table(a) ? b : beside[0] ?? a];
  };
  const fill = (select, rows, chosen) => {
    select.replaceChildren(...rows.map((i) => el("option", {value: row.id(i)}, row.label(i))));
    select.value = row.id(chosen);
  };
  form.elements.table.replaceChildren(...data.tables.map((t, i) => el("option", {value: i}, t.heading)));
  form.addEventListener("change", (event) => {
    const {table, a, b} = form.elements;
    const first = event.target === table ? row.id(of(Number(table.value))[0]) : a.value;
    history.replaceState(null, "", `#${new URLSearchParams(event.target === table ? {a: first} : {a: first, b: b.value})}`);
    show();
  });
  window.addEventListener("hashchange", () => show());

  const text = (cut) => [cut[0], cut[1] || cut[2] ? el("details.rest", null,
    el("summary", null, `${(cut[1].length + cut[2]).toLocaleString("en-US")} characters more`),
    cut[1], cut[2] ? ` … and ${cut[2].toLocaleString("en-US")} in the record` : null) : null];
  const draws = (of, prompt) => of.samples.filter((s) => s[0][0] === prompt).map(([, said, reward, prior, own]) => el("div.sample", null,
    el("div.said", {dir: "auto"}, el("span.completion", {dir: "auto"}, text(said))),
    el("p.numbers", null, `reward ${number(reward)} · log p0 ${number(prior)} · log q ${number(own)}`)));

  const shards = new Map();
  const shard = async (at) => {
    if (!shards.has(at)) shards.set(at, await klbench.load(`draws-${at}.js`, "draws"));
    return shards.get(at);
  };

  let asked = 0;
  const show = async () => {
    const mine = ++asked;
    const [i, j] = read(), t = data.tables[row.table(i)];
    form.elements.table.value = row.table(i);
    fill(form.elements.a, of(row.table(i)), i);
    fill(form.elements.b, of(row.table(i)), j);
    const [a, b] = [(await shard(row.shard(i)))[row.id(i)], (await shard(row.shard(j)))[row.id(j)]];
    if (mine !== asked) return;
    const names = [row.label(i), row.label(j)];
    const lines = a.prompts.map((prompt, k) => ({prompt, k, d: a.figures.free[k] - b.figures.free[k]}));
    const mean = lines.reduce((s, l) => s + l.d, 0) / lines.length;
    const spread = Math.sqrt(lines.reduce((s, l) => s + (l.d - mean) ** 2, 0) / (lines.length - 1) / lines.length);
    const half = t.t * spread, ends = t.t === null ? "" : ` ${range(mean - half, mean + half)}, 95 % for prompts like these ${lines.length}`;
    const [near, far] = mean <= 0 ? names : [names[1], names[0]];
    const difference = `${names[0]} − ${names[1]} is ${number(mean)} nats${ends}.`;
    const said = t.t !== null && Math.abs(mean) > half
      ? [el("b", null, name(near)), " is nearer to the posterior than ", el("b", null, name(far)), `: ${difference}`]
      : ["These prompts do not tell which is nearer: ", difference];
    const order = [...lines].sort((x, y) => x.d - y.d);
    const cells = (key, k) => [a, b].map((of) => el("td.figure", null, number(of.figures[key]?.[k])));
    box.replaceChildren(
      el("p.lead", null, said),
      el("figure.chart", null, el("figcaption", null, `Difference at each prompt, nats: left of 0 ${names[0]} is nearer, right of it ${names[1]}`),
        chart(`Difference of reverse KL at each prompt, ${names[0]} minus ${names[1]}`, {
          width: Math.max(320, box.clientWidth), height: 60 + 12 * lines.length, marginLeft: 20, y: {axis: null, domain: order.map((l) => l.k)}, x: {label: null, grid: true},
          marks: [
            Plot.ruleX([0], {stroke: "var(--ink)"}), Plot.ruleY(order, {y: "k", x1: 0, x2: "d", stroke: (l) => (l.d <= 0 ? "var(--accent)" : "var(--warn)"), strokeWidth: 2}),
            Plot.dot(order, {x: "d", y: "k", fill: (l) => (l.d <= 0 ? "var(--accent)" : "var(--warn)"), r: 3.5}),
            Plot.tip(order, Plot.pointerY({x: "d", y: "k", fill: "var(--raised)", stroke: "var(--line)", title: (l) => `prompt ${l.k + 1}\n${number(l.d)}`})),
          ],
        })),
      el("details.samples", null, el("summary", null, "Show the prompts, with the figures and draws of both ", el("span.count", null, "unfiltered: some may offend")),
        el("div.scroll", {tabindex: 0, role: "region", "aria-label": "Figures of each prompt"}, el("table.columns.prompts", null,
          el("thead", null, el("tr", null, el("th", {scope: "col"}, "prompt"), el("th.right", {scope: "col"}, "difference"),
            ["reverse KL", "reward", "KL to prior"].map((title) => names.map((of) => el("th.right", {scope: "col"}, `${title} `, el("small", null, name(of))))))),
          el("tbody", null, order.map(({prompt, k, d}) => el("tr", null, el("th", {scope: "row"}, el("span.of", null, `${k + 1} `), el("bdi", {dir: "auto"}, prompt)),
            el("td.figure.main", null, number(d)), cells("reverse_kl", k), cells("reward", k), cells("kl_prior", k)))))),
        [...new Set([...a.samples, ...b.samples].map((s) => s[0][0]))].map((prompt) => el("div.pair", null, el("h2", {dir: "auto"}, prompt),
          [[a, i], [b, j]].map(([of, k]) => el("div", null, el("h3", null, el("a", {href: page(row.id(k), "")}, name(row.label(k)))), draws(of, prompt)))))),
    );
    document.documentElement.dataset.ready = "compared";
  };
  form.hidden = false;
  show();
})();
