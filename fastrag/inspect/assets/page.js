"use strict";
const one = (selector, inside = document) => inside.querySelector(selector);
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

// The theme. A page opened from a file may have no storage.
const themes = ["system", "light", "dark"];
const stored = (theme) => {
  try {
    if (theme) localStorage.setItem("fastrag-theme", theme);
    return localStorage.getItem("fastrag-theme");
  } catch {
    return null;
  }
};
const themeButton = one("#theme");
const setTheme = (theme) => {
  document.documentElement.dataset.theme = theme;
  themeButton.textContent = `Theme: ${theme}`;
};
setTheme(themes.includes(stored()) ? stored() : "system");
themeButton.addEventListener("click", () => {
  const next = themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length];
  setTheme(next);
  stored(next);
});

// Questions: filter, choice and order.
const list = one("#list");
const questions = all(".question", list);
const texts = new Map(questions.map((each) => [each, each.textContent.toLowerCase()]));
const filter = one("#filter");
const show = one("#show");
const sort = one("#sort");
const descending = one("#descending");
const shows = {
  exact: (data) => data.exact === "1",
  wrong: (data) => data.exact === "0",
  first: (data) => data.rank === "1",
  missed: (data) => data.rank === "0",
  new: (data) => Number(data.new) > 0,
};
// A right passage that was not retrieved has rank 0 and comes after all ranks.
const key = (question) => {
  const value = question.dataset[sort.value];
  if (value === undefined) return NaN;
  return sort.value === "rank" && value === "0" ? Infinity : Number(value);
};
const arrange = () => {
  const words = filter.value.toLowerCase().split(/\s+/);
  const wanted = shows[show.value] ?? (() => true);
  let n = 0;
  for (const each of questions) {
    each.hidden = !wanted(each.dataset) || !words.every((word) => texts.get(each).includes(word));
    n += !each.hidden;
  }
  one("#count").textContent = `${n} of ${questions.length}`;
  const sign = descending.getAttribute("aria-pressed") === "true" ? -1 : 1;
  const order = (a, b) => {
    const [left, right] = [key(a), key(b)];
    if (Number.isNaN(left) || Number.isNaN(right)) return Number.isNaN(left) - Number.isNaN(right);
    return left === right ? a.dataset.order - b.dataset.order : sign * (left < right ? -1 : 1);
  };
  list.append(...[...questions].sort(order));
};
for (const each of [filter, show, sort]) each.addEventListener("input", arrange);
descending.addEventListener("click", () => {
  descending.setAttribute("aria-pressed", descending.getAttribute("aria-pressed") !== "true");
  arrange();
});
one(".tools").addEventListener("submit", (event) => event.preventDefault());
const openAll = (open) => all(".question:not([hidden])").forEach((each) => (each.open = open));
one("#open-all").addEventListener("click", () => openAll(true));
one("#close-all").addEventListener("click", () => openAll(false));

// Keys. Every control is reached by Tab; arrows move within a list, a heat map or a chart.
const moved = (key, at, n) =>
  ({ Home: 0, End: n - 1, ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1, ArrowDown: at + 1 })[key];
const limited = (at, n) => Math.min(Math.max(at, 0), n - 1);
const plain = (event) => !(event.ctrlKey || event.metaKey || event.altKey);
list.addEventListener("keydown", (event) => {
  if (!event.target.matches("summary") || !plain(event)) return;
  const question = event.target.parentElement;
  if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
    question.open = event.key === "ArrowRight";
  } else {
    const summaries = all(".question:not([hidden]) > summary", list);
    const to = moved(event.key, summaries.indexOf(event.target), summaries.length);
    if (to === undefined) return;
    summaries[limited(to, summaries.length)].focus();
  }
  event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && plain(event) && !event.target.matches("input, select")) {
    filter.focus();
    event.preventDefault();
  } else if (event.key === "Escape" && event.target === filter) {
    filter.value = "";
    arrange();
  }
});

// Heat maps: one cell takes part in the order of Tab, the one that had the focus last.
const readCell = (cell) => {
  const grid = cell.closest("table");
  const token = grid.tHead.rows[0].cells[cell.cellIndex].textContent;
  const share = Number(cell.style.getPropertyValue("--p")).toFixed(4);
  grid.parentElement.nextElementSibling.textContent =
    `${share} at “${token}” for ${cell.parentElement.cells[0].textContent}`;
};
for (const grid of all(".heat")) {
  grid.addEventListener("keydown", (event) => {
    const cell = event.target.closest("td");
    if (!cell || !plain(event)) return;
    const rows = [...grid.tBodies[0].rows];
    const upDown = event.key === "ArrowUp" || event.key === "ArrowDown";
    const line = upDown ? rows.map((row) => row.cells[cell.cellIndex]) : [...cell.parentElement.cells].slice(1);
    const to = moved(event.key, line.indexOf(cell), line.length);
    if (to === undefined) return;
    line[limited(to, line.length)].focus();
    event.preventDefault();
  });
  grid.addEventListener("focusin", (event) => {
    for (const each of all("td[tabindex='0']", grid)) each.tabIndex = -1;
    event.target.tabIndex = 0;
    readCell(event.target);
  });
  grid.addEventListener("pointerover", (event) => {
    const cell = event.target.closest("tbody td");
    if (cell) readCell(cell);
  });
}

// Charts: the values at one step.
for (const svg of all(".chart svg")) {
  const lines = all("polyline", svg).map((line) => ({
    label: line.dataset.label,
    values: new Map(JSON.parse(line.dataset.points)),
    xs: [...line.points].map((point) => point.x),
  }));
  const places = new Map();
  for (const { values, xs } of lines) [...values.keys()].forEach((step, i) => places.set(step, xs[i]));
  const steps = [...places.keys()].sort((a, b) => a - b);
  const cursor = one(".cursor", svg);
  const readout = one(".readout", svg.parentElement);
  let at = -1;
  const read = (i) => {
    at = limited(i, steps.length);
    const x = places.get(steps[at]);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
    const values = lines
      .filter(({ values }) => values.has(steps[at]))
      .map(({ label, values }) => `${label} ${Number(values.get(steps[at]).toPrecision(4))}`);
    readout.textContent = `step ${steps[at]}: ${values.join(" · ")}`;
  };
  svg.addEventListener("keydown", (event) => {
    const to = plain(event) ? moved(event.key, at, steps.length) : undefined;
    if (to === undefined) return;
    read(to);
    event.preventDefault();
  });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const far = steps.map((step) => Math.abs(places.get(step) - x));
    read(far.indexOf(Math.min(...far)));
  });
}

for (const each of [themeButton, one(".tools")]) each.hidden = false;
