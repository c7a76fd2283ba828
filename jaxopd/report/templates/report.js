"use strict";
// The token explorer: colours tokens by the chosen teacher and estimator, and shows the numbers of one token.
// Model text enters the page by textContent only.
const DATA = JSON.parse(document.getElementById("data").textContent);
const panel = document.getElementById("panel");
const beside = matchMedia("(min-width: 62rem)");  // else the panel lies over the page and a tap elsewhere closes it
const choice = {teacher: 0, estimator: 0, colouring: 0};
// A colouring maps (alignment, success range) of a decision node to [-1, 1].
const COLOURINGS = [
  ["alignment", (align) => align],
  ["alignment, faded where little is at stake", (align, range) => align * Math.min(1, range / 0.25)],
];
const STEPS = 5;  // colour steps on either side of neutral

const number = (value, digits = 3) => value === null || value === undefined ? "\u2013" : value.toFixed(digits).replace("-", "\u2212");
const signed = (value) => value > 0 ? "+" + number(value, 2) : number(value, 2);
const probability = (value) => value === 0 ? "< .001" : number(value);

function element(tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function paint() {
  const colour = COLOURINGS[choice.colouring][1];
  for (const block of document.querySelectorAll(".path")) {
    const estimates = DATA.paths[block.dataset.path].e[choice.estimator];
    for (const token of block.querySelectorAll("bdi[class]")) token.removeAttribute("class");
    if (!estimates) continue;
    estimates.d.forEach((i, row) => {
      const align = estimates.a[choice.teacher][row];
      if (align === null) return;
      block.querySelector(`[data-i="${i}"]`).className = "a" + Math.round((colour(align, estimates.r[row] || 0) + 1) * STEPS);
    });
  }
}

function table(head, rows, chosen) {
  const made = element("table");
  const top = made.appendChild(element("thead")).appendChild(element("tr"));
  head.forEach((name) => top.appendChild(element("th", name)));
  const body = made.appendChild(element("tbody"));
  rows.forEach((row, index) => {
    const line = body.appendChild(element("tr", undefined, index === chosen ? "chosen" : ""));
    row.forEach((cell, column) => line.appendChild(element("td")).appendChild(element(column ? "span" : "bdi", cell)));
  });
  return made;
}

function show(token) {
  const path = DATA.paths[token.closest(".path").dataset.path];
  const i = Number(token.dataset.i);
  const estimates = path.e[choice.estimator];
  const row = estimates ? estimates.d.indexOf(i) : -1;
  panel.replaceChildren();
  panel.appendChild(element("bdi", token.textContent, "word"));
  panel.appendChild(element("p", `position ${i}, student P ${probability(path.p[i])}, ${path.n[i] ?? 0} visits`, "meta"));
  if (estimates) {
    const known = estimates.s[i] !== null && estimates.s[i] !== undefined;
    const interval = known && estimates.lo[i] !== null ? ` [${number(estimates.lo[i])}, ${number(estimates.hi[i])}]` : "";
    panel.appendChild(element("p", `P_succ after it ${number(estimates.s[i])}${interval}`));
    const stakes = row < 0 ? ", not a decision node" : `, success range ${number(estimates.r[row])}`;
    panel.appendChild(element("p", `value of the node ${number(estimates.v[i])}${stakes}`));
  } else {
    panel.appendChild(element("p", "this estimator was not run on this question"));
  }
  const teachers = DATA.teachers.map((name, m) => [name, probability(path.q[m][i]), row < 0 ? "\u2013" : signed(estimates.a[m][row])]);
  panel.appendChild(table(["teacher", "Q", "alignment"], teachers, choice.teacher));
  const candidates = (path.c[i] || []).map(([text, p, n, s, q]) =>
    [text, probability(p), probability(q[choice.teacher]), number(s[choice.estimator]), String(n ?? 0)]);
  if (candidates.length) panel.appendChild(table(["next token", "P", "Q", "P_succ", "visits"], candidates, -1));
  panel.hidden = false;
}

function move(event) {
  const token = event.target.closest(".path bdi");
  if (event.key === "Escape") panel.hidden = true;
  const next = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
  if (!token || !next) return;
  const other = token.parentElement.querySelector(`[data-i="${Number(token.dataset.i) + next}"]`);
  if (!other) return;
  event.preventDefault();
  token.tabIndex = -1;
  other.tabIndex = 0;
  other.focus();
}

COLOURINGS.forEach(([name], index) => {
  const option = element("option", name);
  option.value = index;
  document.getElementById("colouring").appendChild(option);
});
for (const name of Object.keys(choice)) {
  const select = document.getElementById(name);
  const choose = () => { choice[name] = Number(select.value); };
  choose();
  select.addEventListener("change", () => { choose(); paint(); panel.hidden = true; });
}
for (const kind of ["pointerover", "focusin"]) {
  document.addEventListener(kind, (event) => {
    const token = event.target.closest && event.target.closest(".path bdi");
    if (token) show(token);
  });
}
document.addEventListener("keydown", move);
document.addEventListener("click", (event) => {
  if (!beside.matches && !event.target.closest(".path bdi, #panel")) panel.hidden = true;
});
paint();
const first = document.querySelector(".path bdi[class]");
if (first && beside.matches) show(first);
