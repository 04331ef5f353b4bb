// Draws the plots in the person's light or dark setting, again when it changes, and light on paper. Until plotly, which
// is large, has been read the page can be used without plots.
const page = JSON.parse(document.getElementById("plots").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const PAPER_WIDTH = 660;

function draw(box, theme, width) {
  const figure = structuredClone(page.figures[box.id]);
  Object.assign(figure.layout, { template: page.templates[theme], width });
  Plotly.react(box, figure.data, figure.layout, {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["toImage"]],
    toImageButtonOptions: { format: "svg", filename: box.id },
  });
}

// A plot in closed details has no width to fill; it is drawn when they open.
function drawAll(within = document, theme = dark.matches ? "dark" : "light", width = undefined) {
  if (typeof Plotly === "undefined") return;
  for (const box of within.querySelectorAll(".plot")) {
    if (!box.closest("details:not([open])")) draw(box, theme, width);
  }
}

for (const details of document.querySelectorAll("details")) {
  details.addEventListener("toggle", () => drawAll(details));
}
dark.addEventListener("change", () => drawAll());
addEventListener("beforeprint", () => drawAll(document, "light", PAPER_WIDTH));
addEventListener("afterprint", () => drawAll());

(async () => {
  if (document.getElementById("rows")) await testRows(document.getElementById("rows"), page.rows);
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  const script = document.createElement("script");
  script.textContent = document.getElementById("plotly").textContent;
  document.head.append(script);
  drawAll();
})();
