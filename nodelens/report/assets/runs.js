// Two of many runs, unit by unit.
(() => {
  const { data, unpack, element, select, escaped, theme, fit, latest, keys, config, table, value } = nodelens;

  async function read(about, run) {
    const part = unpack(await data(`runs-${about.pieces.findIndex((piece) => piece.includes(run))}`));
    const column = part.columns.get("run"), code = column.words.indexOf(run), units = new Map();
    for (let row = 0; row < part.rows; row += 1) {
      if (column.values[row] === code) units.set(`${value(part.columns.get("layer"), row)}\n${value(part.columns.get("unit"), row)}`, row);
    }
    return { part, units };
  }

  async function differences(holder) {
    const about = await data("runs"), menus = holder.querySelector(".menus"), canvas = holder.querySelector(".canvas");
    const state = { a: about.runs[0], b: about.runs[1], metric: about.metrics[0] }, brief = ends(about.runs);
    const runs = about.runs.map((run, k) => [run, brief[k], run]), metrics = about.metrics.map((name) => [name, name]);
    const set = (key) => (chosen) => { state[key] = chosen; update(); };
    menus.append(select("first run", runs, state.a, set("a")), select("second run", runs, state.b, set("b")), select("metric", metrics, state.metric, set("metric")));
    keys(canvas);

    const update = latest(holder, async () => {
      const [a, b] = [await read(about, state.a), await read(about, state.b)], name = state.metric, rows = [];
      for (const [key, row] of a.units) {
        if (!b.units.has(key)) continue;
        const other = b.units.get(key), at = key.lastIndexOf("\n"), layer = key.slice(0, at), unit = key.slice(at + 1), x = a.part.columns.get(name).values[row], y = b.part.columns.get(name).values[other];
        const error = about.errors.includes(name) ? Math.hypot(a.part.columns.get(`${name}_se`).values[row], b.part.columns.get(`${name}_se`).values[other]) : NaN;
        rows.push({ layer, unit: Number(unit), x, y, difference: y - x, errors: (y - x) / error });
      }
      const finite = rows.filter((row) => Number.isFinite(row.x) && Number.isFinite(row.y));
      const low = finite.reduce((least, row) => Math.min(least, row.x, row.y), Infinity), high = finite.reduce((most, row) => Math.max(most, row.x, row.y), -Infinity);
      const layers = [...new Set(finite.map((row) => row.layer))], grey = { color: "rgba(128,136,148,0.25)" };
      const dots = { type: finite.length > 3000 ? "scattergl" : "scatter", mode: "markers", x: finite.map((row) => row.x), y: finite.map((row) => row.y),
        marker: { color: finite.map((row) => layers.indexOf(row.layer)), colorscale: "Viridis", size: 6, opacity: 0.8 }, text: finite.map((row) => `${escaped(row.layer)} ${row.unit}`), hovertemplate: "%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>" };
      const equal = { type: "scatter", mode: "lines", x: [low, high], y: [low, high], line: { color: "#9aa2ad", dash: "dot", width: 1 }, hoverinfo: "skip" };
      const axis = (run) => ({ title: { text: escaped(`${name}, ${brief[about.runs.indexOf(run)]}`) }, automargin: true, gridcolor: grey.color, zerolinecolor: grey.color });
      const none = { text: escaped(`No unit has a value of ${name} in both runs: choose others`), showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 };
      await Plotly.react(canvas, [equal, dots], fit({ height: 460, showlegend: false, hovermode: "closest", paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 60, r: 20, t: 10, b: 50 },
        font: { family: "system-ui, sans-serif", size: 12, color: theme()["font.color"] }, xaxis: axis(state.a), yaxis: axis(state.b), annotations: finite.length ? [] : [none] }, canvas.clientWidth), config);
      await Plotly.relayout(canvas, theme());
      const by = (row) => { const size = Math.abs(Number.isNaN(row.errors) ? row.difference : row.errors); return Number.isNaN(size) ? -1 : size; };
      rows.sort((one, other) => by(other) - by(one));
      const numbers = (key) => ({ values: Float64Array.from(rows, (row) => row[key]), kind: "f8" }), words = [...new Set(rows.map((row) => row.layer))];
      const columns = new Map([["layer", { values: Int32Array.from(rows, (row) => words.indexOf(row.layer)), words, kind: "i4" }], ["unit", numbers("unit")], ["first", numbers("x")], ["second", numbers("y")], ["difference", numbers("difference")], ["in standard errors", numbers("errors")]]);
      table(holder.querySelector(".rows"), { rows: rows.length, names: [...columns.keys()], columns }, { name: `difference-${name}` });
      holder.dataset.drawn = `${name} ${rows.length}`;
    });
    await update();
    nodelens.drawn += 1;
  }

  // names of folders without what all begin with
  function ends(runs) {
    let common = runs[0].lastIndexOf("/") + 1;
    while (common > 0 && !runs.every((run) => run.startsWith(runs[0].slice(0, common)))) common = runs[0].lastIndexOf("/", common - 2) + 1;
    return runs.map((run) => run.slice(common) || run);
  }

  nodelens.widgets = { ...nodelens.widgets, differences };
})();
