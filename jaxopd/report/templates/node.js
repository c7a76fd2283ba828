// The chosen node: its tree, its candidates, the teachers and the forms there

const TREE_CAPTION = "The generation tree around this node. Line width: P; colour: P_succ, from orange to blue; dashed: " +
  "leaves the paths; square: end of a path. Numbers: P_succ, and rollouts launched there.";
const SIGN_CAPTION = "▲ raises the token, ▼ lowers it, blue as the ideal gradient does, orange against it. " +
  "A dash: P_succ is not known well enough, or the run did not record it.";
const SIGNS = {
  "+": {arrow: "▲", meaning: "raises", sense: 1},
  "-": {arrow: "▼", meaning: "lowers", sense: -1},
  "0": {arrow: "0", meaning: "leaves", sense: 0},
};

function openNode(number, t) {
  const path = shown.paths.find((path) => path.path === number);
  if (!path || !(t in path.nodes)) return;
  opened = {path, t};
  renderNode();
  mark();
  const token = document.querySelector(`.path[data-path="${number}"] [data-t="${t}"]`);
  read(token);
  focusToken(token);
}

function closeNode() {
  opened = null;
  byId("node").hidden = true;
  mark();
}

function edgesOf(node) {
  const [first, end] = shown.nodes.first.slice(node, node + 2);
  return Array.from({length: end - first}, (_, k) => first + k);
}

// The paths that go on through an edge at depth t.
function continuations(edge, t) {
  const child = shown.edges.child[edge];
  return child < 0 ? [] : shown.paths.filter((path) => path.nodes[t + 1] === child);
}

function renderNode() {
  const {path, t} = opened, node = path.nodes[t];
  const title = element("h3", `Token ${t} of path ${path.path}: `, {id: "node-title"});
  title.append(word(path.edges[t]));
  const facts = element("p", nodeFacts(node) + " ", {class: "meta"});
  facts.append(element("a", "Link to this node", {href: address(path.path, t)}));
  const tree = scrolling(drawTree(path, t), "Generation tree around the node"), figure = element("figure", null);
  figure.append(element("figcaption", TREE_CAPTION, {class: "note"}), tree);
  byId("node").replaceChildren(title, facts, figure, candidateTable(path, t), teacherTable(node), formTable(node));
  byId("node").hidden = false;
  tree.scrollLeft = Math.min(t, ABOVE) * COLUMN - LABEL;  // on a narrow screen, begin at the node itself
}

function nodeFacts(node) {
  const kind = decides(node) ? "Decision node" : estimates() ? "Not a decision node" : "This estimator was not run here";
  const stakes = `value ${whole(measured("value", node))}, success range ${whole(measured("success_range", node))}`;
  const entropy = `student entropy ${whole(exact(shown.nodes.entropy[node]))} nats`;
  return `${kind}: ${stakes}, ${shown.nodes.visits[node]} visits, ${entropy}.`;
}

function candidateTable(path, t) {
  const {p, q, visits, launches} = shown.edges, from = estimates(), edges = edgesOf(path.nodes[t]);
  const rows = edges.map((edge) => {
    const row = from ? from.known.indexOf(edge) : -1, ideal = row < 0 ? null : triple(from.ideal, row);
    const letters = row < 0 ? "" : from.signs[row].slice(chosen.teacher * HEAD.forms.length);
    return [
      word(edge), onward(edge, t), probability(p[edge]), probability(q[chosen.teacher][edge]), String(visits[edge]),
      launches ? String(launches[edge]) : NONE, whole(measured("p_succ", null, edge)), whole(ideal),
      ...HEAD.forms.map((_, form) => sign(letters[form], ideal)),
    ];
  });
  const forms = HEAD.forms.map((name) => name.replaceAll("_", "_\u200b"));  // may break there: the table is wide
  const heads = ["next token", "goes on as", "P", "Q", "visits", "launches", "P_succ", "ideal gradient", ...forms];
  const caption = `Candidates, with Q and gradient signs of ${HEAD.teachers[chosen.teacher]}. ${SIGN_CAPTION}`;
  return table(caption, heads, rows, (index) => edges[index] === path.edges[t]);
}

// Where an edge leads: to the end of a path, or to links to the paths that go on through it.
function onward(edge, t) {
  const made = element("span", shown.edges.child[edge] === LEAF ? "end of a path" : "");
  for (const path of continuations(edge, t)) {
    const link = {href: address(path.path, t + 1), class: path.correct ? "good" : "bad"};
    made.append(element("a", `path ${path.path}`, link), " ");
  }
  return made;
}

function sign(letter, ideal) {
  if (!(letter in SIGNS)) return NONE;
  const {arrow, meaning, sense} = SIGNS[letter], decided = ideal && ideal.at && sense;
  const agrees = decided && Math.sign(ideal.at) === sense;
  const spoken = decided ? `${meaning}, ${agrees ? "as" : "against"} ideal` : meaning;
  return element("span", arrow, {class: decided ? agrees ? "good" : "bad" : null, role: "img", "aria-label": spoken});
}

function teacherTable(node) {
  const keys = ["alignment", "advantage", "reverse_kl", "js", "entropy_gap"];
  const numbers = (teacher) => keys.map((key) => whole(measured(key, node, null, {...chosen, teacher})));
  const rows = HEAD.teachers.map((name, teacher) => [name, ...numbers(teacher)]);
  const heads = ["teacher", "alignment", "advantage", "reverse KL, nats", "JS, nats", "entropy gap, nats"];
  const caption = `Teachers at this node; alignment of ${HEAD.forms[chosen.form]}`;
  return table(caption, heads, rows, (index) => index === chosen.teacher);
}

function formTable(node) {
  const rows = HEAD.forms.map((name, form) => [name, whole(measured("alignment", node, null, {...chosen, form}))]);
  const caption = `Gradient forms of ${HEAD.teachers[chosen.teacher]} at this node`;
  return table(caption, ["form", "alignment"], rows, (index) => index === chosen.form);
}
