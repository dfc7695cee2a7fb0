// An objective with its parameters and its figures: the cards A and B.

// What a parameter's slider covers. Names and defaults come from Python; a parameter that is not here has no control.
const PARAMETERS = {
  eta: { text: 'eta η, the teacher’s share of the residual', min: 0, max: 1, step: 0.01 },
  alpha: { text: 'alpha α, power of p_y', min: -1, max: 10, step: 0.1 },
  tau: { text: 'tau τ, threshold on p_y', min: 0, max: 1, step: 0.01 },
  tau_low: { text: 'tau_low, keep from this p_y', min: 0, max: 1, step: 0.01, start: 0.1 },
  tau_high: { text: 'tau_high, keep below this p_y', min: 0, max: 1, step: 0.01, start: 0.9 },
  top_k: { text: 'top_k, ids in the entropy', min: 2, max: 50, step: 1 },
  power: { text: 'power of the entropy', min: 0.1, max: 4, step: 0.1 },
  kl_weight: { text: 'kl_weight λ, weight of the reference', min: 0, max: 3, step: 0.01 },
  smoothing: { text: 'smoothing ε', min: 0, max: 1, step: 0.01 },
  clip: { text: 'clip', min: 0.01, max: 1, step: 0.01 },
  clip_high: { text: 'clip_high (as clip until moved)', min: 0.01, max: 2, step: 0.01 },
  beta: { text: 'beta β, temperature of the sharpened student', min: 0.1, max: 2, step: 0.05 },
  temperature: { text: 'temperature T', min: 0.25, max: 8, step: 0.05 },
  teacher_temperature: { text: 'teacher_temperature', min: 0.25, max: 8, step: 0.05 },
  kd_weight: { text: 'kd_weight λ, the teacher’s share', min: 0, max: 1, step: 0.01 },
};
const CHOICES = {
  'profit direction': ['higher', 'lower', 'middle'],
  'eaft normalizer': ['log_k', 'none', '3'],
  'gem h': ['linear', 'logsigmoid'],
};

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
  const entry = D.presets.find((preset) => preset.name === o.name);
  const options = D.presets.map(({ name }) => {
    const lacks = lacking(D, name, startOf(D, name));
    return [name, lacks.length ? `${name} (no ${lacks.join(', no ')} captured)` : name, lacks.length > 0];
  });
  const parameters = Object.keys(entry.parameters).filter((name) => isShown(o, name));
  card.replaceChildren(
    el('div', { class: 'card-head' }, el('span', { class: 'chip', text: o.key }), choice(`Objective ${o.key}`, options, o.name, pick, `name-${o.key}`)),
    el('p', { class: 'formula', text: entry.formula }),
    el('p', { class: 'says', text: `${entry.summary} ` }, el('span', { class: 'source', text: entry.source })),
    el('div', { class: 'parameters' }, ...parameters.map((name) => parameter(o, name, onChange, rebuild))),
    el('div', { class: 'notes', id: `notes-${o.key}`, 'aria-live': 'polite' }),
    el('dl', { class: 'figures', id: `figures-${o.key}` }),
  );
}

function isShown(o, name) {
  if (`${o.name} ${name}` in CHOICES) return true;
  if (o.name === 'profit') return (o.hyper.direction === 'middle') === (name !== 'tau');
  return name in PARAMETERS;
}

/** Python's defaults; where one is None, the number a control starts from. */
function startOf(D, name) {
  const hyper = defaultsOf(D, name);
  for (const key of Object.keys(hyper)) hyper[key] ??= PARAMETERS[key]?.start ?? null;
  return hyper;
}

function parameter(o, name, onChange, rebuild) {
  const choices = CHOICES[`${o.name} ${name}`];
  const set = (value) => {
    o.hyper[name] = value;
  };
  if (choices) {
    const chosen = (value) => {
      set(value);
      rebuild();
      byId(`${name}-${o.key}`).focus();
    };
    return choice(name, choices.map((value) => [value, value]), String(o.hyper[name]), chosen, `${name}-${o.key}`);
  }
  const { text, min, max, step } = PARAMETERS[name];
  const value = o.hyper[name] ?? o.hyper.clip;
  const id = `${name}-${o.key}`;
  const slider = el('input', { type: 'range', id, min, max, step, value });
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
    set(step === 1 ? Math.round(number) : number);
    if (name === 'clip' && o.hyper.clip_high === null) showClipHigh(o, from.value);
    onChange(o);
  };
  slider.addEventListener('input', moved(slider, field));
  field.addEventListener('input', moved(field, slider));
  return el('div', { class: 'field slider' }, el('label', { for: id, text }), slider, field);
}

/** PSFT's upper clip is the lower one until it is moved. */
function showClipHigh(o, value) {
  for (const input of byId(`clip_high-${o.key}`).parentElement.querySelectorAll('input')) input.value = value;
}

/** The figures under an objective's parameters; null while they are being summed. */
function drawFigures(o) {
  const s = o.summary;
  const list = byId(`figures-${o.key}`);
  list.classList.toggle('waiting', !s);
  if (s) {
    const rate = (update) => (update > 0 ? (s.sft / update).toPrecision(2) : '∞');
    const range = `${rate(s.update + s.update_error)} to ${rate(s.update - s.update_error)}`;
    const spread = s.update_error >= 5e-4 ? ` (${range})` : '';
    const lines = [
      ['mean trust', round(s.trust)],
      ['mean update', plusMinus(s.update, s.update_error)],
      ['of sft’s update', plusMinus(s.update_vs_sft, s.update_error / s.sft, 2)],
      ['rate for sft’s step', factor(s.lr_factor) + spread],
      ['tokens that carry 90 %', percent(s.carries_90)],
      ['off the simplex', percent(s.off_simplex)],
      ['Q is off by at most', round(s.q_error)],
    ];
    list.replaceChildren(
      ...lines.map(([name, value]) => el('div', {}, el('dt', { text: name }), el('dd', { text: value }))),
    );
  }
  const notes = o.target.notes.map((text) => el('p', { class: 'note', text: `Note: ${text}.` }));
  if (s && s.error > UNRELIABLE) {
    const text = `k is too small: these figures may be off by ${round(s.error, 2)}. Capture with a larger --top_k.`;
    notes.push(el('p', { class: 'unreliable', text }));
  }
  if (o.name === 'profit' && o.hyper.direction === 'middle' && o.hyper.tau_high <= o.hyper.tau_low) {
    notes.push(el('p', { class: 'unreliable', text: 'tau_high is not above tau_low: no token is kept.' }));
  }
  byId(`notes-${o.key}`).replaceChildren(...notes);
}
