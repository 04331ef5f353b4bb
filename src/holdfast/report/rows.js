// The list of test rows before and after: unpacked when the page opens, filtered as one types, drawn where it is seen.
async function testRows(section, packed) {
  const find = (name) => section.querySelector(`[data-rows=${name}]`);
  const [list, space, count, dialog] = ["list", "space", "count", "dialog"].map(find);
  const [byRun, byTask, byChange] = ["run", "task", "change"].map(find);
  const byText = document.createElement("input");
  Object.assign(byText, { type: "search", autocomplete: "off", spellcheck: false }).dataset.rows = "text";
  find("words").append(byText);

  const CHANGES = {
    lost: (was, is) => is < 0.5 && was - is >= 0.5,
    gained: (was, is) => was < 0.5 && is - was >= 0.5,
    wrong: (was, is) => was < 0.5 && is < 0.5,
    right: (was, is) => was >= 0.5 && is >= 0.5,
    any: () => true,
  };
  let shown = []; // [chunk, place of the run in it, row]

  async function unpack(chunk) {
    chunk.texts = JSON.parse(await unpackText(chunk.rows));
    delete chunk.rows;
  }

  // Lower-case texts that are searched, made once: of a row, and of each run's responses to it.
  function searched(chunk) {
    const { prompts, answers, numbers, runs } = chunk.texts;
    const low = (...texts) => texts.join("\n").toLowerCase();
    chunk.low ??= {
      rows: numbers.map((_, row) => low(prompts[row], answers[row])),
      runs: runs.map(({ before, after }) => before.map((text, row) => low(text, after[row]))),
    };
    return chunk.low;
  }

  function filter() {
    const changed = CHANGES[byChange.value];
    const words = byText.value.toLowerCase().split(/\s+/).filter(Boolean);
    const whole = [];
    let of = 0;
    for (const chunk of packed.chunks) {
      if (byTask.value && chunk.task !== byTask.value) continue;
      chunk.runs.forEach((run, place) => {
        if (byRun.value && run.run !== Number(byRun.value)) return;
        const { was, is } = chunk.texts.runs[place];
        of += was.length;
        const low = words.length ? searched(chunk) : null;
        for (let row = 0; row < was.length; row++) {
          if (!changed(was[row], is[row])) continue;
          const said = (word) => low.rows[row].includes(word) || low.runs[place][row].includes(word);
          if (!low || words.every(said)) whole.push([chunk, place, row]);
        }
      });
    }
    shown = whole;
    count.textContent = `${shown.length.toLocaleString("en")} of ${of.toLocaleString("en")} answers`;
    list.scrollTop = 0;
    draw();
  }

  function element(tag, kind, text) {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function mark(score) {
    const graded = score === 0 || score === 1 ? "" : ` ${score.toFixed(3)}`;
    return element("span", "mark", (score >= 0.5 ? "✓" : "✗") + graded);
  }

  // The pictures that a row shows, before its prompt.
  function prompt(kind, { prompts, pictures }, row) {
    const made = element("span", kind);
    for (const name of pictures?.[row] ?? []) {
      const image = element("img");
      if (packed.thumbnails?.[name]) made.append(Object.assign(image, { src: packed.thumbnails[name], alt: "" }));
    }
    made.append(element("bdi", "", prompts[row]));
    return made;
  }

  function response(text, score) {
    const made = element("span", score >= 0.5 ? "right" : "wrong");
    made.append(mark(score), " ", text.trim() ? element("bdi", "", text) : element("span", "empty", "nothing"));
    return made;
  }

  function line(at, height) {
    const [chunk, place, row] = shown[at];
    const { texts, runs, task } = chunk;
    const made = element("button", "row");
    made.type = "button";
    made.style.top = `${at * height}px`;
    made.setAttribute("aria-label", `answer ${at + 1} of ${shown.length}`);
    const where = element("span", "where");
    const label = packed.runs[runs[place].run];
    where.append(element("bdi", "", task), ` · row ${texts.numbers[row]} · `, element("bdi", "", label));
    const { before, after, was, is } = texts.runs[place];
    const both = element("span", "both");
    both.append(response(before[row], was[row]), response(after[row], is[row]));
    made.append(where, prompt("prompt", texts, row), both);
    made.addEventListener("click", () => open(chunk, row));
    return made;
  }

  function draw() {
    const height = parseFloat(getComputedStyle(list).getPropertyValue("--row"));
    space.style.height = `${shown.length * height}px`;
    const first = Math.max(0, Math.floor(list.scrollTop / height) - 2);
    const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / height) + 2);
    space.replaceChildren(...Array.from({ length: last - first }, (_, i) => line(first + i, height)));
  }

  // One test row in full, with what every run answered.
  function open(chunk, row) {
    const { texts, runs, task } = chunk;
    const parts = element("dl", "response");
    const add = (name, ...content) => {
      parts.append(element("dt", "", name), element("dd"));
      parts.lastChild.append(...content);
    };
    add("prompt", prompt("", texts, row));
    add("expected", element("bdi", "", texts.answers[row]));
    runs.forEach((run, place) => {
      const { before, after, was, is } = texts.runs[place];
      const both = element("div", "pair");
      both.append(response(before[row], was[row]), response(after[row], is[row]));
      add(`${packed.runs[run.run]}: ${run.since}, and at the end`, both);
    });
    const head = element("h3");
    head.append(element("bdi", "", task), `, test row ${texts.numbers[row]}`);
    const close = element("button", "close", "Close");
    close.addEventListener("click", () => dialog.close());
    dialog.replaceChildren(close, head, parts);
    dialog.showModal();
    dialog.scrollTop = 0;
  }

  // A cell of the table of counts, and "show all" of what was lost, choose their run, task and kind of change.
  for (const cell of document.querySelectorAll("[data-choose]")) {
    cell.addEventListener("click", () => {
      [byRun.value, byTask.value, byChange.value] = JSON.parse(cell.dataset.choose);
      byText.value = "";
      filter();
      section.querySelector(".filters").scrollIntoView({ block: "start" });
    });
  }

  for (const choice of [byRun, byTask, byChange]) choice.addEventListener("change", filter);
  byText.addEventListener("input", filter);
  list.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
  new ResizeObserver(draw).observe(list);

  await Promise.all(packed.chunks.map(unpack));
  if (packed.chunks.every(({ runs }) => runs.every(({ lost }) => !lost))) byChange.value = "any"; // no empty list
  filter();
  section.dataset.ready = Math.round(performance.now());
}
