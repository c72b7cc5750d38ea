"use strict";
// The charts: the line chart, the layer x step map, the time line.

// series: [{ run, name, data: {from, to, min, max, last, bad}, dots }]; x(step, run) is the horizontal position.
class LineChart {
  constructor(title, unit, series, view, log) {
    Object.assign(this, { title, unit, series, view, log, height: 210 });
  }
  domain() {
    return this.view.domain;
  }
  unitText() {
    return this.unit && this.unit !== "%" ? this.unit : "";
  }
  range() {
    let low = Infinity,
      high = -Infinity;
    const [a, b] = this.view.domain,
      all = { low: Infinity, high: -Infinity };
    for (const s of this.series)
      for (let i = 0; i < s.data.last.length; i++) {
        if (
          s.data.last[i] === null ||
          this.view.x(s.data.to[i], s.run) < a ||
          this.view.x(s.data.from[i], s.run) > b
        )
          continue;
        if (this.log && s.data.min[i] <= 0) {
          if (s.data.max[i] > 0) all.high = Math.max(all.high, s.data.max[i]);
          continue;
        }
        low = Math.min(low, s.data.min[i]);
        high = Math.max(high, s.data.max[i]);
      }
    high = Math.max(high, all.high);
    if (!(low < Infinity)) return null;
    if (this.log) return { low: low / 1.1, high: high * 1.1, log: true };
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    return { low: low >= 0 && low - pad < 0 ? 0 : low - pad, high: high + pad };
  }
  draw(ctx, box, titled) {
    const y = this.range(),
      inner = frame(ctx, box, this, y, titled);
    if (!y) {
      ctx.textAlign = "center";
      ctx.fillText("no finite value", inner.x + inner.w / 2, inner.y + inner.h / 2);
    }
    clipped(ctx, inner, () => {
      for (const s of this.series) this.drawOne(ctx, inner, s, y);
    });
    return inner;
  }
  drawOne(ctx, inner, s, y) {
    const d = s.data,
      at = (i) => inner.scale.at(this.view.x((d.from[i] + d.to[i]) / 2, s.run)),
      clampLog = (v) => (this.log && v <= 0 ? y.low : v);
    ctx.strokeStyle = ctx.fillStyle = runColour(s.run);
    ctx.lineJoin = "round";
    if (y && d.from.some((v, i) => v !== d.to[i])) {
      // the band from smallest to largest
      ctx.globalAlpha = 0.2;
      ctx.beginPath();
      const there = d.last.map((_, i) => i).filter((i) => d.last[i] !== null);
      there.forEach((i, n) =>
        ctx[n ? "lineTo" : "moveTo"](at(i), inner.axis.at(clampLog(d.max[i]))),
      );
      there.reverse().forEach((i) => ctx.lineTo(at(i), inner.axis.at(clampLog(d.min[i]))));
      ctx.fill();
      ctx.globalAlpha = 1;
    }
    ctx.lineWidth = 1.6;
    ctx.setLineDash(s.dots ? [] : DASHES[s.run % 6]);
    ctx.beginPath();
    let pen = false;
    for (let i = 0; y && i < d.last.length; i++) {
      if (d.last[i] === null) {
        pen = false;
        continue;
      }
      const px = inner.scale.at(this.view.x(d.to[i], s.run)),
        py = inner.axis.at(clampLog(d.last[i]));
      ctx[pen ? "lineTo" : "moveTo"](px, py);
      pen = true;
    }
    ctx.stroke();
    ctx.setLineDash([]);
    if (s.dots && y)
      d.last.forEach((v, i) => {
        if (v !== null) {
          ctx.beginPath();
          ctx.arc(inner.scale.at(this.view.x(d.to[i], s.run)), inner.axis.at(v), 3, 0, 7);
          ctx.fill();
        }
      });
    ctx.fillStyle = colour("bad");
    d.bad.forEach((n, i) => {
      if (n) ctx.fillRect(at(i) - 1, inner.y, 2, 7);
    });
  }
  tip(px, py, inner, x) {
    const rows = this.series
      .map((s) => {
        const i = nearest(s.data, x, this.view, s.run),
          d = s.data;
        if (i < 0) return null;
        const spread =
          d.from[i] === d.to[i] || d.min[i] === d.max[i]
            ? ""
            : `  (${text(d.min[i], this.unit)} to ${text(d.max[i], this.unit)})`;
        return {
          run: s.run,
          head: s.name,
          value: text(d.last[i], this.unit) + spread + (d.bad[i] ? `, ${d.bad[i]} not finite` : ""),
          span: span(d, i),
        };
      })
      .filter(Boolean);
    return rows.length ? { title: rows[0].span, rows } : null;
  }
}
function span(d, i) {
  return d.from[i] === d.to[i]
    ? "Step " + whole(d.to[i])
    : `Steps ${whole(d.from[i])} to ${whole(d.to[i])}`;
}
function nearest(d, x, view, run) {
  let best = -1,
    least = Infinity;
  for (let i = 0; i < d.to.length; i++) {
    const a = view.x(d.from[i], run),
      b = view.x(d.to[i], run),
      away = x < a ? a - x : x > b ? x - b : 0;
    if (away < least) {
      least = away;
      best = i;
    }
  }
  return best;
}

// data: {from, to, layers, low, high, log, zero, cells}; limits: {low, high, log} of the colours.
class LayerMap {
  constructor(title, unit, run, data, limits, view) {
    Object.assign(this, {
      title,
      unit,
      run,
      data,
      limits,
      view,
      height: Math.max(110, Math.min(190, 46 + data.layers * 12)),
    });
    const raw = atob(data.cells);
    this.codes = new Uint16Array(raw.length / 2);
    for (let i = 0; i < this.codes.length; i++)
      this.codes[i] = raw.charCodeAt(2 * i) | (raw.charCodeAt(2 * i + 1) << 8);
  }
  domain() {
    return this.view.domain;
  }
  unitText() {
    return this.unit && this.unit !== "%" ? this.unit : "";
  }
  value(layer, i) {
    const code = this.codes[layer * this.data.to.length + i],
      { low, high, log, zero } = this.data;
    if (code === MISSING) return null;
    if (code === NON_FINITE) return Infinity;
    if (zero && code === FIRST) return 0;
    const t = (code - FIRST) / (LAST - FIRST);
    return log ? low * (high / low) ** t : low + t * (high - low);
  }
  share(value) {
    const { low, high, log } = this.limits;
    if (!(high > low)) return 0;
    return Math.max(
      0,
      Math.min(
        1,
        log
          ? Math.log(Math.max(value, low) / low) / Math.log(high / low)
          : (value - low) / (high - low),
      ),
    );
  }
  picture() {
    const n = this.data.to.length,
      image = new ImageData(n, this.data.layers),
      bad = rgb(colour("bad")),
      missing = rgb(colour("missing"));
    for (let layer = 0; layer < this.data.layers; layer++)
      for (let i = 0; i < n; i++) {
        const v = this.value(layer, i),
          c = v === null ? missing : v === Infinity ? bad : viridis(this.share(v));
        image.data.set([...c, 255], ((this.data.layers - 1 - layer) * n + i) * 4);
      }
    const canvas = document.createElement("canvas");
    canvas.width = n;
    canvas.height = this.data.layers;
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }
  draw(ctx, box, titled) {
    const bar = 58,
      inner = frame(ctx, { ...box, w: box.w - bar }, this, null, titled),
      d = this.data,
      image = this.picture();
    clipped(ctx, inner, () => {
      ctx.imageSmoothingEnabled = false;
      for (let i = 0; i < d.to.length; i++) {
        const [a, b] = this.edges(i).map((x) => inner.scale.at(x));
        if (b >= inner.x && a <= inner.x + inner.w)
          ctx.drawImage(
            image,
            i,
            0,
            1,
            d.layers,
            Math.floor(a),
            inner.y,
            Math.max(1, Math.ceil(b) - Math.floor(a)),
            inner.h,
          );
      }
    });
    ctx.fillStyle = colour("soft");
    ctx.textAlign = "right";
    ctx.font = "11px " + FONT;
    const row = inner.h / d.layers,
      every = Math.max(1, Math.ceil(14 / row));
    for (let layer = 0; layer < d.layers; layer += every)
      ctx.fillText(
        (layer ? "" : "layer ") + layer,
        inner.x - 6,
        inner.y + inner.h - (layer + 0.5) * row,
      );
    this.legend(ctx, { x: inner.x + inner.w + 10, y: inner.y, w: 10, h: inner.h });
    return inner;
  }
  edges(i) {
    // a bucket reaches half way to its neighbours
    const d = this.data,
      x = (step) => this.view.x(step, this.run),
      gap = d.to.length > 1 ? (d.to[d.to.length - 1] - d.from[0]) / d.to.length : 1;
    const left = i ? (d.to[i - 1] + d.from[i]) / 2 : d.from[0] - gap / 2,
      right = i + 1 < d.to.length ? (d.to[i] + d.from[i + 1]) / 2 : d.to[i] + gap / 2;
    return [x(left), x(right)];
  }
  legend(ctx, box) {
    for (let i = 0; i < box.h; i++) {
      ctx.fillStyle = `rgb(${viridis(1 - i / box.h)})`;
      ctx.fillRect(box.x, box.y + i, box.w, 1.5);
    }
    ctx.fillStyle = colour("soft");
    ctx.textAlign = "left";
    ctx.fillText(text(this.limits.high, this.unit === "%" ? "%" : ""), box.x + 14, box.y + 5);
    ctx.fillText(
      text(this.limits.low, this.unit === "%" ? "%" : ""),
      box.x + 14,
      box.y + box.h - 5,
    );
  }
  tip(px, py, inner, x) {
    const i = nearest(this.data, x, this.view, this.run),
      layer = this.layerAt(py, inner),
      v = this.value(layer, i);
    const value =
      v === null ? "not taken here" : v === Infinity ? "not finite" : text(v, this.unit);
    return { title: span(this.data, i), rows: [{ run: this.run, head: `layer ${layer}`, value }] };
  }
  layerAt(py, inner) {
    return Math.max(
      0,
      Math.min(
        this.data.layers - 1,
        Math.floor(((inner.y + inner.h - py) / inner.h) * this.data.layers),
      ),
    );
  }
}
function viridis(t) {
  const p = t * (VIRIDIS.length - 1),
    i = Math.min(VIRIDIS.length - 2, Math.floor(p)),
    f = p - i;
  return VIRIDIS[i].map((a, k) => Math.round(a + (VIRIDIS[i + 1][k] - a) * f));
}
function rgb(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

const LEVELS = { watch: "watch", warn: "warn", act: "act" };
const TROUBLE = ["bad_step", "bad_numbers", "rollback", "save_failed", "early_warning_action"];
function levelOf(event) {
  return LEVELS[event.level] || (TROUBLE.includes(event.kind) ? "act" : "");
}

// What happened when: one lane a run, a mark an event; marks differ in shape as well as in colour.
class Timeline {
  constructor(runs, view) {
    Object.assign(this, { title: "Events", unit: "", runs, view, height: 40 + 24 * runs.length });
  }
  domain() {
    return this.view.domain;
  }
  unitText() {
    return "";
  }
  lane(i, inner) {
    return inner.y + ((i + 0.5) * inner.h) / this.runs.length;
  }
  draw(ctx, box, titled) {
    const inner = frame(ctx, box, this, null, titled);
    this.runs.forEach((run, i) => {
      ctx.strokeStyle = runColour(i);
      ctx.lineWidth = 2;
      ctx.globalAlpha = 0.5;
      ctx.setLineDash(DASHES[i % 6]);
      const last = run.last_step || 0;
      clipped(ctx, inner, () =>
        line(
          ctx,
          inner.scale.at(this.view.x(0, i)),
          this.lane(i, inner),
          inner.scale.at(this.view.x(last, i)),
          this.lane(i, inner),
        ),
      );
      ctx.setLineDash([]);
      ctx.globalAlpha = 1;
      clipped(ctx, inner, () =>
        run.events.forEach((e) =>
          mark(
            ctx,
            inner.scale.at(this.view.x(e.step, i)),
            this.lane(i, inner),
            levelOf(e),
            e.kind,
          ),
        ),
      );
    });
    return inner;
  }
  tip(px, py, inner) {
    const i = Math.max(
      0,
      Math.min(this.runs.length - 1, Math.floor(((py - inner.y) / inner.h) * this.runs.length)),
    );
    const near = this.runs[i].events
      .map((e) => ({ e, away: Math.abs(inner.scale.at(this.view.x(e.step, i)) - px) }))
      .filter((n) => n.away < 9);
    near.sort((a, b) => a.away - b.away);
    if (!near.length) return null;
    return {
      title: "Step " + whole(near[0].e.step),
      rows: near.slice(0, 5).map((n) => ({ run: i, head: kindOf(n.e), value: sentence(n.e) })),
    };
  }
}
function mark(ctx, x, y, level, kind) {
  const r = 5.5;
  ctx.fillStyle = ctx.strokeStyle = colour(level || "soft");
  ctx.lineWidth = 2;
  ctx.beginPath();
  if (kind === "bad_step") {
    line(ctx, x - 4, y - 4, x + 4, y + 4);
    line(ctx, x - 4, y + 4, x + 4, y - 4);
    return;
  }
  if (level === "act") {
    ctx.moveTo(x, y - r);
    ctx.lineTo(x + r, y + r);
    ctx.lineTo(x - r, y + r);
  } else if (level === "warn") {
    ctx.moveTo(x, y - r);
    ctx.lineTo(x + r, y);
    ctx.lineTo(x, y + r);
    ctx.lineTo(x - r, y);
  } else if (level === "watch") ctx.arc(x, y, 4.5, 0, 7);
  else {
    ctx.rect(x - 1, y - r, 2, 2 * r);
  }
  ctx.fill();
}
