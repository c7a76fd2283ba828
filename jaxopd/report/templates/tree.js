// The generation tree around a node: levels above it, its candidates, and a level below those that paths go on through.

const ABOVE = 2;      // levels
const SIBLINGS = 5;   // candidates drawn at the other nodes
const [ROW, COLUMN, LABEL] = [36, 232, 40];  // pixels: between branches, between levels, from a node to a branch's label

function drawTree(path, t) {
  const top = Math.max(0, t - ABOVE), joints = [];
  const x = (depth) => 14 + COLUMN * (depth - top);
  let rows = 0;
  const place = (node, depth) => {  // gives the node's height
    const onward = (edge) => depth < t ? edge === path.edges[depth] : continuations(edge, depth).length > 0;
    const branches = edgesOf(node).filter((edge, rank) => depth === t || rank < SIBLINGS || onward(edge)).map((edge) => {
      const grows = depth <= t && onward(edge) && shown.edges.child[edge] >= 0;
      return {edge, depth, y: grows ? place(shown.edges.child[edge], depth + 1) : ROW * (0.7 + rows++)};
    });
    const y = (branches[0].y + branches[branches.length - 1].y) / 2;
    joints.push({branches, depth, y});
    return y;
  };
  place(path.nodes[top], top);
  const size = {width: x(t + 2) + 14, height: ROW * (rows + 0.4)};
  const svg = drawn("svg", {...size, role: "group", "aria-label": "Generation tree"});
  for (const {branches, depth, y} of joints.reverse()) {  // the topmost first, for the tab key
    for (const branch of branches) svg.append(drawBranch(branch, x(depth), y, x(depth + 1)));
    svg.append(drawn("circle", {cx: x(depth), cy: y, r: depth === t ? 7 : 4, class: depth === t ? "root" : "joint"}));
  }
  return svg;
}

// Width shows P, colour P_succ; a dashed branch leaves the paths, a link goes on as one, a square is the end of one.
function drawBranch({edge, depth, y}, x0, y0, x1) {
  const success = measured("p_succ", null, edge), child = shown.edges.child[edge], p = shown.edges.p[edge];
  const launches = shown.edges.launches && shown.edges.launches[edge], [next] = continuations(edge, depth);
  const made = next ? drawn("a", {href: address(next.path, depth + 1)}) : drawn("g", {});
  const text = oneLine(shown.edges.text[edge]), letters = [...text], bend = x0 + LABEL / 2, from = x0 + LABEL;
  const line = drawn("path", {
    d: `M${x0} ${y0}C${bend} ${y0} ${bend} ${y} ${from} ${y}H${x1 - (child === EXIT ? 16 : 0)}`,
    "stroke-width": 1 + 5 * Math.sqrt(p / 1000), class: child === EXIT ? "branch exit" : "branch",
  });
  if (success) line.style.stroke = `color-mix(in oklab, var(--good) ${100 * success.at}%, var(--bad))`;
  const label = drawn("text", {x: from, y: y - 6});
  label.append(drawn("tspan", {class: "token"}, letters.length > 12 ? letters.slice(0, 11).join("") + "\u2026" : text),
    drawn("tspan", {class: "meta", dx: 6}, `P ${probability(p)}`));
  const found = success ? whole(success) : "P_succ unknown", goesOn = next ? `; goes on as path ${next.path}` : "";
  const below = drawn("text", {x: from, y: y + 15, class: "meta"}, found + (launches ? `, ${launches} launched` : ""));
  const title = drawn("title", {}, `${text}: P ${probability(p)}, P_succ ${whole(success)}${goesOn}`);
  made.append(title, line, label, below);
  const won = success && success.at > 0.5;
  if (child === LEAF) made.append(drawn("rect", {x: x1 - 5, y: y - 5, width: 10, height: 10, class: won ? "won" : "lost"}));
  return made;
}
