// Arrow keys and j/k step through the prompts of the Compare tab, unless something else has them.
document.addEventListener("keydown", (event) => {
  const step = { ArrowRight: "next", j: "next", ArrowLeft: "previous", k: "previous" }[event.key];
  if (!step || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  const taken = "input, textarea, select, [contenteditable=true], [role=tab], [role=slider], [role=listbox]";
  if (event.target instanceof Element && event.target.closest(taken)) return;
  const button = document.getElementById(`compare-${step}`);
  if (!button || button.offsetParent === null) return;
  event.preventDefault();
  button.click();
});
