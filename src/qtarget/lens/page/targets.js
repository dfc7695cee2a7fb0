// The fifteen objectives as trust, weight of the residual and residuals: what presets.py says, in JavaScript.
//
// A target is {trust(i), rest, terms, notes}: trust gives a for token i, rest (a number or a function of i) multiplies the
// factors of terms, [{factor, pool}]; a pool holds coefficients of the models' logits and perhaps an offset's slope.

const TARGETS = {
  sft: () => plain(() => 1),
  dft: (D) => plain((i) => D.pY[i]),
  'beyond-log': (D, { alpha }) => plain((i) => Math.exp(alpha * D.logPY[i])),
  profit: (D, { tau, direction, tau_low: low, tau_high: high }) =>
    plain(
      {
        higher: (i) => (D.pY[i] >= tau ? 1 : 0),
        lower: (i) => (D.pY[i] < tau ? 1 : 0),
        middle: (i) => (D.pY[i] >= low && D.pY[i] < high ? 1 : 0),
      }[direction],
    ),
  eaft: (D, { top_k: k, power, normalizer }) => {
    const divisor = normalizer === 'log_k' ? Math.log(k) : normalizer === 'none' ? 1 : Number(normalizer);
    const few = `top_k is ${k}, but only the ${D.topK} likeliest tokens are here; capture with --top_k ${k}`;
    return plain((i) => (topKEntropy(D, i, k) / divisor) ** power, k > D.topK ? [few] : []);
  },
  'iw-sft': (D) => ofColumn(D, 'weight', '1'),
  cft: (D) => ofColumn(D, 'critical', '1'),
  'label-smoothing': (D, { smoothing }) => fixed(1 - smoothing, smoothing, [term(1, {})]),
  'sft-kl': (D, { kl_weight: weight }) => fixed(1, weight, [term(1, { reference: 1 })]),
  asft: (D, { kl_weight: weight }) => fixed((i) => D.pY[i], weight, [term(1, { reference: 1 })]),
  psft: (D, { clip, clip_high: above }) => {
    const old = D.numbers.old_logps;
    const high = 1 + (above ?? clip);
    const ratio = (i) => Math.exp(Math.min(20, D.logPY[i] - old[i])); // e^20 is far past any clip, and finite
    return old
      ? plain((i) => (ratio(i) < high ? ratio(i) : 0))
      : plain(() => 1, [notCaptured('old_logps', "the student's own, so r = 1")]);
  },
  gem: (D, { beta, h }) => {
    const pool = { student: 1 / beta };
    if (h === 'linear') return fixed(1, -1, [term(1, pool)]);
    const whole = { ...pool, slope: 0.01 };
    return { trust: null, rest: null, terms: [term(-1, whole)], notes: [], offset: { pool, whole } };
  },
  kd: (D, { temperature }) => distilled(1, temperature),
  'kd-hybrid': (D, { kd_weight: weight, temperature }) => distilled(weight, temperature),
  'target-sft': (D, { eta, teacher_temperature: T }) => ({
    trust: (i) => D.pY[i],
    rest: (i) => D.rest[i],
    terms: taught([term(1, { student: 1 - eta, teacher: eta / T })]),
    notes: [],
  }),
};

const term = (factor, pool) => ({ factor, pool });
const plain = (trust, notes = []) => ({ trust, rest: 0, terms: [], notes });
const fixed = (trust, rest, terms) => ({
  trust: typeof trust === 'number' ? () => trust : trust,
  rest,
  terms: rest === 0 ? [] : taught(terms),
  notes: [],
});

function distilled(weight, T) {
  const pair = [term(T, { teacher: 1 / T }), term(-T, { student: 1 / T })];
  return fixed(1 - weight, weight, T === 1 ? [term(1, { teacher: 1 })] : pair);
}

/** Without coefficients of zero, which are dropped and never multiplied, and without the student itself: p − R = 0. */
function taught(terms) {
  return terms
    .map(({ factor, pool }) => term(factor, Object.fromEntries(Object.entries(pool).filter(([, c]) => c !== 0))))
    .filter(({ factor, pool }) => factor !== 0 && !(pool.student === 1 && Object.keys(pool).length === 1));
}

const notCaptured = (name, taken) => `column ${name} was not captured and is taken as ${taken}`;

function ofColumn(D, name, taken) {
  const column = D.numbers[name];
  return column ? plain((i) => column[i]) : plain(() => 1, [notCaptured(name, taken)]);
}

/** Entropy of the student's k likeliest, renormalised; they stand in front. */
function topKEntropy(D, i, k) {
  const codes = D.codes.student;
  const end = Math.min(D.start[i + 1], D.start[i] + Math.min(k, D.topK));
  let sum = 0;
  let product = 0;
  for (let at = D.start[i]; at < end; at++) {
    const p = D.p[codes[at]];
    sum += p;
    product += p * D.value[codes[at]];
  }
  return Math.max(0, Math.log(sum) - product / sum);
}

/** Models this objective cannot do without, by value, that the record lacks. */
function lacking(D, name, hyper) {
  const { terms } = TARGETS[name](D, hyper);
  return ['teacher', 'reference'].filter((model) => !D.codes[model] && terms.some(({ pool }) => model in pool));
}

/** The defaults of an objective, as Python has them. */
function defaultsOf(D, name) {
  return { ...D.presets.find((preset) => preset.name === name).parameters };
}

function buildTarget(D, name, hyper) {
  const target = TARGETS[name](D, hyper);
  return { name, hyper, ...target, tables: target.terms.map(({ pool }) => tablesOf(D, pool)) };
}

/** exp(c · log p) of every code, for each model of a pool: an exponential an id becomes a look-up. */
function tablesOf(D, pool) {
  return D.models
    .filter((model) => model in pool)
    .map((model) => ({
      codes: D.codes[model],
      c: pool[model],
      table: pool[model] === 1 ? D.p : D.value.map((x) => Math.exp(pool[model] * x)),
    }));
}
