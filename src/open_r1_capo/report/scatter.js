// A step's tokens in one diagram: what m_F said of each before the step, against how far the policy really moved there.

const SQUARE = { width: 380, height: 280, left: 58, right: 12, top: 10, bottom: 40 };

class Scatter {
  constructor(tip, onpick) {
    this.tip = tip;
    this.onpick = onpick; // called with a completion and the position of its token
    this.svg = shape("svg", { width: SQUARE.width, height: SQUARE.height, role: "img" });
    this.words = element("div", { class: "facts" });
    this.node = element("figure", { class: "scatter" }, this.svg, this.words);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("click", () => this.near && this.onpick(this.near.completion, this.near.i));
  }

  draw(record, bound) {
    this.record = record;
    this.points = record.completions.flatMap(tokenPoints);
    const drawn = this.points.filter((point) => point.x > 0 && point.y > 0);
    this.node.hidden = !drawn.length;
    if (!drawn.length) return;
    const ends = (key) => [smallest(drawn.map((p) => p[key])), -smallest(drawn.map((p) => -p[key]))];
    const [x, y] = [ends("x"), ends("y")];
    this.x = scale(x[0] / 1.5, x[1] * 1.5, SQUARE.left, SQUARE.width - SQUARE.right, true);
    this.y = scale(y[0] / 1.5, y[1] * 1.5, SQUARE.height - SQUARE.bottom, SQUARE.top, true);
    this.drawn = drawn;
    this.mark = shape("circle", { r: 5, class: "mark", cx: -9, cy: -9 });
    const kept = drawn.filter((point) => !point.rejected);
    const rejected = drawn.filter((point) => point.rejected);
    this.svg.setAttribute("aria-label", "m_F against the true KL of every token");
    const dots = [this.dots(kept, "kept"), this.dots(rejected, "out")];
    this.svg.replaceChildren(this.axes(), this.lines(bound), ...dots, this.mark);
    this.words.replaceChildren(...this.facts().map((fact) => element("p", {}, fact)));
  }

  axes() {
    const marks = [];
    const bottom = SQUARE.height - SQUARE.bottom;
    for (const tick of this.x.ticks(5)) {
      const at = this.x.at(tick);
      marks.push(shape("line", { class: "grid", x1: at, x2: at, y1: SQUARE.top, y2: bottom }));
      marks.push(shape("text", { x: at, y: bottom + 15, "text-anchor": "middle" }, axisLabel(tick, true)));
    }
    for (const tick of this.y.ticks(5)) {
      const at = this.y.at(tick);
      marks.push(shape("line", { class: "grid", x1: SQUARE.left, x2: SQUARE.width - SQUARE.right, y1: at, y2: at }));
      marks.push(shape("text", { x: SQUARE.left - 6, y: at + 4, "text-anchor": "end" }, axisLabel(tick, true)));
    }
    const middle = (SQUARE.left + SQUARE.width) / 2;
    const below = { x: middle, y: SQUARE.height - 6, "text-anchor": "middle" };
    marks.push(shape("text", below, "m_F of the token, before the step (nats)"));
    const turned = { transform: `translate(12 ${bottom / 2}) rotate(-90)`, "text-anchor": "middle" };
    marks.push(shape("text", turned, "true KL at the token (nats)"));
    return shape("g", { class: "axes" }, ...marks);
  }

  /** Where both are equal, and the bound. */
  lines(bound) {
    const [left, right] = [SQUARE.left, SQUARE.width - SQUARE.right];
    const [bottom, top] = [SQUARE.height - SQUARE.bottom, SQUARE.top];
    const from = Math.max(this.x.back10(left), this.y.back10(bottom));
    const to = Math.min(this.x.back10(right), this.y.back10(top));
    const parts = [];
    if (from < to) {
      const ends = { x1: this.x.at(from), y1: this.y.at(from), x2: this.x.at(to), y2: this.y.at(to) };
      parts.push(shape("line", { class: "equal", ...ends }, shape("title", {}, "equal")));
    }
    if (bound && bound > this.x.back10(left) && bound < this.x.back10(right)) {
      const at = this.x.at(bound);
      parts.push(shape("line", { class: "bound", x1: at, x2: at, y1: top, y2: bottom }));
    }
    return shape("g", {}, ...parts);
  }

  /** All dots of a kind are one path of round caps, which is fast for any number of them. */
  dots(points, name) {
    const d = points.map((p) => `M${this.x.at(p.x).toFixed(1)},${this.y.at(p.y).toFixed(1)}h0`).join("");
    return shape("path", { class: `cloud ${name}`, d });
  }

  facts() {
    const known = this.points.filter((point) => point.y !== null && point.x !== null);
    const out = known.filter((point) => point.rejected);
    const sum = (points) => points.reduce((total, point) => total + point.y, 0);
    const whole = this.record.completions.length === this.record.of ? "" : " of the completions on this page";
    const tokens = `${format(known.length)} tokens with A ≠ 0${whole}`;
    const facts = [`Rank correlation of m_F with the true KL: ${format(rankCorrelation(known))} over ${tokens}.`];
    if (out.length && sum(known) > 0) {
      const count = `${format(out.length)} rejected (${format(out.length / known.length, true)} of these)`;
      facts.push(`The ${count} carry ${format(sum(out) / sum(known), true)} of the KL at these tokens.`);
    }
    return [...facts, "Dashed: equal. Orange: rejected; the line is the bound. Click a dot to see its token."];
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let best = null;
    for (const point of this.drawn || []) {
      const distance = Math.hypot(this.x.at(point.x) - x, this.y.at(point.y) - y);
      if (distance < 24 && (!best || distance < best.distance)) best = { ...point, distance };
    }
    this.near = best;
    if (!best) return this.leave();
    this.mark.setAttribute("cx", this.x.at(best.x));
    this.mark.setAttribute("cy", this.y.at(best.y));
    this.tip.show(this.mark, best.completion, best.i);
  }

  leave() {
    this.near = null;
    if (this.mark) this.mark.setAttribute("cx", -9);
    this.tip.hide();
  }
}

/** A point for every token with a gradient. */
function tokenPoints(completion) {
  if (!completion.kl || completion.advantage === 0) return [];
  const { policy_shift: x, kl: y, weight } = completion;
  return x.map((value, i) => ({ x: value, y: y[i], rejected: weight[i] === 0, completion, i }));
}

function smallest(values) {
  return values.reduce((a, b) => Math.min(a, b));
}

/** Spearman's, with mean ranks for equal values. */
function rankCorrelation(points) {
  if (points.length < 3) return null;
  const [a, b] = [ranks(points.map((p) => p.x)), ranks(points.map((p) => p.y))];
  const middle = (points.length - 1) / 2;
  const product = (u, v) => u.reduce((total, rank, i) => total + (rank - middle) * (v[i] - middle), 0);
  const size = Math.sqrt(product(a, a) * product(b, b));
  return size > 0 ? product(a, b) / size : null;
}

function ranks(values) {
  const order = values.map((_, i) => i).sort((i, j) => values[i] - values[j]);
  const found = new Array(values.length);
  for (let from = 0; from < order.length; ) {
    let to = from;
    while (to < order.length && values[order[to]] === values[order[from]]) to++;
    for (let i = from; i < to; i++) found[order[i]] = (from + to - 1) / 2;
    from = to;
  }
  return found;
}
