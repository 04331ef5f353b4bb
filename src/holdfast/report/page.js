// Draws the plots in the person's light or dark setting, again when it changes, and light on paper. Until plotly, which
// is large, has been unpacked and read the page can be used without plots.
const data = JSON.parse(document.getElementById("data").textContent);
let plots; // figures and templates, once they are unpacked
const dark = matchMedia("(prefers-color-scheme: dark)");
const setting = () => (dark.matches ? "dark" : "light");
const PAPER_WIDTH = 660;

function draw(box, theme, width) {
  const figure = structuredClone(plots.figures[box.id]);
  for (const trace of figure.data) {
    const { rows, columns } = trace.meta ?? {}; // of a heat map: what a cell says under the pointer
    if (rows) trace.customdata = rows.map((row) => columns.map((column) => [row, column]));
  }
  Object.assign(figure.layout, { template: plots.templates[theme], width });
  Plotly.react(box, figure.data, figure.layout, {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["toImage"]],
    toImageButtonOptions: { format: "svg", filename: box.id },
  });
}

// A plot in closed details has no width to fill; it is drawn when they open.
function drawAll(within = document, theme = setting(), width = undefined) {
  if (typeof Plotly === "undefined") return;
  for (const box of within.querySelectorAll(".plot")) {
    if (!box.closest("details:not([open])")) draw(box, theme, width);
  }
}

const inView = (box) => {
  const { top, bottom } = box.getBoundingClientRect();
  return top < innerHeight && bottom > 0;
};

// The plots in view first; then the others one at a time, while nothing else is to be done.
async function drawFirst() {
  const left = [...document.querySelectorAll(".plot")].filter((box) => !box.closest("details:not([open])"));
  const idle = () => new Promise((done) => (window.requestIdleCallback ?? setTimeout)(done));
  for (const box of left.filter(inView)) draw(box, setting());
  performance.mark("plots in view");
  while (left.length) {
    await idle();
    const [box] = left.splice(Math.max(0, left.findIndex(inView)), 1);
    if (!box.querySelector(".main-svg")) draw(box, setting());
  }
  performance.mark("plots");
}

for (const details of document.querySelectorAll("details")) {
  details.addEventListener("toggle", () => drawAll(details));
}
dark.addEventListener("change", () => drawAll());
addEventListener("beforeprint", () => drawAll(document, "light", PAPER_WIDTH));
addEventListener("afterprint", () => drawAll());

(async () => {
  if (!document.getElementById("too-old").hidden) return;
  if (document.getElementById("rows")) await testRows(document.getElementById("rows"), data.rows);
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  plots = JSON.parse(await unpackText(data.plots));
  const script = document.createElement("script");
  script.textContent = await unpackText(document.getElementById("plotly").textContent);
  document.head.append(script);
  await drawFirst();
})();
