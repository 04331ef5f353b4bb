// Asks for what is new every two seconds while the page is seen, and puts it where the old was; plots stay and move on.
const EVERY = 2000;
const place = document.getElementById("live");
const asked = document.getElementById("asked");
let tag = null;

function show({ title, html, figures }) {
  document.title = title;
  const made = document.createElement("template");
  made.innerHTML = html;
  for (const box of made.content.querySelectorAll(".plot")) {
    const old = document.getElementById(box.id);
    if (old?.querySelector(".main-svg")) {
      old.style.cssText = box.style.cssText;
      box.replaceWith(old);
    }
  }
  place.replaceChildren(made.content);
  if (plots) {
    plots.figures = figures;
    drawAll(place);
  }
}

async function ask() {
  if (document.hidden) return;
  try {
    const answer = await fetch("state", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
    if (answer.ok) {
      show(await answer.json());
      tag = answer.headers.get("ETag");
    }
    asked.textContent = answer.ok || answer.status === 304 ? "" : `The server answers with ${answer.status}.`;
  } catch {
    asked.textContent = "The server has ended, so this page stays as it is.";
  }
}

(async () => {
  for (;;) {
    await new Promise((done) => setTimeout(done, EVERY));
    await ask();
  }
})();
