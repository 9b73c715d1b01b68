// A token view in a frame of a notebook, whose address is that of the notebook.
document.addEventListener("click", function (event) {
  "use strict";
  const link = event.target.closest('a[href^="#"]');
  if (!link) return;
  event.preventDefault();
  window.gruppo.text.reach(link.getAttribute("href").slice(1));
});
