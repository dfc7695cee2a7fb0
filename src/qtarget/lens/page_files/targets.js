// Trust rules and residuals under their names in targets/, and the targets that are made of them.
//
// A target is {weigh(i, s), terms, notes}: weigh puts the weights of label and residual of token i into s.a and s.b, and by
// what share of themselves they are unsure into s.unsure. terms are [{factor, pool, slope, tables, divergence}]: a pool holds
// the coefficients of the models' logits, slope that of an elementwise offset; divergence is null for forward KL.

// name → (D, parameters, target) → {trust(i, s), rest}: rest is the residual's weight, 1 − trust where it is not there.
const RULES = {
  constant: (D, { value }) => ({ trust: () => value, rest: 1 - value }),
  probability: (D) => ({ trust: (i) => D.pY[i], rest: (i) => D.rest[i] }),
  probability_power: (D, { alpha }) => ({ trust: (i) => Math.exp(alpha * D.logPY[i]) }),
  probability_threshold: (D, { tau, direction, tau_low: low, tau_high: high }, { notes }) => {
    if (direction === 'middle' && high <= low) notes.push('tau_high is not above tau_low: no token is kept');
    const kept = { higher: (p) => p >= tau, lower: (p) => p <= tau, middle: (p) => p >= low && p <= high }[direction];
    return { trust: (i) => (kept(D.pY[i]) ? 1 : 0) };
  },
  affine_probability: (D, { constant, slope }) => ({ trust: (i) => constant + slope * D.pY[i] }),
  clipped_probability: (D, { low, high }) => ({ trust: (i) => Math.min(Math.max(D.pY[i], low), high) / high }),
  mixture_ratio: (D, { gamma }) => ({ trust: (i) => 1 / (1 - gamma + times(gamma, Math.exp(-D.logPY[i]))) }),
  shaped_probability: (D, { gamma }) => ({ trust: (i) => (gamma * D.pY[i]) / (D.pY[i] + gamma) ** 2 }),
  bernoulli_variance: (D) => ({ trust: (i) => D.pY[i] * D.rest[i] }),
  confidence_gap: (D, { confidence }) => {
    const wanted = Math.log(confidence / (1 - confidence));
    return { trust: (i) => D.pY[i] * Math.max(0, 1 - (D.logPY[i] - Math.log(D.rest[i])) / wanted) };
  },
  focal: (D, { gamma, held }) => {
    const moved = (i) => times(-gamma * D.pY[i] * D.logPY[i], D.rest[i] ** (gamma - 1));
    return { trust: (i) => D.rest[i] ** gamma + (held ? 0 : moved(i)) };
  },
  entropy: (D, { top_k: k, power, normalizer }, target) => {
    noteTopK(D, k, target);
    const divisor = normalizer === 'log_k' ? Math.log(k) : normalizer === 'none' ? 1 : Number(normalizer);
    return { trust: (i) => (topKEntropy(D, i, k) / divisor) ** power };
  },
  surprise_power: (D, { strength, beta, low, high }) => {
    const surprise = (i) => Math.min(Math.max(Math.exp((-D.logPY[i] - D.entropy[i]) / beta), low), high);
    return { trust: (i) => Math.exp((1 + strength * (surprise(i) - 1)) * D.logPY[i]) };
  },
  toward_half: (D, { weight, top_k: k, tau }, target) => {
    noteTopK(D, k, target);
    return { trust: (i) => 1 + (topKMass(D, i, k) < tau ? weight * D.pY[i] * (D.rest[i] - D.pY[i]) : 0) };
  },
  trajectory_weight: (D, _, target) => ofColumn(D, 'weight', target),
  token_mask: (D, _, target) => ofColumn(D, 'critical', target),
  clipped_ratio: (D, { clip, clip_high: above }, { notes }) => {
    const old = D.numbers.old_logps;
    const high = 1 + (above ?? clip);
    if (!old) notes.push('column old_logps was not captured and is assumed to be the student’s own, so r = 1');
    const ratio = (i) => Math.exp(Math.min(20, D.logPY[i] - (old ?? D.logPY)[i])); // e^20 is far past any clip, and finite
    return { trust: (i) => (ratio(i) < high ? ratio(i) : 0) };
  },
  reference_probability: (D) => {
    const prior = ofLabel(D, 'reference');
    return { trust: (i) => Math.exp(prior[i]) };
  },
  reference_threshold: (D, { perplexity }) => {
    const prior = ofLabel(D, 'reference');
    return { trust: (i) => (-prior[i] <= Math.log(perplexity) ? 1 : 0) };
  },
  gibbs: (D, { beta, prior: model }) => {
    const prior = ofLabel(D, model);
    return { trust: (i) => sigmoid(prior[i] + beta + Math.log(-Math.expm1(-beta))) };
  },
  anchored: (D, { trust, kl_weight: rest }, target) => ({ ...ruleOf(D, trust, target), rest }),
  offset_mass: (D, _, { terms: [first] }) => ({ trust: (i, s) => (first.slope === null ? 1 : offsetMass(D, first, i, s)) }),
  // A rule that is not in this list, such as somebody's own: its weights, computed in Python.
  given: (D, { trust, rest, unsure }) => {
    const [a, b, u] = [trust, rest, unsure].map((packed) => unpack(packed, Float32Array));
    return { trust: (i) => a[i], rest: (i) => b[i], unsure: (i) => u[i] };
  },
};

// name → parameters → coefficients of the models' logits, and perhaps an offset's slope.
const POOLS = {
  student: () => ({ student: 1 }),
  uniform: () => ({}),
  reference: () => ({ reference: 1 }),
  teacher: ({ temperature }) => ({ teacher: 1 / temperature }),
  guided: ({ eta, temperature }) => ({ student: 1 - eta, teacher: eta / temperature }),
  tempered: ({ temperature }) => ({ student: 1 / temperature }),
  sharpened: ({ beta, h }) => ({ student: 1 / beta, offset_slope: h === 'logsigmoid' ? 0.01 : null }),
  pool: (coefficients) => coefficients,
};

/** p log(p/R), 0 where p is. */
const pLogRatio = (p, R) => (p > 0 ? p * Math.log(p / R) : 0);

// name → parameters → (p, R) → p · score(log(p/R)), of targets/divergence.py.
const DIVERGENCES = {
  forward_kl: () => (p, R) => p - R,
  reverse_kl: () => pLogRatio,
  jsd: ({ beta }) => (p, R) => (1 - beta) * pLogRatio(p, (1 - beta) * p + beta * R),
  skew_kl: ({ alpha }) => (p, R) => (p === R ? 0 : ((1 - alpha) ** 2 * p * (p - R)) / (alpha * R + (1 - alpha) * p)),
  skew_reverse_kl: ({ alpha }) => (p, R) => {
    const m = alpha * p + (1 - alpha) * R;
    return p > 0 ? pLogRatio(p, m) - (alpha * p * (p - m)) / m : 0;
  },
  total_variation: () => (p, R) => 0.5 * p * Math.sign(p - R),
  alpha: ({ alpha }) => (alpha === 0 ? pLogRatio : (p, R) => (p - p ** (1 - alpha) * R ** alpha) / alpha),
  todi: ({ slope }) => (p, R) => {
    const w = R > 0 ? 1 / (1 + (p / R) ** slope) : slope > 0 ? 0 : 0.5;
    return w * (p - R) + (1 - w) * pLogRatio(p, R) + (1 - 2 * w) * p;
  },
  // One of somebody's own: its score times p over the larger of p and R, tabulated in Python.
  given: ({ table, reach, highest }) => {
    const values = unpack(table, Float32Array);
    return (p, R) => {
      if (R === 0) return p > 0 ? p * (highest ?? Infinity) : 0;
      const at = Math.min(1, Math.max(0, 0.5 + Math.log(p / R) / (2 * reach))) * (values.length - 1);
      const low = Math.min(Math.floor(at), values.length - 2);
      return Math.max(p, R) * (values[low] + (at - low) * (values[low + 1] - values[low]));
    };
  },
};

/** {timesP, deepest} of a divergence, as scores.py has it; null for forward KL. */
function divergenceOf(part) {
  if (part === 'forward_kl') return null;
  const [make, parameters] = lookUp(DIVERGENCES, 'divergence', part);
  const timesP = make(parameters);
  let lowest = 0;
  for (let step = 64 * 64; step > 0; step--) lowest = Math.min(lowest, timesP(Math.exp(-step / 64), 1));
  return { timesP, deepest: -lowest * Math.exp(1 / 64) };
}

/** [function, parameters] of a part, which is written `name` or `{name: parameters}`. */
function lookUp(table, what, part) {
  const [[name, parameters], ...more] = typeof part === 'string' ? [[part, {}]] : Object.entries(part);
  if (!Object.hasOwn(table, name)) throw new Error(`this page does not know the ${what} ${name}`);
  if (more.length) throw new Error(`this page does not know what ${more[0][0]} is next to the ${what} ${name}`);
  return [table[name], parameters];
}

function ruleOf(D, part, target) {
  const [make, parameters] = lookUp(RULES, 'rule', part);
  return make(D, parameters, target);
}

function ofColumn(D, name, { notes }) {
  const column = D.numbers[name];
  if (!column) notes.push(`column ${name} was not captured and is assumed to be 1`);
  return { trust: column ? (i) => column[i] : () => 1 };
}

/** A model's log-probability of the label. */
function ofLabel(D, model) {
  const prior = D.numbers[`${model}_log_p_y`];
  if (!prior) throw new Error(`no ${model} captured`);
  return prior;
}

function noteTopK(D, k, { notes }) {
  if (k > D.topK) notes.push(`top_k is ${k}, but only the ${D.topK} likeliest tokens are here; capture with --top_k ${k}`);
}

/** Where the student's k likeliest end; they stand in front. */
const endOfTopK = (D, i, k) => Math.min(D.start[i + 1], D.start[i] + Math.min(k, D.topK));

/** Probability of the student's k likeliest. */
function topKMass(D, i, k) {
  let sum = 0;
  for (let at = D.start[i]; at < endOfTopK(D, i, k); at++) sum += D.p[D.codes.student[at]];
  return sum;
}

/** Entropy of the student's k likeliest, renormalised. */
function topKEntropy(D, i, k) {
  const codes = D.codes.student;
  const end = endOfTopK(D, i, k);
  let sum = 0;
  let product = 0;
  for (let at = D.start[i]; at < end; at++) {
    const p = D.p[codes[at]];
    sum += p;
    product += p * D.value[codes[at]];
  }
  return Math.max(0, Math.log(sum) - product / sum);
}

/**
 * The residuals of a form that have a gradient: a coefficient of zero is dropped and never multiplied, and so is the student
 * itself, for p − R = 0.
 */
function termsOf(residual) {
  return residual
    .map((part) => {
      const { weight: factor = 1, divergence = 'forward_kl', ...named } = typeof part === 'string' ? { [part]: {} } : part;
      const [make, parameters] = lookUp(POOLS, 'residual', named);
      const { offset_slope: slope = null, ...pool } = make(parameters);
      return { factor, slope, divergence: divergenceOf(divergence), pool: Object.fromEntries(Object.entries(pool).filter(([, c]) => c !== 0)) };
    })
    .filter(({ factor, slope, pool }) => factor !== 0 && (slope !== null || pool.student !== 1 || Object.keys(pool).length > 1));
}

/** A form with its numbers put in: {of: 'smoothing', times: −1, plus: 1} is 1 − smoothing. */
function filledIn(part, hyper) {
  if (Array.isArray(part)) return part.map((inner) => filledIn(inner, hyper));
  if (part === null || typeof part !== 'object') return part;
  if ('of' in part) return hyper[part.of] === null ? null : part.plus + part.times * hyper[part.of];
  return Object.fromEntries(Object.entries(part).map(([key, inner]) => [key, filledIn(inner, hyper)]));
}

const entryOf = (D, name) => D.targets.find((entry) => entry.name === name);

/** The composition of an entry at the choices made. */
const formOf = (entry, hyper) =>
  entry.forms.find(({ when }) => Object.entries(when).every(([name, value]) => String(value) === String(hyper[name])));

/** Where the controls of an entry start; null: it follows another one. */
const startOf = (D, name) => Object.fromEntries(Object.entries(entryOf(D, name).parameters).map(([key, { start }]) => [key, start]));

function buildTarget(D, name, hyper) {
  const entry = entryOf(D, name);
  const { trust, residual, scale = null, share = 1, notes = [] } = filledIn(formOf(entry, hyper), hyper);
  const target = { name, hyper, notes: [...(entry.notes ?? []), ...notes], terms: termsOf(residual) };
  const rule = ruleOf(D, trust, target);
  const by = scale === null ? null : ruleOf(D, scale, target).trust;
  if (rule.rest === 0 || share === 0) target.terms = [];
  const rest = typeof rule.rest === 'number' ? () => rule.rest : rule.rest;
  target.weigh = (i, s) => {
    s.unsure = rule.unsure ? rule.unsure(i) : 0; // an offset's mass says its own
    s.a = rule.trust(i, s);
    s.b = rest ? rest(i, s) : 1 - s.a;
    if (by) {
      const times = by(i, s);
      s.a *= times;
      s.b *= times;
    }
    s.a = share * s.a + (1 - share);
    s.b *= share;
  };
  for (const term of target.terms) {
    term.tables = tablesOf(D, term.pool);
    if (term.divergence?.timesP(1, 0) === Infinity && Object.keys(term.pool).length > 0 && D.outside.some((n) => n > 0)) {
      target.notes.push('the residual’s tail is assumed to have the student’s shape; the error of that has no bound, because the score has none');
    }
  }
  return target;
}

/** Why the page cannot show an entry, by the values of its parameters; '' where it can. */
function hindrance(D, name, hyper) {
  const entry = entryOf(D, name);
  const reason = entry.reason ?? formOf(entry, hyper).reason;
  if (reason) return reason;
  try {
    const { terms } = buildTarget({ ...D, models: [] }, name, hyper); // without tables, which take their time
    const lacks = ['teacher', 'reference'].filter((model) => !D.codes[model] && terms.some(({ pool }) => model in pool));
    return lacks.length ? `no ${lacks.join(' and no ')} captured` : '';
  } catch (error) {
    return error.message;
  }
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
