// The units of a run: any metric against any other, and a table of them. A layer's units are loaded when it is chosen.
(() => {
  const { data, unpack, value, shown, element, select, escaped, theme, fit, latest, keys, config, table } = nodelens;
  const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a8088"];
  const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "cross"];
  const ALL = "", MOST = 50000, GL = 3000;

  // several tables with the same columns as one; words get codes of their own
  function joined(parts, keep) {
    const names = parts[0].names, columns = new Map(), rows = parts.map((part) => keep ? keep(part) : [...Array(part.rows).keys()]);
    const count = rows.reduce((sum, each) => sum + each.length, 0);
    for (const name of names) {
      const first = parts[0].columns.get(name), words = first.words && [], codes = new Map();
      const wide = parts.some((part) => part.columns.get(name).kind === "f8");
      const values = new (first.words ? Int32Array : wide ? Float64Array : first.values.constructor)(count);
      let at = 0;
      parts.forEach((part, k) => {
        const column = part.columns.get(name);
        for (const row of rows[k]) {
          let found = column.values[row];
          if (words && found >= 0) {
            const word = column.words[found];
            if (!codes.has(word)) codes.set(word, words.push(word) - 1);
            found = codes.get(word);
          }
          values[at] = found;
          at += 1;
        }
      });
      columns.set(name, { values, words, kind: wide ? "f8" : first.kind });
    }
    return { rows: count, names, columns };
  }

  async function read(about, layer) {
    if (layer === ALL && about.sampled) return unpack(await data("units-sample"));
    const wanted = about.pieces.map((_, k) => k).filter((k) => layer === ALL || about.pieces[k].includes(layer));
    const parts = await Promise.all(wanted.map(async (k) => unpack(await data(`units-${k}`))));
    if (layer === ALL) return parts.length === 1 ? parts[0] : joined(parts);
    return joined(parts, (part) => {
      const column = part.columns.get("layer"), code = column.words.indexOf(layer);
      return [...Array(part.rows).keys()].filter((row) => column.values[row] === code);
    });
  }

  const every = (found) => (found.rows <= MOST ? [...Array(found.rows).keys()] : [...Array(MOST).keys()].map((k) => Math.floor((k * found.rows) / MOST)));

  function points(found, rows, x, y, more) {
    const [layer, unit, across, up] = ["layer", "unit", x, y].map((name) => found.columns.get(name));
    const names = rows.map((row) => `${escaped(value(layer, row))} ${escaped(value(unit, row))}`);
    return { type: rows.length > GL ? "scattergl" : "scatter", mode: "markers", x: rows.map((row) => across.values[row]), y: rows.map((row) => up.values[row]),
      customdata: rows, text: names, hovertemplate: `%{text}<br>${escaped(x)} %{x:.4g}<br>${escaped(y)} %{y:.4g}<extra></extra>`, ...more };
  }

  // one trace per choice of a label or per layer, else one with a scale of colours
  function traces(found, { x, y, colour }, titled) {
    const rows = every(found), column = found.columns.get(colour), words = column?.words;
    if (words && words.length <= 21) {
      return words.map((word, code) => points(found, rows.filter((row) => column.values[row] === code), x, y, { name: escaped(word),
        marker: { color: COLOURS[code % 7], symbol: SYMBOLS[Math.floor(code / 7) % 5], size: 6, opacity: 0.8 } })).filter((trace) => trace.x.length);
    }
    const scale = { color: rows.map((row) => column.values[row]), colorscale: "Viridis", size: 6, opacity: 0.8, colorbar: { title: { text: escaped(words ? `${colour}, by depth` : titled(colour)), side: "right" }, thickness: 12 } };
    return [points(found, rows, x, y, { marker: scale, name: "" })];
  }

  async function units(holder) {
    const about = await data("units"), menus = holder.querySelector(".menus"), canvas = holder.querySelector(".canvas"), titles = about.definitions;
    const all = await read(about, ALL);
    const state = { x: about.metrics[0], y: about.metrics[1] || about.metrics[0], colour: "layer", layer: ALL };
    const titled = (name) => about.axes[name] || name, options = (names) => names.map((name) => [name, name, titles[name]]);
    const set = (key) => (chosen) => { state[key] = chosen; update(); };
    menus.append(
      select("horizontal", options(about.metrics), state.x, set("x")),
      select("vertical", options(about.metrics), state.y, set("y")),
      select("colour", options(["layer", ...about.labels, ...about.metrics]), state.colour, set("colour")),
      select("layer", [[ALL, "all layers"], ...about.layers.map((name) => [name, name])], ALL, set("layer")),
      select("scale", [["linear", "linear"], ["log", "logarithmic"]], "linear", set("scale")),
    );
    keys(canvas);
    const errors = element("input", { type: "checkbox" });
    let listed = null, found = all, listening = false;

    function list() {
      const note = state.layer === ALL && about.sampled ? `a sample of ${about.rows.toLocaleString("en")} units; choose a layer for all of its units` : "";
      const hidden = (name) => name.endsWith("_se") && about.metrics.includes(name.slice(0, -3)) && !errors.checked;
      listed = table(holder.querySelector(".rows"), found, { name: "units", titles, hidden, note });
      holder.querySelector(".rows .menus").append(element("label", {}, errors, "standard errors"));
    }
    errors.onchange = () => listed.show();

    const update = latest(holder, async () => {
      found = state.layer === ALL ? all : await read(about, state.layer);
      const shapes = traces(found, state, titled), behind = state.layer === ALL ? [] : [points(all, every(all), state.x, state.y, { name: "other layers", marker: { color: "#9aa2ad", size: 4, opacity: 0.35 }, customdata: null })];
      const layout = fit({ height: 520, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest", dragmode: "zoom", margin: { l: 60, r: 20, t: 10, b: 50 },
        font: { family: "system-ui, sans-serif", size: 12, color: theme()["font.color"] }, showlegend: shapes.length + behind.length > 1,
        xaxis: axis(state.x), yaxis: axis(state.y) }, canvas.clientWidth, shapes.length + behind.length);
      await Plotly.react(canvas, [...behind, ...shapes], layout, { ...config, modeBarButtonsToRemove: ["autoScale2d"] });
      await Plotly.relayout(canvas, theme());
      canvas.setAttribute("aria-label", `${state.y} against ${state.x}, ${found.rows} units`);
      holder.querySelector(".definitions").replaceChildren(...[...new Set([state.x, state.y])].filter((name) => titles[name]).map((name) => element("p", { className: "definition", textContent: `${name}: ${titles[name]}` })));
      list();
      holder.dataset.drawn = `${state.x} ${state.y} ${state.layer}`;
      if (!listening) {
        listening = true;
        canvas.on("plotly_selected", (chosen) => listed.only(chosen ? new Set(chosen.points.map((point) => point.customdata).filter((row) => row !== undefined && row !== null)) : null));
        canvas.on("plotly_deselect", () => listed.only(null));
      }
    });
    const axis = (name) => ({ title: { text: escaped(titled(name)) }, type: state.scale || "linear", nticks: state.scale === "log" ? 4 : 0, automargin: true, gridcolor: "rgba(128,136,148,0.25)", zerolinecolor: "rgba(128,136,148,0.5)" });
    await update();
    nodelens.drawn += 1;
  }

  nodelens.widgets = { ...nodelens.widgets, units };
})();
