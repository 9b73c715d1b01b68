// The list of runs: comparing needs two of them.
(function () {
  "use strict";
  document.addEventListener("DOMContentLoaded", function () {
    const form = document.getElementById("chosen"), button = document.getElementById("compare");
    if (!form || !button) return;
    const update = function () {
      const count = form.querySelectorAll("input:checked").length;
      button.disabled = count < 2;
      button.textContent = count < 2 ? "Tick runs to compare" : "Compare " + count + " runs";
    };
    form.addEventListener("change", update);
    form.addEventListener("gruppo:replaced", update);
    update();
  });
})();
