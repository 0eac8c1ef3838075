// The panels: one crosshair, one range and one horizontal axis for all of them.

const MARGIN = { left: 56, right: 12, top: 8, bottom: 24 };
const HEIGHT = 210;

class Curves {
  constructor(root, toolbar, data) {
    this.runs = data.runs;
    this.axes = Object.entries(data.axes).filter(([key]) => this.runs.some((run) => run.metrics[key]));
    this.axis = this.axes.length ? this.axes[0][0] : "step";
    this.range = null; // [low, high] when zoomed
    this.cursor = null; // a value of the axis
    this.pinned = false;
    this.hidden = new Set(); // labels of lines that were switched off
    this.root = root;
    this.panels = data.panels.map((panel) => new Panel(this, panel));
    this.other = this.otherPanel();
    root.append(...this.panels.map((panel) => panel.node));
    this.makeToolbar(toolbar);
    new ResizeObserver(() => this.drawIfResized()).observe(root);
    this.draw();
  }

  /** A panel for the metrics that have none: any of them, one at a time. */
  otherPanel() {
    const drawn = new Set(this.panels.flatMap((panel) => panel.spec.lines.map((line) => line.key)));
    const axes = new Set(this.axes.map(([key]) => key));
    const keys = new Set(this.runs.flatMap((run) => Object.keys(run.metrics)));
    const names = [...keys].filter((key) => !drawn.has(key) && !axes.has(key)).sort();
    if (!names.length) return null;
    const select = element("select", { "aria-label": "another metric" });
    select.append(...names.map((name) => element("option", { value: name }, name)));
    const panel = new Panel(this, this.otherSpec(names[0]));
    panel.title.replaceChildren("Another metric: ", select);
    select.addEventListener("change", () => {
      panel.spec = this.otherSpec(select.value);
      panel.makeLegend();
      panel.draw();
      this.show();
    });
    this.panels.push(panel);
    return panel;
  }

  otherSpec(key) {
    const lines = this.runs.map((run, index) => ({
      key,
      run: index,
      label: this.runs.length > 1 ? run.label : key,
      colour: run.colour,
      style: run.style,
      table: "metrics",
      error: "",
    }));
    const values = lines.flatMap((line) => this.runs[line.run].metrics[key] || []).filter((v) => v > 0);
    const log = values.length > 1 && Math.max(...values) / Math.min(...values) > 1000;
    const known = lines.filter((line) => this.runs[line.run].metrics[key]);
    return { title: key, lines: known, log, low: null, percent: false };
  }

  makeToolbar(toolbar) {
    this.readout = element("output", { id: "readout", "aria-live": "polite" });
    this.release = element("button", { type: "button", hidden: true, onclick: () => this.letGo() }, "let go");
    this.whole = element("button", { type: "button", hidden: true, onclick: () => this.zoom(null) }, "show everything");
    const chooser = choice("axis", "against", this.axes, this.axis, (axis) => this.changeAxis(axis));
    toolbar.append(chooser, this.readout, this.release, this.whole);
  }

  // --- the horizontal axis ---

  /** A line's horizontal values, vertical values and errors. */
  columns(line) {
    const table = this.runs[line.run][line.table];
    return { x: table[this.axis] || [], y: table[line.key] || [], error: line.error ? table[line.error] : null };
  }

  extent() {
    if (this.range) return this.range;
    const ends = this.runs.flatMap((run) => [run.metrics, run.tests].map((table) => table[this.axis] || []));
    const values = ends.flat().filter((v) => v !== null);
    if (!values.length) return [0, 1];
    const low = values.reduce((a, b) => Math.min(a, b));
    const high = values.reduce((a, b) => Math.max(a, b));
    return low === high ? [low - 1, high + 1] : [low, high];
  }

  /** The step that is nearest to a value of the axis: its run and row. */
  nearest(value) {
    let best = null;
    this.runs.forEach((run, index) => {
      const row = nearestIndex(run.metrics[this.axis] || [], value);
      if (row === null) return;
      const distance = Math.abs(run.metrics[this.axis][row] - value);
      if (!best || distance < best.distance) best = { run: index, row, distance };
    });
    return best;
  }

  changeAxis(axis) {
    const place = this.cursor === null ? null : this.nearest(this.cursor);
    this.axis = axis;
    this.range = null;
    const column = place && this.runs[place.run].metrics[axis];
    this.cursor = column ? column[place.row] : null;
    this.draw();
  }

  zoom(range) {
    this.range = range;
    this.whole.hidden = range === null;
    this.draw();
  }

  zoomBy(factor) {
    const [low, high] = this.extent();
    const middle = this.cursor === null ? (low + high) / 2 : this.cursor;
    const range = [middle - (middle - low) * factor, middle + (high - middle) * factor];
    this.range = null;
    const [first, last] = this.extent();
    const kept = [Math.max(first, range[0]), Math.min(last, range[1])];
    this.zoom(kept[0] <= first && kept[1] >= last ? null : kept);
  }

  // --- the crosshair ---

  /** Move the crosshair to the step nearest to a value, unless it is held. */
  point(value) {
    if (this.pinned) return;
    const place = this.nearest(value);
    this.cursor = place && this.runs[place.run].metrics[this.axis][place.row];
    this.show();
  }

  /** Move it by a number of steps of the run that it is on. */
  move(steps) {
    const [low, high] = this.extent();
    const place = this.nearest(this.cursor === null ? (steps > 0 ? low : high) : this.cursor);
    if (!place) return;
    const column = this.runs[place.run].metrics[this.axis];
    const fresh = this.cursor === null && Number.isFinite(steps);
    const first = fresh ? place.row : place.row + steps;
    this.cursor = column[Math.min(column.length - 1, Math.max(0, first))];
    this.show();
  }

  pin() {
    this.pinned = this.cursor !== null && !this.pinned;
    this.show();
  }

  letGo() {
    this.pinned = false;
    this.cursor = null;
    this.show();
  }

  /** Hold the crosshair at an optimizer step (of the first run that has it). */
  goTo(step) {
    for (const run of this.runs) {
      const row = (run.metrics.step || []).indexOf(step);
      if (row < 0) continue;
      this.range = null;
      this.cursor = (run.metrics[this.axis] || run.metrics.step)[row];
      this.pinned = true;
      this.draw();
      return;
    }
  }

  leave() {
    if (!this.pinned) this.letGo();
  }

  show() {
    this.panels.forEach((panel) => panel.point());
    this.release.hidden = !this.pinned;
    this.root.classList.toggle("pinned", this.pinned);
    const place = this.cursor === null ? null : this.nearest(this.cursor);
    this.readout.replaceChildren(...(place ? this.placeText(place) : []));
  }

  placeText({ run, row }) {
    const metrics = this.runs[run].metrics;
    const parts = [["step ", "step"], ["completions ", "completions"], ["accepted tokens ", "accepted_tokens"]];
    const known = parts.filter(([, key]) => metrics[key] && metrics[key][row] !== null);
    const chosen = this.runs.length > 1 ? known.filter(([, key]) => key === this.axis) : known;
    const items = chosen.map(([name, key]) => element("span", {}, name, element("b", {}, format(metrics[key][row]))));
    const step = metrics.step[row];
    if (this.runs.length === 1 && document.getElementById(`tokens-${step}`)) {
      items.push(element("a", { href: `#tokens-${step}` }, "its tokens"));
    }
    return items;
  }

  // --- drawing ---

  drawIfResized() {
    if (this.root.clientWidth !== this.width) this.draw();
  }

  draw() {
    this.width = this.root.clientWidth;
    this.panels.forEach((panel) => panel.draw());
    this.show();
  }

  toggle(label) {
    if (!this.hidden.delete(label)) this.hidden.add(label);
    this.draw();
  }
}

/** The position of the value nearest to `value` among ascending ones, some of them null. */
function nearestIndex(values, value) {
  let best = null;
  for (let i = 0; i < values.length; i++) {
    if (values[i] === null) continue;
    if (best === null || Math.abs(values[i] - value) <= Math.abs(values[best] - value)) best = i;
    else if (values[i] > value) break;
  }
  return best;
}
