"use strict";
// Cards: what holds a chart; hover, zoom, export, and what reacts to the reader.

// A card holds a chart's canvas; hovering moves a cross hair over all cards, without drawing again.
function card(place, chart) {
  const canvas = make("canvas", {
    tabindex: "0",
    role: "img",
    "aria-label": `${chart.title}, ${chart.unit || "no unit"}, against ${view.mode}. Arrow keys read values.`,
  });
  const cross = make("div", { class: "cross", hidden: "" }),
    level = make("div", { class: "cross", hidden: "" }),
    brush = make("div", { class: "brush", hidden: "" });
  const plot = make("div", { class: "plot" }, canvas, cross, level, brush),
    save = make(
      "button",
      {
        class: "save",
        title: `Save ${chart.title} as PNG`,
        "aria-label": `Save ${chart.title} as PNG`,
      },
      "PNG",
    );
  const me = { chart, canvas, cross, level, brush, plot, inner: null };
  save.onclick = () => download(picture([me], 1), `${chart.title}.png`);
  place.append(
    make(
      "article",
      { class: "card" },
      make("h3", {}, chart.title + " ", make("span", {}, chart.unitText())),
      save,
      plot,
    ),
  );
  cards.push(me);
  draw(me);
  listen(me);
  sizes.observe(plot);
}
const sizes = new ResizeObserver((entries) =>
  entries.forEach((e) => {
    const me = cards.find((c) => c.plot === e.target);
    if (me && me.width !== me.plot.clientWidth) draw(me);
  }),
);
function draw(me) {
  const w = (me.width = me.plot.clientWidth),
    h = me.chart.height,
    ratio = Math.max(1, window.devicePixelRatio || 1);
  if (!w) return;
  me.canvas.width = w * ratio;
  me.canvas.height = h * ratio;
  me.canvas.style.height = h + "px";
  const ctx = me.canvas.getContext("2d");
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  ctx.clearRect(0, 0, w, h);
  me.inner = me.chart.draw(ctx, { x: 0, y: 0, w, h }, false);
}
function redraw() {
  RUNS.forEach((run) => run.swatch());
  cards.forEach(draw);
}

function listen(me) {
  let from = null;
  const inside = (event) => {
    const box = me.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top, event.clientX, event.clientY];
  };
  const value = (px) => {
    const i = me.inner,
      [a, b] = view.domain;
    return a + Math.max(0, Math.min(1, (px - i.x) / i.w)) * (b - a);
  };
  me.canvas.onpointermove = (event) => {
    const [px, py, cx, cy] = inside(event);
    if (from !== null && event.pointerType === "mouse")
      place(me.brush, {
        left: Math.min(from, px),
        top: me.inner.y,
        width: Math.abs(px - from),
        height: me.inner.h,
      });
    hover(me, value(px), px, py, cx, cy);
  };
  me.canvas.onpointerdown = (event) => {
    if (event.pointerType === "mouse" && event.button === 0) {
      from = inside(event)[0];
      me.canvas.setPointerCapture(event.pointerId);
    } else me.canvas.onpointermove(event);
  };
  me.canvas.onpointerup = (event) => {
    const px = inside(event)[0];
    if (from !== null && Math.abs(px - from) > 6)
      zoom([value(Math.min(from, px)), value(Math.max(from, px))]);
    from = null;
    me.brush.hidden = true;
  };
  me.canvas.onpointerleave = me.canvas.onblur = () => {
    cards.forEach((c) => {
      c.cross.hidden = c.level.hidden = true;
    });
    byId("tip").hidden = true;
  };
  me.canvas.ondblclick = () => zoom(view.full);
  me.canvas.onkeydown = (event) => {
    const dx = { ArrowLeft: -1, ArrowRight: 1 }[event.key] || 0,
      dy = { ArrowUp: -1, ArrowDown: 1 }[event.key] || 0;
    if (!dx && !dy) return;
    event.preventDefault();
    const i = me.inner,
      box = me.canvas.getBoundingClientRect(),
      rows = me.chart.data ? me.chart.data.layers : 8;
    me.at = [
      Math.max(i.x, Math.min(i.x + i.w, (me.at?.[0] ?? i.x + i.w / 2) + (dx * i.w) / 100)),
      Math.max(i.y + 1, Math.min(i.y + i.h - 1, (me.at?.[1] ?? i.y + i.h / 2) + (dy * i.h) / rows)),
    ];
    hover(me, value(me.at[0]), ...me.at, box.left + me.at[0], box.top + me.at[1]);
  };
}
function place(node, box) {
  for (const [name, v] of Object.entries(box)) node.style[name] = v + "px";
  node.hidden = false;
}
function hover(me, x, px, py, cx, cy) {
  for (const c of cards)
    if (c.inner && c.width)
      place(c.cross, { left: c.inner.scale.at(x), top: c.inner.y, height: c.inner.h });
  if (me.chart instanceof LayerMap) {
    const row = me.inner.h / me.chart.data.layers,
      layer = me.chart.layerAt(py, me.inner);
    place(me.level, {
      left: me.inner.x,
      top: me.inner.y + me.inner.h - (layer + 0.5) * row,
      width: me.inner.w,
      height: 1,
    });
  }
  const found =
      me.inner && px >= me.inner.x - 3 && px <= me.inner.x + me.inner.w + 3
        ? me.chart.tip(px, py, me.inner, x)
        : null,
    tip = byId("tip");
  tip.hidden = !found;
  if (!found) return;
  tip.replaceChildren(
    make("b", {}, found.title),
    ...found.rows.flatMap((row) => [
      "\n",
      make("i", { style: `background:${runColour(row.run)}` }),
      make("b", {}, row.head),
      "  " + row.value,
    ]),
  );
  const box = tip.getBoundingClientRect();
  tip.style.left =
    Math.max(
      6,
      Math.min(
        innerWidth - box.width - 6,
        cx + 16 + box.width > innerWidth ? cx - box.width - 14 : cx + 16,
      ),
    ) + "px";
  tip.style.top = Math.max(6, Math.min(innerHeight - box.height - 6, cy + 16)) + "px";
}
function zoom(domain) {
  view.domain = domain;
  byId("reset").hidden = domain === view.full;
  cards.forEach(draw);
}

// A picture of some cards, twice as sharp as the screen's pixels, with the runs' legend.
function picture(some, columns) {
  const w = 720,
    gap = 14,
    legend = 40,
    rows = [];
  for (let i = 0; i < some.length; i += columns) rows.push(some.slice(i, i + columns));
  const heights = rows.map((row) => Math.max(...row.map((c) => c.chart.height + 70))),
    canvas = make("canvas");
  canvas.width = 2 * (columns * w + (columns + 1) * gap);
  canvas.height = 2 * (legend + heights.reduce((a, b) => a + b + gap, gap));
  const ctx = canvas.getContext("2d");
  ctx.scale(2, 2);
  ctx.fillStyle = colour("card");
  ctx.fillRect(0, 0, canvas.width, canvas.height);
  let x = gap + 4,
    y = legend;
  RUNS.forEach((run, i) => {
    ctx.strokeStyle = runColour(i);
    ctx.lineWidth = 3;
    ctx.setLineDash(DASHES[i % 6]);
    line(ctx, x, 20, x + 28, 20);
    ctx.setLineDash([]);
    ctx.font = "13px " + FONT;
    ctx.fillStyle = colour("ink");
    ctx.textAlign = "left";
    ctx.textBaseline = "middle";
    ctx.fillText(run.name, x + 36, 20);
    x += 64 + ctx.measureText(run.name).width;
  });
  rows.forEach((row, n) => {
    row.forEach((c, i) => c.chart.draw(ctx, { x: gap + i * (w + gap), y, w, h: heights[n] }, true));
    y += heights[n] + gap;
  });
  return canvas;
}
function download(canvas, name) {
  canvas.toBlob((blob) => {
    const link = make("a", {
      href: URL.createObjectURL(blob),
      download: name.replace(/[^\w.-]+/g, "_"),
    });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 5000);
  }, "image/png");
}

function controls() {
  const remember = (name, value) => {
    try {
      value === undefined ? 0 : localStorage.setItem("fp8jax." + name, value);
      return localStorage.getItem("fp8jax." + name);
    } catch {
      return value;
    }
  };
  let theme = remember("theme") || "";
  const apply = () => {
    theme
      ? (document.documentElement.dataset.theme = theme)
      : delete document.documentElement.dataset.theme;
    byId("theme").textContent = { "": "Theme: auto", light: "Theme: light", dark: "Theme: dark" }[
      theme
    ];
  };
  apply();
  byId("theme").onclick = () => {
    theme = { "": "light", light: "dark", dark: "" }[theme];
    remember("theme", theme);
    apply();
    redraw();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  byId("export").onclick = () => download(picture(cards, 2), "report.png");
  byId("reset").onclick = () => zoom(view.full);
  byId("axis").hidden = !RUNS.every((run) => run.tokens_per_step);
  for (const button of byId("axis").children)
    button.onclick = () => {
      for (const other of byId("axis").children)
        other.setAttribute("aria-pressed", String(other === button));
      view.mode = button.dataset.value;
      measure();
      byId("reset").hidden = true;
      cards.forEach(draw);
    };
  redraw();
  // A run that still trains rewrites this page; an open page should show that.
  if (RUNS.some((run) => run.state === "running"))
    setInterval(() => {
      if (!document.hidden && view.domain === view.full && byId("tip").hidden) location.reload();
    }, 60000);
}
