// Code that is wider than its box must be reachable by keyboard to be scrolled. The theme sees to it when the page
// loads, when the inside of a folded solution has no width yet; so look again whenever something unfolds.
function reachWideCode() {
  for (const code of document.querySelectorAll(".bd-article pre")) {
    if (code.scrollWidth > code.clientWidth) code.tabIndex = 0;
  }
}
for (const event of ["click", "keyup", "toggle"]) {
  document.addEventListener(event, () => requestAnimationFrame(reachWideCode), true);
}
