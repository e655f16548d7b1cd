// The script of report.py's page: themes, sorting, grids, charts, the gallery. It asks nothing of a network.
"use strict";
const $ = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const make = (name, properties = {}) => Object.assign(document.createElement(name), properties);
const announce = words => { $("#live").textContent = words; };
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// ---- light and dark: as the reader's system has it, until the button is pressed
const page = document.documentElement, button = $("#theme");
const system = matchMedia("(prefers-color-scheme: dark)");
function setTheme(dark) {
  page.dataset.theme = dark ? "dark" : "light";
  button.textContent = dark ? "Light" : "Dark";
}
setTheme(system.matches);
system.addEventListener("change", () => setTheme(system.matches));
button.hidden = false;
button.addEventListener("click", () => setTheme(page.dataset.theme === "light"));

// ---- tables: a column's name sorts by it, then the other way, then as it was; means (bold) stay below
const firstOrder = new WeakMap();
all("tbody tr").forEach((row, number) => firstOrder.set(row, number));
const isMean = row => Boolean($("th.bold", row));

function sortBy(button) {
  const head = button.closest("th"), body = head.closest("table").tBodies[0], column = head.cellIndex;
  const rows = [...body.rows], numeric = rows.some(row => row.cells[column].dataset.value !== undefined);
  const orders = ["none", ...(numeric ? ["descending", "ascending"] : ["ascending", "descending"])];
  const order = orders[(orders.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
  const key = row => numeric ? row.cells[column].dataset.value : row.cells[column].textContent;
  rows.sort((a, b) => {
    const [x, y] = [key(a), key(b)], empty = (x === undefined || x === "") - (y === undefined || y === "");
    const compared = numeric ? x - y : String(x).localeCompare(y, "en", {numeric: true});
    return order === "none" ? firstOrder.get(a) - firstOrder.get(b) : isMean(a) - isMean(b)
      || empty || (order === "ascending" ? compared : -compared) || firstOrder.get(a) - firstOrder.get(b);
  });
  body.append(...rows);
  for (const other of all("th[aria-sort]", head.parentNode)) other.ariaSort = other === head ? order : "none";
  announce(order === "none" ? "In the original order" : `Sorted by ${button.textContent}, ${order}`);
}
all("th[aria-sort] button").forEach(button => button.addEventListener("click", () => sortBy(button)));

// ---- grids: hints on hover, by tapping and by arrow keys
function showTip(cell) {
  const row = cell.parentNode.cells[0].textContent;
  const column = cell.closest("table").tHead.rows[0].cells[cell.cellIndex];
  const words = `${row} · ${column.textContent}: ${cell.textContent}`;
  const {hint} = cell.dataset, tip = $("#tip");
  tip.textContent = hint ? `${words}\n${hint}` : words;
  all(".at").forEach(other => other.classList.remove("at"));
  column.classList.add("at");
  const place = cell.getBoundingClientRect(), size = tip.getBoundingClientRect();
  tip.style.left = clamp(place.x + place.width / 2 - size.width / 2, 8, innerWidth - size.width - 8) + "px";
  tip.style.top = (place.y > size.height + 12 ? place.y - size.height - 8 : place.bottom + 8) + "px";
  return hint ? `${words}. ${hint}` : words;
}
function hideTip() {
  $("#tip").textContent = "";
  all(".at").forEach(other => other.classList.remove("at"));
}
const moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
  Home: [0, -1e4], End: [0, 1e4], PageUp: [-1e4, 0], PageDown: [1e4, 0]};
for (const grid of all("table[role=grid]")) {
  const body = grid.tBodies[0];
  for (const cell of all("td", body)) cell.tabIndex = -1;
  if ($("td", body)) $("td", body).tabIndex = 0;
  body.addEventListener("keydown", event => {
    const cell = event.target.closest("td"), move = moves[event.key];
    if (!cell || !move || event.altKey || event.metaKey) return;
    const rows = [...body.rows], corner = event.ctrlKey && ["Home", "End"].includes(event.key);
    const down = corner ? move[1] : move[0];  // Ctrl+Home and Ctrl+End go to the first and last row as well
    const row = rows[clamp(rows.indexOf(cell.parentNode) + down, 0, rows.length - 1)];
    row.cells[clamp(cell.cellIndex + move[1], 1, row.cells.length - 1)].focus();
    event.preventDefault();
  });
  body.addEventListener("focusin", event => {
    const cell = event.target.closest("td");
    if (!cell) return;
    all("td[tabindex='0']", body).forEach(other => { other.tabIndex = -1; });
    cell.tabIndex = 0;
    cell.scrollIntoView({block: "nearest", inline: "nearest"});
    announce(showTip(cell));
  });
  body.addEventListener("focusout", hideTip);
  body.addEventListener("mouseover", event => {
    const cell = event.target.closest("td");
    if (cell) showTip(cell);
  });
  body.addEventListener("mouseleave", hideTip);
}
addEventListener("scroll", () => {
  const cell = document.activeElement.closest("table[role=grid] td");
  if (cell && $("#tip").textContent) showTip(cell); else hideTip();
}, {passive: true, capture: true});
addEventListener("keydown", event => { if (event.key === "Escape") hideTip(); });

// ---- charts: a click shows one as large as the window allows, another click or Escape puts it back
const large = make("dialog", {ariaLabel: "Enlarged chart"});
large.addEventListener("click", () => large.close());
document.body.append(large);
for (const chart of all("button.chart")) {
  chart.title = "Enlarge";
  chart.addEventListener("click", () => {
    large.className = chart.className;
    large.replaceChildren($("img", chart).cloneNode());
    large.showModal();
  });
}

// ---- the gallery: a picture's maps lie side by side in one grey image, decoded when the picture is chosen
function startGallery() {
  const groups = all("script.group").map(group => JSON.parse(group.textContent)), film = $("#film");
  const state = {group: 0, picture: 0, turn: 0};
  const stored = picture => JSON.parse($(`#picture-${state.group}-${picture}`).textContent);
  const seen = new IntersectionObserver(entries => {
    for (const {target} of entries.filter(entry => entry.isIntersecting)) {
      const {picture} = stored(target.dataset.picture);
      if (picture) $("img", target).src = picture;
      seen.unobserve(target);
    }
  }, {root: film, rootMargin: "0px 300px"});

  const heat = $("#heat").cloneNode(true);  // the slider's own: the opening's maps stay as they are
  heat.id = "heat-gallery";
  $("#heat").after(heat);

  function tile({name, type = ""}) {
    const item = make("li"), image = make("div", {className: "over", role: "img"});
    const words = make("p", {textContent: name + " "});
    image.append(make("img", {alt: ""}), make("canvas", {className: "map"}));
    words.append(make("small", {textContent: type}));
    item.append(image, words);
    return item;
  }

  function chooseGroup(number) {
    state.group = number;
    seen.disconnect();
    film.replaceChildren(...groups[number].names.map((name, p) => {
      const item = make("li", {id: `film-${p}`, role: "option", title: name, ariaLabel: `${p + 1}: ${name}`});
      item.dataset.picture = p;
      item.append(make("img", {alt: "", width: 68, height: 68}), String(p + 1));
      seen.observe(item);
      return item;
    }));
    $("#second").disabled = !stored(0).second;
    $("#tiles").replaceChildren(...[{name: "Picture"}, ...groups[number].networks].map(tile));
    choose(0);
  }

  async function choose(number) {
    const {names, networks} = groups[state.group], turn = ++state.turn;
    state.picture = clamp(number, 0, names.length - 1);
    const {name, properties, picture, maps, second, blank} = stored(state.picture);
    for (const option of all("li", film)) option.ariaSelected = String(option.id === `film-${state.picture}`);
    const option = $(`#film-${state.picture}`);
    film.setAttribute("aria-activedescendant", option.id);
    film.scrollLeft = option.offsetLeft - film.offsetLeft - (film.clientWidth - option.offsetWidth) / 2;
    $("#which").textContent = `${state.picture + 1} of ${names.length}: ${name}`;
    $("#about").replaceChildren(...properties.map(([key, value]) => {
      const pair = make("div");
      pair.append(make("dt", {textContent: key}), make("dd", {textContent: value}));
      return pair;
    }));
    const sheet = make("img", {src: $("#second").checked && second || maps});
    await sheet.decode();
    if (turn !== state.turn) return;
    const across = Math.ceil(Math.sqrt(networks.length)), down = Math.ceil(networks.length / across);
    const width = sheet.naturalWidth / across, height = sheet.naturalHeight / down;
    all("#tiles .over").forEach((image, place) => {
      const [own, map] = image.children, k = place - 1;  // the first tile is the picture itself
      image.ariaLabel = k < 0 ? name : `Saliency map of ${networks[k].name}, ${name}`;
      own.src = picture || "data:,";
      own.hidden = !picture;
      map.hidden = k < 0 || blank.includes(k);
      Object.assign(map, {width, height});
      const x = k % across * width, y = Math.floor(k / across) * height;
      map.getContext("2d").drawImage(sheet, x, y, width, height, 0, 0, width, height);
    });
    fade();
    document.body.dataset.shown = `${state.group}-${state.picture}`;
  }

  // Opacity of a map's value v at the slider's t: at ½ it is v, the salient parts alone cover the picture.
  function fade() {
    const slider = $("#overlay"), t = stored(state.picture).picture ? slider.value / 100 : 1;
    $("feFuncA", heat).setAttribute("tableValues", `${Math.max(0, 2 * t - 1)} ${Math.min(1, 2 * t)}`);
    slider.setAttribute("aria-valuetext", `${slider.value} per cent`);
  }

  $("#set").replaceChildren(...groups.map(({label, names}, number) =>
    make("option", {value: number, textContent: `${label} (${names.length})`})));
  $("#set").addEventListener("change", event => chooseGroup(Number(event.target.value)));
  $("#second").addEventListener("change", () => choose(state.picture));
  $("#overlay").addEventListener("input", fade);
  film.addEventListener("click", event => {
    const item = event.target.closest("li");
    if (item) choose(Number(item.dataset.picture));
  });
  film.addEventListener("keydown", event => {
    const far = groups[state.group].names.length;
    const steps = {ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, PageUp: -10, PageDown: 10,
      Home: -far, End: far};
    if (!(event.key in steps)) return;
    event.preventDefault();
    choose(state.picture + steps[event.key]);
  });
  chooseGroup(0);
}
if ($("script.group")) startGallery();
document.body.dataset.ready = "yes";
