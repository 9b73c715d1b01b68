// A report: one file with many pages, each in a template. The part of the address after # names the page.
(function () {
  "use strict";
  const gruppo = window.gruppo;
  const kept = new Map(); // pages with curves, so that their zoom stays
  const places = new Map(); // how far a page was scrolled, for the way back
  let shown = null, followed = false;

  function mount(part) {
    part.querySelectorAll(".charts-section").forEach(gruppo.charts.mount);
    part.querySelectorAll('[data-view="tokens"]').forEach(function (element) {
      gruppo.tokens.mount(element, gruppo.data(element.querySelector("script.data")));
    });
  }

  function open() {
    const main = document.getElementById("main"), crumbs = document.getElementById("crumbs");
    const pages = new Map(Array.from(document.querySelectorAll("template[data-page]"), function (page) { return [page.dataset.page, page]; }));

    function show() {
      const name = window.location.hash.slice(1) || document.body.dataset.front;
      const page = pages.get(name) || pages.get("/missing");
      if (shown !== null) places.set(shown, window.scrollY);
      let content = kept.get(name);
      const fresh = !content;
      if (fresh) {
        const copy = page.content.cloneNode(true);
        content = { crumbs: Array.from(copy.querySelector("[data-crumbs]").childNodes), main: copy.querySelector("[data-content]") };
        if (content.main.querySelector(".charts-section")) kept.set(name, content);
      }
      document.title = page.dataset.title;
      crumbs.replaceChildren.apply(crumbs, content.crumbs);
      main.replaceChildren(content.main);
      if (fresh) mount(main);
      else window.dispatchEvent(new Event("resize")); // the window may have another size than before
      if (shown !== null) main.focus({ preventScroll: true });
      window.scrollTo(0, followed ? 0 : places.get(name) || 0);
      shown = name;
      followed = false;
    }

    document.addEventListener("click", function (event) {
      const link = event.target.closest('a[href^="#"]');
      if (!link) return;
      const name = link.getAttribute("href").slice(1);
      followed = name.startsWith("/");
      if (followed) return;
      event.preventDefault(); // a place on this page
      gruppo.text.reach(name);
    });
    window.addEventListener("hashchange", show);
    if ("scrollRestoration" in window.history) window.history.scrollRestoration = "manual";
    show();
  }

  document.addEventListener("DOMContentLoaded", open);
})();
