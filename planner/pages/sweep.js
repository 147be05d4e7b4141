"use strict";
(function () {
  const points = JSON.parse(document.getElementById("data").textContent).points;
  const picture = document.getElementById("frontier"), panel = document.getElementById("moment");
  const svg = picture.querySelector("svg"), width = svg.viewBox.baseVal.width;
  const targets = svg.querySelectorAll(".target");
  let shown = points.length - 1;

  function show(at) {
    targets[shown].classList.remove("shown");
    shown = at;
    targets[at].classList.add("shown");
    const point = points[at];
    panel.querySelector("h3").textContent = point.title;
    panel.querySelector("p").textContent = point.words;
    panel.querySelector("tbody").replaceChildren(...point.rows.map((cells) => {
      const row = document.createElement("tr");
      row.append(...cells.map((words) => {
        const cell = document.createElement("td");
        cell.textContent = words;
        return cell;
      }));
      return row;
    }));
  }

  picture.addEventListener("mousemove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * width;
    let nearest = 0;
    points.forEach((point, at) => {
      if (Math.abs(point.x - x) < Math.abs(points[nearest].x - x)) nearest = at;
    });
    if (nearest !== shown) show(nearest);
  });
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -points.length, End: points.length }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    show(Math.min(points.length - 1, Math.max(0, shown + step)));
  });
  show(shown);
})();
