"""What moves on the page: the choice of a view, and the tokens of one layer over the pictures."""

SCRIPT = """
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  for (const grid of facts.grids)
    grid.gone = grid.gone && Uint8Array.from(atob(grid.gone), c => c.charCodeAt(0));
  const canvases = document.querySelectorAll(".grid canvas");
  const views = [...document.querySelectorAll("input[name=view]")];
  const slider = document.getElementById("layer");

  function strike(c, x, y, side, share) {
    const inset = side.least / 7, dx = share * (side.w - 2 * inset), dy = share * (side.h - 2 * inset);
    for (const [colour, width] of [["rgba(0,0,0,.8)", side.least / 8 + 2], [facts.strike, side.least / 8]]) {
      c.strokeStyle = colour; c.lineWidth = width;
      c.beginPath(); c.moveTo(x + inset, y + side.h - inset); c.lineTo(x + inset + dx, y + side.h - inset - dy);
      c.stroke();
    }
  }

  function draw(canvas, grid, layer) {
    canvas.width = grid.width; canvas.height = grid.height;
    const c = canvas.getContext("2d"), w = grid.width / grid.columns, h = grid.height / grid.rows;
    const cells = grid.entered.length, side = {w, h, least: Math.min(w, h)};
    grid.entered.forEach((entered, k) => {
      const x = k % grid.columns * w, y = Math.floor(k / grid.columns) * h;
      c.strokeStyle = "rgba(255,255,255,.3)"; c.lineWidth = 1; c.strokeRect(x, y, w, h);
      const share = grid.gone ? grid.gone[layer * cells + k] / facts.heads : 0;
      if (entered <= layer) { c.fillStyle = "rgba(8,10,16,.78)"; c.fillRect(x, y, w, h); }
      else if (share) strike(c, x, y, side, share);
    });
  }

  function show() {
    const view = views.find(v => v.checked).value, layer = +slider.value;
    document.body.dataset.view = view;
    document.getElementById("layer-told").textContent = facts.layers[layer];
    if (view === "layer") canvases.forEach((canvas, k) => draw(canvas, facts.grids[k], layer));
  }

  views.forEach(v => v.addEventListener("change", show));
  slider.addEventListener("input", () => { views.find(v => v.value === "layer").checked = true; show(); });
  document.querySelectorAll(".grids").forEach(grids =>
    grids.addEventListener("click", () => grids.parentElement.classList.toggle("large")));
  show();
})();
"""
