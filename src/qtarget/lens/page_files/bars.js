// One token: every distribution over the union of the kept ids, as bars with numbers.

const SHOWN_IDS = 12;

function drawToken(D, state) {
  const i = state.token;
  const label = D.ids[D.start[i] + D.label[i]];
  const pair = [state.A, state.B].map((o) => ({ o, f: tokenFigures(D, o.target, i) }));
  const facts = [
    ['p_y', plainProbability(D.pY[i])],
    ['rank', count(D.rank[i] + 1)],
    ['entropy', `${round(D.entropy[i], 2)} nats`],
    ...D.others.map((name) => [`${name}’s p`, plainProbability(Math.exp(D.numbers[`${name}_log_p_y`][i]))]),
    ['disagreement', round(D.disagreement[i], 2)],
    ...pair.map(({ o, f }) => [`trust ${o.key}`, round(f.trust)]),
    ...pair.map(({ o, f }) => [`update ${o.key}`, plusMinus(f.update, f.updateError)]),
  ];
  byId('token-head').replaceChildren(
    el(
      'p',
      { class: 'context' },
      el('span', { class: 'muted', text: `row ${D.rows.number[D.row[i]]}, position ${D.position[i]}: ` }),
      ...context(D, i, 12, 8),
    ),
    el('dl', { class: 'figures flat' }, ...facts.map(([k, v]) => el('div', {}, el('dt', { text: k }), el('dd', { text: v })))),
  );
  byId('token-bars').replaceChildren(barTable(D, i, label, pair));
  byId('token-note').replaceChildren(...tokenNotes(D, i, pair));
}

function tokenNotes(D, i, pair) {
  const said = ['p − Q is the gradient on the logits: a positive value is to be removed, a negative one (hatched) to be added.'];
  for (const { o, f } of pair) {
    if (f.off) said.push(`Q of ${o.key} leaves the simplex here: a negative entry, as ${o.name} may have it.`);
    if (f.qError === Infinity) {
      said.push(`The error of Q of ${o.key} has no bound: the tail is known only as a sum, and the score of ${o.name} has none.`);
    } else if (f.qError >= 5e-4) {
      said.push(`Q of ${o.key} is off by at most ${round(f.qError)} in all, because the tail is known only as a sum${f.qError > UNRELIABLE ? ': k is too small here' : ''}.`);
    }
    if (!f.residual) said.push(`${o.key} has no residual of its own: what the label does not get stays with the student.`);
  }
  return said.map((text) => el('p', { class: 'note', text }));
}

const plainProbability = (p) => (p > 0 && p < 5e-4 ? p.toExponential(1).replace('-', '−') : round(p));

/** The token with so many before and after it. */
function context(D, i, before, after) {
  const row = D.row[i];
  const at = D.position[i];
  const from = Math.max(0, at - before);
  const to = Math.min(D.rows.length[row], at + after + 1);
  const out = [];
  for (let position = from; position < to; position++) {
    const part = tokenText(D, D.rows.ids[D.rows.start[row] + position], position === at ? 'mark' : 'bdi');
    if (!D.rows.supervised[D.rows.start[row] + position] && position !== at) part.classList.add('masked');
    out.push(part);
  }
  return out;
}

function barTable(D, i, label, pair) {
  const begin = D.start[i];
  const n = D.start[i + 1] - begin;
  const columns = D.models.map((name) => ({
    head: { student: 'p, student', teacher: 'teacher', reference: 'reference' }[name],
    values: Array.from({ length: n }, (_, k) => D.p[D.codes[name][begin + k]]),
    tail: D.tail[name][i],
  }));
  const p = columns[0];
  for (const { o, f } of pair) {
    if (f.residual) columns.push({ head: `residual ${o.key}`, values: f.residual, tail: f.residualTail, first: true });
    columns.push({ head: `Q ${o.key}`, values: f.q, tail: f.qTail, first: !f.residual });
    columns.push({
      head: `p − Q ${o.key}`,
      values: p.values.map((value, k) => value - f.q[k]),
      tail: p.tail - f.qTail,
      difference: true,
    });
  }
  const weight = (k) => Math.max(...columns.map(({ values }) => Math.abs(values[k])));
  const order = Array.from({ length: n }, (_, k) => k).sort((a, b) => weight(b) - weight(a));
  const at = order.indexOf(D.label[i]);
  order.splice(0, 0, ...order.splice(at, 1)); // the label first, whatever its weight
  const lines = order.slice(0, SHOWN_IDS).map((k) => {
    const id = D.ids[begin + k];
    const name = el('th', { scope: 'row' }, tokenText(D, id), k === D.label[i] ? el('span', { class: 'tag', text: 'label' }) : null);
    return el('tr', {}, name, ...columns.map((column) => barCell(column, column.values[k])));
  });
  const rest = order.slice(SHOWN_IDS);
  if (rest.length) {
    const name = el('th', { scope: 'row', class: 'muted', text: `${rest.length} other kept ids` });
    const sum = ({ values }) => rest.reduce((total, k) => total + values[k], 0);
    lines.push(el('tr', {}, name, ...columns.map((column) => barCell(column, sum(column)))));
  }
  const outside = el('th', { scope: 'row', class: 'muted', text: `tail, ${count(D.outside[i])} ids` });
  lines.push(el('tr', { class: 'tail' }, outside, ...columns.map((column) => barCell(column, column.tail))));
  const heads = columns.map(({ head, first }) => el('th', { scope: 'col', class: first ? 'first' : undefined, text: head }));
  return el(
    'table',
    { class: 'bars' },
    el('caption', { class: 'unseen', text: 'Probability of each id under student, other models, residuals and targets' }),
    el('thead', {}, el('tr', {}, el('th', { scope: 'col', text: 'token' }), ...heads)),
    el('tbody', {}, ...lines),
  );
}

/** A number with its bar: from the left for a probability, from the middle for a difference; negative ones are hatched. */
function barCell({ difference, first }, value) {
  const size = Math.min(1, Math.abs(value)) * (difference ? 50 : 100);
  const bar = el('span', { class: `bar${value < 0 ? ' negative' : ''}`, 'width%': size });
  if (difference) bar.style.left = value < 0 ? `${50 - size}%` : '50%';
  return el(
    'td',
    { class: first ? 'first' : undefined },
    el('span', { class: difference ? 'track middle' : 'track' }, bar),
    el('span', { class: 'value', text: difference || value < -5e-4 ? signed(value) : round(Math.abs(value)) }),
  );
}
