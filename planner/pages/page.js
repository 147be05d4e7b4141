"use strict";
(function () {
  // What a cell of the stack stands for.
  const line = document.getElementById("cell");
  for (const cell of document.querySelectorAll(".cell")) {
    cell.addEventListener("mouseenter", () => { line.textContent = cell.querySelector("title").textContent; });
  }

  const data = JSON.parse(document.getElementById("data").textContent);
  const picture = document.getElementById("memory"), panel = document.getElementById("moment");
  if (!data.starts || !picture) return;
  const cursor = picture.querySelector(".cursor");
  const count = data.phase.length, total = data.starts[count] || 1;
  let shown = data.peak;

  function size(bytes) {
    if (bytes < 1024) return `${bytes} B`;
    for (const unit of ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]) {
      bytes /= 1024;
      const shown = Number(bytes.toPrecision(4));
      if (shown < 1024 || unit === "EiB") return `${shown} ${unit}`;
    }
  }

  function time(seconds) {
    return seconds >= 1 ? `${seconds.toPrecision(3)} s` : `${Number((seconds * 1000).toPrecision(3))} ms`;
  }

  function place(at) {
    if (data.where[at] >= 0) return data.names[data.where[at]];
    return data.phases[data.phase[at]] === "loss" ? "the loss" : "the end";
  }

  // Rows of [layer, what, how many, bytes], the largest first.
  function owners(at) {
    const found = new Map();
    for (const [layer, group, bytes, first, last] of data.held) {
      if (first > at) break;  // in order of their first moments
      if (last < at) continue;
      const key = `${layer} ${group}`, row = found.get(key) || [data.layers[layer], data.groups[group], 0, 0];
      row[2] += 1;
      row[3] += bytes;
      found.set(key, row);
    }
    const rows = [...found.values(), ...Object.entries(data.static).map(([name, bytes]) => ["static", name, 1, bytes])];
    const work = data.parts[at][data.layers.indexOf("workspace")];
    if (work) rows.push(["workspace", `${data.phases[data.phase[at]]} of ${place(at)}`, 1, work]);
    return rows.sort((a, b) => b[3] - a[3]);
  }

  function element(tag, text, name) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  }

  function show(at) {
    shown = at;
    const parts = data.parts[at], all = parts.reduce((a, b) => a + b, 0);
    const phase = data.phases[data.phase[at]], run = data.strategy[at];
    const level = data.level[at] ? `, ${data.level[at]} checkpoint${data.level[at] > 1 ? "s" : ""} deep` : "";
    const how = run < 0 ? "" : ` as ${data.strategies[run]}`;
    panel.querySelector("h3").textContent =
      `${at === data.peak ? "The peak: " : ""}${phase} of ${place(at)}${how}${level}: ${size(all)} (${all.toLocaleString("en")} bytes)`;
    panel.querySelector("p").textContent = `moment ${at + 1} of ${count}, at ${time(data.starts[at])}, for ` +
      `${time(data.starts[at + 1] - data.starts[at])}: ` +
      parts.map((bytes, layer) => [bytes, layer]).filter(([bytes]) => bytes)
        .map(([bytes, layer]) => `${data.words[layer]} ${size(bytes)}`).join("; ");
    panel.querySelectorAll(".bar i").forEach((bar, layer) => { bar.style.width = `${100 * parts[layer] / all}%`; });
    const rows = owners(at), body = panel.querySelector("tbody");
    const most = 12, rest = rows.slice(most - 1);
    const few = rows.length > most ? rows.slice(0, most - 1) : rows;
    if (rows.length > most) {
      const sum = (column) => rest.reduce((a, row) => a + row[column], 0);
      few.push(["", "others", sum(2), sum(3)]);
    }
    body.replaceChildren(...few.map(([kind, what, tensors, bytes]) => {
      const row = element("tr"), first = element("td");
      if (kind) first.append(element("i", undefined, `m-${kind}`));
      first.append(what);
      row.append(first, element("td", tensors), element("td", size(bytes)),
        element("td", `${(100 * bytes / all).toFixed(1)} %`));
      return row;
    }));
    const x = data.frame.x + data.frame.width * (data.starts[at] + data.starts[at + 1]) / 2 / total;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
  }

  picture.addEventListener("mousemove", (event) => {
    const box = picture.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * data.frame.of;
    const seconds = (x - data.frame.x) / data.frame.width * total;
    let low = 0, high = count - 1;  // the last moment that has started
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (data.starts[middle] <= seconds) low = middle; else high = middle - 1;
    }
    if (low !== shown) show(low);
  });
  picture.addEventListener("mouseleave", () => show(data.peak));
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -count, End: count }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    show(Math.min(count - 1, Math.max(0, shown + step)));
  });
  show(data.peak);
  cursor.style.visibility = "hidden";
})();
