"use strict";
// What the pages share: data that their scripts hand over, elements made of text alone, numbers as klbench/board.py prints them.
const klbench = (() => {
  const taken = new Map();

  // Data files call this. `load` adds one as a script element, because a page on a disk may fetch nothing.
  const take = (name, value) => taken.set(name, value);
  const load = (src, name) => new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = src;
    script.onload = () => resolve(taken.get(name));
    script.onerror = () => reject(new Error(`${src} is not there`));
    document.head.append(script);
  });

  // el("p.note", {title: "x"}, "text", child): children are nodes or text, never HTML.
  const el = (kind, set, ...children) => {
    const [tag, ...classes] = kind.split(".");
    const made = document.createElement(tag);
    if (classes.length) made.className = classes.join(" ");
    for (const [key, value] of Object.entries(set || {})) if (value !== null && value !== undefined) made.setAttribute(key, value);
    made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
    return made;
  };

  // A name that may break at its underscores, set apart from the direction of the text around it.
  const name = (text) => el("bdi", null, text.split("_").flatMap((part, i) => (i ? ["_", document.createElement("wbr"), part] : [part])));

  const number = (x) => {
    if (x === null || x === undefined) return "–";
    if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
    const size = Math.abs(x);
    const text = size < 9.9995 ? size.toFixed(3) : size < 99.995 ? size.toFixed(2)
      : size.toLocaleString("en-US", {minimumFractionDigits: 1, maximumFractionDigits: 1});
    return x < 0 && Number(text.replaceAll(",", "")) ? `−${text}` : text;
  };
  const range = (low, high) => (low === null || high === null || low === undefined || high === undefined ? "" : `[${number(low)}, ${number(high)}]`);

  const place = (x, end) => 100 * Math.min(Math.sqrt(Math.max(x, 0) / end), 1);

  // 0 and round numbers up to `top`, at least `gap` of a square-root axis apart: klbench/page/figures.py's ticks.
  const ticks = (top, gap) => {
    if (!(top > 0)) return [0];
    const power = 10 ** Math.floor(Math.log10(top)), chosen = [];
    let last = Infinity;
    for (const digits of [5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01]) {
      const at = Math.sqrt(digits * power / top);
      if (at <= 1 && last - at >= gap && at >= gap * 0.8) {
        chosen.push(Number((digits * power).toPrecision(6)));
        last = at;
      }
    }
    return [0, ...chosen.reverse()];
  };

  const page = (id, from = "pages/") => `${from}${encodeURIComponent(id)}.html`;

  // Data as columns becomes one function per field.
  const rows = (data) => {
    const {rows: r, figures, singles} = data;
    const word = (key) => (i) => r[key].words[r[key].at[i]];
    return {
      count: r.table.length,
      table: (i) => r.table[i], methods: (i) => r.methods[i] === 1, label: (i) => r.label[i], id: (i) => r.id[i], seed: (i) => r.seed[i],
      rank: (i) => r.rank[i], bracket: (i) => r.bracket[i], later: (i) => r.later[i] === 1,
      shard: (i) => r.shard[i], reason: (i) => data.reasons[r.reason[i]],
      method: word("method"), role: word("role"), status: word("status"), provenance: word("provenance"),
      value: (name, i) => (figures[name] ? figures[name][0][i] : null),
      low: (name, i) => (figures[name] ? figures[name][1][i] : null),
      high: (name, i) => (figures[name] ? figures[name][2][i] : null),
      single: (name, i) => singles[name][i],
    };
  };

  // The rows that stand for a table in a figure: its methods, and the policies that belong to none of them.
  const standing = (row, table) => {
    const all = Array.from({length: row.count}, (_, i) => i).filter((i) => row.table(i) === table);
    const methods = new Set(all.filter(row.methods).map(row.label));
    return all.filter((i) => row.methods(i) || (!row.later(i) && !methods.has(row.method(i))));
  };

  // A chart of Plot that says what it shows; points in it may be links, so it is a group and no image.
  const chart = (says, options) => {
    const made = Plot.plot({style: {fontSize: "12px", overflow: "visible"}, ...options});
    const svg = made.tagName === "svg" ? made : made.querySelector("svg:last-of-type");
    svg.setAttribute("role", "group");
    svg.setAttribute("aria-label", says);
    for (const part of svg.querySelectorAll("g[aria-label], g[aria-description]")) { // Plot names its layers: "dot", "x-axis tick"
      part.removeAttribute("aria-label");
      part.removeAttribute("aria-description");
    }
    for (const point of svg.querySelectorAll("[aria-label]")) {
      const link = point.closest("a");
      if (!link) point.setAttribute("role", "img");
      else { link.setAttribute("aria-label", point.getAttribute("aria-label")); point.removeAttribute("aria-label"); }
    }
    return made;
  };

  return {take, load, el, name, number, range, place, ticks, page, rows, standing, chart, taken};
})();
