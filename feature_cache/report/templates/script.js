"use strict";

const number = new Intl.NumberFormat("en");
const PAGE_ROWS = 300;

function make(tag, text = "", attributes = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function showCoverage(data) {
  const get = (id) => document.getElementById(id);
  const [choice, find, gaps, table, more, status] =
    ["space", "find", "gaps", "matrix", "more", "shown"].map(get);
  const haystack = data.movies.map((movie) => movie.names.join("\n").toLowerCase());
  let rows = [];
  let shown = 0;

  const space = () => data.spaces[choice.value];
  const columns = () => space().groups.flatMap((group) => group.columns);
  const lacks = (row, place) => {
    const { counts, expected, wanted } = space();
    return wanted[row][place] ? expected[row] - counts[row][place] : 0;
  };
  const missing = (row) => {
    if (space().expected[row] === null) return 0;
    return columns().reduce((sum, _, place) => sum + lacks(row, place), 0);
  };

  function head() {
    const top = make("tr");
    const below = make("tr");
    top.append(make("th", "Movie", { scope: "col", rowspan: 2, class: "name" }));
    top.append(make("th", "Frames", { scope: "col", rowspan: 2, class: "count" }));
    const three = { scope: "col", rowspan: 2, class: "count", title: "least / median / most" };
    top.append(make("th", "Regions a frame", three));
    top.append(make("th", "Missing", { scope: "col", rowspan: 2, class: "count" }));
    for (const group of space().groups) {
      const span = { scope: "colgroup", colspan: group.columns.length, class: "group" };
      top.append(make("th", group.label, span));
      group.columns.forEach((column, i) => {
        const style = i ? "cell" : "cell group";
        below.append(make("th", column.label, { scope: "col", title: column.draw, class: style }));
      });
    }
    table.tHead.replaceChildren(top, below);
  }

  function cell(row, place, first) {
    const { counts, expected, wanted } = space();
    const count = counts[row][place];
    const state = count === 0 ? "none" : count < expected[row] ? "part" : "full";
    const none = wanted[row][place] ? "0" : "-";
    const text = { none, part: `${count}/${expected[row]}`, full: "✓" }[state];
    return make("td", text, { class: `cell ${state}${first ? " group" : ""}` });
  }

  function line(row) {
    const { expected, groups } = space();
    const movie = data.movies[row];
    const tr = make("tr");
    const name = make("th", movie.names[0] || "(no name)", { scope: "row" });
    for (const other of movie.names.slice(1)) name.append(make("br"), make("small", `also ${other}`));
    const frames = make("td", number.format(movie.frames), { class: "count" });
    if (movie.versions) frames.append(make("br"), make("small", `${movie.versions} changed`));
    const regions = movie.regions ? movie.regions.map((count) => number.format(count)) : ["-"];
    tr.append(name, frames, make("td", regions.join(" / "), { class: "count" }));
    if (expected[row] === null) {
      const span = columns().length + 1;
      tr.append(make("td", "never seen with masks", { colspan: span, class: "none" }));
      return tr;
    }
    tr.append(gap(row, tr));
    let place = 0;
    for (const group of groups) {
      group.columns.forEach((_, i) => tr.append(cell(row, place++, i === 0)));
    }
    return tr;
  }

  function gap(row, tr) {
    const count = missing(row);
    const td = make("td", "", { class: "count" });
    if (!count) return td;
    const button = make("button", number.format(count), { type: "button", "aria-expanded": false });
    button.append(make("span", " missing: show how to warm", { class: "unseen" }));
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") === "true";
      button.setAttribute("aria-expanded", !open);
      if (open) tr.nextSibling.remove();
      else tr.after(advice(row));
    });
    td.append(button);
    return td;
  }

  function advice(row) {
    const td = make("td", "", { colspan: columns().length + 4 });
    const commands = commandsFor(row);
    for (const command of commands) td.append(make("code", command, { class: "command" }));
    if (!commands.length) {
      td.textContent = "Made from arrays, downscaled or with a policy of its own: warm it where it was made.";
    }
    const tr = make("tr");
    tr.append(td);
    return tr;
  }

  function commandsFor(row) {
    let place = 0;
    const wanting = space().groups.filter((group) => {
      const lacking = group.columns.filter(() => lacks(row, place++) > 0);
      return group.command !== null && lacking.length > 0;
    });
    // What makes copies makes the movie itself too.
    const chosen = wanting.some((group) => group.copies) ? wanting.filter((g) => g.copies) : wanting;
    const argument = data.movies[row].argument;
    if (argument === null) return [];
    return chosen.map((group) => group.command.replace("{movie}", () => argument));
  }

  function extend() {
    const next = rows.slice(shown, shown + PAGE_ROWS);
    table.tBodies[0].append(...next.map(line));
    shown += next.length;
    more.hidden = shown >= rows.length;
    more.textContent = `Show ${number.format(Math.min(PAGE_ROWS, rows.length - shown))} more`;
  }

  function refresh() {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const all = data.movies.map((_, row) => row);
    rows = all.filter((row) => words.every((word) => haystack[row].includes(word)));
    if (gaps.checked) rows = rows.filter((row) => missing(row) > 0);
    table.tBodies[0].replaceChildren();
    shown = 0;
    extend();
    const wanting = rows.filter((row) => missing(row) > 0);
    const records = wanting.reduce((sum, row) => sum + missing(row), 0);
    status.textContent =
      `${number.format(rows.length)} of ${number.format(all.length)} movies, ` +
      `${number.format(wanting.length)} with gaps: ${number.format(records)} records missing`;
  }

  choice.addEventListener("change", () => (head(), refresh()));
  find.addEventListener("input", refresh);
  gaps.addEventListener("change", refresh);
  more.addEventListener("click", extend);
  find.form.addEventListener("submit", (event) => event.preventDefault());
  find.form.hidden = false;
  head();
  refresh();
}

const RAMP = [[0, 34, 78], [53, 69, 108], [124, 123, 120], [188, 175, 111], [254, 232, 56]];

function ramp(part) {
  const place = Math.min(Math.max(part, 0), 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(place), RAMP.length - 2);
  const mixed = RAMP[low].map((value, i) => value + (RAMP[low + 1][i] - value) * (place - low));
  return `rgb(${mixed.map(Math.round).join(" ")})`;
}

function showLikeness(strip) {
  const data = JSON.parse(strip.querySelector("script").textContent);
  const bytes = Uint8Array.from(atob(data.vectors), (character) => character.charCodeAt(0));
  const vectors = new Int8Array(bytes.buffer);
  const regionAt = data.frames.flatMap((frame) => frame.labels.map((label) => ({ label, frame })));
  const regions = [...strip.querySelectorAll(".region")];
  const status = strip.querySelector(".picked");
  const table = strip.querySelector("table");

  function cosines(picked) {
    const width = data.width;
    const own = vectors.subarray(picked * width, (picked + 1) * width);
    return regionAt.map((_, i) => {
      let sum = 0;
      for (let k = 0; k < width; k++) sum += own[k] * vectors[i * width + k];
      return Math.min(sum * data.scale, 1);
    });
  }

  function mark(chosen, paint) {
    for (const region of regions) {
      const row = Number(region.dataset.row);
      const { colour, note } = paint(row);
      region.style.fill = colour;
      region.setAttribute("aria-selected", region === chosen);
      region.classList.toggle("chosen", region === chosen);
      region.firstChild.textContent = `region ${regionAt[row].label}${note}`;
    }
    strip.classList.toggle("compared", chosen !== null);
    table.parentElement.hidden = chosen === null;
  }

  function pick(region) {
    const picked = Number(region.dataset.row);
    const values = cosines(picked);
    const low = [...values].sort((a, b) => a - b)[Math.floor(values.length / 10)];
    mark(region, (row) => ({
      colour: ramp((values[row] - low) / (1 - low || 1)),
      note: `: cosine ${values[row].toFixed(3)}`,
    }));
    describe(picked, low);
    rank(picked, values);
  }

  function clear() {
    mark(null, () => ({ colour: "", note: "" }));
    status.textContent = "No region is chosen.";
  }

  function describe(picked, low) {
    const bar = make("span", "", { class: "ramp", "aria-hidden": true });
    const stops = [0, 0.25, 0.5, 0.75, 1].map(ramp).join(", ");
    bar.style.background = `linear-gradient(to right, ${stops})`;
    const { label, frame } = regionAt[picked];
    const text = `Coloured by likeness to region ${label} of frame ${frame.number}: cosine `;
    status.replaceChildren(`${text} ${low.toFixed(2)} or less`, bar, "1.00");
  }

  function rank(picked, values) {
    const rows = data.frames.map((frame) => {
      const others = [...regionAt.keys()].filter((i) => regionAt[i].frame === frame && i !== picked);
      const best = others.sort((a, b) => values[b] - values[a]).slice(0, 2);
      const tr = make("tr");
      tr.append(make("th", frame.number, { scope: "row" }));
      const texts = best.map((i) => [regionAt[i].label, values[i].toFixed(3)]);
      const [region, cosine] = texts[0] ?? ["-", "-"];
      const next = texts[1] ? `${texts[1][0]} (${texts[1][1]})` : "-";
      tr.append(make("td", region), make("td", cosine), make("td", next));
      return tr;
    });
    table.tBodies[0].replaceChildren(...rows);
  }

  function move(region, step) {
    const own = regions.filter((one) => one.ownerSVGElement === region.ownerSVGElement);
    const place = own.indexOf(region);
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const ends = { Home: 0, End: own.length - 1 };
    const target = own[step in ends ? ends[step] : (place + steps[step] + own.length) % own.length];
    own.forEach((one) => one.setAttribute("tabindex", one === target ? 0 : -1));
    target.focus();
  }

  for (const region of regions) {
    region.addEventListener("click", () => pick(region));
    region.addEventListener("keydown", (event) => {
      if (/^(Arrow|Home|End)/.test(event.key)) move(region, event.key);
      else if (event.key === "Enter" || event.key === " ") pick(region);
      else if (event.key === "Escape") clear();
      else return;
      event.preventDefault();
    });
  }
}

const coverage = document.getElementById("coverage-data");
if (coverage) showCoverage(JSON.parse(coverage.textContent));
document.querySelectorAll(".comparable").forEach(showLikeness);
