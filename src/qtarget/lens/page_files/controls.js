// An objective with its parameters and its figures: the cards A and B.

/** Fills the card of an objective; `onChange` is called when objective or parameter changed. */
function objectiveCard(D, o, onChange) {
  const card = byId(`objective-${o.key}`);
  const rebuild = () => {
    objectiveCard(D, o, onChange);
    onChange(o);
  };
  const pick = (name) => {
    o.name = name;
    o.hyper = startOf(D, name);
    rebuild();
    byId(`name-${o.key}`).focus();
  };
  const entry = entryOf(D, o.name);
  const options = D.targets.map(({ name, own, reason }) => {
    const why = reason ? 'not shown, see below' : hindrance(D, name, startOf(D, name));
    return [name, `${name}${own ? `, ${own}` : ''}${why ? ` (${why})` : ''}`, why !== ''];
  });
  const parameter = (name) => (entry.parameters[name].choices ? chooser : slider)(D, o, name, onChange, rebuild);
  card.replaceChildren(
    el('div', { class: 'card-head' }, el('span', { class: 'chip', text: o.key }), choice(`Objective ${o.key}`, options, o.name, pick, `name-${o.key}`)),
    el('p', { class: 'formula', text: entry.formula }),
    el('p', { class: 'says', text: `${entry.summary} ` }, el('span', { class: 'source', text: entry.source })),
    el('div', { class: 'parameters' }, ...shownParameters(D, o).map(parameter)),
    el('div', { class: 'notes', id: `notes-${o.key}`, 'aria-live': 'polite' }),
    el('dl', { class: 'figures', id: `figures-${o.key}` }),
  );
}

/** Choices, and the sliders that matter at what is chosen. */
function shownParameters(D, o) {
  const { parameters } = entryOf(D, o.name);
  const { sliders } = formOf(entryOf(D, o.name), o.hyper);
  return Object.keys(parameters).filter((name) => parameters[name].choices || sliders.includes(name));
}

function chooser(D, o, name, onChange, rebuild) {
  const chosen = (value) => {
    o.hyper[name] = value;
    rebuild();
    byId(`${name}-${o.key}`).focus();
  };
  const options = entryOf(D, o.name).parameters[name].choices.map((value) => {
    const why = hindrance(D, o.name, { ...o.hyper, [name]: value });
    return [value, `${value}${why ? ` (${why})` : ''}`, why !== ''];
  });
  return choice(name, options, String(o.hyper[name]), chosen, `${name}-${o.key}`);
}

function slider(D, o, name, onChange) {
  const { text, min, max, step, follows } = entryOf(D, o.name).parameters[name];
  const value = o.hyper[name] ?? o.hyper[follows];
  const id = `${name}-${o.key}`;
  const range = el('input', { type: 'range', id, min, max, step, value });
  const field = el('input', { type: 'number', 'aria-label': `${name} of ${o.key}, as a number`, min, max, step, value });
  const moved = (from, to) => () => {
    const number = Number(from.value);
    if (from.value === '' || !(number >= min && number <= max)) {
      from.setAttribute('aria-invalid', 'true');
      return;
    }
    from.removeAttribute('aria-invalid');
    to.removeAttribute('aria-invalid');
    to.value = from.value;
    o.hyper[name] = step === 1 ? Math.round(number) : number;
    moveFollowers(D, o, name, from.value);
    onChange(o);
  };
  range.addEventListener('input', moved(range, field));
  field.addEventListener('input', moved(field, range));
  return el('div', { class: 'field slider' }, el('label', { for: id, text }), range, field);
}

/** A parameter such as PSFT's upper clip is another one until it is moved. */
function moveFollowers(D, o, name, value) {
  for (const [other, { follows }] of Object.entries(entryOf(D, o.name).parameters)) {
    if (follows !== name || o.hyper[other] !== null) continue;
    for (const input of byId(`${other}-${o.key}`).parentElement.querySelectorAll('input')) input.value = value;
  }
}

/** The figures under an objective's parameters; null while they are being summed. */
function drawFigures(o) {
  const s = o.summary;
  const list = byId(`figures-${o.key}`);
  list.classList.toggle('waiting', !s);
  if (s) {
    const lines = [
      ['mean trust', round(s.trust)],
      ['mean update', plusMinus(s.update, s.update_error)],
      ['of sft’s update', plusMinus(s.update_vs_sft, s.update_error / s.sft, 2)],
      ['tokens that carry 90 %', percent(s.carries_90)],
      ['off the simplex', percent(s.off_simplex)],
      ['Q is off by at most', bound(s.q_error)],
    ];
    list.replaceChildren(
      ...lines.map(([name, value]) => el('div', {}, el('dt', { text: name }), el('dd', { text: value }))),
    );
  }
  const notes = o.target.notes.map((text) => el('p', { class: 'note', text: `Note: ${text}.` }));
  if (s && kIsTooSmall(s.error)) {
    const text = `k is too small: these figures may be off by ${round(s.error, 2)}. Capture with a larger --top_k.`;
    notes.push(el('p', { class: 'unreliable', text }));
  }
  byId(`notes-${o.key}`).replaceChildren(...notes);
}
