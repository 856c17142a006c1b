"use strict";
// Values under the pointer, read from each chart's data-hover; and the choice of a step in the completion browser.
document.documentElement.classList.add("js");
const tip = document.getElementById("tip");

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= x) low = middle; else high = middle;
  }
  return x - points[low][0] <= points[high][0] - x ? points[low] : points[high];
}

for (const svg of document.querySelectorAll("svg[data-hover]")) {
  const data = JSON.parse(svg.dataset.hover);
  const [xLow, xHigh, xStart, xEnd] = data.x;
  const [, , yStart, yEnd] = data.y;
  const rule = document.createElementNS(svg.namespaceURI, "line");
  rule.setAttribute("class", "axis");
  rule.setAttribute("y1", yStart);
  rule.setAttribute("y2", yEnd);
  rule.style.display = "none";
  svg.append(rule);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const pixel = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    const wanted = xLow + (pixel - xStart) / (xEnd - xStart) * (xHigh - xLow);
    const series = data.series.filter((one) => one.points.length > 0);
    if (series.length === 0) return;
    const hits = series.map((one) => [one.name, nearest(one.points, wanted)]);
    const at = hits.map((hit) => hit[1][0]).reduce((a, b) => Math.abs(a - wanted) <= Math.abs(b - wanted) ? a : b);
    const lines = hits.map(([name, [x, y]]) => {
      const value = data.share ? (100 * y).toFixed(1) + "%" : String(y);
      return name + "  " + value + (x === at ? "" : "  (step " + x + ")");
    });
    tip.textContent = "step " + at + "\n" + lines.join("\n");
    tip.hidden = false;
    const room = window.innerWidth - event.clientX - tip.offsetWidth - 24;
    tip.style.left = Math.max(4, event.pageX + (room > 0 ? 16 : -tip.offsetWidth - 16)) + "px";
    tip.style.top = event.pageY + 14 + "px";
    const line = xHigh === xLow ? (xStart + xEnd) / 2 : xStart + (at - xLow) / (xHigh - xLow) * (xEnd - xStart);
    rule.setAttribute("x1", line);
    rule.setAttribute("x2", line);
    rule.style.display = "";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; rule.style.display = "none"; });
}

function choose(stage, step) {
  for (const phase of document.querySelectorAll('.phase[data-stage="' + stage + '"]')) {
    phase.hidden = phase.dataset.step !== step;
  }
  for (const button of document.querySelectorAll('.steps button[data-stage="' + stage + '"]')) {
    button.setAttribute("aria-pressed", String(button.dataset.step === step));
  }
}

const last = new Map();
for (const button of document.querySelectorAll(".steps button")) {
  last.set(button.dataset.stage, button.dataset.step);
  button.addEventListener("click", () => choose(button.dataset.stage, button.dataset.step));
}
for (const [stage, step] of last) choose(stage, step);
