// One diagram: scales, lines, a legend that reads the values at the crosshair, and what the pointer and the keys do.

class Panel {
  constructor(curves, spec) {
    this.curves = curves;
    this.spec = spec;
    this.title = element("figcaption", {}, spec.title);
    this.legend = element("ul", { class: "legend" });
    const label = `${spec.title}, curves`;
    this.svg = shape("svg", { tabindex: 0, role: "application", height: HEIGHT, "aria-label": label });
    this.node = element("figure", { class: "panel" }, this.title, this.svg, this.legend);
    this.makeLegend();
    this.listen();
  }

  makeLegend() {
    this.values = this.spec.lines.map(() => element("b", {}));
    this.items = this.spec.lines.map((line, i) => {
      const swatch = element("span", { class: `swatch ${line.style}`, style: `--colour: var(--c${line.colour})` });
      const onclick = () => this.curves.toggle(this.id(line));
      const toggle = element("button", { type: "button", title: "hide or show this line", onclick }, swatch, line.label);
      return element("li", {}, toggle, this.values[i]);
    });
    const single = this.curves.runs.length === 1; // its main lines are drawn last, on top
    this.legend.replaceChildren(...(single ? [...this.items].reverse() : this.items));
  }

  /** Lines are hidden by run where a page shows several, else one by one. */
  id(line) {
    return this.curves.runs.length > 1 ? line.label : `${this.spec.title}/${line.label}`;
  }

  lines() {
    return this.spec.lines.filter((line) => !this.curves.hidden.has(this.id(line)));
  }

  value(y) {
    if (y === null || y === undefined) return null;
    if (!this.spec.log) return y;
    return y === 0 ? null : Math.abs(y);
  }

  // --- drawing ---

  draw() {
    this.width = Math.max(240, this.svg.parentNode.clientWidth - 2 || 480);
    this.svg.setAttribute("width", this.width);
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.items.forEach((item, i) => {
      item.firstChild.setAttribute("aria-pressed", String(!this.curves.hidden.has(this.id(this.spec.lines[i]))));
    });
    const [low, high] = this.curves.extent();
    this.x = scale(low, high, MARGIN.left, this.width - MARGIN.right, false);
    this.y = this.verticalScale(low, high);
    this.cross = shape("g", { class: "cross" });
    this.band = shape("rect", { class: "band", y: MARGIN.top, height: HEIGHT - MARGIN.top - MARGIN.bottom, width: 0 });
    const clip = `clip${this.curves.panels ? this.curves.panels.indexOf(this) : 0}`;
    const area = { x: MARGIN.left, y: 0, width: this.width - MARGIN.left - MARGIN.right + 6, height: HEIGHT };
    const drawn = this.lines().map((line) => this.drawLine(line));
    this.svg.replaceChildren(
      shape("clipPath", { id: clip }, shape("rect", area)),
      this.drawAxes(),
      shape("g", { "clip-path": `url(#${clip})` }, ...drawn),
      this.band,
      this.cross,
    );
  }

  verticalScale(low, high) {
    const seen = [];
    for (const line of this.lines()) {
      const { x, y, error } = this.curves.columns(line);
      y.forEach((v, i) => {
        const value = this.value(v);
        if (value === null || x[i] === null || x[i] < low || x[i] > high) return;
        seen.push(value);
        if (error && error[i]) seen.push(value - error[i], value + error[i]);
      });
    }
    let least = seen.length ? seen.reduce((a, b) => Math.min(a, b)) : this.spec.log ? 0.1 : 0;
    let most = seen.length ? seen.reduce((a, b) => Math.max(a, b)) : 1;
    if (this.spec.log) return scale(least / 1.3, most * 1.3, HEIGHT - MARGIN.bottom, MARGIN.top, true);
    if (this.spec.low !== null) least = Math.min(least, this.spec.low);
    if (least === most) most += Math.abs(most) || 1;
    return scale(least, most + (most - least) * 0.05, HEIGHT - MARGIN.bottom, MARGIN.top, false);
  }

  drawAxes() {
    const marks = [];
    const right = this.width - MARGIN.right;
    for (const tick of this.y.ticks(6)) {
      const y = this.y.at(tick);
      marks.push(shape("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y, y2: y }));
      const label = this.spec.percent ? trim((100 * tick).toPrecision(3)) : axisLabel(tick, this.y.log);
      marks.push(shape("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, label));
    }
    for (const tick of this.x.ticks(Math.min(6, this.width / 90))) {
      const x = this.x.at(tick);
      marks.push(shape("line", { class: "grid", x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
      marks.push(shape("text", { x, y: HEIGHT - 7, "text-anchor": "middle" }, axisLabel(tick, false)));
    }
    return shape("g", { class: "axes" }, ...marks);
  }

  drawLine(line) {
    const { x, y, error } = this.curves.columns(line);
    const colour = `--colour: var(--c${line.colour})`;
    const parts = [];
    const dots = [];
    const bars = [];
    let last = -1; // row of the point before
    let path = "";
    let single = null; // the point that the segment so far consists of, if it is only one: a line would not show
    for (let i = 0; i < y.length; i++) {
      const value = this.value(y[i]);
      if (value === null || x[i] === null || x[i] === undefined) continue;
      const [px, py] = [this.x.at(x[i]), this.y.at(value)];
      const connected = last >= 0 && (dotted(line) || last === i - 1 || this.gapIsEmpty(y, last, i));
      if (!connected && single) dots.push(single);
      path += `${connected ? "L" : "M"}${px.toFixed(1)},${py.toFixed(1)}`;
      single = connected ? null : shape("circle", { cx: px, cy: py, r: 1.8 });
      if (dotted(line)) dots.push(shape("circle", { cx: px, cy: py, r: 3 }));
      if (error && error[i]) bars.push(`M${px},${this.y.at(value - error[i])}V${this.y.at(value + error[i])}`);
      last = i;
    }
    if (single) dots.push(single);
    parts.push(shape("path", { d: path }));
    if (bars.length) parts.push(shape("path", { class: "error", d: bars.join("") }));
    return shape("g", { class: `line ${line.style}`, style: colour }, ...parts, ...dots);
  }

  /** Rows without a value are bridged; a zero that a logarithm cannot show is not. */
  gapIsEmpty(y, from, to) {
    return y.slice(from + 1, to).every((v) => v === null);
  }

  // --- the crosshair ---

  point() {
    const at = this.curves.cursor;
    const marks = [];
    if (at !== null) {
      const x = this.x.at(at);
      if (x >= MARGIN.left - 1 && x <= this.width - MARGIN.right + 1) {
        marks.push(shape("line", { x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
      }
    }
    this.spec.lines.forEach((line, i) => {
      const found = at === null ? null : this.read(line, at);
      this.values[i].replaceChildren(...(found ? [format(found.y, this.spec.percent), found.note] : []));
      if (found && found.near && !this.curves.hidden.has(this.id(line)) && this.value(found.y) !== null) {
        const place = { cx: this.x.at(found.x), cy: this.y.at(this.value(found.y)), r: 4 };
        marks.push(shape("circle", { ...place, style: `--colour: var(--c${line.colour})` }));
      }
    });
    this.cross.replaceChildren(...marks);
  }

  /** A line's value at the crosshair: of that very step, or of the last one that has a value, which is said. */
  read(line, at) {
    const { x, y, error } = this.curves.columns(line);
    let row = null;
    for (let i = 0; i < x.length && (x[i] === null || x[i] <= at); i++) {
      if (y[i] !== null && y[i] !== undefined && x[i] !== null) row = i;
    }
    if (row === null) return null;
    const table = this.curves.runs[line.run][line.table];
    const own = table === this.curves.runs[line.run].metrics && x.every((v) => v === null || v <= at) && x.at(-1) < at;
    let note = error && error[row] ? ` ± ${format(error[row])}` : "";
    if (x[row] !== at && (dotted(line) || own || this.curves.runs.length === 1)) {
      note += table.step ? ` at step ${table.step[row]}` : "";
    }
    return { x: x[row], y: y[row], near: !own, note };
  }

  // --- pointer and keys ---

  listen() {
    let start = null;
    const place = (event) => event.clientX - this.svg.getBoundingClientRect().left;
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.button === 0) start = place(event);
    });
    this.svg.addEventListener("pointermove", (event) => {
      const x = place(event);
      this.curves.point(this.x.back(x));
      if (start !== null && event.buttons) this.select(start, x);
    });
    this.svg.addEventListener("pointerup", (event) => {
      if (start !== null) this.release(start, place(event));
      start = null;
    });
    this.svg.addEventListener("pointerleave", () => {
      start = null;
      this.select(0, 0);
      this.curves.leave();
    });
    this.svg.addEventListener("dblclick", () => {
      this.curves.letGo();
      this.curves.zoom(null);
    });
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  select(from, to) {
    this.band.setAttribute("x", Math.min(from, to));
    this.band.setAttribute("width", Math.abs(to - from) > 4 ? Math.abs(to - from) : 0);
  }

  release(from, to) {
    this.select(0, 0);
    if (Math.abs(to - from) <= 4) {
      this.curves.pinned = false;
      this.curves.point(this.x.back(to));
      this.curves.pin();
    } else {
      const ends = [this.x.back(Math.min(from, to)), this.x.back(Math.max(from, to))];
      const [low, high] = this.curves.extent();
      this.curves.zoom([Math.max(low, ends[0]), Math.min(high, ends[1])]);
    }
  }

  key(event) {
    const stride = event.shiftKey ? 10 : 1;
    const actions = {
      ArrowLeft: () => this.curves.move(-stride),
      ArrowRight: () => this.curves.move(stride),
      Home: () => this.curves.move(-Infinity),
      End: () => this.curves.move(Infinity),
      Enter: () => this.curves.pin(),
      Escape: () => this.curves.letGo(),
      "+": () => this.curves.zoomBy(0.5),
      "-": () => this.curves.zoomBy(2),
    };
    if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    actions[event.key]();
  }
}

function dotted(line) {
  return line.style.split(" ").includes("dots");
}

/** From values to pixels and back, with round ticks. */
function scale(low, high, from, to, log) {
  const [a, b] = log ? [Math.log10(low), Math.log10(high)] : [low, high];
  const at = (value) => from + (((log ? Math.log10(value) : value) - a) / (b - a)) * (to - from);
  const back = (pixel) => a + ((pixel - from) / (to - from)) * (b - a);
  const back10 = (pixel) => 10 ** back(pixel); // of a logarithmic scale
  return { at, back, back10, log, ticks: (count) => (log ? logTicks(a, b, count) : linearTicks(a, b, count)) };
}

function linearTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((size) => size >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(i * step);
  return ticks;
}

/** Powers of ten, every other or fewer of them over a wide range; also 2 and 5 over a narrow one. */
function logTicks(low, high, count) {
  const every = Math.max(1, Math.ceil((high - low) / (count + 1)));
  const ticks = [];
  for (let power = Math.floor(low); power <= high; power++) {
    if (power % every === 0) ticks.push(10 ** power);
    if (high - low < 1.5) ticks.push(2 * 10 ** power, 5 * 10 ** power);
  }
  return ticks.filter((tick) => Math.log10(tick) >= low && Math.log10(tick) <= high);
}

function axisLabel(value, log) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6) return `${trim((value / 1e6).toPrecision(3))} M`;
  if (size >= 1e4) return `${trim((value / 1e3).toPrecision(3))} k`;
  if (log ? size < 0.01 : size < 1e-3) return value.toExponential(0);
  return trim(value.toPrecision(3));
}
