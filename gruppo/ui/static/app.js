// What every page has: colors, copying, and parts that follow a run.
(function () {
  "use strict";
  const gruppo = (window.gruppo = window.gruppo || {});

  function remember(name, value) {
    try {
      if (value === undefined) return window.localStorage.getItem(name);
      window.localStorage.setItem(name, value);
    } catch (error) { /* a page from a file may have no storage */ }
    return null;
  }
  gruppo.remember = remember;

  // Colors: the system's, until the button chooses others.
  const root = document.documentElement;
  const chosen = remember("gruppo.theme");
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  gruppo.isDark = function () {
    return root.dataset.theme ? root.dataset.theme === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
  };
  function changed() { document.dispatchEvent(new CustomEvent("gruppo:theme")); }
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);

  // Data blocks beside an element.
  gruppo.data = function (script) { return JSON.parse(script.textContent); };

  gruppo.copy = function (text, button) {
    const done = function (words) {
      const before = button.textContent;
      button.textContent = words;
      window.setTimeout(function () { button.textContent = before; }, 1500);
    };
    const fallback = function () {
      const area = document.createElement("textarea");
      area.value = text;
      area.className = "visually-hidden";
      document.body.append(area);
      area.select();
      let copied = false;
      try { copied = document.execCommand("copy"); } catch (error) { copied = false; }
      area.remove();
      button.focus();
      done(copied ? "Copied" : "Select and copy it");
    };
    if (navigator.clipboard && window.isSecureContext) navigator.clipboard.writeText(text).then(function () { done("Copied"); }, fallback);
    else fallback();
  };

  // One stream per address. It is closed while the page is hidden: a browser allows few connections to a server.
  const streams = new Map();
  gruppo.follow = function (address, listener) {
    let stream = streams.get(address);
    if (!stream) {
      stream = { source: null, listeners: [], last: null };
      streams.set(address, stream);
      if (!document.hidden) open(address, stream);
    }
    stream.listeners.push(listener);
  };
  function open(address, stream) {
    stream.source = new EventSource(address);
    stream.source.onmessage = function (event) {
      if (event.data === stream.last) return;
      stream.last = event.data;
      const now = JSON.parse(event.data);
      stream.listeners.forEach(function (listener) { listener(now); });
    };
  }
  document.addEventListener("visibilitychange", function () {
    streams.forEach(function (stream, address) {
      if (document.hidden && stream.source) { stream.source.close(); stream.source = null; }
      else if (!document.hidden && !stream.source) open(address, stream);
    });
  });

  // Parts of a page that the server renders anew: what is chosen and what has the focus stays.
  function replace(element, html) {
    const fresh = new DOMParser().parseFromString(html, "text/html").body;
    const checked = new Set(Array.from(element.querySelectorAll("input:checked"), function (box) { return box.id; }));
    const focused = document.activeElement && element.contains(document.activeElement) ? document.activeElement : null;
    const place = focused && (focused.id ? "#" + CSS.escape(focused.id) : focused.getAttribute("href") ? 'a[href="' + CSS.escape(focused.getAttribute("href")) + '"]' : null);
    const scroll = Array.from(element.querySelectorAll(".scroll, .events"), function (part) { return [part.scrollLeft, part.scrollTop]; });
    element.replaceChildren.apply(element, Array.from(fresh.childNodes));
    checked.forEach(function (id) { const box = document.getElementById(id); if (box) box.checked = true; });
    Array.from(element.querySelectorAll(".scroll, .events")).forEach(function (part, number) {
      if (scroll[number]) { part.scrollLeft = scroll[number][0]; part.scrollTop = scroll[number][1]; }
    });
    if (place) { const again = element.querySelector(place); if (again) again.focus({ preventScroll: true }); }
    element.dispatchEvent(new CustomEvent("gruppo:replaced", { bubbles: true }));
  }
  function live(element) {
    let shown = null, busy = false, again = false;
    const load = function () {
      if (busy) { again = true; return; }
      busy = true;
      fetch(element.dataset.live, { credentials: "same-origin" })
        .then(function (answer) { return answer.ok ? answer.text() : Promise.reject(answer.status); })
        .then(function (html) { if (html !== shown) replace(element, html); shown = html; })
        .catch(function () { /* the server was stopped; the stream opens again by itself */ })
        .finally(function () { busy = false; if (again) { again = false; load(); } });
    };
    let last = null;
    if (element.dataset.stream) gruppo.follow(element.dataset.stream, function (now) {
      const state = JSON.stringify([now.revision, now.state]);
      if (state !== last) load();
      last = state;
      const words = element.querySelector("[data-words]");
      if (words && now.words) words.textContent = now.words;
    });
  }

  document.addEventListener("DOMContentLoaded", function () {
    const button = document.getElementById("theme");
    if (button) button.addEventListener("click", function () {
      root.dataset.theme = gruppo.isDark() ? "light" : "dark";
      remember("gruppo.theme", root.dataset.theme);
      changed();
    });
    document.querySelectorAll("[data-live]").forEach(live);
    document.addEventListener("click", function (event) {
      const button = event.target.closest("[data-copy]");
      if (button) gruppo.copy(button.dataset.copy, button);
    });
    document.querySelectorAll("form.auto select").forEach(function (select) {
      select.addEventListener("change", function () { select.form.requestSubmit(); });
    });
  });
})();
