// What a target does to a token, from the kept ids alone: replay.py in JavaScript, with its bounds for the tails.
// Pure functions of the record and a target of targets.js; nothing here knows of the page.

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
/** x · y with 0 · ∞ = 0: nothing outside, whatever its exponent. */
const times = (x, y) => (x === 0 || y === 0 ? 0 : x * y);

/** Room for one token's working; `q` and `R` are read by the bars. */
function scratchFor(D) {
  const wide = () => new Float64Array(D.widest);
  return { x: wide(), q: wide(), R: wide(), g: wide(), tail: new Float64Array(3), qTail: 0, RTail: 0, mass: 0, a: 0, b: 0, unsure: 0 };
}

/** What a pool's exponentials sum to outside the ids, into out: [shown, at least, at most]. */
function tailOf(D, pool, slope, i, out) {
  const n = D.outside[i];
  if (slope !== null) {
    tailOf(D, pool, null, i, out);
    const [middle, cap] = tailOffsets(D, slope, i);
    out[0] *= middle;
    out[1] = 0;
    out[2] *= cap;
    return;
  }
  const names = Object.keys(pool);
  if (names.length === 0) {
    out.fill(n);
  } else if (names.length === 1) {
    const c = pool[names[0]];
    const M = D.tail[names[0]][i];
    if (c === 1) {
      out.fill(M);
      return;
    }
    const even = times(n ** (1 - c), M ** c);
    const concentrated = times(Math.exp((c - 1) * D.floor[names[0]][i]), M);
    // Σ xᶜ over parts of M, none above the cap: equal parts are one end and as few as may be the other.
    const low = Math.min(even, concentrated);
    let high = Math.max(even, concentrated);
    if (c > 1) high = Math.min(high, M ** c);
    out[0] = Math.sqrt(low * high);
    out[1] = low;
    out[2] = high;
  } else {
    // Hölder: Σ Π xᶜ ≤ n^(1 − Σc) Π M^c, reached where the tails have one shape.
    let total = 0;
    let product = 1;
    let negative = false;
    for (const name of names) {
      total += pool[name];
      product *= D.tail[name][i] ** pool[name];
      negative ||= pool[name] < 0;
    }
    let high = n > 0 ? n ** Math.max(0, 1 - total) * product : 0;
    if (negative) high = Infinity;
    out[0] = high;
    out[1] = 0;
    out[2] = high;
  }
}

/** The offset w of a token outside the ids: of an average one, and the most it can be. */
function tailOffsets(D, slope, i) {
  const average = D.outside[i] > 0 ? Math.log(D.tail.student[i] / D.outside[i]) : -Infinity;
  return [average, D.floor.student[i]].map((at) => sigmoid(slope * (at - D.logPY[i])));
}

/** Exponentials of the pool's scores at the ids into x; returns [their sum, the shift taken off the scores]. */
function exponentials(D, tables, slope, i, x) {
  const from = D.start[i];
  const count = D.start[i + 1] - from;
  let sum = 0;
  if (tables.length === 1) {
    const { codes, table } = tables[0];
    for (let k = 0; k < count; k++) sum += x[k] = table[codes[from + k]];
  } else if (tables.length === 2) {
    const [{ codes, table }, { codes: others, table: second }] = tables;
    for (let k = 0; k < count; k++) sum += x[k] = table[codes[from + k]] * second[others[from + k]];
  } else if (tables.length === 0) {
    x.fill(1, 0, count); // uniform
    sum = count;
  }
  // Three models, and what leaves the numbers' range, go the slower way.
  let shift = 0;
  if (!(sum > 1e-280 && sum < 1e280)) [sum, shift] = shifted(D, tables, from, count, x);
  if (slope !== null) {
    sum = 0;
    for (let k = 0; k < count; k++) {
      sum += x[k] *= sigmoid(slope * (D.value[D.codes.student[from + k]] - D.logPY[i]));
    }
  }
  return [sum, shift];
}

/** The same where plain exponentials leave the numbers' range: with the largest score taken off first. */
function shifted(D, tables, from, count, x) {
  let largest = -Infinity;
  for (let k = 0; k < count; k++) {
    x[k] = 0;
    for (const { codes, c } of tables) x[k] += c * D.value[codes[from + k]];
    largest = Math.max(largest, x[k]);
  }
  let sum = 0;
  for (let k = 0; k < count; k++) sum += x[k] = Math.exp(x[k] - largest);
  return [sum, largest];
}

/** The mass Σ q w of a residual with an offset; by what share of itself it is unsure goes into s.unsure. */
function offsetMass(D, { pool, slope, tables }, i, s) {
  const [all, shift] = exponentials(D, tables, null, i, s.x);
  const [inside] = exponentials(D, tables, slope, i, s.x);
  tailOf(D, pool, null, i, s.tail);
  const [shown, low, high] = s.tail.map((mass) => times(Math.exp(-shift), mass));
  const [middle, cap] = tailOffsets(D, slope, i);
  const mass = (inside + middle * shown) / (all + shown);
  const most = Math.max((inside + cap * low) / (all + low), (inside + cap * high) / (all + high));
  s.unsure = Math.max(most - mass, mass - inside / (all + high)) / mass;
  return mass;
}

/**
 * What a residual of weight 1 does by a divergence, p (s − E s): into s.g at the ids, of which s.x holds R's shares, and
 * {tail, error, most} as replay.py's _pull. The tail counts as one token.
 */
function pull(D, { pool, slope, divergence }, i, [here, least, cap], s) {
  const { timesP, deepest } = divergence;
  const begin = D.start[i];
  const count = D.start[i + 1] - begin;
  const codes = D.codes.student;
  const pTail = D.tail.student[i];
  let inside = 0;
  for (let k = 0; k < count; k++) inside += s.g[k] = timesP(D.p[codes[begin + k]], (1 - here) * s.x[k]);
  let moved = 0;
  for (const other of [least, cap]) {
    let sum = 0;
    if (other !== here) {
      for (let k = 0; k < count; k++) sum += Math.abs(timesP(D.p[codes[begin + k]], (1 - other) * s.x[k]) - s.g[k]);
    }
    moved = Math.max(moved, sum);
  }
  const outside = timesP(pTail, here);
  const mean = inside + outside;
  // The most that p/R can be outside is known where R is the same for every token.
  const even = Object.keys(pool).length === 0 && slope === null;
  const above = times(Math.max(0, timesP(1, even ? Math.exp(-D.floor.student[i]) / D.vocabSize : 0)), pTail);
  const below = deepest * cap;
  const off = moved + Math.max(above - outside, outside + below);
  let sum = 0;
  for (let k = 0; k < count; k++) {
    const p = D.p[codes[begin + k]];
    s.g[k] -= p * mean;
    sum += p;
  }
  return {
    tail: outside - pTail * mean,
    error: moved + times(sum, off),
    most: times(pTail, Math.abs(mean) + off) + above + below,
  };
}

/**
 * Figures of tokens from … to − 1, into the arrays of `out` (see figures.js): Q, and its residual, of the last one stay in
 * the scratch `s`.
 */
function replay(D, target, from, to, out, s) {
  const { terms } = target;
  const codes = D.codes.student;
  for (let i = from; i < to; i++) {
    target.weigh(i, s);
    const { a, b, unsure } = s;
    out.trust[i] = a;
    if (terms.length === 0) {
      byLabelAlone(D, i, a, out, s);
      continue;
    }
    const begin = D.start[i];
    const count = D.start[i + 1] - begin;
    const { q, R, x } = s;
    const pTail = D.tail.student[i];
    for (let k = 0; k < count; k++) {
      q[k] = (1 - a) * D.p[codes[begin + k]];
      R[k] = 0;
    }
    q[D.label[i]] += a;
    let qTail = (1 - a) * pTail;
    let RTail = 0;
    let mass = 0;
    let parts = Math.abs(a);
    let error = 0;
    let most = Math.abs(a) * pTail;
    for (const term of terms) {
      const weight = term.factor * b;
      const size = Math.abs(weight);
      const [sum, shift] = exponentials(D, term.tables, term.slope, i, x);
      tailOf(D, term.pool, term.slope, i, s.tail);
      const [shown, low, high] = shift === 0 ? s.tail : s.tail.map((mass) => times(Math.exp(-shift), mass));
      const here = shown === Infinity ? 1 : shown / (sum + shown);
      const least = low === Infinity ? 1 : low / (sum + low);
      const cap = high === Infinity ? 1 : high / (sum + high);
      mass += weight;
      parts += size;
      RTail += weight * here;
      const scale = (weight * (1 - here)) / sum;
      for (let k = 0; k < count; k++) R[k] += scale * x[k];
      if (term.divergence) {
        for (let k = 0; k < count; k++) x[k] /= sum;
        const pulled = pull(D, term, i, [here, least, cap], s);
        for (let k = 0; k < count; k++) q[k] -= weight * s.g[k];
        qTail -= weight * pulled.tail;
        error += times(size, pulled.error);
        most += times(size, pulled.most);
      } else {
        for (let k = 0; k < count; k++) q[k] += scale * x[k] - weight * D.p[codes[begin + k]];
        qTail += weight * (here - pTail);
        error += size * Math.max(cap - here, here - least);
        most += size * (pTail + cap);
      }
    }
    let apart = 0;
    let lowest = qTail;
    for (let k = 0; k < count; k++) {
      apart += Math.abs(D.p[codes[begin + k]] - q[k]);
      if (q[k] < lowest) lowest = q[k];
    }
    const tail = Math.abs(pTail - qTail);
    out.mass[i] = mass;
    out.qError[i] = error + unsure * parts;
    out.update[i] = (apart + tail) / 2;
    out.updateError[i] = Math.max(most - tail, 0) / 2 + out.qError[i];
    out.off[i] = lowest < -1e-6 ? 1 : 0;
    s.qTail = qTail;
    s.RTail = RTail;
    s.mass = mass;
  }
}

/** With no residual but the student, every figure follows from a and p: no sum over the ids. */
function byLabelAlone(D, i, a, out, s) {
  const left = 1 - a;
  const begin = D.start[i];
  const codes = D.codes.student;
  let lowest = 0;
  if (left < 0) {
    const other = D.label[i] === 0 ? 1 : 0; // likeliest but the label
    if (begin + other < D.start[i + 1]) lowest = left * D.p[codes[begin + other]];
    lowest = Math.min(lowest, left * D.tail.student[i]);
  }
  lowest = Math.min(lowest, a + left * D.pY[i]);
  out.mass[i] = 0;
  out.qError[i] = 0;
  out.updateError[i] = 0;
  out.update[i] = Math.abs(a) * D.rest[i];
  out.off[i] = lowest < -1e-6 ? 1 : 0;
  if (!s.whole) return;
  for (let k = begin; k < D.start[i + 1]; k++) s.q[k - begin] = left * D.p[codes[k]];
  s.q[D.label[i]] += a;
  s.qTail = left * D.tail.student[i];
  s.mass = 0;
}
