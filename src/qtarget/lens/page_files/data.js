// The record, out of the page's JSON block into flat typed arrays. Layout: page.py, which packs them.

/** Base64 to bytes; the browser's own decoder where it has one, for a page may hold 50 MB. */
function bytes(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text);
  const out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}

function unpack(text, Type) {
  const raw = bytes(text);
  return new Type(raw.buffer, raw.byteOffset, raw.byteLength / Type.BYTES_PER_ELEMENT);
}

/** Running sums with a 0 in front: where each of these many begins. */
function starts(counts) {
  const out = new Uint32Array(counts.length + 1);
  for (let i = 0; i < counts.length; i++) out[i + 1] = out[i] + counts[i];
  return out;
}

/** log p of every 16-bit code; the inverse of `_codes` in page.py. */
function codeValues({ offset, end }) {
  const steps = 65535 / Math.log1p(end / offset);
  return Float64Array.from({ length: 65536 }, (_, code) => -offset * Math.expm1(code / steps));
}

/**
 * The record as the formulas read it.
 *
 * n tokens; the ids of token i are `ids[start[i]] … ids[start[i + 1] − 1]`, likeliest of the student first, and
 * `codes[model]` stand beside them. `tail[model]` is the mass outside, `floor[model]` the log-probability none exceeds.
 */
function readRecord(block) {
  const { tokens: t, rows, code, wide, ...rest } = block; // what is packed is not held twice
  const Ids = wide ? Uint32Array : Uint16Array;
  const numbers = {};
  for (const [name, text] of Object.entries(t.numbers)) numbers[name] = unpack(text, Float32Array);
  const models = ['student', ...block.others];
  const each = (make) => Object.fromEntries(models.map((name) => [name, make(name)]));
  const count = unpack(t.count, Uint16Array);
  const n = count.length;
  const value = codeValues(code);
  const logTail = each((name) => unpack(t.tail[name], Float32Array));
  const outside = Float64Array.from(count, (c) => block.vocabSize - c);
  const pY = Float64Array.from(numbers.log_p_y, Math.exp);
  const row = unpack(t.row, Uint32Array);
  const length = unpack(rows.length, Uint32Array);
  const perRow = new Uint32Array(length.length);
  for (let i = 0; i < n; i++) perRow[row[i]]++;
  const D = {
    ...rest,
    n,
    models,
    numbers,
    logPY: numbers.log_p_y,
    pY,
    rest: Float64Array.from(numbers.log_p_y, (x) => -Math.expm1(x)), // 1 − p_y without cancellation near 1
    entropy: numbers.entropy,
    start: starts(count),
    ids: unpack(t.ids, Ids),
    label: unpack(t.label, Uint16Array),
    rank: unpack(t.rank, Uint32Array),
    codes: each((name) => unpack(t.codes[name], Uint16Array)),
    tail: each((name) => Float64Array.from(logTail[name], (x, i) => (outside[i] > 0 ? Math.exp(x) : 0))),
    floor: each((name) => unpack(t.floor[name], Float32Array)),
    outside,
    value,
    p: value.map(Math.exp),
    row,
    position: unpack(t.position, Uint32Array),
    firstOfRow: starts(perRow),
    rows: {
      number: rows.number,
      length,
      start: starts(length),
      ids: unpack(rows.ids, Ids),
      supervised: unpack(rows.supervised, Uint8Array),
      characters: rows.characters,
    },
    special: new Set(block.special),
  };
  D.disagreement = disagreement(D);
  return D;
}

/**
 * How far label, student and teacher are apart: the mean total variation of their pairs, 0 to 1.
 * Without a teacher it is that of label and student, 1 − p_y.
 */
function disagreement(D) {
  const out = new Float32Array(D.n);
  const teacher = D.codes.teacher;
  for (let i = 0; i < D.n; i++) {
    if (!teacher) {
      out[i] = D.rest[i];
      continue;
    }
    let apart = Math.abs(D.tail.student[i] - D.tail.teacher[i]);
    for (let k = D.start[i]; k < D.start[i + 1]; k++) {
      apart += Math.abs(D.p[D.codes.student[k]] - D.p[teacher[k]]);
    }
    out[i] = (D.rest[i] - Math.expm1(D.numbers.teacher_log_p_y[i]) + apart / 2) / 3;
  }
  return out;
}
