"""The page's one script: values under the pointer, and all of it on paper; it reads without."""

# A chart's lines are read back from the picture: its axes stand in data-x and data-y.
SCRIPT = r"""
"use strict";
for (const plot of document.querySelectorAll(".plot")) {
  const svg = plot.querySelector("svg");
  const axis = (name) => svg.dataset[name].split(" ").map(Number);
  const [xAxis, yAxis] = [axis("x"), axis("y")];
  const value = ([low, high, start, end], at) =>
    low + (high - low) * (at - start) / (end - start);
  const show = (v) => v === 0 ? "0" : Number(v.toPrecision(3)).toLocaleString("en", {
    maximumSignificantDigits: 3, notation: Math.abs(v) < 1e-3 ? "scientific" : "standard"});
  const pointsOf = (path) => [...path.getAttribute("d").matchAll(/[ML]([-\d.]+),([-\d.]+)/g)]
    .map((m) => [Number(m[1]), Number(m[2])]);
  let lines = null, tip = null, rule = null;
  const begin = () => {
    lines = [...svg.querySelectorAll("g[data-name]")].flatMap((group) => {
      const path = group.querySelector(".raw") || group.querySelector(".line");
      return path ? [{name: group.dataset.name, points: pointsOf(path)}] : [];
    });
    tip = plot.appendChild(document.createElement("div"));
    tip.className = "tip";
    rule = svg.appendChild(document.createElementNS(svg.namespaceURI, "path"));
    rule.setAttribute("class", "rule");
  };
  const move = (event) => {
    if (!lines) begin();
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    const near = lines.map(({name, points}) => ({name, at: points.reduce((best, point) =>
      Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best)}));
    if (!near.length) return;
    const first = near.reduce((a, b) =>
      Math.abs(a.at[0] - x) <= Math.abs(b.at[0] - x) ? a : b).at[0];
    const name = svg.querySelector(".name").textContent.split(" ")[0];
    tip.textContent = [`${name} ${show(value(xAxis, first))}`,
      // Lines that end before have nothing to say here.
      ...near.filter((l) => Math.abs(l.at[0] - first) < 12)
        .map((l) => `${l.name}: ${show(value(yAxis, l.at[1]))}`)].join("\n");
    rule.setAttribute("d", `M${first},${yAxis[3]}V${yAxis[2]}`);
    tip.style.display = rule.style.display = "block";
    const left = first / scale;
    tip.style.left = left > box.width / 2 ? "auto" : `${left + 8}px`;
    tip.style.right = left > box.width / 2 ? `${box.width - left + 8}px` : "auto";
  };
  const leave = () => { if (tip) tip.style.display = rule.style.display = "none"; };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", leave);
}
addEventListener("beforeprint", () => {
  for (const block of document.querySelectorAll("details")) block.open = true;
});
"""
