// Start: read the embedded data, draw what there is, hide what there is not, follow links to steps.

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const curves = new Curves(document.getElementById("panels"), document.getElementById("toolbar"), data);
  const single = data.runs.length === 1;
  document.getElementById("worst-title").textContent = single ? "Steps to look at" : "Results";
  if (!single) ["time", "tokens"].forEach((id) => document.getElementById(id).remove());
  document.body.classList.toggle("comparison", !single);
  const root = document.getElementById("microscope");
  const microscope = single && data.records.length ? new Microscope(root, data.records, data.bounds) : null;
  const follow = () => followLink(location.hash, curves, microscope);
  window.addEventListener("hashchange", follow);
  follow();
}

/** #step-17 holds the crosshair there; #tokens-17 opens its record. */
function followLink(hash, curves, microscope) {
  const found = /^#(step|tokens)-(\d+)$/.exec(hash);
  if (!found) return;
  const step = Number(found[2]);
  curves.goTo(step);
  if (found[1] === "step") document.getElementById("curves").scrollIntoView();
  const index = microscope ? microscope.records.findIndex((record) => record.step === step) : -1;
  if (found[1] === "tokens" && index >= 0) {
    microscope.open(index);
    document.getElementById("tokens").scrollIntoView();
  }
}

// the same link again does not change the hash: follow it all the same
document.addEventListener("click", (event) => {
  const link = event.target.closest ? event.target.closest('a[href^="#"]') : null;
  if (link && link.getAttribute("href") === location.hash) window.dispatchEvent(new HashChangeEvent("hashchange"));
});

start();
