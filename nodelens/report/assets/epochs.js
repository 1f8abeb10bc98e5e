// Every unit over the epochs of a training.
(() => {
  const { data, unpack, select, escaped, theme, fit, latest, keys, config, value } = nodelens;

  async function epochs(holder) {
    const about = await data("epochs"), menus = holder.querySelector(".menus"), canvas = holder.querySelector(".canvas");
    const state = { metric: "0", layer: about.layers[0] };
    const set = (key) => (chosen) => { state[key] = chosen; update(); };
    menus.append(select("metric", about.metrics.map((name, k) => [String(k), name]), "0", set("metric")), select("layer", about.layers.map((name) => [name, name]), state.layer, set("layer")));
    keys(canvas);
    const middle = (values) => { const known = values.filter((each) => Number.isFinite(each)).sort((a, b) => a - b); return known.length ? (known[Math.floor(known.length / 2)] + known[Math.ceil(known.length / 2) - 1]) / 2 : null; };

    const update = latest(holder, async () => {
      const found = unpack(await data(`epochs-${state.metric}`)), layer = found.columns.get("layer"), code = layer.words.indexOf(state.layer);
      const rows = [...Array(found.rows).keys()].filter((row) => layer.values[row] === code), columns = about.epochs.map((epoch) => found.columns.get(String(epoch)).values);
      const last = columns[columns.length - 1];
      rows.sort((a, b) => last[a] - last[b]);
      const shown = rows.length <= 200 ? rows : Array.from({ length: 200 }, (_, k) => rows[Math.floor((k * (rows.length - 1)) / 199)]);
      const lines = shown.map((row, k) => ({ type: "scatter", mode: "lines", x: about.epochs, y: columns.map((values) => values[row]), name: `unit ${value(found.columns.get("unit"), row)}`, line: { width: 1, color: `hsla(${220 - (180 * k) / Math.max(1, shown.length - 1)},55%,55%,0.6)` }, hovertemplate: "%{fullData.name}<br>epoch %{x}: %{y:.4g}<extra></extra>" }));
      const median = { type: "scatter", mode: "lines", x: about.epochs, y: columns.map((values) => middle(rows.map((row) => values[row]))), line: { width: 4, color: "#d55e00" }, name: "median", hovertemplate: "median %{y:.4g}<extra></extra>" };
      const grid = { automargin: true, gridcolor: "rgba(128,136,148,0.25)", zerolinecolor: "rgba(128,136,148,0.5)" };
      await Plotly.react(canvas, [...lines, median], fit({ height: 440, showlegend: false, hovermode: "closest", paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 60, r: 20, t: 10, b: 50 }, font: { family: "system-ui, sans-serif", size: 12, color: theme()["font.color"] },
        xaxis: { ...grid, ...about.ticks, title: { text: "epoch" } }, yaxis: { ...grid, title: { text: escaped(about.metrics[Number(state.metric)]) } } }, canvas.clientWidth), config);
      await Plotly.relayout(canvas, theme());
      holder.dataset.drawn = `${about.metrics[Number(state.metric)]} ${state.layer}`;
    });
    await update();
    nodelens.drawn += 1;
  }

  nodelens.widgets = { ...nodelens.widgets, epochs };
})();
