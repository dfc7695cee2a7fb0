// What the mask trains and what it leaves out.

function drawMask(D, state, actions) {
  const total = D.rows.ids.length;
  const empty = D.rows.number.filter((_, row) => D.firstOfRow[row] === D.firstOfRow[row + 1]).length;
  const rows = D.rows.number.length;
  const firsts = tally(D, (row) => D.firstOfRow[row]);
  const lasts = tally(D, (row) => D.firstOfRow[row + 1] - 1);
  const facts = [
    ['tokens trained', `${count(D.n)} of ${count(total)}, ${percent(D.n / total, 1)}`],
    ['left out', `${count(total - D.n)}, ${percent(1 - D.n / total, 1)}`],
    ['rows', count(rows)],
    ['rows with nothing trained', count(empty)],
    ['end of turn trained', endOfTurn(D)],
  ];
  byId('mask-view').replaceChildren(
    el('dl', { class: 'figures flat wide' }, ...facts.map(([k, v]) => el('div', {}, el('dt', { text: k }), el('dd', { text: v })))),
    el(
      'div',
      { class: 'pair' },
      el('div', {}, el('h3', { text: 'Trained parts of each row' }), strips(D, state, actions)),
      el(
        'div',
        {},
        el('h3', { text: 'First trained token' }),
        common(D, firsts),
        el('h3', { text: 'Last trained token' }),
        common(D, lasts),
        el('h3', { text: 'The row shown' }),
        el('p', { id: 'mask-row' }),
      ),
    ),
  );
  drawMaskRow(D, state);
}

/** In how many rows an end-of-turn token is trained. */
function endOfTurn(D) {
  if (D.ends === null) return 'unknown: the capture does not say which tokens end a turn';
  const ends = new Set(D.ends);
  const rows = new Set();
  const last = new Set();
  for (let i = 0; i < D.n; i++) {
    if (!ends.has(D.ids[D.start[i] + D.label[i]])) continue;
    rows.add(D.row[i]);
    if (i + 1 === D.firstOfRow[D.row[i] + 1]) last.add(D.row[i]);
  }
  const all = D.rows.number.length;
  const said = rows.size === all ? 'yes, in every row' : rows.size ? `in ${count(rows.size)} of ${count(all)} rows` : 'no: the model is never taught to stop';
  return rows.size ? `${said}; the last trained token in ${count(last.size)} of them` : said;
}

/** [[id, rows]] of the first or last trained tokens, most frequent first. */
function tally(D, which) {
  const found = new Map();
  for (let row = 0; row < D.rows.number.length; row++) {
    if (D.firstOfRow[row] === D.firstOfRow[row + 1]) continue;
    const i = which(row);
    const id = D.ids[D.start[i] + D.label[i]];
    found.set(id, (found.get(id) ?? 0) + 1);
  }
  return [...found].sort((a, b) => b[1] - a[1]);
}

function common(D, found) {
  const lines = found.slice(0, 4).map(([id, rows]) => el('li', {}, tokenText(D, id), el('span', { text: ` in ${countOf(rows, 'row')}` })));
  if (found.length > 4) lines.push(el('li', { class: 'muted', text: `and ${countOf(found.length - 4, 'other')}` }));
  return el('ul', { class: 'plain' }, ...lines);
}

/** A line a row, as long as its tokens; trained stretches filled. At most 40 rows: those around the one shown. */
function strips(D, state, actions) {
  const SHOWN = 40;
  const first = Math.max(0, Math.min(state.row - SHOWN / 2, D.rows.number.length - SHOWN));
  const rows = D.rows.number.slice(first, first + SHOWN).map((_, k) => first + k);
  const longest = Math.max(1, ...rows.map((row) => D.rows.length[row]));
  const bars = rows.map((row, line) => {
    const y = line * 9;
    const x = (position) => (500 * position) / longest;
    const parts = [el('rect', { class: row === state.row ? 'strip now' : 'strip', x: 0, y, width: x(D.rows.length[row]), height: 7 })];
    let from = -1;
    for (let at = 0; at <= D.rows.length[row]; at++) {
      const on = at < D.rows.length[row] && D.rows.supervised[D.rows.start[row] + at];
      if (on && from < 0) from = at;
      if (!on && from >= 0) {
        parts.push(el('rect', { class: 'strip-on', x: x(from), y, width: Math.max(0.5, x(at) - x(from)), height: 7 }));
        from = -1;
      }
    }
    return el('g', { onclick: () => D.firstOfRow[row] < D.firstOfRow[row + 1] && actions.row(row) }, ...parts);
  });
  const said = `Trained stretches of ${rows.length} rows, from row ${D.rows.number[rows[0]]} on; the longest has ${count(longest)} tokens`;
  return el(
    'div',
    {},
    el('svg', { viewBox: `0 0 500 ${rows.length * 9}`, class: 'strips', role: 'img', 'aria-label': said }, ...bars),
    el('p', { class: 'note', text: `${said}. Filled is trained, hollow is left out.` }),
  );
}

function drawMaskRow(D, state) {
  const [from, to] = tokensOf(D, state.row);
  const length = D.rows.length[state.row];
  const end = (i) => [tokenText(D, D.ids[D.start[i] + D.label[i]]), el('span', { text: ` at position ${D.position[i]}` })];
  byId('mask-row').replaceChildren(
    el('span', { text: `Row ${D.rows.number[state.row]}: ${count(to - from)} of ${count(length)} tokens trained, from ` }),
    ...end(from),
    el('span', { text: ' to ' }),
    ...end(to - 1),
    el('span', { text: '.' }),
  );
}
