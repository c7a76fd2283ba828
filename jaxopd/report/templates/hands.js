// What keys, pointer and controls do

function focusToken(token) {
  const stop = token.parentElement.querySelector('[tabindex="0"]');
  if (stop) stop.tabIndex = -1;
  token.tabIndex = 0;
  token.focus();
}

function neighbour(token, key) {
  const tokens = [...token.parentElement.children], here = tokens.indexOf(token), nodes = pathOf(token.parentElement).nodes;
  const to = {
    ArrowRight: () => here + 1, ArrowLeft: () => here - 1, Home: () => 0, End: () => tokens.length - 1,
    ArrowDown: () => nodes.findIndex((node, t) => t > here && decides(node)),
    ArrowUp: () => nodes.findLastIndex((node, t) => t < here && decides(node)),
  }[key];
  return to && tokens[to()];
}

const tokenOf = (event) => event.target.closest ? event.target.closest(".path bdi") : null;
const openToken = (token) => { location.hash = address(token.parentElement.dataset.path, token.dataset.t); };
const remember = () => history.replaceState(null, "", opened ? address(opened.path.path, opened.t) : "#explorer");

document.addEventListener("keydown", (event) => {
  const token = tokenOf(event), other = token && neighbour(token, event.key);
  if (event.key === "Escape" && opened) {
    closeNode();
    remember();
  } else if (token && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    openToken(token);
  } else if (other) {
    event.preventDefault();
    focusToken(other);
  }
});
const onToken = (kind, act) => document.addEventListener(kind, (event) => { if (tokenOf(event)) act(tokenOf(event)); });
onToken("click", openToken);
onToken("pointerover", read);
onToken("focusin", read);
for (const name of ["question", ...Object.keys(CHOICES)]) {
  byId(name).addEventListener("change", (event) => {
    chosen[name] = Number(event.target.value);
    show(remember);
  });
}
byId("decisions").addEventListener("change", renderTable);
byId("nodes").addEventListener("toggle", () => { if (byId("nodes").open) renderTable(); });
byId("csv").addEventListener("click", download);
addEventListener("hashchange", follow);
if (HEAD.questions.length) show(follow);
