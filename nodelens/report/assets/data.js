"use strict";
// Data of a page: JSON inside of it, or scripts beside it that are loaded when they are wanted. Both work from a folder.
window.nodelens = (() => {
  const known = new Map(), waiting = new Map();
  const kinds = { f4: Float32Array, f8: Float64Array, i4: Int32Array };
  function put(key, value) {
    waiting.get(key)?.(value);
    waiting.delete(key);
  }
  function data(key) {
    if (known.has(key)) return known.get(key);
    const inside = document.getElementById(`data-${key}`);
    const found = inside ? Promise.resolve(JSON.parse(inside.textContent)) : new Promise((resolve, reject) => {
      const script = document.createElement("script");
      waiting.set(key, resolve);
      script.src = `${document.body.dataset.side}/${key}.js`;
      const fail = (what) => { known.delete(key); script.remove(); reject(new Error(`${script.getAttribute("src")} ${what}: copy the page together with its folder`)); };
      script.onerror = () => fail("is missing");
      script.onload = () => { if (waiting.has(key)) fail("is damaged"); };
      document.head.append(script);
    });
    known.set(key, found);
    return found;
  }
  // {rows, columns: [{name, kind, data, words}]} -> {rows, names, columns: Map(name -> {values, words})}
  function unpack(block) {
    const columns = new Map();
    for (const column of block.columns) {
      const bytes = Uint8Array.from(atob(column.data), (letter) => letter.charCodeAt(0));
      columns.set(column.name, { values: new kinds[column.kind](bytes.buffer), words: column.words, kind: column.kind });
    }
    return { rows: block.rows, names: [...columns.keys()], columns };
  }
  function value(column, row) {
    const found = column.values[row];
    if (!column.words) return found;
    return found < 0 ? "" : column.words[found];
  }
  // float32 has 7 digits: 0.1 is not 0.10000000149
  function exact(column, row) {
    const found = value(column, row);
    return column.kind === "f4" && Number.isFinite(found) ? Number(found.toPrecision(7)) : found;
  }
  function shown(found) {
    if (typeof found !== "number") return found;
    if (!Number.isFinite(found)) return Number.isNaN(found) ? "NaN" : found > 0 ? "inf" : "-inf";
    if (Number.isInteger(found) && Math.abs(found) < 1e9) return String(found);
    const size = Math.abs(found);
    return size < 1e-4 || size >= 1e6 ? found.toExponential(3).replace(/\.?0*e\+?/, "e") : String(Number(found.toPrecision(4)));
  }
  // a spreadsheet takes words that begin like a formula for one
  function cell(found) {
    if (typeof found === "number") return Number.isNaN(found) ? "" : String(found);
    const words = /^[=+\-@\t\r]/.test(found) ? `'${found}` : String(found);
    return /[",\n\r]/.test(words) ? `"${words.replaceAll('"', '""')}"` : words;
  }
  function csv(table, rows) {
    const lines = [table.names.map(cell).join(",")], columns = table.names.map((name) => table.columns.get(name));
    for (const row of rows) lines.push(columns.map((column) => cell(exact(column, row))).join(","));
    return `${lines.join("\n")}\n`;
  }
  function save(name, words, type) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([words], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }
  // a select box with its label; options: [[value, text, title]]
  function select(label, options, chosen, change) {
    const box = element("select");
    for (const [value, text, title] of options) box.append(element("option", { value, textContent: text, title: title || "" }));
    box.value = chosen;
    box.ariaLabel = label;
    box.addEventListener("change", () => change(box.value));
    return element("label", {}, label, box);
  }
  const escaped = (words) => String(words).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll("%{", "&#37;{");  // plotly fills in %{x}
  return { put, data, unpack, value, exact, shown, csv, save, element, select, escaped, drawn: 0, failed: [] };
})();
