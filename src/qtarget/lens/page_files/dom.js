// Making elements. Text goes in by textContent only: a token may read like markup and stays text.
//
// No chart library on purpose. The page has bars, one density and a list box of tokens; its whole script and style are
// under 90 kB as written. Minified, uPlot 1.6 is 51 kB and draws lines on a canvas, which neither prints well nor has text
// for a screen reader; Observable Plot 0.6 with D3 7.9 is 490 kB; Vega 6 with Vega-Lite is 770 kB and by default
// compiles its expressions with Function, which this page's policy forbids.

function el(tag, properties = {}, ...children) {
  const svg = ['svg', 'g', 'rect', 'line', 'text', 'path', 'pattern', 'defs'].includes(tag);
  const made = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === 'text') made.textContent = value;
    else if (name.startsWith('on')) made.addEventListener(name.slice(2), value);
    else if (name === 'value') made.value = value;
    else if (name === 'width%') made.style.width = `${value}%`;
    else made.setAttribute(name, value === true ? '' : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const byId = (id) => document.getElementById(id);

// Control, format, surrogate, private, unassigned, line separators, and spaces that are no plain space.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu;

/** A token's text with nothing invisible in it, and nothing that turns the direction of what follows. */
function visible(text) {
  const shown = text
    .replaceAll(' ', '␣')
    .replaceAll('\n', '⏎')
    .replaceAll('\t', '⇥')
    .replace(HIDDEN, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);
  if (shown === '') return '∅';
  return /^\p{M}/u.test(shown) ? `◌${shown}` : shown;
}

/** A token as an element of its own direction. */
function tokenText(D, id, tag = 'bdi') {
  const kind = D.special.has(id) ? 'token special' : 'token';
  // Marks of spaces and breaks in small, so that the words stand out.
  const parts = visible(D.vocab[id]).split(/([␣⏎⇥]+)/).filter((part) => part !== '');
  if (parts.length === 1 && !/[␣⏎⇥]/.test(parts[0])) return el(tag, { class: kind, text: parts[0] });
  return el(tag, { class: kind }, ...parts.map((part) => el('span', { class: /^[␣⏎⇥]/.test(part) ? 'blank' : undefined, text: part })));
}

const round = (x, digits = 3) => (Number.isFinite(x) ? x.toFixed(digits) : '–');
const bound = (x) => (x === Infinity ? 'no bound' : round(x));
const signed = (x, digits = 3) => (x < 0 ? '−' : '+') + Math.abs(x).toFixed(digits);
const percent = (x, digits = 0) => (Number.isFinite(x) ? `${(100 * x).toFixed(digits)} %` : '–');
const count = (n) => n.toLocaleString('en');
const countOf = (n, what) => `${count(n)} ${what}${n === 1 ? '' : 's'}`;
const plusMinus = (x, error, digits = 3) =>
  error >= 0.5 * 10 ** -digits && error < Infinity ? `${round(x, digits)} ± ${round(error, digits)}` : round(x, digits);

const LEVELS = 9;
/** Where a share of 0 to 1 lies on the colour scale, 0 to 8. */
const level = (x) => (x > 0 ? Math.min(LEVELS - 1, Math.floor(LEVELS * x)) : 0);

/** The colour scale with its numbers: `bounds(k)` is where step k begins. */
function legend(title, bounds, extra = []) {
  const steps = Array.from({ length: LEVELS }, (_, k) => el('span', { class: `step l${k}`, text: bounds(k) }));
  return [el('span', { class: 'legend-title', text: title }), el('span', { class: 'steps' }, ...steps), ...extra];
}

/** A labelled choice. options: [[value, text, disabled]]. */
function choice(label, options, value, onchange, id) {
  const select = el(
    'select',
    { id, onchange: (event) => onchange(event.target.value) },
    ...options.map(([key, text, disabled]) => el('option', { value: key, text, disabled })),
  );
  select.value = value;
  return el('label', { class: 'field' }, el('span', { text: label }), select);
}
