// Every method on one screen, summed while the page is idle.

const COLUMNS = [
  ['mean trust', (s) => round(s.trust), (s) => s.trust],
  ['mean update', (s) => plusMinus(s.update, s.update_error), (s) => s.update],
  ['of sft’s update', (s) => plusMinus(s.update_vs_sft, s.update_error / s.sft, 2), (s) => s.update_vs_sft],
  ['90 % on', (s) => percent(s.carries_90), (s) => s.carries_90],
  ['off simplex', (s) => percent(s.off_simplex), (s) => s.off_simplex],
  ['error at most', (s) => bound(s.error), (s) => s.error],
];

/** Draws the table and fills it method by method; resolves when all are there. */
async function compareView(D) {
  const lines = D.targets.map(({ name, own }) => ({ name, own, hyper: startOf(D, name), row: el('tr') }));
  const said = el('p', { class: 'note', id: 'compare-said', 'aria-live': 'polite' });
  const notes = el('div');
  const heads = ['objective', ...COLUMNS.map(([text]) => text)];
  byId('compare-view').replaceChildren(
    said,
    el(
      'div',
      { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': 'All methods' },
      el(
        'table',
        { class: 'compare' },
        el('caption', { class: 'unseen', text: 'Each objective over all tokens' }),
        el('thead', {}, el('tr', {}, ...heads.map((text) => el('th', { scope: 'col', text })))),
        el('tbody', {}, ...lines.map(({ row }) => row)),
      ),
    ),
    notes,
    el('p', {
      class: 'note',
      text:
        'At default parameters, a run’s own target at the run’s. “90 % on” is the share of tokens that carry 90 % of the update. A small update does not call ' +
        'for a larger learning rate: Adam divides a constant factor out.',
    }),
  );
  for (const { name, own, row } of lines) row.append(el('th', { scope: 'row', text: own ? `${name}, ${own}` : name }));
  const out = figuresFor(D);
  const results = {};
  for (const [done, { name, hyper, row }] of lines.entries()) {
    said.textContent = `Summing ${name}, ${done} of ${lines.length} done`;
    const why = hindrance(D, name, hyper);
    if (why) {
      row.append(el('td', { class: 'muted', colspan: COLUMNS.length, text: why }));
      continue;
    }
    await idle();
    const target = buildTarget(D, name, hyper);
    results[name] = await new Promise((resolve) => runOver(D, target, out, resolve));
    row.append(...COLUMNS.map((column) => compareCell(column, results[name])));
    if (target.notes.length) {
      row.firstChild.append(el('span', { class: 'muted', text: ' *' }));
      notes.append(el('p', { class: 'note', text: `* ${name}: ${target.notes.join('; ')}.` }));
    }
    if (results[name].error > UNRELIABLE) row.classList.add('doubtful');
  }
  said.textContent = `Each objective over all ${count(D.n)} trained tokens of this page.`;
  return results;
}

function compareCell([head, text, share], summary) {
  const small = head === 'error at most' && kIsTooSmall(summary.error);
  const bar = share ? el('span', { class: 'track' }, el('span', { class: 'bar', 'width%': 100 * Math.min(1, Math.max(0, share(summary))) })) : null;
  return el('td', {}, bar, el('span', { class: 'value', text: text(summary) }), small ? el('span', { class: 'unreliable', text: 'k is too small' }) : null);
}

const idle = () => new Promise((resolve) => (globalThis.requestIdleCallback ? requestIdleCallback(resolve, { timeout: 300 }) : setTimeout(resolve, 30)));
