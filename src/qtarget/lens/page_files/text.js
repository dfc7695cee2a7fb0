// The text of a row, its tokens coloured; a list box, so that arrow keys move through it.

const COLOURS = {
  trust: { text: 'trust, the label’s weight', scale: (x) => x, bound: (k) => k / LEVELS, paired: true },
  // A square root, for most updates are small and their differences are what one looks for.
  update: { text: 'update ½‖p − Q‖₁', scale: (x) => Math.sqrt(Math.max(x, 0)), bound: (k) => (k / LEVELS) ** 2, paired: true },
  p_y: { text: 'p_y, the student’s belief in the label', scale: (x) => x, bound: (k) => k / LEVELS },
  disagreement: { text: 'disagreement of label, student and teacher', scale: (x) => x, bound: (k) => k / LEVELS },
};

function colourValue(D, o, name, i) {
  if (name === 'p_y') return D.pY[i];
  return name === 'disagreement' ? D.disagreement[i] : o.figures[name][i];
}

/** Supervised tokens of a row as numbers: [first, one past the last]. */
const tokensOf = (D, row) => [D.firstOfRow[row], D.firstOfRow[row + 1]];

/** Position in its row → number of the token, for supervised ones. */
function numbersAt(D, row) {
  const [from, to] = tokensOf(D, row);
  return new Map(Array.from({ length: to - from }, (_, k) => [D.position[from + k], from + k]));
}

function textControls(D, state, actions) {
  const rows = D.rows.number.map((number, row) => {
    const [from, to] = tokensOf(D, row);
    let sum = 0;
    for (let i = from; i < to; i++) sum += D.disagreement[i];
    const said = to > from ? `${to - from} trained, disagreement ${round(sum / (to - from), 2)}` : 'nothing trained';
    return [row, `row ${number}: ${said}`, to === from];
  });
  const colours = Object.entries(COLOURS).map(([key, { text }]) => [key, text]);
  byId('text-controls').replaceChildren(
    choice('Row', rows, state.row, (value) => actions.row(Number(value)), 'row'),
    el('button', { type: 'button', text: 'Previous row', onclick: () => actions.step(-1) }),
    el('button', { type: 'button', text: 'Next row', onclick: () => actions.step(1) }),
    choice('Colour by', colours, state.colour, actions.colour, 'colour'),
  );
}

/** Builds the panes of the present row; `paintText` colours them. */
function drawText(D, state, actions) {
  const paired = COLOURS[state.colour].paired;
  const panes = [state.A, state.B].slice(0, paired ? 2 : 1).map((o) => pane(D, state, o, paired, actions));
  byId('panes').classList.toggle('single', !paired);
  byId('panes').replaceChildren(...panes.map(({ whole }) => whole));
  state.panes = panes;
  drawLegend(state);
  paintText(D, state);
}

function drawLegend(state) {
  const { text, bound } = COLOURS[state.colour];
  const digits = state.colour === 'update' ? 3 : 2;
  byId('text-legend').replaceChildren(
    ...legend(text, (k) => `${round(bound(k), digits)}`, [
      el('span', { class: 'masked', text: 'not trained' }),
      el('span', { class: 'token special', text: 'special token' }),
      el('span', { text: '␣ space ⏎ line break ⇥ tab' }),
    ]),
  );
}

function pane(D, state, o, paired, actions) {
  const { row } = state;
  const numbers = numbersAt(D, row);
  const spans = new Map();
  const list = el('div', {
    class: 'text',
    role: 'listbox',
    tabindex: 0,
    'aria-label': `Trained tokens of row ${D.rows.number[row]}${paired ? `, coloured by ${o.key}` : ''}`,
  });
  const begin = D.rows.start[row];
  // A character whose bytes are in several tokens stands over these.
  const spread = new Map(D.rows.characters[row].map(([first, end, text]) => [first, { end, text }]));
  let parts = list;
  let end = -1;
  for (let position = 0; position < D.rows.length[row]; position++) {
    const id = D.rows.ids[begin + position];
    const token = numbers.get(position);
    const span = tokenText(D, id, 'span');
    if (spread.has(position)) {
      ({ end } = spread.get(position));
      parts = el('span', { class: 'bytes' });
      list.append(el('span', { class: 'glyph' }, el('span', { class: 'whole', text: visible(spread.get(position).text) }), parts));
    }
    if (token === undefined) {
      span.classList.add('masked');
    } else {
      span.id = `t-${o.key}-${token}`;
      span.dataset.token = token;
      span.setAttribute('role', 'option');
      spans.set(token, span);
    }
    parts.append(span);
    if (position + 1 === end) parts = list;
    if (D.vocab[id].includes('\n')) list.append(el('br'));
  }
  list.addEventListener('click', (event) => {
    const found = event.target.closest('[data-token]');
    if (found) actions.token(Number(found.dataset.token));
  });
  list.addEventListener('keydown', (event) => moveByKey(event, D, state, spans, actions));
  const head = paired ? [el('p', { class: 'pane-head' }, el('span', { class: 'chip', text: o.key }), el('span', { class: 'pane-name' }))] : [];
  return { o, list, spans, whole: el('div', {}, ...head, list) };
}

function moveByKey(event, D, state, spans, actions) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const [from, to] = tokensOf(D, state.row);
  const near = (by) => Math.min(to - 1, Math.max(from, state.token + by));
  const to_ = {
    ArrowRight: () => near(1),
    ArrowLeft: () => near(-1),
    ArrowDown: () => nextLine(spans, state.token, 1),
    ArrowUp: () => nextLine(spans, state.token, -1),
    Home: () => from,
    End: () => to - 1,
  }[event.key];
  if (to_) actions.token(to_());
  else if (event.key === 'PageDown' || event.key === 'PageUp') actions.step(event.key === 'PageDown' ? 1 : -1, true);
  else if (event.key === 'Enter') byId('token').focus();
  else return;
  event.preventDefault();
}

/** The token nearest to this one in the next line that has any, up (−1) or down (1). */
function nextLine(spans, token, direction) {
  const here = spans.get(token).getBoundingClientRect();
  let best = token;
  let bestTop = Infinity;
  let bestAway = Infinity;
  for (const [other, span] of spans) {
    const box = span.getBoundingClientRect();
    const top = direction * (box.top - here.top);
    if (top < 4 || top > bestTop + 4) continue;
    const away = Math.abs(box.left - here.left);
    if (top < bestTop - 4 || away < bestAway) [best, bestTop, bestAway] = [other, Math.min(top, bestTop), away];
  }
  return best;
}

/** Colours the tokens that are there, and marks the chosen one. */
function paintText(D, state) {
  const { scale } = COLOURS[state.colour];
  for (const { o, list, spans, whole } of state.panes) {
    for (const [token, span] of spans) {
      const special = D.special.has(D.ids[D.start[token] + D.label[token]]);
      const chosen = token === state.token;
      const value = colourValue(D, o, state.colour, token);
      const name = `token trained l${level(scale(value))}${special ? ' special' : ''}${chosen ? ' chosen' : ''}`;
      if (span.className !== name) span.className = name;
      if (span.ariaSelected !== String(chosen)) span.ariaSelected = String(chosen);
    }
    list.setAttribute('aria-activedescendant', `t-${o.key}-${state.token}`);
    const named = whole.querySelector('.pane-name');
    if (named) named.textContent = nameOf(D, o);
  }
}

/** "target-sft, eta 0.5" */
function nameOf(D, o) {
  const shown = shownParameters(D, o).filter((name) => o.hyper[name] !== null);
  return [o.name, ...shown.map((name) => `${name} ${o.hyper[name]}`)].join(', ');
}

/** Scrolls the chosen token to the middle of its pane if it is out of view, without moving the page. */
function revealToken(state) {
  for (const { list, spans } of state.panes) {
    const span = spans.get(state.token);
    if (!span) continue;
    const box = span.getBoundingClientRect();
    const frame = list.getBoundingClientRect();
    if (box.top >= frame.top && box.bottom <= frame.bottom) continue;
    list.scrollTop += (box.top + box.bottom - frame.top - frame.bottom) / 2;
  }
}
