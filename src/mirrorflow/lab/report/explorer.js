"use strict";
// The explorer of R_a. First the formulas, one small pure function per class of
// mirrorflow.legendre (a browser test compares the two on a grid); then the drawing.

// x = A sinh(s mu + rho): HyperbolicEntropy.
function hyperbolic(logA, rho, s) {
  const A = Math.exp(logA);
  const mirror = (x) => (Math.asinh(x / A) - rho) / s;
  return {
    domain: [-Infinity, Infinity], range: [-Infinity, Infinity],
    primal: (mu) => A * Math.sinh(s * mu + rho),
    mirror,
    value: (x) => x * mirror(x) - Math.hypot(x, A) / s,
    metric: (x) => 1 / (s * Math.hypot(x, A)),
    facts: [["A", A]],
  };
}

// x = X e^{s mu}, x > 0: OneSidedEntropy.
function oneSided(logX, s) {
  return {
    domain: [0, Infinity], range: [-Infinity, Infinity],
    primal: (mu) => Math.exp(logX + s * mu),
    mirror: (x) => (Math.log(x) - logX) / s,
    value: (x) => (x === 0 ? 0 : x * (Math.log(x) - 1 - logX) / s),
    metric: (x) => 1 / (s * x),
    facts: [],
  };
}

// x = P^-q - N^-q with P = c (upper - mu), N = c (mu - lower): PowerEntropy.
function power(k, u0, v0, a) {
  const c = 2 * k * (2 * k - 2), q = k / (k - 1);
  const lower = a - v0 ** (2 - 2 * k) / c, upper = u0 ** (2 - 2 * k) / c - a;
  const ends = (mu) => [c * (upper - mu), c * (mu - lower)];
  const conjugate = ([P, N]) => (P ** (1 - q) + N ** (1 - q)) / (c * (q - 1));
  const mirror = (x) => solvePower(x, lower, upper, c, q);
  return {
    domain: [-Infinity, Infinity], range: [lower, upper],
    primal: (mu) => { const [P, N] = ends(mu); return P ** -q - N ** -q; },
    mirror,
    value: (x) => { const mu = mirror(x); return x * mu - conjugate(ends(mu)); },
    metric: (x) => {
      const [P, N] = ends(mirror(x));
      return 1 / (c * q * (P ** (-q - 1) + N ** (-q - 1)));
    },
    facts: [],
  };
}

// Newton's method for z = log(P/N), in arcsinh, where the equation is nearly linear.
function solvePower(x, lower, upper, c, q) {
  const target = Math.asinh((x * (c * (upper - lower)) ** q) / 2);
  let z = -target / q;
  for (let i = 0; i < 60; i += 1) {
    const bigU = Math.exp(q * softplus(-z)), bigV = Math.exp(q * softplus(z));
    const half = (bigU - bigV) / 2;
    const slope = (-q / 2) * (logistic(-z) * bigU + logistic(z) * bigV) / Math.hypot(half, 1);
    const step = (Math.asinh(half) - target) / slope;
    z -= step;
    if (Math.abs(step) <= 1e-15 * (1 + Math.abs(z))) break;
  }
  const width = upper - lower;
  return z < 0 ? upper - width * logistic(z) : lower + width * logistic(-z);
}

// mu = (V s(2x) - U s(-2x)) / 2, s the logistic function: LogCoshEntropy.
function logCosh(u2, v2, a) {
  const U = u2 + 2 * a, V = v2 + 2 * a;
  if (!(U + V > 0)) return null; // both u and v have reached 0: R_a does not exist
  const constant = entropy(U + V) - entropy(u2) - entropy(v2);
  return {
    domain: [-Infinity, Infinity], range: [-U / 2, V / 2],
    primal: (mu) => 0.5 * Math.log((U + 2 * mu) / (V - 2 * mu)),
    mirror: (x) => 0.5 * (V * logistic(2 * x) - U * logistic(-2 * x)),
    value: (x) => (U * softplus(-2 * x) + V * softplus(2 * x) - constant) / 4,
    metric: (x) => (U + V) * logistic(2 * x) * logistic(-2 * x),
    facts: [["U = u₀² + 2a", U], ["V = v₀² + 2a", V]],
  };
}

const logistic = (x) => (x < 0 ? Math.exp(x) / (1 + Math.exp(x)) : 1 / (1 + Math.exp(-x)));
const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
const entropy = (s) => s * Math.log(s) - s;

// The cases. `make` takes the two starting values (p, q) and a; null where R_a does not exist.
const UV = [["u₀", 0.05, 2, 1], ["v₀", 0.05, 2, 0.6]];
const CASES = {
  hadamard: {
    label: "m · w, weight decay (hyperbolic entropy)", aMin: -5, start: UV,
    note: "u₀ = (m₀ + w₀)/√2, v₀ = (m₀ − w₀)/√2; R is L2-like for large A, L1-like for small A.",
    make: (u, v, a) => hyperbolic(Math.log(u * v) + 2 * a, Math.log(u / v), 2),
  },
  balanced: {
    label: "m · w started at m₀ = w₀ (entropy)", aMin: -5, start: [["β = x₀", 0.05, 2, 1]],
    note: "x keeps the sign it starts with, so that R is defined for x ≥ 0 only.",
    make: (x0, _, a) => oneSided(Math.log(x0) + 2 * a, 2),
  },
  quadratic: {
    label: "½ wᵀAw with A = diag(1, −1), weight decay", aMin: -5,
    start: [["w₁", 0.05, 2, 1], ["w₂", 0.05, 2, 0.6]],
    note: "A quadratic form with eigenvalues of both signs has the curve of m · w, here at u₀ = w₁, v₀ = w₂.",
    make: (p, q, a) => hyperbolic(Math.log(p * q) + 2 * a, Math.log(p / q), 2),
  },
  eigenvalue: {
    label: "an eigenvalue of U Uᵀ, weight decay (Corollary C.3)", aMin: -5,
    start: [["U₀ = p · I, p", 0.05, 1.5, 1]],
    note: "Where the sensing matrices commute, each eigenvalue of X = U Uᵀ has the entropy of m · w at m₀ = w₀, from β = p².",
    make: (p, _, a) => oneSided(2 * Math.log(p) + 2 * a, 2),
  },
  square: {
    label: "u² − v², penalty u² + v²", aMin: -3, start: UV,
    note: "The same shape as m · w, but the decay acts twice as fast.",
    make: (u, v, a) => hyperbolic(Math.log(2 * u * v) + 4 * a, Math.log(u / v), 4),
  },
  fourth: {
    label: "u⁴ − v⁴, penalty u⁴ + v⁴", aMin: -5, start: UV,
    note: "The range of μ widens as a falls; what shrinks is the speed 1/R″ near zero.",
    make: (u, v, a) => power(2, u, v, a),
  },
  sixth: {
    label: "u⁶ − v⁶, penalty u⁶ + v⁶", aMin: -5, start: UV,
    note: "As for u⁴ − v⁴, with a deeper model.",
    make: (u, v, a) => power(3, u, v, a),
  },
  ratio: {
    label: "log u − log v, penalty log u + log v", start: UV,
    aMin: (u, v) => -(u * u + v * v) / 4, // where Rₐ ends to exist
    note: "Decay lowers the scale of R until u or v reaches 0, at 2a = −min(u₀², v₀²).",
    make: (u, v, a) => logCosh(u * u, v * v, a),
  },
};

// What the page shows for one setting; `reach` is half the width of the window.
function describe(name, p, q, a, reach, samples = 241) {
  const R = CASES[name].make(p, q, a);
  if (R === null) return { R, centre: NaN, curves: null };
  // Samples are dense near 0, where a small A bends the curve.
  const all = Array.from({ length: samples }, (_, i) => reach * (2 * i / (samples - 1) - 1) ** 3);
  const x = all.filter((t) => t > R.domain[0] && t < R.domain[1]);
  const centre = R.range[0] < 0 && R.range[1] > 0 ? R.primal(0) : NaN;
  const values = x.map(R.value);
  const lowest = Number.isNaN(centre) ? Math.min(...values) : R.value(centre);
  const value = values.map((v) => v - lowest);
  const top = Math.max(value[0], value[value.length - 1]);
  return {
    R, centre,
    curves: {
      x, value, mirror: x.map(R.mirror), metric: x.map(R.metric),
      l1: x.map((t) => top * Math.abs(t) / reach), l2: x.map((t) => top * (t / reach) ** 2),
    },
  };
}

// Drawing: three small SVG plots, redrawn on every move of a slider.
const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT] = [380, 280, 62, 40, 12, 12];

function ticks([low, high], count = 5) {
  const raw = (high - low) / count, base = 10 ** Math.floor(Math.log10(raw));
  const step = base * [1, 2, 5, 10].find((m) => m * base >= raw);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

// Exponents of round numbers: whole decades, or 1, 2, 5 of each where there are few.
function logTicks([low, high]) {
  if (high - low > 2) return ticks([low, high]).filter(Number.isInteger);
  const decades = Array.from({ length: 6 }, (_, i) => Math.floor(low) + i);
  const all = decades.flatMap((e) => [1, 2, 5].map((m) => e + Math.log10(m)));
  const inside = all.filter((t) => t >= low && t <= high);
  if (inside.length > 2) return inside;
  return ticks([10 ** low, 10 ** high]).filter((v) => v > 0).map(Math.log10);  // less than a decade
}

function text(number) {
  if (!Number.isFinite(number)) return Number.isNaN(number) ? "none" : number > 0 ? "∞" : "−∞";
  const size = Math.abs(number);
  const plain = size === 0 || (size >= 1e-3 && size < 1e4);
  return (plain ? String(+number.toPrecision(4)) : number.toExponential(2)).replaceAll("-", "−");
}

function plot(svg, xs, lines, { label, reach, log = false, marks = [] }) {
  const scaleY = log ? Math.log10 : (v) => v;
  const seen = lines.flatMap((l) => l.y.map(scaleY)).filter(Number.isFinite);
  let [low, high] = [Math.min(...seen), Math.max(...seen)];
  if (high - low < 1e-9 * (1 + Math.abs(high))) [low, high] = [low - 1, high + 1];
  const pad = 0.05 * (high - low);
  [low, high] = [low - pad, high + pad];
  const px = (x) => LEFT + (x + reach) / (2 * reach) * (WIDTH - LEFT - RIGHT);
  const py = (v) => HEIGHT - BOTTOM - (v - low) / (high - low) * (HEIGHT - BOTTOM - TOP);
  const yTicks = log ? logTicks([low, high]) : ticks([low, high]);
  const grid = ticks([-reach, reach], 4).map((t) =>
    `<path class="grid" d="M${px(t)} ${TOP}V${HEIGHT - BOTTOM}"/>` +
    `<text x="${px(t)}" y="${HEIGHT - BOTTOM + 16}" text-anchor="middle">${text(t)}</text>`);
  const rows = yTicks.map((t) =>
    `<path class="grid" d="M${LEFT} ${py(t)}H${WIDTH - RIGHT}"/>` +
    `<text x="${LEFT - 6}" y="${py(t) + 4}" text-anchor="end">${text(log ? 10 ** t : t)}</text>`);
  const curves = lines.map((l) => {
    const points = xs.map((x, i) => [px(x), py(scaleY(l.y[i]))]).filter((p) => p.every(Number.isFinite));
    return `<path class="${l.kind}" d="M${points.map((p) => p.map((c) => c.toFixed(2)).join(" ")).join("L")}"/>`;
  });
  const dots = marks.filter(([x, y]) => Math.abs(x) <= reach && Number.isFinite(scaleY(y)))
    .map(([x, y]) => `<circle class="centre" cx="${px(x)}" cy="${py(scaleY(y))}" r="4"/>`);
  svg.innerHTML = grid.join("") + rows.join("") + curves.join("") + dots.join("") +
    `<text x="${(LEFT + WIDTH - RIGHT) / 2}" y="${HEIGHT - 6}" text-anchor="middle">x</text>` +
    `<text transform="translate(13 ${(HEIGHT - BOTTOM + TOP) / 2}) rotate(-90)" text-anchor="middle">${label}</text>`;
}

function startExplorer(root) {
  const find = (name) => root.querySelector(`[data-explorer="${name}"]`);
  const [choice, start, a, reach] = ["case", "start", "a", "reach"].map(find);
  choice.innerHTML = Object.entries(CASES)
    .map(([name, c]) => `<option value="${name}">${c.label}</option>`).join("");

  function chooseCase() {
    const { start: sliders } = CASES[choice.value];
    start.innerHTML = sliders.map(([label, low, high, value]) =>
      `<label>${label} <output></output><input type="range" min="${low}" max="${high}" step="0.01" value="${value}"></label>`).join("");
    redraw();
  }

  function redraw() {
    const inputs = [...start.querySelectorAll("input")];
    const [p, q] = inputs.map((input) => Number(input.value));
    const { aMin } = CASES[choice.value]; // the slider covers where Rₐ exists
    a.min = typeof aMin === "function" ? Math.ceil(99 * aMin(p, q)) / 100 : aMin;
    const half = +(10 ** Number(reach.value)).toPrecision(2), here = Number(a.value);
    for (const input of inputs) input.parentElement.querySelector("output").textContent = text(+input.value);
    find("a-value").textContent = text(here);
    find("reach-value").textContent = `−${text(half)} to ${text(half)}`;
    const shown = describe(choice.value, p, q, here, half);
    find("note").textContent = CASES[choice.value].note;
    find("warning").textContent = warning(shown);
    find("plots").classList.toggle("absent", shown.curves === null);
    find("readout").innerHTML = readout(shown).map(([k, v]) => `<dt>${k}</dt><dd>${v}</dd>`).join("");
    if (shown.curves !== null) drawAll(shown, half);
  }

  function drawAll({ R, centre, curves }, half) {
    const lines = (y, kind = "curve") => ({ y, kind });
    const three = [lines(curves.l2, "l2"), lines(curves.l1, "l1"), lines(curves.value)];
    plot(find("value"), curves.x, three, { label: "Rₐ(x) − min Rₐ", reach: half, marks: [[centre, 0]] });
    plot(find("mirror"), curves.x, [lines(curves.mirror)],
      { label: "gradient (mirror map) μ", reach: half, marks: [[centre, 0]] });
    plot(find("metric"), curves.x, [lines(curves.metric)],
      { label: "metric R″, log scale", reach: half, log: true, marks: [[centre, R.metric(centre)]] });
  }

  root.addEventListener("submit", (event) => event.preventDefault());
  root.addEventListener("input", (event) => (event.target === choice ? chooseCase() : redraw()));
  chooseCase();
}

function warning({ R, centre }) {
  if (R === null) return "Rₐ does not exist here: u₀² + v₀² + 4a must be positive.";
  if (Number.isNaN(centre)) return "No flow gets here: u or v has reached 0 before, and Rₐ has no minimum.";
  return "";
}

function readout({ R, centre }) {
  if (R === null) return [];
  const metric = Number.isNaN(centre) ? NaN : R.metric(centre);
  return [
    ["centre", text(centre)], ["metric at the centre", text(metric)],
    ["speed 1/R″ there", text(1 / metric)], ...R.facts.map(([k, v]) => [k, text(v)]),
    ["range of μ", `${text(R.range[0])} to ${text(R.range[1])}`],
  ];
}

if (typeof document !== "undefined" && document.getElementById("explorer")) {
  startExplorer(document.getElementById("explorer"));
}
