"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);

// ------------------------------------------------------------------ values of charts on hover

const tip = byId("tip");

function nearest(svg, x, y) {
  let best = null;
  for (const series of all(".series:not(.off)", svg)) {
    const line = series.querySelector("polyline");
    for (let i = 0; line && i < line.points.numberOfItems; i++) {
      const point = line.points.getItem(i);
      const distance = (point.x - x) ** 2 + (point.y - y) ** 2;
      if (!best || distance < best.distance) best = { series, i, point, distance };
    }
  }
  return best;
}

function showTip(svg, event) {
  const box = svg.getBoundingClientRect();
  const scale = svg.viewBox.baseVal.width / box.width;
  const found = nearest(svg, (event.clientX - box.left) * scale, (event.clientY - box.top) * scale);
  tip.hidden = !found || found.distance > 40 ** 2;
  if (tip.hidden) return;
  const { label, x, y } = found.series.dataset;
  const figure = svg.closest("figure");
  const xName = figure.querySelector(".under").textContent || "x";
  const values = `${y.split(" ")[found.i]}\n${xName}: ${x.split(" ")[found.i]}`;
  tip.textContent = (label ? label + ": " : "") + values;
  const left = box.left + scrollX + found.point.x / scale;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = Math.max(4, Math.min(left + 10, room)) + "px";
  tip.style.top = box.top + scrollY + found.point.y / scale + 10 + "px";
}

for (const svg of all("figure svg")) {
  svg.addEventListener("pointermove", (event) => showTip(svg, event));
  svg.addEventListener("pointerdown", (event) => showTip(svg, event));
  svg.addEventListener("pointerleave", () => (tip.hidden = true));
}

// ------------------------------------------------------------------ series that are switched off

function press(button, isOn) {
  button.setAttribute("aria-pressed", isOn);
  for (const series of all(".series", button.closest(".chart"))) {
    if (series.dataset.series === button.dataset.series) series.classList.toggle("off", !isOn);
  }
}

for (const button of all(".keys button")) {
  button.addEventListener("click", () =>
    press(button, button.getAttribute("aria-pressed") !== "true"));
  button.addEventListener("dblclick", () => {
    for (const other of all("button", button.parentElement)) press(other, other === button);
  });
}

// ------------------------------------------------------------------ tables sorted by a column

function sortRows(head) {
  const table = head.closest("table");
  const column = [...head.parentElement.children].indexOf(head);
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const value = (row) => row.children[column].textContent.trim();
  const compare = (a, b) => {
    const [x, y] = [a, b].map((row) => parseFloat(value(row).replace(/,/g, "")));
    if (isNaN(x) && isNaN(y)) return sign * value(a).localeCompare(value(b));
    return isNaN(x) ? 1 : isNaN(y) ? -1 : sign * (x - y); // those without a number last
  };
  for (const other of all("th", table)) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
}

for (const head of all(".sortable th")) head.addEventListener("click", () => sortRows(head));

// ------------------------------------------------------------------ samples

const PER_PAGE = 20;
const cards = all("#cards article");
let page = 0;

// The words of `ours` that a longest common subsequence with `theirs` does not have.
function differing(ours, theirs) {
  const length = ours.map(() => new Uint16Array(theirs.length + 1));
  length.push(new Uint16Array(theirs.length + 1));
  for (let i = ours.length - 1; i >= 0; i--)
    for (let j = theirs.length - 1; j >= 0; j--)
      length[i][j] = ours[i] === theirs[j]
        ? length[i + 1][j + 1] + 1
        : Math.max(length[i + 1][j], length[i][j + 1]);
  const isNew = [];
  for (let i = 0, j = 0; i < ours.length; i++) {
    while (j < theirs.length && ours[i] !== theirs[j] && length[i][j + 1] === length[i][j]) j++;
    isNew.push(!(j < theirs.length && ours[i] === theirs[j]));
    if (!isNew[i]) j++;
  }
  return isNew;
}

const MOST_WORDS = 1500;

function has(text, name, value) {
  return text.dataset[name].split("|").includes(value);
}

// The text of the reference that was sampled in the run of a policy's sample.
function referenceOf(policy, card) {
  const { loss, seed } = policy.dataset;
  const of = all(".reference", card).find((text) => has(text, "loss", loss) && has(text, "seed", seed));
  return of && of.querySelector(".text");
}

function mark(card, isOn) {
  for (const text of all(".policy:not([hidden]) .text", card)) {
    const plain = text.textContent;
    text.textContent = plain;
    const theirs = referenceOf(text.closest(".policy"), card);
    if (!isOn || !theirs) continue;
    const pieces = plain.split(/(\s+)/).slice(0, 2 * MOST_WORDS);
    const words = pieces.filter((_, i) => i % 2 === 0);
    const others = theirs.textContent.split(/\s+/).slice(0, MOST_WORDS);
    const isNew = differing(words, others);
    const nodes = pieces.map((piece, i) => {
      // The space between two marked words is marked too.
      const isMarked = i % 2 ? isNew[(i - 1) / 2] && isNew[(i + 1) / 2] : isNew[i / 2];
      if (!isMarked || !piece) return document.createTextNode(piece);
      const node = document.createElement("mark");
      node.textContent = piece;
      return node;
    });
    text.replaceChildren(...nodes, plain.slice(pieces.join("").length));
  }
}

function mean(card, name) {
  const values = all(".policy:not([hidden])", card)
    .map((text) => parseFloat(text.dataset[name])).filter((value) => !isNaN(value));
  return values.length ? values.reduce((a, b) => a + b) / values.length : NaN;
}

function showSamples() {
  const query = byId("search").value.toLowerCase();
  const filters = Object.fromEntries(
    all("[data-filter]").map((select) => [select.dataset.filter, select.value]));
  const fits = (text, name) => !filters[name] || has(text, name, filters[name]);
  const found = cards.filter((card) => {
    for (const text of all(".sample", card)) text.hidden = !fits(text, "loss") || !fits(text, "seed");
    return (!filters.temperature || card.dataset.temperature === filters.temperature)
      && card.querySelector(".policy:not([hidden])")
      && card.textContent.toLowerCase().includes(query);
  });
  const [name, sign] = byId("order").value.split(" ");
  if (name) {
    const values = new Map(found.map((card) => [card, mean(card, name)]));
    const last = (value) => (isNaN(value) ? Infinity : sign * value);
    found.sort((a, b) => last(values.get(a)) - last(values.get(b)) || 0);
  }
  const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
  page = Math.max(0, Math.min(page, pages - 1));
  const shown = found.slice(page * PER_PAGE, (page + 1) * PER_PAGE);
  for (const card of cards) card.hidden = true;
  for (const card of shown) {
    card.hidden = false;
    mark(card, byId("marks").checked);
  }
  byId("cards").prepend(...shown);
  byId("pager").hidden = false;
  byId("place").textContent = found.length
    ? `${page * PER_PAGE + 1} to ${page * PER_PAGE + shown.length} of ${found.length}` : "none";
  byId("back").disabled = page === 0;
  byId("next").disabled = page === pages - 1;
}

if (byId("cards")) {
  const again = () => { page = 0; showSamples(); };
  for (const control of all("#samples select, #marks")) control.addEventListener("change", again);
  byId("search").addEventListener("input", again);
  for (const [id, step] of [["back", -1], ["next", 1]])
    byId(id).addEventListener("click", () => {
      page += step;
      showSamples();
      byId("samples").scrollIntoView();
    });
  showSamples();
}
