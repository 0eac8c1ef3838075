// The tokens of recorded steps: coloured by a quantity, marked where rejected, each with its numbers.

const PAGE = 12; // completions drawn at once

// what tokens can be coloured by; `signed` has two colours, `log` a logarithmic scale
const QUANTITIES = {
  policy_shift: { label: "m_F", name: "policy shift m_F", log: true },
  objective_shift: { label: "m_H", name: "objective shift m_H", log: true, signed: true },
  kl: { label: "true KL", name: "true KL of the step (nats)", log: true },
  change: { label: "log π after/before", name: "change of log π", signed: true },
  gradient_norm: { label: "gradient", name: "gradient norm |A| ‖v‖ ‖x‖", log: true },
  entropy: { label: "entropy", name: "entropy (nats)" },
};

const ORDERS = {
  rejected: ["most rejected tokens", (c) => -c.rejected],
  policy_shift: ["largest m_F", (c) => -c.largest.policy_shift],
  objective_shift: ["largest |m_H|", (c) => -c.largest.objective_shift],
  kl: ["largest true KL", (c) => -c.largest.kl],
  reward: ["lowest reward", (c) => (c.reward === null ? Infinity : c.reward)],
  position: ["order in the batch", (c) => c.position],
};

const REASONS = [
  [1, "F", "m_F is over its bound"],
  [2, "H", "m_H is outside its bounds"],
  [4, "!", "a shift is not finite"],
  [8, "R", "another rule"],
];

class Microscope {
  constructor(root, records, bounds) {
    this.root = root;
    this.records = records;
    this.bounds = bounds;
    this.colour = "policy_shift";
    this.order = "rejected";
    this.onlyRejected = false;
    records.forEach((record) => record.completions.forEach(digest));
    this.tip = new Tip();
    this.scatter = new Scatter(this.tip, (completion, i) => this.find(completion, i));
    this.makeControls();
    this.legend = element("div", { class: "ramp", id: "ramp" });
    this.head = element("p", { class: "facts" });
    this.list = element("div", { class: "completions" });
    this.more = element("button", { type: "button", onclick: () => this.drawMore() });
    root.append(this.tabs, this.head, this.scatter.node, this.controls, this.legend, this.list, this.more);
    this.listen();
    this.open(mostTelling(records));
  }

  makeControls() {
    const tab = (record, i) => {
      const names = [`step ${record.step}`, ...record.labels].join(" · ");
      const attributes = { type: "button", id: `tokens-${record.step}`, onclick: () => this.open(i) };
      return element("button", attributes, names);
    };
    this.tabs = element("div", { class: "tabs" }, ...this.records.map(tab));
    const known = Object.entries(QUANTITIES).filter(([key]) =>
      this.records.some((record) => record.completions.some((c) => c[key])),
    );
    const colours = known.map(([key, quantity]) => [key, quantity.label]);
    const select = element("select", { id: "order" });
    select.append(...Object.entries(ORDERS).map(([value, [label]]) => element("option", { value }, label)));
    select.addEventListener("change", () => this.reorder(select.value));
    const only = element("input", { type: "checkbox", id: "only-rejected" });
    only.addEventListener("change", () => this.filter(only.checked));
    this.controls = element(
      "div",
      { class: "toolbar" },
      choice("colour", "colour", colours, this.colour, (key) => this.recolour(key)),
      element("label", {}, "sorted by ", select),
      element("label", {}, only, " only completions with rejected tokens"),
    );
  }

  // --- what is shown ---

  open(index) {
    this.record = this.records[index];
    this.tip.hide();
    [...this.tabs.children].forEach((tab, i) => tab.setAttribute("aria-pressed", String(i === index)));
    const { step, lr, taken_lr, measured_kl, completions, of } = this.record;
    const tokens = completions.reduce((sum, c) => sum + c.tokens.length, 0);
    const rejected = completions.reduce((sum, c) => sum + c.rejected, 0);
    const scaled = completions.reduce((sum, c) => sum + c.scaled, 0);
    const shown =
      completions.length < of
        ? `${completions.length} of ${of} completions are on this page, those with most rejected tokens or largest m_F: `
        : `${of} completions: `;
    const judged = `${format(rejected)} rejected${scaled ? `, ${format(scaled)} scaled down` : ""}`;
    this.head.replaceChildren(
      `${shown}${format(tokens)} tokens, ${judged}. Learning rate ${format(taken_lr)}`,
      lr !== taken_lr ? ` of the scheduled ${format(lr)}` : "",
      measured_kl === null ? ". " : `; measured KL ${format(measured_kl)} nats. `,
      element("a", { href: `#step-${step}` }, "Show the step in the curves"),
    );
    this.scatter.draw(this.record, this.bounds.policy);
    this.draw();
  }

  /** Go to a token, wherever its completion is in the list. */
  find(completion, i) {
    let index = this.shown.indexOf(completion);
    if (index < 0) {
      document.getElementById("only-rejected").checked = false;
      this.filter(false);
      index = this.shown.indexOf(completion);
    }
    while (this.list.children.length <= index) this.drawMore();
    const span = this.list.children[index].querySelectorAll(".token")[i];
    span.scrollIntoView({ block: "center" });
    span.focus();
  }

  recolour(key) {
    this.colour = key;
    this.paint(this.list.querySelectorAll(".token"));
    this.drawRamp();
  }

  reorder(order) {
    this.order = order;
    this.draw();
  }

  filter(onlyRejected) {
    this.onlyRejected = onlyRejected;
    this.draw();
  }

  draw() {
    const key = ORDERS[this.order][1];
    const chosen = this.record.completions.filter((c) => c.rejected || !this.onlyRejected);
    this.shown = chosen.sort((a, b) => key(a) - key(b) || -a.largest.policy_shift + b.largest.policy_shift);
    this.list.replaceChildren();
    if (!this.shown.length) this.list.append(element("p", { class: "note" }, "No token of this step was rejected."));
    this.drawRamp();
    this.drawMore();
  }

  drawMore() {
    const from = this.list.querySelectorAll(".completion").length;
    this.shown.slice(from, from + PAGE).forEach((completion, i) => this.list.append(this.card(completion, from + i)));
    const left = this.shown.length - from - PAGE;
    this.more.hidden = left <= 0;
    this.more.textContent = `show ${Math.min(PAGE, left)} more of ${left}`;
  }

  card(completion, index) {
    const { reward, advantage, rejected, tokens, largest, prompt } = completion;
    const facts = [
      `reward ${format(reward)}`,
      `A ${format(advantage)}`,
      `${format(tokens.length)} tokens`,
      `${rejected ? format(rejected) : "none"} rejected`,
      `largest m_F ${format(largest.policy_shift)}`,
    ];
    const text = element("div", { class: "text", role: "group", "aria-label": "tokens of this completion" });
    text.append(...tokens.map((token, i) => this.token(completion, token, i)));
    if (text.firstChild) text.firstChild.tabIndex = 0;
    this.paint(text.children, completion);
    return element(
      "article",
      { class: "completion", "data-index": index },
      element("p", { class: "facts" }, ...facts.map((fact) => element("span", {}, fact))),
      element("details", {}, element("summary", {}, firstLine(prompt)), element("pre", {}, prompt)),
      text,
    );
  }

  token(completion, token, i) {
    const span = element("span", { class: "token", "data-i": i, tabindex: -1 }, visible(token));
    const weight = completion.weight[i];
    if (weight === 0) {
      span.classList.add("rejected");
      span.dataset.mark = marks(completion.reason[i]);
    } else if (weight !== null && weight < 1) span.classList.add("scaled");
    return span;
  }

  // --- colours ---

  /** The range of the colours: up to the step's largest value, over three decades below its bound if it has one. */
  domain() {
    const { log } = QUANTITIES[this.colour];
    const largest = this.record.completions.reduce((most, c) => Math.max(most, c.largest[this.colour] || 0), 0);
    const bound = this.boundOf();
    const high = Math.max(largest, bound || 0) || 1;
    return { low: log ? (bound ? Math.min(bound, high) : high) / 1e3 : 0, high, log };
  }

  boundOf() {
    if (this.colour === "policy_shift") return this.bounds.policy;
    if (this.colour === "objective_shift" && this.bounds.objective) return this.bounds.objective[1];
    return null;
  }

  paint(spans, completion = null) {
    const domain = this.domain();
    for (const span of spans) {
      const column = (completion || this.completionOf(span))[this.colour];
      const value = column ? column[span.dataset.i] : null;
      span.style.setProperty("--level", level(value, domain).toFixed(3));
      span.classList.toggle("negative", value !== null && value < 0);
    }
  }

  drawRamp() {
    const { name, signed, log } = QUANTITIES[this.colour];
    const { low, high } = this.domain();
    const range = log ? `${format(low)} and below … ${format(high)}` : `0 … ${format(high)}`;
    const bound = this.boundOf();
    const parts = [name, element("span", { class: "bar positive" }), signed ? `${range}, above zero` : range];
    if (signed) parts.push(element("span", { class: "bar negative" }), "below zero");
    if (bound) parts.push(`bound ${format(bound)}`);
    parts.push(element("span", { class: "token rejected", "data-mark": "F" }, "rejected"));
    parts.push("F over the policy bound, H over the objective bounds, ! not finite, R another rule;");
    parts.push(element("span", { class: "token scaled" }, "scaled down"));
    this.legend.replaceChildren(...parts.map((part) => (typeof part === "string" ? element("span", {}, part) : part)));
  }

  // --- pointer and keys ---

  completionOf(span) {
    return this.shown[span.closest(".completion").dataset.index];
  }

  listen() {
    const token = (event) => (event.target.closest ? event.target.closest(".token") : null);
    const show = (event) => {
      const span = token(event);
      if (span) this.tip.show(span, this.completionOf(span), Number(span.dataset.i));
    };
    this.list.addEventListener("pointerover", (event) => (token(event) ? show(event) : this.tip.hide()));
    this.list.addEventListener("pointerleave", () => this.tip.hide());
    this.list.addEventListener("focusin", show);
    this.list.addEventListener("focusout", () => this.tip.hide());
    this.list.addEventListener("keydown", (event) => {
      if (token(event)) this.key(event, token(event));
    });
  }

  /** Arrows walk over the tokens; up and down jump to the rejected ones. */
  key(event, span) {
    const spans = [...span.parentNode.children];
    const here = spans.indexOf(span);
    const rejected = (list) => list.find((other) => other.classList.contains("rejected"));
    const targets = {
      ArrowRight: () => spans[here + 1],
      ArrowLeft: () => spans[here - 1],
      ArrowDown: () => rejected(spans.slice(here + 1)),
      ArrowUp: () => rejected(spans.slice(0, here).reverse()),
      Home: () => spans[0],
      End: () => spans.at(-1),
      Escape: () => this.tip.hide(),
    };
    if (!targets[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const target = targets[event.key]();
    if (!target) return;
    span.tabIndex = -1;
    target.tabIndex = 0;
    target.focus();
  }
}

/** What is shown of a token under the pointer or with the focus. */
class Tip {
  constructor() {
    this.node = element("div", { class: "tip", id: "tip", role: "tooltip", hidden: true });
    document.body.append(this.node);
  }

  show(span, completion, i) {
    const at = (key) => (completion[key] ? completion[key][i] : null);
    const rows = [
      ["π before → after", `${format(at("prob"))} → ${format(at("prob_after"))}`],
      ["A", format(completion.advantage)],
      ["m_F", format(at("policy_shift"))],
      ["m_H", format(at("objective_shift"))],
      ["gradient norm", format(at("gradient_norm"))],
      ["entropy", format(at("entropy"))],
      ["true KL", format(at("kl"))],
      ["KL by the last layer", format(at("kl_head"))],
      ["weight", format(at("weight"))],
    ];
    const body = rows.map(([name, value]) => element("tr", {}, element("th", {}, name), element("td", {}, value)));
    const reasons = REASONS.filter(([bit]) => at("reason") & bit).map(([, , words]) => words);
    const title = `${JSON.stringify(completion.tokens[i])}, token ${i + 1} of ${completion.tokens.length}`;
    const verdict = verdictOf(at("weight"));
    this.node.replaceChildren(element("p", {}, title), element("table", {}, ...body));
    if (verdict || reasons.length) {
      this.node.append(element("p", { class: "reason" }, [verdict, reasons.join("; ")].filter(Boolean).join(": ")));
    }
    this.node.hidden = false;
    this.place(span);
    if (this.span) this.span.removeAttribute("aria-describedby");
    this.span = span;
    span.setAttribute("aria-describedby", "tip");
  }

  /** Below the token, or above it where there is no room, and inside the window. */
  place(span) {
    const box = span.getClientRects()[0] || span.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.node;
    const room = document.documentElement;
    const below = box.bottom + 6 + height <= room.clientHeight || box.top - 6 - height < 0;
    this.node.style.left = `${Math.max(8, Math.min(box.left, room.clientWidth - width - 8))}px`;
    this.node.style.top = `${below ? box.bottom + 6 : box.top - 6 - height}px`;
  }

  hide() {
    this.node.hidden = true;
  }
}

/** The record with most rejected tokens, or else the one whose step went furthest. */
function mostTelling(records) {
  const rejected = (record) => record.completions.reduce((sum, c) => sum + c.rejected, 0);
  const rank = (record) => rejected(record) || (record.measured_kl || 0) / 1e3;
  return records.reduce((best, record, i) => (rank(record) > rank(records[best]) ? i : best), 0);
}

/** Add to a completion what it is sorted and coloured by. */
function digest(completion) {
  const { prob, prob_after: after, tokens } = completion;
  if (prob && after) {
    completion.change = tokens.map((_, i) => (prob[i] > 0 && after[i] > 0 ? Math.log(after[i] / prob[i]) : null));
  }
  completion.rejected = completion.weight.filter((weight) => weight === 0).length;
  completion.scaled = completion.weight.filter((weight) => verdictOf(weight) === "scaled down").length;
  completion.largest = {};
  for (const key of Object.keys(QUANTITIES)) {
    completion.largest[key] = (completion[key] || []).reduce((most, v) => Math.max(most, Math.abs(v || 0)), 0);
  }
}

/** How strongly a value is coloured, 0 to 1. */
function level(value, { low, high, log }) {
  const size = Math.abs(value || 0);
  if (size <= low) return 0;
  const share = log ? Math.log(size / low) / Math.log(high / low) : size / high;
  return Math.min(1, 0.06 + 0.94 * share);
}

function verdictOf(weight) {
  if (weight === 0) return "rejected";
  return weight !== null && weight < 1 ? "scaled down" : "";
}

function marks(reason) {
  return REASONS.filter(([bit]) => reason & bit)
    .map(([, mark]) => mark)
    .join("");
}

/** Blank tokens and line ends are made visible. */
function visible(token) {
  return token === "" ? "▯" : token.replace(/\n/g, "⏎\n");
}

function firstLine(prompt) {
  const line = prompt.trim().replace(/\s+/g, " ");
  return line.length > 140 ? `${line.slice(0, 140)} …` : line || "(empty prompt)";
}
