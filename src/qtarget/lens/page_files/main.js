// Puts the page together: one state, and what follows from each change of it.

const D = readRecord(JSON.parse(byId('data').textContent));

/** The row in which label, student and teacher are furthest apart in all, and its furthest token. */
function start() {
  const sums = new Float64Array(D.rows.number.length);
  for (let i = 0; i < D.n; i++) sums[D.row[i]] += D.disagreement[i];
  const row = sums.indexOf(Math.max(...sums));
  return { row, token: furthest(row) };
}

function furthest(row) {
  const [from, to] = tokensOf(D, row);
  let best = from;
  for (let i = from; i < to; i++) if (D.disagreement[i] > D.disagreement[best]) best = i;
  return best;
}

const objective = (key, name) => ({ key, name, hyper: startOf(D, name), figures: figuresFor(D), target: null, summary: null, stop: () => {} });

// The run's own target comes first, then sft beside it.
const own = D.targets.filter((entry) => entry.own && !hindrance(D, entry.name, startOf(D, entry.name))).map(({ name }) => name);
const usual = [D.codes.teacher ? 'target-sft' : 'dft', 'sft'];
const [first, second] = [...own, ...(own.length ? usual.reverse() : usual).filter((name) => !own.includes(name))];

const state = {
  ...start(),
  colour: 'trust',
  A: objective('A', first),
  B: objective('B', second),
  panes: [],
  map: null,
};

const working = scratchFor(D);
/** The figures of the row that is looked at, ahead of all others. */
const replayRow = (o) => replay(D, o.target, ...tokensOf(D, state.row), o.figures, working);

function changed(o) {
  o.stop();
  o.target = buildTarget(D, o.name, o.hyper);
  o.summary = null;
  replayRow(o);
  paintText(D, state);
  drawToken(D, state);
  drawFigures(o);
  o.stop = runOver(D, o.target, o.figures, (summary) => {
    o.summary = summary;
    drawFigures(o);
    if (state.map && state.map.frame < 0 && state.map.colour.endsWith(` ${o.key}`)) drawMap(D, state, state.map);
  });
}

const actions = {
  token(i) {
    state.token = i;
    paintText(D, state);
    revealToken(state);
    drawToken(D, state);
  },
  row(row, token = furthest(row)) {
    state.row = row;
    state.token = token;
    replayRow(state.A);
    replayRow(state.B);
    byId('row').value = row;
    drawText(D, state, actions);
    revealToken(state);
    drawToken(D, state);
    drawMaskRow(D, state);
  },
  /** To the next row that has a trained token, forwards or backwards. */
  step(by, focus = false) {
    let row = state.row + by;
    while (row >= 0 && row < D.rows.number.length && D.firstOfRow[row] === D.firstOfRow[row + 1]) row += by;
    if (row < 0 || row >= D.rows.number.length) return;
    actions.row(row);
    if (focus) state.panes[0].list.focus();
  },
  colour(name) {
    state.colour = name;
    drawText(D, state, actions);
    revealToken(state);
  },
  jump(i) {
    if (D.row[i] === state.row) actions.token(i);
    else actions.row(D.row[i], i);
    byId('text').scrollIntoView({ block: 'start' });
    state.panes[0].list.focus({ preventScroll: true });
  },
};

function drawHead() {
  const { about } = D;
  const shown = D.rows.number.length;
  const rows = shown < D.capturedRows ? `the first ${count(shown)} of ${count(D.capturedRows)} captured rows` : `${count(shown)} rows`;
  const facts = [
    ['student', about.model],
    ['teacher', about.teacher],
    ['reference', about.reference],
    ['tokens', `${count(D.n)} trained tokens in ${rows}`],
    ['kept', `the ${count(D.topK)} likeliest ids of each model, of ${count(D.vocabSize)}`],
    ['thinned', D.dropped ? `${round(D.dropped, 1)} ids a token went into its tail to keep the page small` : null],
  ].filter(([, value]) => value);
  byId('facts').replaceChildren(
    ...facts.map(([name, value]) => el('li', {}, el('span', { class: 'muted', text: `${name} ` }), el('bdi', { text: visible(String(value)).replaceAll('␣', ' ') }))),
  );
  const models = D.models.length > 2 ? `${D.models.slice(0, -1).join(', ')} and ${D.models.at(-1)}` : D.models.join(' and ');
  byId('lead-models').textContent = models;
  byId('made').textContent = `Made by ${visible(String(about.program ?? 'qtarget')).replaceAll('␣', ' ')}. Log-probabilities are kept to four or five digits.`;
}

function themeButton() {
  const button = byId('theme');
  const dark = () => (document.documentElement.dataset.theme ?? (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')) === 'dark';
  const say = () => {
    button.textContent = dark() ? 'Light theme' : 'Dark theme';
  };
  button.addEventListener('click', () => {
    document.documentElement.dataset.theme = dark() ? 'light' : 'dark';
    say();
  });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', say);
  say();
}

/** Targets of the run, or of somebody's own, that the page cannot show, with the reason. */
function drawMissing() {
  for (const { name, own, reason } of D.targets) {
    const why = own || reason ? hindrance(D, name, startOf(D, name)) : '';
    if (why) byId('missing').append(el('p', { class: 'unreliable', text: `${name} is not shown: ${why}.` }));
  }
}

drawHead();
drawMissing();
themeButton();
for (const o of [state.A, state.B]) {
  objectiveCard(D, o, changed);
  o.target = buildTarget(D, o.name, o.hyper);
  replayRow(o);
}
textControls(D, state, actions);
drawText(D, state, actions);
for (const o of [state.A, state.B]) changed(o);
revealToken(state);
// What lies below the first screen, once that is there.
const ready = new Promise((resolve) => {
  setTimeout(() => {
    state.map = mapView(D, state, actions);
    drawConflicts(D, actions);
    drawMask(D, state, actions);
    state.openedAfter = performance.now(); // since the file was asked for
    document.documentElement.dataset.ready = 'yes';
    resolve(compareView(D));
  }, 0);
});

// For the tests, and for the curious: the formulas, the record and the state, from the console.
globalThis.lens = { D, state, actions, ready, buildTarget, figuresFor, hindrance, DIVERGENCES, POOLS, RULES, replay, scratchFor, startOf, summarise, tokenFigures, visible };
