// What scrolls sideways, such as a wide table, can be reached and scrolled with the keyboard.
const reachable = () => {
  for (const part of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code")) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
  }
};
addEventListener("load", reachable);
addEventListener("resize", reachable);

// The theme's search is a dialog without a name.
document.querySelector("[data-md-component=search]")?.setAttribute("aria-label", "Search");

// Nor have the buttons that it puts into blocks of code, one after the other.
let named = 0;
new MutationObserver(() => {
  for (const buttons of document.querySelectorAll(".md-code__nav:not([aria-label])")) {
    named += 1;
    buttons.setAttribute("aria-label", `Code block ${named}`);
  }
}).observe(document.body, { childList: true, subtree: true });
