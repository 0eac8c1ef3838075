"use strict";

// Numbers as text, and elements whose content is always text, never HTML.

/** A number in four significant digits at most; a dash for none. */
function format(value, percent = false) {
  if (value === null || value === undefined) return "–";
  if (percent) return `${trim((100 * value).toPrecision(3))} %`;
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return value.toLocaleString("en");
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(2).replace("e+", "e");
  return trim(value.toPrecision(4));
}

function trim(text) {
  if (text.includes("e")) return String(Number(text));
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

/** An element with attributes and children; strings become text nodes. */
function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** The same for SVG, whose namespace is read off the page's own svg element. */
function shape(name, attributes = {}, ...children) {
  const namespace = document.getElementById("svg").namespaceURI;
  return fill(document.createElementNS(namespace, name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

/** A group of radio buttons; `choices` are pairs of a value and its label. */
function choice(name, legend, choices, chosen, onchange) {
  const options = choices.map(([value, label]) => {
    const input = element("input", { type: "radio", name, value, checked: value === chosen });
    input.addEventListener("change", () => onchange(value));
    return element("label", {}, input, element("span", {}, label));
  });
  return element("fieldset", { class: "choice" }, element("legend", {}, legend), ...options);
}
