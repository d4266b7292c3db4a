"use strict";
// Makes the page quicker to use: sorting, filtering, links to rows, values under the pointer. Nothing needs it.
(() => {
  const one = (selector) => document.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
  const shown = (row) => row.cells[1].querySelector("b").textContent.replace(/^\S+ /, ""); // without the symbol

  for (const element of all("[data-needs-script]")) element.hidden = false;

  // A row, and the one below that says why, where there is one, belong together.
  const groups = all("#rows details").map((details) => {
    const table = details.querySelector("table");
    const entries = [];
    for (const row of table.tBodies[0].rows) {
      if (row.classList.contains("why")) entries.at(-1).rows.push(row);
      else entries.push({ rows: [row], probe: row.cells[0].textContent, status: shown(row) });
    }
    return { details, table, entries, openAtFirst: details.open };
  });

  for (const { table, entries } of groups) {
    for (const { rows: [row], probe } of entries) {
      const link = make("a", { href: "#" + row.id, textContent: "#" });
      link.setAttribute("aria-label", `Link to ${probe}`);
      row.cells[0].append(link);
    }
    all("thead th", table).forEach((head, column) => {
      if (head.classList.contains("fixed")) return;
      const words = head.firstElementChild;
      const button = make("button", { type: "button", textContent: words.textContent, title: words.title });
      words.textContent = "?";
      words.setAttribute("aria-label", `What is ${button.textContent}?`);
      head.prepend(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => sort(table, entries, head, column));
    });
  }

  // Largest number or first letter on the first click, the other way round on the second, as it was on the third.
  function sort(table, entries, head, column) {
    const numbers = head.classList.contains("n");
    const directions = numbers ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
    const direction = directions[(directions.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
    for (const other of all("[aria-sort]", table)) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", direction);
    const sign = direction === "descending" ? -1 : 1;
    const value = (entry) => {
      if (column === 0) return entry.probe;
      const text = entry.rows[0].cells[column].textContent;
      return numbers ? parseFloat(text) : text;
    };
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (!numbers) return sign * x.localeCompare(y, "en", { numeric: true });
      return Number.isNaN(x) - Number.isNaN(y) || sign * (x - y) || 0; // what is no number comes last
    };
    const sorted = direction === "none" ? entries : [...entries].sort(order);
    table.tBodies[0].append(...sorted.flatMap((entry) => entry.rows));
  }

  const filter = one("#filter");
  const choices = all(".controls select");
  function applyFilter() {
    const text = filter.value.trim().toLowerCase();
    const chosen = Object.fromEntries(choices.map((choice) => [choice.name, choice.value]));
    const active = text !== "" || choices.some((choice) => choice.value);
    let count = 0;
    let total = 0;
    for (const { details, entries, openAtFirst } of groups) {
      const wanted = ["dtype", "mode", "loss"].every((key) => !chosen[key] || details.dataset[key] === chosen[key]);
      let left = 0;
      for (const { rows, probe, status } of entries) {
        const visible = wanted && probe.toLowerCase().includes(text) && (!chosen.status || status === chosen.status);
        for (const row of rows) row.hidden = !visible;
        left += visible;
      }
      details.hidden = left === 0;
      details.open = active ? left > 0 : openAtFirst;
      count += left;
      total += entries.length;
    }
    one("#count").textContent = `${count} of ${total} rows`;
  }
  for (const control of [filter, ...choices]) control.addEventListener("input", applyFilter);
  function clearFilter() {
    for (const control of [filter, ...choices]) control.value = "";
    applyFilter();
  }
  one("#clear").addEventListener("click", clearFilter);
  applyFilter();

  // A link to a row shows it, whatever is folded or filtered.
  function reveal() {
    let id = location.hash.slice(1);
    try {
      id = decodeURIComponent(id);
    } catch {
      return; // not an address of this page
    }
    const target = document.getElementById(id);
    if (!target) return;
    if (target.closest("[hidden]")) clearFilter();
    for (let folded = target.closest("details"); folded; folded = folded.parentElement.closest("details")) {
      folded.open = true;
    }
    target.scrollIntoView({ block: target.localName === "tr" ? "center" : "start" });
  }
  window.addEventListener("hashchange", reveal);
  reveal();

  const fold = (open) => () => all("main details").forEach((details) => { details.open = open; });
  one("#expand").addEventListener("click", fold(true));
  one("#collapse").addEventListener("click", fold(false));

  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select, textarea")) return;
    event.preventDefault();
    filter.focus();
  });

  for (const button of all("button.copy")) {
    button.addEventListener("click", async () => {
      const source = document.getElementById(button.dataset.copies);
      try {
        await navigator.clipboard.writeText(source.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(source); // the browser refuses: then it takes one key more
        button.textContent = "Selected: press Ctrl+C";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }

  // The charts' own hover texts come late and only with a mouse; a box that follows the pointer takes their place.
  const tip = document.body.appendChild(make("div", { className: "tip", hidden: true }));
  const said = new WeakMap();
  for (const title of all("svg.chart title")) {
    if (title.parentElement.localName === "svg") continue; // the name of the chart
    said.set(title.parentElement, title.textContent);
    title.remove();
  }
  function showTip(event) {
    let element = event.target;
    while (element instanceof SVGElement && !said.has(element)) element = element.parentElement;
    const text = said.get(element);
    tip.hidden = text === undefined;
    if (tip.hidden) return;
    tip.textContent = text;
    const right = event.clientX + 14 + tip.offsetWidth < document.documentElement.clientWidth;
    tip.style.left = `${Math.max(0, event.pageX + (right ? 14 : -14 - tip.offsetWidth))}px`;
    tip.style.top = `${event.pageY + 14}px`;
  }
  for (const chart of all("svg.chart")) {
    for (const kind of ["pointermove", "pointerdown"]) chart.addEventListener(kind, showTip);
    chart.addEventListener("pointerleave", () => { tip.hidden = true; });
    chart.addEventListener("click", (event) => {
      const text = said.get(event.target);
      if (text === undefined) return;
      clearFilter();
      filter.value = text.split("\n", 1)[0]; // the probe
      applyFilter();
      one("#rows").scrollIntoView();
    });
  }

  // Paper has nothing to click.
  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = all("details:not([open])");
    for (const details of folded) details.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const details of folded) details.open = false;
  });
})();
