"use strict";
// A policy's page: its training curve drawn, its draws searched.
(() => {
  const {el, ticks, chart, number} = klbench;
  const box = document.getElementById("curve");
  if (box) {
    const steps = JSON.parse(document.getElementById("steps").textContent);
    const unit = steps.samples ? "samples" : "step";
    const first = (key) => (["reward", "kl_prior"].indexOf(key) + 3) % 3; // reward, then kl_prior, then the others by name
    const keys = Object.keys(steps).filter((key) => key !== unit).sort((a, b) => first(a) - first(b) || (a < b ? -1 : 1));
    const draw = () => {
      const across = Math.max(1, Math.floor(box.clientWidth / 330)), width = Math.max(240, box.clientWidth / across - 16);
      box.replaceChildren(...keys.map((key) => {
        const points = steps[unit].map((x, k) => ({x, y: steps[key][k]})).filter((p) => p.y !== null);
        const top = 1.05 * Math.max(...points.map((p) => p.y)) || 1;
        return el("figure", null, el("figcaption", null, key), chart(`${key} while training`, {
          width, height: 184, marginLeft: 46, marginBottom: 40,
          x: {label: unit === "samples" ? "draws seen in training →" : "step →", ticks: 4},
          y: key === "kl_prior" ? {type: "sqrt", domain: [0, top], ticks: ticks(top, 0.2), tickFormat: String, label: null, grid: true} : {label: null, ticks: 4, grid: true, nice: true},
          marks: [
            Plot.line(points, {x: "x", y: "y", stroke: "var(--accent)", strokeWidth: 1.6}),
            Plot.tip(points, Plot.pointerX({x: "x", y: "y", fill: "var(--raised)", stroke: "var(--line)", title: (p) => `${unit} ${p.x}\n${number(p.y)}`})),
          ],
        }));
      }));
    };
    draw();
    let wide = box.clientWidth;
    new ResizeObserver(() => { if (box.clientWidth !== wide) { wide = box.clientWidth; draw(); } }).observe(box);
  }

  const find = document.getElementById("find"), found = document.getElementById("found");
  const samples = [...document.querySelectorAll(".sample")], texts = samples.map((s) => s.textContent.toLowerCase());
  document.querySelector(".find").hidden = samples.length === 0;
  find.addEventListener("input", () => {
    const words = find.value.trim().toLowerCase();
    let left = 0;
    samples.forEach((sample, i) => { sample.hidden = !texts[i].includes(words); left += sample.hidden ? 0 : 1; });
    found.textContent = words ? `${left} of ${samples.length}` : "";
  });
})();
