// Figures of a target over all tokens, computed in slices so that the page stays awake, and their summary.

const UNRELIABLE = 0.05; // as in replay.py: from this mean error on, a figure is called unreliable
const kIsTooSmall = (error) => error > UNRELIABLE && error < Infinity; // of a score without a bound no k is large enough
const SLICE_MS = 24;
const BLOCK = 1024;

/** One number a token for each figure. */
function figuresFor(D) {
  const numbers = () => new Float64Array(D.n);
  return {
    trust: numbers(),
    mass: numbers(),
    update: numbers(),
    updateError: numbers(),
    qError: numbers(),
    off: new Uint8Array(D.n),
  };
}

/** Q, residual and figures of one token: what the bars show. */
function tokenFigures(D, target, i) {
  const s = { ...scratchFor(D), whole: true };
  const out = { trust: {}, mass: {}, update: {}, updateError: {}, qError: {}, off: {} };
  replay(D, target, i, i + 1, out, s);
  const count = D.start[i + 1] - D.start[i];
  const has = s.mass !== 0;
  return {
    ...Object.fromEntries(Object.entries(out).map(([name, values]) => [name, values[i]])),
    q: s.q.slice(0, count),
    qTail: s.qTail,
    residual: has ? s.R.slice(0, count).map((x) => x / s.mass) : null,
    residualTail: has ? s.RTail / s.mass : null,
  };
}

/** Means over all tokens, as Replay.summary has them. */
function summarise(D, out) {
  const mean = (values) => {
    let sum = 0;
    for (let i = 0; i < D.n; i++) sum += values[i];
    return sum / D.n;
  };
  const update = mean(out.update);
  const sft = mean(D.rest);
  const share = sft > 0 ? update / sft : NaN;
  const summary = {
    trust: mean(out.trust),
    residual_mass: mean(out.mass),
    update,
    update_vs_sft: share,
    carries_90: carriers(out.update, 0.9 * update * D.n) / D.n,
    off_simplex: mean(out.off),
    update_error: mean(out.updateError),
    q_error: mean(out.qError),
  };
  return { ...summary, sft, error: Math.max(summary.update_error, summary.q_error) };
}

/** How many of the largest values it takes to reach `goal`: by buckets, of which one is sorted. */
function carriers(values, goal) {
  let largest = 0;
  for (const value of values) if (value > largest) largest = value;
  if (!(largest > 0)) return 0;
  const BUCKETS = 4096;
  const bucket = (value) => Math.min(BUCKETS - 1, Math.floor((value / largest) * BUCKETS));
  const counts = new Uint32Array(BUCKETS);
  const sums = new Float64Array(BUCKETS);
  for (const value of values) {
    const b = bucket(value);
    counts[b]++;
    sums[b] += value;
  }
  let at = BUCKETS - 1;
  let sum = 0;
  let taken = 0;
  while (at > 0 && sum + sums[at] < goal) {
    sum += sums[at];
    taken += counts[at--];
  }
  const inside = values.filter((value) => bucket(value) === at).sort();
  for (let k = inside.length - 1; k >= 0 && sum < goal; k--) {
    sum += inside[k];
    taken++;
  }
  return taken;
}

/**
 * Runs a target over all tokens. The first slice runs at once, further ones after the page has drawn; `onDone` gets the
 * summary. Returns a function that stops it.
 */
function runOver(D, target, out, onDone) {
  const s = scratchFor(D);
  let next = 0;
  let timer = 0;
  const slice = () => {
    const until = performance.now() + SLICE_MS;
    while (next < D.n && performance.now() < until) {
      const end = Math.min(D.n, next + BLOCK);
      replay(D, target, next, end, out, s);
      next = end;
    }
    if (next < D.n) timer = setTimeout(slice, 0);
    else onDone(summarise(D, out));
  };
  slice();
  return () => clearTimeout(timer);
}
