// The script of report.py's page: themes, sorting, grids with hints, the gallery. It asks nothing of any network.
"use strict";
const $ = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const make = (name, properties = {}) => Object.assign(document.createElement(name), properties);
const announce = words => { $("#live").textContent = words; };
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// ---- light and dark
const page = document.documentElement, prefersDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (page.dataset.theme || (prefersDark.matches ? "dark" : "light")) === "dark";
const nameTheme = () => { $("#theme").textContent = isDark() ? "Light" : "Dark"; };
$("#theme").hidden = false;
$("#theme").addEventListener("click", () => {
  page.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
});
prefersDark.addEventListener("change", nameTheme);
nameTheme();

// ---- tables: a column's name sorts by it, once more the other way, a third time as it was; rows of means (bold) stay below
const firstOrder = new WeakMap();
all("tbody tr").forEach((row, number) => firstOrder.set(row, number));
const isMean = row => Boolean($("th strong", row));

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
  all("th[aria-sort]", head.parentNode).forEach(other => other.setAttribute("aria-sort", other === head ? order : "none"));
  announce(order === "none" ? "In the original order" : `Sorted by ${button.textContent}, ${order}`);
}
all("th[aria-sort] button").forEach(button => button.addEventListener("click", () => sortBy(button)));

// ---- grids: hints on hover, by tapping and by arrow keys
function showTip(cell) {
  const row = cell.parentNode.cells[0].textContent, column = cell.closest("table").tHead.rows[0].cells[cell.cellIndex];
  const words = `${row} · ${column.textContent}: ${cell.textContent}`, hint = cell.dataset.hint, tip = $("#tip");
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
const moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -1e4], End: [0, 1e4],
  PageUp: [-1e4, 0], PageDown: [1e4, 0]};
for (const grid of all("table[role=grid]")) {
  const body = grid.tBodies[0];
  for (const cell of all("td", body)) cell.tabIndex = -1;
  if ($("td", body)) $("td", body).tabIndex = 0;
  body.addEventListener("keydown", event => {
    const cell = event.target.closest("td"), move = moves[event.key];
    if (event.key === "Escape") hideTip();
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
  body.addEventListener("mouseover", event => { const cell = event.target.closest("td"); if (cell) showTip(cell); });
  body.addEventListener("mouseleave", hideTip);
}
addEventListener("scroll", () => {
  const cell = document.activeElement.closest("table[role=grid] td");
  if (cell && $("#tip").textContent) showTip(cell); else hideTip();
}, {passive: true, capture: true});
addEventListener("keydown", event => { if (event.key === "Escape") hideTip(); });

// ---- the gallery: a picture's maps are decoded when it is chosen
const heat = [[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 142, 9],
  [249, 203, 53], [252, 255, 164]];  // as in saliency.py: lightness grows evenly

// A map's value v and the slider t in [0, 1] -> colour and opacity: at ½ the salient parts alone cover the picture.
function colours(t, alone) {
  const table = new Uint32Array(256), bytes = new Uint8Array(table.buffer);
  for (let level = 0; level < 256; level++) {
    const v = level / 255, at = Math.min(v * (heat.length - 1), heat.length - 1.000001), k = Math.floor(at);
    const opacity = alone ? 1 : t < .5 ? 2 * t * v : v + (2 * t - 1) * (1 - v);
    const colour = heat[k].map((low, channel) => low + (at - k) * (heat[k + 1][channel] - low));
    bytes.set([...colour, 255 * opacity].map(Math.round), 4 * level);
  }
  return table;
}
async function decoded(uri) {
  const image = make("img", {src: uri});
  await image.decode();
  return image;
}
function startGallery() {
  const sets = JSON.parse($("#gallery-sets").textContent), film = $("#film"), state = {set: 0, picture: 0, turn: 0};
  const stored = (set, picture) => JSON.parse($(`#picture-${set}-${picture}`).textContent);
  const seen = new IntersectionObserver(entries => entries.filter(entry => entry.isIntersecting).forEach(({target}) => {
    const item = stored(state.set, target.dataset.picture);
    if (item.picture) $("img", target).src = item.picture;
    seen.unobserve(target);
  }), {root: film, rootMargin: "0px 300px"});

  const canvasOf = set => make("canvas", {width: 2 * sets[set].width, height: 2 * sets[set].height, role: "img"});

  function chooseSet(number) {
    state.set = number;
    seen.disconnect();
    film.replaceChildren(...sets[number].pictures.map((picture, p) => {
      const item = make("li", {id: `film-${p}`, role: "option", title: picture.name});
      item.setAttribute("aria-label", `${p + 1}: ${picture.name}`);
      item.dataset.picture = p;
      item.append(make("img", {alt: "", width: 68, height: 68}), String(p + 1));
      seen.observe(item);
      return item;
    }));
    $("#second").disabled = !sets[number].second;
    const tiles = sets[number].networks.map(network => {
      const tile = make("li"), words = make("p", {textContent: network.name + " "});
      words.append(make("small", {textContent: network.type}));
      tile.append(canvasOf(number), words);
      return tile;
    });
    const own = make("li");
    own.append(canvasOf(number), make("p", {textContent: "Picture"}));
    $("#tiles").replaceChildren(own, ...tiles);
    choose(0);
  }

  async function choose(number) {
    const set = sets[state.set], turn = ++state.turn;
    state.picture = clamp(number, 0, set.pictures.length - 1);
    const picture = set.pictures[state.picture], item = stored(state.set, state.picture);
    all("[aria-selected=true]", film).forEach(other => other.setAttribute("aria-selected", "false"));
    const option = $(`#film-${state.picture}`);
    option.setAttribute("aria-selected", "true");
    film.setAttribute("aria-activedescendant", option.id);
    film.scrollLeft = option.offsetLeft - film.offsetLeft - (film.clientWidth - option.offsetWidth) / 2;
    $("#previous").disabled = state.picture === 0;
    $("#next").disabled = state.picture === set.pictures.length - 1;
    $("#which").textContent = `${state.picture + 1} of ${set.pictures.length}: ${picture.name}`;
    $("#about").replaceChildren(...picture.properties.map(([name, value]) => {
      const pair = make("div");
      pair.append(make("dt", {textContent: name}), make("dd", {textContent: value}));
      return pair;
    }));
    const second = $("#second").checked && item.second;
    const [own, maps] = await Promise.all([item.picture && decoded(item.picture), decoded(second || item.maps)]);
    if (turn !== state.turn) return;
    const sprite = make("canvas", {width: maps.naturalWidth, height: maps.naturalHeight});
    const sheet = sprite.getContext("2d", {willReadFrequently: true});
    sheet.drawImage(maps, 0, 0);
    const {width, height} = set, across = maps.naturalWidth / width;
    state.own = own;
    state.levels = set.networks.map((_, k) =>
      sheet.getImageData(k % across * width, Math.floor(k / across) * height, width, height).data);
    draw();
    document.body.dataset.shown = `${state.set}-${state.picture}`;
  }

  function draw() {
    const set = sets[state.set], picture = set.pictures[state.picture], table = colours($("#overlay").value / 100, !state.own);
    const canvases = all("#tiles canvas");
    canvases.forEach((canvas, tile) => {
      const context = canvas.getContext("2d"), k = tile - 1, {width, height} = canvas;
      context.clearRect(0, 0, width, height);
      if (state.own) context.drawImage(state.own, 0, 0, width, height);
      const ownName = state.own ? picture.name : "The picture is not here";
      canvas.setAttribute("aria-label", tile ? `Saliency map of ${set.networks[k].name}, ${picture.name}` : ownName);
      if (!tile || picture.blank.includes(k)) return;
      const pixels = new ImageData(set.width, set.height), target = new Uint32Array(pixels.data.buffer), levels = state.levels[k];
      for (let i = 0; i < target.length; i++) target[i] = table[levels[4 * i]];
      const layer = make("canvas", {width: set.width, height: set.height});
      layer.getContext("2d").putImageData(pixels, 0, 0);
      context.drawImage(layer, 0, 0, width, height);
    });
    $("#overlay").setAttribute("aria-valuetext", `${$("#overlay").value} per cent`);
  }

  $("#set").replaceChildren(...sets.map(({label, pictures}, number) =>
    make("option", {value: number, textContent: `${label} (${pictures.length})`})));
  $("#set").addEventListener("change", event => chooseSet(Number(event.target.value)));
  $("#previous").addEventListener("click", () => { choose(state.picture - 1); announce($("#which").textContent); });
  $("#next").addEventListener("click", () => { choose(state.picture + 1); announce($("#which").textContent); });
  $("#second").addEventListener("change", () => choose(state.picture));
  $("#overlay").addEventListener("input", draw);
  film.addEventListener("click", event => {
    const item = event.target.closest("li");
    if (item) choose(Number(item.dataset.picture));
  });
  film.addEventListener("keydown", event => {
    const far = sets[state.set].pictures.length;
    const steps = {ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, PageUp: -10, PageDown: 10, Home: -far, End: far};
    if (!(event.key in steps)) return;
    event.preventDefault();
    choose(state.picture + steps[event.key]);
  });
  chooseSet(0);
}
if ($("#gallery-sets")) startGallery();
document.body.dataset.ready = "yes";
