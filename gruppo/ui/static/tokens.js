// The token view: completions with every token colored by a quantity. Data: see gruppo/ui/tokens.py.
// The page loads text.js before.
(function () {
  "use strict";

  const BUILD_AT_ONCE = 3000; // tokens of a page; larger pages are built as they are scrolled to
  const STORE = "gruppo.tokens";
  const { h, short, exact, plural, textNodes, plain, quoted, rendered, copyButton } = window.gruppo.text;

  // ---------------------------------------------------------------- numbers and colors

  function color(quantity, value) {
    if (value === null || value === undefined) return "none";
    if (typeof value !== "number") return "odd";
    const size = quantity.scale === "ratio" ? Math.log(value) : quantity.scale === "low" ? -value : value;
    const share = Math.max(-1, Math.min(1, size / quantity.limit));
    if (quantity.scale === "low" || quantity.scale === "high") return "s" + Math.round(8 * Math.max(0, share));
    const place = Math.round(5 * share);
    return place < 0 ? "n" + -place : "p" + place;
  }

  function legend(quantity) {
    const { scale, limit } = quantity;
    const one = scale === "low" || scale === "high";
    const names = one
      ? [0, 1, 2, 3, 4, 5, 6, 7, 8].map((place) => "s" + place)
      : ["n5", "n4", "n3", "n2", "n1", "p0", "p1", "p2", "p3", "p4", "p5"];
    const end = scale === "ratio" ? [short(Math.exp(-limit)), "1", short(Math.exp(limit))]
      : scale === "low" ? ["0", "", short(-limit)] : scale === "high" ? ["0", "", short(limit)] : [short(-limit), "0", short(limit)];
    const size = (value) => (value === null ? 0 : scale === "ratio" ? Math.log(value) : scale === "low" ? -value : value);
    const beyond = (value) => value > limit * 1.01;
    const first = end[0] + (!one && beyond(-size(quantity.low)) ? " or less" : "");
    const highest = size(scale === "low" ? quantity.low : quantity.high);
    const last = end[2] + (beyond(highest) ? (scale === "low" ? " or less" : " or more") : "");
    return h("div", { class: "legend" },
      h("span", { class: "num" }, first),
      h("span", { class: "swatches", "aria-hidden": "true" }, names.map((name) => h("span", { class: "swatch t " + name }))),
      h("span", { class: "num" }, last + (quantity.unit ? " " + quantity.unit : "")),
      h("span", { class: "muted" }, quantity.low === null ? "no finite number in the group"
        : `${quantity.mean === null ? "" : `mean over the tokens of the group ${short(quantity.mean)}, `}from ${short(quantity.low)} to ${short(quantity.high)}; hatched: not sampled`));
  }

  // ---------------------------------------------------------------- store

  function stored() {
    try { return JSON.parse(localStorage.getItem(STORE)) || {}; } catch (_) { return {}; }
  }

  function store(state) {
    try { localStorage.setItem(STORE, JSON.stringify(state)); } catch (_) { /* a page from a file may have no store */ }
  }

  // ---------------------------------------------------------------- parts of a page

  function choice(label, value, options, changed) {
    const select = h("select", { class: "field" }, options.map(([key, words, off]) =>
      h("option", { value: key, disabled: off, selected: key === value }, words)));
    select.addEventListener("change", () => changed(select.value));
    return h("label", { class: "control" }, h("span", {}, label), select);
  }

  function switches(label, value, options, changed) {
    const group = h("div", { class: "switch", role: "group", "aria-label": label });
    for (const [key, words, name] of options) {
      const button = h("button", { type: "button", "aria-pressed": String(key === value), "aria-label": name }, words);
      button.addEventListener("click", () => {
        for (const other of group.children) other.setAttribute("aria-pressed", String(other === button));
        changed(key);
      });
      group.append(button);
    }
    return group;
  }

  function facts(object) {
    const rows = Object.entries(object).map(([name, value]) => [h("dt", {}, plain(name)),
      h("dd", {}, plain(typeof value === "string" ? value : JSON.stringify(value)))]);
    return h("dl", { class: "facts" }, rows);
  }

  // A box that scrolls if its text is long, which the keyboard must reach then.
  function scrolled(tag, kind, label, text, ...content) {
    return h(tag, text.length > 600 ? { class: kind, tabindex: "0", role: "region", "aria-label": label } : { class: kind }, content);
  }

  function folded(words, ...content) {
    return h("details", {}, h("summary", {}, words), ...content);
  }

  function promptCard(prompt) {
    const messages = prompt.messages || [{ role: "", text: prompt.text, more: null }];
    const card = h("section", { class: "card prompt", "aria-label": "Prompt" },
      h("header", {}, h("h2", {}, "Prompt"), h("span", { class: "muted id" }, plain(prompt.id || ""))),
      messages.map((one) => h("div", { class: "message" },
        one.role ? h("span", { class: "role" }, plain(one.role)) : null,
        scrolled("div", "words", "Text of the prompt", one.text, h("span", { dir: "auto" }, textNodes(one.text))),
        one.more ? h("code", { class: "more" }, plain(one.more)) : null)));
    if (Object.keys(prompt.columns).length) card.append(facts(prompt.columns));
    if (prompt.token_ids) {
      const special = new Set(prompt.special);
      card.append(folded(`${plural(prompt.token_ids.length, "token")}, with the chat template`, prompt.token_texts
        ? h("div", { class: "body" }, prompt.token_texts.map((text, place) =>
          h("span", { class: special.has(place) ? "t special" : "t", title: `id ${prompt.token_ids[place]}` }, textNodes(text, true))))
        : h("p", { class: "muted" }, "The texts of its tokens were not recorded: " + prompt.token_ids.join(" "))));
    } else card.append(h("p", { class: "muted" }, "The tokens of the prompt were not recorded."));
    return card;
  }

  function rewardCard(data) {
    const printed = {};
    for (const one of data.completions) for (const [name, text] of Object.entries(one.printed || {})) printed[name] ??= text;
    const names = new Set([...data.commands.map((one) => one.reward), ...Object.keys(printed)]);
    if (!names.size) return null;
    const commands = Object.fromEntries(data.commands.map((one) => [one.reward, one.command]));
    return h("section", { class: "card rewards", "aria-label": "Rewards" }, h("h2", {}, "Rewards"), [...names].map((name) => h("div", { class: "call" },
      h("h3", {}, plain(name)),
      printed[name] ? scrolled("pre", "printed", `What ${name} printed`, printed[name], textNodes(printed[name]))
        : h("p", { class: "muted" }, "It printed nothing, or that was not recorded."),
      commands[name] && folded("Command that repeats this call", h("div", { class: "command" }, h("code", {}, commands[name]),
        copyButton("Copy", `Copy the command that repeats the call of ${name}`, () => commands[name]))))));
  }

  function badges(one) {
    const found = [];
    if (one.reward !== undefined) {
      found.push(one.reward === null ? h("span", { class: "badge warn" }, "excluded")
        : h("span", { class: "badge reward" }, "reward ", h("b", { class: "num" }, exact(one.reward))));
    }
    if ("correct" in one.verdict) {
      const right = one.verdict.correct;
      found.push(h("span", { class: `badge ${right ? "good" : "bad"}` }, right === null ? "not graded" : right ? "✓ correct" : "✗ wrong"));
    }
    if (one.means.advantage !== null && one.means.advantage !== undefined) {
      found.push(h("span", { class: "badge" }, "advantage ", h("b", { class: "num" }, short(one.means.advantage))));
    }
    found.push(h("span", { class: "badge" }, plural(one.tokens, "token")));
    if (one.finish_reason === "length") found.push(h("span", { class: "badge warn" }, "truncated"));
    else if (one.finish_reason) found.push(h("span", { class: "badge" }, one.finish_reason === "stop" ? "finished" : plain(one.finish_reason)));
    if (one.trained === false) found.push(h("span", { class: "badge warn" }, "not trained on"));
    return found;
  }

  function notes(one) {
    const found = [];
    const parts = Object.entries(one.parts || {});
    const stepwise = new Set((one.steps || []).map((step) => step.name));
    if (parts.length > 1 || parts.some(([, value]) => value !== one.reward)) {
      found.push(h("dl", { class: "parts", "aria-label": "Reward parts, unweighted" }, parts.map(([name, value]) =>
        h("div", {}, h("dt", {}, plain(name)), h("dd", { class: "num" }, value !== null ? exact(value) : stepwise.has(name) ? "by step" : "does not apply")))));
    }
    if (one.failure) found.push(h("p", { class: "note warn" }, "Excluded: ", plain(one.failure)));
    if (one.token_ids.length < one.tokens) {
      found.push(h("p", { class: "note warn" }, `The first ${one.token_ids.length.toLocaleString("en")} of ${plural(one.tokens, "token")} are shown.`));
    }
    if (!one.token_texts) found.push(h("p", { class: "note" }, "The texts of the tokens were not recorded; their ids are shown below the text."));
    return found;
  }

  function more(one) {
    const found = [];
    const graded = { ...one.verdict };
    delete graded.correct;
    for (const [name, value] of Object.entries(graded)) if (value === null || (typeof value === "object" && !Object.keys(value).length)) delete graded[name];
    for (const [words, object] of [["What the grader read", graded], ["Columns of the rewards", one.extra], ["Episode", one.episode]]) {
      if (object && Object.keys(object).length) found.push(h("h4", {}, words), facts(object));
    }
    if (one.policy_version !== undefined && one.policy_version !== null) found.push(h("p", { class: "muted" }, `Sampled by the policy after step ${one.policy_version}${one.staleness ? `, ${plural(one.staleness, "step")} before the one that it trains` : ""}.`));
    return found.length ? folded("Details", found) : null;
  }

  // ---------------------------------------------------------------- tokens

  const tokenText = (one, place) => (one.token_texts ? one.token_texts[place] : `${one.token_ids[place]} `);

  function tokenNodes(one, view) {
    const special = new Set(one.special);
    const steps = new Map();
    for (const step of one.steps || []) steps.set(step.token, [...(steps.get(step.token) || []), step]);
    const starts = new Map(one.blocks.map((block) => [block.start, block]));
    const root = document.createDocumentFragment();
    let target = root;
    let end = -1;
    one.token_ids.forEach((id, place) => {
      if (place === end) target = root;
      const block = starts.get(place);
      if (block) {
        end = block.end;
        const count = plural(block.end - block.start, "token");
        const words = block.kind === "call" ? `Call, ${count}` : `Observation, ${count}: not sampled, not trained on`;
        target = h("span", { class: "block " + block.kind }, h("span", { class: "label" }, words));
        root.append(target);
      }
      const text = tokenText(one, place);
      const kind = (one.mask[place] ? "" : " masked") + (special.has(place) ? " special" : "");
      const token = h("span", { class: "t" + kind, "data-t": String(place) }, text === "" ? h("span", { class: "ws part" }) : textNodes(text, true, view.state.white));
      token.kind = "t" + kind;
      target.append(token);
      for (const step of steps.get(place) || []) {
        target.append(h("span", { class: "step" }, `end of step ${step.number}: ${exact(step.reward)}`, h("span", { class: "visually-hidden" }, " by "), h("span", { class: "by" }, plain(step.name))));
      }
    });
    return root;
  }

  class Completion {
    constructor(one, view) {
      this.one = one;
      this.view = view;
      this.tokens = null;
      this.body = h("div", { class: "body", dir: "auto" });
      this.body.completion = this;
      const name = `Completion ${one.number}`;
      const shown = { ...one };
      delete shown.rendered;
      this.card = h("article", { class: "card completion", id: `c${one.number}`, "aria-label": name, tabindex: "-1" },
        h("header", {}, h("h3", {}, h("a", { href: `#c${one.number}`, "aria-label": `${name}, link` }, `#${one.number}`)),
          h("span", { class: "badges" }, badges(one)), copyButton("JSON", `Copy completion ${one.number} as JSON`, () => JSON.stringify(shown, null, 1))),
        notes(one), !one.token_texts && scrolled("div", "words", `Text of ${name}`, one.text, h("span", { dir: "auto" }, textNodes(one.text))), this.body, more(one));
      this.card.completion = this;
    }

    wait() { // its text, for the browser's search, until its tokens are built
      this.tokens = null;
      this.body.replaceChildren(this.one.token_texts ? this.one.token_texts.join("") : this.one.token_ids.join(" "));
    }

    show() {
      const { state } = this.view;
      this.body.classList.toggle("rendered", state.shown === "rendered");
      for (const [name, value] of [["tabindex", "0"], ["role", "region"], ["aria-label", `Completion ${this.one.number}, rendered`]]) {
        if (state.shown === "rendered") this.body.setAttribute(name, value);
        else this.body.removeAttribute(name);
      }
      if (state.shown === "rendered") {
        this.tokens = null;
        this.body.replaceChildren(...(this.one.rendered === null ? [h("p", { class: "muted" }, "Too long to render: see the tokens.")]
          : rendered(this.one.rendered)));
        return;
      }
      this.body.replaceChildren(tokenNodes(this.one, this.view));
      this.tokens = [...this.body.querySelectorAll("[data-t]")];
      if (this.tokens.length) this.tokens[0].tabIndex = 0;
      this.paint();
    }

    paint() {
      if (!this.tokens) return;
      const { quantity } = this.view;
      const values = quantity && this.one.values[quantity.key];
      this.tokens.forEach((token, place) => {
        token.className = token.kind + " " + (values && this.one.mask[place] ? color(quantity, values[place]) : "none");
      });
    }

    next(place, key) { // the token that an arrow key leads to
      const last = this.tokens.length - 1;
      if (key === "Home") return 0;
      if (key === "End") return last;
      if (key === "ArrowRight") return Math.min(last, place + 1);
      if (key === "ArrowLeft") return Math.max(0, place - 1);
      const from = this.tokens[place].getClientRects()[0];
      const way = key === "ArrowDown" ? 1 : -1;
      let best = place;
      let line = null;
      for (let at = place + way; at >= 0 && at <= last; at += way) {
        const box = this.tokens[at].getClientRects()[0];
        if (!box || Math.abs(box.top - from.top) < 4) continue;
        if (line !== null && Math.abs(box.top - line) >= 4) break;
        if (line === null || Math.abs(box.left - from.left) < Math.abs(this.tokens[best].getClientRects()[0].left - from.left)) best = at;
        line = box.top;
      }
      return best;
    }
  }

  // ---------------------------------------------------------------- the view

  class View {
    constructor(root, data) {
      this.root = root;
      this.data = data;
      const recorded = data.quantities.filter((one) => one.recorded);
      const telling = recorded.find((one) => one.low !== 0 || one.high !== 0);
      this.state = { quantity: "", sort: "sampled", columns: innerWidth >= 1100 ? 2 : 1, shown: "tokens", white: false, ...stored() };
      this.quantity = recorded.find((one) => one.key === this.state.quantity) || telling || recorded[0] || null;
      this.completions = data.completions.map((one) => new Completion(one, this));
      this.draw();
    }

    draw() {
      this.legend = h("div", { class: "legends" });
      this.list = h("div", { class: "completions" }, this.completions.map((one) => one.card));
      this.panel = h("aside", { class: "panel", "aria-label": "Numbers of a token", tabindex: "0" });
      this.live = h("div", { class: "visually-hidden", role: "status", "aria-live": "polite" });
      this.root.replaceChildren(this.head(), this.toolbar(), h("div", { class: "layout" }, this.list, this.panel), this.live);
      this.listen();
      this.layout();
      this.sort();
      this.paint();
      this.build();
    }

    head() {
      const { data } = this;
      const { shown, total } = data.page;
      const rewards = data.outline.map((one) => one.reward).filter((one) => typeof one === "number");
      const top = Math.max(0, ...rewards);
      const low = Math.min(0, ...rewards);
      const here = new Set(data.completions.map((one) => one.number));
      const strip = rewards.length ? h("ol", { class: "strip", "aria-label": "Reward of each completion" }, data.outline.map((one) => {
        const known = typeof one.reward === "number";
        const bar = h("span", { class: known ? "bar" : "bar unknown" });
        bar.style.setProperty("--share", known ? (one.reward - low) / (top - low || 1) : 1);
        const words = `#${one.number}: ${known ? exact(one.reward) : "excluded"}`;
        return h("li", {}, here.has(one.number) ? h("a", { href: `#c${one.number}`, "aria-label": words, title: words }, bar) : h("span", { title: words }, bar, h("span", { class: "visually-hidden" }, words)));
      })) : null;
      const words = [plural(total, data.kind === "group" ? "completion" : "answer")];
      if (data.rewards && data.rewards.mean !== null) words.push(`mean reward ${short(data.rewards.mean)}`);
      if (shown < total) words.push(`#${data.completions[0].number} to #${data.completions[shown - 1].number} on this page`);
      return h("div", { class: "head" },
        data.skipped ? h("p", { class: "note warn" }, "No gradient from this group: ", plain(data.skipped)) : null,
        h("div", { class: "pair" }, promptCard(data.prompt), rewardCard(data)),
        h("div", { class: "overview" }, h("span", {}, words.join(" · ")), strip));
    }

    toolbar() {
      const { data, state } = this;
      const options = data.quantities.map((one) => [one.key, one.label + (one.recorded ? "" : ": not recorded"), !one.recorded]);
      if (!this.quantity) options.unshift(["", "nothing recorded", true]);
      const sorts = [["sampled", "as sampled"], ["reward", "by reward"], ["length", "by length"]];
      if (data.kind === "group") sorts.push(["advantage", "by advantage"]);
      const white = h("input", { type: "checkbox" });
      white.checked = state.white;
      white.addEventListener("change", () => this.change({ white: white.checked }, () => this.build()));
      const json = { ...data, completions: data.completions.map(({ rendered, ...one }) => one) };
      return h("div", { class: "toolbar controls", role: "group", "aria-label": "How to show the completions" },
        choice("Color", this.quantity ? this.quantity.key : "", options, (key) => {
          this.quantity = data.quantities.find((one) => one.key === key);
          this.change({ quantity: key }, () => this.paint());
        }),
        choice("Order", state.sort, sorts, (sort) => this.change({ sort }, () => this.sort())),
        switches("View", state.shown, [["tokens", "Tokens"], ["rendered", "Rendered"]], (shown) => this.change({ shown }, () => this.build())),
        h("span", { class: "columns control" }, h("span", { "aria-hidden": "true" }, "Columns"), switches("Columns", state.columns, [1, 2, 3, 4].map((one) => [one, String(one), plural(one, "column")]), (columns) => this.change({ columns }, () => this.layout()))),
        h("label", { class: "control" }, white, h("span", {}, "White space")),
        copyButton("Copy as JSON", "Copy this page as JSON", () => JSON.stringify(json, null, 1)),
        this.legend);
    }

    change(what, then) {
      Object.assign(this.state, what);
      store(this.state);
      then();
    }

    layout() {
      this.list.style.setProperty("--columns", Math.min(this.state.columns, this.completions.length || 1));
    }

    sort() {
      const by = { reward: (one) => one.reward ?? one.verdict.score, length: (one) => one.tokens, advantage: (one) => one.means.advantage }[this.state.sort];
      const key = (one) => { const value = by ? by(one) : -one.number; return typeof value === "number" ? value : -Infinity; };
      const order = [...this.completions].sort((a, b) => key(b.one) - key(a.one) || a.one.number - b.one.number);
      this.list.append(...order.map((one) => one.card));
    }

    paint() {
      this.legend.replaceChildren(this.quantity ? legend(this.quantity) : h("span", { class: "muted" }, "No numbers of tokens were recorded."));
      for (const one of this.completions) one.paint();
      if (this.current) this.describe(this.current);
    }

    build() {
      if (this.observer) this.observer.disconnect();
      this.root.classList.toggle("no-tokens", this.state.shown === "rendered");
      this.focused = null;
      this.describe(null);
      const count = this.completions.reduce((sum, one) => sum + one.one.token_ids.length, 0);
      if (count <= BUILD_AT_ONCE || !("IntersectionObserver" in window)) {
        for (const one of this.completions) one.show();
        return;
      }
      this.observer = new IntersectionObserver((entries) => {
        for (const { isIntersecting, target } of entries) {
          if (isIntersecting) {
            this.observer.unobserve(target);
            target.completion.show();
          }
        }
      }, { rootMargin: "800px" });
      for (const one of this.completions) {
        one.wait();
        this.observer.observe(one.card);
      }
    }

    listen() {
      const token = (event) => event.target.closest && event.target.closest(".completions [data-t]");
      this.list.addEventListener("mouseover", (event) => { const found = token(event); if (found) this.describe(found); });
      this.list.addEventListener("mouseleave", () => this.describe(this.focused || null));
      this.list.addEventListener("click", (event) => { const found = token(event); if (found) this.focus(found); });
      this.list.addEventListener("focusin", (event) => {
        const found = token(event);
        if (!found) return;
        this.focused = found;
        this.describe(found);
        this.live.textContent = this.words(found, this.quantity ? [this.quantity] : []);
      });
      this.list.addEventListener("keydown", (event) => {
        const found = token(event);
        if (found && event.key === "Escape") {
          found.blur();
          this.focused = null;
          this.describe(null);
        }
        if (!found || event.altKey || event.ctrlKey || event.metaKey) return;
        if (event.key === "Enter") this.live.textContent = this.words(found, this.data.quantities);
        if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) return;
        event.preventDefault();
        const { completion } = found.closest(".body");
        this.focus(completion.tokens[completion.next(Number(found.dataset.t), event.key)]);
      });
    }

    focus(token) {
      for (const other of token.closest(".body").querySelectorAll('[data-t][tabindex="0"]')) other.removeAttribute("tabindex");
      token.tabIndex = 0;
      token.focus({ preventScroll: false });
    }

    words(token, quantities) { // what a screen reader says of a token
      const { one } = token.closest(".body").completion;
      const place = Number(token.dataset.t);
      const text = one.token_texts ? ` ${quoted(one.token_texts[place])},` : "";
      const numbers = quantities.map(({ key, label, unit }) => {
        const value = one.values[key] ? one.values[key][place] : null;
        return ` ${label}: ${value === null ? "not recorded" : `${exact(value)} ${unit}`.trim()}.`;
      });
      return `Token ${place + 1} of ${one.token_ids.length},${text} id ${one.token_ids[place]}.${one.mask[place] ? "" : " Not sampled."}${numbers.join("")}`;
    }

    describe(token) {
      if (this.current) this.current.classList.remove("current");
      this.current = token;
      if (!token || !token.isConnected) {
        this.panel.replaceChildren(h("p", { class: "muted" }, "Point at a token or tap it to see its numbers. With the keyboard: Tab to a completion, then the arrow keys; Enter reads all numbers aloud."));
        return;
      }
      token.classList.add("current");
      const { one } = token.closest(".body").completion;
      const place = Number(token.dataset.t);
      const text = one.token_texts ? one.token_texts[place] : null;
      const values = this.data.quantities.map((quantity) => [quantity, one.values[quantity.key] ? one.values[quantity.key][place] : null]);
      const missing = values.filter(([, value]) => value === null).map(([quantity]) => quantity.label);
      const rows = values.filter(([, value]) => value !== null).map(([quantity, value]) =>
        h("tr", { class: quantity === this.quantity ? "chosen" : "", title: quantity.meaning }, h("th", { scope: "row" }, quantity.label),
          h("td", { class: "num" }, h("span", { class: "swatch t " + (one.mask[place] ? color(quantity, value) : "none") }), exact(value), quantity.unit && h("span", { class: "unit" }, quantity.unit))));
      const chance = one.values.sampling_logprob && one.values.sampling_logprob[place];
      if (typeof chance === "number") {
        rows.push(h("tr", {}, h("th", { scope: "row" }, "probability, engine"), h("td", { class: "num" }, exact(Number(Math.exp(chance).toPrecision(4))))));
      }
      const steps = (one.steps || []).filter((step) => step.token === place);
      const parts = h("div", {},
        h("p", { class: "which" }, h("code", { class: "text" }, text === null ? "text not recorded" : text === "" ? "part of a character" : quoted(text)),
          h("span", { class: "muted" }, `#${one.number}, token ${place + 1} of ${one.token_ids.length}, id ${one.token_ids[place]}`)),
        !one.mask[place] && h("p", { class: "note" }, "Not sampled by the policy, so not trained on."),
        steps.map((step) => h("p", { class: "note" }, `End of step ${step.number} of `, plain(step.name), `: ${exact(step.reward)}`)),
        rows.length ? h("table", { class: "numbers" }, h("tbody", {}, rows)) : null,
        missing.length ? h("p", { class: "muted" }, `Not recorded: ${missing.join("; ")}.`) : null);
      this.panel.replaceChildren(...parts.childNodes);
    }
  }

  function mount(element, data) {
    return new View(element, data);
  }

  function mountAll() {
    for (const element of document.querySelectorAll('[data-view="tokens"]')) {
      const block = element.querySelector("script.data");
      if (block) mount(element, JSON.parse(block.textContent));
    }
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target) target.scrollIntoView();
  }

  window.gruppo = window.gruppo || {};
  window.gruppo.tokens = { mount };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", mountAll);
  else mountAll();
})();
