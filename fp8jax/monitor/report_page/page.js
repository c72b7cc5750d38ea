"use strict";
// The page: what is shown of which run, in which order.

const RUNS = DATA.runs;
const SERIES = [
  [
    "Loss",
    "nats per token",
    [
      ["loss", "train"],
      ["held_out/loss", "held out"],
    ],
    false,
  ],
  ["Bits per byte", "held out", [["held_out/bits_per_byte", "held out"]], false],
  ["Gradient norm", "before clipping, log axis", [["grad_norm", ""]], true],
  ["Learning rate", "", [["learning_rate", ""]], false],
  ["Throughput", "tokens/s", [["tokens_per_second", ""]], false],
  ["Saturated in casts", "%", [["fp8/saturated_fraction", ""]], false],
  ["Underflow in casts", "%", [["fp8/underflow_fraction", ""]], false],
];
const STATISTICS = {
  kurtosis: [
    "Kurtosis",
    "",
    true,
    "Outliers in a tensor: mean(x⁴) / mean(x²)² of a token's features, averaged over tokens. A Gaussian has 3. What grows here, in late layers above all, leaves FP8's range later.",
  ],
  max_logit: [
    "Largest logit",
    "",
    true,
    "The largest attention score that any query sees, with the softmax scale.",
  ],
  entropy: [
    "Attention entropy",
    "nats",
    true,
    "Entropy of the attention probabilities, a mean over queries and heads. Near 0: every query looks at one key.",
  ],
  amax: [
    "Amax",
    "",
    false,
    "The largest magnitude of each operand of a GEMM. x input, w weight, g output gradient; q, k, v, ds, do of attention.",
  ],
  scale: ["Scale", "", false, "The scale of each FP8 cast: value ≈ FP8 number × scale."],
  overflow: [
    "Saturation",
    "%",
    true,
    "Elements beyond the format's maximum, which the cast clips.",
  ],
  underflow: ["Underflow", "%", true, "Elements that are not zero, but zero after the cast."],
  snr: [
    "SNR",
    "dB",
    true,
    "Signal to noise of each cast. Dark is bad: 10 dB says that a tenth of the energy is rounding error.",
  ],
  rms: ["RMS", "", false, "Root mean square of activations and output gradients."],
};
const ORDER = [
  "qkv_input",
  "qkv",
  "q",
  "k",
  "attention_scores",
  "mlp_intermediate",
  "mlp_up",
  "mlp_post_act",
  "mlp_out",
  "activation",
];
const view = {
  mode: "steps",
  domain: [0, 1],
  full: [0, 1],
  x: (step, run) => (view.mode === "steps" ? step : step * (RUNS[run].tokens_per_step || 1)),
};
const cards = [];
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    name === "class" ? (node.className = value) : node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function begin() {
  RUNS.forEach((run) => {
    const ends = Object.values(run.series).map((s) => s.to[s.to.length - 1] || 0),
      { training, data } = run.config;
    run.last_step = Math.max(0, ...ends, ...run.events.map((e) => e.step));
    run.tokens_per_step = training && data ? training.batch_size * data.sequence_length : 0;
  });
  for (const show of [
    measure,
    showRuns,
    showTiles,
    showFacts,
    showCurves,
    showStatistics,
    showEvents,
    controls,
  ]) {
    try {
      show();
    } catch (error) {
      problem(`${show.name} failed: ${error.message}`);
    }
  }
  RUNS.forEach((run) =>
    run.problems.forEach((line) => problem(RUNS.length > 1 ? `${run.name}: ${line}` : line)),
  );
  byId("footer").textContent =
    `Made ${DATA.made} by fp8jax ${DATA.version}. Lines show the last value of up to ${whole(DATA.points)} buckets of logged steps, ` +
    "bands the smallest and largest in each; a map's cell shows the worst of its bucket. Pink: not finite. Drag over a chart to zoom; double click resets.";
}
// What is missing, above all else.
function problem(line) {
  byId("problems").append(make("p", { class: "note" }, line));
}
function measure() {
  const end = Math.max(1, ...RUNS.map((run, i) => view.x(run.last_step, i)));
  view.full = view.domain = [0, end * 1.015];
}

function showRuns() {
  RUNS.forEach((run, i) => {
    const swatch = make("canvas", { width: 56, height: 16, style: "width:28px;height:8px" }),
      state = run.state;
    run.swatch = () => {
      const c = swatch.getContext("2d");
      c.clearRect(0, 0, 56, 16);
      c.setTransform(2, 0, 0, 2, 0, 0);
      c.strokeStyle = runColour(i);
      c.lineWidth = 3;
      c.setLineDash(DASHES[i % 6]);
      line(c, 0, 4, 28, 4);
    };
    run.swatch();
    const tone = state === "running" ? "running" : state === "finished" ? "finished" : "trouble";
    byId("runs").append(
      make(
        "span",
        {},
        swatch,
        make("b", {}, run.name),
        " ",
        make("span", { class: "state " + tone }, state),
        ` step ${whole(run.last_step)}`,
      ),
    );
  });
}

function last(run, name) {
  const s = run.series[name];
  return s ? [...s.last].reverse().find((v) => v !== null) : undefined;
}
function ofTensors(maps) {
  return Object.entries(maps || {}).filter(([name]) => !/^(params|mu|nu|m1|m2)\./.test(name));
}
function peak(run, statistic) {
  let best = null;
  for (const [tensor, data] of ofTensors(run.maps[statistic]))
    if (best === null || data.high > best.value) best = { tensor, value: data.high };
  return best;
}
function showTiles() {
  RUNS.forEach((run, i) => {
    const bits = run.evaluation.bits_per_byte ?? last(run, "held_out/bits_per_byte"),
      kurtosis = peak(run, "kurtosis");
    const warnings = run.events.filter((e) => e.kind === "early_warning").length,
      bad = run.events.filter((e) => e.kind === "bad_step").reduce((n, e) => n + (e.count || 1), 0);
    const rows = [
      ["Loss", text(last(run, "loss")), "nats"],
      ["Bits per byte", text(bits), "held out"],
      ["Tokens", text(run.last_step * run.tokens_per_step), ""],
      ["Speed", text(last(run, "tokens_per_second")), "tok/s"],
      [
        "Blocks in FP8",
        run.facts.fp8_share === undefined ? "–" : Math.round(run.facts.fp8_share * 100) + " %",
        "of the FLOPs",
      ],
      ["Largest kurtosis", kurtosis ? text(kurtosis.value) : "–", kurtosis ? kurtosis.tensor : ""],
      ["Warnings", String(warnings), bad ? `${bad} bad steps` : "no bad steps"],
    ];
    const tiles = make("dl", {
      class: "tiles",
      style: `--tint: var(--run${i % 6}); margin-top: 0`,
      "aria-label": run.name,
    });
    rows.forEach(([name, value, small]) =>
      tiles.append(
        make(
          "div",
          { class: "tile" },
          make("dt", {}, name),
          make("dd", {}, value, " ", make("small", {}, small)),
        ),
      ),
    );
    byId("tiles").append(tiles);
  });
}

function showFacts() {
  const section = (run, name) => run.config[name] || {},
    hours = (run) =>
      run.seconds === null ? null : (run.seconds * (run.facts.devices || 1)) / 3600;
  const rows = {
    Directory: (r) => r.workdir,
    Model: (r) => r.facts.model,
    Parameters: (r) => r.facts.parameters && whole(r.facts.parameters),
    Recipe: (r) => section(r, "fp8").recipe,
    Scaling: (r) => section(r, "fp8").scaling,
    Overrides: (r) => section(r, "fp8").overrides,
    "FP8 GEMMs": (r) => r.facts.gemms,
    Mesh: (r) => r.facts.mesh,
    Devices: (r) => r.facts.devices && `${r.facts.devices} × ${r.facts.device}`,
    Memory: (r) =>
      r.facts.memory_bytes && text(r.facts.memory_bytes / 2 ** 30, "GiB") + " a device, planned",
    Batch: (r) => r.tokens_per_step && whole(r.tokens_per_step) + " tokens a step",
    Steps: (r) => `${whole(r.last_step)} of ${whole(section(r, "training").steps || 0)}`,
    "Learning rate": (r) => text(section(r, "optimizer").learning_rate),
    Seed: (r) => section(r, "training").seed,
    Data: (r) => section(r, "data").source,
    "Time in steps": (r) => (r.seconds === null ? null : duration(r.seconds)),
    Cost: (r) => (hours(r) === null ? null : text(hours(r)) + " device hours"),
    Compute: (r) =>
      r.facts.model_flops && text((r.facts.model_flops * r.last_step) / 1e15) + " model PFLOP",
    Software: (r) => r.facts.versions,
  };
  byId("facts").append(
    make(
      "thead",
      {},
      make("tr", {}, make("th", {}), ...RUNS.map((run) => make("th", {}, run.name))),
    ),
  );
  for (const [name, of] of Object.entries(rows)) {
    const values = RUNS.map(of);
    if (values.some((v) => v !== undefined && v !== null && v !== "" && v !== 0))
      byId("facts").append(
        make(
          "tr",
          {},
          make("th", {}, name),
          ...values.map((v) => make("td", {}, String(v ?? "–"))),
        ),
      );
  }
}
function duration(s) {
  const h = Math.floor(s / 3600),
    m = Math.floor((s % 3600) / 60);
  return h ? `${h} h ${m} min` : m ? `${m} min ${Math.round(s % 60)} s` : `${trim(s)} s`;
}

function showCurves() {
  if (RUNS.some((run) => run.events.length)) card(byId("timeline"), new Timeline(RUNS, view));
  for (const [title, unit, names, log] of SERIES) {
    const series = names.flatMap(([name, part]) =>
      RUNS.map(
        (run, i) =>
          run.series[name] && {
            run: i,
            data: run.series[name],
            dots: name.startsWith("held_out"),
            name: [RUNS.length > 1 ? run.name : "", part].filter(Boolean).join(", ") || title,
          },
      ).filter(Boolean),
    );
    if (series.length) card(byId("curves"), new LineChart(title, unit, series, view, log));
  }
  for (const [title, unit, statistic, least] of [
    ["Largest kurtosis", "of all tensors and layers, log axis", "kurtosis", false],
    ["Smallest SNR", "dB", "snr", true],
  ]) {
    const series = RUNS.map(
      (run, i) =>
        run.maps[statistic] && {
          run: i,
          name: RUNS.length > 1 ? run.name : title,
          data: extreme(run.maps[statistic], i, least),
        },
    ).filter(Boolean);
    if (series.length) card(byId("curves"), new LineChart(title, unit, series, view, !least));
  }
}
// The worst of all maps of a run, bucket by bucket, as a line.
function extreme(maps, run, least) {
  const tables = ofTensors(maps).map(([, data]) => new LayerMap("", "", run, data, data, view)),
    longest = tables.reduce((a, b) => (a.data.to.length >= b.data.to.length ? a : b)).data;
  const same = tables.filter((t) => t.data.to.length === longest.to.length);
  const last = longest.to.map((_, i) => {
    const found = same
      .flatMap((t) => Array.from({ length: t.data.layers }, (_, layer) => t.value(layer, i)))
      .filter((v) => v !== null && v !== Infinity);
    return found.length ? found.reduce((a, b) => (least === a < b ? a : b)) : null;
  });
  return { from: longest.from, to: longest.to, min: last, max: last, last, bad: last.map(() => 0) };
}

function showStatistics() {
  const there = Object.keys(STATISTICS).filter((name) => RUNS.some((run) => run.maps[name]));
  if (!there.length) {
    byId("maps").append(
      make(
        "p",
        { class: "note" },
        "No statistics were logged: config.monitor.every says how often they are taken.",
      ),
    );
    byId("shared").parentNode.hidden = true;
    return;
  }
  for (const name of there) {
    const button = make(
      "button",
      { "data-value": name, "aria-pressed": "false" },
      STATISTICS[name][0],
    );
    button.onclick = () => {
      byId("shared").checked = STATISTICS[name][2];
      showMaps(name);
    };
    byId("statistic").append(button);
  }
  byId("shared").onchange = () =>
    showMaps(byId("statistic").querySelector("[aria-pressed=true]").dataset.value);
  byId("shared").checked = STATISTICS[there[0]][2];
  showMaps(there[0]);
}
function showMaps(statistic) {
  for (const button of byId("statistic").children)
    button.setAttribute("aria-pressed", String(button.dataset.value === statistic));
  const [, unit, , about] = STATISTICS[statistic],
    all = RUNS.map((run) => run.maps[statistic] || {});
  byId("about").textContent = about;
  for (let i = cards.length - 1; i >= 0; i--)
    if (cards[i].chart instanceof LayerMap) cards.splice(i, 1);
  byId("maps").replaceChildren();
  const tensors = [...new Set(all.flatMap(Object.keys))],
    rank = (name) => (ORDER.includes(name) ? ORDER.indexOf(name) : ORDER.length);
  tensors.sort((a, b) => rank(a) - rank(b) || (a < b ? -1 : 1));
  const together = limits(all.flatMap(Object.values)),
    several = RUNS.length > 1;
  let place = null;
  for (const tensor of tensors) {
    if (several || !place)
      byId("maps").append(
        (place = make("div", {
          class: "tensor" + (several ? " together" : ""),
          style: `--columns: ${Math.min(RUNS.length, 3)}`,
        })),
      );
    const mine = all.map((maps) => maps[tensor]),
      own = limits(mine.filter(Boolean));
    mine.forEach((data, i) => {
      if (data)
        card(
          place,
          new LayerMap(
            several ? `${tensor} · ${RUNS[i].name}` : tensor,
            unit,
            i,
            data,
            byId("shared").checked ? together : own,
            view,
          ),
        );
    });
  }
}
function limits(tables) {
  const log = tables.every((t) => t.log);
  return {
    log,
    low: Math.min(...tables.map((t) => t.low)),
    high: Math.max(...tables.map((t) => t.high)),
  };
}

function kindOf(event) {
  return event.kind === "early_warning" ? event.level : event.kind.replaceAll("_", " ");
}
function sentence(event) {
  const {
      step,
      kind,
      level,
      tensor,
      layer,
      evidence,
      advice,
      steps,
      tokens,
      fallback,
      last_step,
      count,
      ...rest
    } = event,
    parts = [];
  if (tensor)
    parts.push(
      tensor +
        (layer === undefined || layer === null ? "" : ` in layer ${layer}`) +
        (evidence ? ": " + evidence : ""),
    );
  if (steps) parts.push(`out of range in ${whole(steps)} steps`);
  if (advice) parts.push(advice);
  for (const [name, value] of Object.entries(rest))
    if (value !== null && value !== "")
      parts.push(
        `${name.replaceAll("_", " ")} ${typeof value === "object" ? JSON.stringify(value) : value}`,
      );
  if (count) parts.push(`${count} times, up to step ${whole(last_step)}`);
  return parts.join("; ");
}
function showEvents() {
  const rows = RUNS.flatMap((run, i) => run.events.map((event) => ({ run, i, event })));
  if (!rows.length) {
    byId("events").append(
      make(
        "caption",
        { style: "text-align:left" },
        "Nothing happened: no warning, no bad step, no restart.",
      ),
    );
    return;
  }
  rows.sort((a, b) => a.event.step - b.event.step);
  byId("events").append(
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        ...["Step", ...(RUNS.length > 1 ? ["Run"] : []), "What", ""].map((name) =>
          make("th", {}, name),
        ),
      ),
    ),
  );
  for (const { run, event } of rows.slice(-300))
    byId("events").append(
      make(
        "tr",
        {},
        make("td", {}, whole(event.step)),
        ...(RUNS.length > 1 ? [make("td", {}, run.name)] : []),
        make("td", { class: levelOf(event) ? "level-" + levelOf(event) : "" }, kindOf(event)),
        make("td", { class: "wide" }, sentence(event)),
      ),
    );
}

begin();
document.documentElement.dataset.ready = performance.now().toFixed(0);
