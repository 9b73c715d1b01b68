// Follows the first reading of a run's tables, and opens the page when it is done.
(function () {
  "use strict";
  document.addEventListener("DOMContentLoaded", function () {
    const part = document.querySelector("[data-indexing]");
    if (!part) return;
    const bar = part.querySelector("progress"), words = part.querySelector("[role=status]");
    const look = function () {
      fetch(part.dataset.indexing, { credentials: "same-origin" })
        .then(function (answer) { return answer.ok ? answer.json() : Promise.reject(answer.status); })
        .then(function (now) {
          if (now.ready) { window.location.reload(); return; }
          bar.max = now.total || 1;
          bar.value = now.done;
          words.textContent = now.done.toLocaleString("en") + " of " + (now.total ? now.total.toLocaleString("en") : "…") + " tables";
          window.setTimeout(look, 500);
        })
        .catch(function () { words.textContent = "The server does not answer. Reload the page once it runs again."; });
    };
    window.setTimeout(look, 300);
  });
})();
