"use strict";
// The page's own script. Text from records is only ever shown by textContent.

const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};
const readJson = (id) => JSON.parse(document.getElementById(id).textContent);
const numbers = (text, Kind) => {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Kind(bytes.buffer);
};
const count = (n) => n.toLocaleString("en");
const later = (task) => {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; task(); });
  };
};

// ---------------------------------------------------------------- charts

const views = {}; // by the chart's id, once it is drawn
const dark = matchMedia("(prefers-color-scheme: dark)");

async function drawCharts() {
  for (const script of document.querySelectorAll("script[data-chart]")) {
    const id = script.dataset.chart;
    const order = { scheme: "viridis", extent: dark.matches ? [0.3, 1] : [0, 0.85] };
    const result = await window.vegaEmbed(`#${id}`, JSON.parse(script.textContent), {
      ast: true, // no eval: the page's policy forbids it
      actions: false,
      renderer: "svg",
      defaultStyle: false,
      config: { range: { ordinal: order } },
      tooltip: { disableDefaultStyle: true },
    });
    views[id] = result.view;
    const drawn = document.querySelector(`#${id} svg`);
    drawn.setAttribute("role", "img");
    drawn.setAttribute("aria-label", JSON.parse(script.textContent).description);
    for (const part of drawn.querySelectorAll("[role], [aria-roledescription]")) {
      part.removeAttribute("role"); // one picture with one description, not a hundred marks
      part.removeAttribute("aria-roledescription");
      part.removeAttribute("aria-label");
    }
  }
  document.dispatchEvent(new Event("charts-drawn"));
  document.documentElement.dataset.drawn = "yes";
}

function signal(id, name, value) {
  if (views[id]) views[id].signal(name, value).runAsync();
}

// ---------------------------------------------------------------- recall

class Recall {
  constructor(root) {
    this.root = root;
    this.id = root.dataset.recall;
    this.part = {};
    for (const element of root.querySelectorAll("[data-is]")) {
      this.part[element.dataset.is] = element;
    }
    this.read(readJson(`${this.id}-data`));
    this.openRecord = -1;
    this.openExtra = 0;
    this.rows = new Map(); // record → its element, for those that are drawn
    this.wire();
    this.judge();
    this.arrange();
  }

  read(data) {
    this.certifiedLine = this.line = data.line;
    this.leftOut = data.left_out;
    this.texts = data.texts;
    this.token = numbers(data.token, Uint32Array);
    this.nll = numbers(data.nll, Float32Array);
    this.margin = numbers(data.margin, Float32Array);
    this.finalP = Float64Array.from(this.nll, (nll) => Math.exp(-nll));
    this.p = this.finalP;
    this.rival = new Map();
    const rivals = numbers(data.rivals, Uint32Array);
    numbers(data.wrong, Uint32Array).forEach((at, i) => this.rival.set(at, rivals[i]));
    let start = 0;
    this.records = data.records.map(([id, title, n, first, cascade, decoded, said, argmax]) => {
      const record = { id, title, start, stop: start + n, first, cascade, decoded, said, argmax };
      start += n;
      return record;
    });
    this.epochs = data.epochs || [];
    this.seen = data.seen ? numbers(data.seen, Uint8Array) : null;
    this.frame = this.epochs.length; // after the last one: what the audit found
    this.findLate();
  }

  // The last twentieth of the tokens to cross the certificate's line for good.
  findLate() {
    this.crossed = new Float64Array(this.token.length);
    if (!this.seen) { this.late = () => false; return; }
    const n = this.token.length, bar = this.certifiedLine * 255;
    for (let at = 0; at < n; at++) {
      let frame = this.epochs.length - 1;
      while (frame >= 0 && this.seen[frame * n + at] >= bar) frame--;
      const never = this.finalP[at] < this.certifiedLine;
      this.crossed[at] = never ? Infinity : frame + 1;
    }
    const sorted = Float64Array.from(this.crossed).sort();
    const bound = sorted[Math.floor(0.95 * n)];
    this.late = (at) => this.crossed[at] > 0 && this.crossed[at] >= bound;
  }

  atEnd() { return this.frame === this.epochs.length; }

  // Which records and tokens are over the line, at this line and epoch.
  judge() {
    let under = 0, over = 0;
    for (const record of this.records) {
      record.low = 1;
      record.under = 0;
      for (let at = record.start; at < record.stop; at++) {
        const p = this.p[at];
        if (p < record.low) record.low = p;
        if (p < this.line) record.under++;
      }
      under += record.under;
      if (!record.under) over++;
    }
    const recited = this.records.filter((r) => (r.decoded === null ? r.argmax : r.decoded)).length;
    const when = this.atEnd() ? "" : `In epoch ${this.epochs[this.frame]}: `;
    const also = this.atEnd() ? ` ${count(recited)} are recited word for word.` : "";
    this.part.count.textContent =
      `${when}${count(over)} of ${count(this.records.length)} ${this.leftOut ? "shown records" : "records"} have every token at ` +
      `p ≥ ${this.line.toFixed(2)}; ${count(under)} of ${count(this.p.length)} tokens are under it.${also}`;
  }

  good(record) { return !record.under && (record.decoded !== false || !this.atEnd()); }

  // Which records are listed, and in which order.
  arrange() {
    const words = this.part.search.value.toLowerCase();
    const wanted = {
      all: () => true,
      failing: (r) => r.under > 0,
      unrecited: (r) => (r.decoded === null ? !r.argmax : !r.decoded),
      passing: (r) => !r.under,
      disagree: (r) => r.decoded !== null && r.decoded !== r.argmax,
    }[this.part.filter.value];
    const last = (r) => {
      let latest = 0;
      for (let at = r.start; at < r.stop; at++) latest = Math.max(latest, this.crossed[at]);
      return latest;
    };
    const key = {
      failed: (r) => (this.good(r) ? 1 : 0) + r.low / 2,
      p: (r) => r.low,
      late: (r) => -last(r),
      longest: (r) => r.start - r.stop,
      file: () => 0,
    }[this.part.sort.value];
    const found = [];
    this.records.forEach((record, i) => {
      if (wanted(record) && (!words || this.text(record).includes(words))) {
        found.push([key(record), i]);
      }
    });
    found.sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : a[1] - b[1]));
    this.order = found.map((pair) => pair[1]);
    if (!this.order.includes(this.openRecord)) this.close();
    this.redraw();
  }

  text(record) {
    if (record.text === undefined) {
      let text = "";
      for (let at = record.start; at < record.stop - 1; at++) text += this.texts[this.token[at]];
      record.text = `${record.id}\n${record.title}\n${text}`.toLowerCase();
    }
    return record.text;
  }

  // ------------------------------------------------------------ the list: only what is in sight

  top(place) {
    const openPlace = this.openRecord < 0 ? Infinity : this.order.indexOf(this.openRecord);
    return place * this.rowHeight + (place > openPlace ? this.openExtra : 0);
  }

  redraw() {
    this.rows.clear();
    this.part.rows.replaceChildren();
    this.draw();
  }

  draw(everything = false) {
    const { list, rows } = this.part;
    this.rowHeight = parseFloat(getComputedStyle(list).getPropertyValue("--row"));
    rows.style.height = `${Math.max(this.rowHeight, this.top(this.order.length))}px`;
    if (!everything) list.style.height = rows.offsetHeight < 700 ? `${rows.offsetHeight + 2}px` : "";
    const from = list.scrollTop - this.openExtra - 10 * this.rowHeight;
    const first = everything ? 0 : Math.max(0, Math.floor(from / this.rowHeight));
    const sight = Math.ceil(list.clientHeight / this.rowHeight);
    const last = everything ? Math.min(everything, this.order.length)
      : Math.min(this.order.length, Math.ceil(list.scrollTop / this.rowHeight) + sight + 10);
    const keep = new Set(this.order.slice(first, last));
    for (const [i, row] of this.rows) {
      if (!keep.has(i) && !row.contains(document.activeElement)) {
        row.remove();
        this.rows.delete(i);
      }
    }
    for (let place = first; place < last; place++) {
      const i = this.order[place];
      let row = this.rows.get(i);
      if (!row) {
        row = this.row(i);
        this.rows.set(i, row);
        rows.append(row);
      }
      row.style.top = `${this.top(place)}px`;
      row.setAttribute("aria-posinset", place + 1);
      row.setAttribute("aria-setsize", this.order.length);
    }
    if (!this.order.length && !rows.firstChild) {
      rows.append(make("li", "empty", "No record is like that."));
    }
  }

  row(i) {
    const record = this.records[i], row = make("li", "row");
    row.dataset.record = i;
    const line = make("div", "line"), open = make("button", "open");
    const good = this.good(record);
    open.type = "button";
    const state = make("span", good ? "state" : "state bad", good ? "✓" : "✗");
    state.setAttribute("role", "img");
    state.setAttribute("aria-label", good ? "over the line" : "not over the line or not recited");
    open.append(state, make("span", "title", record.title || record.id));
    open.setAttribute("aria-expanded", String(i === this.openRecord));
    const start = this.weakSpot(record);
    const tokens = make("div", "tokens");
    if (start > record.start) tokens.append(make("span", "", "… "));
    const stop = Math.min(record.stop, start + 120);
    for (let at = start; at < stop; at++) tokens.append(this.box(record, at));
    line.append(open, tokens, make("span", "low", record.low.toFixed(3)));
    line.lastChild.title = "lowest p";
    row.append(line);
    if (i === this.openRecord) row.append(this.detail(record));
    return row;
  }

  // Long records are shown from a little before their first failure on, or their least token.
  weakSpot(record) {
    if (record.stop - record.start <= 24) return record.start;
    let at = record.start + (record.first || 0);
    if (record.first === null) {
      for (let i = record.start; i < record.stop; i++) if (this.p[i] < this.p[at]) at = i;
    }
    return at - record.start <= 12 ? record.start : at - 8;
  }

  box(record, at) {
    const box = make("span", "t"), end = at === record.stop - 1;
    box.textContent = end ? "end" : this.texts[this.token[at]].replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";
    box.dataset.at = at;
    if (end) box.classList.add("end");
    this.colour(box, record, at);
    return box;
  }

  colour(box, record, at) {
    const p = this.p[at], line = this.line, under = p < line;
    const share = under ? (line - p) / line : (p - line) / (1 - line);
    const level = Math.min(4, 1 + Math.floor(4 * share));
    const kind = (name, is) => box.classList.toggle(name, is);
    for (let i = 1; i <= 4; i++) {
      kind(`u${i}`, under && i === level);
      kind(`o${i}`, !under && i === level);
    }
    const first = record.first === null || !this.atEnd() ? Infinity : record.start + record.first;
    kind("under", under);
    kind("wrong", this.atEnd() && this.rival.has(at));
    kind("first", at === first);
    kind("behind", at > first);
    kind("late", this.late(at));
  }

  recolour() {
    for (const [i, row] of this.rows) {
      const record = this.records[i], state = row.querySelector(".state"), good = this.good(record);
      for (const box of row.querySelectorAll(".t")) this.colour(box, record, Number(box.dataset.at));
      state.textContent = good ? "✓" : "✗";
      state.className = good ? "state" : "state bad";
      state.setAttribute("aria-label", good ? "over the line" : "not over the line or not recited");
      row.querySelector(".low").textContent = record.low.toFixed(3);
    }
  }

  detail(record) {
    const detail = make("div", "detail"), said = make("p", "said");
    const n = record.stop - record.start;
    const recited = record.decoded === null ? "not decoded" : record.decoded
      ? "recited word for word" : "not recited";
    said.textContent = `${record.id} · ${count(n)} tokens · ${recited}` +
      (record.first === null ? "" : ` · first failure at token ${record.first + 1}`) +
      (record.cascade ? ` · ${count(record.cascade)} tokens lost from there on` : "");
    detail.append(said);
    if (record.title) detail.append(make("p", "", record.title));
    const tokens = make("div", "tokens");
    tokens.setAttribute("role", "group");
    tokens.setAttribute("aria-label", "Tokens; arrow keys walk them");
    for (let at = record.start; at < record.stop; at++) {
      const box = this.box(record, at);
      box.tabIndex = at === record.start ? 0 : -1;
      box.setAttribute("role", "img");
      box.setAttribute("aria-label", this.facts(at).map((pair) => pair.join(" ")).join(", "));
      tokens.append(box);
    }
    detail.append(tokens);
    if (record.said !== null && record.said !== undefined) {
      detail.append(make("p", "said", "Greedy decoding gives:"), make("p", "", record.said));
    }
    return detail;
  }

  close() { this.openRecord = -1; this.openExtra = 0; }

  toggle(i) {
    const opening = i !== this.openRecord;
    this.close();
    if (opening) this.openRecord = i;
    this.redraw();
    if (opening) {
      this.openExtra = this.rows.get(i).querySelector(".detail").offsetHeight;
      this.draw();
    }
    this.rows.get(i).querySelector(".open").focus({ preventScroll: true });
  }

  // ------------------------------------------------------------ a token's numbers

  facts(at) {
    const p = this.p[at], facts = [["token", JSON.stringify(this.texts[this.token[at]])]];
    facts.push(["p", p < 0.001 ? p.toExponential(1) : p.toFixed(3)]);
    facts.push(["NLL", `${(-Math.log(Math.max(p, 1e-300))).toFixed(3)} nats`]);
    if (this.atEnd()) {
      facts[2][1] = `${this.nll[at].toFixed(3)} nats`;
      const rival = this.rival.get(at);
      facts.push(rival === undefined
        ? ["the model says", "just this"]
        : ["the model says", JSON.stringify(this.texts[rival])]);
      const margin = this.margin[at];
      facts.push(["margin over the best other", `${margin < 0 ? "−" : "+"}${Math.abs(margin).toFixed(2)} nats`]);
    }
    if (this.seen) {
      const frame = this.crossed[at];
      facts.push(["over the line for good", frame === Infinity ? "never"
        : frame < this.epochs.length ? `from epoch ${this.epochs[frame]}` : "in the end"]);
    }
    return facts;
  }

  tip(box) {
    const tip = document.getElementById("tip");
    tip.replaceChildren(...this.facts(Number(box.dataset.at)).map(([name, value]) => {
      const line = make("div");
      line.append(make("span", "", name), make("b", "", value));
      return line;
    }));
    tip.hidden = false;
    const at = box.getBoundingClientRect();
    const left = Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 8));
    const above = at.top - tip.offsetHeight - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 50 ? above : at.bottom + 8}px`;
  }

  // ------------------------------------------------------------ what the reader does

  wire() {
    const { list, rows, search, filter, sort, line, epoch, play } = this.part;
    const hideTip = () => { document.getElementById("tip").hidden = true; };
    list.addEventListener("scroll", later(() => { hideTip(); this.draw(); }));
    addEventListener("resize", later(() => this.redraw()));
    for (const control of [filter, sort]) control.addEventListener("change", () => this.rearrange());
    search.addEventListener("input", later(() => this.rearrange()));
    line.addEventListener("input", later(() => this.setLine(Number(line.value))));
    rows.addEventListener("click", (event) => {
      const open = event.target.closest(".open");
      if (open) this.toggle(Number(open.closest(".row").dataset.record));
    });
    for (const kind of ["pointerover", "focusin"]) {
      rows.addEventListener(kind, (event) => {
        const box = event.target.closest(".t");
        if (box) this.tip(box); else hideTip();
      });
    }
    rows.addEventListener("pointerleave", hideTip);
    rows.addEventListener("focusout", hideTip);
    rows.addEventListener("keydown", (event) => {
      if (event.key === "Escape") hideTip();
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      const box = event.target.closest(".detail .t"), row = event.target.closest(".row");
      if (box && event.key.match(/Left|Right/)) this.walk(box, step);
      else if (!box && event.key.match(/Up|Down/)) this.walkRows(row, step);
      else return;
      event.preventDefault();
    });
    if (epoch) {
      epoch.max = epoch.value = this.epochs.length;
      this.saySpot();
      epoch.addEventListener("input", later(() => this.setFrame(Number(epoch.value))));
      play.addEventListener("click", () => this.play());
    }
    addEventListener("beforeprint", () => this.print());
    addEventListener("afterprint", () => this.redraw());
    document.addEventListener("charts-drawn", () => this.drawBins());
  }

  rearrange() {
    this.part.list.scrollTop = 0;
    this.arrange();
  }

  walk(box, step) {
    const next = step > 0 ? box.nextElementSibling : box.previousElementSibling;
    if (!next) return;
    box.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  walkRows(row, step) {
    const place = this.order.indexOf(Number(row.dataset.record)) + step;
    if (place < 0 || place >= this.order.length) return;
    const { list } = this.part, top = this.top(place);
    if (top < list.scrollTop) list.scrollTop = top;
    const bottom = top + this.rowHeight;
    if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
    this.draw();
    this.rows.get(this.order[place]).querySelector(".open").focus();
  }

  setLine(line) {
    this.line = line;
    this.part["line-said"].textContent = `p ≥ ${line.toFixed(2)}`;
    this.part["legend-line"].textContent = line.toFixed(2);
    this.judge();
    this.recolour();
    signal(`chart-${this.id}-probability`, "line", line);
  }

  setFrame(frame) {
    this.frame = frame;
    const n = this.token.length;
    this.p = this.atEnd() ? this.finalP
      : Float64Array.from(this.seen.subarray(frame * n, (frame + 1) * n), (byte) => byte / 255);
    this.judge();
    this.recolour();
    this.saySpot();
    this.drawBins();
    const last = this.epochs[this.epochs.length - 1];
    signal(`chart-${this.id}-training`, "epoch", this.atEnd() ? last : this.epochs[frame]);
  }

  saySpot() {
    const said = this.atEnd() ? "as saved" : `epoch ${this.epochs[this.frame]}`;
    this.part["epoch-said"].textContent = said;
    this.part.epoch.setAttribute("aria-valuetext", said);
  }

  drawBins() {
    const view = views[`chart-${this.id}-probability`];
    if (!view || this.leftOut) return; // what is drawn counts all of them
    const n = 40, bins = Array.from({ length: n }, (_, i) => ({ low: i / n, high: (i + 1) / n, n: 0 }));
    for (const p of this.p) bins[Math.min(n - 1, Math.floor(p * n))].n++;
    view.data("bins", bins).runAsync();
  }

  play() {
    const { epoch, play } = this.part;
    if (this.timer) { this.stop(); return; }
    if (this.atEnd()) this.setFrame(0);
    play.textContent = "Stop";
    const pause = Math.max(40, 8000 / this.epochs.length);
    this.timer = setInterval(() => {
      this.setFrame(this.frame + 1);
      epoch.value = this.frame;
      if (this.atEnd()) this.stop();
    }, Math.min(pause, 250));
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
    this.part.play.textContent = "Play";
  }

  print() {
    const most = 300;
    this.draw(most);
    const left = this.order.length - most;
    this.part.printed.textContent = left > 0
      ? `The first ${most} records as listed on screen; ${count(left)} more are in the page.` : "";
  }
}

// ---------------------------------------------------------------- plan

// Standard normal distribution function, and its inverse by bisection.
function normal(z) {
  const t = 1 / (1 + 0.3275911 * Math.abs(z) / Math.SQRT2);
  const poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  const erf = 1 - poly * Math.exp(-z * z / 2);
  return z < 0 ? (1 - erf) / 2 : (1 + erf) / 2;
}
function quantile(p) {
  let low = -8, high = 8;
  for (let i = 0; i < 60; i++) {
    const middle = (low + high) / 2;
    if (normal(middle) < p) low = middle; else high = middle;
  }
  return (low + high) / 2;
}

// The broken line through (xs, ys) at a place; straight on beyond its ends.
function along(at, xs, ys) {
  let i = 1;
  while (i < xs.length - 1 && xs[i] <= at) i++;
  return ys[i - 1] + (at - xs[i - 1]) * (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1]);
}

class Plan {
  constructor(root) {
    this.fit = readJson(`${root.dataset.plan}-plan-data`);
    this.part = {};
    for (const element of root.querySelectorAll("[data-is]")) {
      this.part[element.dataset.is] = element;
    }
    for (const name of ["tokens", "confidence"]) {
      this.part[name].addEventListener("input", () => this.show());
    }
    this.show();
  }

  // ln of the rank that has each of the table's probabilities, at this length.
  column(tokens) {
    const { logTokens, logRank, z } = this.fit;
    return z.map((_, i) => along(Math.log(tokens), logTokens, logRank.map((row) => row[i])));
  }

  chance(rank, column) { return normal(along(Math.log(rank), column, this.fit.z)); }

  show() {
    const { fit, part } = this;
    const tokens = Number(part.tokens.value), confidence = Number(part.confidence.value);
    if (!(tokens >= 1) || !(confidence > 0 && confidence < 1)) {
      this.warn("Give at least one token, and a confidence between 0 and 1.");
      for (const name of ["rank", "parameters", "megabytes", "chance"]) part[name].textContent = "–";
      part.ranks.replaceChildren();
      return;
    }
    const column = this.column(tokens);
    const rank = Math.max(1, Math.ceil(Math.exp(along(quantile(confidence), fit.z, column)) - 1e-9));
    const cost = (r) => Math.round(r * fit.parametersPerRank);
    const megabytes = (r) => (cost(r) * fit.bytesPerParameter / 1e6).toFixed(3);
    part.rank.textContent = count(rank);
    part.chance.textContent = `P(certified) ${this.chance(rank, column).toFixed(3)}`;
    part.parameters.textContent = count(cost(rank));
    part.megabytes.textContent = `${megabytes(rank)} MB`;
    const [fewest, most] = fit.tokens, [lowest, highest] = fit.ranks;
    const outside = [];
    if (tokens < fewest || tokens > most) outside.push(`${count(tokens)} tokens (measured: ${count(fewest)} to ${count(most)})`);
    if (rank < lowest || rank > highest) outside.push(`rank ${count(rank)} (measured: ${lowest} to ${highest})`);
    this.warn(outside.length ? `This goes beyond what was measured: ${outside.join(", ")}.` : "");
    const shown = [...new Set([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, rank])]
      .sort((a, b) => a - b);
    part.ranks.replaceChildren(...shown.map((r) => {
      const line = make("tr", r === rank ? "chosen" : "");
      for (const text of [r, count(cost(r)), megabytes(r), this.chance(r, column).toFixed(3)]) {
        line.append(make("td", "", String(text)));
      }
      return line;
    }));
  }

  warn(text) {
    this.part.warning.textContent = text;
    this.part.warning.hidden = !text;
  }
}

// ---------------------------------------------------------------- begin

for (const root of document.querySelectorAll("[data-recall]")) new Recall(root);
for (const root of document.querySelectorAll("[data-plan]")) new Plan(root);
drawCharts();
dark.addEventListener("change", drawCharts);
