// The cells of a sweep: a table in which one is chosen, its command, and the units that it keeps.
(() => {
  const { data, unpack, element, theme, fit, keys, config, table, value } = nodelens;
  const quoted = (words) => (/^[\w=.,:/@%+-]+$/.test(words) ? words : `'${words.replaceAll("'", "'\\''")}'`);

  async function cells(holder) {
    const about = await data("cells"), found = unpack(about.table), kept = "kept" in holder.dataset ? unpack(await data("kept")) : null;
    const figure = kept && await data("cell");  // of one of them
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
      const shares = kept.names.filter((each) => each !== "name").map((each) => kept.columns.get(each).values[line]);
      const layout = fit(structuredClone(figure.layout), canvas.clientWidth);
      canvas.style.minHeight = `${layout.height}px`;
      Plotly.react(canvas, [{ ...figure.data[0], x: shares }], layout, config).then(() => Plotly.relayout(canvas, theme())).catch((error) => nodelens.fail(holder, error));
    }

    table(holder.querySelector(".rows"), found, { name: "cells", pick: { column: "name", choose } });
    document.addEventListener("nodelens:pick", (event) => choose(event.detail));
    if (found.rows) choose(value(names, 0));
    nodelens.drawn += 1;
  }

  nodelens.widgets = { ...nodelens.widgets, cells };
})();
