"use strict";
// Drawing: numbers, colours, axes. Every chart draws itself into any rectangle of any 2D context, so that what is
// exported is what is shown.

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
