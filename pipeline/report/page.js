"use strict";
(() => {
  const PER_PAGE = 20;
  const byId = (id) => document.getElementById(id);
  const make = (tag, name, ...children) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    node.append(...children);
    return node;
  };

  function theme() {
    const button = byId("theme");
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const root = document.documentElement;
    const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
    const name = () => { button.textContent = isDark() ? "Light colours" : "Dark colours"; };
    button.hidden = false;
    button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); });
    dark.addEventListener("change", name);
    name();
  }

  function currentSection() {
    const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries.filter((one) => one.isIntersecting)) {
        for (const link of links.values()) link.removeAttribute("aria-current");
        links.get(entry.target.id)?.setAttribute("aria-current", "true");
      }
    }, { rootMargin: "-15% 0px -80% 0px" });
    for (const section of document.querySelectorAll("main > section")) seen.observe(section);
  }

  function wideTables() {
    const watch = new ResizeObserver((entries) => {
      for (const { target } of entries) {
        const frame = target.closest(".frame");
        const over = frame.scrollWidth > frame.clientWidth + 1;
        frame.toggleAttribute("tabindex", over);
        if (over) frame.tabIndex = 0;
        frame.nextElementSibling.hidden = !over;
      }
    });
    for (const table of document.querySelectorAll(".frame > table")) {
      watch.observe(table);
      watch.observe(table.parentElement);
    }
  }

  function printing() {
    let opened = [];
    addEventListener("beforeprint", () => {
      opened = [...document.querySelectorAll("details:not([open])")];
      for (const one of opened) one.open = true;
    });
    addEventListener("afterprint", () => { for (const one of opened) one.open = false; });
  }

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  }

  function marked(text, wanted) {
    if (!wanted) return [text];
    const parts = [];
    const lower = text.toLowerCase();
    if (lower.length !== text.length) return [text];
    let from = 0;
    for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, from)) {
      parts.push(text.slice(from, at), make("mark", "", text.slice(at, at + wanted.length)));
      from = at + wanted.length;
    }
    return [...parts, text.slice(from)];
  }

  const shown = (value) => value.toFixed(2).replace("-", "\u2212");

  function answerCard(data, method, seed, row, wanted) {
    const columns = data.answers[method][seed];
    const glyph = document.querySelector(`template[data-glyph="${CSS.escape(method)}"]`).content.cloneNode(true);
    const card = make("div", "answer", make("h4", "", glyph));
    const text = columns.text[row];
    if (text === null) {
      card.append(make("p", "none", "no answer"));
      return card;
    }
    card.append(text.trim() ? make("p", "text", ...marked(text, wanted)) : make("p", "none", "empty answer"));
    const facts = columns.tokens[row] === null ? [] : [`${columns.tokens[row]} tokens`];
    if (columns.finished[row] === 0) facts.push("cut off at the limit");
    data.judges.forEach((judge, place) => {
      const value = columns.values[place][row];
      if (value !== null) facts.push(`${judge} ${shown(value)}`);
    });
    card.append(make("p", "meta", ...facts.flatMap((fact, at) => [" ", make("span", "", at + 1 < facts.length ? `${fact} \u00b7` : fact)])));
    return card;
  }

  function browse(data) {
    const state = { page: 0 };
    const samples = [...new Set(data.rows.map((row) => row[1]))];
    const names = samples.map((sample) => [String(sample), `${sample + 1} of ${samples.length}`]);
    if (samples.length > 1) names.push(["", "all"]);
    byId("sample").append(...names.map(([value, text]) => new Option(text, value)));

    const chosen = () => [...document.querySelectorAll("input[name=method]:checked")].map((box) => box.value);

    function matches(methods, seed, wanted) {
      const sample = byId("sample").value;
      return data.rows.flatMap(([, number, prompt], row) => {
        if (sample !== "" && number !== Number(sample)) return [];
        const texts = [prompt, ...methods.map((method) => data.answers[method][seed].text[row] ?? "")];
        return texts.some((text) => text.toLowerCase().includes(wanted)) ? [row] : [];
      });
    }

    function render() {
      const methods = chosen();
      const seed = Number(byId("seed").value);
      const wanted = byId("filter").value.toLowerCase();
      const rows = matches(methods, seed, wanted);
      const pages = Math.max(1, Math.ceil(rows.length / PER_PAGE));
      state.page = Math.min(state.page, pages - 1);
      const part = rows.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE);
      byId("answers").replaceChildren(...part.map((row) => {
        const [index, sample, prompt] = data.rows[row];
        const title = samples.length > 1 ? `Prompt ${index + 1}, sample ${sample + 1}` : `Prompt ${index + 1}`;
        const cards = methods.map((method) => answerCard(data, method, seed, row, wanted));
        return make(
          "article", "", make("h3", "", title), make("blockquote", "prompt", ...marked(prompt, wanted)),
          make("div", "answers", ...cards),
        );
      }));
      const what = `${rows.length === 1 ? "comparison" : "comparisons"}${wanted ? " with this text" : ""}`;
      const where = pages > 1 ? `, page ${state.page + 1} of ${pages}` : "";
      byId("found").textContent = !methods.length ? "Choose a method to see its answers."
        : rows.length ? `${rows.length} ${what}${where}` : "No prompt and no answer has this text.";
      byId("page").textContent = `Page ${state.page + 1} of ${pages}`;
      byId("previous").disabled = state.page === 0;
      byId("next").disabled = state.page >= pages - 1;
      byId("pager").hidden = pages === 1;
    }

    const turn = (by) => {
      state.page += by;
      render();
      byId("found").scrollIntoView({ block: "start" });
    };
    byId("previous").addEventListener("click", () => turn(-1));
    byId("next").addEventListener("click", () => turn(1));
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    byId("controls").addEventListener("input", () => { state.page = 0; render(); });
    byId("controls").hidden = false;
    render();
  }

  function samples() {
    const packed = byId("packed");
    if (!packed) return;
    if (typeof DecompressionStream === "undefined") {
      byId("found").textContent = "This browser is too old to unpack the answers; they lie in samples.jsonl.";
      return;
    }
    const near = new IntersectionObserver(async (entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      near.disconnect();
      browse(await unpack(packed.textContent.trim()));
    }, { rootMargin: "1500px 0px" });
    near.observe(byId("samples"));
  }

  theme();
  currentSection();
  wideTables();
  printing();
  samples();
})();
