"use strict";
// The token explorer. HEAD holds names and scales; a question's numbers are a JSON block of this page or, where the
// page has no room, a script beside it. Numbers are whole thousandths; a triple is an estimate with the low and the
// high end of its 95 % interval. Text from models enters the page by textContent only.
const byId = (id) => document.getElementById(id);
const HEAD = JSON.parse(byId("head").textContent);
const CHOICES = {
  colour: HEAD.measures.map((measure) => measure.key), teacher: HEAD.teachers, form: HEAD.forms, estimator: HEAD.estimators,
};
const [EXIT, LEAF] = [-1, -2];  // children that are no node: off the paths, and the end of one
const chosen = {question: 0, colour: 0, teacher: 0, form: 0, estimator: HEAD.estimator};
const received = new Map();     // question number -> its numbers
let shown = null;               // the numbers of the question on the page
let opened = null;              // {path, t} of the open node

// Numbers

const NONE = "\u2013";
const exact = (value) => value === null || value === undefined ? null : {at: value / 1000};
function triple(values, row) {
  if (row === undefined || row < 0 || values[3 * row] === null) return null;
  const [at, low, high] = values.slice(3 * row, 3 * row + 3).map((value) => value === null ? null : value / 1000);
  return {at, low, high};
}
const written = (value) => value.toFixed(3).replace(/^-0\.000$/, "0.000").replace("-", "\u2212");
function whole(x) {
  if (!x) return NONE;
  const bounded = x.low !== undefined && x.low !== null;
  return written(x.at) + (bounded ? ` [${written(x.low)}, ${written(x.high)}]` : "");
}
const probability = (value) => value === 0 ? "< .001" : whole(exact(value));
const estimates = () => shown.estimators[chosen.estimator];
const decides = (node) => Boolean(estimates() && estimates().rowOf.has(node));

// A number at a node and an edge from it, under the choices made: {at, low, high}, {at} where exact, null where unknown.
function measured(key, node, edge, {teacher, form} = chosen) {
  const from = estimates();
  if (key in shown.teachers[teacher]) return exact(shown.teachers[teacher][key][node]);
  if (!from) return null;
  if (key === "p_succ") return triple(from.success, edge);
  const columns = {alignment: from.alignment[form][teacher], advantage: from.advantage[teacher]};
  return triple(columns[key] || from[key], from.rowOf.get(node));
}

// Elements

function element(tag, text, attributes = {}, space = "http://www.w3.org/1999/xhtml") {
  const made = document.createElementNS(space, tag);
  if (text !== null) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(name, value);
  return made;
}
const drawn = (tag, attributes, text = null) => element(tag, text, attributes, "http://www.w3.org/2000/svg");
const oneLine = (text) => text.replace(/\n/g, "");
const word = (edge) => element("bdi", oneLine(shown.edges.text[edge]), {class: "word"});

// A table in a box that scrolls, under its caption; cells are text or elements.
function table(caption, heads, rows, marked = () => false) {
  const made = element("table", null), figure = element("figure", null);
  const top = made.appendChild(element("thead", null)).appendChild(element("tr", null));
  for (const head of heads) top.appendChild(element("th", null, {scope: "col"})).append(head);
  const body = made.appendChild(element("tbody", null));
  rows.forEach((row, index) => {
    const line = body.appendChild(element("tr", null, {class: marked(index) ? "chosen" : null}));
    row.forEach((cell, column) => {
      line.appendChild(column ? element("td", null) : element("th", null, {scope: "row"})).append(cell);
    });
  });
  figure.append(element("figcaption", caption, {class: "note"}), scrolling(made, caption));
  return figure;
}

function scrolling(content, label) {
  const box = element("div", null, {class: "scroll", tabindex: 0, role: "region", "aria-label": label});
  box.append(content);
  return box;
}

// Addresses: a node and the choices made, so that a link shows to others what it shows here

function address(path, t) {
  const choices = Object.entries(CHOICES).map(([name, values]) => [name, values[chosen[name]]]);
  return "#" + new URLSearchParams([["q", HEAD.questions[chosen.question].id], ["path", path], ["t", t], ...choices]);
}

function follow() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const question = HEAD.questions.findIndex(({id}) => id === asked.get("q"));
  if (question < 0) return;
  byId("question").value = chosen.question = question;
  for (const [name, values] of Object.entries(CHOICES)) {
    if (values.includes(asked.get(name))) byId(name).value = chosen[name] = values.indexOf(asked.get(name));
  }
  show(() => openNode(Number(asked.get("path")), Number(asked.get("t"))));
}

// Questions

function receive(number, block) {
  for (const from of block.estimators) if (from) from.rowOf = new Map(from.decisions.map((node, row) => [node, row]));
  received.set(number, block);
}

function load(number, then) {
  const file = HEAD.questions[number].file;
  if (!file && !received.has(number)) receive(number, JSON.parse(byId(`question-${number}`).textContent));
  if (received.has(number)) return then();
  const script = element("script", null, {src: file});
  script.addEventListener("load", then);
  script.addEventListener("error", () => {
    byId("stage").textContent = `${file} could not be read: it belongs beside this page.`;
  });
  document.head.append(script);
}

function show(then = () => {}) {
  const number = chosen.question;
  load(number, () => {
    if (number !== chosen.question) return;  // another was chosen while this one was read
    if (shown !== received.get(number)) {
      shown = received.get(number);
      closeNode();
      renderQuestion();
    }
    paint();
    then();
  });
}

function renderQuestion() {
  const [initial, targeted] = shown.rollouts;
  const prompt = element("div", null, {class: "prompt", tabindex: 0, role: "region", "aria-label": "Prompt"});
  prompt.append(element("bdi", shown.prompt));
  const rate = `Pass rate ${whole(triple(shown.pass_rate, 0))} over ${initial} rollouts; ${targeted} more were launched.`;
  const facts = element("p", `${rate} Gold answer `, {class: "meta"});
  facts.append(element("bdi", shown.gold));
  const sides = element("div", null, {class: "sides"});
  for (const correct of [true, false]) {
    const side = sides.appendChild(element("div", null));
    side.append(element("h3", correct ? "correct" : "incorrect", {class: correct ? "good" : "bad"}));
    for (const path of shown.paths.filter((path) => path.correct === correct)) side.append(...renderPath(path));
  }
  byId("stage").replaceChildren(prompt, facts, sides);
}

function renderPath(path) {
  const title = element("h4", `path ${path.path} `);
  const length = `${path.nodes.length} tokens${path.cut ? ", cut off at the token limit" : ""}`;
  title.append(element("span", length, {class: "meta"}));
  const line = element("div", null, {
    class: "path", dir: "ltr", role: "listbox", "aria-orientation": "horizontal", "data-path": path.path,
    "aria-label": `${path.correct ? "correct" : "incorrect"} path ${path.path}`,
  });
  path.edges.forEach((edge, t) => {
    line.append(path.gaps[t], element("bdi", shown.edges.text[edge], {role: "option", "data-t": t, tabindex: t ? -1 : 0}));
  });
  return [title, line];
}

// Colours

const pathOf = (line) => shown.paths.find((path) => path.path === Number(line.dataset.path));

function paint() {
  const measure = HEAD.measures[chosen.colour];
  for (const line of document.querySelectorAll(".path")) {
    const path = pathOf(line);
    [...line.children].forEach((token, t) => {
      token.className = colourOf(measured(measure.key, path.nodes[t], path.edges[t]), measure.high);
    });
  }
  byId("legend").replaceChildren(...legend(measure));
  mark();
  if (opened) renderNode();
  if (byId("nodes").open) renderTable();
}

// One of eleven colours, a5 at 0; pale where the interval holds 0.
function colourOf(value, high) {
  if (!value) return "";
  const share = Math.max(-1, Math.min(1, value.at / high)), bounded = value.low !== undefined && value.low !== null;
  return `a${5 + Math.round(5 * share)}${bounded && value.low <= 0 && value.high >= 0 ? " unsure" : ""}`;
}

function legend({name, unit, low, high, words}) {
  const first = low < 0 ? 0 : 5;  // of the eleven colours; a one-sided scale has the upper half
  const colours = Array.from({length: 11 - first}, (_, step) => element("i", null, {class: `a${first + step}`}));
  const [start, end] = [low, high].map((value) => String(value).replace("-", "\u2212"));
  const meaning = `${name}, ${unit}; pale: the interval holds 0; no colour: unknown or no decision node`;
  const texts = [`${words[0]} ${start}`, `${end} ${words[1]}`, meaning].map((text) => element("span", text));
  return [texts[0], ...colours, texts[1], texts[2]];
}

// The opened token, and the same node on other paths: paths share nodes until they part.
function mark() {
  for (const token of document.querySelectorAll(".path [aria-selected]")) {
    token.removeAttribute("aria-selected");
    token.classList.remove("here");
  }
  if (!opened) return;
  for (const line of document.querySelectorAll(".path")) {
    const path = pathOf(line), token = line.children[path.nodes.indexOf(opened.path.nodes[opened.t])];
    if (!token) continue;
    token.setAttribute("aria-selected", path === opened.path);
    token.classList.add("here");
  }
}

function read(token) {
  const path = pathOf(token.parentElement), t = Number(token.dataset.t), [node, edge] = [path.nodes[t], path.edges[t]];
  const {key, name} = HEAD.measures[chosen.colour];
  const parts = [`P ${probability(shown.edges.p[edge])}`, `P_succ after it ${whole(measured("p_succ", node, edge))}`];
  if (key !== "p_succ") parts.push(`${name} ${whole(measured(key, node, edge))}`);
  byId("reading").replaceChildren(word(edge), ` token ${t} of path ${path.path}: ${parts.join(", ")}`);
}
