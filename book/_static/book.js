// Code that is wider than its box must be reachable by keyboard to be scrolled. The theme sees to it when the page
// loads, when the inside of a folded solution has no width yet; so look again whenever something unfolds.
function reachWideCode() {
  for (const code of document.querySelectorAll(".bd-article pre")) {
    if (code.scrollWidth > code.clientWidth) code.tabIndex = 0;
  }
}
for (const event of ["click", "keyup", "toggle"]) {
  document.addEventListener(event, () => requestAnimationFrame(() => { reachWideCode(); reachWideFormulas(); }), true);
}

// MathJax 3 breaks no formula inside a line: one that is wider than its paragraph, on a phone, scrolls by itself.
function reachWideFormulas() {
  for (const formula of document.querySelectorAll(".bd-article mjx-container:not([display])")) {
    const box = formula.closest("p, li, dd, dt, td, figcaption, h1, h2, h3")?.clientWidth;
    if (box && formula.getBoundingClientRect().width > box) formula.classList.add("wide");
  }
}
window.addEventListener("load", () => window.MathJax?.startup?.promise.then(reachWideFormulas));
