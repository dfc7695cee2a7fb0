// Lists of tokens with what surrounds them; a click jumps to the token.

/** The likeliest id of a model at token i. */
function likeliest(D, model, i) {
  const codes = D.codes[model];
  let best = D.start[i];
  for (let k = best; k < D.start[i + 1]; k++) if (codes[k] < codes[best]) best = k; // a small code is a large p
  return { id: D.ids[best], p: D.p[codes[best]] };
}

/** A table of tokens, `size` at first and more on request. */
function tokenList(D, tokens, actions, caption, size) {
  if (!tokens.length) return [el('p', { class: 'note', text: 'No token here.' })];
  const models = D.models.filter((name) => name !== 'reference');
  const body = el('tbody');
  const more = el('button', { type: 'button', class: 'quiet' });
  let shown = 0;
  const extend = () => {
    const next = tokens.slice(shown, shown + size);
    shown += next.length;
    body.append(...next.map((i) => tokenLine(D, i, models, actions)));
    more.textContent = `Show more (${count(tokens.length - shown)} left)`;
    more.hidden = shown >= tokens.length;
  };
  more.addEventListener('click', extend);
  extend();
  const numbers = ['p_y', 'entropy', 'disagreement'];
  const heads = ['token', 'p_y', 'entropy', ...models.map((name) => `${name} says`), 'disagreement', 'context'];
  const table = el(
    'table',
    { class: 'list' },
    el('caption', { class: 'unseen', text: caption }),
    el('thead', {}, el('tr', {}, ...heads.map((text) => el('th', { scope: 'col', class: numbers.includes(text) ? 'number' : undefined, text })))),
    body,
  );
  return [el('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': caption }, table), more];
}

function tokenLine(D, i, models, actions) {
  const id = D.ids[D.start[i] + D.label[i]];
  const jump = el('button', { type: 'button', class: 'jump', onclick: () => actions.jump(i) }, tokenText(D, id));
  jump.append(el('span', { class: 'where', text: ` row ${D.rows.number[D.row[i]]}, ${D.position[i]}` }));
  const said = models.map((name) => {
    const { id: best, p } = likeliest(D, name, i);
    return el('td', {}, tokenText(D, best), el('span', { class: 'value', text: ` ${round(p, 2)}` }));
  });
  return el(
    'tr',
    {},
    el('th', { scope: 'row' }, jump),
    el('td', { class: 'number', text: plainProbability(D.pY[i]) }),
    el('td', { class: 'number', text: round(D.entropy[i], 2) }),
    ...said,
    el('td', { class: 'number', text: round(D.disagreement[i], 2) }),
    el('td', { class: 'context' }, ...context(D, i, 6, 3)),
  );
}

/** All tokens, those first on which label, student and teacher are furthest apart. */
function drawConflicts(D, actions) {
  const order = Array.from({ length: D.n }, (_, i) => i).sort((a, b) => D.disagreement[b] - D.disagreement[a]);
  const what = D.codes.teacher
    ? 'Mean total variation of the three pairs label–student, label–teacher and student–teacher: 0 where all agree, 1 where each is sure of something else.'
    : 'No teacher was captured: this is label against student, 1 − p_y.';
  byId('conflicts-list').replaceChildren(
    el('p', { class: 'note', text: what }),
    ...tokenList(D, order.slice(0, 500), actions, 'Tokens with most disagreement', 15),
  );
}
