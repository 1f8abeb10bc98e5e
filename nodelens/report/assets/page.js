// Plots, tables and buttons of a page.
(() => {
  const { data, unpack, value, shown, csv, save, element, select, escaped } = nodelens;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const ink = () => getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  const theme = () => ({ "font.color": ink(), "modebar.color": "#8a929c", "modebar.activecolor": ink(), "modebar.bgcolor": "rgba(0,0,0,0)" });

  function fail(holder, error) {
    nodelens.failed.push(String(error));
    holder.append(element("p", { className: "warning failed", textContent: String(error.message || error) }));
  }

  // draws what is chosen, one drawing after the other: of choices during a drawing the last one counts, and failures are said
  function latest(holder, work) {
    let wanted = false, busy = false;
    return async () => {
      wanted = true;
      if (busy) return;
      busy = true;
      while (wanted) {
        wanted = false;
        try {
          await work();
          holder.querySelectorAll(":scope > .failed").forEach((each) => each.remove());
        } catch (error) {
          if (!wanted) fail(holder, error);
        }
      }
      busy = false;
    };
  }

  // on a narrow screen names are cut, those of two parts stand in two lines, and the legend goes below
  function fit(layout, width, entries = 0) {
    const narrow = width < 600, two = (axis) => axis.ticktext?.some((words) => words.includes("<br>"));
    for (const key of Object.keys(layout).filter((name) => /^[xy]axis\d*$/.test(name))) {
      const axis = layout[key];
      if (axis.ticktext && narrow) axis.ticktext = axis.ticktext.map((words) => plain(words).split(" → ").map(half).join("<br>→ "));
      if (axis.title?.text && narrow && key[0] === "x") axis.title = { ...axis.title, text: wrapped(axis.title.text) };
    }
    if (narrow && layout.yaxis && two(layout.yaxis)) layout.height = Math.max(layout.height, 110 + 30 * layout.yaxis.ticktext.length);
    const below = { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom" };
    layout.legend = { ...layout.legend, font: { size: 11 }, ...(narrow ? below : {}) };
    if (narrow) layout.margin = { ...layout.margin, l: 40, r: 8 };
    if (narrow && layout.grid && layout.grid.columns > 1) stack(layout);
    if (narrow && layout.showlegend !== false) layout.height += 20 * Math.ceil(entries / 2);
    return layout;
  }

  function half(words) {
    const [first, ...rest] = words.split(", ");
    return rest.length ? `${cut(first)},<br>${cut(rest.join(", "))}` : cut(words);
  }

  function wrapped(words) {
    const at = words.length > 24 ? words.lastIndexOf(" ", words.length / 2 + 4) : -1;
    return at > 0 ? `${words.slice(0, at)}<br>${words.slice(at + 1)}` : words;
  }

  // of a path the end is kept, of other names both ends
  function cut(words) {
    if (words.length <= 21) return escaped(words);
    if (!/[.…]/.test(words)) return escaped(`${words.slice(0, 11)}…${words.slice(-9)}`);
    let at = words.length - 19;
    while (at > words.length - 24 && /^\d\d/.test(words.slice(at - 1))) at -= 1;  // no number of a layer is cut
    return escaped(`…${words.slice(at)}`);
  }

  // panels side by side become panels one below the other
  function stack(layout) {
    const count = Object.keys(layout).filter((name) => /^xaxis\d*$/.test(name)).length;
    const row = (layout.height - 90) / layout.grid.rows;
    layout.height = 120 + row * count;
    layout.grid = { ...layout.grid, rows: count, columns: 1 };
    const first = layout.yaxis.title, last = Object.entries(layout).filter(([name, axis]) => /^xaxis\d*$/.test(name) && axis.title?.text).pop();
    for (const [name, axis] of Object.entries(layout)) {
      if (/^yaxis\d+$/.test(name) && axis.title && !axis.title.text) axis.title = first;
      if (/^yaxis\d*$/.test(name) && axis.ticktext) axis.showticklabels = true;
      if (/^xaxis\d*$/.test(name) && last) axis.title = { text: name === `xaxis${count > 1 ? count : ""}` ? last[1].title.text : "" };
    }
  }

  async function draw(holder) {
    const figure = await data(holder.dataset.plot), canvas = holder.querySelector(".canvas");
    const layout = structuredClone(figure.layout), menus = layout.updatemenus || [];
    delete layout.updatemenus;
    delete layout.title;
    const entries = new Set(figure.data.filter((trace) => trace.visible !== false && trace.showlegend !== false && trace.name).map((trace) => trace.name)).size;
    const cells = figure.data.find((trace) => trace.type === "heatmap" && trace.texttemplate && trace.text.length && !layout.grid);
    const least = Math.max(layout.meta?.least || 0, cells ? 130 + 42 * cells.text[0].length : 0);
    if (least) canvas.style.minWidth = `${Math.min(3200, least)}px`;  // a narrower screen scrolls within the figure
    fit(layout, canvas.clientWidth, entries > 1 ? entries : 0);
    canvas.style.minHeight = `${layout.height}px`;
    await Plotly.newPlot(canvas, figure.data, layout, config);
    await Plotly.relayout(canvas, theme());
    for (const menu of menus) {
      const options = menu.buttons.map((button, k) => [String(k), plain(button.label), button.name]), note = element("p", { className: "definition", textContent: menu.buttons[0].name || "" });
      holder.querySelector(".menus").append(select(menu.name || "show", options, "0", (k) => { choose(canvas, menu.buttons[Number(k)]); note.textContent = menu.buttons[Number(k)].name || ""; }));
      if (menu.buttons.some((button) => button.name)) holder.querySelector(".menus").after(note);
    }
    canvas.on("plotly_click", (event) => {
      const found = event.points[0]?.customdata;
      if (typeof found === "string") document.dispatchEvent(new CustomEvent("nodelens:pick", { detail: plain(found) }));
    });
    nodelens.drawn += 1;
    holder.dataset.drawn = "";
  }

  const plain = (words) => (/[&<]/.test(words) ? new DOMParser().parseFromString(words, "text/html").documentElement.textContent : words);
  const choose = (canvas, button) => Plotly[button.method](canvas, ...structuredClone(button.args));

  function tools(holder) {
    const bar = holder.querySelector(".tools"), canvas = holder.querySelector(".canvas"), name = holder.dataset.name;
    const image = (format) => Plotly.downloadImage(canvas, { format, filename: name, width: canvas.clientWidth, height: canvas.clientHeight });
    for (const format of ["svg", "png"]) {
      bar.append(element("button", { type: "button", textContent: format.toUpperCase(), title: `Save the figure as ${format.toUpperCase()}`, onclick: () => image(format) }));
    }
    if (!("table" in holder.dataset)) return;
    const read = async () => unpack(await data(`${holder.dataset.plot}-table`));
    const all = (found) => Array.from({ length: found.rows }, (_, row) => row);
    bar.append(element("button", { type: "button", textContent: "CSV", title: "Save the data behind the figure", onclick: latest(holder, async () => {
      const found = await read();
      save(`${name}.csv`, csv(found, all(found)), "text/csv");
    }) }));
    const inner = element("div"), more = element("details", {}, element("summary", { textContent: "data" }), inner);
    more.addEventListener("toggle", latest(holder, async () => {
      if (more.open && !inner.hasChildNodes()) table(inner, await read(), { name });
    }));
    holder.append(more);
  }

  // arrow keys move what a focused plot shows, + and - zoom, 0 shows all
  function keys(canvas) {
    canvas.addEventListener("keydown", (event) => {
      const full = canvas._fullLayout, step = { ArrowLeft: ["x", -1], ArrowRight: ["x", 1], ArrowDown: ["y", -1], ArrowUp: ["y", 1] }[event.key];
      if (event.ctrlKey || event.altKey || event.metaKey) return;  // of the browser
      if (!full || event.target !== canvas || !(step || "+-0".includes(event.key))) return;
      const change = {};
      for (const name of Object.keys(full).filter((key) => /^[xy]axis\d*$/.test(key))) {
        const [low, high] = full[name].range, width = high - low;
        if (event.key === "0") change[`${name}.autorange`] = full[name].autorange !== "reversed" || "reversed";
        else if (step && name[0] === step[0]) change[`${name}.range`] = [low + 0.1 * step[1] * width, high + 0.1 * step[1] * width];
        else if (!step) {
          const by = event.key === "+" ? 0.1 : -0.125;
          change[`${name}.range`] = [low + by * width, high - by * width];
        }
      }
      event.preventDefault();
      Plotly.relayout(canvas, change);
    });
  }

  // rows that match every word of a filter: a part of a text cell, or a comparison such as rq>0.5
  function matcher(found, words) {
    const tests = [];
    for (const match of words.matchAll(/"([^"]*)"|(\S+?)\s*(<=|>=|!=|=|<|>)\s*(\S+)|(\S+)/g)) {
      const column = match[2] && found.columns.get(match[2]), number = Number(match[4]);
      if (column && (!column.words && !Number.isNaN(number))) {
        const compare = { "<": (a) => a < number, ">": (a) => a > number, "<=": (a) => a <= number, ">=": (a) => a >= number, "=": (a) => a === number, "!=": (a) => a !== number }[match[3]];
        tests.push((row) => compare(nodelens.exact(column, row)));
      } else if (column) {
        tests.push((row) => (String(value(column, row)) === match[4]) === (match[3] !== "!="));
      } else {
        const part = (match[1] ?? match[0]).toLowerCase(), texts = found.names.map((name) => found.columns.get(name)).filter((each) => each.words);
        const hits = texts.map((each) => each.words.map((word) => word.toLowerCase().includes(part)));
        tests.push((row) => texts.some((each, k) => hits[k][each.values[row]]));
      }
    }
    return (row) => tests.every((test) => test(row));
  }

  // a table that is sorted by its headings, filtered, shown in parts and saved as CSV
  function table(holder, found, { name = "table", titles = {}, hidden = () => false, note = "", pick = null } = {}) {
    const state = { sort: null, up: true, first: 0, words: "", only: null, rows: [], size: 50 };
    const search = element("input", { type: "search", placeholder: "filter: a name, or x > 0.5", ariaLabel: "filter rows" });
    const count = element("span", { className: "soft", ariaLive: "polite" }), body = element("div", { className: "wide", tabIndex: 0 });
    const back = element("button", { type: "button", textContent: "previous" }), next = element("button", { type: "button", textContent: "next" });
    const download = element("button", { type: "button", textContent: "CSV", title: "Save these rows" });
    holder.replaceChildren(element("div", { className: "menus" }, search, count, back, next, download), body);
    search.addEventListener("input", () => { state.words = search.value; state.first = 0; update(); });
    back.onclick = () => { state.first -= state.size; show(); };
    next.onclick = () => { state.first += state.size; show(); };
    download.onclick = () => save(`${name}.csv`, csv(found, state.rows), "text/csv");

    function update() {
      const keep = matcher(found, state.words);
      state.rows = [];
      for (let row = 0; row < found.rows; row += 1) if ((!state.only || state.only.has(row)) && keep(row)) state.rows.push(row);
      if (state.sort !== null) {
        const column = found.columns.get(state.sort), sign = state.up ? 1 : -1;
        const key = column.words ? column.values.map((code) => (code < 0 ? -1 : rank(column)[code])) : column.values;
        state.rows.sort((a, b) => (key[a] === key[b] ? a - b : Number.isNaN(key[a]) ? 1 : Number.isNaN(key[b]) ? -1 : sign * (key[a] - key[b])));
      }
      show();
    }
    function rank(column) {
      column.order ??= (() => {
        const sorted = column.words.map((word, k) => [word, k]).sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0)), places = [];
        sorted.forEach(([, k], place) => { places[k] = place; });
        return places;
      })();
      return column.order;
    }
    function show() {
      state.first = Math.max(0, Math.min(state.first, state.rows.length - 1));
      const names = found.names.filter((each) => !hidden(each)), last = Math.min(state.first + state.size, state.rows.length);
      const head = element("tr");
      for (const each of names) {
        const button = element("button", { type: "button", textContent: each, title: titles[each] || "" });
        if (state.sort === each) button.dataset.sort = state.up ? "up" : "down";
        button.onclick = () => { state.up = state.sort === each ? !state.up : Boolean(found.columns.get(each).words); state.sort = each; state.first = 0; update(); };
        head.append(element("th", { className: found.columns.get(each).words ? "text" : "", ariaSort: state.sort === each ? (state.up ? "ascending" : "descending") : "none" }, button));
      }
      const rows = element("table", {}, element("thead", {}, head)), lines = element("tbody");
      for (const row of state.rows.slice(state.first, last)) {
        lines.append(element("tr", {}, ...names.map((each) => {
          const column = found.columns.get(each);
          const words = shown(value(column, row));
          if (each !== pick?.column) return element("td", { className: column.words ? "text" : "", textContent: words });
          return element("td", { className: "text" }, element("button", { type: "button", textContent: words, onclick: () => pick.choose(words) }));
        })));
      }
      rows.append(lines);
      const focused = body.contains(document.activeElement) && document.activeElement.textContent;
      body.replaceChildren(rows);
      if (focused) [...body.querySelectorAll("th button")].find((button) => button.textContent === focused)?.focus();
      count.textContent = `${state.rows.length ? state.first + 1 : 0}-${last} of ${state.rows.length.toLocaleString("en")}${note ? `; ${note}` : ""}`;
      back.disabled = state.first === 0;
      next.disabled = last >= state.rows.length;
    }
    update();
    return { update, show, only(rows) { state.only = rows; state.first = 0; update(); } };
  }

  // the columns of a table in the page
  function sortable(each) {
    each.querySelectorAll("th").forEach((head, k) => {
      const button = element("button", { type: "button", textContent: head.textContent, title: head.title });
      head.replaceChildren(button);
      button.onclick = () => {
        const up = button.dataset.sort === "down" || !button.dataset.sort, body = each.tBodies[0];
        each.querySelectorAll("th button").forEach((other) => delete other.dataset.sort);
        button.dataset.sort = up ? "up" : "down";
        const key = (row) => row.cells[k]?.textContent ?? "";
        const order = (a, b) => (Number.isNaN(Number(a) - Number(b)) ? a.localeCompare(b, "en", { numeric: true }) : a - b);
        body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * order(key(a), key(b))));
      };
    });
  }

  function start() {
    if (!window.Plotly) fail(document.body, "The script plotly.min.js is missing: copy the page together with it, or connect to the network");
    const near = new IntersectionObserver((seen) => {
      for (const each of seen.filter((entry) => entry.isIntersecting)) {
        near.unobserve(each.target);
        (nodelens.widgets?.[each.target.dataset.widget] || draw)(each.target).catch((error) => fail(each.target, error));
      }
    }, { rootMargin: "600px" });
    document.querySelectorAll("figure.plot, [data-widget]").forEach((holder) => near.observe(holder));
    document.querySelectorAll("figure.plot").forEach((holder) => { tools(holder); keys(holder.querySelector(".canvas")); });
    document.querySelectorAll("table.sortable").forEach(sortable);
    document.querySelectorAll("[data-copy]").forEach((button) => button.addEventListener("click", () => copy(button)));
    dark.addEventListener("change", () => document.querySelectorAll(".js-plotly-plot").forEach((each) => Plotly.relayout(each, theme())));
  }

  async function copy(button) {
    const area = element("textarea", { value: button.dataset.copy });
    try { await navigator.clipboard.writeText(button.dataset.copy); } catch {
      document.body.append(area);  // pages opened from a folder may have no clipboard
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  }

  async function listed(holder) {
    const found = await data(holder.dataset.key);
    table(holder, unpack(found.table), { name: holder.dataset.name, titles: found.titles });
    nodelens.drawn += 1;
  }

  nodelens.widgets = { table: listed };
  Object.assign(nodelens, { table, copy, theme, fit, fail, latest, keys, config, plain });
  document.addEventListener("DOMContentLoaded", start);
})();
