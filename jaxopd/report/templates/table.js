// The table of a question's nodes, its order and its file

const ROWS = 1000;  // on the page; the CSV file holds all
const at = (key) => (path, t) => measured(key, path.nodes[t], path.edges[t]);
// Heading, cell, and whether the cell has an interval.
const COLUMNS = [
  ["path", (path) => path.path],
  ["t", (path, t) => t],
  ["token", (path, t) => oneLine(shown.edges.text[path.edges[t]])],
  ["outcome", (path) => path.correct ? "correct" : "incorrect"],
  ["decision", (path, t) => decides(path.nodes[t]) ? "yes" : "no"],
  ["visits", (path, t) => shown.nodes.visits[path.nodes[t]]],
  ["P", (path, t) => exact(shown.edges.p[path.edges[t]])],
  ["Q", (path, t) => exact(shown.edges.q[chosen.teacher][path.edges[t]])],
  ["P_succ", at("p_succ"), true], ["value", at("value"), true], ["success range", at("success_range"), true],
  ["alignment", at("alignment"), true], ["advantage", at("advantage"), true],
  ["reverse KL", at("reverse_kl")], ["JS", at("js")], ["entropy gap", at("entropy_gap")],
];
let order = {column: 1, down: false};
const sortable = (cell) => cell !== null && typeof cell === "object" ? cell.at : cell;

function nodeRows() {
  const rows = shown.paths.flatMap((path) => path.nodes.map((node, t) => ({path, t, node})))
    .filter(({node}) => !byId("decisions").checked || decides(node))
    .map(({path, t}) => COLUMNS.map(([, cell]) => cell(path, t)));
  const key = (row) => sortable(row[order.column]), sense = order.down ? -1 : 1;
  return rows.sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === null || b === null) return (a === null) - (b === null);  // unknown last, whichever way
    return sense * (typeof a === "string" ? a.localeCompare(b) : a - b);
  });
}

function renderTable() {
  const rows = nodeRows();
  const cells = rows.slice(0, ROWS).map((row) => row.map((cell, column) => {
    if (COLUMNS[column][0] !== "token") return cell === null || typeof cell === "object" ? whole(cell) : String(cell);
    const link = element("a", null, {href: address(row[0], row[1])});
    link.append(element("bdi", cell, {class: "word"}));
    return link;
  }));
  const count = rows.length > ROWS ? `${ROWS} of ${rows.length} rows; the CSV file holds all` : `${rows.length} rows`;
  const heads = COLUMNS.map(([name], column) => {
    const button = element("button", name + (column !== order.column ? "" : order.down ? " ▼" : " ▲"), {type: "button"});
    button.addEventListener("click", () => sortBy(column));
    return button;
  });
  const made = table(`Nodes of this question: ${count}`, heads, cells);
  made.querySelectorAll("thead th")[order.column].setAttribute("aria-sort", order.down ? "descending" : "ascending");
  byId("table").replaceChildren(made);
}

function sortBy(column) {
  order = {column, down: column === order.column && !order.down};
  renderTable();
  byId("table").querySelectorAll("thead button")[column].focus();
}

function csv() {
  const names = COLUMNS.flatMap(([name, , bounded]) => bounded ? [name, `${name} low`, `${name} high`] : [name]);
  const numbers = (row) => row.flatMap((cell, column) => {
    return COLUMNS[column][2] ? [cell?.at, cell?.low, cell?.high] : [sortable(cell)];
  });
  const choices = ["teacher", "form", "estimator"];
  const facts = [HEAD.questions[chosen.question].id, ...choices.map((name) => CHOICES[name][chosen[name]])];
  const lines = [["question", ...choices, ...names], ...nodeRows().map((row) => [...facts, ...numbers(row)])];
  return lines.map((line) => line.map(field).join(",") + "\r\n").join("");
}

// A spreadsheet would run text that begins like a formula: an apostrophe keeps it text.
function field(cell) {
  if (typeof cell !== "string") return String(cell ?? "");
  return `"${cell.replace(/^[=+\-@\t\r]/, "'$&").replace(/"/g, '""')}"`;
}

function download() {
  const link = element("a", null, {href: URL.createObjectURL(new Blob([csv()], {type: "text/csv"})), download: "nodes.csv"});
  link.click();
  URL.revokeObjectURL(link.href);
}
