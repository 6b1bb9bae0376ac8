// What the page does by itself: the tab in the address, keys, enlarged pictures, pairs, copying.

// What the parts made of HTML call when they are there.
const bilora = {
  // The list of prompts: reports a click on a row, and keeps the chosen row in sight.
  pick(element, trigger, watch) {
    element.addEventListener("click", (event) => {
      const row = event.target.closest("[data-prompt]");
      if (row) trigger("select", { prompt: Number(row.dataset.prompt) });
    });
    let top = 0;
    element.addEventListener("scroll", (event) => { top = event.target.scrollTop; }, true);
    watch("value", () => {
      const list = element.querySelector(".prompts");
      if (!list) return;
      list.scrollTop = top;
      const row = list.querySelector("[aria-current]");
      if (!row) return;
      const above = row.offsetTop - list.offsetTop;
      if (above < list.scrollTop || above + row.offsetHeight > list.scrollTop + list.clientHeight)
        list.scrollTop = above - list.clientHeight / 2 + row.offsetHeight / 2;
    });
  },
  // Puts a view into the browser's address, beside what else is there (`__theme`).
  address(query) {
    if (!query) return "";
    const here = new URLSearchParams(window.location.search), view = new URLSearchParams(query);
    for (const key of ["scores", "a", "b", "also", "prompt", "seed", "metric", "order", "words"])
      here.delete(key);
    for (const [key, value] of view) here.set(key, value);
    window.history.replaceState(null, "", `${window.location.pathname}?${here}`);
    return window.location.origin + window.location.pathname + query;
  },
};

(() => {
  const PICTURE = "img.zoom";
  const named = (tab) => tab.textContent.trim().toLowerCase();
  const tabs = () => [...document.querySelectorAll("#frame-tabs [role=tab]")];
  const wanted = () => new URLSearchParams(window.location.search).get("tab") || "compare";
  const choose = () => {
    const tab = tabs().find((tab) => named(tab) === wanted());
    if (tab && tab.getAttribute("aria-selected") !== "true") tab.click();
    return Boolean(tab);
  };
  let going = false;  // while the address leads and the tab follows
  const follow = () => { going = true; const done = choose(); going = false; return done; };
  window.addEventListener("popstate", follow);
  const waiting = setInterval(() => { if (follow()) clearInterval(waiting); }, 50);

  document.addEventListener("click", (event) => {
    if (!(event.target instanceof Element)) return;
    const tab = event.target.closest("#frame-tabs [role=tab]");
    if (tab && !going && named(tab) !== wanted()) {
      const query = new URLSearchParams(window.location.search);
      query.set("tab", named(tab));
      window.history.pushState(null, "", `${window.location.pathname}?${query}`);
    }
    // A message is about the form that it came from.
    if (tab || event.target.closest("#generate-go, #grid-go"))
      for (const close of document.querySelectorAll(".toast-close")) close.click();
    const copy = event.target.closest("[data-copy]");
    if (copy) copied(copy);
    if (event.target.matches(PICTURE)) enlarge(event.target);
  });

  const copied = async (button) => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {  // without https the browser keeps its clipboard to itself
      window.getSelection().selectAllChildren(code);
      button.textContent = "Press Ctrl-C";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  };

  // Names for a screen reader, which Gradio leaves out.
  const NAMES = {
    "#compare-link input": "Link to this view",
    "#results-figures .download-link": "Download the figure",
    "#results-figures button:has(img)": "Enlarge the figure",
  };
  const name = () => {
    for (const [place, text] of Object.entries(NAMES))
      for (const element of document.querySelectorAll(`${place}:not([aria-label])`))
        element.setAttribute("aria-label", text);
  };
  new MutationObserver(name).observe(document.documentElement, { childList: true, subtree: true });

  // Enlarged pictures: Escape closes, the arrow keys go to the next one that is on the page.
  let shown = null;
  const frame = () => {
    const known = document.getElementById("zoom");
    if (known) return known;
    const made = document.createElement("dialog");
    made.id = "zoom";
    made.innerHTML = '<img alt=""><p></p><button type="button" autofocus>Close</button>';
    made.addEventListener("click", (event) => { if (event.target.tagName !== "IMG") made.close(); });
    made.addEventListener("close", () => { if (shown) shown.focus(); });
    (document.querySelector(".gradio-container") || document.body).append(made);
    return made;
  };
  const enlarge = (picture) => {
    shown = picture;
    const box = frame();
    box.querySelector("img").src = picture.src;
    box.querySelector("img").alt = box.querySelector("p").textContent = picture.alt;
    if (!box.open) box.showModal();
  };
  const step = (by) => {
    const all = [...document.querySelectorAll(PICTURE)].filter((one) => one.offsetParent !== null);
    // A part of the page that was drawn anew has the same picture in another element.
    const same = (one) => one === shown || (!shown.isConnected && one.src === shown.src);
    const at = all.findIndex(same);
    if (at >= 0 && all[at + by]) enlarge(all[at + by]);
  };

  // Two pictures in one place: how much of the first is seen.
  document.addEventListener("input", (event) => {
    if (event.target instanceof Element && event.target.matches(".pair input"))
      event.target.parentElement.style.setProperty("--at", `${event.target.value}%`);
  });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    if (!(event.target instanceof Element)) return;
    const by = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1 }[event.key];
    const box = document.getElementById("zoom");
    if (box && box.open) {
      if (by) { event.preventDefault(); step(by); }
      return;
    }
    if (event.target.matches(PICTURE) && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      enlarge(event.target);
      return;
    }
    // Arrow keys and j/k step through the prompts of the Compare tab, unless something else has them.
    const taken = "input, textarea, select, [contenteditable=true], [role=tab], [role=slider], [role=listbox]";
    if (!by || event.target.closest(taken)) return;
    const button = document.getElementById(by > 0 ? "compare-next" : "compare-previous");
    if (!button || button.offsetParent === null) return;
    event.preventDefault();
    button.click();
  });
})();
