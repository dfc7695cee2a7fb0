// The map of (p_y, entropy): how many tokens lie where, with the corner of confident conflict, and an area to pick.

const SIDE = 36; // cells along each axis
const BOX = { left: 46, top: 12, width: 440, height: 360 };
// The corner: the student is sure (entropy below a tenth of the most it can be) of something else than the label.
const CORNER = { p: 0.1, entropy: 0.1 };

const MAP_COLOURS = [
  ['sqrt', 'tokens, square root scale'],
  ['log', 'tokens, logarithmic scale'],
  ['trust A', 'mean trust of A'],
  ['trust B', 'mean trust of B'],
  ['update A', 'mean update of A'],
  ['update B', 'mean update of B'],
];

function mapView(D, state, actions) {
  const most = D.entropy.reduce((a, b) => Math.max(a, b), 0);
  const whole = Math.log(D.vocabSize);
  const view = {
    colour: 'sqrt',
    top: Math.min(whole, Math.max(0.5, Math.ceil(most * 2) / 2)),
    area: { pFrom: 0, pTo: CORNER.p, eFrom: 0, eTo: round(CORNER.entropy * whole, 2) },
    cell: null,
    frame: -1,
  };
  view.cell = Uint16Array.from(D.pY, (p, i) => bin(p, SIDE) * SIDE + bin(D.entropy[i] / view.top, SIDE));
  view.corner = cornerTokens(D);
  const svg = el('svg', { viewBox: '0 0 500 420', class: 'map', role: 'img' });
  const colours = choice('Colour by', MAP_COLOURS, view.colour, (value) => {
    view.colour = value;
    drawMap(D, state, view);
  });
  const ranges = [
    ['pFrom', 'p_y from', 1],
    ['pTo', 'p_y to', 1],
    ['eFrom', 'entropy from', view.top],
    ['eTo', 'entropy to', view.top],
  ].map(([key, text, max]) => {
    const field = el('input', { type: 'number', id: `area-${key}`, min: 0, max: round(max, 2), step: 0.01, value: view.area[key] });
    field.addEventListener('input', () => {
      const value = Number(field.value);
      if (field.value === '' || !(value >= 0)) return;
      view.area[key] = value;
      drawArea(D, state, view, actions);
    });
    return el('label', { class: 'field small' }, el('span', { text }), field);
  });
  const corner = () => pick({ pFrom: 0, pTo: CORNER.p, eFrom: 0, eTo: Number(round(CORNER.entropy * whole, 2)) });
  const pick = (area) => {
    view.area = area;
    for (const key of Object.keys(area)) byId(`area-${key}`).value = area[key];
    drawArea(D, state, view, actions);
  };
  brush(svg, view, pick);
  byId('map-figure').replaceChildren(
    el('div', { class: 'bar-of-controls' }, colours, ...historyControls(D, state, view)),
    svg,
    el('div', { class: 'legend', id: 'map-legend' }),
    el(
      'fieldset',
      { class: 'bar-of-controls' },
      el('legend', { text: 'Area: drag over the map, or type' }),
      ...ranges,
      el('button', { type: 'button', text: 'Confident conflicts', onclick: corner }),
    ),
  );
  view.svg = svg;
  drawMap(D, state, view);
  drawArea(D, state, view, actions);
  return view;
}

const bin = (share, bins) => Math.min(bins - 1, Math.max(0, Math.floor(share * bins)));

function cornerTokens(D) {
  const sure = CORNER.entropy * Math.log(D.vocabSize);
  let found = 0;
  for (let i = 0; i < D.n; i++) if (D.pY[i] < CORNER.p && D.entropy[i] < sure) found++;
  return found;
}

/** Cells of the capture: per cell the number of tokens and, where a figure is asked for, its mean. */
function captureCells(D, state, view) {
  const counts = new Float64Array(SIDE * SIDE);
  const sums = new Float64Array(SIDE * SIDE);
  const [name, key] = view.colour.split(' ');
  const values = key ? state[key].figures[name] : null;
  for (let i = 0; i < D.n; i++) {
    counts[view.cell[i]]++;
    if (values) sums[view.cell[i]] += values[i];
  }
  return { side: SIDE, counts, means: values ? sums.map((sum, c) => sum / counts[c]) : null, top: view.top };
}

/** Cells of a step of the training: rows are p_y, columns entropy up to log V. */
function historyCells(D, view) {
  const { count: counts, trust, update } = D.history[view.frame];
  const [name] = view.colour.split(' ');
  const means = { trust, update }[name];
  return { side: counts.length, counts: counts.flat(), means: means ? means.flat() : null, top: Math.log(D.vocabSize) };
}

function drawMap(D, state, view) {
  const past = view.frame >= 0;
  const { side, counts, means, top } = past ? historyCells(D, view) : captureCells(D, state, view);
  view.shownTop = top;
  const most = past ? Math.max(1, ...D.history.flatMap((frame) => frame.count.flat())) : counts.reduce((a, b) => Math.max(a, b), 1);
  const share = { sqrt: (n) => Math.sqrt(n / most), log: (n) => Math.log1p(n) / Math.log1p(most) }[view.colour];
  const shown = means ? (c) => (view.colour.startsWith('update') ? Math.sqrt(Math.max(0, means[c])) : means[c]) : (c) => share(counts[c]);
  const { left, top: above, width, height } = BOX;
  const cells = [];
  for (let c = 0; c < side * side; c++) {
    if (!counts[c]) continue;
    const [px, ey] = [Math.floor(c / side), c % side];
    cells.push(
      el('rect', {
        class: `cell l${level(shown(c))}`,
        x: left + (px * width) / side,
        y: above + height - ((ey + 1) * height) / side,
        width: width / side + 0.3,
        height: height / side + 0.3,
      }),
    );
  }
  const y = (e) => above + height - (height * e) / top;
  const sure = Math.min(top, CORNER.entropy * Math.log(D.vocabSize));
  const ticks = [0, 0.25, 0.5, 0.75, 1];
  view.svg.replaceChildren(
    el('rect', { class: 'frame', x: left, y: above, width, height }),
    ...cells,
    ...(past ? [] : [el('rect', { class: 'area', id: 'map-area' })]),
    el('rect', { class: 'corner', x: left, y: y(sure), width: width * CORNER.p, height: (height * sure) / top }),
    ...ticks.map((t) => el('text', { x: left + width * t, y: above + height + 18, 'text-anchor': 'middle', text: String(t) })),
    ...ticks.map((t) => el('text', { x: left - 6, y: y(t * top) + 4, 'text-anchor': 'end', text: round(t * top, 1) })),
    el('text', { x: left + width / 2, y: above + height + 38, 'text-anchor': 'middle', text: 'p_y, the student’s belief in the label' }),
    el('text', { x: 0, y: 0, transform: `translate(12 ${above + height / 2}) rotate(-90)`, 'text-anchor': 'middle', text: 'entropy, nats' }),
  );
  const corner = past ? '' : `, ${count(view.corner)} tokens, ${percent(view.corner / D.n, 1)}`;
  const total = counts.reduce((a, b) => a + b, 0);
  const when = past ? `step ${D.history[view.frame].step} of the training` : 'this capture';
  view.svg.setAttribute('aria-label', `Density of ${count(total)} tokens over p_y and entropy in ${when}; confident conflicts${corner}`);
  const named = MAP_COLOURS.find(([key]) => key === view.colour)[1];
  const bounds = {
    sqrt: (k) => count(Math.ceil(most * (k / LEVELS) ** 2) || 1),
    log: (k) => count(Math.ceil(Math.expm1((k / LEVELS) * Math.log1p(most))) || 1),
    update: (k) => round((k / LEVELS) ** 2, 3),
    trust: (k) => round(k / LEVELS, 2),
  }[view.colour.split(' ')[0]];
  byId('map-legend').replaceChildren(
    ...legend(past && means ? named.replace(/ of .$/, ', as trained') : named, bounds, [
      el('span', { class: 'corner-key', text: `confident conflict: p_y < ${CORNER.p} and entropy < ${round(sure, 2)}${corner}` }),
    ]),
  );
  placeArea(view);
}

function placeArea(view) {
  const rect = byId('map-area');
  if (!rect) return;
  const { pFrom, pTo, eFrom, eTo } = view.area;
  const { left, top, width, height } = BOX;
  const [e0, e1] = [Math.min(eFrom, view.top) / view.top, Math.min(eTo, view.top) / view.top];
  const place = {
    x: left + width * Math.min(pFrom, 1),
    y: top + height * (1 - e1),
    width: Math.max(0, width * (Math.min(pTo, 1) - pFrom)),
    height: Math.max(0, height * (e1 - e0)),
  };
  for (const [name, value] of Object.entries(place)) rect.setAttribute(name, value);
}

/** The tokens of the picked area, those that disagree most in front. */
function drawArea(D, state, view, actions) {
  placeArea(view);
  const { pFrom, pTo, eFrom, eTo } = view.area;
  const found = [];
  for (let i = 0; i < D.n; i++) {
    const p = D.pY[i];
    if (p >= pFrom && (p < pTo || (pTo >= 1 && p <= 1)) && D.entropy[i] >= eFrom && D.entropy[i] <= eTo) found.push(i);
  }
  found.sort((a, b) => D.disagreement[b] - D.disagreement[a]);
  const title = el('h3', { text: `${countOf(found.length, 'token')} in the area, ${percent(found.length / D.n, 1)}` });
  byId('map-list').replaceChildren(title, ...tokenList(D, found, actions, 'Tokens in the area', 12));
}

/** Dragging over the map picks an area. */
function brush(svg, view, pick) {
  let from = null;
  const at = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * 500;
    const y = ((event.clientY - box.top) / box.height) * 420;
    const within = (share) => Math.min(1, Math.max(0, share));
    return { p: within((x - BOX.left) / BOX.width), e: within(1 - (y - BOX.top) / BOX.height) * view.top };
  };
  const move = (event) => {
    if (!from || view.frame >= 0) return;
    const to = at(event);
    const sorted = (a, b) => [Math.min(a, b), Math.max(a, b)].map((x) => Number(x.toFixed(2)));
    const [pFrom, pTo] = sorted(from.p, to.p);
    const [eFrom, eTo] = sorted(from.e, to.e);
    if (pTo > pFrom && eTo > eFrom) pick({ pFrom, pTo, eFrom, eTo });
  };
  svg.addEventListener('pointerdown', (event) => {
    from = at(event);
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener('pointermove', move);
  svg.addEventListener('pointerup', (event) => {
    move(event);
    from = null;
  });
}

/** Where the capture comes with a run's history: a play control over its steps. */
function historyControls(D, state, view) {
  const frames = D.history;
  if (!frames?.length) return [];
  const slider = el('input', { type: 'range', id: 'history-step', min: 0, max: frames.length - 1, step: 1, value: 0 });
  const said = el('output', { for: 'history-step', id: 'history-said' });
  let timer = 0;
  const show = (frame) => {
    view.frame = frame;
    if (frame >= 0) slider.value = frame;
    said.textContent = frame >= 0 ? `step ${frames[frame].step}` : 'this capture';
    drawMap(D, state, view);
  };
  const play = el('button', { type: 'button', id: 'history-play', text: 'Play the training' });
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = 'Play the training';
  };
  play.addEventListener('click', () => {
    if (timer) return stop();
    play.textContent = 'Pause';
    show(view.frame < 0 || view.frame === frames.length - 1 ? 0 : view.frame);
    timer = setInterval(() => (view.frame < frames.length - 1 ? show(view.frame + 1) : stop()), 600);
  });
  slider.addEventListener('input', () => {
    stop();
    show(Number(slider.value));
  });
  const back = el('button', {
    type: 'button',
    text: 'Back to the capture',
    onclick: () => {
      stop();
      show(-1);
    },
  });
  said.textContent = 'this capture';
  return [play, el('label', { class: 'field' }, el('span', { text: 'Step of the training' }), slider), said, back];
}
