"use strict";
// Drawing: numbers, colours, axes, the line chart, the layer x step map, the time line. Every chart draws itself into any
// rectangle of any 2D context, so that what is exported is what is shown.

const VIRIDIS = [
  "#440154",
  "#481a6c",
  "#472f7d",
  "#414487",
  "#39568c",
  "#31688e",
  "#2a788e",
  "#23888e",
  "#1f988b",
  "#22a884",
  "#35b779",
  "#54c568",
  "#7ad151",
  "#a5db36",
  "#d2e21b",
  "#fde725",
].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
const DASHES = [[], [7, 3], [2, 2.5], [9, 3, 2, 3], [4, 2], [1, 3]];
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';
const MISSING = 0,
  NON_FINITE = 1,
  FIRST = 2,
  LAST = 65535;

function colour(name) {
  return getComputedStyle(document.documentElement)
    .getPropertyValue("--" + name)
    .trim();
}
function runColour(i) {
  return colour("run" + (i % 6));
}

function text(value, unit) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (unit === "%") return text(value * 100) + " %";
  const size = Math.abs(value);
  let out;
  if (size === 0) out = "0";
  else if (size >= 1e15 || size < 1e-3)
    out = value
      .toExponential(2)
      .replace(/\.?0+e/, "e")
      .replace("e+", "e");
  else if (size >= 1e12) out = trim(value / 1e12) + "T";
  else if (size >= 1e9) out = trim(value / 1e9) + "B";
  else if (size >= 1e6) out = trim(value / 1e6) + "M";
  else if (size >= 1e4) out = trim(value / 1e3) + "k";
  else out = trim(value);
  return unit ? out + " " + unit : out;
}
function trim(value) {
  return String(+value.toPrecision(4));
}
function whole(value) {
  return Math.round(value).toLocaleString("en");
}

function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const raw = (high - low) / count,
    power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= raw),
    out = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) out.push(i * step);
  return out;
}
function logTicks(low, high) {
  const a = Math.ceil(Math.log10(low) - 1e-9),
    b = Math.floor(Math.log10(high) + 1e-9),
    every = Math.max(1, Math.ceil((b - a) / 5)),
    out = [];
  for (let i = a; i <= b; i += every) out.push(10 ** i);
  if (out.length >= 2) return out;
  const fine = [];
  for (let i = a - 1; i <= b + 1; i++) for (const m of [1, 2, 3, 5, 7]) fine.push(m * 10 ** i);
  const inside = fine.filter((v) => v >= low * (1 - 1e-9) && v <= high * (1 + 1e-9));
  return inside.length >= 2 ? inside : ticks(low, high, 4);
}

// One axis: value to pixel. Logarithmic where all values are positive and it is asked for.
function scaled(low, high, from, to, log) {
  const f = log ? Math.log : (v) => v,
    a = f(low),
    span = f(high) - a || 1;
  return { low, high, log, at: (v) => from + ((f(v) - a) / span) * (to - from) };
}

// The frame of all charts: title, axes, grid. Returns the inner rectangle and the x axis.
function frame(ctx, box, chart, y, titled) {
  const top = box.y + (titled ? 34 : 8),
    inner = { x: box.x + 52, y: top, w: box.w - 62, h: box.y + box.h - 24 - top };
  const [x0, x1] = chart.domain(),
    x = scaled(x0, x1, inner.x, inner.x + inner.w);
  ctx.font = "11px " + FONT;
  ctx.fillStyle = colour("soft");
  ctx.lineWidth = 1;
  ctx.textBaseline = "middle";
  if (titled) {
    ctx.textAlign = "left";
    ctx.font = "600 14px " + FONT;
    ctx.fillStyle = colour("ink");
    ctx.fillText(chart.title, box.x + 4, box.y + 14);
    const after = ctx.measureText(chart.title + "  ").width;
    ctx.font = "12px " + FONT;
    ctx.fillStyle = colour("soft");
    ctx.fillText(chart.unitText(), box.x + 4 + after, box.y + 14);
    ctx.font = "11px " + FONT;
  }
  ctx.textAlign = "center";
  ctx.strokeStyle = colour("grid");
  for (const t of ticks(x0, x1, Math.max(2, inner.w / 95))) {
    line(ctx, x.at(t), inner.y, x.at(t), inner.y + inner.h);
    ctx.fillText(text(t), Math.min(x.at(t), box.x + box.w - 16), inner.y + inner.h + 12);
  }
  if (y) {
    const axis = scaled(y.low, y.high, inner.y + inner.h, inner.y, y.log);
    ctx.textAlign = "right";
    for (const t of y.log
      ? logTicks(y.low, y.high)
      : ticks(y.low, y.high, Math.max(2, inner.h / 40))) {
      line(ctx, inner.x, axis.at(t), inner.x + inner.w, axis.at(t));
      ctx.fillText(text(t, chart.unit === "%" ? "%" : ""), inner.x - 6, axis.at(t));
    }
    inner.axis = axis;
  }
  inner.scale = x;
  return inner;
}
function line(ctx, x0, y0, x1, y1) {
  ctx.beginPath();
  ctx.moveTo(x0, y0);
  ctx.lineTo(x1, y1);
  ctx.stroke();
}
function clipped(ctx, box, draw) {
  ctx.save();
  ctx.beginPath();
  ctx.rect(box.x, box.y - 1, box.w, box.h + 2);
  ctx.clip();
  draw();
  ctx.restore();
}

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
