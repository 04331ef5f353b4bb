// A button above each text that is there to be copied; without the clipboard it selects the text.
for (const text of document.querySelectorAll("[data-copy]")) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "copy", textContent: "Copy" });
  button.setAttribute("aria-label", `Copy ${text.dataset.copy}`);
  const said = Object.assign(document.createElement("span"), { className: "note" });
  said.setAttribute("role", "status");
  button.addEventListener("click", async () => {
    const selection = getSelection();
    selection.selectAllChildren(text);
    let copied = false;
    try {
      await navigator.clipboard.writeText(text.textContent);
      copied = true;
    } catch {
      try { copied = document.execCommand("copy"); } catch { /* selected at least */ }
    }
    said.textContent = copied ? "Copied." : "Selected; copy it with Ctrl+C or ⌘C.";
  });
  const bar = Object.assign(document.createElement("p"), { className: "copying" });
  bar.append(button, " ", said);
  text.before(bar);
}
