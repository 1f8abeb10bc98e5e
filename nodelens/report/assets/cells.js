// The cells of a sweep: a table in which one is chosen, its command, and the units that it keeps.
(() => {
  const { data, unpack, element, escaped, theme, fit, keys, config, table, value } = nodelens;
  const quoted = (words) => (/^[\w=.,:/@%+-]+$/.test(words) ? words : `'${words.replaceAll("'", "'\\''")}'`);

  async function cells(holder) {
    const about = await data("cells"), found = unpack(about.table), kept = "kept" in holder.dataset ? unpack(await data("kept")) : null;
    const names = found.columns.get("name"), row = new Map(Array.from({ length: found.rows }, (_, k) => [value(names, k), k]));
    const canvas = holder.querySelector(".canvas"), chosen = holder.querySelector(".chosen");
    keys(canvas);

    function command(name) {
      const of = (column) => { const known = found.columns.get(column); return known && nodelens.exact(known, row.get(name)); };
      const more = [`criterion=[${of("criterion")}]`, `allocation=[${of("allocation")}]`, `compensate=${of("compensate")}`, `mode=${of("mode")}`, `amounts=[${of("amount")}]`, `seeds=[${of("seed")}]`];
      return [about.command || "python prune.py", ...more.filter((words) => !words.includes("undefined")).map(quoted)].join(" ");
    }

    function choose(name) {
      if (!row.has(name)) return;
      const copy = element("button", { type: "button", textContent: "copy" });
      copy.dataset.copy = command(name);
      copy.onclick = () => nodelens.copy(copy);
      chosen.replaceChildren(element("h3", { textContent: `${name} ` }, copy), element("pre", { textContent: command(name) }));
      chosen.querySelector("h3").append(copy);
      holder.dataset.chosen = name;
      if (kept) draw(name);
    }

    function draw(name) {
      const at = kept.columns.get("name"), line = Array.from({ length: kept.rows }, (_, k) => k).find((k) => value(at, k) === name);
      if (line === undefined) { Plotly.purge(canvas); canvas.style.minHeight = ""; return; }
      const groups = kept.names.filter((each) => each !== "name"), shares = groups.map((each) => kept.columns.get(each).values[line]);
      const step = Math.ceil(groups.length / 60), ticks = groups.map((_, k) => k).filter((k) => k % step === 0), height = Math.min(900, Math.max(220, 90 + 20 * groups.length));
      const layout = fit({ height, margin: { l: 60, r: 20, t: 10, b: 50 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", size: 12, color: theme()["font.color"] },
        xaxis: { title: { text: "share of the units kept" }, range: [0, 1], gridcolor: "rgba(128,136,148,0.25)" }, yaxis: { tickvals: ticks, ticktext: ticks.map((k) => escaped(groups[k].length > 32 ? `…${groups[k].slice(-31)}` : groups[k])), range: [groups.length - 0.4, -0.6], automargin: true, title: { text: "group", standoff: 14 } } }, canvas.clientWidth);
      canvas.style.minHeight = `${height}px`;
      Plotly.react(canvas, [{ type: "bar", orientation: "h", x: shares, y: groups.map((_, k) => k), marker: { color: "#0072b2" }, text: groups.map(escaped), textposition: "none", hovertemplate: "%{text}: %{x:.3f}<extra></extra>" }], layout, config).then(() => Plotly.relayout(canvas, theme())).catch((error) => nodelens.fail(holder, error));
    }

    table(holder.querySelector(".rows"), found, { name: "cells", pick: { column: "name", choose } });
    document.addEventListener("nodelens:pick", (event) => choose(event.detail));
    if (found.rows) choose(value(names, 0));
    nodelens.drawn += 1;
  }

  nodelens.widgets = { ...nodelens.widgets, cells };
})();
