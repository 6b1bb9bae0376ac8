// The page's behavior in the browser: the tab in the address, keys, enlarged pictures, sliders, and copying.

// Functions that HTML widgets and events of the page call
const bilora = {
  // For the list of prompts: report a click on a row, and keep the chosen row visible.
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
  // Write a view into the browser's address, keep other parameters such as `__theme`, and return the link.
  address(query) {
    if (!query) return "";
    const parameters = new URLSearchParams(window.location.search), view = new URLSearchParams(query);
    for (const key of ["scores", "a", "b", "also", "prompt", "seed", "metric", "order", "words"])
      parameters.delete(key);
    for (const [key, value] of view) parameters.set(key, value);
    window.history.replaceState(null, "", `${window.location.pathname}?${parameters}`);
    return window.location.origin + window.location.pathname + query;
  },
};

(() => {
  const PICTURE = "img.zoom";
  // Widgets that use the arrow keys or letters
  const WIDGETS = "input, textarea, select, [contenteditable=true], [role=tab], [role=slider], [role=listbox]";

  // The address names the tab, so that a link opens it and the browser's Back button returns to it.
  const tabName = (tab) => tab.textContent.trim().toLowerCase();
  const tabs = () => [...document.querySelectorAll("#frame-tabs [role=tab]")];
  const tabInAddress = () => new URLSearchParams(window.location.search).get("tab") || "compare";
  let isFollowing = false;  // true while the tab follows a change of the address
  const followAddress = () => {
    isFollowing = true;
    const tab = tabs().find((tab) => tabName(tab) === tabInAddress());
    if (tab && tab.getAttribute("aria-selected") !== "true") tab.click();
    isFollowing = false;
    return Boolean(tab);
  };
  window.addEventListener("popstate", followAddress);
  const waiting = setInterval(() => { if (followAddress()) clearInterval(waiting); }, 50);

  document.addEventListener("click", (event) => {
    if (!(event.target instanceof Element)) return;
    const tab = event.target.closest("#frame-tabs [role=tab]");
    if (tab && !isFollowing && tabName(tab) !== tabInAddress()) {
      const query = new URLSearchParams(window.location.search);
      query.set("tab", tabName(tab));
      window.history.pushState(null, "", `${window.location.pathname}?${query}`);
    }
    // Close old messages when the user changes the tab or starts a new job.
    if (tab || event.target.closest("#generate-go, #grid-go"))
      for (const close of document.querySelectorAll(".toast-close")) close.click();
    const button = event.target.closest("[data-copy]");
    if (button) copyCommand(button);
    if (event.target.matches(PICTURE)) enlarge(event.target);
  });

  const copyCommand = async (button) => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {  // browsers allow clipboard access only over https or on localhost
      window.getSelection().selectAllChildren(code);
      button.textContent = "Press Ctrl-C";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  };

  // Set a label for screen readers, because Gradio sets none.
  const addLabel = () => {
    for (const field of document.querySelectorAll("#compare-link input:not([aria-label])"))
      field.setAttribute("aria-label", "Link to this view");
  };
  new MutationObserver(addLabel).observe(document.documentElement, { childList: true, subtree: true });

  // Enlarged pictures: Escape closes the picture, and the arrow keys show the previous or next one on the page.
  let enlargedPicture = null;
  const zoomDialog = () => {
    const existing = document.getElementById("zoom");
    if (existing) return existing;
    const dialog = document.createElement("dialog");
    dialog.id = "zoom";
    dialog.innerHTML = '<img alt=""><p></p><button type="button" autofocus>Close</button>';
    dialog.addEventListener("click", (event) => { if (event.target.tagName !== "IMG") dialog.close(); });
    dialog.addEventListener("close", () => { if (enlargedPicture) enlargedPicture.focus(); });
    (document.querySelector(".gradio-container") || document.body).append(dialog);
    return dialog;
  };
  const enlarge = (picture) => {
    enlargedPicture = picture;
    const dialog = zoomDialog();
    const image = dialog.querySelector("img");
    image.src = picture.src;
    image.alt = dialog.querySelector("p").textContent = picture.alt;
    image.style.setProperty("--ratio", picture.naturalWidth / picture.naturalHeight);
    if (!dialog.open) dialog.showModal();
  };
  const enlargeNext = (offset) => {
    const pictures = [...document.querySelectorAll(PICTURE)].filter((picture) => picture.offsetParent !== null);
    // After an update of the page, the same picture may be in another element.
    const isSame = (picture) => picture === enlargedPicture
      || (!enlargedPicture.isConnected && picture.src === enlargedPicture.src);
    const index = pictures.findIndex(isSame);
    if (index >= 0 && pictures[index + offset]) enlarge(pictures[index + offset]);
  };

  // A slider over two pictures: set the visible part of the first picture.
  document.addEventListener("input", (event) => {
    if (event.target instanceof Element && event.target.matches(".pair input"))
      event.target.parentElement.style.setProperty("--at", `${event.target.value}%`);
  });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    if (!(event.target instanceof Element)) return;
    const offset = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1 }[event.key];
    const dialog = document.getElementById("zoom");
    if (dialog && dialog.open) {
      if (offset) { event.preventDefault(); enlargeNext(offset); }
      return;
    }
    if (event.target.matches(PICTURE) && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      enlarge(event.target);
      return;
    }
    // The arrow keys and j/k step through the prompts of the tab Compare, unless a widget uses these keys.
    if (!offset || event.target.closest(WIDGETS)) return;
    const button = document.getElementById(offset > 0 ? "compare-next" : "compare-previous");
    if (!button || button.offsetParent === null) return;
    event.preventDefault();
    button.click();
  });
})();
